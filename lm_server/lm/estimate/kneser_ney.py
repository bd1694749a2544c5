"""Interpolated modified Kneser-Ney smoothing with pruning, in bounded memory.

Sources: S. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling"
(1998), equations 26 and on. K. Heafield et al., "Scalable Modified Kneser-Ney Language Model
Estimation" (2013). As there, the whole count of a pruned n-gram goes to the back-off mass, and
unseen words share the mass that the unigrams leave. An n-gram with a word outside the vocabulary is
treated as pruned, so that the result is a distribution over known words.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm_server.errors import UserError
from lm_server.lm.estimate.external_sort import external_sort, regroup, row_type, starts_of_groups
from lm_server.lm.estimate.ngram_counts import Counts, Packing, count_ngrams, read_rows
from lm_server.lm.sorted_ngrams import BEGIN, SortedModel, SortedOrder

FALLBACK = (0.0, 0.5, 1.0, 1.5)
"""Discounts of n-grams counted 0, 1, 2 and more times, used if the text is too small or too regular
to estimate them (as lmplz --discount_fallback)."""
_ROWS = 1 << 16
_SMALLEST_MEMORY = 1 << 20
_NOTHING = -99.0

Advance = Callable[[str, int, int], None]
"""Called with the name of a stage, the amount done since the last call, and the total."""


class EstimationError(UserError, ValueError):
    """An n-gram model that cannot be estimated."""


@dataclass(frozen=True)
class Estimate:
    """A model with its discounts and statistics."""

    model: SortedModel
    discounts: Sequence[Sequence[float]]
    """Per order, for n-grams counted 0, 1, 2 and more times."""
    fallbacks: Sequence[int]
    """Orders whose discounts could not be estimated from this text."""
    followed: Sequence[np.ndarray]
    """Per order but the highest, int64 [N]: how often a word follows each n-gram in the text."""


def estimate(
    tokens: np.ndarray,
    words: Sequence[str],
    order: int,
    memory: int,
    folder: Path,
    prune: Sequence[int] = (),
    vocabulary: int | None = None,
    advance: Advance = lambda stage, done, total: None,
) -> Estimate:
    """Estimate a model of orders 1 to `order`.

    Args:
      tokens: ids [N] (an array or memory map) of sentences, each `<s>` ... `</s>`. The id 0 stands
        for words outside the vocabulary.
      words: the vocabulary by id, see `in_order_of_ids`, with `<unk>`, `<s>` and `</s>`.
      order: length of the longest n-grams.
      memory: bytes that the sorts may use.
      folder: where files are kept. The model's arrays are memory maps of some of them.
      prune: count cut-offs per order. N-grams seen no more often are left out. The first must be 0,
        none may be less than the one before, and the last applies to higher orders.
      vocabulary: number of words that share the unigrams' back-off mass, by default `words` without
        `<s>`. `<unk>` gets one share.
      advance: shows progress.

    Raises:
      EstimationError: `prune` is not valid, or there is no text.
    """
    thresholds = check_prune(prune, order)
    if not len(tokens):
        raise EstimationError("the text has no sentence to count words in")
    memory = max(memory, _SMALLEST_MEMORY)
    begin = list(words).index(BEGIN)
    counts = count_ngrams(
        tokens,
        order,
        begin,
        len(words),
        memory,
        folder,
        lambda done: advance("counting n-grams", done, len(tokens)),
    )
    found = [discounts_of(row) for row in counts.of_counts]
    discounts = [FALLBACK if one is None else one for one in found]
    packing = counts.packing
    total = sum(path.stat().st_size for path in counts.files)
    lower = _unigrams(counts, discounts[0], begin, vocabulary or len(words) - 1, folder)
    orders = [lower]
    for length in range(2, order + 1):
        shares = _Shares(folder, length, packing)
        rows = _shares_of_contexts(
            counts, length, discounts[length - 1], thresholds[length - 1], shares, memory, folder
        )
        lower = _interpolate(external_sort(rows, memory, folder, "share"), lower, length, packing)
        shares.close()
        orders[-1] = _with_backoffs(orders[-1], shares)
        orders.append(lower)
        done = counts.files[length - 1].stat().st_size
        counts.files[length - 1].unlink()
        advance("estimating probabilities", done, total - counts.files[0].stat().st_size)
    for done_order in orders:
        done_order.key_path.unlink()
    model = SortedModel(words, [one.arrays() for one in orders])
    fallbacks = [number for number, one in enumerate(found, 1) if one is None]
    return Estimate(model, discounts, fallbacks, [one.followed() for one in orders[:-1]])


def check_prune(prune: Sequence[int], order: int) -> list[int]:
    """Return the cut-off of every order.

    Raises:
      EstimationError: the first is not 0, one is less than the one before, or there are too many.
    """
    given = list(prune) or [0]
    if given[0] != 0 or len(given) > order or given != sorted(given):
        raise EstimationError(
            f"the cut-offs are {' '.join(map(str, given))} for a model of order {order}; needed at "
            "most one per order, the first 0 and none less than the one before: for example 0 0 1"
        )
    return given + given[-1:] * (order - len(given))


def discounts_of(of_counts: Sequence[int]) -> tuple[float, ...] | None:
    """Compute the discounts of n-grams counted 0, 1, 2 and more times.

    `of_counts` are the numbers of n-grams with the counts 0 to 4. Return None if the text is too
    small or too regular.
    """
    n = [float(count) for count in of_counts]
    if not all(n[1:4]):
        return None
    y = n[1] / (n[1] + 2 * n[2])
    discounts = tuple(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))
    if any(not 0 <= one <= k for k, one in enumerate(discounts, 1)):
        return None
    return (0.0, *discounts)


@dataclass
class _Order:
    """Files of one finished order: keys, words, parents, probabilities, back-offs."""

    key_path: Path
    key_type: np.dtype
    count: int
    columns: dict[str, Path]

    def keys(self) -> np.ndarray:
        """Return rows (key, p): n-grams with their probabilities."""
        if not self.count:
            return np.zeros(0, self.key_type)
        return np.memmap(self.key_path, self.key_type, "r")

    def arrays(self) -> SortedOrder:
        types = {"word": "<u4", "parent": "<i8", "log10": "<f4", "backoff": "<f4"}
        found = {
            name: np.memmap(self.columns[name], kind, "r+") if self.count else np.zeros(0, kind)
            for name, kind in types.items()
        }
        return SortedOrder(**found)

    def followed(self) -> np.ndarray:
        """Return how often a word follows each n-gram."""
        path = self.columns["followed"]
        return np.memmap(path, "<i8", "r") if self.count else np.zeros(0, "<i8")


class _Writer:
    """Writer of one order's files."""

    def __init__(self, folder: Path, length: int, packing: Packing) -> None:
        key_path = folder / f"order{length}.key"
        names = ("word", "parent", "log10", "backoff", "followed")
        columns = {name: folder / f"order{length}.{name}" for name in names}
        self.order = _Order(key_path, row_type(packing.columns(length), ("p", "<f8")), 0, columns)
        self._files = {path: path.open("wb") for path in (key_path, *columns.values())}

    def write(self, key: np.ndarray, word: np.ndarray, parent: np.ndarray, p: np.ndarray) -> None:
        rows = np.zeros(len(key), self.order.key_type)
        rows["key"], rows["p"] = key, p
        rows.tofile(self._files[self.order.key_path])
        with np.errstate(divide="ignore"):
            log10 = np.maximum(np.log10(p), _NOTHING)
        values = {
            "word": word.astype("<u4"),
            "parent": parent.astype("<i8"),
            "log10": log10.astype("<f4"),
            "backoff": np.full(len(key), -0.0, "<f4"),
            "followed": np.zeros(len(key), "<i8"),
        }
        for name, value in values.items():
            value.tofile(self._files[self.order.columns[name]])
        self.order.count += len(key)

    def close(self) -> _Order:
        for file in self._files.values():
            file.close()
        return self.order


