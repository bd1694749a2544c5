"""What a source of bins is: BRAND, LSL, a Redis stream or a recording are one file each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from b2txt_jax.errors import UserError


class SourceError(UserError, ValueError):
    """A source that cannot be used."""


@dataclass(frozen=True, eq=False)
class Bin:
    """The features of 20 ms as they arrived."""

    features: np.ndarray
    """[D] of any float type. NaN where the source has none."""
    sequence: int | None
    """Its number. None: the source does not number its bins, so that none can be missed."""
    time: float
    """`time.monotonic()` of its arrival, from which latency counts."""


@dataclass(frozen=True)
class Begin:
    """A sentence begins with the next bin."""

    name: str = ""
    """Of the trial, where it has one."""
    truth: str | None = None
    """The sentence that was asked for, where it is known."""


@dataclass(frozen=True)
class End:
    """The sentence ended with the last bin."""


Event = Bin | Begin | End


class Source(Protocol):
    """Bins of a recording under way, with the beginnings and ends of sentences among them."""

    def read(self, timeout: float) -> list[Event] | None:
        """Return the events that have arrived, after waiting `timeout` seconds for the first. None:
        the source has ended.

        A source whose connection is lost connects again, and returns nothing meanwhile.

        Raises:
          SourceError: it will not come back.
        """
        ...

    def close(self) -> None:
        """Close the connection."""
        ...
