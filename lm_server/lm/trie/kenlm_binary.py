"""Writes and reads KenLM binary files (format version 5, all four kinds of trie).

No wheel contains KenLM's own `build_binary`. KenLM's readers (the `kenlm` module, flashlight-text)
memory-map the file, so all processes that read it share its memory. The layout, little-endian:

    header     magic, test values, order, kind, number of n-grams of each order
    words      number of words, then their 64-bit hashes sorted. A word's id is its rank + 1, and
               <unk> is 0
    tables     bins of the quantised kinds (`quantise`)
    1-grams    by id: probability, back-off, first child (16 bytes each)
    2..n-1     bit-packed: word, probability (31 bits, sign dropped), back-off (32), first child.
               Quantised: word, bin of the back-off, bin of the probability, first child
    n          bit-packed: word, probability (31) or its bin
    strings    the words by id, each ended by a zero byte

The compressed kinds move the high bits of the first children into an array before their order,
which has the row at which each value of these bits begins (Bhiksha Raj and Whittaker, 2003).

An n-gram is a child of its suffix: the path of "a b c" is c, then b, then a. Source: K. Heafield,
"KenLM: Faster and Smaller Language Model Queries" (2011), section 3, and KenLM's reader.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lm_server.files.atomic_file import replacing
from lm_server.lm.sorted_ngrams import UNKNOWN, SortedModel, SortedOrder, hashes_of
from lm_server.lm.trie.quantise import MAX_BITS, Tables, train

_MAGIC = b"mmap lm http://kheafield.com/code format version 5\n\0\0"
_TRIE, _QUANTISED, _COMPRESSED = 2, 1, 2
_TRIES = range(_TRIE, _TRIE + 4)
_SEARCH_VERSION = 1
_QUANTISATION_VERSION = 2
_ARRAY_VERSION, _ARRAY_BITS = 0, 255
_ROWS_PER_CHUNK = 1 << 16  # a multiple of 8, so that every chunk begins at a whole byte
_GROUP = 64
"""Rows that are packed together: 64 rows of n bits fill n whole 64-bit words."""


@dataclass(frozen=True)
class TrieForm:
    """The kind of KenLM trie.

    Attributes:
      bits: bits of each probability and each back-off weight of order 2 and up. None keeps them
        unquantised (31 and 32 bits).
      compressed: whether pointers are compressed (lossless, a little slower).
    """

    bits: int | None = None
    compressed: bool = False

    def __post_init__(self) -> None:
        # Two bins of back-offs are reserved for zeros, and there must be others.
        if self.bits is not None and not 2 <= self.bits <= MAX_BITS:
            raise ValueError(f"quantised to {self.bits} bits; needed 2-{MAX_BITS}: 8 is usual")

    @property
    def kind(self) -> int:
        """KenLM's number of this kind."""
        return _TRIE + _QUANTISED * (self.bits is not None) + _COMPRESSED * self.compressed


PLAIN = TrieForm()


def trie_bytes(counts: Sequence[int], form: TrieForm) -> int:
    """Return the bytes of a model with these numbers of n-grams per order, without its strings."""
    layout = _Layout([*counts, 0] if len(counts) == 1 else counts, form)
    size = len(_header(layout)) + 8 * (1 + layout.counts[0]) + 16 * (layout.counts[0] + 2)
    size += layout.table_bytes
    for level in range(1, len(layout.counts)):
        if layout.compressed and not layout.is_last(level):
            size += 8 * (1 + layout.array_length(level)) + 7
        size += layout.packed_bytes(level)
    return size


