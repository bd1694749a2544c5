"""What tuning is made of: candidate lists with everything that re-ranking needs, as arrays.

A search is dear, re-ranking is cheap: the candidates of one search keep their scores apart, so that
other scales, shares and bonuses near those of the search are tried without searching again.
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
"""Re-ranking is trusted for acoustic scales within this factor of the search's."""
_BONUS_RANGE = 2.0
"""And for word bonuses within this many ln of the search's."""
_DIVISIONS = 4
_AS_GOOD = 20
"""Samples among the best of which the middle is preferred to the very best, which luck favours."""


@dataclass(frozen=True)
class Lists:
    """The candidates of every trial under one search, padded: all arrays are [trials, candidates].

    Attributes:
      settings: what was searched with.
      sentences: every trial's candidates, augmented.
      acoustic, ngram, bonus, llm, words: scores (ln) and numbers of words; `llm` is zeros without a
        model.
      errors: word errors; where there is no candidate, the reference's words.
      valid: whether there is a candidate.
      reference_words: words of all references.
      rescored: whether `llm` is a model's.
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
        """What `ranked_answer` would rank by under other settings."""
        language = self.ngram
        if self.rescored:
            language = (1.0 - settings.alpha) * self.ngram + settings.alpha * self.llm
        bonus = self.bonus + (settings.word_bonus - self.settings.word_bonus) * self.words
        totals = settings.acoustic_scale * self.acoustic + language + bonus
        valid = self.valid
        if self.rescored:
            # A candidate without words has no score; it counts only where there is no other.
            worded = self.valid & (self.words > 0)
            valid = np.where(worded.any(axis=1, keepdims=True), worded, self.valid)
        return np.where(valid, totals, -math.inf)

    def errors_of_best(self, settings: Settings) -> np.ndarray:
        """Word errors of every trial's best candidate, [trials]."""
        if not self.errors.shape[1]:
            return self.reference_words
        best = self.totals(settings).argmax(axis=1)
        found: np.ndarray = np.take_along_axis(self.errors, best[:, None], axis=1)[:, 0]
        return found

    def oracle(self) -> np.ndarray:
        """Word errors of every trial's candidate nearest to the truth, [trials]."""
        if not self.errors.shape[1]:
            return self.reference_words
        least: np.ndarray = self.errors.min(axis=1)
        return least

    def of(self, trials: np.ndarray) -> Lists:
        """The same of some trials (indices)."""
        arrays = ("acoustic", "ngram", "bonus", "llm", "words", "errors", "valid")
        return dataclasses.replace(
            self,
            sentences=tuple(self.sentences[int(trial)] for trial in trials),
            reference_words=self.reference_words[trials],
            **{name: getattr(self, name)[trials] for name in arrays},
        )

    def with_llm(self, scores: Mapping[str, float]) -> Lists:
        """The same with a model's scores; every sentence with words must have one."""
        llm = np.zeros_like(self.ngram)
        for row, sentences in zip(llm, self.sentences, strict=True):
            row[: len(sentences)] = [scores[one] if one else 0.0 for one in sentences]
        return dataclasses.replace(self, llm=llm, rescored=True)


def make_lists(
    found: Sequence[Sequence[Hypothesis]],
    references: Sequence[tuple[str, ...]],
    settings: Settings,
) -> Lists:
    """Augments and lays out what a search found for every reference."""
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
        acoustic=arrays["acoustic"],
        ngram=arrays["ngram"],
        bonus=arrays["bonus"],
        words=arrays["words"],
        errors=errors,
        valid=valid,
        reference_words=reference_words,
    )


def rerank(lists: Lists, seed: int) -> tuple[Settings, int]:
    """The settings near those of the search that rank best, and their word errors.

    A random search over acoustic scale, word bonus and, with a model, alpha. Among settings that
    are almost as good as the best, the middle ones are taken if they are no worse by more than one
    error in a thousand words: a lone optimum of a few sentences is luck.
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
    """Settings with some of them changed, as far as their limits go, to four significant digits."""
    values = {
        name: float(f"{min(max(value, LIMITS[name][0]), LIMITS[name][1]):.4g}")
        for name, value in change.items()
    }
    # Only settings that are no whole numbers are tuned.
    return dataclasses.replace(base, **values)  # type: ignore[arg-type]


def expected_errors(choices: Sequence[Lists], seed: int) -> float:
    """Word error rate to expect of new sentences: chosen on one half, counted on the other.

    Args:
      choices: the same trials under several searches; search and re-ranking are chosen anew.
      seed: of the divisions into halves, several of which are averaged.
    """
    wrong = 0
    for division in range(_DIVISIONS):
        order = np.random.default_rng((seed, division)).permutation(len(choices[0].sentences))
        halves = np.array_split(order, 2)
        for chosen_on, counted_on in (halves, halves[::-1]):
            best: tuple[int, Settings, Lists] | None = None
            for lists in choices:
                settings, errors = rerank(lists.of(chosen_on), seed)
                if best is None or errors < best[0]:
                    best = errors, settings, lists
            assert best is not None
            wrong += int(best[2].of(counted_on).errors_of_best(best[1]).sum())
    return wrong / max(_DIVISIONS * int(choices[0].reference_words.sum()), 1)


def calibrate(lists: Lists, settings: Settings) -> tuple[float, float, float]:
    """The temperature under which the first candidate's confidence fits best.

    Returns:
      The temperature, and the mean log loss (ln) of "the sentence is right" with temperature 1 and
      with it.
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
