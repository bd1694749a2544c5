"""One interface to every search: load a model folder, then begin, step(frames), finish.

Three backends: `flashlight` (the default: n-best lists, every knob), `pyctcdecode` (the same model
folder, searched by another library) and `wfst` (a published `TLG.fst`, searched by Kaldi's decoder,
one sentence only).
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lm_server.errors import UserError
from lm_server.hypothesis import Hypothesis
from lm_server.search.hot_words import HotWord
from lm_server.settings import Settings

BACKENDS = ("flashlight", "pyctcdecode", "wfst")
_PACKAGES = {
    # Its requirements exclude the numpy that everything else here uses, and works with.
    "pyctcdecode": "--no-deps pyctcdecode pygtrie",
    "wfst": "kaldi-decoder kaldifst",
}
NO_HOT_WORDS: Mapping[str, HotWord] = {}


class BackendError(UserError, ValueError):
    """A search that does not exist, or that cannot do what is asked of it."""


class NoSentenceError(BackendError):
    """Frames for which no sentence was found, however wide the search; says so instead of giving
    an empty answer."""


class Search(Protocol):
    """The search for one sentence after another.

    Attributes:
      settings: those of the sentence under way.
      frames: frames of 80 ms of it so far.
    """

    settings: Settings
    frames: int

    def begin(self, settings: Settings | None = None) -> None:
        """Starts a sentence, dropping the one under way; new settings hold from here on."""

    def step(self, logits: np.ndarray) -> tuple[str, ...]:
        """Takes frames, [frames, 41] in the language model's order; gives the best sentence so far.

        Raises:
          ProtocolError: the shape is wrong, a value is not finite, or the sentence becomes too
            long. The sentence under way is unchanged.
        """

    def finish(self) -> tuple[Hypothesis, ...]:
        """Ends the sentence: the n best distinct candidates, best first; none without frames.

        Raises:
          NoSentenceError: there were frames, and no sentence was found for them; the search is
            ready for the next one.
        """


class SearchModel(Protocol):
    """A model folder in memory, shared by any number of searches.

    Attributes:
      folder: where it was read.
      backend: the search's name, one of `BACKENDS`.
    """

    folder: Path
    backend: str

    @property
    def words(self) -> Sequence[str]:
        """Its vocabulary."""

    def search(self, settings: Settings, hot_words: Mapping[str, HotWord] = NO_HOT_WORDS) -> Search:
        """A new search; its hot words are its own.

        Raises:
          HotWordError: a hot word cannot be used.
          BackendError: this backend has no hot words.
        """


def load_model(folder: Path, backend: str = "flashlight") -> SearchModel:
    """Reads a model folder for one of `BACKENDS`.

    Raises:
      BackendError: there is no such backend, or its package is not installed.
      ModelFolderError: the folder is not as the backend needs it.
    """
    if backend not in BACKENDS:
        raise BackendError(f"there is no search {backend!r}; known are {', '.join(BACKENDS)}")
    if backend == "flashlight":
        from lm_server.search.flashlight import LanguageModel

        return LanguageModel(folder)
    try:
        if backend == "wfst":
            from lm_server.search.wfst import GraphModel

            return GraphModel(folder)
        from lm_server.search.pyctcdecode import WordModel

        return WordModel(folder)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"the search {backend} needs packages that are not here ({error.name}): "
            f"install them with `pip install {_PACKAGES[backend]}`"
        ) from error


def need_packages(backend: str) -> None:
    """Imports what the default search needs, so that a missing package shows before any work.

    Raises:
      ModuleNotFoundError: a package of the extra `lm` is not installed.
    """
    if backend == "flashlight":
        importlib.import_module("lm_server.search.flashlight")


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds --backend."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help=f"which search (default {BACKENDS[0]}; see docs/search.md)",
    )
