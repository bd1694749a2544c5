"""Writes simulated sessions in the published T15 layout: attempted speech as 512 features.

Modelled:
- Phonemes of real sentences, with durations by class, jitter and pauses.
- Articulation (place, manner, voicing, vowel height, backness, rounding) with coarticulation. It is
  mixed onto the electrodes of four arrays with different strengths of tuning: area 6v codes
  articulators intermixed on single electrodes (Willett et al. 2023), and sensorimotor cortex codes
  kinematics (Bouchard et al. 2013, Chartier et al. 2018).
- Threshold crossings and spike band power, with private, shared and slow noise, z-scored per block.
- Changes between sessions: a rotation of the tuning, other gains and baselines, dying channels. One
  linear map per day can mostly undo them (Degenhart et al. 2020, Gallego et al. 2020, per-day
  layers: Card et al. 2024).
- On request, bursts of activity that many channels share, as other movements make them.

Not modelled: sound, errors and fatigue of a participant, learning, single neurons, and tuning to
anything but the current articulation. Strengths are chosen so that training behaves as on
recordings. Error rates do not predict those of a participant. docs/simulator.md has the numbers,
the references and the measurements.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import h5py
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from b2txt_jax.data.description import (
    FILE_NAME,
    Block,
    DataError,
    session_date,
    write_description,
)
from b2txt_jax.data.write_hdf5 import write_trial
from b2txt_jax.simulation import neural, recordings, speech
from b2txt_jax.simulation.corpus import language_model_text
from b2txt_jax.simulation.plan import (
    PRESETS,
    RECORDINGS,
    SESSIONS,
    PlannedBlock,
    SimulationSettings,
    named_rng,
    plan_sessions,
)
from lm_server.files.atomic_file import replacing
from lm_server.process import end_with_parent

_IMPLANTED = datetime.date(2023, 7, 17)  # 25 days before the first published session
SESSIONS_FOLDER = "hdf5_data_final"
SETTINGS_FILE = "simulation.json"
_TEXT_FILE = "language_model_text.txt"
_FEWEST_FOR_PROCESSES = 500
"""Sentences. Starting a process takes as long as some hundred of them."""
_FORMAT = 2
"""Incremented whenever the same settings give other files, so that these do not mix."""


def simulate(
    out: Path | str, settings: SimulationSettings, force: bool = False, jobs: int = 1
) -> Path:
    """Write sessions, the table of their blocks and text for a language model to folder `out`.

    The sessions are OUT/hdf5_data_final/<session>/data_*.hdf5. Existing files of the same settings
    are kept, and more sessions can be added to a folder. A file appears whole or not at all.

    Args:
      out: folder to write to.
      settings: what to simulate.
      force: replaces sessions that were simulated there with other settings.
      jobs: processes that write at the same time. They do not change the result.

    Returns:
      The folder of the sessions, for `data.root`.

    Raises:
      DataError: `out` holds data that was not simulated, or simulated with other settings, or the
        corpora have too few sentences.
    """
    out = Path(out)
    plans = plan_sessions(settings)
    _claim(out, settings, force)
    blocks = [row for name, plan in plans.items() for row in _rows(name, plan)]
    write_description(out / FILE_NAME, blocks)
    text = out / _TEXT_FILE
    if not text.is_file():
        _write_text(text, "\n".join(language_model_text()) + "\n")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    days = _days(settings)
    work = [
        _Work(out, name, plan, settings, index, days[index], splits)
        for index, (name, plan) in enumerate(plans.items())
        # Val and test share blocks: one pass writes both.
        for splits in (("train",), ("val", "test"))
    ]
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, transient=True))
        total = sum(part.sentences for part in work)
        task = progress.add_task("simulating sentences", total=total)
        if jobs == 1 or total < _FEWEST_FOR_PROCESSES:
            for part in work:
                for _ in part.write():
                    progress.advance(task)
        else:
            # A fork of a process that has run JAX may never return.
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(
                ProcessPoolExecutor(jobs, context, end_with_parent, (os.getpid(),))
            )
            # The longest first, so that the last ones end together.
            work.sort(key=lambda part: part.sentences, reverse=True)
            for done in as_completed([pool.submit(part.write_all) for part in work]):
                progress.advance(task, done.result())
    return out / SESSIONS_FOLDER


def modulation(difficulty: float) -> float:
    """Return the depth of the electrodes' modulation by speech for a difficulty of 0 to 1."""
    return float(np.exp(np.interp(difficulty, [0.0, 1.0], [np.log(1.3), np.log(0.35)])))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `b2txt simulate`."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    for setting in dataclasses.fields(SimulationSettings):
        option, meta = f"--{setting.name.replace('_', '-')}", setting.metadata
        if setting.default is False:
            parser.add_argument(option, action="store_true", help=meta["help"])
            continue
        of_preset = {name: values.get(setting.name) for name, values in PRESETS.items()}
        default = (
            ", ".join(f"{k}: {'as published' if v is None else v}" for k, v in of_preset.items())
            if setting.default is None
            else setting.default
        )
        parser.add_argument(
            option,
            type=type(meta["least"]) if "least" in meta else str,
            choices=meta.get("choices"),
            default=setting.default,
            help=f"{meta['help']} (default {default})".replace("%", "%%"),
        )
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--force", action="store_true", help="replace sessions simulated with other settings"
    )


