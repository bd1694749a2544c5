"""n-best lists as arrays, with everything that re-ranking needs.

Searching is slow and re-ranking is fast. The hypotheses of one search keep their scores apart, so
that scales, alphas and bonuses near the search's can be tried without searching again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lm_server.hypothesis import Hypothesis
from lm_server.rescoring.ranking import augmented, posterior
from lm_server.settings import LIMITS, Settings
from lm_server.tuning.references import word_errors

_SAMPLES = 1500
_SCALE_RANGE = 2.0
"""Re-ranking tries acoustic scales within this factor of the search's."""
_BONUS_RANGE = 2.0
"""Re-ranking tries word bonuses within this distance (ln) of the search's."""
_DIVISIONS = 4
_AS_GOOD = 20
"""Best samples whose median is preferred to the very best one, which is partly luck."""


@dataclass(frozen=True)
class Lists:
    """The hypotheses of every trial under one search, as padded arrays [trials, hypotheses].

    Attributes:
      settings: the settings of the search.
      sentences: every trial's hypotheses, augmented.
      acoustic, ngram, bonus, llm, words: scores (ln) and numbers of words. `llm` is 0 without a
        model.
      errors: word errors. In padding, the number of words of the reference.
      valid: False in padding.
      reference_words: number of words of every reference [trials].
      rescored: whether `llm` holds a model's scores.
    """

    settings: Settings
    sentences: tuple[tuple[str, ...], ...]
    acoustic: np.ndarray
    ngram: np.ndarray
    bonus: np.ndarray
    llm: np.ndarray
    words: np.ndarray
    errors: np.ndarray
    valid: np.ndarray
    reference_words: np.ndarray
    rescored: bool = False

    def totals(self, settings: Settings) -> np.ndarray:
        """Return the totals of `ranked_answer` under other settings."""
        language = self.ngram
        if self.rescored:
            language = (1.0 - settings.alpha) * self.ngram + settings.alpha * self.llm
        bonus = self.bonus + (settings.word_bonus - self.settings.word_bonus) * self.words
        totals = settings.acoustic_scale * self.acoustic + language + bonus
        valid = self.valid
        if self.rescored:
            # A hypothesis without words has no score. It counts only where there is no other.
            worded = self.valid & (self.words > 0)
            valid = np.where(worded.any(axis=1, keepdims=True), worded, self.valid)
        return np.where(valid, totals, -math.inf)

    def errors_of_best(self, settings: Settings) -> np.ndarray:
        """Return the word errors of every trial's best hypothesis, [trials]."""
        if not self.errors.shape[1]:
            return self.reference_words
        best = self.totals(settings).argmax(axis=1)
        found: np.ndarray = np.take_along_axis(self.errors, best[:, None], axis=1)[:, 0]
        return found

    def oracle(self) -> np.ndarray:
        """Return the word errors of every trial's hypothesis nearest to the truth, [trials]."""
        if not self.errors.shape[1]:
            return self.reference_words
        least: np.ndarray = self.errors.min(axis=1)
        return least

    def of(self, trials: np.ndarray) -> Lists:
        """Return the lists of some trials (indices)."""
        arrays = ("acoustic", "ngram", "bonus", "llm", "words", "errors", "valid")
        return dataclasses.replace(
            self,
            sentences=tuple(self.sentences[int(trial)] for trial in trials),
            reference_words=self.reference_words[trials],
            **{name: getattr(self, name)[trials] for name in arrays},
        )

    def with_llm(self, scores: Mapping[str, float]) -> Lists:
        """Return the lists with a model's scores. Every sentence with words must have one."""
        llm = np.zeros_like(self.ngram)
        for row, sentences in zip(llm, self.sentences, strict=True):
            row[: len(sentences)] = [scores[one] if one else 0.0 for one in sentences]
        return dataclasses.replace(self, llm=llm, rescored=True)


