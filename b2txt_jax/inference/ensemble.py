"""Average the logits of several runs on the same trials, and write them to a file.

The data are read once, and every run computes the same batches. `lm-server decode`, `tune` and
`score` read the file. Runs of the same data with the same frames are needed. Their seeds, recipes
and models may differ.

With --passes N, each run also computes N versions of every trial, augmented as in its training, and
is the mean of all of them. One run alone is then a pseudo-ensemble.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from b2txt_jax.config import ConfigError
from b2txt_jax.data.description import DataError
from b2txt_jax.data.loader import Batch
from b2txt_jax.inference.logits import write_logits
from b2txt_jax.inference.run import (
    AUGMENTING,
    CHANGEABLE,
    Run,
    TrialLogits,
    add_weights_argument,
    load_run,
)
from b2txt_jax.metrics import greedy_decode, phoneme_error_rates, total
from b2txt_jax.signal.augment import augmentations
from b2txt_jax.training.step import step_keys
from lm_server.files.atomic_file import require_writable
from lm_server.files.several_logits import MEANS, average, joint_fingerprint


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
    add_passes_arguments(parser)
    add_weights_argument(parser)
    parser.epilog = (
        "Keys of all runs' configurations can be changed: --config.data.root=DIR, and with "
        "--passes the augmentations: --config.signal.white_noise_std=0.3."
    )


def add_passes_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --passes and --passes-seed."""
    parser.add_argument(
        "--passes",
        type=int,
        default=0,
        metavar="N",
        help="average N augmented versions of each trial with the trial itself (default 0)",
    )
    parser.add_argument(
        "--passes-seed", type=int, default=0, metavar="SEED", help="of their noise (default 0)"
    )


def load_runs(
    folders: Sequence[Path], overrides: Sequence[str], weights: str, passes: int
) -> list[Run]:
    """Read runs, of which the augmentations may be overridden where there are passes.

    Raises:
      ConfigError: a folder holds no run, or is given twice, `passes` is below 0, or they would
        change nothing.
    """
    twice = [path for path, n in Counter(one.resolve() for one in folders).items() if n > 1]
    if twice:
        raise ConfigError(
            f"the run {twice[0]} is given more than once, and would weigh more; needed each once"
        )
    changeable = CHANGEABLE | AUGMENTING if passes else CHANGEABLE
    runs = [load_run(folder, overrides, weights, changeable) for folder in folders]
    if passes < 0:
        raise ConfigError(f"--passes is {passes}; needed 0 or more")
    for one in runs if passes else ():
        if not any(augmentations(one.config.signal)):
            raise ConfigError(
                f"{one.workdir} was trained without augmentations, so that --passes {passes} would "
                "repeat the same logits; needed one, such as --config.signal.white_noise_std=0.3"
            )
    return runs


def augmentations_of(model: Run) -> str:
    """Return the settings of a run's augmentations, for the record of a result."""
    names = sorted(key.removeprefix("signal.") for key in AUGMENTING)
    return ", ".join(f"{name}={getattr(model.config.signal, name)}" for name in names)


def run(args: argparse.Namespace) -> int:
    """Run `b2txt ensemble`."""
    require_writable(args.out, devices=True, inputs=args.runs)
    runs = load_runs(args.runs, args.overrides, args.weights, args.passes)
    found = ensemble_logits(
        runs, args.split, args.mean, Console(stderr=True), args.passes, args.passes_seed
    )
    made = {"step": max(one.step for one in runs), "weights": args.weights}
    write_logits(
        args.out, found.trials, **made, parameters=ensemble_fingerprint(runs), split=args.split
    )
    if all(trial.labels is not None for trial in found.trials):
        for folder, plain, member in zip(args.runs, found.plain, found.members, strict=True):
            print(f"{folder}: PER {_per(found.trials, plain)}")
            if args.passes:
                print(f"  with {args.passes} passes: PER {_per(found.trials, member)}")
        if len(runs) > 1:
            print(f"ensemble: PER {_per(found.trials, [one.logits for one in found.trials])}")
    print(
        f"{args.out}: {len(found.trials)} {args.split} trials, the mean of {len(runs)} runs"
        + (f" with {args.passes} augmented passes each" if args.passes else "")
    )
    return 0


