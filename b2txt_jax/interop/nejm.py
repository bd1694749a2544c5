"""The published checkpoint folder to a run's state and back.

`checkpoint/best_checkpoint` holds `model_state_dict`, `optimizer_state_dict` (AdamW; groups:
biases, day layers, others), `scheduler_state_dict` (LambdaLR), `val_PER` and `val_loss`;
`checkpoint/args.yaml` the settings.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml

from b2txt_jax.config import Config, with_overrides
from b2txt_jax.interop.errors import ConversionError
from b2txt_jax.interop.nejm_args import args_from_config, load_args, read_args
from b2txt_jax.interop.torch_reader import read_torch_file
from b2txt_jax.interop.torch_writer import write_torch_file
from b2txt_jax.interop.weights import (
    Moments,
    checked_params,
    fresh_state,
    moments_of,
    optimizer_groups,
    parameter_names,
    strip_prefixes,
    to_named,
    with_moments,
)
from b2txt_jax.training.checkpoint import BestScore
from b2txt_jax.training.optimizer import warmup_cosine
from b2txt_jax.training.step import TrainState

CHECKPOINT_FILE = "best_checkpoint"
ARGS_FILE = "args.yaml"
COMPILED_PREFIX = "_orig_mod."
"""Before the names of a model under torch.compile, as the published trainer has it."""

# Published sessions without val and test files (NEJM reference, section 1).
_TRAIN_ONLY = frozenset(
    f"t15.{date}" for date in ("2023.08.11", "2024.03.03", "2024.04.25", "2024.04.28")
)


@dataclass(frozen=True)
class Run:
    """What a workdir holds."""

    config: Config
    state: TrainState
    best: BestScore
    """Of `state.params`; infinite where it is not known."""
    notes: tuple[str, ...] = ()
    """Lines for the user on what was left out or filled in."""


def checkpoint_path(folder: Path) -> Path:
    """The checkpoint in a published output folder, in its checkpoint folder, or the file itself.

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
    """Reads a published checkpoint folder.

    Args:
      folder: see `checkpoint_path`.
      overrides: `--config.section.key=value`, applied to the converted configuration.
      ignore: see `nejm_args.read_args`.
      restart: leave out the optimizer's state and begin the schedule at step 0.

    Raises:
      ConversionError: a file is missing, damaged, unsafe, or does not fit the settings.
      ConfigError: an override does not fit.
    """
    path = checkpoint_path(folder)
    args_path = path.with_name(ARGS_FILE)
    read = read_args(load_args(args_path), str(args_path), ignore)
    config = with_overrides(read.config, overrides)
    notes = list(read.notes)
    checkpoint = read_torch_file(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint)
        raise ConversionError(
            f"{path} has no model_state_dict, it holds {found}; needed a checkpoint of the "
            f"published trainer"
        )
    named = strip_prefixes(checkpoint["model_state_dict"])
    params = checked_params(named, config, str(path))
    rounded = {str(v.dtype) for v in named.values()} - {"float32", "float16", "bfloat16"}
    if rounded:
        notes.append(f"weights in {', '.join(sorted(rounded))} were rounded to float32")
    names = parameter_names(config.model.layers, len(config.data.sessions))
    step, moments = 0, None
    if not restart:
        step = _scheduler_step(checkpoint, str(path))
        moments = _read_moments(checkpoint.get("optimizer_state_dict"), names, str(path))
        if moments is None:
            notes.append("no optimizer state in the checkpoint: its running means start from zero")
        elif step == 0 and moments.steps:
            step = max(moments.steps.values())
    state = fresh_state(config, params, step)
    if moments is not None:
        state = with_moments(state, moments, config, str(path))
    best = BestScore(_score(checkpoint, "val_PER"), _score(checkpoint, "val_loss"), step)
    return Run(config, state, best, tuple(notes))


def _score(checkpoint: Mapping[str, Any], name: str) -> float:
    value = checkpoint.get(name)
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) else math.inf


def _scheduler_step(checkpoint: Mapping[str, Any], source: str) -> int:
    scheduler = checkpoint.get("scheduler_state_dict") or {}
    step = scheduler.get("last_epoch", 0) if isinstance(scheduler, dict) else None
    if type(step) is not int or step < 0:
        raise ConversionError(
            f"{source}: scheduler_state_dict has last_epoch {step!r}; needed the number of steps "
            f"done. Convert the weights alone with --restart"
        )
    return step


