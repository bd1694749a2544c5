"""Writes an n-gram model as a KenLM binary file (format version 5, trie without quantisation).

KenLM's own `build_binary` is in no wheel, while every KenLM reader (the `kenlm` module,
flashlight-text) maps this file into memory at once, shared by all processes that read it. The
layout, all little-endian:

    header   magic, test values, order, type, number of n-grams of each order
    words    number of words, then their 64-bit hashes sorted; a word's id is its rank + 1, and
    <unk> is 0 1-grams  by id: probability, back-off, first child (16 bytes each) 2..n-1
    bit-packed: word, probability (31 bits, sign dropped), back-off (32), first child n
    bit-packed: word, probability (31) strings  the words by id, each ended by a zero byte

An n-gram hangs below its suffix: the path of "a b c" is c, then b, then a. Source: K. Heafield,
"KenLM: Faster and Smaller Language Model Queries" (2011), section 3, and the constants of KenLM's
reader.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

_MAGIC = b"mmap lm http://kheafield.com/code format version 5\n\0\0"
_TRIE = 2
_SEARCH_VERSION = 1
_ROWS_PER_CHUNK = 1 << 15  # A multiple of 8, so that every chunk begins at a whole byte.
UNKNOWN = "<unk>"


@dataclass(frozen=True)
class NGrams:
    """All n-grams of one order.

    `words` [N, order] int32 holds indices into the model's word list, in spoken order. `log10` [N]
    float32 and `backoff` [N] float32 are base-10 logarithms; the highest order has back-offs of 0.
    """

    words: np.ndarray
    log10: np.ndarray
    backoff: np.ndarray


def murmur_hash(key: bytes) -> int:
    """MurmurHash64A with seed 0, the hash by which KenLM knows words."""
    mask, multiplier = (1 << 64) - 1, 0xC6A4A7935BD1E995
    value = (len(key) * multiplier) & mask
    whole = len(key) // 8 * 8
    for (part,) in struct.iter_unpack("<Q", key[:whole]):
        part = (part * multiplier) & mask
        part ^= part >> 47
        value = ((value ^ (part * multiplier & mask)) * multiplier) & mask
    if key[whole:]:
        value = ((value ^ int.from_bytes(key[whole:], "little")) * multiplier) & mask
    value ^= value >> 47
    value = (value * multiplier) & mask
    return value ^ (value >> 47)


class TrieIndex:
    """Finds n-grams by their words, for all orders of a model whose every suffix is in the model
    too.

    Attributes:
      order_of_rows: per order, the permutation that sorts that order's n-grams as the file needs
        them.
      parents: per order from 2, int64 [N] ascending: the sorted row of each n-gram's suffix.
    """

    def __init__(self, orders: Sequence[NGrams], word_ids: np.ndarray) -> None:
        """`word_ids` [words] gives the file's id of each index of the word list."""
        self._count = int(word_ids.max()) + 1 if len(word_ids) else 1
        self._word_ids = word_ids.astype(np.int64)
        self._keys: list[np.ndarray] = []
        self.order_of_rows = [np.argsort(self._word_ids[orders[0].words[:, 0]], kind="stable")]
        self.parents: list[np.ndarray] = []
        for grams in orders[1:]:
            keys = self.find(grams.words[:, 1:]) * self._count + self._word_ids[grams.words[:, 0]]
            rows = np.argsort(keys, kind="stable")
            self.order_of_rows.append(rows)
            self._keys.append(keys[rows])
            self.parents.append(keys[rows] // self._count)

    def find(self, words: np.ndarray) -> np.ndarray:
        """Word indices [N, k] -> int64 [N]: the sorted row of each k-gram.

        Raises:
          ValueError: one of them is not in the model.
        """
        rows = self._word_ids[words[:, -1]]
        for level in range(words.shape[1] - 1):
            keys = rows * self._count + self._word_ids[words[:, -2 - level]]
            known = self._keys[level]
            rows = np.searchsorted(known, keys)
            missing = (
                np.ones(len(keys), bool)
                if not len(known)
                else known[np.minimum(rows, len(known) - 1)] != keys
            )
            if missing.any():
                raise ValueError(
                    f"{int(missing.sum())} n-grams of order {words.shape[1]} stand in longer "
                    "n-grams but not in the model; needed a model with every part of its n-grams: "
                    "build it without pruning"
                )
        return rows


def write_trie(
    path: Path,
    words: Sequence[str],
    orders: Sequence[NGrams],
    progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Writes the model to `path`; `words[0]` must be `<unk>`, and the model must hold `<s>` and
    `</s>`.

    Args:
      path: file to write (in one go: a temporary file beside it is renamed at the end).
      words: the vocabulary that `orders` count by, each word with its 1-gram.
      orders: n-grams of order 1, 2, ...; a model of order 1 is written with an empty order 2, which
        KenLM needs.
      progress: called with numbers of n-grams as they are written.

    Raises:
      ValueError: the words are not unique or `<unk>` is not the first, or an n-gram's suffix or
        context is missing.
    """
    if not words or words[0] != UNKNOWN or len(set(words)) != len(words):
        raise ValueError("needed unique words that begin with <unk>")
    if len(orders[0].words) != len(words):
        raise ValueError(f"{len(words)} words have {len(orders[0].words)} 1-grams; needed one each")
    if len(orders) == 1:
        nothing = np.zeros(0, np.float32)
        orders = [orders[0], NGrams(np.zeros((0, 2), np.int32), nothing, nothing)]
    hashes = np.array([murmur_hash(word.encode()) for word in words[1:]], np.uint64)
    by_hash = np.argsort(hashes, kind="stable")
    word_ids = np.zeros(len(words), np.int64)
    word_ids[1 + by_hash] = np.arange(1, len(words))
    index = TrieIndex(orders, word_ids)
    counts = [len(grams.words) for grams in orders]

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(_header(counts))
            file.write(struct.pack("<Q", len(hashes)))
            file.write(hashes[by_hash].astype("<u8").tobytes() + bytes(8))
            for level, grams in enumerate(orders):
                rows = index.order_of_rows[level]
                backoff = _mark_contexts(orders, level, index)[rows]
                if level + 1 < len(orders):
                    ends = np.arange(counts[level] + 1)
                    children = np.searchsorted(index.parents[level], ends, side="left").astype(
                        np.uint64
                    )
                log10 = np.minimum(grams.log10[rows], 0.0).astype("<f4")
                if level == 0:
                    record = np.zeros(counts[0] + 2, dtype="<f4, <f4, <u8")
                    record["f0"][:-2], record["f1"][:-2], record["f2"][:-1] = (
                        log10,
                        backoff,
                        children,
                    )
                    file.write(record.tobytes())
                    progress(counts[0])
                    continue
                word = word_ids[grams.words[rows, 0]].astype(np.uint64)
                bits_of_word = counts[0].bit_length()
                fields = [(word, bits_of_word), (log10.view("<u4") & 0x7FFFFFFF, 31)]
                if level + 1 < len(orders):
                    fields += [
                        (backoff.view("<u4"), 32),
                        (children, counts[level + 1].bit_length()),
                    ]
                _write_packed(file, fields, counts[level], progress)
            strings = [UNKNOWN, *(words[1 + int(row)] for row in by_hash)]
            file.write("\0".join(strings).encode() + b"\0")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(counts: Sequence[int]) -> bytes:
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 8)

    sanity = padded(_MAGIC) + struct.pack("<fffIIIQ", 0.0, 1.0, -0.5, 1, 0xFFFFFFFF, 0, 1)
    fixed = struct.pack("<B3xfI?3xI", len(counts), 1.5, _TRIE, True, _SEARCH_VERSION)
    return padded(sanity + fixed + struct.pack(f"<{len(counts)}Q", *counts))


def _mark_contexts(orders: Sequence[NGrams], level: int, index: TrieIndex) -> np.ndarray:
    """Back-offs of one order, a zero being +0 where a longer n-gram begins with this one, and -0
    elsewhere.

    KenLM keeps an n-gram in the state after it only if its back-off is not -0.
    """
    backoff = orders[level].backoff.astype("<f4")
    backoff[backoff == 0] = np.float32(-0.0)
    if level + 1 < len(orders) and len(orders[level + 1].words):
        is_context = np.zeros(len(backoff), bool)
        is_context[index.order_of_rows[level][index.find(orders[level + 1].words[:, :-1])]] = True
        backoff[is_context & (backoff == 0)] = np.float32(0.0)
    return backoff


def _write_packed(
    file: BinaryIO,
    fields: list[tuple[np.ndarray, int]],
    count: int,
    progress: Callable[[int], None],
) -> None:
    """Writes `count` entries, lowest bit first, and one that only ends the last child range."""
    total_bits = sum(bits for _, bits in fields)
    size = ((1 + count) * total_bits + 7) // 8 + 8
    written = 0
    for start in range(0, count + 1, _ROWS_PER_CHUNK):
        rows = min(_ROWS_PER_CHUNK, count + 1 - start)
        bits = np.zeros((rows, total_bits), np.uint8)
        column = 0
        for values, width in fields:
            part = values[start : start + rows].astype(np.uint64)
            shifted = part[:, None] >> np.arange(width, dtype=np.uint64)
            bits[: len(part), column : column + width] = (shifted & np.uint64(1)).astype(np.uint8)
            column += width
        written += file.write(np.packbits(bits.ravel(), bitorder="little").tobytes())
        progress(rows)
    file.write(bytes(size - written))
