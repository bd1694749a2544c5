"""An entry in a Redis stream for every final sentence and every choice of the user."""

from __future__ import annotations

import json
import threading
from typing import Any

from b2txt_jax.live.events import Chosen, Final, Happening
from b2txt_jax.live.sources.redis_stream import split_url
from lm_server.client.connection import LOST, connect

_KEPT_ENTRIES = 1000
_WAIT_SECONDS = 10.0


class Publisher:
    """An output to the stream that `--publish` names."""

    def __init__(self, url: str) -> None:
        """Connect.

        Raises:
          SourceError: the URL names no stream.
          RedisUnavailableError: no Redis answers.
        """
        address, self._stream = split_url(url, "--publish")
        self._redis: Any = connect(address, _WAIT_SECONDS, threading.Event())
        self._unsent: list[dict[str, str]] = []

    def show(self, event: Happening) -> None:
        """Send an entry. What an outage kept back is sent with the next one.

        Raises:
          ConnectionError: Redis does not take it. It is kept.
        """
        if isinstance(event, Final):
            confidence = event.answer.confidence
            fields = {
                "event": "final",
                "name": event.name,
                "text": event.answer.sentence,
                "confidence": "" if confidence is None else str(confidence),
                "words": json.dumps([list(word) for word in event.answer.words]),
            }
        elif isinstance(event, Chosen):
            fields = {"event": "chosen", "text": event.text, "corrected": str(int(event.corrected))}
        else:
            return
        self._unsent.append({"id": event.id, **fields})
        try:
            while self._unsent:
                self._redis.xadd(self._stream, self._unsent[0], maxlen=_KEPT_ENTRIES)
                del self._unsent[0]
        except LOST as error:
            raise ConnectionError(
                f"{error}; sentences and choices to be sent: {len(self._unsent)}"
            ) from error

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()
