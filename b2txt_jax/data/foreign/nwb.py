"""NWB files with features as time series and sentences in the table of trials.

BRAND's export names a series STREAM_FIELD and a column of a stream with trials' texts the same
way, such as `cue_sentence`. It writes a file for each run of a graph, as a rule a block of
sentences, which its supervisor names PARTICIPANT_yymmddTHHMM_GRAPH. So the files of a day are the
blocks of one session. Its trials have no split, and its start of the session is when it was
exported.

Any other file is a session of its own name. What `b2txt export --nwb` writes is read back with its
splits and labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from b2txt_jax.data.description import DataError
from b2txt_jax.data.foreign.nwb_file import Trials, opened, series_of
from b2txt_jax.data.foreign.recording import Format, Recording, Utterance, by_block
from b2txt_jax.data.trial import SPLITS
from b2txt_jax.phonemes import PHONEME_IDS, SILENCE_ID

TEXT, SPLIT, BLOCK, PHONEMES = "sentence", "split", "block_num", "phonemes"
TRIAL = "trial_num"
"""Columns of the table of trials that `b2txt export --nwb` writes."""
SILENCE = "|"
_RUN = re.compile(r"(?P<participant>.+)_(?P<date>\d{6})T\d{4}_.+")
"""The name that BRAND's supervisor gives the file of a run."""


@dataclass(frozen=True)
class NwbSettings:
    """What a file has under names of its own."""

    series: tuple[str, ...] = ()
    """Of the features, in their order. Empty: the only one."""
    text: str = TEXT
    block: str = BLOCK
    as_is: bool = False
    """Whether features are used as they are."""
    val_blocks: int = 1


@dataclass(frozen=True)
class _File:
    """What is chosen of a file."""

    path: Path
    blocks: tuple[int, ...]
    """Of each trial. They are counted on from the files before it."""
    splits: tuple[str, ...]

    def chosen(
        self, trials: Trials, split: str, settings: NwbSettings
    ) -> list[tuple[int, str | None]]:
        """Return the numbers and texts of a split's trials."""
        texts = trials.texts(settings.text)
        chosen = [(at, texts[at]) for at, one in enumerate(self.splits) if one == split]
        without = [at for at, text in chosen if text is None]
        if without and split != "test":
            raise DataError(
                f"{self.path}: {len(without)} trials have no text in `{settings.text}`, the "
                f"first is {without[0]}; needed one for each: remove them from the table, or give "
                "them the split `test`"
            )
        return chosen


@dataclass(frozen=True)
class _Part(Recording):
    path: Path
    session: str
    split: str
    settings: NwbSettings
    files: tuple[_File, ...]
    normalised: bool

    @property
    def paths(self) -> Sequence[Path]:
        return [one.path for one in self.files]

    def sentences(self) -> Sequence[str]:
        found: list[str] = []
        for one in self.files:
            with opened(one.path) as file:
                trials = Trials(file, one.path)
                if PHONEMES not in trials.columns:
                    chosen = one.chosen(trials, self.split, self.settings)
                    found += [text for _, text in chosen if text is not None]
        return found

    def utterances(self) -> Iterator[Utterance]:
        for one in self.files:
            with opened(one.path) as file:
                yield from self._of_file(one, file)

    def _of_file(self, one: _File, file: h5py.File) -> Iterator[Utterance]:
        series = series_of(file, one.path, self.settings.series)
        trials = Trials(file, one.path)
        own = trials.texts(PHONEMES) if PHONEMES in trials.columns else None
        placed = trials.whole_numbers(TRIAL) if TRIAL in trials.columns else None
        for index, text in one.chosen(trials, self.split, self.settings):
            where = f"{one.path}: trial {index}"
            span = trials.start[index], trials.stop[index]
            parts = [each.bins(*span, where) for each in series]
            counts = {each.name: len(part) for each, part in zip(series, parts, strict=True)}
            if len(set(counts.values())) > 1:
                raise DataError(f"{where} has {counts} bins; needed as many in each series")
            labels = None
            if own is not None and (own[index] or self.split != "test"):
                labels = label_of(own[index] or "", where)
            elif own is not None:
                text = None  # A trial for testing, whose words nobody has labelled.
            features = np.concatenate(parts, axis=1)
            number = None if placed is None else placed[index]
            yield Utterance(one.blocks[index], features, text, labels, number)