def ensemble_fingerprint(runs: Sequence[Run]) -> str:
    """Return eight hexadecimal digits that are the same for equal parameters of all runs."""
    return joint_fingerprint([one.fingerprint for one in runs])


def _per(trials: Sequence[TrialLogits], logits: Sequence[np.ndarray]) -> str:
    labels = [trial.labels for trial in trials if trial.labels is not None]
    return str(total(phoneme_error_rates(labels, [greedy_decode(one) for one in logits])))


@dataclass(frozen=True)
class Ensemble:
    """Averaged logits of a split.

    Attributes:
      trials: with the mean over runs.
      plain: of each run, its logits of each trial, float32 [frames, 41].
      members: of each run, normalised and averaged with those of its augmented passes.
    """

    trials: list[TrialLogits]
    plain: list[list[np.ndarray]]
    members: list[list[np.ndarray]]


def ensemble_logits(
    runs: Sequence[Run],
    split: str,
    mean: str = MEANS[0],
    console: Console | None = None,
    passes: int = 0,
    seed: int = 0,
) -> Ensemble:
    """Compute a split by every run and average.

    Args:
      runs: of the same sessions and data, one or more.
      split: "train", "val" or "test".
      mean: of "logarithms" (normalised, so that no run weighs more) or of "probabilities".
      console: shows the progress.
      passes: augmented versions of each trial, which count like the trial itself. The noise is a
        function of seed, pass and batch, the same for all runs with the same augmentations.
      seed: of the noise.

    Raises:
      DataError: the runs have other sessions, data, inputs or frames, or a trial cannot be read.
    """
    first = runs[0]
    for one in runs[1:]:
        for what, ours, theirs in (
            ("sessions", first.sessions, one.sessions),
            ("data.root", first.config.data.root, one.config.data.root),
            ("data.feature_count", *(r.config.data.feature_count for r in (first, one))),
            ("signal.log, rolling_seconds, rolling_clip", *map(_normalisation, (first, one))),
        ):
            if ours != theirs:
                raise DataError(
                    f"{one.workdir} has other {what} than {first.workdir}: {_short(theirs)}, not "
                    f"{_short(ours)}; needed runs of the same data (--config.data.root=DIR if they "
                    "were moved)"
                )
    trials: dict[int, TrialLogits] = {}
    plain: list[dict[int, np.ndarray]] = [{} for _ in runs]
    members: list[dict[int, np.ndarray]] = [{} for _ in runs]
    for number, (indices, batch_trials, batch) in enumerate(first.batches(split, console)):
        keys = [_pass_key(seed, one, number) for one in range(passes)]
        outputs = [_passes(one, batch, keys) for one in runs]
        for row, (index, trial) in enumerate(zip(indices, batch_trials, strict=True)):
            every = [[one[row] for one in of_run] for of_run in outputs]
            frames = [len(of_run[0]) for of_run in every]
            if len(set(frames)) > 1:
                raise DataError(
                    f"the runs have other frames of {trial.ref.name}: {', '.join(map(str, frames))}"
                    "; needed models with patches of the same size and stride"
                )
            averaged = [average(of_run, mean) for of_run in every]
            trials[index] = TrialLogits(
                trial.ref, average(averaged, mean), trial.labels, trial.sentence
            )
            for place, of_run in enumerate(every):
                plain[place][index] = of_run[0]
                members[place][index] = averaged[place]
    order = sorted(trials)
    return Ensemble(
        [trials[n] for n in order],
        [[one[n] for n in order] for one in plain],
        [[one[n] for n in order] for one in members],
    )


def _pass_key(seed: int, number: int, batch: int) -> jax.Array:
    """Return the key of a batch's augmented pass, as a training of this seed draws a step's."""
    return jax.random.fold_in(step_keys(seed, jnp.int32(number)).augment, batch)


def _passes(run: Run, batch: Batch, keys: Sequence[jax.Array]) -> list[list[np.ndarray]]:
    """Return the logits of a batch's rows, then those of an augmented pass for each key."""
    return [list(run.of_batch(batch, key)) for key in (None, *keys)]


def _normalisation(run: Run) -> tuple[object, ...]:
    """Return what decides on the features that are read. Smoothing is each run's own."""
    signal = run.config.signal
    return signal.log, signal.rolling_seconds, signal.rolling_clip


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