def _read_moments(optimizer: Any, order: Sequence[str], source: str) -> Moments | None:
    """AdamW's state by name: its parameters are numbered group after group, in the model's
    order."""
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(optimizer, dict) or not state:
        return None
    expected = optimizer_groups(order)
    names = [name for group in expected for name in group]
    groups = optimizer.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list):
        raise ConversionError(
            f"{source}: optimizer_state_dict is not AdamW's; convert the weights alone with "
            f"--restart"
        )
    numbers = [len(group["params"]) for group in groups]
    if numbers != [len(group) for group in expected]:
        raise ConversionError(
            f"{source}: the optimizer has groups of {numbers} parameters; needed "
            f"{[len(group) for group in expected]} (biases, day layers, others). Convert the "
            f"weights alone with --restart"
        )
    indices = [index for group in groups for index in group["params"]]
    mean, square, steps = {}, {}, {}
    for index, name in zip(indices, names, strict=True):
        entry = state.get(index)
        if entry is None:  # a day that no batch has had yet
            continue
        missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in entry]
        if missing:
            raise ConversionError(
                f"{source}: the optimizer state of {name} lacks {', '.join(missing)}; needed "
                f"AdamW's. Convert the weights alone with --restart"
            )
        mean[name], square[name] = entry["exp_avg"], entry["exp_avg_sq"]
        steps[name] = int(np.asarray(entry["step"]).item())
    return Moments(mean, square, steps)


def write_nejm(folder: Path, run: Run, prefix: str = "") -> None:
    """Writes `folder/checkpoint/best_checkpoint` and `args.yaml`.

    Args:
      folder: is made where it is missing; the two files are replaced.
      run: what to write; its optimizer state is written as far as it has one.
      prefix: goes before every name of `model_state_dict`; see `COMPILED_PREFIX`.

    Raises:
      ConversionError: the published code cannot build such a model.
    """
    args = args_from_config(run.config, _validated_sessions(run.config))
    named = to_named(run.state.params)
    step = int(run.state.step)
    checkpoint = {
        "model_state_dict": {prefix + name: value for name, value in named.items()},
        "optimizer_state_dict": _optimizer_dict(run, list(named)),
        "scheduler_state_dict": _scheduler_dict(run.config, step),
        "val_PER": float(run.best.per),
        "val_loss": float(run.best.loss),
    }
    folder = folder / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    write_torch_file(folder / CHECKPOINT_FILE, checkpoint)
    temporary = folder / (ARGS_FILE + ".tmp")
    temporary.write_text(yaml.safe_dump(args, sort_keys=False), encoding="utf-8")
    os.replace(temporary, folder / ARGS_FILE)


def _validated_sessions(config: Config) -> list[str]:
    """Sessions with a val file; where the data is not at hand, all but the published ones known to
    have none."""
    root = Path(config.data.root)

    def validated(session: str) -> bool:
        if (root / session).is_dir():
            return (root / session / "data_val.hdf5").is_file()
        return session not in _TRAIN_ONLY

    return [session for session in config.data.sessions if validated(session)]


def _rates(config: Config, step: int) -> list[float]:
    """Learning rate of the next step, per published group."""
    o = config.optimizer
    main = warmup_cosine(o.learning_rate, o.learning_rate_min, o.warmup_steps, o.decay_steps)
    day = warmup_cosine(
        o.day_learning_rate, o.day_learning_rate_min, o.day_warmup_steps, o.day_decay_steps
    )
    return [float(jnp.asarray(rate(jnp.int32(step)))) for rate in (main, day, main)]


def _base_rates(config: Config) -> list[float]:
    main, day = config.optimizer.learning_rate, config.optimizer.day_learning_rate
    return [main, day, main]


def _optimizer_dict(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """torch.optim.AdamW's state_dict with the published groups."""
    config = run.config.optimizer
    moments = moments_of(run.state)
    groups, state, index = [], {}, 0
    kinds = zip(
        optimizer_groups(names),
        ("bias", "day_layer", "other"),
        (0.0, config.day_weight_decay, config.weight_decay),
        _rates(run.config, int(run.state.step)),
        _base_rates(run.config),
        strict=True,
    )
    for group, kind, decay, rate, base in kinds:
        indices = list(range(index, index + len(group)))
        index += len(group)
        groups.append(
            {
                "weight_decay": decay,
                "group_type": kind,
                "lr": rate,
                "betas": (config.beta1, config.beta2),
                "eps": config.epsilon,
                "amsgrad": False,
                "maximize": False,
                "foreach": None,
                "capturable": False,
                "differentiable": False,
                "fused": True,
                "decoupled_weight_decay": True,
                "initial_lr": base,
                "params": indices,
            }
        )
        for number, name in zip(indices, group, strict=True):
            if name in moments.steps:
                state[number] = {
                    "step": np.array(moments.steps[name], np.float32),
                    "exp_avg": moments.mean[name],
                    "exp_avg_sq": moments.square[name],
                }
    return {"state": state, "param_groups": groups}


def _scheduler_dict(config: Config, step: int) -> dict[str, Any]:
    """torch.optim.lr_scheduler.LambdaLR's state_dict."""
    return {
        "base_lrs": _base_rates(config),
        "last_epoch": step,
        "_step_count": step + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": _rates(config, step),
        "lr_lambdas": [None, None, None],
    }
