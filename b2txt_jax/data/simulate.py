"""Writes simulated sessions in the published T15 layout: attempted speech as 512 features.

See docs/simulator.md for what is modelled, what is not, and from which findings.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from b2txt_jax.data import simulate_neural, simulate_speech
from b2txt_jax.data.corpus import CORPORA, Pool, language_model_text, load_pool
from b2txt_jax.data.description import FILE_NAME, Block, session_date, write_description
from b2txt_jax.phonemes import sentence_to_ids
from b2txt_jax.text import normalise

_DATES = """
2023.08.11 2023.08.13 2023.08.18 2023.08.20 2023.08.25 2023.08.27 2023.09.01 2023.09.03 2023.09.24
2023.09.29 2023.10.01 2023.10.06 2023.10.08 2023.10.13 2023.10.15 2023.10.20 2023.10.22 2023.11.03
2023.11.04 2023.11.17 2023.11.19 2023.11.26 2023.12.03 2023.12.08 2023.12.10 2023.12.17 2023.12.29
2024.02.25 2024.03.03 2024.03.08 2024.03.15 2024.03.17 2024.04.25 2024.04.28 2024.05.10 2024.06.14
2024.07.19 2024.07.21 2024.07.28 2025.01.10 2025.01.12 2025.03.14 2025.03.16 2025.03.30 2025.04.13
"""
SESSIONS: tuple[str, ...] = tuple(f"t15.{date}" for date in _DATES.split())
"""Names of the published sessions, in order; N simulated sessions take the first N."""

PADDED_LABEL = 500
_IMPLANTED = datetime.date(2023, 7, 17)  # 25 days before the first published session
# The published blocks have 5 to 50 sentences; small ones mix the corpora within a short session.
_BLOCK_SENTENCES = 25
_SETTINGS_FILE = "simulation.json"
_FORMAT = 1


@dataclass(frozen=True)
class SimulationSettings:
    """What to simulate; the files are a function of these settings alone.

    Attributes:
      sessions: number of sessions, 2 to 45; the first has only train sentences.
      train: train sentences per session.
      val: val sentences per session.
      test: test sentences per session, written without labels.
      seed: of everything random; a session is the same however many sessions are asked for.
      difficulty: 0 (about 3 % PER can be reached) to 1 (about 30 %).
      min_words: fewest words of a sentence.
      max_words: most words of a sentence.
      speaking_rate: 1 is about 65 words per minute; 2 halves all durations.
      drift: change from session to session, 1 is the calibrated amount, 0 is none.
    """

    sessions: int = 6
    train: int = 120
    val: int = 30
    test: int = 30
    seed: int = 0
    difficulty: float = 0.5
    min_words: int = 3
    max_words: int = 12
    speaking_rate: float = 1.0
    drift: float = 1.0

    def __post_init__(self) -> None:
        bounds = {
            "sessions": (2, len(SESSIONS)),
            "train": (1, 10_000),
            "val": (0, 10_000),
            "test": (0, 10_000),
            "seed": (0, 2**63 - 1),
            "difficulty": (0.0, 1.0),
            "min_words": (3, 12),
            "max_words": (self.min_words, 12),
            "speaking_rate": (0.5, 3.0),
            "drift": (0.0, 3.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; needed {low} to {high}")


@dataclass(frozen=True)
class Sentence:
    """One trial to be: its split, its text as shown, its phonemes int32 [L]."""

    split: Pool
    text: str
    labels: np.ndarray


@dataclass(frozen=True)
class PlannedBlock:
    """A block of one corpus; number as in the table, sentences in the order of trials."""

    number: int
    corpus: str
    sentences: tuple[Sentence, ...]

    @property
    def is_train(self) -> bool:
        """Whether the block belongs to train (otherwise to val and test together)."""
        return self.sentences[0].split == "train"


def simulate(out: Path, settings: SimulationSettings, force: bool = False) -> None:
    """Writes sessions, the table of their blocks and text for a language model to folder `out`.

    The sessions are OUT/hdf5_data_final/<session>/data_*.hdf5. What is there already from the same
    settings is kept; more sessions can be added to a folder. A file appears whole or not at all.

    Args:
      out: folder to write to.
      settings: what to simulate.
      force: replaces sessions that were simulated there with other settings.

    Raises:
      ValueError: `out` holds data that was not simulated, or simulated with other settings; or the
        sentences do not suffice.
    """
    out = Path(out)
    plans = plan_sessions(settings)
    _claim(out, settings, force)
    blocks = [row for name, plan in plans.items() for row in _rows(name, plan)]
    write_description(out / FILE_NAME, blocks)
    _write_text(out / "language_model_text.txt", "\n".join(language_model_text()) + "\n")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    tuning = None
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("simulating sentences", total=sum(b.sentences for b in blocks))
        done = 0
        for index, (name, plan) in enumerate(plans.items()):
            tuning = _tuning_of_day(settings, index, tuning)
            # Val and test share blocks, so that one pass makes both.
            for splits in (("train",), ("val", "test")):
                missing = _missing_files(out, name, plan, splits)
                for _ in _write_files(missing, name, plan, settings, index, tuning):
                    progress.advance(task)
            done += sum(len(block.sentences) for block in plan)
            progress.update(task, completed=done)


def plan_sessions(settings: SimulationSettings) -> dict[str, list[PlannedBlock]]:
    """Session name -> its blocks. No sentence comes twice.

    Raises:
      ValueError: the corpora have too few sentences of this length.
    """
    queues = {split: _queues(settings, split) for split in ("train", "val", "test")}
    plans = {}
    for index, name in enumerate(SESSIONS[: settings.sessions]):
        rng = _rng(settings, "plan", index)
        held_out = {} if index == 0 else {"val": settings.val, "test": settings.test}
        counts = [{"train": n} for n in _block_sizes(settings.train)]
        counts += _held_out_blocks(held_out)
        blocks = []
        for number, which in enumerate(rng.permutation(len(counts)), start=1):
            wanted = counts[which]
            corpus = _draw_corpus(queues, wanted, rng, settings)
            taken = [
                Sentence(split, text, sentence_to_ids(normalise(text).split()))
                for split, count in wanted.items()
                for text in _take(queues[split][corpus], count)
            ]
            order = rng.permutation(len(taken))
            blocks.append(PlannedBlock(number, corpus, tuple(taken[i] for i in order)))
        plans[name] = blocks
    return plans


def modulation(difficulty: float) -> float:
    """Depth of the electrodes' modulation by speech for a difficulty of 0 to 1."""
    return float(np.exp(np.interp(difficulty, [0.0, 1.0], [np.log(1.3), np.log(0.35)])))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `b2txt simulate`."""
    texts = {
        "sessions": "number of sessions, the first with train sentences only",
        "train": "train sentences per session",
        "val": "val sentences per session",
        "test": "test sentences per session (written without labels)",
        "seed": "of everything random",
        "difficulty": "0 to 1: the phoneme error rate that can be reached goes from 3 %% to 30 %%",
        "min_words": "fewest words of a sentence",
        "max_words": "most words of a sentence",
        "speaking_rate": "1 is about 65 words per minute",
        "drift": "change from session to session; 0 is none, 1 the calibrated amount",
    }
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    for field in dataclasses.fields(SimulationSettings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"{texts[field.name]} (default {field.default})",
        )
    parser.add_argument(
        "--force", action="store_true", help="replace sessions simulated with other settings"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `b2txt simulate`."""
    names = [field.name for field in dataclasses.fields(SimulationSettings)]
    settings = SimulationSettings(**{name: getattr(args, name) for name in names})
    simulate(args.out, settings, args.force)
    print(f"{settings.sessions} simulated sessions are in {args.out / 'hdf5_data_final'}")
    return 0


