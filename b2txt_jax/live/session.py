"""The loop of live decoding: bins, frames, words, and when a sentence begins and ends."""

from __future__ import annotations

import collections
import itertools
import queue
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from b2txt_jax.live.events import Began, Chosen, Final, Happening, Output, Problem, Progress
from b2txt_jax.live.intake import Intake
from b2txt_jax.live.model import LiveModel
from b2txt_jax.live.sources.interface import Begin, Bin, End, Source, SourceError
from b2txt_jax.live.words import Words
from lm_server.client.answers import LanguageModelError, LanguageModelUnavailableError
from lm_server.protocol import BLANK, CLASSES, SILENCE

LONGEST_SECONDS = 120.0
"""Of bins. A sentence is ended then: the message that ends it must have been lost."""
_IDLE_SECONDS = 10.0
"""With sentences by silence, the model begins anew after so long without speech. It was trained on
trials, which begin with a short silence."""
_KEPT_BINS = 25
_CLEAR_SECONDS = 1.0
"""After less silence than this the last bins hold speech, which the next sentence must not hear."""
_KEPT_FRAMES = 6
_READ_SECONDS = 0.05
_ONE_PRESS = 1.0
"""Signals within so many seconds are one: some launchers forward what the terminal sends."""
_QUIET = (CLASSES.index(BLANK), CLASSES.index(SILENCE))

Rule = Literal["message", "silence", "key"]
RULES: tuple[Rule, ...] = ("message", "silence", "key")


@dataclass(frozen=True)
class Toggle:
    """A key: begin a sentence, or end the one in progress."""


@dataclass(frozen=True)
class Stop:
    """End the session."""


Command = Toggle | Stop | Chosen


@contextmanager
def stopped_by_signals(commands: queue.SimpleQueue[Command]) -> Iterator[None]:
    """End the session in order at the first Ctrl-C or SIGTERM. A later one interrupts it."""
    before: dict[int, Any] = {}
    first: list[float] = []

    def stop(number: int, _: Any) -> None:
        if not first:
            first.append(time.monotonic())
            commands.put(Stop())
        elif time.monotonic() - first[0] > _ONE_PRESS:
            signal.signal(number, before[number] or signal.SIG_DFL)
            signal.raise_signal(number)

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


Times = collections.deque[float]


def _times() -> Times:
    """Return an empty list that keeps the last two hours of chunks."""
    return collections.deque(maxlen=100_000)


@dataclass
class Latency:
    """Times of a session, in seconds."""

    partial: Times = field(default_factory=_times)
    """From the arrival of the last bin of a chunk to its text."""
    final: Times = field(default_factory=_times)
    """From the end of a sentence to its answer."""
    first: Times = field(default_factory=_times)
    """From the beginning of a sentence to its first word."""
    chunks: int = 0
    missed: int = 0
    """Chunks whose text came later than the next chunk."""
    revised: int = 0
    """Words that were shown and replaced later."""
    words: int = 0
    """Of final sentences."""

    def decoded(self, delay: float, period: float) -> None:
        """Count a chunk whose text came so long after its last bin. The next is due then."""
        self.partial.append(delay)
        self.chunks += 1
        self.missed += delay > period

    def figures(self) -> dict[str, float]:
        """Return milliseconds, and counts."""
        found: dict[str, float] = {}
        for name, times in (("partial", self.partial), ("final", self.final)):
            for share in (50, 99):
                if times:
                    value = 1000 * float(np.percentile(times, share))
                    found[f"{name}_ms_p{share}"] = round(value, 1)
        if self.first:
            found["first_word_s_p50"] = round(float(np.median(self.first)), 2)
        found |= {"chunks": self.chunks, "deadline_misses": self.missed}
        found["revisions_per_word"] = round(self.revised / max(self.words, 1), 3)
        return found


def replaced(shown: Sequence[str], words: Sequence[str]) -> int:
    """Return how many of the words that were shown are not where they were.

    >>> replaced(["the", "cat", "sat"], ["the", "bat", "sat", "down"])
    2
    """
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shown, words, strict=False))
    return len(shown) - len(list(same))


