"""Logits to sentences in this process, without Redis: what `lm_server.load` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from lm_server.hypothesis import Answer
from lm_server.protocol import check_logits, to_lm_order
from lm_server.rescoring.answering import Answering
from lm_server.rescoring.load import load_scorer
from lm_server.search.hot_words import HotWord
from lm_server.search.interface import Search
from lm_server.search.load import default_settings, load_model
from lm_server.settings import Settings, read_settings

HotWords = Mapping[str, float | HotWord]
"""Words to favour, each with its weight (ln)."""


class Decoder:
    """A model folder in memory, with a large language model where one was named.

    Attributes:
      settings: of its searches.
    """

    def __init__(
        self,
        folder: Path | str,
        backend: str = "flashlight",
        settings: Settings | Mapping[str, float] | Path | str | None = None,
        llm: Path | str | None = None,
    ) -> None:
        """Read the models; see `lm_server.load`."""
        if settings is None or isinstance(settings, Mapping):
            settings = Settings(**{**vars(default_settings(backend)), **(settings or {})})
        elif not isinstance(settings, Settings):
            settings = read_settings(Path(settings), default_settings(backend), backend)
        self.settings = settings
        self._model = load_model(Path(folder), backend)
        self._answering = Answering(None if llm is None else load_scorer(llm))

    def search(self, hot_words: HotWords | None = None) -> Search:
        """Start a streaming search: `begin`, `step(frames)`, `finish`.

        `step` expects frames [frames, 41] in the language model's order (`protocol.to_lm_order`),
        and returns the best words so far.

        Args:
          hot_words: word -> weight (ln), or a HotWord with pronunciations.

        Raises:
          HotWordError: a hot word cannot be used.
        """
        words = {
            word: one if isinstance(one, HotWord) else HotWord(one)
            for word, one in (hot_words or {}).items()
        }
        return self._model.search(self.settings, words)

    @overload
    def decode(
        self, logits: np.ndarray, *, hot_words: HotWords | None = None, context: str = ""
    ) -> Answer: ...

    @overload
    def decode(
        self, logits: Sequence[np.ndarray], *, hot_words: HotWords | None = None, context: str = ""
    ) -> list[Answer]: ...

    def decode(
        self,
        logits: np.ndarray | Sequence[np.ndarray],
        *,
        hot_words: HotWords | None = None,
        context: str = "",
    ) -> Answer | list[Answer]:
        """Decode one trial, or a list of trials.

        Args:
          logits: [frames, 41] in the RNN's class order, as `Run.logits` of b2txt_jax returns them,
            or a sequence of such arrays.
          hot_words: word -> weight (ln), or a HotWord with pronunciations.
          context: what was said before. Only a large language model uses it.

        Returns:
          An answer, or a list of answers in the order of the trials. One whose rescoring failed is
          the n-gram answer and has a `problem`.

        Raises:
          ProtocolError: the shape is wrong, a value is not finite, or the sentence is too long.
          NoSentenceError: no sentence was found for a trial's frames.
          HotWordError: a hot word cannot be used.
        """
        search = self.search(hot_words)
        single = isinstance(logits, np.ndarray) and logits.ndim != 3
        pending = []
        for one in [logits] if single else logits:
            search.begin()
            search.step(to_lm_order(check_logits(one)))
            pending.append(self._answering.submit(search.finish(), self.settings, context))
        answers = [one.result() for one in pending]
        return answers[0] if single else answers
