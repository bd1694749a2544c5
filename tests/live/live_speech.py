"""Bins, models, sources and outputs of a live session without a training."""

from __future__ import annotations

import numpy as np

from b2txt_jax.live.events import Final, Progress
from b2txt_jax.live.intake import Health
from b2txt_jax.live.sources.interface import Begin, Bin, End
from b2txt_jax.phonemes import sentence_to_ids
from lm_server.hypothesis import Answer, Hypothesis

SAID = ["how are you today", "the cat sat on the mat", "yes i can see the dog"]
FEATURES = 41


class SpokenModel:
    """Stands for `LiveModel`: four bins are a frame, and a bin's features are its logits."""

    day, frame_seconds, chunk_seconds = "t15.2023.08.11", 0.08, 0.08

    def begin(self):
        self.bins = []

    def push(self, x):
        self.bins += list(x)
        whole = len(self.bins) // 4 * 4
        frames, self.bins = self.bins[:whole:4], self.bins[whole:]
        return np.array(frames, np.float32).reshape(-1, FEATURES)

    def finish(self):
        return np.zeros((0, FEATURES), np.float32)


class ListedSource:
    """Events that are all there at once."""

    def __init__(self, events):
        self.events = list(events)

    def read(self, timeout):
        found, self.events = self.events[:8], self.events[8:]
        return found or None

    def close(self):
        pass


class Heard:
    """An output that keeps what it is shown."""

    def __init__(self):
        self.events = []

    def show(self, event):
        self.events.append(event)

    def close(self):
        pass

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


def bins_of(sentence):
    """Bins [T, 41] that speak a sentence clearly, four for each frame."""
    best = [i for p in sentence_to_ids(sentence.split()) for i in (p, p, 0)]
    return np.repeat(16 * np.eye(FEATURES, dtype=np.float32)[best], 4, axis=0)


def silence(seconds):
    return np.repeat(16 * np.eye(FEATURES, dtype=np.float32)[[0]], round(seconds / 0.02), axis=0)


def events_of(rows, marks=True, truth=None):
    bins = [Bin(row, None, 0.0) for row in rows]
    return [Begin("a trial", truth), *bins, End()] if marks else bins


FINAL = Final(
    "s-1",
    "a trial",
    "t15.2023.08.11",
    Answer(
        (Hypothesis(("the", "cat"), -1.0, -1.0), Hypothesis(("a", "cat"), -2.0, -1.0)),
        0.9,
        (0.6, 1.0),
    ),
    None,
    0.1,
    *np.zeros((2, 8, 512), np.float32),
)
PROGRESS = Progress(
    np.zeros((4, 512), np.float32),
    np.eye(41, dtype=np.float32)[:1] * 9,
    "the",
    0.02,
    Health(dropped=2),
)
