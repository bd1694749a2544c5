"""Parameters in a safetensors file, under the published PyTorch names, with the configuration.

The metadata holds `b2txt_config` (the configuration as JSON), `b2txt_step`, `b2txt_per` and
`b2txt_loss` (of the best validation). The same configuration stands as JSON beside the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from b2txt_jax.config import Config, ConfigError, freeze, with_overrides, write_config
from b2txt_jax.interop.errors import ConversionError
from b2txt_jax.interop.nejm import Run
from b2txt_jax.interop.weights import checked_params, fresh_state, strip_prefixes, to_named
from b2txt_jax.training.checkpoint import BestScore


def config_path(path: Path) -> Path:
    """Where the configuration stands beside the weights."""
    return path.with_suffix(".json")


def write_safetensors(path: Path, run: Run) -> None:
    """Writes the parameters to `path` and the configuration beside it, as .json."""
    metadata = {
        "format": "pt",  # tells PyTorch's loaders that names and shapes are PyTorch's
        "b2txt_config": json.dumps(dataclasses.asdict(run.config)),
        "b2txt_step": str(int(run.state.step)),
        "b2txt_per": repr(float(run.best.per)),
        "b2txt_loss": repr(float(run.best.loss)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(save(to_named(run.state.params), metadata))
        write_config(run.config, config_path(path))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path: Path, overrides: Sequence[str] = (), restart: bool = False) -> Run:
    """Reads parameters and configuration; the optimizer has no state.

    Args:
      path: the file; a file without our metadata needs the .json beside it.
      overrides: `--config.section.key=value`, applied to the configuration.
      restart: begin the schedule at step 0.

    Raises:
      ConversionError: the file is missing, damaged, lacks its configuration, or does not fit it.
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
    config = with_overrides(_config(path, metadata), overrides)
    params = checked_params(strip_prefixes(named), config, str(path))
    step = 0 if restart else int(_number(metadata, "b2txt_step", 0))
    best = BestScore(
        _number(metadata, "b2txt_per", math.inf), _number(metadata, "b2txt_loss", math.inf), step
    )
    return Run(config, fresh_state(config, params, step), best)


def _config(path: Path, metadata: dict[str, str]) -> Config:
    text, source = metadata.get("b2txt_config"), f"{path} (metadata b2txt_config)"
    beside = config_path(path)
    if text is None and beside.is_file():
        text, source = beside.read_text(encoding="utf-8"), str(beside)
    if text is None:
        raise ConversionError(
            f"{path} has no configuration in its metadata and {beside} does not exist; needed one "
            f"of them: put a config.json of the same model there"
        )
    try:
        values: Any = json.loads(text)
        return freeze(values)
    except (json.JSONDecodeError, ConfigError, TypeError, AttributeError) as error:
        raise ConversionError(f"{source} is not a configuration: {error}") from error


def _number(metadata: dict[str, str], name: str, default: float) -> float:
    try:
        return float(metadata.get(name, default))
    except ValueError as error:
        raise ConversionError(f"metadata {name} is {metadata[name]!r}; needed a number") from error
