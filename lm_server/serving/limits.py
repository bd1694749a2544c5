"""What a server takes on, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
      sessions: open sessions besides the default one.
      idle_seconds: a session without entries for so long is closed, unless it asked for less.
      rescore_seconds: a sentence not rescored by then has the n-gram model's answer.
      backlog: entries of one stream that may wait; more end the sentence and are dropped.
      grace_seconds: at the stop, time for sentences under way to end.
    """

    sessions: int = 64
    idle_seconds: float = 600.0
    rescore_seconds: float = 20.0
    backlog: int = 20_000
    grace_seconds: float = 3.0
