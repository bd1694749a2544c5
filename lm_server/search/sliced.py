"""Long work in slices: generators that yield between them, so that others can be served."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Sliced = Generator[None, None, T]
"""Work that yields after every slice and returns its result."""


def finished(work: Sliced[T]) -> T:
    """Do all the work and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
