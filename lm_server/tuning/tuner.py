"""`lm-server tune`: settings for a model's logits, found on sentences with known transcripts.

First come a few real searches: the defaults, points spread over acoustic scale and blank penalty,
then points around the best so far. Each is judged by its own best re-ranking, with an acoustic
scale and a word bonus near the search's. With a large language model, the hypotheses of the best
searches are then scored, and alpha joins the re-ranking. A last search with the settings found
measures their real error rate.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lm_server.hypothesis import Hypothesis
from lm_server.offline import Logits, searched
from lm_server.rescoring.scorer import SentenceScorer, checked_scores
from lm_server.search.interface import SearchModel
from lm_server.settings import LIMITS, Settings
from lm_server.tuning import lists as tuning
from lm_server.tuning.cache import Cache, digest
from lm_server.tuning.lists import Lists
from lm_server.tuning.references import known_trials

_SCALES = (0.25, 4.0)
_BLANKS = (1.0, 150.0)
_RESCORED = 2
"""Searches whose hypotheses the large language model scores, besides the last one."""
_SENTENCES_AT_ONCE = 64


@dataclass(frozen=True)
class Tried:
    """One search: its lists, its errors as searched, and the best re-ranking of it."""

    lists: Lists
    errors: int
    best: Settings
    best_errors: int


@dataclass(frozen=True)
class Result:
    """The result of tuning.

    Attributes:
      settings: the settings to use.
      lists: the hypotheses of the search with settings near them.
      errors: word errors with them.
      words: words of all references.
      default_errors: word errors with the settings that tuning began with, without a large model.
      expected: expected word error rate of new sentences (cross-validation by halves).
      log_loss: of the sentence confidence with temperature 1 and with the one found (ln).
      tried: every search, in order.
    """

    settings: Settings
    lists: Lists
    errors: int
    words: int
    default_errors: int
    expected: float
    log_loss: tuple[float, float]
    tried: tuple[Tried, ...]

    @property
    def wer(self) -> float:
        """Word error rate on the sentences that the settings were chosen on."""
        return self.errors / max(self.words, 1)


class Tuner:
    """Tuning on one validation set, with a cache of searches and scores."""

    def __init__(
        self,
        model: SearchModel,
        logits: Logits,
        references: dict[str, tuple[str, ...]],
        cache: Path,
        workers: int,
        seed: int = 0,
        console: Console | None = None,
    ) -> None:
        """Select the trials that have a reference.

        Raises:
          ReferencesError: none has.
        """
        self._model, self._workers = model, workers
        self._logits = logits.select(known_trials(logits.trials, references))
        self._references = [references[trial] for trial in self._logits.trials]
        inputs = [digest(model.folder), self._logits.digest(), type(model).__name__]
        self._cache = Cache(cache, inputs)
        self._seed = seed
        self._console = console or Console(stderr=True)
        self._failed: set[str] = set()

    def run(
        self,
        base: Settings,
        searches: int,
        load_scorer: Callable[[], tuple[SentenceScorer, Sequence[object]] | None],
    ) -> Result:
        """Tune.

        Args:
          base: settings to begin with. Those that are not tuned stay.
          searches: number of real searches, the last one not counted.
          load_scorer: returns the large language model and its identity. Called after the searches.

        Raises:
          RescoringError: the large language model fails.
        """
        rng = np.random.default_rng(self._seed)
        tried: list[Tried] = []
        with self._progress() as progress:
            task = progress.add_task("searches", total=searches)
            for number in range(searches):
                tried.append(self._try(self._point(base, tried, number, searches, rng)))
                progress.advance(task)
        default_errors = tried[0].errors
        loaded = load_scorer()
        choices = sorted(tried, key=lambda one: one.best_errors)
        if loaded is not None:
            choices = [self._rescored(one, *loaded) for one in choices[:_RESCORED]]
        # Without the last search, which is chosen on all trials.
        expected = tuning.expected_errors([one.lists for one in choices[:4]], self._seed)
        best = min(choices, key=lambda one: one.best_errors)
        last = self._try(best.best)
        tried.append(last)
        if loaded is not None:
            last = self._rescored(last, *loaded)
        # The last one is really searched. A re-ranked one may look better by chance.
        chosen, errors = last.best, last.best_errors
        if last.errors <= errors + last.lists.reference_words.sum() / 1000:
            chosen, errors = last.lists.settings, last.errors
        if best.best_errors < errors:
            best_as_searched = int(best.lists.errors_of_best(best.lists.settings).sum())
            if best_as_searched < errors:
                last, chosen, errors = best, best.lists.settings, best_as_searched
        temperature, before, after = tuning.calibrate(last.lists, chosen)
        return Result(
            dataclasses.replace(chosen, confidence_temperature=temperature),
            last.lists,
            errors,
            int(last.lists.reference_words.sum()),
            default_errors,
            expected,
            (before, after),
            tuple(tried),
        )

    def _point(
        self,
        base: Settings,
        tried: Sequence[Tried],
        number: int,
        searches: int,
        rng: np.random.Generator,
    ) -> Settings:
        """Return the settings of the next search: the base, then spread, then near the best."""
        if number == 0:
            return base
        spread = max(searches // 2, 1)
        if number <= spread:
            # The right scale may be far away. A low-discrepancy sequence leaves no gap.
            u, v = (0.5 + number * 0.7548776662) % 1.0, (0.5 + number * 0.5698402910) % 1.0
            change = {"acoustic_scale": _within(_SCALES, u), "blank_penalty": _within(_BLANKS, v)}
            return tuning.within_limits(base, change)
        best = min(tried, key=lambda one: one.best_errors)
        change = {
            "acoustic_scale": best.best.acoustic_scale * float(np.exp(rng.normal(0.0, 0.15))),
            "blank_penalty": best.best.blank_penalty * float(np.exp(rng.normal(0.0, 0.6))),
            "word_bonus": best.best.word_bonus,
        }
        return tuning.within_limits(base, change)

    def _try(self, settings: Settings) -> Tried:
        found = self._cache.read_search(settings)
        if found is None or len(found) != len(self._references):
            found = self._search(settings)
            self._cache.write_search(settings, found)
        return self._judged(tuning.make_lists(found, self._references, settings))

    def _judged(self, lists: Lists) -> Tried:
        best, best_errors = tuning.rerank(lists, self._seed)
        return Tried(lists, int(lists.errors_of_best(lists.settings).sum()), best, best_errors)

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        return Progress(*columns, TimeElapsedColumn(), console=self._console)

    def _search(self, settings: Settings) -> list[tuple[Hypothesis, ...]]:
        found = []
        with searched(self._model, settings, self._logits, self._workers) as outcomes:
            for outcome in outcomes:
                if outcome.problem and outcome.trial not in self._failed:
                    self._failed.add(outcome.trial)
                    print(f"warning: {outcome.problem} (counts as no words)", file=sys.stderr)
                found.append(outcome.hypotheses)
        return found

    def _rescored(self, tried: Tried, scorer: SentenceScorer, identity: Sequence[object]) -> Tried:
        """Return the same search, re-ranked with the large language model's scores."""
        settings = tried.lists.settings
        model = [*identity, settings.length_penalty]
        scores = self._cache.read_scores(model)
        wanted = dict.fromkeys(one for some in tried.lists.sentences for one in sorted(some) if one)
        missing = [one for one in wanted if one not in scores]
        with self._progress() as progress:
            task = progress.add_task(f"sentences scored by {scorer.name}", total=len(missing))
            for start in range(0, len(missing), _SENTENCES_AT_ONCE):
                some = missing[start : start + _SENTENCES_AT_ONCE]
                new = checked_scores(scorer, some, "", settings.length_penalty)
                self._cache.add_scores(model, new)
                scores.update(new)
                progress.advance(task, len(some))
        return self._judged(tried.lists.with_llm(scores))


