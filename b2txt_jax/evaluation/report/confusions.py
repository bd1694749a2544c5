"""Which phonemes are taken for which, and which are missed or invented."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from b2txt_jax.metrics import differences
from b2txt_jax.phonemes import BLANK_ID
from lm_server.protocol import CLASS_COUNT


@dataclass(frozen=True)
class Confusions:
    """Counts of a best alignment of true and decoded phonemes.

    `counts[true, decoded]` is int64 [41, 41]. The blank is in no label and in no decoding, so its
    column counts phonemes that were missed (deletions), and its row those that were invented
    (insertions).
    """

    counts: np.ndarray

    @property
    def deletions(self) -> np.ndarray:
        """How often each true phoneme was missed, int64 [41]."""
        return self.counts[:, BLANK_ID]

    @property
    def insertions(self) -> np.ndarray:
        """How often each phoneme was invented, int64 [41]."""
        return self.counts[BLANK_ID]

    @property
    def substitutions(self) -> np.ndarray:
        """How often each true phoneme was taken for another, int64 [41]."""
        wrong = self.counts.sum(1) - self.counts.diagonal() - self.deletions
        wrong[BLANK_ID] = 0
        return wrong

    @property
    def lengths(self) -> np.ndarray:
        """How often each phoneme was said, int64 [41]."""
        said = self.counts.sum(1)
        said[BLANK_ID] = 0
        return said

    def most_frequent(self, count: int) -> list[tuple[int, int, int]]:
        """Return (true, decoded, how often) of the most frequent errors. The blank is nothing."""
        wrong = self.counts - np.diag(self.counts.diagonal())
        order = np.argsort(-wrong, axis=None, kind="stable")[:count]
        found = zip(*np.unravel_index(order, wrong.shape), strict=True)
        return [(int(t), int(d), int(wrong[t, d])) for t, d in found if wrong[t, d]]


def confusions(labels: Sequence[np.ndarray], decoded: Sequence[np.ndarray]) -> Confusions:
    """Count over trials of class ids without blanks.

    >>> confusions([np.array([5, 6])], [np.array([5, 7, 8])]).most_frequent(2)
    [(0, 8, 1), (6, 7, 1)]
    """
    counts = np.zeros((CLASS_COUNT, CLASS_COUNT), np.int64)
    for truth, found in zip(labels, decoded, strict=True):
        for stretch in differences(truth.tolist(), found.tolist()):
            pairs = itertools.zip_longest(stretch.reference, stretch.decoded, fillvalue=BLANK_ID)
            for pair in pairs:
                counts[pair] += 1
    return Confusions(counts)
