"""The settings of a simulation, and the plan made of them: each session's blocks of sentences.

`write.py` writes the plan to files.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import numpy as np

from b2txt_jax.data.description import DataError
from b2txt_jax.phonemes import sentence_to_ids
from b2txt_jax.simulation.corpus import CORPORA, Pool, load_pool
from b2txt_jax.simulation.neural import ELECTRODES
from lm_server.lexicon.text_rules import normalise

_DATES = """
2023.08.11 2023.08.13 2023.08.18 2023.08.20 2023.08.25 2023.08.27 2023.09.01 2023.09.03 2023.09.24
2023.09.29 2023.10.01 2023.10.06 2023.10.08 2023.10.13 2023.10.15 2023.10.20 2023.10.22 2023.11.03
2023.11.04 2023.11.17 2023.11.19 2023.11.26 2023.12.03 2023.12.08 2023.12.10 2023.12.17 2023.12.29
2024.02.25 2024.03.03 2024.03.08 2024.03.15 2024.03.17 2024.04.25 2024.04.28 2024.05.10 2024.06.14
2024.07.19 2024.07.21 2024.07.28 2025.01.10 2025.01.12 2025.03.14 2025.03.16 2025.03.30 2025.04.13
"""
SESSIONS: tuple[str, ...] = tuple(f"t15.{date}" for date in _DATES.split())
"""Names of the published sessions, in order. N simulated sessions take the first N."""

TRAIN_ONLY = (0, 19, 26, 38)
"""Indices of the sessions of the preset `recordings` without val and test. Four published ones have
none. The first is one of them, the others are a choice of ours."""
STRONG_DRIFT, RECORDINGS = "strong_drift", "recordings"
PRESETS: dict[str, dict[str, Any]] = {
    STRONG_DRIFT: {"sessions": 6, "train": 120, "val": 30, "test": 30, "bursts": 0.0},
    RECORDINGS: {"sessions": 45, "train": None, "val": None, "test": None, "bursts": 1.0},
}
"""What is simulated, by name, with the settings that differ. None: as many as published."""
_PUBLISHED = {"train": 8072, "val": 1426, "test": 1450}
LATE = 39
"""Index of the first of the last six sessions, which are harder and repeat more sentences."""
_REPEATED = (0.069, 0.43)
"""Share of val and test sentences that also occur in train: before the late sessions, in them."""
_MOST_LABELS, _LABELS_PER_WORD = 50, 5.5
"""Limits that make sentences as short as the published ones, 29 labels and 6.6 words."""
# The published blocks have 5 to 50 sentences; small ones mix the corpora within a short session.
_BLOCK_SENTENCES = 25


def _setting(default: Any, least: float, most: float, help: str) -> Any:
    return field(default=default, metadata={"least": least, "most": most, "help": help})


@dataclass(frozen=True)
class SimulationSettings:
    """What to simulate. The files depend on these settings alone.

    A session is the same however many sessions are asked for. Settings that are None become those
    of the preset.

    Raises:
      DataError: a setting is out of range.
    """

    preset: str = field(
        default=STRONG_DRIFT,
        metadata={
            "choices": tuple(PRESETS),
            "help": "strong_drift: short trials, days far apart, for demonstrations; recordings: "
            "fitted to what is published of the T15 recordings",
        },
    )
    sessions: int = _setting(None, 2, len(SESSIONS), "sessions; the first has train sentences only")
    train: int | None = _setting(None, 1, 10_000, "train sentences per session")
    val: int | None = _setting(None, 0, 10_000, "val sentences per session")
    test: int | None = _setting(
        None, 0, 10_000, "test sentences per session (written without labels)"
    )
    seed: int = _setting(0, 0, 2**63 - 1, "of everything random")
    difficulty: float = _setting(
        0.5, 0.0, 1.0, "0 to 1: the phoneme error rate that can be reached goes from 3 % to 30 %"
    )
    min_words: int = _setting(3, 3, 12, "fewest words of a sentence")
    max_words: int = _setting(12, 3, 12, "most words of a sentence")
    speaking_rate: float = _setting(
        1.0,
        0.5,
        3.0,
        "1 is about 65 words per minute (recordings: 30); 2 halves all durations",
    )
    drift: float = _setting(
        1.0, 0.0, 3.0, "change from session to session; 0 is none, 1 the calibrated amount"
    )
    bursts: float = _setting(
        None,
        0.0,
        5.0,
        "strength of bursts that channels share; strong_drift: 1 is about 1.7 times the modulation "
        "by speech at difficulty 0.5 (rms); recordings: 1 is the calibrated strength",
    )
    electrodes: int = _setting(
        ELECTRODES,
        1,
        ELECTRODES,
        "electrodes of each array that are written, two features each, the first ones; fewer "
        "make training cheaper, with data.feature_count",
    )
    raw: bool = field(
        default=False,
        metadata={"help": "features before the z-score over the block, as a live system has them"},
    )

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise DataError(f"--preset is {self.preset!r}; needed one of {', '.join(PRESETS)}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for setting in fields(self):
            value = getattr(self, setting.name)
            if "least" not in setting.metadata or value is None:
                continue
            least, most = setting.metadata["least"], setting.metadata["most"]
            if setting.name == "max_words":
                least = self.min_words
            if not least <= value <= most:
                option = f"--{setting.name.replace('_', '-')}"
                raise DataError(f"{option} is {value}; needed {least} to {most}")

    def sentences(self, index: int) -> dict[str, int]:
        """Return how many sentences session `index` has, by split."""
        train_only = TRAIN_ONLY if self.preset == RECORDINGS else TRAIN_ONLY[:1]
        counts: dict[str, int] = {}
        for split in get_args(Pool):
            given = getattr(self, split)
            if split != "train" and index in train_only:
                counts[split] = 0
            else:
                counts[split] = _published(split)[index] if given is None else given
        return counts


@functools.cache
def _published(split: Pool) -> tuple[int, ...]:
    """Return the sentences of each session. Their sum is published, their spread is ours."""
    rng = np.random.default_rng([*split.encode()])
    weights = np.exp((0.4 if split == "train" else 0.15) * rng.standard_normal(len(SESSIONS)))
    if split != "train":
        weights[list(TRAIN_ONLY)] = 0
    ends = np.rint(np.cumsum(weights) / weights.sum() * _PUBLISHED[split]).astype(int)
    return tuple(int(n) for n in np.diff(ends, prepend=0))


@dataclass(frozen=True)
class Sentence:
    """One planned trial: its split, its text as shown, its phonemes int32 [L]."""

    split: Pool
    text: str
    labels: np.ndarray


@dataclass(frozen=True)
class PlannedBlock:
    """A block of one corpus: its number in the table, its sentences in the order of trials."""

    number: int
    corpus: str
    sentences: tuple[Sentence, ...]

    @property
    def is_train(self) -> bool:
        """Whether the block belongs to train. Otherwise val and test share it."""
        return self.sentences[0].split == "train"


def named_rng(settings: SimulationSettings, purpose: str, *numbers: int) -> np.random.Generator:
    """Return randomness by name, independent of what was drawn before."""
    return np.random.default_rng([settings.seed, *purpose.encode(), *numbers])


def plan_sessions(settings: SimulationSettings) -> dict[str, list[PlannedBlock]]:
    """Return session name -> blocks.

    No sentence occurs twice, but for those of val and test that the preset `recordings` repeats
    from train.

    Raises:
      DataError: the corpora have too few sentences of this length.
    """
    queues = {split: _queues(settings, split) for split in ("train", "val", "test")}
    plans = {}
    trained: dict[str, list[Sentence]] = {corpus: [] for corpus in CORPORA}
    for index, name in enumerate(SESSIONS[: settings.sessions]):
        rng = named_rng(settings, "plan", index)
        held_out = settings.sentences(index)
        counts = [{"train": n} for n in _block_sizes(held_out.pop("train"))]
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
        if settings.preset == RECORDINGS:
            for block in blocks:
                trained[block.corpus] += [s for s in block.sentences if s.split == "train"]
            blocks = _with_repeats(blocks, trained, index, named_rng(settings, "repeats", index))
        plans[name] = blocks
    return plans


def _with_repeats(
    blocks: Sequence[PlannedBlock],
    trained: Mapping[str, Sequence[Sentence]],
    index: int,
    rng: np.random.Generator,
) -> list[PlannedBlock]:
    """Replace a share of the val and test sentences by sentences of train, of the same corpus.

    They are spread evenly, so that the shares of a session hardly depend on chance.
    """
    share = _REPEATED[index >= LATE]
    place = {"val": rng.random(), "test": rng.random()}
    changed = []
    for block in blocks:
        sentences = list(block.sentences)
        for trial, sentence in enumerate(sentences):
            if sentence.split == "train":
                continue
            which = int(rng.integers(max(1, len(trained[block.corpus]))))
            place[sentence.split] += share
            if place[sentence.split] >= 1 and trained[block.corpus]:
                place[sentence.split] -= 1
                repeated = trained[block.corpus][which]
                sentences[trial] = dataclasses.replace(repeated, split=sentence.split)
        changed.append(dataclasses.replace(block, sentences=tuple(sentences)))
    return changed


def _queues(settings: SimulationSettings, split: Pool) -> dict[str, list[str]]:
    """Return corpus -> sentences of fitting length, in this seed's order, the last one first."""
    queues: dict[str, list[str]] = {corpus: [] for corpus in CORPORA}
    for text, corpus in load_pool(split):
        words = normalise(text).split()
        if not settings.min_words <= len(words) <= settings.max_words:
            continue
        if settings.preset == RECORDINGS:
            labels = len(sentence_to_ids(words))
            if labels > min(_MOST_LABELS, _LABELS_PER_WORD * len(words)):
                continue
        queues[corpus].append(text)
    rng = named_rng(settings, f"sentences of {split}")
    for corpus, texts in queues.items():
        queues[corpus] = [texts[i] for i in rng.permutation(len(texts))]
    return queues