def _within(limits: tuple[float, float], share: float) -> float:
    """Return a point between two limits, at a share of their logarithmic distance."""
    low, high = np.log(limits)
    return float(np.exp(low + share * (high - low)))


def search_curve(result: Result) -> list[tuple[float, float]]:
    """Return (blank penalty, word error rate) of every search with its own best re-ranking.

    Re-ranking cannot change the blank penalty, so each point is a search of its own. Their acoustic
    scales differ.
    """
    return sorted(
        (one.lists.settings.blank_penalty, one.best_errors / max(result.words, 1))
        for one in result.tried
    )


def curves(result: Result) -> dict[str, list[tuple[float, float]]]:
    """Return setting -> (value, word error rate) by re-ranking, with the others as found."""
    settings, lists = result.settings, result.lists
    grids: dict[str, Sequence[float]] = {
        "acoustic_scale": [settings.acoustic_scale * 2.0 ** (step / 4) for step in range(-4, 5)],
        "word_bonus": [settings.word_bonus + step / 2 for step in range(-4, 5)],
    }
    if lists.rescored:
        grids["alpha"] = [step / 10 for step in range(11)]
    found = {}
    for name, values in grids.items():
        inside = [one for one in values if LIMITS[name][0] <= one <= LIMITS[name][1]]
        changed = [dataclasses.replace(settings, **{name: one}) for one in inside]  # type: ignore[arg-type]
        rates = [lists.errors_of_best(one).sum() / max(result.words, 1) for one in changed]
        found[name] = [(float(x), float(y)) for x, y in zip(inside, rates, strict=True)]
    return found
