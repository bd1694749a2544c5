"""The language model's side of live decoding. A sentence survives the server's restart."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import numpy as np

from lm_server.client.answers import LanguageModelError
from lm_server.client.client import Client
from lm_server.hypothesis import Answer

_TIMEOUT = 10.0
_ATTEMPTS = 5
_FIRST_PAUSE = 0.5
Reply = TypeVar("Reply")


class Words:
    """Frames in, text out. A context manager."""

    def __init__(
        self,
        server: Callable[[], AbstractContextManager[tuple[str, str]]],
        on_problem: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start nothing yet.

        Args:
          server: yields the URL of a Redis where a server listens, and a name for it. Called again
            when it is lost.
          on_problem: called with the reason whenever the server has to be found again.
        """
        self._server = server
        self._on_problem = on_problem
        self._stack = contextlib.ExitStack()
        self._frames: list[np.ndarray] = []
        self._text = ""

    def __enter__(self) -> Words:
        self._connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _connect(self) -> None:
        self._stack.close()
        url, self.name = self._stack.enter_context(self._server())
        self._client = self._stack.enter_context(Client(url, _TIMEOUT))
        self._client.reset()

    def begin(self) -> None:
        """Start a sentence."""
        self._frames, self._text = [], ""
        self._asked(self._client.reset)

    def send(self, logits: np.ndarray) -> str:
        """Send frames [F, 41] of the sentence. Return the best text so far."""
        if not len(logits):
            return self._text
        self._frames.append(logits)
        text = self._asked(lambda: self._client.send(logits))
        if text is not None:
            self._text = text
        return self._text

    def finalize(self) -> Answer:
        """End the sentence. One without a frame has an empty answer.

        Raises:
          LanguageModelError: no server answers, or the server refuses the sentence.
        """
        if not self._frames:
            return Answer(())
        answer = self._asked(self._client.finalize) or self._client.finalize()
        self._frames = []
        return answer

    def _asked(self, ask: Callable[[], Reply]) -> Reply | None:
        """Return the server's answer. None where the server was found again and was sent all of
        the sentence.

        Raises:
          LanguageModelError: it was not found again.
        """
        try:
            return ask()
        except LanguageModelError as error:
            last = error
        for attempt in range(1, _ATTEMPTS + 1):
            self._on_problem(f"{last}; attempt {attempt} of {_ATTEMPTS} to find the server again")
            if attempt > 1:
                time.sleep(_FIRST_PAUSE * 2 ** (attempt - 2))
            try:
                self._connect()
                if self._frames:
                    self._text = self._client.send(np.concatenate(self._frames))
                return None
            except LanguageModelError as error:
                last = error
        raise last
