"""The record of a session: what was decoded, what the user confirmed or corrected, the features.

DIR/sentences.jsonl has one JSON object per line, `"event": "final"` or `"chosen"`, which share an
`id`. DIR/features/ID.npz has `raw` (as it arrived, NaN where something was missing) and `features`
(normalised, what the model decoded), float32 [T, D].
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.errors import UserError
from b2txt_jax.live.events import Chosen, Final, Happening
from lm_server.atomic_file import replacing

SENTENCES, FEATURES = "sentences.jsonl", "features"
_ALTERNATIVES = 10


class SentenceLogError(UserError, ValueError):
    """A log that cannot be read."""


class SentenceLog:
    """An output that writes the record."""

    def __init__(self, folder: Path) -> None:
        """Open the folder, and make it where it is not there."""
        self._folder = folder
        (folder / FEATURES).mkdir(parents=True, exist_ok=True)
        self._file = (folder / SENTENCES).open("a", encoding="utf-8")

    def show(self, event: Happening) -> None:
        """Write final sentences and choices. The features are there before the line is."""
        if isinstance(event, Final):
            path = self._folder / FEATURES / f"{event.id}.npz"
            with replacing(path) as unfinished, unfinished.open("wb") as file:
                np.savez(file, raw=event.raw, features=event.features)
            self._write(
                "final",
                id=event.id,
                name=event.name,
                day=event.day,
                text=event.answer.sentence,
                confidence=event.answer.confidence,
                words=[list(word) for word in event.answer.words],
                alternatives=[h.sentence for h in event.answer.hypotheses[:_ALTERNATIVES]],
                truth=event.truth,
                bins=len(event.raw),
                seconds=round(event.seconds, 4),
            )
        elif isinstance(event, Chosen):
            self._write("chosen", id=event.id, text=event.text, corrected=event.corrected)

    def _write(self, event: str, **fields: Any) -> None:
        line = {"event": event, "time": round(time.time(), 3), **fields}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True)
class Confirmed:
    """A sentence whose text the user has confirmed or corrected."""

    id: str
    day: str
    text: str
    features: Path
    """The .npz file."""


def confirmed_sentences(folder: Path) -> Iterator[Confirmed]:
    """Yield what the user confirmed or corrected, with the last text of each, in its order.

    Raises:
      SentenceLogError: a line cannot be read. One that a crash cut short at the end is left out.
    """
    days: dict[str, str] = {}
    texts: dict[str, str] = {}
    path = folder / SENTENCES
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            if entry["event"] == "final":
                days[entry["id"]] = entry["day"]
            else:
                texts[entry["id"]] = entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise SentenceLogError(
                f"{path} line {number} is no entry of the log ({error!r}); needed the lines that "
                "`b2txt stream` wrote: remove this one"
            ) from error
    for id_, day in days.items():
        if id_ in texts:
            yield Confirmed(id_, day, texts[id_], folder / FEATURES / f"{id_}.npz")
