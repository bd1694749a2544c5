"""Logits and sentences as entries of a graph of BRAND."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from b2txt_jax.live.events import Began, Final, Happening, Problem, Progress
from b2txt_jax.live.sources.brand import Origin
from lm_server.client.brand import Node
from lm_server.client.connection import LOST


class BrandOutput:
    """An output to two streams: `logits` for each frame, and `text` that grows and ends."""

    def __init__(self, node: Node, logits: str, text: str, origin: Callable[[], Origin]) -> None:
        """`origin` returns the input entry that is being decoded, whose `sync` is copied."""
        self._node, self._logits, self._text, self._origin = node, logits, text, origin
        self._shown = ""

    def show(self, event: Happening) -> None:
        """Add entries.

        Raises:
          ConnectionError: Redis does not answer.
        """
        try:
            self._show(event)
        except LOST as error:
            raise ConnectionError(f"no entry was added ({error})") from error

    def _show(self, event: Happening) -> None:
        if isinstance(event, Progress):
            for frame in event.logits:
                self._add(self._logits, logits=np.asarray(frame, "<f4").tobytes())
            if event.text != self._shown:
                self._shown = event.text
                self._add(self._text, event="partial", text=event.text)
        elif isinstance(event, Began):
            self._shown = ""
            self._add(self._text, event="begin", id=event.id, text="")
        elif isinstance(event, Final):
            answer = event.answer
            self._add(
                self._text,
                event="final",
                id=event.id,
                text=answer.sentence,
                confidence=str(answer.confidence if answer.confidence is not None else ""),
                words=json.dumps([list(word) for word in answer.words]),
            )
        elif isinstance(event, Problem):
            self._node.state("NODE_WARNING", message=event.text)

    def _add(self, stream: str, **fields: bytes | str) -> None:
        origin = self._origin()
        self._node.add(stream, origin.sync, origin.number, **fields)

    def close(self) -> None:
        """Do nothing: the connection belongs to the node."""
