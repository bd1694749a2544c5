"""Reads OpenFst's binary files: vector and const transducers with standard (tropical) arcs.

Layout, little-endian: a header (magic number, type, arc type, version, flags, properties, start,
numbers of states and arcs) and the symbol tables named by the flags. Then a vector transducer has
the final weight, number of arcs and arcs of each state. A const transducer has all states and then
all arcs. Source: OpenFst's headers fst.h, vector-fst.h, const-fst.h and symbol-table.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm_server.errors import UserError

MAGIC, _SYMBOLS_MAGIC = 2125659606, 2125658996
_INPUT_SYMBOLS, _OUTPUT_SYMBOLS, _ALIGNED = 1, 2, 4
_ALIGNED_VERSION, _ALIGNMENT = 1, 16
_STATES_PER_STEP = 1 << 16


class FstError(UserError, ValueError):
    """A transducer that cannot be read."""


@dataclass(frozen=True)
class Fst:
    """A transducer as arrays.

    Attributes:
      start: the first state.
      final: float32 [states], final weights (-ln), infinite if a state is not final.
      source: int64 [arcs] ascending, the source state of each arc.
      label: int32 [arcs], input labels.
      weight: float32 [arcs], -ln.
      target: int32 [arcs], the target state of each arc.
    """

    start: int
    final: np.ndarray
    source: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    target: np.ndarray


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, "u1")
        self.place = 0

    def numbers(self, form: str) -> tuple[int, ...]:
        size = struct.calcsize(form)
        if self.place + size > len(self.data):
            raise FstError(f"{self.path} is cut short: fetch it again")
        found = struct.unpack(form, self.data[self.place : self.place + size].tobytes())
        self.place += size
        return found

    def text(self) -> str:
        (size,) = self.numbers("<i")
        if not 0 <= size <= 1 << 16:
            raise FstError(f"{self.path} is no OpenFst file, or a damaged one: fetch it again")
        self.place += size
        return bytes(self.data[self.place - size : self.place]).decode("utf-8", "replace")

    def align(self) -> None:
        self.place = -(-self.place // _ALIGNMENT) * _ALIGNMENT

    def rows(self, dtype: np.dtype, count: int) -> np.ndarray:
        size = dtype.itemsize * count
        if count < 0 or self.place + size > len(self.data):
            raise FstError(f"{self.path} is cut short: fetch it again")
        self.place += size
        return self.data[self.place - size : self.place].view(dtype)


_ARC = np.dtype([("label", "<i4"), ("out", "<i4"), ("weight", "<f4"), ("target", "<i4")])
_STATE = np.dtype([("final", "<f4"), ("first", "<u4"), ("arcs", "<u4"), ("eps", "<u4", (2,))])


def read_fst(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Fst:
    """Read a transducer.

    Args:
      path: an OpenFst file, vector or const, with standard arcs.
      progress: called with the number of states read since its last call, and the total.

    Raises:
      FstError: the file is missing, is of another kind, or is cut short.
    """
    if not path.is_file():
        raise FstError(f"there is no file {path}; needed an OpenFst transducer: check the path")
    reader = _Reader(path)
    if len(reader.data) < 4 or reader.numbers("<i")[0] != MAGIC:
        raise FstError(
            f"{path} is no OpenFst file; needed a vector or const "
            "transducer such as G.fst: check the path, or fetch it again"
        )
    kind, arcs = reader.text(), reader.text()
    version, flags, _, start, states, arc_count = reader.numbers("<iiQqqq")
    if kind not in ("vector", "const") or arcs != "standard":
        raise FstError(
            f"{path} is a {kind} transducer with {arcs} arcs; needed vector or const with standard "
            "arcs: convert it with fstconvert --fst_type=vector"
        )
    for flag in (_INPUT_SYMBOLS, _OUTPUT_SYMBOLS):
        if flags & flag:
            _skip_symbols(reader)
    if start < 0 or states <= 0:
        raise FstError(f"{path} is an empty transducer; needed a grammar")
    if start >= states:
        raise FstError(f"{path} is damaged, it starts at state {start} of {states}: fetch it again")
    if kind == "vector":
        fst = _read_vector(reader, start, states, progress)
    else:
        aligned = bool(flags & _ALIGNED) or version == _ALIGNED_VERSION
        fst = _read_const(reader, start, states, arc_count, aligned)
        progress(states, states)
    if len(fst.target) and not 0 <= fst.target.min() <= fst.target.max() < states:
        raise FstError(f"{path} is damaged, arcs lead to absent states: fetch it again")
    return fst


def _skip_symbols(reader: _Reader) -> None:
    if reader.numbers("<i")[0] != _SYMBOLS_MAGIC:
        raise FstError(f"{reader.path} holds a symbol table of an unknown form")
    reader.text()
    _, size = reader.numbers("<qq")
    for _ in range(size):
        reader.text()
        reader.numbers("<q")


def _read_vector(
    reader: _Reader, start: int, states: int, progress: Callable[[int, int], None]
) -> Fst:
    # All fields are 4-byte words: weight and arc count (3 words), then 4 words per arc.
    whole = (len(reader.data) - reader.place) // 4
    body = np.array(reader.rows(np.dtype("<i4"), whole))  # a copy, because views need alignment
    words = body.data  # indexing a memoryview is faster than indexing an array
    if 3 * states > whole:
        raise FstError(f"{reader.path} is cut short: fetch it again")
    heads = np.zeros(states, np.int64)
    place = 0
    for first in range(0, states, _STATES_PER_STEP):
        last = min(first + _STATES_PER_STEP, states)
        try:
            for state in range(first, last):
                heads[state] = place
                place += 3 + 4 * words[place + 1]
        except IndexError:
            raise FstError(f"{reader.path} is cut short: fetch it again") from None
        progress(last - first, states)
    if place > whole:
        raise FstError(f"{reader.path} is cut short: fetch it again")
    counts = body[heads + 1].astype(np.int64)
    if (counts < 0).any():
        raise FstError(f"{reader.path} is damaged, a state has {counts.min()} arcs: fetch it again")
    body = body[:place]
    final = body[heads].view("<f4")
    is_arc = np.ones(place, bool)
    for word in range(3):
        is_arc[heads + word] = False
    arcs = body[is_arc].reshape(-1, 4)
    return Fst(
        start,
        np.array(final),
        np.repeat(np.arange(states), counts),
        arcs[:, 0].copy(),
        arcs[:, 2].copy().view("<f4"),
        arcs[:, 3].copy(),
    )


def _read_const(reader: _Reader, start: int, states: int, arcs: int, aligned: bool) -> Fst:
    if aligned:
        reader.align()
    table = reader.rows(_STATE, states)
    if aligned:
        reader.align()
    counts = table["arcs"].astype(np.int64)
    rows = reader.rows(_ARC, int(counts.sum()) if arcs < 0 else arcs)
    if (
        counts.sum() != len(rows)
        or (np.cumsum(counts) - counts != table["first"])[counts > 0].any()
    ):
        raise FstError(
            f"{reader.path} is damaged, the arcs of its states do not add up: fetch it again"
        )
    return Fst(
        start,
        np.array(table["final"]),
        np.repeat(np.arange(states), counts),
        np.array(rows["label"]),
        np.array(rows["weight"]),
        np.array(rows["target"]),
    )