def make_lists(
    found: Sequence[Sequence[Hypothesis]],
    references: Sequence[tuple[str, ...]],
    settings: Settings,
) -> Lists:
    """Augment a search's hypotheses for every reference and return them as arrays."""
    candidates = [augmented(one, settings) for one in found]
    shape = (len(candidates), max(map(len, candidates), default=0))
    arrays = {name: np.zeros(shape) for name in ("acoustic", "ngram", "bonus", "words")}
    valid = np.zeros(shape, bool)
    reference_words = np.array([len(one) for one in references])
    errors = np.repeat(reference_words[:, None], shape[1], axis=1)
    for row, (some, reference) in enumerate(zip(candidates, references, strict=True)):
        count = len(some)
        valid[row, :count] = True
        for name in ("acoustic", "ngram", "bonus"):
            arrays[name][row, :count] = [getattr(one, name) for one in some]
        arrays["words"][row, :count] = [len(one.words) for one in some]
        errors[row, :count] = [word_errors(reference, one.sentence) for one in some]
    return Lists(
        settings,
        tuple(tuple(one.sentence for one in some) for some in candidates),
        llm=np.zeros(shape),
        **arrays,  # type: ignore[arg-type]
        errors=errors,
        valid=valid,
        reference_words=reference_words,
    )


def rerank(lists: Lists, seed: int) -> tuple[Settings, int]:
    """Return the settings near those of the search that rank best, and their word errors.

    A random search varies acoustic scale, word bonus and, with a model, alpha. The median of the
    best settings is preferred to the best one unless it makes more than one error more per thousand
    words, because an isolated optimum on few sentences is luck.
    """
    rng = np.random.default_rng(seed)
    base = lists.settings
    tried = [base]
    for _ in range(_SAMPLES):
        change = {
            "acoustic_scale": base.acoustic_scale * _SCALE_RANGE ** rng.uniform(-1.0, 1.0),
            "word_bonus": base.word_bonus + rng.uniform(-_BONUS_RANGE, _BONUS_RANGE),
        }
        if lists.rescored:
            change["alpha"] = rng.uniform(0.0, 1.0)
        tried.append(within_limits(base, change))
    errors = np.array([lists.errors_of_best(one).sum() for one in tried])
    order = np.argsort(errors, kind="stable")
    best = tried[order[0]]
    names = ("acoustic_scale", "word_bonus", "alpha")
    near = [tried[index] for index in order[:_AS_GOOD]]
    middle = within_limits(
        base, {name: float(np.median([getattr(one, name) for one in near])) for name in names}
    )
    found = int(lists.errors_of_best(middle).sum())
    if found <= errors[order[0]] + lists.reference_words.sum() / 1000:
        return middle, found
    return best, int(errors[order[0]])


def within_limits(base: Settings, change: Mapping[str, float]) -> Settings:
    """Return settings with changes clipped to their ranges and rounded to 4 significant digits."""
    values = {
        name: float(f"{min(max(value, LIMITS[name][0]), LIMITS[name][1]):.4g}")
        for name, value in change.items()
    }
    # Only settings that are not whole numbers are tuned.
    return dataclasses.replace(base, **values)  # type: ignore[arg-type]


def expected_errors(choices: Sequence[Lists], seed: int) -> float:
    """Return the expected word error rate of new sentences, by cross-validation on halves.

    Args:
      choices: the same trials under several searches. Each half chooses search and re-ranking anew.
      seed: of the divisions into halves, several of which are averaged.
    """
    wrong = 0
    for division in range(_DIVISIONS):
        order = np.random.default_rng((seed, division)).permutation(len(choices[0].sentences))
        halves = np.array_split(order, 2)
        for chosen_on, counted_on in (halves, halves[::-1]):
            ranked = [(*rerank(one.of(chosen_on), seed), one) for one in choices]
            settings, _, lists = min(ranked, key=lambda one: one[1])
            wrong += int(lists.of(counted_on).errors_of_best(settings).sum())
    return wrong / max(_DIVISIONS * int(choices[0].reference_words.sum()), 1)


def calibrate(lists: Lists, settings: Settings) -> tuple[float, float, float]:
    """Return the temperature with the best confidences, and the log loss before and after.

    The mean log loss (ln) of "the first hypothesis is right" is that of temperature 1 and that of
    the temperature returned.
    """
    totals = lists.totals(settings)
    rows = [row[np.isfinite(row)] for row in totals]
    right = lists.errors_of_best(settings) == 0

    def loss(temperature: float) -> float:
        parts = []
        for row, correct in zip(rows, right, strict=True):
            share = float(posterior(row, temperature).max()) if len(row) else 0.5
            share = min(max(share, 1e-6), 1.0 - 1e-6)
            parts.append(-math.log(share if correct else 1.0 - share))
        return float(np.mean(parts))

    temperatures = [round(float(one), 3) for one in np.geomspace(0.25, 30.0, 60)]
    best = min(temperatures, key=loss)
    return best, loss(1.0), loss(best)