def blocks_of(trials: Trials, settings: NwbSettings) -> list[int]:
    """Return each trial's block, 0 where the file has none."""
    if settings.block in trials.columns or settings.block != BLOCK:
        return trials.whole_numbers(settings.block)
    return [0] * len(trials.start)


def files_of(paths: Sequence[Path], settings: NwbSettings) -> list[_File]:
    """Return the files of one session, in their order, with the block and split of each trial.

    Where a later file counts its blocks from the start again, they go on from those before: two
    files of the blocks 1, 1, 2 become 1, 1, 2 and 3, 3, 4.
    """
    blocks: list[list[int]] = []
    splits: list[list[str] | None] = []
    for path in paths:
        with opened(path) as file:
            trials = Trials(file, path)
            own = blocks_of(trials, settings)
            moved = max(0, 1 + max(blocks[-1]) - min(own)) if blocks else 0
            blocks.append([block + moved for block in own])
            splits.append(_named_splits(trials))
    named = [path for path, one in zip(paths, splits, strict=True) if one is not None]
    if named and settings.val_blocks != 1:
        raise DataError(
            f"--val-blocks is {settings.val_blocks}, and {named[0]} has splits of its own, in the "
            f"column `{SPLIT}`; needed the command without it"
        )
    by_blocks = iter(by_block([one for some in blocks for one in some], settings.val_blocks))
    found = []
    for path, own, given in zip(paths, blocks, splits, strict=True):
        drawn = [next(by_blocks) for _ in own]
        found.append(_File(path, tuple(own), tuple(drawn if given is None else given)))
    return found


def _named_splits(trials: Trials) -> list[str] | None:
    """Return each trial's split by the column of that name, if there is one."""
    if SPLIT not in trials.columns:
        return None
    found = [split or "" for split in trials.texts(SPLIT)]
    wrong = sorted(set(found) - set(SPLITS))
    if wrong:
        raise DataError(f"{trials.where} {SPLIT} holds {wrong}; needed {', '.join(SPLITS)}")
    return found


def label_of(phones: str, where: str) -> np.ndarray:
    """Return the class ids of phonemes, with `|` for silence, int32 [L].

    >>> label_of("HH AY |", "trial 0").tolist()
    [16, 6, 40]
    """
    ids = {**PHONEME_IDS, SILENCE: SILENCE_ID}
    wrong = [phone for phone in phones.split() if phone not in ids]
    if wrong:
        raise DataError(
            f"{where} has the phoneme {wrong[0]!r} in `{PHONEMES}`; needed ARPAbet without stress, "
            f"and {SILENCE} for silence"
        )
    return np.array([ids[phone] for phone in phones.split()], np.int32)


def session_of(path: Path) -> str:
    """Return the session that a file belongs to: the day of a run of BRAND's, else its own name.

    >>> session_of(Path("t15_240813T1030_speech.nwb")), session_of(Path("first.nwb"))
    ('t15.2024.08.13', 'first')
    """
    run = _RUN.fullmatch(path.stem)
    if run is None:
        return path.stem
    date = run["date"]
    return f"{run['participant']}.20{date[:2]}.{date[2:4]}.{date[4:]}"


class Nwb(Format):
    """A folder of NWB files, at any depth."""

    name = "nwb"
    help = "folder with NWB files: BRAND's export, or what `b2txt export --nwb` writes"

    def __init__(self, settings: NwbSettings | None = None) -> None:
        self.settings = settings or NwbSettings()

    def recordings(self, source: Path) -> list[Recording]:
        """List a recording for each session and split that it has trials of."""
        sessions: dict[tuple[str, Path | None], list[Path]] = {}
        for path in sorted(source.rglob("*.nwb"), key=lambda one: (one.stem, one)):
            alone = None if _RUN.fullmatch(path.stem) else path
            of_session = sessions.setdefault((session_of(path), alone), [])
            if of_session and of_session[-1].stem == path.stem:
                raise DataError(
                    f"{of_session[-1]} and {path} are of the same run, of which one may be a copy; "
                    "needed each run once: move the other away"
                )
            of_session.append(path)
        found: list[Recording] = []
        for (session, _), paths in sessions.items():
            files = files_of(paths, self.settings)
            for split in SPLITS:
                held = tuple(one for one in files if split in one.splits)
                if held:
                    as_is = self.settings.as_is
                    found.append(_Part(held[0].path, session, split, self.settings, held, as_is))
        if not found:
            raise DataError(f"{source} holds no NWB file; needed one or more *.nwb in it")
        return found
