"""A causal language model asked during the search, not only after it (delayed fusion).

Every `fuse_frames` frames the best hypotheses' words go to the model in one batch. Until its scores
are there, and for all other hypotheses, the n-gram model stands in. flashlight's decoder asks for a
score when a word is completed, and never changes one afterwards. So the difference that the model's
score makes is added with the next word, or at the sentence's end:

    difference = fuse_weight * alpha * (llm - ngram)

Every word sequence has one state of its own, whose difference is decided when it is first
completed. So the sums are exact however the paths to it meet.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from flashlight.lib.text.decoder import LM, DecodeResult, LMState

from lm_server.hypothesis import Hypothesis, rank
from lm_server.search.flashlight import BeamSearch, LanguageModel
from lm_server.search.hot_words import HotWord
from lm_server.search.interface import NO_HOT_WORDS, BackendError, SearchModel, next_frames
from lm_server.settings import Settings

_LOG = logging.getLogger(__name__)
_LOG10 = math.log(10.0)
_Words = tuple[int, ...]


class Growing(Protocol):
    """A large language model's scores of the unfinished sentences of one search."""

    def score(self, sentences: Sequence[str], length_penalty: float = 0.0) -> np.ndarray:
        """Return log-probabilities (ln), float64 [sentences]."""


class AtOnce(Executor):
    """Does work when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Do the work and return its result."""
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


class FusedModel:
    """A model folder in memory whose searches ask a large language model.

    See `lm_server.search.interface.SearchModel`.
    """

    def __init__(
        self, model: SearchModel, growing: Callable[[], Growing], aside: bool = False
    ) -> None:
        """Use a model folder.

        Args:
          model: of the search flashlight.
          growing: returns scores for a new sentence.
          aside: ask in a thread beside the searches, which go on with the n-gram model meanwhile.
            Answers then depend on the time that it takes.

        Raises:
          BackendError: the search cannot ask a model.
        """
        if not isinstance(model, LanguageModel):
            raise BackendError(
                f"the search {model.backend} cannot ask a large language model before the sentence "
                "is finished: use --backend flashlight, or leave --fuse out"
            )
        growing()
        self.model, self._growing = model, growing
        self.folder, self.backend = model.folder, model.backend
        self._executor = ThreadPoolExecutor(1, "fusion") if aside else AtOnce()

    @property
    def words(self) -> Sequence[str]:
        """Its vocabulary."""
        return self.model.words

    def search(
        self, settings: Settings, hot_words: Mapping[str, HotWord] = NO_HOT_WORDS
    ) -> FusedSearch:
        """Return a new search."""
        return FusedSearch(self.model, settings, hot_words, self._growing, self._executor)

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(cancel_futures=True)


@dataclasses.dataclass(slots=True)
class _History:
    """Words that some hypotheses of the search have. All scores are log10, as KenLM's.

    Attributes:
      before: the words without the last. None: there are none.
      ngram: n-gram score.
      paid: difference that the totals of these hypotheses contain.
      own: difference by the model's score of these words themselves. None: it has not been asked.
      following: word -> the state behind it, and the score for it.
    """

    before: _History | None = None
    ngram: float = 0.0
    paid: float = 0.0
    own: float | None = None
    following: dict[int, tuple[LMState, float]] = dataclasses.field(default_factory=dict)

    @property
    def known(self) -> float:
        """The difference that the totals should contain: that of the longest beginning which the
        model has scored. It may have been scored after the words behind it were completed."""
        history = self
        while history.own is None and history.before is not None:
            history = history.before
        return history.own or 0.0


class _FusedScores(LM):
    """The n-gram model's scores, and the differences known by the time that a word is completed."""

    def __init__(self, ngram: LM) -> None:
        LM.__init__(self)
        self._ngram = ngram

    def start(self, start_with_nothing: bool) -> LMState:
        self._first: LMState = self._ngram.start(start_with_nothing)
        # The keys keep the states' Python objects, by which a state is recognised.
        self._of: dict[LMState, _History] = {self._first: _History(own=0.0)}
        return self._first

    def score(self, state: LMState, word: int) -> tuple[LMState, float]:
        history = self._of[state]
        found = history.following.get(word)
        if found is None:
            behind, log10 = self._ngram.score(state, word)
            known = history.known
            self._of[behind] = _History(history, history.ngram + log10, known)
            found = history.following[word] = (behind, log10 + known - history.paid)
        return found

    def finish(self, state: LMState) -> tuple[LMState, float]:
        history = self._of[state]
        end, log10 = self._ngram.finish(state)
        return end, log10 + history.known - history.paid

    def history(self, words: Sequence[int]) -> _History:
        """Return what is known of words that the search has completed."""
        state = self._first
        for word in words:
            state = self._of[state].following[word][0]
        return self._of[state]


