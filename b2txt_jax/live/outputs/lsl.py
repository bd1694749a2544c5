"""Final sentences as samples of an outlet of the lab streaming layer."""

from __future__ import annotations

import json
from typing import Any

from b2txt_jax.live.events import Chosen, Final, Happening
from b2txt_jax.live.sources.lsl import pylsl, split_url


class LslOutlet:
    """An output with one channel of text: a JSON object for each sentence and each choice."""

    def __init__(self, url: str) -> None:
        """Open the outlet of `lsl://NAME`.

        Raises:
          SourceError: the URL has no name, or pylsl is not installed.
        """
        name, _ = split_url(url, "--publish")
        package = pylsl()
        info = package.StreamInfo(name, "Text", 1, 0.0, "string", f"b2txt-{name}")
        self._outlet = package.StreamOutlet(info)

    def show(self, event: Happening) -> None:
        """Send a sample."""
        if isinstance(event, Final):
            answer = event.answer
            value: dict[str, Any] = {"event": "final", "id": event.id, "name": event.name}
            value |= {
                "text": answer.sentence,
                "confidence": answer.confidence,
                "words": [list(word) for word in answer.words],
            }
        elif isinstance(event, Chosen):
            value = {"event": "chosen", "id": event.id, "text": event.text}
            value["corrected"] = event.corrected
        else:
            return
        self._outlet.push_sample([json.dumps(value)])

    def close(self) -> None:
        """Close the outlet."""
        del self._outlet