def run(args: argparse.Namespace) -> int:
    """Run `b2txt simulate`."""
    names = [field.name for field in dataclasses.fields(SimulationSettings)]
    settings = SimulationSettings(**{name: getattr(args, name) for name in names})
    jobs = (os.cpu_count() or 1) if args.jobs is None else args.jobs
    if jobs < 1:
        raise DataError(f"--jobs is {jobs}; needed 1 or more processes")
    root = simulate(args.out, settings, args.force, jobs)
    print(f"{settings.sessions} simulated sessions are in {root}")
    count = 2 * settings.electrodes * len(neural.ARRAYS)
    if count != neural.FEATURES:
        print(f"{count} features a bin: train with --config.data.feature_count={count}")
    return 0


def _rows(session: str, plan: list[PlannedBlock]) -> Iterator[Block]:
    date = session_date(session)
    day = (datetime.date.fromisoformat(date) - _IMPLANTED).days
    for block in plan:
        split = "Train" if block.is_train else "Val/Test"
        yield Block(date, day, block.number, len(block.sentences), block.corpus, split)


def _days(settings: SimulationSettings) -> list[neural.Tuning] | list[recordings.Day]:
    """Return the electrodes of each session."""
    if settings.preset == RECORDINGS:
        rng_of = functools.partial(named_rng, settings)
        return recordings.days(SESSIONS[: settings.sessions], settings.drift, rng_of)
    usual = neural.Drift()
    drift = neural.Drift(
        rotation=settings.drift * usual.rotation,
        renewal=min(1.0, settings.drift * usual.renewal),
        gain=settings.drift * usual.gain,
        death=min(1.0, settings.drift * usual.death),
    )
    days = [neural.first_tuning(named_rng(settings, "tuning"))]
    for index in range(1, settings.sessions):
        days.append(neural.next_tuning(days[-1], drift, named_rng(settings, "drift", index)))
    return days


@dataclasses.dataclass(frozen=True)
class _Work:
    """Files of one session that are written in one pass."""

    out: Path
    session: str
    plan: list[PlannedBlock]
    settings: SimulationSettings
    index: int
    day: neural.Tuning | recordings.Day
    splits: Sequence[str]

    @property
    def sentences(self) -> int:
        return sum(s.split in self.splits for block in self.plan for s in block.sentences)

    def write_all(self) -> int:
        """Write the files and return the number of their sentences."""
        for _ in self.write():
            pass
        return self.sentences

    def write(self) -> Iterator[None]:
        """Write the files that are missing. Yields once for each sentence."""
        paths = self._missing()
        if not paths:
            yield from itertools.repeat(None, self.sentences)
            return
        # The names do not depend on the process, so that what a killed one left is overwritten.
        partial = {split: path.with_suffix(".partial") for split, path in paths.items()}
        for path in partial.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            files = {s: stack.enter_context(h5py.File(path, "w")) for s, path in partial.items()}
            for block in self.plan:
                if not any(sentence.split in self.splits for sentence in block.sentences):
                    continue
                recorded = _record_block(block, self.settings, self.index, self.day)
                for trial, (sentence, features) in enumerate(
                    zip(block.sentences, recorded, strict=True)
                ):
                    if sentence.split in files:
                        file = files[sentence.split]
                        group = file.create_group(f"trial_{len(file):04d}")
                        write_trial(
                            group,
                            self.session,
                            block.number,
                            trial,
                            features,
                            None if sentence.split == "test" else sentence.labels,
                            sentence.text,
                        )
                    yield
        for split, path in paths.items():
            partial[split].replace(path)

    def _missing(self) -> dict[str, Path]:
        """Return split -> file, for those that the session has and that are missing."""
        held = {sentence.split for block in self.plan for sentence in block.sentences}
        folder = _session_folder(self.out, self.session)
        paths = {split: folder / f"data_{split}.hdf5" for split in self.splits if split in held}
        return {split: path for split, path in paths.items() if not path.is_file()}