def _block_sizes(sentences: int) -> list[int]:
    """Split `sentences` into blocks of about 25, as evenly as possible."""
    blocks = max(1, round(sentences / _BLOCK_SENTENCES)) if sentences else 0
    return [sentences // blocks + (i < sentences % blocks) for i in range(blocks)]


def _held_out_blocks(counts: dict[str, int]) -> list[dict[str, int]]:
    """Return blocks that val and test share, as in the published set: sentences by split."""
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
    """Draw a corpus that still has the wanted sentences, weighted by how many are left."""
    # Always one draw, so that later draws do not depend on what is left.
    place = rng.random()
    left = np.array([min(len(queues[split][c]) for split in wanted) for c in CORPORA], float)
    enough = [all(len(queues[split][c]) >= n for split, n in wanted.items()) for c in CORPORA]
    left[~np.array(enough)] = 0
    if not left.any():
        counts = settings.sentences(1).values()
        raise DataError(
            f"too few sentences of {settings.min_words} to {settings.max_words} words are left "
            f"for {settings.sessions} sessions of {'/'.join(map(str, counts))} sentences: ask for "
            "fewer sessions or sentences, or for a wider range of words"
        )
    return CORPORA[int(np.searchsorted(np.cumsum(left) / left.sum(), place, side="right"))]


def _take(queue: list[str], count: int) -> list[str]:
    taken = queue[len(queue) - count :]
    del queue[len(queue) - count :]
    return taken
