"""Answer now, or after rescoring, or with the n-gram answer if rescoring fails or is late."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from lm_server.hypothesis import Answer, Hypothesis
from lm_server.rescoring.ranking import augmenting, ranked_answer, ranking, sentences_to_score
from lm_server.rescoring.scorer import RescoringError, SentenceScorer, checked_scores
from lm_server.search.sliced import Sliced, finished
from lm_server.settings import Settings

_LOG = logging.getLogger(__name__)
_MERGED = 8
"""Waiting sentences in one batch at most, so that none waits long for the others."""


class PendingAnswer:
    """The answer to a finished sentence, as soon as it is there.

    It is settled once: by the rescoring, or by the first `result` past the deadline.

    Attributes:
      deadline: time.monotonic() from which the n-gram answer is used. May be moved, for example to
        0.0 for an answer now.
    """

    def __init__(
        self,
        candidates: tuple[Hypothesis, ...],
        ngram_answer: Answer,
        settings: Settings,
        context: str,
        seconds: float,
    ) -> None:
        """Prepare an unsettled answer. `Answering.submit` makes it.

        Args:
          candidates: augmented, ranked by the search's scores.
          ngram_answer: the answer without a large language model.
          settings: of the sentence.
          context: what was said before.
          seconds: until the deadline.
        """
        self.deadline = time.monotonic() + seconds
        self.sentences = sentences_to_score(candidates, settings)
        self.batch_key = (context, settings.length_penalty)
        """What sentences of one batch have in common."""
        self._candidates, self._settings, self._seconds = candidates, settings, seconds
        self._ngram_answer = ngram_answer
        self._answer: Answer | None = None
        self._settled = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    @property
    def settled(self) -> bool:
        """Whether the answer is there. It does not change any more."""
        return self._settled.is_set()

    def done(self) -> bool:
        """Whether `result` returns at once: settled, or past the deadline."""
        return self.settled or time.monotonic() >= self.deadline

    def wait(self, seconds: float) -> bool:
        """Wait until done, at most `seconds`. Return `done()`."""
        left = min(seconds, self.deadline - time.monotonic(), threading.TIMEOUT_MAX)
        self._settled.wait(max(0.0, left))
        return self.done()

    def result(self) -> Answer:
        """Wait until done and return the answer. Never raises for the rescoring's sake.

        If rescoring failed or is late, it is the n-gram answer and its `problem` says why.
        """
        self.wait(math.inf)
        if not self.settled:
            self.settle(None, f"the large language model took longer than {self._seconds:g} s")
        assert self._answer is not None
        return self._answer

    def on_done(self, callback: Callable[[], None]) -> None:
        """Call back once when settled, at once if it is already, maybe in the rescoring thread.

        The deadline passes without a call.
        """
        with self._lock:
            if not self.settled:
                self._callbacks.append(callback)
                return
        callback()

    def settle(self, scores: dict[str, float] | None, problem: str | None = None) -> None:
        """Rank with the scores, or without because of `problem`. Only the first call counts."""
        answer = dataclasses.replace(self._ngram_answer, problem=problem)
        if scores is not None:
            try:
                answer = ranked_answer(self._candidates, self._settings, scores)
            # The sentence must still get its n-gram answer, and the thread go on with the others.
            except Exception as error:
                _LOG.exception("ranking with the large language model's scores failed")
                answer = dataclasses.replace(answer, problem=f"{type(error).__name__}: {error}")
        with self._lock:
            if self.settled:
                return
            self._answer = answer
            self._settled.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            # A caller's fault must not end the rescoring of the other sentences.
            except Exception:
                _LOG.exception("the callback of an answer failed")


class Answering:
    """Makes answers of the search's candidates, with a rescoring thread where there is a scorer.

    Sentences are rescored in the order of submission. Those that wait when a batch ends go into the
    next one together, as far as context and length penalty are the same. So a sentence waits for
    one batch besides its own at most.
    """

    def __init__(self, scorer: SentenceScorer | None = None, seconds: float = math.inf) -> None:
        """Start the thread.

        Args:
          scorer: None: every answer is the n-gram model's, at once.
          seconds: from submission until the n-gram answer is used instead.
        """
        self._scorer, self._seconds = scorer, seconds
        self._queue: deque[PendingAnswer] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        if scorer is not None:
            self._thread = threading.Thread(
                target=self._work, args=(scorer,), name="rescoring", daemon=True
            )
            self._thread.start()

    def submit(
        self, hypotheses: Sequence[Hypothesis], settings: Settings, context: str = ""
    ) -> PendingAnswer:
        """Accept a finished sentence's candidates.

        It is answered at once without a scorer, with `do_opt` 0, and where there are no words.
        After `close` it is answered by the n-gram model, with the `problem`.
        """
        return finished(self.submitting(hypotheses, settings, context))

    def submitting(
        self, hypotheses: Sequence[Hypothesis], settings: Settings, context: str = ""
    ) -> Sliced[PendingAnswer]:
        """Do as `submit` does. Yield between slices of the work on long sentences."""
        candidates = yield from augmenting(hypotheses, settings)
        # Made here, where a fault is the caller's, and not in the thread that serves all.
        answer = yield from ranking(candidates, settings)
        pending = PendingAnswer(candidates, answer, settings, context, self._seconds)
        problem = None
        if self._scorer is not None and pending.sentences:
            with self._changed:
                if not self._closed:
                    self._queue.append(pending)
                    self._changed.notify()
                    return pending
            problem = "the rescoring is closed: the server is stopping"
        pending.settle(None, problem)
        return pending

    @property
    def waiting(self) -> int:
        """Number of sentences that no batch holds yet."""
        return len(self._queue)

    def close(self) -> None:
        """Settle what was submitted and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _work(self, scorer: SentenceScorer) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                batch = self._next_batch()
                if not batch and self._closed and not self._queue:
                    return
            if batch:
                _rescore(scorer, batch)

    def _next_batch(self) -> list[PendingAnswer]:
        """Take the first that wait, as far as they have one batch key and are still wanted."""
        batch: list[PendingAnswer] = []
        while self._queue and len(batch) < _MERGED:
            if batch and self._queue[0].batch_key != batch[0].batch_key:
                break
            pending = self._queue.popleft()
            if not pending.settled:
                batch.append(pending)
        return batch


def _rescore(scorer: SentenceScorer, batch: Sequence[PendingAnswer]) -> None:
    sentences = list(dict.fromkeys(one for pending in batch for one in pending.sentences))
    scores: dict[str, float] | None = None
    problem: str | None = None
    try:
        scores = checked_scores(scorer, sentences, *batch[0].batch_key)
    except RescoringError as error:
        if len(batch) > 1:
            # One sentence's fault must not be the others'.
            for pending in batch:
                _rescore(scorer, [pending])
            return
        problem = str(error)
    for pending in batch:
        pending.settle(scores, problem)
