"""`b2txt infer`: a trained run's logits for every trial of a split, to memory or to a file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from b2txt_jax.config import CONFIG_FILE, Config, read_written_config, with_overrides
from b2txt_jax.data.hdf5 import Trial, TrialRef
from b2txt_jax.data.loader import Batch, EvaluationData
from b2txt_jax.model.interface import Params
from b2txt_jax.training.checkpoint import Checkpoints
from b2txt_jax.training.sharding import (
    DATA,
    abstract_state,
    jit_eval_step,
    make_mesh,
    placement,
)

CHANGEABLE = frozenset(
    {
        "data.root",
        "data.buckets",
        "data.eval_batch_size",
        "model.dtype",
        "signal.eval_padding",
    }
)
"""Keys of a run's configuration that may differ when its model is used; the others made it."""


@dataclass(frozen=True)
class TrialLogits:
    """One trial's logits, float32 [frames, 41] in the RNN's class order, and what is known of
    it."""

    ref: TrialRef
    logits: np.ndarray
    labels: np.ndarray | None
    """int32 [L]; None without labels."""
    sentence: str | None


@dataclass(frozen=True)
class TrainedModel:
    """A run's configuration and best parameters."""

    config: Config
    params: Params
    step: int
    """Optimizer step of the parameters."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `b2txt infer`."""
    parser.add_argument("--workdir", required=True, type=Path, help="folder of a trained run")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--out", required=True, type=Path, help="the .npz file to write")
    parser.epilog = (
        "Writes `logits` float32 [all frames, 41] (RNN class order), `frames` int32 [N], `trial` "
        "str [N] and, "
        "for val, `sentence` str [N]. Keys of the run's configuration can be changed: "
        "--config.data.root=DIR, --config.signal.eval_padding=valid."
    )


def run(args: argparse.Namespace) -> int:
    """`b2txt infer`."""
    model = load_model(args.workdir, args.overrides)
    trials = compute_logits(model, args.split, Console(stderr=True))
    write_logits(args.out, trials)
    frames = sum(len(trial.logits) for trial in trials)
    print(f"{args.out}: {len(trials)} {args.split} trials, {frames} frames, step {model.step}")
    return 0


def load_model(workdir: Path, overrides: Sequence[str] = ()) -> TrainedModel:
    """Reads a run's configuration and best parameters.

    Raises:
      ConfigError: the folder holds no run.
      CheckpointError: the run has no best checkpoint yet, or it is damaged.
    """
    config = with_overrides(read_written_config(workdir / CONFIG_FILE), overrides, CHANGEABLE)
    # Whole on every device of this mesh, however many devices trained them.
    like = abstract_state(config, len(config.data.sessions), make_mesh()).params
    with Checkpoints(workdir, read_only=True) as checkpoints:
        params, best = checkpoints.restore_best(like)
    return TrainedModel(config, params, best.step)


def compute_logits(
    model: TrainedModel, split: str, console: Console | None = None
) -> list[TrialLogits]:
    """Logits of every trial of a split, in the published order: sessions, then trials.

    All devices share the rows of each batch; `data.eval_batch_size` is rounded up to a multiple of
    their number.

    Raises:
      DataError: a trial cannot be read.
    """
    mesh = make_mesh()
    shares = mesh.shape[DATA]
    size = -(-model.config.data.eval_batch_size // shares) * shares
    config = replace(model.config, data=replace(model.config.data, eval_batch_size=size))
    sessions = config.data.sessions
    step = jit_eval_step(config, len(sessions), mesh)
    places = placement(abstract_state(config, len(sessions), mesh).params)
    params = jax.device_put(model.params, places)
    data = EvaluationData(
        config.data, sessions, split, config.model.least_bins, labels=split != "test"
    )
    results: dict[int, TrialLogits] = {}
    batches: Iterable[tuple[list[int], list[Trial], Batch]] = data.batches()
    if console is not None:
        batches = track(
            batches, total=data.batch_count, description=f"logits of {split}", console=console
        )
    for indices, trials, batch in batches:
        output = step(params, batch)
        logits, frames = np.asarray(output.logits), np.asarray(output.frames)
        for row, (index, trial) in enumerate(zip(indices, trials, strict=True)):
            results[index] = TrialLogits(
                trial.ref, logits[row, : frames[row]].copy(), trial.labels, trial.sentence
            )
    return [results[index] for index in range(len(data.refs))]


def write_logits(path: Path, trials: Sequence[TrialLogits]) -> None:
    """Writes the logits file; a half-written one never has the final name."""
    arrays = {
        "logits": np.concatenate([trial.logits for trial in trials]).astype(np.float32),
        "frames": np.array([len(trial.logits) for trial in trials], np.int32),
        "trial": np.array([trial.ref.name for trial in trials]),
    }
    if all(trial.sentence is not None for trial in trials):
        arrays["sentence"] = np.array([trial.sentence for trial in trials])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)