def _unigrams(
    counts: Counts, discount: Sequence[float], begin: int, vocabulary: int, folder: Path
) -> _Order:
    """Estimate order 1: every word of the vocabulary, `<unk>` with the share of one unseen word."""
    packing = counts.packing
    adjusted = np.zeros(packing.words, np.int64)
    for block in counts.read(1, _ROWS):
        adjusted[packing.unpack(block["key"], 1)[0]] = block["adjusted"]
    discount_of = np.asarray(discount)[np.minimum(adjusted, 3)]
    total = adjusted.sum()
    gamma = discount_of[adjusted > 0].sum() / total
    p = (adjusted - discount_of) / total + gamma / vocabulary
    p[begin] = 0.0
    writer = _Writer(folder, 1, packing)
    ids = np.arange(packing.words)
    writer.write(packing.pack([ids]), ids, np.zeros(len(ids)), p)
    return writer.close()


class _Shares:
    """File of back-off weights of contexts, in the order of the contexts' keys."""

    def __init__(self, folder: Path, length: int, packing: Packing) -> None:
        self.path = folder / f"backoff{length}"
        self.dtype = row_type(
            packing.columns(length - 1), ("gamma", "<f8"), ("extended", "?"), ("count", "<i8")
        )
        self._file = self.path.open("wb")

    def write(
        self, key: np.ndarray, gamma: np.ndarray, extended: np.ndarray, count: np.ndarray
    ) -> None:
        rows = np.zeros(len(key), self.dtype)
        rows["key"], rows["gamma"], rows["extended"], rows["count"] = key, gamma, extended, count
        rows.tofile(self._file)

    def close(self) -> None:
        self._file.close()


