"""Train a configuration with several seeds, or a grid of settings, and report means and intervals.

Each run has its folder, OUT/SETTINGS/seed_N. The same command goes on where it was stopped. With
--lm, each run is evaluated too, by this language model. A run that fails, or whose folder holds one
of another configuration, is named, and the others go on. OUT/sweep.json has all figures. `b2txt
report`, `compare` and `consensus` take the runs' folders.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from b2txt_jax.api import evaluate
from b2txt_jax.config import (
    CONFIG_FILE,
    Config,
    ConfigError,
    differences,
    load_config,
    read_written_config,
    with_overrides,
)
from b2txt_jax.errors import UserError
from b2txt_jax.evaluation.intervals import LEVEL
from b2txt_jax.evaluation.results import EVALUATION, read_result
from b2txt_jax.provenance import provenance
from b2txt_jax.training.experiment_log import add_tracker_argument, check_tracker
from b2txt_jax.training.loop import FINISHED_FILE, resolve, train
from lm_server.files.atomic_file import replacing, require_writable

SWEEP_FILE = "sweep.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt sweep`."""
    parser.add_argument("--config", required=True, help="name of a configuration, or its file")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="0 to N - 1 (default 5)")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="values of a key of the configuration, such as model.units=256,512; all combinations "
        "of several (default: none). Values in brackets, such as (1,2), are one value",
    )
    parser.add_argument(
        "--lm", type=Path, metavar="DIR", help="evaluate each run with this model folder"
    )
    add_tracker_argument(parser)
    parser.epilog = "Any key of the configuration: --config.section.key=value."


def run(args: argparse.Namespace) -> int:
    """Run `b2txt sweep`. Return exit status 1 when a run failed, 130 when it was interrupted."""
    if args.seeds < 1:
        raise ConfigError(f"--seeds is {args.seeds}; needed 1 or more")
    check_tracker(args.tracker)
    require_writable(args.out / SWEEP_FILE)
    console = Console()
    base = load_config(args.config, args.overrides)
    settings = combinations(args.grid)
    check_overrides(args.overrides, args.grid)
    # All of them first, so that a mistake in the last is found before the work.
    planned = [
        (name, seed, args.out / name / f"seed_{seed}", _configured(base, changes, seed))
        for name, changes in settings.items()
        for seed in range(args.seeds)
    ]
    done: dict[str, list[Outcome]] = {name: [] for name in settings}
    failed: dict[str, str] = {}
    for number, (name, seed, workdir, config) in enumerate(planned, start=1):
        console.rule(f"{number} of {len(planned)}: {name}, seed {seed}")
        try:
            if not is_complete(config, workdir):
                result = train(config, workdir, console, args.tracker)
                if not result.finished:
                    return 130
            if args.lm is not None and not is_evaluated(workdir, args.lm):
                evaluate(workdir, args.lm, out=_result_folder(workdir, args.lm))
            done[name].append(_outcome(seed, workdir, args.lm))
        except UserError as error:
            failed[str(workdir)] = str(error)
            console.print(f"failed: {error}", soft_wrap=True, markup=False)
    found = {name: summary(outcomes) for name, outcomes in done.items() if outcomes}
    _write(args.out / SWEEP_FILE, found, done, failed)
    _print(found, console)
    for folder, reason in failed.items():
        console.print(f"failed: {folder}: {reason}", soft_wrap=True, markup=False)
    console.print(f"written: {args.out / SWEEP_FILE}", soft_wrap=True)
    return 1 if failed else 0


def combinations(grid: Sequence[str]) -> dict[str, list[str]]:
    """Return name -> overrides of each combination of `KEY=A,B`. Without any, `base` -> [].

    >>> combinations(["model.units=64,128"])["units_128"]
    ['--config.model.units=128']

    Raises:
      ConfigError: one is not KEY=VALUES, a key is there twice, or it is the seed's.
    """
    values: dict[str, list[str]] = {}
    for one in grid:
        key, equals, text = one.partition("=")
        # Not at commas in brackets, which belong to one value.
        parts = re.findall(r"(?:[^,()]|\([^()]*(?:\([^()]*\)[^()]*)*\))+", text)
        if not equals or not parts or key in values:
            raise ConfigError(f"--grid is {one!r}; needed KEY=VALUE,VALUE, and each key once")
        values[key.removeprefix("--config.")] = parts
    if "train.seed" in values:
        raise ConfigError("--grid has train.seed, which --seeds sets; needed --seeds N alone")
    found = {}
    for chosen in itertools.product(*values.values()):
        pairs = list(zip(values, chosen, strict=True))
        name = "-".join(
            re.sub(r"[^\w.+-]+", "_", f"{key.rsplit('.', 1)[-1]}_{value}").strip("_")
            for key, value in pairs
        )
        if name in found:
            raise ConfigError(f"--grid has {name} twice; needed values that differ")
        found[name or "base"] = [f"--config.{key}={value}" for key, value in pairs]
    return found


