"""The interface of every search: read a model folder, then begin, step(frames), finish.

A backend is a module of this folder that declares `BACKEND` and has `load(folder) -> SearchModel`.
`lm_server.search.load` names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from lm_server.errors import UserError
from lm_server.hypothesis import Hypothesis
from lm_server.protocol import MAX_MESSAGE_FRAMES, ProtocolError, check_logits
from lm_server.search.hot_words import HotWord
from lm_server.settings import DEFAULTS, NOT_NEEDED, Settings

NO_HOT_WORDS: Mapping[str, HotWord] = {}
MAX_UTTERANCE_FRAMES = MAX_MESSAGE_FRAMES
"""Frames of 80 ms in one sentence (13 minutes): a search keeps every frame in memory."""
ONLY_MAX_ACTIVE = "it keeps at most max_active hypotheses, all within the beam"
"""Why some searches have no min_active."""
OWN_WIDTH = "its default width is its own"
"""Why some searches have no presets."""

NO_FUSION = dict.fromkeys(
    ("fuse_weight", "fuse_frames", "fuse_hypotheses", "fuse_beam"),
    "it cannot ask a large language model before the sentence is finished",
)
"""What most searches lack."""


class BackendError(UserError, ValueError):
    """A search that does not exist, or that cannot do what is asked of it."""


class NoSentenceError(BackendError):
    """Frames for which no sentence was found, however wide the search."""


@dataclass(frozen=True)
class Backend:
    """What a search declares of itself.

    Attributes:
      requires: modules that it imports when it reads a model.
      install: the command that installs them. None: they belong to the extra `lm`.
      defaults: its own defaults, where they differ from those of `Settings`.
      lacks: settings without effect, with the reason.
    """

    requires: tuple[str, ...]
    install: str | None = None
    defaults: Mapping[str, float] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """Its default settings."""
        return replace(DEFAULTS, **self.defaults)  # type: ignore[arg-type]

    def reason_without_effect(self, name: str) -> str | None:
        """Return why a setting or published parameter has no effect. None if it has one."""
        return {**NOT_NEEDED, **self.lacks}.get(name)


class Search(Protocol):
    """The search for one sentence after another.

    Attributes:
      settings: those of the current sentence.
      frames: its frames of 80 ms so far.
    """

    settings: Settings
    frames: int

    def begin(self, settings: Settings | None = None) -> None:
        """Start a sentence and drop the current one. New settings hold from here on."""

    def step(self, logits: np.ndarray) -> tuple[str, ...]:
        """Search frames [frames, 41] in the language model's order. Return the best words so far.

        Raises:
          ProtocolError: the shape is wrong, a value is not finite, or the sentence becomes too
            long. The current sentence is unchanged.
        """

    def finish(self) -> tuple[Hypothesis, ...]:
        """End the sentence. Return distinct hypotheses, best first, none if there were no frames.

        Raises:
          NoSentenceError: no sentence was found for the frames. The search is ready for the next
            one.
        """


class SearchModel(Protocol):
    """A model folder in memory, shared by any number of searches.

    Attributes:
      folder: where it was read.
      backend: the search's name.
    """

    folder: Path
    backend: str

    @property
    def words(self) -> Sequence[str]:
        """Its vocabulary."""

    def search(self, settings: Settings, hot_words: Mapping[str, HotWord] = NO_HOT_WORDS) -> Search:
        """Return a new search with hot words of its own.

        Raises:
          HotWordError: a hot word cannot be used.
          BackendError: this backend has no hot words.
        """


def next_frames(logits: np.ndarray, frames: int, at_most: int = MAX_UTTERANCE_FRAMES) -> np.ndarray:
    """Return logits as contiguous float32 [new frames, 41], checked to fit after `frames` frames.

    Raises:
      ProtocolError: the shape is wrong, a value is not finite, or the sentence becomes longer than
        `at_most` frames.
    """
    logits = check_logits(logits)
    if frames + len(logits) > at_most:
        raise ProtocolError(
            f"the sentence would have {frames + len(logits)} frames; at most {at_most} are "
            "possible: send finalize or reset between sentences"
        )
    return logits
