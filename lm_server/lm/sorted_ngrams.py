"""N-grams in the order of KenLM's tries: each below its suffix, so "a b c" is found by c, b, a.

A word's id is its rank by KenLM's hash. The n-grams of one order are sorted by their words from the
last to the first. Arrays may be memory maps: this module and `kenlm_binary` read them sequentially.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lm_server.lexicon.text import UNKNOWN

BEGIN, END = "<s>", "</s>"
LEAST = 1e-12
"""Least probability of all unseen words after a history. Rounding could make it negative."""


@dataclass(frozen=True)
class SortedOrder:
    """All n-grams of one order, sorted.

    Attributes:
      word: uint32 [N], the id of the first word of each.
      parent: int64 [N] ascending, the row of its suffix in the order below. Zeros for order 1.
      log10: float32 [N], base-10 logarithm of the probability.
      backoff: float32 [N], base-10 logarithm of the back-off weight. A zero is +0 if a longer
        n-gram begins with this one and -0 otherwise. KenLM drops the latter from its states.
    """

    word: np.ndarray
    parent: np.ndarray
    log10: np.ndarray
    backoff: np.ndarray

    def __len__(self) -> int:
        return len(self.word)

    def select(self, rows: np.ndarray) -> SortedOrder:
        """Return the n-grams at `rows` (ascending indices). Parents are not renumbered."""
        return SortedOrder(self.word[rows], self.parent[rows], self.log10[rows], self.backoff[rows])


@dataclass(frozen=True)
class SortedModel:
    """A back-off model of orders 1, 2, ...

    `words[i]` is the word with the id i, and `<unk>` has the id 0. The rows of order 1 are the
    words.
    """

    words: Sequence[str]
    orders: Sequence[SortedOrder]

    @property
    def counts(self) -> list[int]:
        """Number of n-grams per order."""
        return [len(order) for order in self.orders]


def murmur_hash(key: bytes) -> int:
    """Return MurmurHash64A with seed 0, KenLM's hash of words."""
    mask, multiplier = (1 << 64) - 1, 0xC6A4A7935BD1E995
    value = (len(key) * multiplier) & mask
    whole = len(key) // 8 * 8
    for start in range(0, whole, 8):
        part = (int.from_bytes(key[start : start + 8], "little") * multiplier) & mask
        part ^= part >> 47
        value = ((value ^ (part * multiplier & mask)) * multiplier) & mask
    if key[whole:]:
        value = ((value ^ int.from_bytes(key[whole:], "little")) * multiplier) & mask
    value ^= value >> 47
    value = (value * multiplier) & mask
    return value ^ (value >> 47)


def hashes_of(words: Sequence[str]) -> np.ndarray:
    """Return KenLM's hashes of words, uint64 [N]."""
    return np.array([murmur_hash(word.encode()) for word in words], np.uint64)


def in_order_of_ids(words: Sequence[str]) -> list[str]:
    """Sort unique words by id: `<unk>` first, then the others by their hashes."""
    others = [word for word in words if word != UNKNOWN]
    return [UNKNOWN, *(others[row] for row in np.argsort(hashes_of(others), kind="stable"))]


def contexts_of(model: SortedModel, level: int, below: np.ndarray | None) -> np.ndarray:
    """Find the contexts (all words but the last) of the n-grams of order `level`.

    Args:
      model: a model with the suffix and the context of every n-gram.
      level: 2 or more.
      below: the result for order `level` - 1, None at level 2.

    Returns:
      Rows in order `level` - 1, int64 [N]. -1 if a context is not in the model.
    """
    order = model.orders[level - 1]
    if below is None:
        return np.asarray(order.word, np.int64)
    count = len(model.words)
    lower = model.orders[level - 2]
    keys = lower.parent * count + lower.word
    # "a b c" is a child of "b c". Its context "a b" is a child of the context of "b c", "b".
    wanted = below[order.parent] * count + order.word
    return find_rows(keys, np.where(below[order.parent] < 0, -1, wanted))


def find_rows(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the rows of `wanted` in the ascending `keys`, -1 if absent."""
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    rows = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[rows] == wanted, rows, -1)


def normalising_backoffs(
    longer: SortedOrder, lower: SortedOrder, context: np.ndarray
) -> np.ndarray:
    """Return the back-off weights of one order with which every history's probabilities sum to 1.

    Args:
      longer: n-grams of the order above.
      lower: the n-grams whose back-offs are wanted.
      context: the rows in `lower` of the contexts of `longer`.

    Returns:
      float32 [N], zeros signed as `SortedOrder` defines them.
    """
    size = len(lower)
    p = np.bincount(context, 10.0 ** longer.log10.astype(np.float64), size)
    below = np.bincount(context, 10.0 ** lower.log10[longer.parent].astype(np.float64), size)
    weight = np.log10(np.maximum(1.0 - p, LEAST)) - np.log10(np.maximum(1.0 - below, LEAST))
    backoff: np.ndarray = weight.astype(np.float32)
    has_longer = np.bincount(context, minlength=size) > 0
    zero = backoff == 0
    backoff[zero] = np.where(has_longer[zero], np.float32(0.0), np.float32(-0.0))
    return backoff


def mark_contexts(model: SortedModel) -> SortedModel:
    """Set the signs of zero back-offs as `SortedOrder` defines them.

    Raises:
      ValueError: an n-gram's context is not in the model.
    """
    orders = list(model.orders)
    contexts: np.ndarray | None = None
    for level in range(2, len(orders) + 2):
        order = orders[level - 2]
        is_context = np.zeros(len(order), bool)
        if level <= len(orders):
            contexts = contexts_of(model, level, contexts)
            if (contexts < 0).any():
                raise ValueError(
                    f"{int((contexts < 0).sum())} n-grams of order {level - 1} are parts of "
                    "longer n-grams but not in the model; needed a model with every part of its "
                    "n-grams"
                )
            is_context[contexts] = True
        backoff = np.array(order.backoff, np.float32)
        zero = backoff == 0
        backoff[zero] = np.where(is_context[zero], np.float32(0.0), np.float32(-0.0))
        orders[level - 2] = SortedOrder(order.word, order.parent, order.log10, backoff)
    return SortedModel(model.words, orders)