def _rng(settings: SimulationSettings, purpose: str, *numbers: int) -> np.random.Generator:
    """Randomness by name: independent of whatever else was drawn before."""
    return np.random.default_rng([settings.seed, *purpose.encode(), *numbers])


def _queues(settings: SimulationSettings, split: Pool) -> dict[str, list[str]]:
    """Corpus -> the split's sentences of fitting length, in this seed's order, last one first."""
    queues: dict[str, list[str]] = {corpus: [] for corpus in CORPORA}
    for text, corpus in load_pool(split):
        if settings.min_words <= len(normalise(text).split()) <= settings.max_words:
            queues[corpus].append(text)
    rng = _rng(settings, f"sentences of {split}")
    for corpus, texts in queues.items():
        queues[corpus] = [texts[i] for i in rng.permutation(len(texts))]
    return queues


def _block_sizes(sentences: int) -> list[int]:
    """Splits `sentences` into blocks of about 25, as even as can be."""
    blocks = max(1, round(sentences / _BLOCK_SENTENCES)) if sentences else 0
    return [sentences // blocks + (i < sentences % blocks) for i in range(blocks)]


def _held_out_blocks(counts: dict[str, int]) -> list[dict[str, int]]:
    """Blocks that val and test share, as in the published set: per block, sentences by split."""
    blocks: list[dict[str, int]] = [{} for _ in _block_sizes(sum(counts.values()))]
    for split, count in counts.items():
        for i, block in enumerate(blocks):
            share = count // len(blocks) + (i < count % len(blocks))
            if share:
                block[split] = share
    return blocks


def _draw_corpus(
    queues: dict[str, dict[str, list[str]]],
    wanted: dict[str, int],
    rng: np.random.Generator,
    settings: SimulationSettings,
) -> str:
    """A corpus that still has the sentences wanted, by how many it has left."""
    # One number is drawn, whatever is left, so that later draws do not depend on it.
    place = rng.random()
    left = np.array([min(len(queues[split][c]) for split in wanted) for c in CORPORA], float)
    enough = [all(len(queues[split][c]) >= n for split, n in wanted.items()) for c in CORPORA]
    left[~np.array(enough)] = 0
    if not left.any():
        raise ValueError(
            f"too few sentences of {settings.min_words} to {settings.max_words} words are left "
            f"for {settings.sessions} sessions of {settings.train}/{settings.val}/{settings.test} "
            "sentences: ask for fewer sessions or sentences, or for a wider range of words"
        )
    return CORPORA[int(np.searchsorted(np.cumsum(left) / left.sum(), place, side="right"))]


def _take(queue: list[str], count: int) -> list[str]:
    taken = queue[len(queue) - count :]
    del queue[len(queue) - count :]
    return taken


def _rows(session: str, plan: list[PlannedBlock]) -> Iterator[Block]:
    date = session_date(session)
    day = (datetime.date.fromisoformat(date) - _IMPLANTED).days
    for block in plan:
        split = "Train" if block.is_train else "Val/Test"
        yield Block(date, day, block.number, len(block.sentences), block.corpus, split)


def _tuning_of_day(
    settings: SimulationSettings, index: int, before: simulate_neural.Tuning | None
) -> simulate_neural.Tuning:
    """The tuning of session `index`, from that of the session before."""
    if before is None:
        return simulate_neural.first_tuning(_rng(settings, "tuning"))
    usual = simulate_neural.Drift()
    drift = simulate_neural.Drift(
        rotation=settings.drift * usual.rotation,
        renewal=min(1.0, settings.drift * usual.renewal),
        gain=settings.drift * usual.gain,
        death=min(1.0, settings.drift * usual.death),
    )
    return simulate_neural.next_tuning(before, drift, _rng(settings, "drift", index))


def _missing_files(
    out: Path, session: str, plan: list[PlannedBlock], splits: Sequence[str]
) -> dict[str, Path]:
    """Split -> file, for those of `splits` that the session has and that are not there yet."""
    held = {sentence.split for block in plan for sentence in block.sentences}
    paths = {split: _session_folder(out, session) / f"data_{split}.hdf5" for split in splits}
    return {split: path for split, path in paths.items() if split in held and not path.is_file()}


def _write_files(
    paths: dict[str, Path],
    session: str,
    plan: list[PlannedBlock],
    settings: SimulationSettings,
    index: int,
    tuning: simulate_neural.Tuning,
) -> Iterator[None]:
    """Writes the files `paths` (by split) of one session; yields after each trial."""
    if not paths:
        return
    partial = {split: path.with_suffix(".partial") for split, path in paths.items()}
    for path in partial.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(h5py.File(path, "w")) for s, path in partial.items()}
        for block in plan:
            if not any(sentence.split in paths for sentence in block.sentences):
                continue
            recorded = _record_block(block, settings, index, tuning)
            for trial, (sentence, features) in enumerate(
                zip(block.sentences, recorded, strict=True)
            ):
                if sentence.split in files:
                    file = files[sentence.split]
                    group = file.create_group(f"trial_{len(file):04d}")
                    _write_trial(group, session, block.number, trial, sentence, features)
                yield
    for split, path in paths.items():
        os.replace(partial[split], path)