def write_trie(
    path: Path,
    model: SortedModel,
    form: TrieForm = PLAIN,
    progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Write the model to `path`, atomically.

    Args:
      path: file to write.
      model: with signed back-offs of zero (`mark_contexts`). A model of order 1 is written with an
        empty order 2, which KenLM needs.
      form: the kind of trie.
      progress: called with numbers of n-grams as they are written.

    Raises:
      ValueError: the words are not unique, not in the order of their hashes after `<unk>`, or do
        not match the 1-grams.
    """
    words, orders = model.words, list(model.orders)
    hashes = hashes_of(words[1:])
    if not words or words[0] != UNKNOWN or not (hashes[1:] > hashes[:-1]).all():
        raise ValueError("needed unique words, <unk> and then the others in the order of hashes")
    if len(orders[0]) != len(words):
        raise ValueError(f"{len(words)} words have {len(orders[0])} 1-grams; needed one each")
    if len(orders) == 1:
        whole, real = np.zeros(0, np.int64), np.zeros(0, np.float32)
        orders.append(SortedOrder(whole.astype(np.uint32), whole, real, real))
    layout = _Layout([len(order) for order in orders], form)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(_header(layout))
        file.write(struct.pack("<Q", len(hashes)) + hashes.astype("<u8").tobytes() + bytes(8))
        tables = _write_tables(file, orders, layout)
        _write_unigrams(file, orders)
        progress(len(words))
        for level in range(1, len(orders)):
            _write_order(file, orders, level, layout, tables, progress)
        file.write("\0".join(words).encode() + b"\0")


@dataclass(frozen=True)
class _Layout:
    """Widths and sizes, derived from the numbers of n-grams and the form."""

    counts: Sequence[int]
    form: TrieForm

    @property
    def compressed(self) -> bool:
        return self.form.compressed

    def is_last(self, level: int) -> bool:
        return level + 1 == len(self.counts)

    @property
    def word_bits(self) -> int:
        return self.counts[0].bit_length()

    @property
    def table_bytes(self) -> int:
        if self.form.bits is None:
            return 0
        return 8 + 4 * (1 << self.form.bits) * (2 * (len(self.counts) - 2) + 1)

    def child_bits(self, level: int) -> int:
        """Return the bits of the first child that are stored in the row."""
        most = self.counts[level + 1]
        required = most.bit_length()
        if not self.compressed:
            return required

        def cost(chopped: int) -> int:
            array = (most >> (required - chopped)) * 64
            return array - (self.counts[level] + 1) * chopped

        return required - min(range(required + 1), key=cost)

    def array_length(self, level: int) -> int:
        """Return the length of a compressed order's array, one entry per value of its bits."""
        return (self.counts[level + 1] >> self.child_bits(level)) + 1

    def row_bits(self, level: int) -> int:
        log10, backoff = (self.form.bits,) * 2 if self.form.bits is not None else (31, 32)
        if self.is_last(level):
            return self.word_bits + log10
        return self.word_bits + log10 + backoff + self.child_bits(level)

    def packed_bytes(self, level: int) -> int:
        # One more row ends the last range of children. Readers may read 8 bytes past the end.
        return ((1 + self.counts[level]) * self.row_bits(level) + 7) // 8 + 8


def _header(layout: _Layout) -> bytes:
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 8)

    counts, kind = layout.counts, layout.form.kind
    sanity = padded(_MAGIC) + struct.pack("<fffIIIQ", 0.0, 1.0, -0.5, 1, 0xFFFFFFFF, 0, 1)
    fixed = struct.pack("<B3xfI?3xI", len(counts), 1.5, kind, True, _SEARCH_VERSION)
    return padded(sanity + fixed + struct.pack(f"<{len(counts)}Q", *counts))


def _write_tables(file: BinaryIO, orders: Sequence[SortedOrder], layout: _Layout) -> list[Tables]:
    bits = layout.form.bits
    if bits is None:
        return []
    file.write(struct.pack("<BBB5x", _QUANTISATION_VERSION, bits, bits))
    found = []
    for order in orders[1:]:
        found.append(
            train(_log10(order.log10), None if order is orders[-1] else order.backoff, bits)
        )
        file.write(found[-1].log10.astype("<f4").tobytes())
        backoff = found[-1].backoff
        if backoff is not None:
            file.write(backoff.astype("<f4").tobytes())
    return found


def _write_unigrams(file: BinaryIO, orders: Sequence[SortedOrder]) -> None:
    unigrams = orders[0]
    record = np.zeros(len(unigrams) + 2, dtype="<f4, <f4, <u8")
    record["f0"][:-2] = _log10(unigrams.log10)
    record["f1"][:-2] = unigrams.backoff
    record["f2"][:-1] = _first_children(orders[1], 0, len(unigrams) + 1)
    file.write(record.tobytes())


def _write_order(
    file: BinaryIO,
    orders: Sequence[SortedOrder],
    level: int,
    layout: _Layout,
    tables: Sequence[Tables],
    progress: Callable[[int], None],
) -> None:
    order, count = orders[level], layout.counts[level]
    below = None if layout.is_last(level) else orders[level + 1]
    child_bits = 0 if below is None else layout.child_bits(level)
    if below is not None and layout.compressed:
        _write_array(file, below, layout.array_length(level), child_bits)
    written = 0
    for start in range(0, count + 1, _ROWS_PER_CHUNK):
        end = min(start + _ROWS_PER_CHUNK, count + 1)
        rows = slice(start, min(end, count))
        fields = [(np.asarray(order.word[rows]), layout.word_bits)]
        log10, backoff = _log10(order.log10[rows]), np.asarray(order.backoff[rows], "<f4")
        if tables:
            bits = layout.form.bits or 0
            if below is not None:
                fields.append((tables[level - 1].encode_backoff(backoff), bits))
            fields.append((tables[level - 1].encode_log10(log10), bits))
        else:
            fields.append((log10.view("<u4") & np.uint32(0x7FFFFFFF), 31))
            if below is not None:
                fields.append((backoff.view("<u4"), 32))
        # The extra row at the end has only its first child.
        fields = [(_filled(values, end - start), bits) for values, bits in fields]
        if below is not None:
            mask = np.uint64((1 << child_bits) - 1)
            fields.append((_first_children(below, start, end) & mask, child_bits))
        written += file.write(pack_bits(fields))
        progress(end - start)
    file.write(bytes(layout.packed_bytes(level) - written))