class LiveSession:
    """A source, a model, a language model and those who are informed."""

    def __init__(
        self,
        source: Source,
        intake: Intake,
        model: LiveModel,
        words: Words,
        outputs: Sequence[Output],
        rule: Rule = "message",
        silence_seconds: float = 1.5,
        commands: queue.SimpleQueue[Command] | None = None,
        new_id: Callable[[int], str] | None = None,
    ) -> None:
        """Prepare.

        Args:
          source: of bins.
          intake: that makes them whole.
          model: that decodes them, warmed up.
          words: the language model.
          outputs: that are informed of everything.
          rule: what begins and ends a sentence: the source's messages, silence, or a key. A message
            and a key always end one.
          silence_seconds: of blank and silence that end a sentence.
          commands: of keys and of the page.
          new_id: names a sentence by its number in the session.
        """
        self._source, self._intake, self._model, self._words = source, intake, model, words
        self._outputs, self._rule = outputs, rule
        self._quiet_frames = silence_seconds / model.frame_seconds
        self._commands: queue.SimpleQueue[Command] = commands or queue.SimpleQueue()
        self._new_id = new_id or f"{time.strftime('%Y%m%dT%H%M%S')}-{{}}".format
        self.latency = Latency()
        self.sentences = 0
        """That have an answer."""
        self.unanswered: list[str] = []
        """What was said, where it is known, in sentences that have none."""
        self._begun = 0
        self._running = False
        self._open: Begin | None = None
        self._recent: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque(
            maxlen=_KEPT_BINS
        )
        self._forget()

    def run(self) -> None:
        """Decode until the source ends or a command stops it. A sentence in progress is ended.

        Raises:
          SourceError: the source will give no more.
          LanguageModelUnavailableError: the server was not found again.
        """
        while not self._handle_commands():
            try:
                events = self._source.read(_READ_SECONDS)
            except SourceError:
                self._end()
                raise
            if events is None:
                break
            for event in events:
                if isinstance(event, Bin):
                    self._bin(event)
                elif isinstance(event, End):
                    self._end()
                elif self._rule == "message":
                    self._end()
                    self._begin(event)
        self._end()

    def inform(self, event: Happening) -> None:
        """Inform all outputs. One whose disk or connection fails does not stop decoding."""
        for output in self._outputs:
            try:
                output.show(event)
            except OSError as error:
                if isinstance(event, Problem):
                    continue  # or it would be informed of its own failure for ever
                self.inform(Problem(f"{type(output).__name__} failed: {error}"))

    def _handle_commands(self) -> bool:
        """Return whether the session is to stop."""
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, Stop):
                return True
            if isinstance(command, Chosen):
                self.inform(command)
            elif self._open is not None:
                self._end()
            elif self._rule != "silence":
                self._begin(Begin())
        return False

    def _forget(self) -> None:
        """Forget the bins and frames of the last sentence."""
        self._raw: list[np.ndarray] = []
        self._features: list[np.ndarray] = []
        self._new: list[np.ndarray] = []
        self._frames: list[np.ndarray] = []
        self._quiet = self._decoded = 0
        self._shown: list[str] = []

    def _start_model(self) -> None:
        self._forget()
        self._model.begin()
        self._running = True

    def _begin(self, begin: Begin) -> None:
        if not self._running:
            self._start_model()
        # A sentence without an answer has an id too: its problem names it.
        self._begun += 1
        self._open, self._id = begin, self._new_id(self._begun)
        self._began = time.monotonic()
        self._words.begin()
        self.inform(Began(self._id, begin.name))

    def _bin(self, bin_: Bin) -> None:
        pieces = [self._intake.take(bin_)]
        if not self._running:
            if self._rule != "silence":
                return
            self._start_model()
            pieces = [*self._recent, *pieces]
        self._recent.append(pieces[-1])
        for raw, features in pieces:
            if self._running:
                self._feed(raw, features, bin_.time)

    def _feed(self, raw: np.ndarray, features: np.ndarray, arrived: float) -> None:
        self._raw.append(raw)
        self._features.append(features)
        self._new.append(features)
        logits = self._model.push(features)
        if not len(logits):
            return
        best = logits.argmax(axis=1)
        speech = np.flatnonzero(~np.isin(best, _QUIET))
        self._quiet = len(best) - 1 - int(speech[-1]) if len(speech) else self._quiet + len(best)
        if self._open is None:
            self._frames = [*self._frames, logits][-_KEPT_FRAMES:]
            if not len(speech):
                if sum(map(len, self._features)) * 0.02 > _IDLE_SECONDS:
                    self._running = False
                return
            self._begin(Begin())
            logits = np.concatenate(self._frames)
        self._decode(logits, arrived)
        if self._rule == "silence" and self._quiet >= self._quiet_frames:
            self._end()
        elif self._decoded * self._model.frame_seconds > LONGEST_SECONDS:
            why = f"sentence {self._id} is ended: nothing has ended it for {LONGEST_SECONDS:g} s"
            self._end()
            self.inform(Problem(why))

    def _decode(self, logits: np.ndarray, arrived: float) -> None:
        self._decoded += len(logits)
        text = self._words.send(logits)
        delay = time.monotonic() - arrived
        words = text.split()
        self.latency.revised += replaced(self._shown, words)
        if words and not self._shown:
            self.latency.first.append(time.monotonic() - self._began)
        self._shown = words
        self.latency.decoded(delay, self._model.chunk_seconds)
        # None are new where the end of a sentence completes its last frame.
        new = np.concatenate([np.zeros((0, self._intake.features), np.float32), *self._new])
        self._new = []
        self.inform(Progress(new, logits, text, delay, self._intake.health))

    def _end(self) -> None:
        """End the sentence in progress, if there is one."""
        if self._open is None:
            return
        ended, begin = time.monotonic(), self._open
        if self._quiet * self._model.frame_seconds < _CLEAR_SECONDS:
            self._recent.clear()
        logits = self._model.finish()
        if len(logits):
            self._decode(logits, ended)
        self._open, self._running = None, False
        try:
            answer = self._words.finalize()
        except LanguageModelUnavailableError:
            raise
        except LanguageModelError as error:
            self._unanswered(begin, f"sentence {self._id} has no answer: {error}")
            return
        seconds = time.monotonic() - ended
        bins = sum(map(len, self._raw))
        if not answer.hypotheses:
            self._unanswered(begin, f"sentence {self._id} has {bins} bins, too few for a frame")
            return
        self.sentences += 1
        self.latency.final.append(seconds)
        self.latency.words += len(answer.words)
        self.inform(
            Final(
                self._id,
                begin.name,
                self._model.day,
                answer,
                begin.truth,
                seconds,
                np.concatenate(self._raw),
                np.concatenate(self._features),
            )
        )

    def _unanswered(self, begin: Begin, why: str) -> None:
        if begin.truth is not None:
            self.unanswered.append(begin.truth)
        self.inform(Problem(why))