def _shares_of_contexts(
    counts: Counts,
    length: int,
    discount: Sequence[float],
    threshold: int,
    shares: _Shares,
    memory: int,
    folder: Path,
) -> Iterator[np.ndarray]:
    """Yield rows (key, share, gamma) of the n-grams that are kept, sorted by context.

    The share is the discounted count over the context's total.
    """
    packing = counts.packing
    columns = packing.columns(length)
    by_context = row_type(columns, ("adjusted", "<i8"), ("count", "<i8"), ("kept", "?"))

    def in_context_order() -> Iterator[np.ndarray]:
        for block in counts.read(length, _ROWS):
            words = packing.unpack(block["key"], length)
            known = np.logical_and.reduce([word != 0 for word in words[1:]])
            rows = np.zeros(int(known.sum()), by_context)
            # w3 w2 w1 -> w2 w1 w3 groups the contexts, in the order of their own keys.
            rows["key"] = packing.pack([word[known] for word in [*words[1:], words[0]]])
            rows["adjusted"], rows["count"] = block["adjusted"][known], block["count"][known]
            rows["kept"] = (block["count"][known] > threshold) & (words[0][known] != 0)
            yield rows

    def contexts(rows: np.ndarray) -> np.ndarray:
        return packing.pack(packing.unpack(rows["key"], length)[:-1])

    result = row_type(columns, ("share", "<f8"), ("gamma", "<f8"))
    table = np.asarray(discount)
    blocks = external_sort(in_context_order(), memory, folder, "context")
    for block in regroup(blocks, contexts):
        context = contexts(block)
        starts = starts_of_groups(context)
        taken = np.where(block["kept"], table[np.minimum(block["adjusted"], 3)], block["adjusted"])
        total = np.add.reduceat(block["adjusted"], starts).astype(np.float64)
        gamma = np.add.reduceat(taken, starts) / total
        extended = np.logical_or.reduceat(block["kept"], starts)
        followed = np.add.reduceat(block["count"], starts)
        shares.write(context[starts], gamma, extended, followed)
        group = np.repeat(np.arange(len(starts)), np.diff([*starts, len(block)]))
        kept = np.flatnonzero(block["kept"])
        words = packing.unpack(block["key"][kept], length)
        rows = np.zeros(len(kept), result)
        rows["key"] = packing.pack([words[-1], *words[:-1]])
        rows["share"] = (block["adjusted"][kept] - taken[kept]) / total[group[kept]]
        rows["gamma"] = gamma[group[kept]]
        yield rows


def _interpolate(
    blocks: Iterable[np.ndarray], lower: _Order, length: int, packing: Packing
) -> _Order:
    """Write an order from ordered rows (key, share, gamma): p = share + gamma * p of the suffix."""
    writer = _Writer(lower.key_path.parent, length, packing)
    below = lower.keys()
    for block in blocks:
        words = packing.unpack(block["key"], length)
        suffixes = packing.pack(words[:-1])
        starts = starts_of_groups(suffixes)
        found = locate(below["key"], suffixes[starts])
        if (found < 0).any():
            raise AssertionError("an n-gram is kept whose suffix is not")
        parent = np.repeat(found, np.diff([*starts, len(block)]))
        p = block["share"] + block["gamma"] * below["p"][parent]
        writer.write(block["key"], words[-1], parent, p)
    return writer.close()


def _with_backoffs(order: _Order, shares: _Shares) -> _Order:
    """Write the back-off weights of the contexts into their order's file."""
    if order.count:
        key = order.keys()["key"]
        backoff = np.memmap(order.columns["backoff"], "<f4", "r+")
        followed = np.memmap(order.columns["followed"], "<i8", "r+")
        for block in read_rows(shares.path, shares.dtype, _ROWS):
            rows = locate(key, block["key"])
            there = rows >= 0
            log10 = np.log10(block["gamma"][there]).astype("<f4")
            log10[log10 == 0] = np.where(block["extended"][there][log10 == 0], 0.0, -0.0)
            backoff[rows[there]] = log10
            followed[rows[there]] = block["count"][there]
        backoff.flush()
        followed.flush()
    shares.path.unlink()
    return order


def locate(key: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Find the sorted `wanted` [M, columns] in the sorted `key` [N, columns]: rows, or -1."""
    if not len(wanted) or not len(key):
        return np.full(len(wanted), -1, np.int64)
    # Load only the part of the file that the block can match.
    low = _rank(key, wanted[0])
    high = min(_rank(key, wanted[-1]) + 1, len(key))
    part, sought = _comparable(key[low:high]), _comparable(wanted)
    if not len(part):
        return np.full(len(wanted), -1, np.int64)
    rows = np.minimum(np.searchsorted(part, sought), len(part) - 1)
    return np.where(part[rows] == sought, rows + low, -1)


def _rank(key: np.ndarray, one: np.ndarray) -> int:
    """Return how many of the ordered keys are less than `one`, reading few of them from disk."""
    wanted = tuple(one.tolist())
    return bisect.bisect_left(range(len(key)), wanted, key=lambda row: tuple(key[row].tolist()))


def _comparable(key: np.ndarray) -> np.ndarray:
    """Convert each key to one value with the same order: the number, or its big-endian bytes."""
    if key.shape[1] == 1:
        return np.ascontiguousarray(key[:, 0])
    return np.ascontiguousarray(key.astype(">u8")).view(f"S{8 * key.shape[1]}")[:, 0]
