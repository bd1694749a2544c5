"""The published checkpoint folder, read to a run's state and written from one.

`checkpoint/best_checkpoint` holds `model_state_dict`, `optimizer_state_dict` (AdamW with the groups
biases, day layers, others), `scheduler_state_dict` (LambdaLR), `val_PER` and `val_loss`.
`checkpoint/args.yaml` holds the settings.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from b2txt_jax.config import Config, with_overrides
from b2txt_jax.data.trial import TRAIN_ONLY
from b2txt_jax.interop.errors import ConversionError, shortened
from b2txt_jax.interop.nejm_args import args_from_config, check_changed, load_args, read_args
from b2txt_jax.interop.nejm_optimizer import (
    has_amsgrad,
    optimizer_dict,
    read_moments,
    scheduler_dict,
    scheduler_step,
)
from b2txt_jax.interop.torch_reader import read_torch_file
from b2txt_jax.interop.torch_writer import write_torch_file
from b2txt_jax.interop.weights import (
    checked_params,
    fresh_state,
    parameter_names,
    rounding_notes,
    strip_prefixes,
    to_named,
    with_moments,
)
from b2txt_jax.training.checkpoint import BestScore
from b2txt_jax.training.step import TrainState
from lm_server.files.atomic_file import replacing

CHECKPOINT_FILE = "best_checkpoint"
ARGS_FILE = "args.yaml"
COMPILED_PREFIX = "_orig_mod."
"""Prefix of parameter names under torch.compile, which the published trainer uses."""


@dataclass(frozen=True)
class Run:
    """Contents of a workdir."""

    config: Config
    state: TrainState
    best: BestScore
    """Score of `state.params`, infinite if unknown."""
    notes: tuple[str, ...] = ()
    """Lines for the user about what was left out or filled in."""


def checkpoint_path(folder: Path) -> Path:
    """Find the checkpoint in a published output folder or its checkpoint folder, or a file itself.

    Raises:
      ConversionError: there is none.
    """
    candidates = [folder / "checkpoint" / CHECKPOINT_FILE, folder / CHECKPOINT_FILE, folder]
    for path in candidates:
        if path.is_file():
            return path
    raise ConversionError(
        f"{folder} holds no checkpoint; needed checkpoint/{CHECKPOINT_FILE} and "
        f"checkpoint/{ARGS_FILE} in it, as the published trainer writes them (or that checkpoint "
        f"folder, or a checkpoint file)"
    )


def read_nejm(
    folder: Path,
    overrides: Sequence[str] = (),
    ignore: Collection[str] = (),
    restart: bool = False,
) -> Run:
    """Read a published checkpoint folder.

    Args:
      folder: see `checkpoint_path`.
      overrides: `--config.section.key=value`, applied to the converted configuration.
      ignore: see `nejm_args.read_args`.
      restart: leave out the optimizer's state and begin the schedule at step 0.

    Raises:
      ConversionError: a file is missing, damaged or unsafe, or does not fit the settings.
      ConfigError: an override does not fit.
    """
    path = checkpoint_path(folder)
    args_path = path.with_name(ARGS_FILE)
    read = read_args(load_args(args_path), str(args_path), ignore)
    config = with_overrides(read.config, overrides)
    check_changed(config)
    notes = list(read.notes)
    checkpoint = read_torch_file(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint)
        raise ConversionError(
            f"{path} has no model_state_dict, it holds {shortened(found)}; needed a checkpoint "
            f"of the published trainer"
        )
    named = strip_prefixes(checkpoint["model_state_dict"])
    params = checked_params(named, config, str(path))
    notes += rounding_notes(named)
    names = parameter_names(config.model.layers, len(config.data.sessions))
    step, moments = 0, None
    if not restart:
        optimizer = checkpoint.get("optimizer_state_dict")
        step = scheduler_step(checkpoint, str(path))
        moments = read_moments(optimizer, names, str(path))
        if moments is None:
            notes.append("no optimizer state in the checkpoint: its running means start from zero")
        elif step == 0 and moments.steps:
            step = max(moments.steps.values())
        if has_amsgrad(optimizer):
            notes.append("left out: AMSGrad's max_exp_avg_sq; the optimizer is AdamW here")
    state = fresh_state(config, params, step)
    if moments is not None:
        state = with_moments(state, moments, config, str(path))
    best = BestScore(
        known_score(_number(checkpoint, "val_PER")),
        known_score(_number(checkpoint, "val_loss")),
        step,
    )
    more = [name for name in _validated_sessions(config) if name in read.not_validated]
    if more and math.isfinite(best.per):
        best = BestScore(math.inf, math.inf, step)
        notes.append(
            f"val_PER is not used as the score to beat: dataset.dataset_probability_val leaves out "
            f"{', '.join(more)}, whose val files are validated here"
        )
    return Run(config, state, best, tuple(notes))


def known_score(value: float) -> float:
    """Return a file's validation score, or infinity (unknown) unless it is finite and >= 0.

    No later score would beat a NaN.
    """
    return value if math.isfinite(value) and value >= 0 else math.inf


def _number(checkpoint: Mapping[str, Any], name: str) -> float:
    value = checkpoint.get(name)
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    try:
        return float(value) if isinstance(value, int | float) else math.inf
    except OverflowError:  # a whole number beyond floating point
        return math.inf


def write_nejm(folder: Path, run: Run, prefix: str = "") -> None:
    """Write `folder/checkpoint/best_checkpoint` and `args.yaml`.

    Args:
      folder: made if it is missing. The two files are replaced.
      run: the run, with its optimizer state as far as it has one.
      prefix: prefix of every name of `model_state_dict`, see `COMPILED_PREFIX`.

    Raises:
      ConversionError: the published code cannot build such a model.
    """
    args = args_from_config(run.config, _validated_sessions(run.config))
    named = to_named(run.state.params)
    step = int(run.state.step)
    checkpoint = {
        "model_state_dict": {prefix + name: value for name, value in named.items()},
        "optimizer_state_dict": optimizer_dict(run.state, run.config, list(named)),
        "scheduler_state_dict": scheduler_dict(run.config, step),
        "val_PER": float(run.best.per),
        "val_loss": float(run.best.loss),
    }
    folder = folder / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    write_torch_file(folder / CHECKPOINT_FILE, checkpoint)
    with replacing(folder / ARGS_FILE) as path:
        path.write_text(yaml.safe_dump(args, sort_keys=False), encoding="utf-8")


def _validated_sessions(config: Config) -> list[str]:
    """Return the sessions with a val file.

    A session whose data is absent counts, unless it is a published one without a val file.
    """
    root = Path(config.data.root)

    def validated(session: str) -> bool:
        if (root / session).is_dir():
            return (root / session / "data_val.hdf5").is_file()
        return session not in TRAIN_ONLY

    return [session for session in config.data.sessions if validated(session)]