def _record_block(
    block: PlannedBlock, settings: SimulationSettings, index: int, tuning: simulate_neural.Tuning
) -> list[np.ndarray]:
    """Features of each trial of a block, float32 [T, 512]."""
    rng = _rng(settings, "block", index, block.number)
    table = simulate_speech.articulation()
    trajectories = [
        simulate_speech.attempt(sentence.labels, table, settings.speaking_rate, rng)
        for sentence in block.sentences
    ]
    return simulate_neural.record(trajectories, tuning, modulation(settings.difficulty), rng)


def _write_trial(
    group: h5py.Group,
    session: str,
    block: int,
    trial: int,
    sentence: Sentence,
    features: np.ndarray,
) -> None:
    """One trial in the published layout; test trials have no labels."""
    group["input_features"] = features
    group.attrs["n_time_steps"] = len(features)
    group.attrs["session"] = session
    group.attrs["block_num"] = block
    group.attrs["trial_num"] = trial
    if sentence.split == "test":
        return
    group["seq_class_ids"] = _padded(sentence.labels)
    group["transcription"] = _padded(np.array([ord(letter) for letter in sentence.text]))
    group.attrs["seq_len"] = len(sentence.labels)
    group.attrs["sentence_label"] = sentence.text


def _padded(values: np.ndarray) -> np.ndarray:
    padded = np.zeros(PADDED_LABEL, np.int32)
    padded[: len(values)] = values
    return padded


