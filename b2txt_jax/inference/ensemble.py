"""Average the logits of several runs on the same trials, and write them to a file.

The data are read once, and every run computes the same batches. `lm-server decode`, `tune` and
`score` read the file. Runs of the same data with the same frames are needed. Their seeds, recipes
and models may differ.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from b2txt_jax.data.description import DataError
from b2txt_jax.inference.logits import write_logits
from b2txt_jax.inference.run import Run, TrialLogits, add_weights_argument, load_run
from b2txt_jax.metrics import greedy_decode, phoneme_error_rates, total
from lm_server.files.atomic_file import require_writable

MEANS = ("logarithms", "probabilities")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt ensemble`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of `b2txt train`")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=".npz to write")
    parser.add_argument(
        "--split", choices=("val", "test"), default="val", help="of the data (default val)"
    )
    parser.add_argument(
        "--mean",
        choices=MEANS,
        default=MEANS[0],
        help="of log-probabilities, or of probabilities (default logarithms)",
    )
    add_weights_argument(parser)
    parser.epilog = "Keys of all runs' configurations can be changed: --config.data.root=DIR."


def run(args: argparse.Namespace) -> int:
    """Run `b2txt ensemble`."""
    require_writable(args.out, devices=True, inputs=args.runs)
    runs = [load_run(folder, args.overrides, args.weights) for folder in args.runs]
    trials, members = ensemble_logits(runs, args.split, args.mean, Console(stderr=True))
    parameters = f"{zlib.crc32(' '.join(one.fingerprint for one in runs).encode()):08x}"
    made = {"step": max(one.step for one in runs), "weights": args.weights}
    write_logits(args.out, trials, **made, parameters=parameters, split=args.split)
    if all(trial.labels is not None for trial in trials):
        for folder, logits in zip(args.runs, members, strict=True):
            print(f"{folder}: PER {_per(trials, logits)}")
        print(f"ensemble: PER {_per(trials, [trial.logits for trial in trials])}")
    print(f"{args.out}: {len(trials)} {args.split} trials, the mean of {len(runs)} runs")
    return 0


def _per(trials: Sequence[TrialLogits], logits: Sequence[np.ndarray]) -> str:
    labels = [trial.labels for trial in trials if trial.labels is not None]
    return str(total(phoneme_error_rates(labels, [greedy_decode(one) for one in logits])))


def ensemble_logits(
    runs: Sequence[Run], split: str, mean: str = MEANS[0], console: Console | None = None
) -> tuple[list[TrialLogits], list[list[np.ndarray]]]:
    """Compute a split by every run and average.

    Args:
      runs: of the same sessions and data, one or more.
      split: "train", "val" or "test".
      mean: of "logarithms" (normalised, so that no run weighs more) or of "probabilities".
      console: shows the progress.

    Returns:
      The trials with averaged logits, and the logits of each run.

    Raises:
      DataError: the runs have other sessions, data, inputs or frames, or a trial cannot be read.
    """
    first = runs[0]
    for one in runs[1:]:
        for what, ours, theirs in (
            ("sessions", first.sessions, one.sessions),
            ("data.root", first.config.data.root, one.config.data.root),
            ("data.feature_count", *(r.config.data.feature_count for r in (first, one))),
        ):
            if ours != theirs:
                raise DataError(
                    f"{one.workdir} has other {what} than {first.workdir}: {_short(theirs)}, not "
                    f"{_short(ours)}; needed runs of the same data (--config.data.root=DIR if they "
                    "were moved)"
                )
    trials: dict[int, TrialLogits] = {}
    members: list[dict[int, np.ndarray]] = [{} for _ in runs]
    for indices, batch_trials, batch in first.batches(split, console):
        outputs = [one.of_batch(batch) for one in runs]
        for index, trial, *logits in zip(indices, batch_trials, *outputs, strict=False):
            shapes = {one.shape for one in logits}
            if len(shapes) > 1:
                raise DataError(
                    f"the runs have other frames of {trial.ref.name}: "
                    + ", ".join(str(len(one)) for one in logits)
                    + "; needed models with patches of the same size and stride"
                )
            averaged = average(logits, mean)
            trials[index] = TrialLogits(trial.ref, averaged, trial.labels, trial.sentence)
            for member, one in zip(members, logits, strict=True):
                member[index] = one
    order = sorted(trials)
    return [trials[n] for n in order], [[member[n] for n in order] for member in members]


def average(logits: Sequence[np.ndarray], mean: str = MEANS[0]) -> np.ndarray:
    """Return the mean of several [frames, 41], as normalised log-probabilities float32."""
    every = np.stack(logits).astype(np.float64)
    every -= np.logaddexp.reduce(every, axis=-1, keepdims=True)
    if mean == "probabilities":
        averaged = np.logaddexp.reduce(every, axis=0) - np.log(len(every))
    else:
        averaged = every.mean(0)
        averaged -= np.logaddexp.reduce(averaged, axis=-1, keepdims=True)
    return averaged.astype(np.float32)


def _short(value: object) -> str:
    text = ", ".join(value) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
