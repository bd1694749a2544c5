"""Sorting of more rows than fit into memory: sorted runs on disk, merged block by block.

Rows are numpy structured arrays, ordered by their field `key` [columns] uint64, first column first.
No step loops over single rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_COPIES = 5
"""Copies of a row in memory while it is sorted: collected, joined, its order (with the sort's own
buffer) and reordered."""
_SMALLEST_BLOCK = 1 << 10
_LARGEST_BLOCK = 1 << 18

Combine = Callable[[np.ndarray], np.ndarray]


def row_type(columns: int, *values: tuple[str, str]) -> np.dtype:
    """Return the type of rows with a key of `columns` numbers and the fields (name, type)."""
    return np.dtype([("key", "<u8", (columns,)), *values])


def sort_rows(rows: np.ndarray) -> np.ndarray:
    """Sort rows by their keys."""
    return rows[_order(rows["key"])]


def _order(key: np.ndarray) -> np.ndarray:
    """Return the permutation that sorts keys [N, columns]."""
    columns = key.shape[1]
    if columns == 1:
        return np.argsort(key[:, 0])
    if columns == 2 and len(key):
        # Sorting single numbers is several times faster than sorting pairs. Sort by the first
        # column, then by its rank and the second column in one number, if both fit.
        first = np.argsort(key[:, 0])
        leading, second = key[first, 0], key[first, 1]
        group = np.zeros(len(key), np.uint64)
        np.cumsum(leading[1:] != leading[:-1], out=group[1:])
        everything = int(np.bitwise_or.reduce(second))
        unused = (everything & -everything).bit_length() - 1 if everything else 64
        if int(group[-1]).bit_length() <= unused:
            if unused < 64:
                group <<= np.uint64(64 - unused)
                group |= second >> np.uint64(unused)
            return first[np.argsort(group)]
    return np.lexsort(tuple(key[:, column] for column in reversed(range(columns))))


def starts_of_groups(key: np.ndarray) -> np.ndarray:
    """Return the indices at which ordered keys [N, columns] change, beginning with 0."""
    if not len(key):
        return np.zeros(0, np.intp)
    changed = np.ones(len(key), bool)
    changed[1:] = (key[1:] != key[:-1]).any(axis=1)
    return np.flatnonzero(changed)


def external_sort(
    chunks: Iterable[np.ndarray],
    memory: int,
    folder: Path,
    name: str,
    combine: Combine = lambda rows: rows,
) -> Iterator[np.ndarray]:
    """Sort rows and yield them in blocks.

    Args:
      chunks: structured arrays of one type, see `row_type`. Keys are unique, or `combine` makes
        them so.
      memory: bytes that the sort may use.
      folder: where runs are kept if the rows do not fit into memory. They are removed at the end.
      name: beginning of the runs' file names.
      combine: joins rows of equal keys, given ordered rows.
    """
    runs: list[Path] = []
    waiting: list[np.ndarray] = []
    count, itemsize = 0, 1
    try:
        for chunk in chunks:
            itemsize = chunk.dtype.itemsize
            most = max(memory // (_COPIES * itemsize), _SMALLEST_BLOCK)
            # Split chunks that exceed the memory's share.
            for part in (chunk[i : i + most] for i in range(0, len(chunk), most)):
                if count + len(part) > most:
                    runs.append(folder / f"{name}.{len(runs)}.run")
                    combine(sort_rows(np.concatenate(waiting))).tofile(runs[-1])
                    waiting, count = [], 0
                waiting.append(part)
                count += len(part)
        if not runs:
            if waiting:
                rows = np.concatenate(waiting)
                waiting.clear()
                rows = combine(sort_rows(rows))
                for start in range(0, len(rows), _LARGEST_BLOCK):
                    yield rows[start : start + _LARGEST_BLOCK]
            return
        dtype = waiting[0].dtype
        runs.append(folder / f"{name}.{len(runs)}.run")
        combine(sort_rows(np.concatenate(waiting))).tofile(runs[-1])
        waiting.clear()
        block = memory // (_COPIES * itemsize * len(runs))
        block = min(max(block, _SMALLEST_BLOCK), _LARGEST_BLOCK)
        yield from _merge([_Run(path, dtype, block) for path in runs], combine)
    finally:
        for path in runs:
            path.unlink(missing_ok=True)


@dataclass
class _Run:
    """A sorted file with one block of it in memory."""

    path: Path
    dtype: np.dtype
    block: int
    done: int = 0
    """Rows read so far."""
    rows: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.total = self.path.stat().st_size // self.dtype.itemsize
        self.rows = np.zeros(0, self.dtype)
        self.fill()

    @property
    def more(self) -> bool:
        """Return whether rows remain on disk."""
        return self.done < self.total

    def fill(self) -> None:
        """Read the next block if none is left."""
        if not len(self.rows) and self.more:
            self.rows = np.fromfile(
                self.path, self.dtype, self.block, offset=self.done * self.dtype.itemsize
            )
            self.done += len(self.rows)

    def take(self, bound: tuple[int, ...] | None) -> np.ndarray:
        """Remove and return the rows in memory up to `bound`, or all of them."""
        end = len(self.rows) if bound is None else rows_up_to(self.rows["key"], bound)
        taken, self.rows = self.rows[:end], self.rows[end:]
        return taken


def rows_up_to(key: np.ndarray, bound: tuple[int, ...]) -> int:
    """Return the number of ordered keys [N, columns] that are at most `bound`."""
    low, high = 0, len(key)
    for column, value in enumerate(bound[:-1]):
        part = key[low:high, column]
        low, high = (
            low + int(np.searchsorted(part, np.uint64(value), "left")),
            low + int(np.searchsorted(part, np.uint64(value), "right")),
        )
    last = key[low:high, len(bound) - 1]
    return low + int(np.searchsorted(last, np.uint64(bound[-1]), "right"))


def _merge(runs: list[_Run], combine: Combine) -> Iterator[np.ndarray]:
    while any(len(run.rows) for run in runs):
        # All rows up to the smallest of the blocks' last keys are in memory.
        last = [tuple(map(int, run.rows["key"][-1])) for run in runs if run.more]
        bound = min(last) if last else None
        taken = [part for run in runs if len(part := run.take(bound))]
        yield combine(sort_rows(np.concatenate(taken)))
        for run in runs:
            run.fill()


def regroup(blocks: Iterable[np.ndarray], columns: Callable[[np.ndarray], np.ndarray]) -> Iterator:
    """Re-cut blocks of ordered rows so that none ends inside a group.

    Args:
      blocks: structured arrays in order.
      columns: returns the groups of rows, an array [N, any] that is constant within a group.
    """
    rest: np.ndarray | None = None
    for block in itertools.chain(blocks, [None]):
        if block is None:
            if rest is not None and len(rest):
                yield rest
            return
        rows = block if rest is None else np.concatenate([rest, block])
        last = starts_of_groups(columns(rows))
        cut = int(last[-1]) if len(last) else 0
        rest = rows[cut:]
        if cut:
            yield rows[:cut]
