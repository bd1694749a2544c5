"""The record of a session: what was decoded, what the user confirmed or corrected, the features.

`b2txt_jax.data.sentence_log` describes the files and reads them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.data.sentence_log import FEATURES, SENTENCES
from b2txt_jax.live.events import Chosen, Final, Happening
from lm_server.files.atomic_file import replacing

_ALTERNATIVES = 10


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
