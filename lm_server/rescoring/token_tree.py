"""Token sequences laid out for a model: as trees that share beginnings, or in padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tree:
    """Sequences that share their beginnings. A parent stands before its children.

    Attributes:
      tokens: of every node, [nodes].
      parents: index of every node's parent, -1 for none, [nodes].
      depths: nodes above every node, [nodes].
      paths: the nodes of every sequence.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    paths: list[list[int]]

    @property
    def inner(self) -> np.ndarray:
        """Nodes with children, ascending: the only ones whose logits are needed."""
        return np.unique(self.parents[self.parents >= 0])

    def ancestry(self) -> np.ndarray:
        """Return whether an inner node (row) sees another (column): itself and those above it."""
        inner = self.inner
        place = {int(node): index for index, node in enumerate(inner)}
        sees = np.eye(len(inner), dtype=bool)
        for index, node in enumerate(inner):
            if self.parents[node] >= 0:
                sees[index] |= sees[place[int(self.parents[node])]]
        return sees


def trees(sequences: Sequence[tuple[int, ...]], shared: int, most: int) -> Iterator[Tree]:
    """Yield sorted sequences without their first `shared` tokens as trees of about `most` nodes."""
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    paths: list[list[int]] = []
    before: tuple[int, ...] = ()

    def tree() -> Tree:
        return Tree(np.array(tokens), np.array(parents), np.array(depths), list(paths))

    for sequence in sequences:
        rest = sequence[shared:]
        common = _common_length(before, rest) if paths else 0
        if paths and len(tokens) + len(rest) - common > most:
            yield tree()
            tokens, parents, depths, paths, common = [], [], [], [], 0
        path = paths[-1][:common] if paths else []
        for depth in range(common, len(rest)):
            parents.append(path[-1] if path else -1)
            path.append(len(tokens))
            tokens.append(rest[depth])
            depths.append(depth)
        paths.append(path)
        before = rest
    if paths:
        yield tree()


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        length += 1
    return length


def shared_length(sequences: Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens all sorted sequences begin with, less than the length of any."""
    return min(_common_length(sequences[0], sequences[-1]), min(map(len, sequences)) - 1)


def batches(
    order: Sequence[int], sequences: Sequence[tuple[int, ...]], most: int
) -> Iterator[list[int]]:
    """Yield batches of indices, each of at most `most` tokens with their padding.

    `order` holds the indices, shortest sequence first.
    """
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(sequences[index]) > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