def _record_block(
    block: PlannedBlock,
    settings: SimulationSettings,
    index: int,
    day: neural.Tuning | recordings.Day,
) -> list[np.ndarray]:
    """Return the features of each trial of a block, float32 [T, D]."""
    strength = modulation(settings.difficulty)
    if isinstance(day, recordings.Day):
        rng_of = functools.partial(named_rng, settings)
        place = (index, block.number)
        labels = [sentence.labels for sentence in block.sentences]
        trials = recordings.record_block(
            labels, day, strength, settings.speaking_rate, settings.bursts, place, rng_of
        )
        lengths, features = [len(trial) for trial in trials], np.concatenate(trials)
    else:
        rng = named_rng(settings, "block", index, block.number)
        table = speech.articulation()
        trajectories = [
            speech.attempt(sentence.labels, table, settings.speaking_rate, rng)
            for sentence in block.sentences
        ]
        lengths = [len(trajectory) for trajectory in trajectories]
        bursts = None
        if settings.bursts:
            # Separate draws, so that everything else is the same with and without bursts.
            patterns = neural.burst_patterns(named_rng(settings, "burst patterns"))
            timing = named_rng(settings, "bursts", index, block.number)
            bursts = settings.bursts * neural.bursts(sum(lengths), patterns, timing)
        features = neural.record(trajectories, day, strength, rng, bursts)
    features = neural.written(features, settings.electrodes)
    if not settings.raw:
        neural.z_score(features)
    return np.split(features, np.cumsum(lengths)[:-1])


def _session_folder(out: Path, session: str) -> Path:
    return out / SESSIONS_FOLDER / session


def _claim(out: Path, settings: SimulationSettings, force: bool) -> None:
    """Write the settings to `out`, or check that those there agree."""
    wanted = {"format": _FORMAT, **dataclasses.asdict(settings)}
    path = out / SETTINGS_FILE
    data = out / SESSIONS_FOLDER
    if path.is_file():
        try:
            found = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is not valid JSON ({error}), so what {out} holds is unknown: choose "
                "another --out"
            ) from error
        # A setting that did not exist yet had the effect of its default.
        found = {**dataclasses.asdict(SimulationSettings()), **found}
        other = sorted(k for k in {*wanted, *found} - {"sessions"} if wanted.get(k) != found.get(k))
        if found.get("sessions", 0) > settings.sessions:
            other.append("sessions")
        if other and not force:
            differences = ", ".join(f"{k} {found.get(k)} (now {wanted.get(k)})" for k in other)
            raise DataError(
                f"{out} holds sessions simulated with other settings: {differences}; choose "
                "another --out, or replace them with `b2txt simulate --force`"
            )
        if other:
            # The old settings are replaced last, so that an interrupted removal can be repeated.
            (out / _TEXT_FILE).unlink(missing_ok=True)
            for session in SESSIONS:
                shutil.rmtree(_session_folder(out, session), ignore_errors=True)
    elif data.exists() and any(data.iterdir()):
        raise DataError(
            f"{data} holds data, but {path} is not there, so they may be real recordings: choose "
            "another --out"
        )
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is no folder; needed a new or empty one: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    _write_text(path, json.dumps(wanted, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
