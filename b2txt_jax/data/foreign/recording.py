"""A recording in another format, as its reader hands it over to be written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.io

from b2txt_jax.data.description import DataError
from b2txt_jax.phonemes import PHONEME_IDS, SILENCE_ID, pronunciations
from lm_server.lexicon.text_rules import scored_words

LEAST_DEVIATION = 1e-8
"""Added to a standard deviation before it divides (the published T12 loader)."""


@dataclass(frozen=True)
class Utterance:
    """One trial as recorded."""

    block: int
    features: np.ndarray
    """float32 [T, D], bins of 20 ms, before the z-score."""
    sentence: str | None
    """None in a split without labels."""
    labels: np.ndarray | None = None
    """Class ids [L], where the recording has them. None: those of the sentence's words."""
    trial: int | None = None
    """Number within the block, where the recording has it. None: counted from 0."""


class Recording(ABC):
    """What a file has of one session and split."""

    path: Path
    session: str
    split: str
    normalised: bool = False
    """Whether features are z-scored already."""

    @property
    def paths(self) -> Sequence[Path]:
        """The files that it is read from."""
        return [self.path]

    @abstractmethod
    def sentences(self) -> Sequence[str]:
        """Return the sentences whose words become labels, without reading features."""

    @abstractmethod
    def utterances(self) -> Iterator[Utterance]:
        """Read the trials in their order."""


class Format(ABC):
    """A format: finds the recordings in what a user has."""

    name: ClassVar[str]
    help: ClassVar[str]

    @abstractmethod
    def recordings(self, source: Path) -> list[Recording]:
        """List the recordings in a folder.

        Raises:
          DataError: there is none.
        """


def by_block(blocks: Sequence[int], val_blocks: int) -> list[str]:
    """Return the split of each trial, where a recording has none: the last blocks are for val.

    A recording with no more blocks than that is all for training.

    >>> by_block([3, 3, 4], 1)
    ['train', 'train', 'val']
    """
    held = sorted(set(blocks))
    val = held[len(held) - val_blocks :] if val_blocks < len(held) else []
    return ["val" if block in val else "train" for block in blocks]


def read_mat(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return variables of a MATLAB file, version 5 to 7.

    Raises:
      DataError: it cannot be read, or lacks one of them.
    """
    try:
        found = scipy.io.loadmat(path, variable_names=list(names))
    except NotImplementedError as error:
        raise DataError(
            f"{path} is a MATLAB file of version 7.3; needed version 7 or older: save it again "
            "with save(..., '-v7')"
        ) from error
    except Exception as error:  # a damaged file raises whatever the parser runs into
        raise DataError(
            f"{path} cannot be read as a MATLAB file ({type(error).__name__}: {error}); needed a "
            "whole file: copy it again"
        ) from error
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f"{path} has no {', '.join(missing)}; needed {', '.join(names)}: is it of another "
            "format, or not a whole file?"
        )
    return found


def texts(value: Any, where: str) -> list[str]:
    """Return a list of texts from a character array or a cell of them, without padding.

    Raises:
      DataError: it holds anything else.
    """
    found = []
    for one in np.asarray(value).reshape(-1):
        while isinstance(one, np.ndarray) and one.dtype == object and one.size == 1:
            one = one.reshape(-1)[0]
        if isinstance(one, np.ndarray) and one.dtype.kind == "U" and one.size <= 1:
            one = str(one.reshape(-1)[0]) if one.size else ""
        if not isinstance(one, str):
            raise DataError(f"{where} holds {type(one).__name__}; needed texts")
        found.append(one.strip(" \0"))
    return found


def numbers(value: Any, where: str) -> np.ndarray:
    """Return whole numbers, int64 [N].

    Raises:
      DataError: others are there.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or not np.all(np.mod(array, 1) == 0):
        raise DataError(f"{where} is {array.dtype} {list(array.shape)}; needed whole numbers")
    return array.reshape(-1).astype(np.int64)


def matrix(value: Any, where: str, least_columns: int = 1) -> np.ndarray:
    """Return features, float32 [T, D].

    Raises:
      DataError: another shape, no bins, or values that are not finite.
    """
    array = np.asarray(value)
    if array.ndim != 2 or array.dtype.kind not in "iuf" or array.shape[1] < least_columns:
        raise DataError(
            f"{where} is {array.dtype} {list(array.shape)}; needed numbers [bins, at least "
            f"{least_columns} channels]"
        )
    if not len(array):
        raise DataError(f"{where} has no bins; needed at least one: leave the trial out")
    if not np.isfinite(array).all():
        raise DataError(
            f"{where} has {int((~np.isfinite(array)).sum())} NaN or infinite values; needed finite "
            "numbers: repair or leave out the trial"
        )
    return array.astype(np.float32)


def z_scored(block: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Z-score the trials of a block by all of their bins, [T, D] each."""
    together = np.concatenate(block)
    mean, deviation = together.mean(axis=0), together.std(axis=0)
    return [((one - mean) / (deviation + LEAST_DEVIATION)).astype(np.float32) for one in block]


class Labeller:
    """Sentences to class ids, with pronunciations of one's own beside the dictionary."""

    def __init__(self, lexicon: Path | None = None) -> None:
        self._own = _read_lexicon(lexicon) if lexicon else {}

    def unknown(self, sentence: str) -> list[str]:
        """Return the words without a pronunciation."""
        return [word for word in scored_words(sentence) if self._phones(word) is None]

    def __call__(self, sentence: str) -> np.ndarray:
        """Return the label of a sentence whose words are all known, int32 [L]."""
        ids: list[int] = []
        for word in scored_words(sentence):
            ids += [PHONEME_IDS[phone] for phone in self._phones(word) or ()]
            ids.append(SILENCE_ID)
        return np.array(ids, np.int32)

    def _phones(self, word: str) -> tuple[str, ...] | None:
        if word in self._own:
            return self._own[word]
        found = pronunciations().get(word)
        if found:
            return found[0]
        parts = word.split("-")
        if len(parts) > 1:
            each = [self._phones(part) for part in parts if part]
            if all(each):
                return tuple(phone for phones in each for phone in phones or ())
        return None


def _read_lexicon(path: Path) -> Mapping[str, tuple[str, ...]]:
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        word, *phones = line.split() or [""]
        wrong = [phone for phone in phones if phone not in PHONEME_IDS]
        if word and (wrong or not phones):
            raise DataError(
                f"{path} line {number} is {line!r}; needed WORD and its phonemes (ARPAbet without "
                "stress), such as `hello HH AH L OW`"
            )
        if word:
            found[word.lower()] = tuple(phones)
    return found