def _session_folder(out: Path, session: str) -> Path:
    return out / "hdf5_data_final" / session


def _claim(out: Path, settings: SimulationSettings, force: bool) -> None:
    """Writes the settings to `out`, or sees that those there agree."""
    wanted = {"format": _FORMAT, **dataclasses.asdict(settings)}
    path = out / _SETTINGS_FILE
    data = out / "hdf5_data_final"
    if path.is_file():
        found = json.loads(path.read_text())
        other = sorted(k for k in {*wanted, *found} - {"sessions"} if wanted.get(k) != found.get(k))
        if found.get("sessions", 0) > settings.sessions:
            other.append("sessions")
        if other and not force:
            differences = ", ".join(f"{k} {found.get(k)} (now {wanted.get(k)})" for k in other)
            raise ValueError(
                f"{out} holds sessions simulated with other settings: {differences}; choose "
                "another --out, or replace them with --force"
            )
        if other:
            # The settings go first: a half-removed folder must not look complete.
            path.unlink()
            for session in SESSIONS:
                shutil.rmtree(_session_folder(out, session), ignore_errors=True)
    elif data.exists() and any(data.iterdir()):
        raise ValueError(
            f"{data} holds data, but {path} is not there, so they may be real recordings: choose "
            "another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_text(path, json.dumps(wanted, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
