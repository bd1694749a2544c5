"""Parameters in a safetensors file, with the configuration: the GRU's under the published PyTorch
names, those of other models under their own, such as `layer0.attention.qkv.weight`.

The metadata holds `b2txt_config` (the configuration as JSON), `b2txt_step`, and `b2txt_per` and
`b2txt_loss` of the best validation. The configuration is also written as JSON beside the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from b2txt_jax.config import Config, ConfigError, differences, freeze, with_overrides, write_config
from b2txt_jax.interop.errors import ConversionError
from b2txt_jax.interop.nejm import Run, known_score
from b2txt_jax.interop.nejm_args import check_changed
from b2txt_jax.interop.nejm_optimizer import MOST_STEPS
from b2txt_jax.interop.weights import (
    checked_params,
    fresh_state,
    named_params,
    rounding_notes,
    strip_prefixes,
)
from b2txt_jax.training.checkpoint import BestScore
from lm_server.files.atomic_file import replacing


def config_path(path: Path) -> Path:
    """Return the path of the configuration beside the weights."""
    return path.with_suffix(".json")


def write_safetensors(path: Path, run: Run) -> None:
    """Write the parameters to `path` and the configuration beside it, as .json."""
    metadata = {
        "format": "pt",  # marks names and shapes as PyTorch's, for its loaders
        "b2txt_config": json.dumps(dataclasses.asdict(run.config)),
        "b2txt_step": str(int(run.state.step)),
        "b2txt_per": repr(float(run.best.per)),
        "b2txt_loss": repr(float(run.best.loss)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(save(named_params(run.state.params, run.config), metadata))
        write_config(run.config, config_path(path))


def read_safetensors(path: Path, overrides: Sequence[str] = (), restart: bool = False) -> Run:
    """Read parameters and configuration. The optimizer has no state.

    Args:
      path: the file. One without our metadata needs the .json beside it. If it has both, they must
        be the same configuration.
      overrides: `--config.section.key=value`, applied to the configuration.
      restart: begin the schedule at step 0.

    Raises:
      ConversionError: the file is missing or damaged, has no configuration, or does not fit it.
      ConfigError: an override does not fit.
    """
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; needed a safetensors file")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{path} is not a whole safetensors file ({error}); copy or write it again"
        ) from error
    config, notes = _config(path, metadata)
    config = with_overrides(config, overrides)
    check_changed(config)
    stripped = strip_prefixes(named)
    params = checked_params(stripped, config, str(path))
    notes += rounding_notes(stripped)
    step = 0 if restart else _step(metadata, path)
    per, loss = _number(metadata, "b2txt_per", path), _number(metadata, "b2txt_loss", path)
    best = BestScore(known_score(per), known_score(loss), step)
    return Run(config, fresh_state(config, params, step), best, tuple(notes))


def _config(path: Path, metadata: dict[str, str]) -> tuple[Config, list[str]]:
    """Return the metadata's configuration, or the one beside the file, with notes."""
    beside = config_path(path)
    text = metadata.get("b2txt_config")
    if text is None and not beside.is_file():
        raise ConversionError(
            f"{path} has no configuration in its metadata and {beside} does not exist; needed one "
            f"of them: put a config.json of the same model there"
        )
    if text is None:
        return _parsed(_text_of(beside), str(beside)), []
    inside = _parsed(text, f"{path} (metadata b2txt_config)")
    if not beside.is_file():
        return inside, []
    try:
        changed = differences(inside, _parsed(_text_of(beside), str(beside)))
    except ConversionError as error:
        return inside, [f"{error}; the configuration in {path.name} itself was used"]
    if changed:
        key, (old, new) = next(iter(changed.items()))
        raise ConversionError(
            f"{beside} is not the configuration that {path.name} itself holds: {len(changed)} keys "
            f"differ, the first is {key}, {new!r} and not {old!r}. Give changes as "
            f"--config.{key}=VALUE, and remove {beside.name} or write the two again"
        )
    return inside, []


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path} is not a configuration: {error}") from error


def _parsed(text: str, source: str) -> Config:
    try:
        values: Any = json.loads(text)
        return freeze(values)
    except (ValueError, ConfigError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{source} is not a configuration: {error}") from error


def _step(metadata: dict[str, str], path: Path) -> int:
    text = metadata.get("b2txt_step", "0")
    # Digits of other scripts are decimal too, and `int` accepts them.
    if not text.isdecimal() or len(text) > 10 or int(text) > MOST_STEPS:
        raise ConversionError(
            f"{path}: metadata b2txt_step is {text[:60]!r}; needed the number of steps done. "
            f"Convert the weights alone with --restart"
        )
    return int(text)


def _number(metadata: dict[str, str], name: str, path: Path) -> float:
    try:
        return float(metadata.get(name, math.inf))
    except ValueError as error:
        raise ConversionError(
            f"{path}: metadata {name} is {metadata[name][:60]!r}; needed a number"
        ) from error
