"""What happens in a live session, and who is informed: terminal, page, log, other programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from b2txt_jax.live.intake import Health
from lm_server.hypothesis import Answer


@dataclass(frozen=True)
class Began:
    """A sentence began."""

    id: str
    name: str
    """Of the trial, where it has one."""


@dataclass(frozen=True, eq=False)
class Progress:
    """Frames were decoded."""

    features: np.ndarray
    """Normalised, float32 [T, D], since the last of these."""
    logits: np.ndarray
    """float32 [F, 41], in the RNN's order."""
    text: str
    """The best sentence so far."""
    delay: float
    """Seconds from the arrival of the last bin to its text."""
    health: Health


@dataclass(frozen=True, eq=False)
class Final:
    """A sentence ended."""

    id: str
    name: str
    day: str
    answer: Answer
    truth: str | None
    seconds: float
    """From the end of the sentence to its answer."""
    raw: np.ndarray
    """The bins as they arrived, float32 [T, D], NaN where something was missing."""
    features: np.ndarray
    """The same normalised: what the model decoded."""


@dataclass(frozen=True)
class Chosen:
    """The user confirmed a sentence, or corrected it."""

    id: str
    text: str
    corrected: bool


@dataclass(frozen=True)
class Problem:
    """Something went wrong, and decoding goes on."""

    text: str


Happening = Began | Progress | Final | Chosen | Problem


class Output(Protocol):
    """Someone who is informed, in the order of the command's options."""

    def show(self, event: Happening) -> None:
        """Take note of an event. It is called between two chunks of bins and must not wait."""
        ...

    def close(self) -> None:
        """End."""
        ...
