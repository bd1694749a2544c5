"""The record of live sessions, as `b2txt stream` writes it, read as data to train on.

DIR/sentences.jsonl has one JSON object per line, `"event": "final"` or `"chosen"`, which share an
`id`. DIR/features/ID.npz has `raw` (as it arrived, NaN where something was missing) and `features`
(normalised, what the model decoded), float32 [T, D].

A sentence that the user confirmed or corrected is a trial. Its session is the recording day with
whose input layer it was decoded. Every fifth one of a session is for validation.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from b2txt_jax.data.description import DataError, DataWarning
from b2txt_jax.data.trial import Reader, Trial, TrialRef
from b2txt_jax.errors import DAMAGED_ARRAYS, UserError
from b2txt_jax.phonemes import sentence_to_ids
from lm_server.lexicon.text_rules import normalise

SENTENCES, FEATURES = "sentences.jsonl", "features"
VALIDATED = 5
"""Of so many sentences of a session one is for validation."""


class SentenceLogError(UserError, ValueError):
    """A log that cannot be read."""


@dataclass(frozen=True)
class Confirmed:
    """A sentence whose text the user has confirmed or corrected."""

    id: str
    day: str
    text: str
    features: Path
    """The .npz file."""
    bins: int


def confirmed_sentences(folder: Path) -> Iterator[Confirmed]:
    """Yield what the user confirmed or corrected, with the last text of each, in its order.

    Raises:
      SentenceLogError: a line cannot be read. One that a crash cut short at the end is left out.
    """
    finals: dict[str, tuple[str, int]] = {}
    texts: dict[str, str] = {}
    path = folder / SENTENCES
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            if entry["event"] == "final":
                finals[entry["id"]] = entry["day"], int(entry["bins"])
            else:
                texts[entry["id"]] = entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise SentenceLogError(
                f"{path} line {number} is no entry of the log ({error!r}); needed the lines that "
                "`b2txt stream` wrote: remove this one"
            ) from error
    for id_, (day, bins) in finals.items():
        if id_ in texts:
            yield Confirmed(id_, day, texts[id_], folder / FEATURES / f"{id_}.npz", bins)


class SentenceLogReader(Reader):
    """Reads the confirmed sentences of a log."""

    suffix: ClassVar[str] = ".npz"

    @classmethod
    def holds(cls, root: Path) -> bool:
        """Return whether `b2txt stream` wrote `root`."""
        return (root / SENTENCES).is_file()

    @classmethod
    def features(cls, root: Path) -> int:
        """Return the features of the first sentence."""
        for one in confirmed_sentences(root):
            return _raw(one.features).shape[-1]
        raise _none_confirmed(root)

    @functools.cached_property
    def _labelled(self) -> dict[tuple[str, str], tuple[TrialRef, np.ndarray, str]]:
        """Return (session, id) -> trial, labels and text of each sentence that has a label."""
        found: dict[tuple[str, str], tuple[TrialRef, np.ndarray, str]] = {}
        left_out = []
        for one in confirmed_sentences(self.root):
            words = normalise(one.text).split()
            try:
                labels = sentence_to_ids(words)
            except ValueError:
                labels = np.zeros(0, np.int32)
            if not len(labels):
                left_out.append(repr(one.text))
                continue
            place = sum(day == one.day for day, _ in found)
            ref = TrialRef(one.day, one.id, one.features, one.bins, len(labels), 0, place)
            found[one.day, one.id] = ref, labels, " ".join(words)
        if left_out:
            warnings.warn(
                f"{len(left_out)} confirmed sentences of {self.root} have no words or words that "
                f"are not in the CMU dictionary, and are left out: {', '.join(left_out[:3])}",
                DataWarning,
                stacklevel=2,
            )
        return found

    @property
    def sessions(self) -> tuple[str, ...]:
        """Recording days of the confirmed sentences, sorted."""
        days = tuple(sorted({day for day, _ in self._labelled}))
        if not days:
            raise _none_confirmed(self.root)
        return days

    def _list(self, session: str, split: str, labels_needed: bool) -> list[TrialRef] | None:
        refs = [ref for (day, _), (ref, _, _) in self._labelled.items() if day == session]
        if not refs or split == "test":
            return [] if refs else None
        return [ref for ref in refs if (ref.trial % VALIDATED == VALIDATED - 1) == (split == "val")]

    def read_into(self, ref: TrialRef, out: np.ndarray) -> Trial:
        """Read a sentence's raw features. A missing value is the mean of its channel's others."""
        _, labels, text = self._labelled[ref.session, ref.key]
        raw = _raw(ref.path)
        if raw.ndim != 2 or raw.shape[1] != self.feature_count or len(raw) > len(out):
            raise DataError(
                f"{ref.path} holds {list(raw.shape)} features; needed [at most {len(out)}, "
                f"{self.feature_count}]: they were recorded with another model's features"
            )
        missing = np.isnan(raw)
        if missing.any():
            count = np.maximum((~missing).sum(axis=0), 1)
            raw = np.where(missing, np.nansum(raw, axis=0) / count, raw)
        rows = out[: len(raw)]
        rows[...] = raw
        return Trial(ref, rows, labels, text)


def _raw(path: Path) -> np.ndarray:
    """Return a sentence's features as they arrived, float32 [T, D]."""
    try:
        with np.load(path) as file:
            return np.asarray(file["raw"], np.float32)
    except DAMAGED_ARRAYS as error:
        raise DataError(
            f"{path} cannot be read ({error}); needed the features of a sentence of the "
            f"log: restore the file, or remove the sentence from {SENTENCES}"
        ) from error


def _none_confirmed(root: Path) -> DataError:
    return DataError(
        f"{root} holds no confirmed sentence; needed some that the user confirmed or corrected in "
        "`b2txt stream --view`"
    )
