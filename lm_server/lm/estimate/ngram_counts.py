"""Counts of n-grams in a text of word ids, with the adjusted counts of Kneser-Ney smoothing.

Keys are the words from the last to the first, packed into 64-bit numbers, so that n-grams with the
same suffix are adjacent. Source of the adjusted counts: K. Heafield et al., "Scalable Modified
Kneser-Ney Language Model Estimation" (2013), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm_server.lm.estimate.external_sort import external_sort, row_type, starts_of_groups

_TOKENS_PER_CHUNK = 1 << 18
COUNTED = (("adjusted", "<i8"), ("count", "<i8"))
"""Fields of the rows in the files of counts: the adjusted count and the plain one."""


@dataclass(frozen=True)
class Packing:
    """Packing of word ids below `words` into 64-bit numbers."""

    words: int

    @property
    def bits(self) -> int:
        """Bits of a word."""
        return max(self.words - 1, 1).bit_length()

    def columns(self, length: int) -> int:
        """Return how many numbers a key of `length` words needs."""
        per = 64 // self.bits
        return -(-length // per)

    def pack(self, words: Sequence[np.ndarray]) -> np.ndarray:
        """Pack arrays of ids [N], the most significant first, into keys uint64 [N, columns]."""
        per = 64 // self.bits
        key = np.zeros((len(words[0]), self.columns(len(words))), np.uint64)
        for index, word in enumerate(words):
            shift = np.uint64(self.bits * (per - 1 - index % per))
            key[:, index // per] |= word.astype(np.uint64) << shift
        return key

    def unpack(self, key: np.ndarray, length: int) -> list[np.ndarray]:
        """Unpack keys into arrays of ids, uint32 [N], the most significant first."""
        per, mask = 64 // self.bits, np.uint64((1 << self.bits) - 1)
        words = []
        for index in range(length):
            shift = np.uint64(self.bits * (per - 1 - index % per))
            words.append(((key[:, index // per] >> shift) & mask).astype(np.uint32))
        return words


@dataclass(frozen=True)
class Counts:
    """Files of counted n-grams of every order, in the order of their keys.

    Attributes:
      files: per order, a file of rows (key, adjusted, count).
      of_counts: per order, the numbers of n-grams with the adjusted count 0, 1, 2, 3, 4. Above
        order 1 they include n-grams with words outside the vocabulary.
    """

    files: Sequence[Path]
    of_counts: Sequence[Sequence[int]]
    packing: Packing

    def read(self, order: int, rows: int) -> Iterator[np.ndarray]:
        """Yield blocks of at most `rows` rows of one order."""
        dtype = row_type(self.packing.columns(order), *COUNTED)
        yield from read_rows(self.files[order - 1], dtype, rows)


def read_rows(path: Path, dtype: np.dtype, rows: int) -> Iterator[np.ndarray]:
    """Yield blocks of at most `rows` rows of a file."""
    with path.open("rb") as file:
        while len(block := np.fromfile(file, dtype, rows)):
            yield block


def count_ngrams(
    tokens: np.ndarray,
    order: int,
    begin: int,
    words: int,
    memory: int,
    folder: Path,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Counts:
    """Count the n-grams of orders 1 to `order`.

    Args:
      tokens: ids [N] (an array or memory map) of sentences, each `<s>` ... `</s>`. The id 0 stands
        for words outside the vocabulary.
      order: length of the longest n-grams.
      begin: the id of `<s>`.
      words: number of ids.
      memory: bytes that may be used.
      folder: where files are written.
      progress: called with the number of tokens counted since its last call.
    """
    packing = Packing(words)
    chunks = _ngrams(tokens, order, begin, packing, progress)
    blocks = external_sort(chunks, memory, folder, "count", _add_up)
    files = [folder / f"counts.{length}" for length in range(1, order + 1)]
    collect = _Adjust(order, begin, packing, files)
    try:
        for block in blocks:
            collect.add(block)
        collect.finish()
    finally:
        collect.close()
    return Counts(files, collect.of_counts.tolist(), packing)


def _ngrams(
    tokens: np.ndarray,
    order: int,
    begin: int,
    packing: Packing,
    progress: Callable[[int], None],
) -> Iterator[np.ndarray]:
    """Yield every n-gram that ends at a word, with the count 1. `<s>` is padded with `<s>`."""
    dtype = row_type(packing.columns(order), ("count", "<i8"))
    for start in range(0, len(tokens), _TOKENS_PER_CHUNK):
        first = max(start - order + 1, 0)
        part = np.asarray(tokens[first : start + _TOKENS_PER_CHUNK])
        # The text begins with <s>, so the padding before it does not matter.
        padded = np.concatenate([np.full(order - 1, begin, part.dtype), part])
        ends = np.flatnonzero(part[start - first :] != begin) + (start - first) + order - 1
        columns = [padded[ends]]
        for back in range(1, order):
            word = padded[ends - back]
            columns.append(np.where(columns[-1] == begin, begin, word) if back > 1 else word)
        rows = np.zeros(len(ends), dtype)
        rows["key"] = packing.pack(columns)
        rows["count"] = 1
        yield rows
        progress(len(part) - (start - first))


def _add_up(rows: np.ndarray) -> np.ndarray:
    starts = starts_of_groups(rows["key"])
    joined = rows[starts]
    if len(rows):
        joined["count"] = np.add.reduceat(rows["count"], starts)
    return joined


class _Adjust:
    """Writer of all orders' files from sorted n-grams of the highest order.

    The adjusted count of an n-gram is the number of different words before it. For the highest
    order and for n-grams that begin with `<s>` it is the plain count. A group of equal suffixes may
    span blocks, so the last group of each order is held back.
    """

    def __init__(self, order: int, begin: int, packing: Packing, files: Sequence[Path]) -> None:
        self.of_counts = np.zeros((order, 5), np.int64)
        self._order, self._begin, self._packing = order, begin, packing
        self._files = [path.open("wb") for path in files]
        self._last: np.ndarray | None = None
        self._held: list[np.ndarray | None] = [None] * order

    def add(self, block: np.ndarray) -> None:
        """Add the next rows."""
        order, words = self._order, self._packing.unpack(block["key"], self._order)
        matrix = np.stack(words, axis=1)
        before = np.full((1, order), -1, np.int64) if self._last is None else self._last
        differs = matrix != np.concatenate([before, matrix[:-1]])
        # A suffix of n words is new if any of the first n columns differs.
        is_new = np.logical_or.accumulate(differs, axis=1)
        self._last = matrix[-1:].astype(np.int64)
        for length in range(1, order):
            self._add_lower(length, words, is_new, block["count"])
        self._write(order, words, block["count"], block["count"])

    def _add_lower(
        self, length: int, words: list[np.ndarray], is_new: np.ndarray, count: np.ndarray
    ) -> None:
        starts = np.flatnonzero(is_new[:, length - 1])
        opened = np.concatenate([[0], starts]) if not len(starts) or starts[0] else starts
        groups = np.zeros(len(opened), np.dtype([("words", "<u4", (length,)), *COUNTED]))
        groups["words"] = np.stack([word[opened] for word in words[:length]], axis=1)
        groups["adjusted"] = np.add.reduceat(is_new[:, length].astype(np.int64), opened)
        groups["count"] = np.add.reduceat(count, opened)
        held = self._held[length - 1]
        if held is not None:
            if len(opened) != len(starts):  # the block begins inside the held group
                groups["adjusted"][0] += held["adjusted"][0]
                groups["count"][0] += held["count"][0]
            else:
                groups = np.concatenate([held, groups])
        self._held[length - 1] = groups[-1:]
        self._write_groups(length, groups[:-1])

    def finish(self) -> None:
        """Write the held groups."""
        for length in range(1, self._order):
            held = self._held[length - 1]
            if held is not None:
                self._write_groups(length, held)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _write_groups(self, length: int, groups: np.ndarray) -> None:
        words = [groups["words"][:, column] for column in range(length)]
        adjusted = np.where(words[-1] == self._begin, groups["count"], groups["adjusted"])
        self._write(length, words, adjusted, groups["count"])

    def _write(
        self, length: int, words: list[np.ndarray], adjusted: np.ndarray, count: np.ndarray
    ) -> None:
        """Write n-grams, except padding (<s> <s> ...) and single words outside the vocabulary."""
        kept = words[-2] != self._begin if length > 1 else words[0] != 0
        rows = np.zeros(int(kept.sum()), row_type(self._packing.columns(length), *COUNTED))
        rows["key"] = self._packing.pack([word[kept] for word in words])
        rows["adjusted"], rows["count"] = adjusted[kept], count[kept]
        self.of_counts[length - 1] += np.bincount(np.minimum(rows["adjusted"], 5), minlength=6)[:5]
        rows.tofile(self._files[length - 1])