def check_overrides(overrides: Sequence[str], grid: Sequence[str]) -> None:
    """Raise ConfigError where a key of the command line is one that the sweep sets."""
    swept = {one.partition("=")[0].removeprefix("--config."): "--grid" for one in grid}
    swept["train.seed"] = "--seeds"
    for one in overrides:
        key = one.partition("=")[0].removeprefix("--config.")
        if key in swept:
            raise ConfigError(
                f"{one} would change nothing, since {swept[key]} sets {key}; needed one of the two"
            )


def _configured(base: Config, changes: Sequence[str], seed: int) -> Config:
    return with_overrides(base, [*changes, f"--config.train.seed={seed}"])


def is_complete(config: Config, workdir: Path) -> bool:
    """Return whether a folder holds the run of this configuration with all of its steps.

    Raises:
      ConfigError: it holds a complete run of another configuration.
    """
    if not (workdir / FINISHED_FILE).is_file():
        return False
    before = read_written_config(workdir / CONFIG_FILE)
    return not differences(before, resolve(config, workdir, resumed=True))


def is_evaluated(workdir: Path, lm: Path) -> bool:
    """Return whether the result in a run's folder is of its best checkpoint by this model.

    Raises:
      ResultsError: it is damaged.
    """
    folder = _result_folder(workdir, lm)
    if not (folder / EVALUATION).is_file():
        return False
    result = read_result(folder)
    described = lm / "lm.json"
    crc = zlib.crc32(described.read_bytes()) if described.is_file() else None
    made = result.content["settings"]
    step = _finished(workdir)["best"]["step"]
    return (made.get("language_model"), made.get("language_model_crc32"), made.get("step")) == (
        str(lm.absolute()),
        crc,
        step,
    )


def _result_folder(workdir: Path, lm: Path) -> Path:
    return workdir / "val" / lm.absolute().name


def _finished(workdir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((workdir / FINISHED_FILE).read_bytes())
    return found


@dataclass(frozen=True)
class Outcome:
    """One run: its best PER, the mean of its last ten, and its WER by the model of --lm."""

    seed: int
    workdir: str
    per: float | None
    per_last_ten: float | None
    wer: float | None


def _outcome(seed: int, workdir: Path, lm: Path | None) -> Outcome:
    finished = _finished(workdir)
    rate = None if lm is None else read_result(_result_folder(workdir, lm)).rate("wer")
    best = finished.get("best") or {}
    wer = rate.rate if rate else None
    return Outcome(seed, str(workdir), best.get("per"), finished.get("per_last_ten"), wer)


def summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float | int | None]]:
    """Return of each figure its mean over seeds, the interval of the mean, and the spread."""
    found = {}
    for key in ("per", "per_last_ten", "wer"):
        known = [value for one in outcomes if (value := getattr(one, key)) is not None]
        if known:
            found[key] = mean_interval(known)
    return found


def mean_interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return the mean with its interval by Student's t. Of one value there is no interval."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "std": None, "seeds": count}
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * std / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "std": std, "seeds": count}


def _write(
    path: Path,
    found: Mapping[str, Any],
    done: Mapping[str, Sequence[Outcome]],
    failed: Mapping[str, str],
) -> None:
    content = {
        "made": provenance(),
        "level": LEVEL,
        "settings": {
            name: {**found[name], "runs": [asdict(one) for one in outcomes]}
            for name, outcomes in done.items()
            if name in found
        },
        "failed": dict(failed),
    }
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


def _print(found: Mapping[str, Any], console: Console) -> None:
    names = {"per": "best PER", "per_last_ten": "PER, last ten", "wer": "WER"}
    table = Table("settings", "seeds", *names.values(), title=f"means and {LEVEL:.0%} intervals")
    for name, figures in found.items():
        seeds = max((one["seeds"] for one in figures.values()), default=0)
        cells = []
        for key in names:
            one = figures.get(key)
            if one is None:
                cells.append("-")
            elif one["low"] is None:
                cells.append(f"{100 * one['mean']:.2f} %")
            else:
                ends = f"{100 * one['low']:.2f} to {100 * one['high']:.2f}"
                cells.append(f"{100 * one['mean']:.2f} % ({ends})")
        table.add_row(name, str(seeds), *cells)
    console.print(table)
