"""Word errors to expect of each hypothesis, from which minimum Bayes risk chooses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist


def expected_errors(sentences: Sequence[Sequence[str]], shares: ArrayLike) -> list[float]:
    """Return the word errors to expect of each, if each is the truth as often as its share.

    They are rounded to 9 digits: sums in another order differ in their last bits.

    >>> expected_errors([["a", "b"], ["a", "c"]], [0.75, 0.25])
    [0.25, 0.75]
    """
    numbers: dict[str, int] = {}
    texts = ["".join(chr(numbers.setdefault(w, len(numbers))) for w in one) for one in sentences]
    distances = cdist(texts, texts, scorer=Levenshtein.distance, dtype=np.uint16)
    return [round(one, 9) for one in (distances @ np.asarray(shares, np.float64)).tolist()]