@dataclass(frozen=True)
class Header:
    """What a KenLM binary file says of itself.

    Attributes:
      kind: KenLM's number of the data structure. 2 to 5 are tries.
      counts: numbers of n-grams per order.
      bytes: of the header.
    """

    kind: int
    counts: Sequence[int]
    bytes: int


def read_header(path: Path) -> Header:
    """Read the header of a KenLM binary file.

    Raises:
      ValueError: it is none, or was made for other machines, or is cut short.
    """
    start = len(_MAGIC) + -len(_MAGIC) % 8 + 32
    with path.open("rb") as file:
        data = file.read(start + 20 + 8 * 16)
    if not data.startswith(_MAGIC) or len(data) < start + 20:
        raise ValueError("it does not begin as a KenLM binary file of format version 5 does")
    order, kind, version = struct.unpack_from("<B7xI4xI", data, start)[:3]
    known = _Layout([0] * max(order, 2), PLAIN)
    if data[:start] != _header(known)[:start] or not 1 <= order <= 16:
        raise ValueError("it was written on another kind of machine, or is damaged")
    if kind in _TRIES and version != _SEARCH_VERSION:
        raise ValueError(f"its trie has version {version}; needed {_SEARCH_VERSION}")
    if len(data) < start + 20 + 8 * order:
        raise ValueError("it is cut short")
    counts = struct.unpack_from(f"<{order}Q", data, start + 20)
    size = start + 20 + 8 * order
    return Header(kind, counts, size + -size % 8)


def read_trie(path: Path) -> SortedModel:
    """Read all n-grams of a trie.

    Raises:
      ValueError: the file is no KenLM trie with its words in it, or is cut short.
    """
    header = read_header(path)
    if header.kind not in _TRIES:
        raise ValueError(
            "its n-grams cannot be listed, since it is a hash table ('probing'): needed a trie, or "
            "the ARPA file that it was made of"
        )
    file = np.memmap(path, np.uint8, "r")
    # In order of the file. The words' hashes are made again from the words.
    place = header.bytes + 8 + 8 * header.counts[0]
    bits = None
    if header.kind - _TRIE & _QUANTISED:
        version, bits, of_backoffs = file[place : place + 3].tolist()
        if (version, bits) != (_QUANTISATION_VERSION, of_backoffs):
            raise ValueError(f"it has {bits} bits a probability and {of_backoffs} a back-off")
    form = TrieForm(bits, bool(header.kind - _TRIE & _COMPRESSED))
    layout = _Layout(header.counts, form)
    tables = _read_tables(file, place, layout)
    place += layout.table_bytes
    count = header.counts[0]
    record = np.frombuffer(_part(file, place, 16 * (count + 2)), dtype="<f4, <f4, <u8")
    place += 16 * (count + 2)
    ids, parents = np.arange(count, dtype=np.uint32), np.zeros(count, np.int64)
    orders = [SortedOrder(ids, parents, record["f0"][:count], record["f1"][:count])]
    children = record["f2"][: count + 1].astype(np.int64)
    for level in range(1, len(header.counts)):
        order, children, place = _read_order(file, place, level, layout, tables, children)
        orders.append(order)
    words = file[place:].tobytes().decode().split("\0")[:-1]
    if len(words) != count:
        raise ValueError(f"it has {count} words, but the spellings of {len(words)}")
    if len(orders) > 1 and not len(orders[-1]):
        orders.pop()
    return SortedModel(words, orders)


def _part(file: np.ndarray, place: int, size: int) -> bytes:
    data = file[place : place + size].tobytes()
    if len(data) < size:
        raise ValueError("it is cut short")
    return data


def _read_tables(file: np.ndarray, place: int, layout: _Layout) -> list[np.ndarray]:
    """Return the bins of a quantised trie: probabilities and back-offs of every order in turn."""
    if layout.form.bits is None:
        return []
    values = np.frombuffer(_part(file, place, layout.table_bytes)[8:], "<f4")
    return list(values.reshape(-1, 1 << layout.form.bits))


