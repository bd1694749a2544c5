"""Whether confidences are what they claim: of those of 0.8, do 80 % prove right?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from b2txt_jax.evaluation.figures import greedy_segments
from b2txt_jax.evaluation.results import SavedTrial
from b2txt_jax.inference.run import TrialLogits
from b2txt_jax.metrics import differences
from lm_server.lexicon.text_rules import normalise, scored_words

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Confidences in bins of equal width. Bins without any are left out.

    Attributes:
      confidence: mean of each bin.
      right: share of each bin that proved right.
      counts: of each bin.
    """

    confidence: np.ndarray
    right: np.ndarray
    counts: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of both, weighed by the counts."""
        return float(np.average(np.abs(self.confidence - self.right), weights=self.counts))


def reliability(pairs: Iterable[tuple[float, bool]], bins: int = BINS) -> Reliability | None:
    """Put (confidence, whether right) into bins. None without any."""
    found = np.array(list(pairs), np.float64).reshape(-1, 2)
    if not len(found):
        return None
    place = np.minimum((found[:, 0] * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, found[:, column], bins)[counts > 0] for column in (0, 1)]
    counts = counts[counts > 0]
    return Reliability(sums[0] / counts, sums[1] / counts, counts)


def phoneme_pairs(outputs: Iterable[TrialLogits]) -> Iterable[tuple[float, bool]]:
    """Yield for each greedily decoded phoneme its mean probability over its frames, and whether a
    best alignment has it in its place."""
    for trial in outputs:
        if trial.labels is None:
            continue
        best = trial.logits.max(1, keepdims=True)
        probability = 1 / np.exp(trial.logits - best).sum(1)
        segments = greedy_segments(trial.logits)
        found = [one.phoneme for one in segments]
        right = _agreeing(trial.labels.tolist(), found)
        for one, fits in zip(segments, right, strict=True):
            yield float(probability[one.start : one.end].mean()), fits


def word_pairs(trials: Iterable[SavedTrial]) -> Iterable[tuple[float, bool]]:
    """Yield the confidence of each decoded word and whether it is in its place."""
    for trial in trials:
        confidences = trial.answer.get("word_confidences") or ()
        words = (trial.decoded or "").split()
        if trial.true is None or len(words) != len(confidences):
            continue
        right = _agreeing(scored_words(trial.true), [normalise(word) for word in words])
        yield from zip(map(float, confidences), right, strict=True)


def sentence_pairs(trials: Iterable[SavedTrial]) -> Iterable[tuple[float, bool]]:
    """Yield the confidence of each sentence and whether all of it is right."""
    for trial in trials:
        confidence = trial.answer.get("confidence")
        if confidence is not None and trial.wer is not None:
            yield float(confidence), trial.wer.errors == 0


def _agreeing(reference: Sequence[object], decoded: Sequence[object]) -> list[bool]:
    stretches = differences(list(reference), list(decoded))
    return [one.same for one in stretches for _ in one.decoded]
