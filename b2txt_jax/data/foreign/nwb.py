"""NWB files with features as time series and sentences in the table of trials.

BRAND's export names a series STREAM_FIELD and a column of a stream with trials' texts the same way,
such as `cue_sentence`. Its trials have no split and its start of the session is when it was
exported, so that a session has the name of its file. What `b2txt export --nwb` writes is read back
with its splits and labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
class _Part(Recording):
    path: Path
    session: str
    split: str
    settings: NwbSettings
    normalised: bool

    def sentences(self) -> Sequence[str]:
        with opened(self.path) as file:
            trials = Trials(file, self.path)
            if PHONEMES in trials.columns:
                return ()
            return [text for _, text in self._chosen(trials) if text is not None]

    def utterances(self) -> Iterator[Utterance]:
        with opened(self.path) as file:
            series = series_of(file, self.path, self.settings.series)
            trials = Trials(file, self.path)
            blocks = blocks_of(trials, self.settings)
            own = trials.texts(PHONEMES) if PHONEMES in trials.columns else None
            placed = trials.whole_numbers(TRIAL) if TRIAL in trials.columns else None
            for index, text in self._chosen(trials):
                where = f"{self.path}: trial {index}"
                span = trials.start[index], trials.stop[index]
                parts = [one.bins(*span, where) for one in series]
                counts = {one.name: len(part) for one, part in zip(series, parts, strict=True)}
                if len(set(counts.values())) > 1:
                    raise DataError(f"{where} has {counts} bins; needed as many in each series")
                labels = None
                if own is not None and (own[index] or self.split != "test"):
                    labels = label_of(own[index] or "", where)
                elif own is not None:
                    text = None  # A trial for testing, whose words nobody has labelled.
                features = np.concatenate(parts, axis=1)
                number = None if placed is None else placed[index]
                yield Utterance(blocks[index], features, text, labels, number)

    def _chosen(self, trials: Trials) -> list[tuple[int, str | None]]:
        """Return the numbers and texts of the split's trials."""
        texts = trials.texts(self.settings.text)
        splits = splits_of(trials, self.settings)
        chosen = [(at, texts[at]) for at, split in enumerate(splits) if split == self.split]
        without = [at for at, text in chosen if text is None]
        if without and self.split != "test":
            raise DataError(
                f"{self.path}: {len(without)} trials have no text in `{self.settings.text}`, the "
                f"first is {without[0]}; needed one for each: remove them from the table, or give "
                "them the split `test`"
            )
        return chosen


def blocks_of(trials: Trials, settings: NwbSettings) -> list[int]:
    """Return each trial's block, 0 where the file has none."""
    if settings.block in trials.columns or settings.block != BLOCK:
        return trials.whole_numbers(settings.block)
    return [0] * len(trials.start)


def splits_of(trials: Trials, settings: NwbSettings) -> list[str]:
    """Return each trial's split, by the column of that name or by blocks."""
    if SPLIT not in trials.columns:
        return by_block(blocks_of(trials, settings), settings.val_blocks)
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


class Nwb(Format):
    """A folder of NWB files, one for each session."""

    name = "nwb"
    help = "folder with NWB files: BRAND's export, or what `b2txt export --nwb` writes"

    def __init__(self, settings: NwbSettings | None = None) -> None:
        self.settings = settings or NwbSettings()

    def recordings(self, source: Path) -> list[Recording]:
        """List a recording for each file and split that it has trials of."""
        found: list[Recording] = []
        for path in sorted(source.glob("*.nwb")):
            with opened(path) as file:
                held = splits_of(Trials(file, path), self.settings)
            found += [
                _Part(path, path.stem, split, self.settings, self.settings.as_is)
                for split in SPLITS
                if split in held
            ]
        if not found:
            raise DataError(f"{source} holds no NWB file; needed one or more *.nwb in it")
        return found