class FusedSearch(BeamSearch):
    """The search for one sentence after another, which asks a large language model meanwhile."""

    _ngram: _FusedScores

    def __init__(
        self,
        model: LanguageModel,
        settings: Settings,
        hot_words: Mapping[str, HotWord],
        growing: Callable[[], Growing],
        executor: Executor,
    ) -> None:
        self._growing, self._executor = growing, executor
        self._batch: tuple[list[_Words], Future[np.ndarray]] | None = None
        super().__init__(model, settings, hot_words)

    @staticmethod
    def _scoring(ngram: LM) -> LM:
        return _FusedScores(ngram)

    def begin(self, settings: Settings | None = None) -> None:
        """Start a sentence and drop the current one."""
        super().begin(settings)
        if self._batch is not None:
            self._batch[1].cancel()
        self._batch = None
        settings = self.settings
        self._asking = bool(settings.do_opt and settings.fuse_weight and settings.alpha)
        self._beam = min(settings.fuse_beam, settings.lattice_beam)
        self._informed = False
        self._scores = self._growing()
        self._differences: dict[tuple[str, ...], float] = {}

    def step(self, logits: np.ndarray) -> tuple[str, ...]:
        """Search the next frames. Return the best words so far."""
        # Checked as a whole first: a sentence is unchanged by what it cannot take.
        logits = next_frames(logits, self.frames)
        every = self.settings.fuse_frames
        while len(logits) and self.frames + len(logits) >= (after := self._next(every)):
            part, logits = logits[: after - self.frames], logits[after - self.frames :]
            super().step(part)
            self._ask()
        return super().step(logits)

    def _next(self, every: int) -> int:
        """Return the frame at which the model is asked next."""
        return (self.frames // every + 1) * every

    def _before_end(self) -> None:
        """Ask once more where that is waited for. Otherwise use what has come in time."""
        if isinstance(self._executor, AtOnce):
            self._ask()
        else:
            self._take()

    def _ask(self) -> None:
        """Submit the best hypotheses' new words, unless the last batch is still under way."""
        self._take()
        if not self._asking or self._batch is not None:
            return
        new = self._new_words()
        if new:
            sentences = [" ".join(self._words(list(words))) for words in new]
            penalty = self.settings.length_penalty
            self._batch = (
                new,
                self._executor.submit(self._scores.score, sentences, penalty),
            )
            self._take()

    def _new_words(self) -> list[_Words]:
        """Return the word sequences of the best hypotheses that the model has not scored.

        They are the best by their totals with the differences that are not paid yet.
        """
        totals: dict[_Words, float] = {}
        due: dict[_Words, float] = {}
        for result in self._decoder.get_all_final_hypothesis():
            words = _completed(result)
            if words not in due:
                history = self._ngram.history(words)
                due[words] = (history.known - history.paid) * _LOG10
            totals[words] = max(totals.get(words, -math.inf), result.score + due[words])
        # What the answer would leave out is not asked.
        least = max(totals.values(), default=0.0) - self._beam
        near = [words for words, total in totals.items() if total >= least]
        best = sorted(near, key=lambda words: -totals[words])[: self.settings.fuse_hypotheses]
        return sorted(words for words in best if self._ngram.history(words).own is None)

    def _take(self) -> None:
        """Use the scores of the last batch, if they are there."""
        if self._batch is None or not self._batch[1].done():
            return
        (asked, answer), self._batch = self._batch, None
        try:
            scores = answer.result()
            if not np.isfinite(scores).all():
                raise ValueError("scores that are not finite")
        # A model's library may fail with anything. The sentence must still be searched.
        except Exception as error:
            self._asking = self._informed = False
            _LOG.warning(
                "the rest of a sentence is searched by the n-gram model alone, since the large "
                "language model failed (%s: %s)",
                *(type(error).__name__, error),
            )
            return
        self._informed = True
        weight = self.settings.fuse_weight * self.settings.alpha
        for words, llm in zip(asked, scores, strict=True):
            history = self._ngram.history(words)
            history.own = weight * (float(llm) / _LOG10 - history.ngram)

    def _hypothesis(self, result: DecodeResult, surplus: float) -> Hypothesis:
        """Return a hypothesis whose scores are kept apart, as without fusion."""
        found = super()._hypothesis(result, surplus)
        difference = self._ngram.history(_completed(result)).known * _LOG10
        self._differences[found.words] = difference
        return dataclasses.replace(found, ngram=found.ngram - difference)

    def _ranked(self, found: list[Hypothesis]) -> tuple[Hypothesis, ...]:
        """Return the best by their fused totals, in the order of the search's own scores."""
        settings = self.settings
        every = rank(found, settings.acoustic_scale, len(found))
        fused = {one.words: (one.total or 0.0) + self._differences[one.words] for one in every}
        # Totals that hold no score of the model's say little about what it will prefer.
        beam = self._beam if self._informed else settings.lattice_beam
        least = max(fused.values(), default=0.0) - beam
        best = sorted(every, key=lambda one: -fused[one.words])[: settings.nbest]
        kept = [one for one in best if fused[one.words] >= least]
        return rank(kept, settings.acoustic_scale, len(kept))


def _completed(result: DecodeResult) -> _Words:
    return tuple(word for word in result.words if word >= 0)