def _read_order(
    file: np.ndarray,
    place: int,
    level: int,
    layout: _Layout,
    tables: Sequence[np.ndarray],
    children: np.ndarray,
) -> tuple[SortedOrder, np.ndarray, int]:
    """Return an order, the first children of its rows, and the place in the file after it.

    `children` are the first children of the order before.
    """
    count, last = layout.counts[level], layout.is_last(level)
    child_bits = 0 if last else layout.child_bits(level)
    high: np.ndarray | int = 0
    if layout.compressed and not last:
        length = layout.array_length(level)
        start = -(-place // 8) * 8 + 8
        array = np.frombuffer(_part(file, start, 8 * length), "<u8").astype(np.int64)
        high = np.searchsorted(array[1:], np.arange(count + 1), "right") << child_bits
        place += 8 * (1 + length) + 7
    size = layout.packed_bytes(level)
    data = _part(file, place, size)
    if layout.form.bits is None:
        widths = [layout.word_bits, 31, *(() if last else (32, child_bits))]
    else:
        bits = layout.form.bits
        widths = [
            layout.word_bits,
            *(() if last else (bits,)),
            bits,
            *(() if last else (child_bits,)),
        ]
    fields = unpack_bits(data, widths, count + (not last))
    parent = np.repeat(np.arange(len(children) - 1), np.diff(children))
    if len(parent) != count:
        raise ValueError(f"its {level + 1}-grams are damaged")
    if tables:
        own = tables[2 * (level - 1) :]
        log10 = own[0][fields[-1 if last else 2][:count]]
        backoff = np.zeros(count, np.float32) if last else own[1][fields[1][:count]]
    else:
        log10 = (fields[1][:count].astype("<u4") | np.uint32(1 << 31)).view("<f4")
        backoff = (
            np.full(count, -0.0, np.float32)
            if last
            else fields[2][:count].astype("<u4").view("<f4")
        )
    order = SortedOrder(fields[0][:count].astype(np.uint32), parent, log10, backoff)
    following = children if last else fields[-1].astype(np.int64) + high
    return order, following, place + size


def _first_children(below: SortedOrder, start: int, end: int) -> np.ndarray:
    """Return where the children of rows `start` to `end` begin in the order below."""
    return np.searchsorted(below.parent, np.arange(start, end), "left").astype(np.uint64)


def _write_array(file: BinaryIO, below: SortedOrder, length: int, child_bits: int) -> None:
    """Write, for every value of the high bits, the first row whose first child reaches it."""
    base = file.tell()
    file.write(struct.pack("<BB", _ARRAY_VERSION, _ARRAY_BITS))
    aligned = -(-base // 8) * 8
    file.write(bytes(aligned + 8 - file.tell()))
    array = np.zeros(length, "<u8")
    # The first row with at least n children before it follows the parent of child n - 1.
    before = (np.arange(1, length, dtype=np.int64) << child_bits) - 1
    array[1:] = np.asarray(below.parent[before]) + 1
    file.write(array.tobytes())
    file.write(bytes(7 - (aligned - base)))


def _filled(values: np.ndarray, count: int) -> np.ndarray:
    """Pad values with zeros to `count`."""
    return np.concatenate([values, np.zeros(count - len(values), values.dtype)])


def _log10(values: np.ndarray) -> np.ndarray:
    return np.minimum(values, np.float32(0.0)).astype("<f4")


def pack_bits(fields: Sequence[tuple[np.ndarray, int]]) -> bytes:
    """Pack rows of fields without gaps, lowest bit first, little-endian, zero bits at the end.

    Args:
      fields: (values [N] below 2 ** bits, bits up to 64) in the order of the fields in a row.
    """
    rows, width = len(fields[0][0]), sum(bits for _, bits in fields)
    groups = -(-rows // _GROUP)
    packed = np.zeros((width, groups), np.uint64)
    offset = 0
    for values, bits in fields:
        if bits:
            padded = np.zeros(groups * _GROUP, np.uint64)
            padded[:rows] = values
            # [64, groups]: the rows at one place of their group stand together.
            by_place = np.ascontiguousarray(padded.reshape(groups, _GROUP).T)
            for place in range(_GROUP):
                word, shift = divmod(place * width + offset, 64)
                packed[word] |= by_place[place] << np.uint64(shift)
                if shift + bits > 64:
                    packed[word + 1] |= by_place[place] >> np.uint64(64 - shift)
        offset += bits
    data = np.ascontiguousarray(packed.T).astype("<u8", copy=False).tobytes()
    return data[: (rows * width + 7) // 8]


def unpack_bits(data: bytes, widths: Sequence[int], rows: int) -> list[np.ndarray]:
    """Return the fields of rows that `pack_bits` packed, uint64 [rows] each."""
    whole = np.frombuffer(data + bytes(16 + -len(data) % 8), "<u8")
    at = np.arange(rows, dtype=np.int64) * sum(widths)
    found = []
    for bits in widths:
        word, shift = at >> 6, (at & 63).astype(np.uint64)
        # A shift by 64 is undefined, therefore in two steps.
        above = (whole[word + 1] << (np.uint64(63) - shift)) << np.uint64(1)
        found.append((whole[word] >> shift | above) & np.uint64((1 << bits) - 1))
        at = at + bits
    return found
