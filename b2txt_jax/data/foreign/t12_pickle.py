"""The pickle that the 2024 competition's published loader writes, such as `ptDecoder_ctc`.

A dict of `train`, `test` and `competition`, each with a list of days. A day is a dict of lists with
an entry for each trial: `sentenceDat` (features [T, 256], z-scored per block), `transcriptions`
(texts, or character codes padded with 0), `phonemes` (class ids padded with 0 to 500), and arrays
`timeSeriesLens` and `phoneLens`. It has neither dates nor blocks: days are in the order of the
sessions' names. It is read without running what is in it, and is in memory as a whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.data.description import DataError, DataWarning
from b2txt_jax.data.foreign.recording import Format, Recording, Utterance, matrix, numbers
from b2txt_jax.phonemes import SILENCE_ID
from lm_server.files.plain_pickle import read_pickle

_DATES = (
    "04.28 05.05 05.17 05.19 05.24 05.26 06.02 06.07 06.14 06.16 06.21 06.23 06.28 07.05 07.14 "
    "07.21 07.27 07.29 08.02 08.11 08.13 08.18 08.23 08.25"
)
SESSIONS = tuple(f"t12.2022.{date}" for date in _DATES.split())
"""The competition's sessions, in their order."""
HELD_OUT = (4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 18, 19, 20)
"""Which of them `competition` has trials of (the published evaluation)."""
_SPLITS = {"train": "train", "test": "val", "competition": "test"}
_LISTS = ("sentenceDat", "transcriptions", "phonemes", "timeSeriesLens", "phoneLens")


@dataclass(frozen=True)
class _Day(Recording):
    path: Path
    session: str
    split: str
    where: str
    trials: dict[str, Any]
    normalised: bool = True

    def sentences(self) -> Sequence[str]:
        return ()  # It has labels of its own, by a model for words that no dictionary has.

    def utterances(self) -> Iterator[Utterance]:
        lists = {name: self._list(name) for name in _LISTS}
        counts = {len(one) for one in lists.values()}
        if len(counts) > 1:
            found = ", ".join(f"{len(one)} in `{name}`" for name, one in lists.items())
            raise DataError(f"{self.where} has {found}; needed as many in each")
        lengths, label_lengths = (
            numbers(self.trials[name], f"{self.where}: `{name}`") for name in _LISTS[3:]
        )
        for index in range(len(lengths)):
            where = f"{self.where}: trial {index} of"
            features = matrix(lists["sentenceDat"][index], f"{where} `sentenceDat`")
            if len(features) != lengths[index]:
                raise DataError(
                    f"{where} `sentenceDat` has {len(features)} bins, by `timeSeriesLens` "
                    f"{lengths[index]}; needed the same: write the pickle again"
                )
            sentence, labels = None, None
            if self.split != "test":
                sentence = _text(lists["transcriptions"][index], f"{where} `transcriptions`")
                labels = _labels(
                    lists["phonemes"][index], int(label_lengths[index]), f"{where} `phonemes`"
                )
            yield Utterance(0, features, sentence, labels)

    def _list(self, name: str) -> Any:
        found = self.trials.get(name)
        if not isinstance(found, list | tuple | np.ndarray):
            raise DataError(
                f"{self.where} has {'no' if found is None else type(found).__name__ + ' as'} "
                f"`{name}`; needed a list with an entry for each trial"
            )
        return found


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value.strip(" \0")
    codes = numbers(value, where)
    if ((codes < 0) | (codes > 0x10FFFF)).any():
        raise DataError(f"{where} has {codes.min()} to {codes.max()}; needed character codes")
    return "".join(map(chr, codes)).strip(" \0")


def _labels(value: Any, length: int, where: str) -> np.ndarray:
    ids = numbers(value, where)
    if not 0 < length <= len(ids):
        raise DataError(
            f"{where} has {len(ids)} places, and `phoneLens` is {length}; needed 1 to {len(ids)}"
        )
    ids = ids[:length]
    if ((ids < 1) | (ids > SILENCE_ID)).any():
        raise DataError(
            f"{where} has ids from {ids.min()} to {ids.max()}; needed 1 to {SILENCE_ID}, 0 only "
            "after the label"
        )
    return ids.astype(np.int32)


class T12Pickle(Format):
    """The competition's data in one file."""

    name = "t12-pickle"
    help = "file that the 2024 competition's loader writes, such as ptDecoder_ctc"

    def recordings(self, source: Path) -> list[Recording]:
        """List the days of the three parts."""
        content = read_pickle(
            source, "needed the file that the competition's formatCompetitionData writes"
        )
        if not isinstance(content, dict) or not content.keys() & _SPLITS.keys():
            held = sorted(map(str, content)) if isinstance(content, dict) else type(content)
            raise DataError(
                f"{source} holds {held}; needed a dict of {', '.join(_SPLITS)}, as the "
                "competition's formatCompetitionData writes"
            )
        found: list[Recording] = []
        for part, split in _SPLITS.items():
            days = content.get(part, [])
            sessions = SESSIONS if split != "test" else tuple(SESSIONS[day] for day in HELD_OUT)
            if not isinstance(days, list | tuple) or len(days) > len(sessions):
                shown = len(days) if isinstance(days, list | tuple) else type(days).__name__
                raise DataError(
                    f"{source}: `{part}` has {shown} days; needed a list of at most "
                    f"{len(sessions)}, the competition's sessions in their order"
                )
            if 0 < len(days) < len(sessions):
                warnings.warn(
                    f"{source}: `{part}` has {len(days)} of {len(sessions)} days, which are named "
                    "as the first ones: the file has no dates",
                    DataWarning,
                    stacklevel=2,
                )
            for number, (session, day) in enumerate(zip(sessions, days, strict=False)):
                where = f"{source}: day {number} of `{part}`"
                if not isinstance(day, dict):
                    raise DataError(
                        f"{where} is {type(day).__name__}; needed a dict of {', '.join(_LISTS)}"
                    )
                found.append(_Day(source, session, split, where, day))
        return found
