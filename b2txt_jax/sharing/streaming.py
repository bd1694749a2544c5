"""Decode with a shared model in plain JAX: this file needs jax, flatbuffers, numpy and
safetensors alone.

    stream = Stream("MODEL_FOLDER", day="t15.2023.08.13")
    logits = stream.push(features)  # z-scored, [T, features] of 20 ms bins -> float32 [frames, 41]

Chunks may have any length. The frames of all chunks together are those of the whole recording.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.export
import numpy as np
from safetensors.numpy import load_file


class Stream:
    """Decoder of one recording. It keeps the bins that the next frame needs."""

    def __init__(self, folder: Path | str, day: str | None = None) -> None:
        """Read the model. `day` may be left out where the model has one, or one layer for all.

        Raises:
          ValueError: the model does not know the day.
        """
        folder = Path(folder)
        self.about: dict[str, Any] = json.loads((folder / "streaming.json").read_text())
        days = self.about["days"]
        if day is None and (len(days) == 1 or not self.about["days_differ"]):
            day = days[0]
        if day not in days:
            raise ValueError(f"the day is {day!r}; needed one of {', '.join(days)}")
        self._day = np.array([days.index(day)], np.int32)
        arrays = load_file(folder / "model.safetensors")
        self._params = [
            np.stack([arrays[name] for name in leaf["names"]]).reshape(leaf["shape"])
            for leaf in self.about["parameters"]
        ]
        self._steps = [
            jax.export.deserialize(bytearray((folder / name).read_bytes()))
            for name in self.about["programs"]
        ]
        self._state = load_state(folder)
        self._taps = np.array(self.about["smoothing"], np.float32)
        self._raw = np.zeros((0, self.about["features"]), np.float32)
        self._smoothed = self._raw
        self._done = 0

    def push(self, features: np.ndarray) -> np.ndarray:
        """Take the next bins, [T, features]. Return the logits of the frames that they complete."""
        self._raw = np.concatenate([self._raw, np.asarray(features, np.float32)])
        length = len(self._raw) - len(self._taps) + 1
        if length > 0:
            smoothed = np.zeros((length, self._raw.shape[1]), np.float32)
            for place, tap in enumerate(self._taps):
                smoothed += tap * self._raw[place : place + length]
            self._raw = self._raw[length:]
            self._smoothed = np.concatenate([self._smoothed, smoothed])
        found = [np.zeros((0, self.about["classes"]), np.float32)]
        chunk = self.about["chunk"]
        while len(self._smoothed) >= chunk:
            # The first programs are of a state that is not full yet. The last one repeats.
            step = self._steps[min(self._done, len(self._steps) - 1)]
            bins, self._smoothed = self._smoothed[:chunk], self._smoothed[chunk:]
            logits, self._state = step.call(self._params, bins[None], self._day, self._state)
            found.append(np.asarray(logits[0]))
            self._done += 1
        return np.concatenate(found)


def load_state(folder: Path) -> list[np.ndarray]:
    """Return the arrays of the state before the first bin."""
    with np.load(folder / "streaming_start.npz") as file:
        return [file[str(number)] for number in range(len(file.files))]
