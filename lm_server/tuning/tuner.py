"""`lm-server tune`: settings for a model's logits, found on sentences with known transcripts.

First come a few real searches: the settings in use (the incumbents), with a budget at the widest
width within it too, then points that Optuna's tree-structured Parzen estimator suggests for
acoustic scale, blank and silence penalty. Each is judged by its own best re-ranking, with an
acoustic scale and a word bonus near the search's. One that is hopeless on the first sentences is
abandoned. Halfway, class confusions are tried, each half of the sentences with what the other half
has taught. With a large language model, the hypotheses of the best searches are then scored, and
alpha joins the re-ranking. If it is to be asked during the search, that is tried with the settings
found. A last search with them measures their real error rate. If cross-validation expects no better
than an incumbent's, the incumbent stays.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lm_server.files.logits_file import Logits
from lm_server.hypothesis import Hypothesis
from lm_server.lm.reader import ModelFolderError, find_words
from lm_server.offline import searched
from lm_server.rescoring.scorer import SentenceScorer, checked_scores
from lm_server.search.interface import SearchModel
from lm_server.settings import (
    DEFAULT_PRESET,
    LIMITS,
    PRESETS,
    Settings,
    changed,
    names_of,
)
from lm_server.settings.confusion import Confusion
from lm_server.tuning import lists as tuning
from lm_server.tuning.cache import Cache, digest
from lm_server.tuning.confusions import align, learn
from lm_server.tuning.lists import Lists
from lm_server.tuning.references import known_trials

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

# Optuna is imported late: it takes seconds.
_SCALE_FACTOR = 4.0
"""Acoustic scales within this factor of the incumbent's best re-ranking are searched."""
_RANGES = {"blank_penalty": (1.0, 150.0), "silence_penalty": (1.0, 30.0)}
_KNOWN_GOOD = {"blank_penalty": 4.0}
"""A point that suits most models. The first to be searched, at the best acoustic scale so far."""
_STARTUP = 3
"""Random points before the estimator's."""
_RESCORED = 2
"""Searches whose hypotheses the large language model scores, besides incumbents and the last."""
_SHARES = (0.3, 0.1)
"""How much of the confusion learned is tried."""
_LEAST_LEARNED = 30
"""Sentences that a confusion is learned from, at least."""
_FUSE_WEIGHTS = (1.0, 0.5)
_SENTENCES_AT_ONCE = 64
_HEAD = 0.15
"""Share of the sentences after which a search may be abandoned."""
_LEAST_HEAD = 20
_WIDER: Mapping[str, float] = {"max_classes": 41, "max_active": 1500, "beam": 40.0}
_TIMED = 12
"""Sentences on which a width is timed."""


@dataclass(frozen=True)
class Tried:
    """One search: its lists, its errors as searched, and the best re-ranking of it.

    Attributes:
      crossed: whether each half was searched with what the other half has taught.
    """

    lists: Lists
    errors: int
    best: Settings
    best_errors: int
    crossed: bool = False

    @property
    def rate(self) -> float:
        """Word error rate of the best re-ranking."""
        return self.best_errors / max(int(self.lists.reference_words.sum()), 1)


@dataclass(frozen=True)
class Result:
    """The result of tuning.

    Attributes:
      settings: the settings to use.
      lists: the hypotheses of the search with settings near them.
      errors: word errors with them.
      words: words of all references.
      default_errors: word errors with the settings that tuning began with, without a large model.
      expected: expected word error rate of new sentences, by halves for settings that were found.
      log_loss: of the sentence confidence with temperature 1 and with the one found (ln).
      tried: every search of all sentences, in order.
      abandoned: searches that were abandoned on the first sentences.
      kept: the rate that was expected of the settings found, where an incumbent is better.
      seconds: of every width that was timed, (max_active, beam, seconds of CPU per sentence).
      confusion: (expected rate without any class confusion, and with the one learned). None: none
        was learned.
      fusion: (expected rate of rescoring alone, and of asking during the search too). None: that
        was not tried.
    """

    settings: Settings
    lists: Lists
    errors: int
    words: int
    default_errors: int
    expected: float
    log_loss: tuple[float, float]
    tried: tuple[Tried, ...]
    abandoned: tuple[Tried, ...] = ()
    kept: float | None = None
    seconds: tuple[tuple[int, float, float], ...] = ()
    confusion: tuple[float, float] | None = None
    fusion: tuple[float, float] | None = None

    @property
    def wer(self) -> float:
        """Word error rate on the sentences that the settings were chosen on."""
        return self.errors / max(self.words, 1)


@dataclass(frozen=True)
class _Part:
    """Some of the trials (indices), with their logits and the results on them."""

    trials: np.ndarray
    logits: Logits
    cache: Cache


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
        count = len(self._references)
        order = np.random.default_rng(seed).permutation(count)
        head = np.sort(order[: max(_LEAST_HEAD, round(_HEAD * count))])
        of_model = (digest(model.folder), type(model).__name__)

        def part(trials: np.ndarray, *more: object) -> _Part:
            logits = self._logits.select(trials.tolist())
            inputs = [of_model[0], logits.digest(), of_model[1], *more]
            return _Part(trials, logits, Cache(cache, inputs))

        self._all, self._head = part(np.arange(count)), part(head)
        self._rest = part(np.setdiff1d(order, head))
        self._halves = [part(np.sort(half)) for half in np.array_split(order, 2)]
        self._crossed: dict[Confusion, tuple[Confusion, ...]] = {}
        self._part = part
        self._seed = seed
        self._console = console or Console(stderr=True)
        self._failed: set[str] = set()

    def run(
        self,
        base: Settings,
        searches: int,
        load_scorer: Callable[[], tuple[SentenceScorer, Sequence[object]] | None],
        in_use: Mapping[Settings, float] = MappingProxyType({}),
        budget: float | None = None,
        fused: Callable[[], SearchModel] | None = None,
    ) -> Result:
        """Tune.

        Args:
          base: settings to begin with. Those that are not tuned stay.
          searches: number of real searches, the last ones not counted.
          load_scorer: returns the large language model and its identity. Called after the searches.
          in_use: settings that the result must not be worse than, as `base`, each with the least
            word error rate to expect of it. This is above 0 for those chosen on the same sentences.
          budget: seconds of CPU per sentence. The widest search within is chosen. None: that of
            `base`.
          fused: returns a model whose searches ask the large language model. None: that is not
            tried.

        Raises:
          RescoringError: the large language model fails.
        """
        # A confusion that these sentences have taught finds none of them new. Settings with it
        # stand as what to be better than, by the rate that they expect, and are no choice.
        taught = {one.confusion for one, rate in in_use.items() if rate and one.confusion}
        plain = dataclasses.replace(base, confusion=None) if base.confusion in taught else base
        wide, _ = self._widest(plain, budget)
        standing = list(dict.fromkeys([base, *in_use]))
        incumbents, tried, abandoned = self._explored(standing, plain, wide, searches, taught)
        default_errors = incumbents[0].errors
        choices = sorted(tried, key=_best_first)
        learned = [one for one in choices if one.crossed]
        confusion = None
        if learned:
            others = [one for one in choices if not one.crossed]
            confusion = self._expected(others), self._expected(learned)
            choices = others if confusion[0] <= confusion[1] else choices
        loaded = load_scorer()

        def rescored(one: Tried) -> Tried:
            return one if loaded is None else self._rescored(one, *loaded)

        if loaded is not None:
            choices = [rescored(one) for one in choices[:_RESCORED]]
            incumbents = [rescored(one) for one in incumbents]
        # Without the last search, which is chosen on all trials.
        expected = self._expected(choices)
        best = min(choices, key=_best_first)
        wanted, seconds = self._widest(best.best, budget)
        finals = [rescored(self._measured(wanted))]
        # A re-ranked one may look better by chance, so that it is really searched too.
        if finals[0].best_errors + finals[0].lists.reference_words.sum() / 1000 < finals[0].errors:
            finals.append(rescored(self._measured(finals[0].best)))
        tried += finals
        if wanted.max_active == best.best.max_active:
            finals.append(rescored(self._measured(best.lists.settings)))
        last = min(finals, key=lambda one: one.errors)
        fusion = None
        asking = fused() if fused is not None and loaded is not None else None
        if asking is not None and loaded is not None:
            last, expected, fusion = self._asking(asking, last, expected, *loaded)
        chosen, errors = last.lists.settings, last.errors
        words = max(int(last.lists.reference_words.sum()), 1)

        def rate(one: Tried) -> float:
            return max(one.errors / words, in_use.get(one.lists.settings, 0.0))

        first = min(incumbents, key=rate)
        kept = None
        if expected > rate(first):
            least = in_use.get(first.lists.settings, 0.0)
            if asking is not None and loaded is not None:
                # What is kept must name that way to search which has its rate.
                asked = self._asked(asking, first.lists.settings, *loaded)
                first = asked if asked.errors < first.errors else _without_asking(first)
            kept, last, chosen, errors = expected, first, first.lists.settings, first.errors
            expected = max(first.errors / words, least)
        temperature, before, after = tuning.calibrate(last.lists, chosen)
        return Result(
            dataclasses.replace(chosen, confidence_temperature=temperature),
            last.lists,
            errors,
            words,
            default_errors,
            expected,
            (before, after),
            tuple(tried),
            tuple(abandoned),
            kept,
            seconds,
            confusion,
            fusion,
        )

    def _explored(
        self,
        standing: Sequence[Settings],
        plain: Settings,
        wide: Settings,
        searches: int,
        taught: Container[Confusion | None],
    ) -> tuple[list[Tried], list[Tried], list[Tried]]:
        """Return the incumbents, all searches of all sentences, and those that were abandoned."""
        abandoned: list[Tried] = []
        with self._progress() as progress:
            task = progress.add_task("searches", total=searches)

            def trying(settings: Settings) -> Tried:
                found = self._try(settings)
                progress.advance(task)
                return found

            incumbents = [trying(settings) for settings in standing]
            tried = [one for one in incumbents if one.lists.settings.confusion not in taught]
            if plain not in standing:
                tried.append(trying(plain))
            if wide != plain:
                # Scales that suit a narrow search hide its errors.
                width = {name: getattr(wide, name) for name in PRESETS[DEFAULT_PRESET]}
                tried.append(trying(changed(min(tried, key=_best_first).best, width)))
            study, ranges = self._study(wide, tried)
            learned = False
            while (done := len(tried) + len(abandoned)) < searches:
                best = min(tried, key=_best_first)
                if not learned and 2 * done >= searches:
                    learned = True
                    tried += [trying(one) for one in self._confused(best.best)]
                    continue
                trial = study.ask()
                found = self._try_unless_hopeless(self._point(wide, trial, ranges, best), best)
                complete = len(found.lists.sentences) == len(self._references)
                (tried if complete else abandoned).append(found)
                study.tell(trial, found.rate)
                progress.advance(task)
        return incumbents, tried, abandoned

    def _expected(self, choices: Sequence[Tried]) -> float:
        return tuning.expected_errors([one.lists for one in choices[:4]], self._seed)

    def _confused(self, settings: Settings) -> list[Settings]:
        """Return settings with class confusions that were learned under them.

        There are none if there is too little to learn from, which is named on the error output.
        """
        try:
            words = {word for reference in self._references for word in reference}
            known = find_words(self._model.folder, words)
        except ModelFolderError as error:
            print(f"note: no class confusion is learned: {error}", file=sys.stderr)
            return []
        halves = [
            align(known, settings, self._logits, self._references, half.trials.tolist())
            for half in self._halves
        ]
        count = sum(len(half.said) for half in halves)
        if count < _LEAST_LEARNED or not all(half.said for half in halves):
            print(
                f"note: no class confusion is learned: {count} sentences can be spelled by the "
                f"vocabulary and aligned; needed {_LEAST_LEARNED}",
                file=sys.stderr,
            )
            return []
        whole, of_halves = learn(*halves), [learn(half) for half in reversed(halves)]
        found = []
        for share in _SHARES:
            confusion = whole.weakened(share)
            self._crossed[confusion] = tuple(one.weakened(share) for one in of_halves)
            found.append(dataclasses.replace(settings, confusion=confusion))
        return found

    def _asking(
        self,
        model: SearchModel,
        last: Tried,
        expected: float,
        scorer: SentenceScorer,
        identity: Sequence[object],
    ) -> tuple[Tried, float, tuple[float, float]]:
        """Search with the large model asked meanwhile.

        Returns the better of both ways to search, its expected rate, and that of either.
        """
        found = []
        for weight in _FUSE_WEIGHTS:
            settings = dataclasses.replace(last.lists.settings, fuse_weight=weight)
            found.append(self._asked(model, settings, scorer, identity))
        alone, asking = self._expected([last]), self._expected(found)
        if asking < alone:
            return min(found, key=lambda one: one.errors), asking, (alone, asking)
        return _without_asking(last), expected, (alone, asking)

    def _asked(
        self,
        model: SearchModel,
        settings: Settings,
        scorer: SentenceScorer,
        identity: Sequence[object],
    ) -> Tried:
        """Search with these settings, the large model asked meanwhile, and rescore."""
        asked = [getattr(settings, name) for name in ("alpha", "length_penalty")]
        asked += [getattr(settings, name) for name in names_of("fusion")]
        part = self._part(self._all.trials, "fused", *identity, *asked)
        lists = part.cache.read_search(settings)
        if lists is None:
            lists = self._search(settings, part.logits, model)
            part.cache.write_search(settings, lists)
        made = tuning.make_lists(lists, self._references, settings)
        return self._rescored(self._judged(made), scorer, identity)

    def _study(
        self, base: Settings, tried: Sequence[Tried]
    ) -> tuple[Study, dict[str, tuple[float, float]]]:
        """Return the estimator, which knows the incumbents, and the ranges that it searches."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        centre = min(tried, key=_best_first).best.acoustic_scale
        least, greatest = LIMITS["acoustic_scale"]
        ranges = {
            "acoustic_scale": (
                max(centre / _SCALE_FACTOR, least),
                min(centre * _SCALE_FACTOR, greatest),
            ),
            **_RANGES,
        }
        if base.silence_penalty >= LIMITS["silence_penalty"][1]:
            # Silences are demanded, which is no degree.
            del ranges["silence_penalty"]
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=len(tried) + 1 + _STARTUP, multivariate=True, seed=self._seed
        )
        study = optuna.create_study(sampler=sampler)
        distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.FloatDistribution(*limits, log=True)
            for name, limits in ranges.items()
        }

        def point(of: Mapping[str, float]) -> dict[str, float]:
            return {name: float(np.clip(of[name], *limits)) for name, limits in ranges.items()}

        for one in tried:
            params = point(vars(one.lists.settings))
            study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=distributions, value=one.rate
                )
            )
        study.enqueue_trial(point({**vars(base), "acoustic_scale": centre, **_KNOWN_GOOD}))
        return study, ranges

    def _point(
        self,
        base: Settings,
        trial: Trial,
        ranges: Mapping[str, tuple[float, float]],
        best: Tried,
    ) -> Settings:
        """Return the settings of the next search. Word bonus and confusion are the best so far."""
        change = {name: trial.suggest_float(name, *of, log=True) for name, of in ranges.items()}
        change["word_bonus"] = best.best.word_bonus
        confusion = best.lists.settings.confusion
        return dataclasses.replace(tuning.within_limits(base, change), confusion=confusion)

    def _try(self, settings: Settings) -> Tried:
        """Search all sentences, with a confusion that was learned here by halves."""
        crossed = self._crossed.get(settings.confusion) if settings.confusion else None
        if crossed is None:
            return self._measured(settings)
        found: dict[int, tuple[Hypothesis, ...]] = {}
        for half, confusion in zip(self._halves, crossed, strict=True):
            of_half = self._found(dataclasses.replace(settings, confusion=confusion), half)
            found.update(zip(half.trials.tolist(), of_half, strict=True))
        every = [found[trial] for trial in sorted(found)]
        judged = self._judged(tuning.make_lists(every, self._references, settings))
        return dataclasses.replace(judged, crossed=True)

    def _measured(self, settings: Settings) -> Tried:
        """Search all sentences with these settings as they are."""
        found = self._found(settings, self._all)
        return self._judged(tuning.make_lists(found, self._references, settings))

    def _try_unless_hopeless(self, settings: Settings, best: Tried) -> Tried:
        """Return a search of all sentences, or of the first ones if it is hopeless there."""
        if settings.confusion in self._crossed:
            return self._try(settings)
        if self._all.cache.read_search(settings) is None and len(self._rest.trials):
            head = self._found(settings, self._head)
            references = [self._references[index] for index in self._head.trials]
            there = self._judged(tuning.make_lists(head, references, settings))
            least = int(best.lists.of(self._head.trials).errors_of_best(best.best).sum())
            # Three standard deviations of a count, and as much again as the best has.
            if there.best_errors > 1.5 * least + 3.0 * least**0.5 + 3:
                return there
            both = [*head, *self._found(settings, self._rest)]
            order = np.argsort(np.concatenate([self._head.trials, self._rest.trials]))
            self._all.cache.write_search(settings, [both[index] for index in order])
        return self._try(settings)

    def _found(self, settings: Settings, part: _Part) -> list[tuple[Hypothesis, ...]]:
        """Return the hypotheses of some trials, searched unless the cache has them."""
        found = part.cache.read_search(settings)
        if found is None or len(found) != len(part.trials):
            found = self._search(settings, part.logits)
            part.cache.write_search(settings, found)
        return found

    def _widest(
        self, settings: Settings, budget: float | None
    ) -> tuple[Settings, tuple[tuple[int, float, float], ...]]:
        """Return settings with the widest search within the budget, and what was timed."""
        if budget is None:
            return settings, ()
        cache = self._all.cache
        widths = [PRESETS["fast"], PRESETS["balanced"], PRESETS["accurate"], _WIDER]
        timed: list[tuple[int, float, float]] = []
        chosen = changed(settings, widths[0])
        for width in widths:
            one = changed(settings, width)
            seconds = cache.read_seconds(one)
            if seconds is None:
                seconds = self._seconds(one)
                cache.write_seconds(one, seconds)
            timed.append((one.max_active, one.beam, seconds))
            if seconds > budget:
                break
            chosen = one
        if timed[0][2] > budget:
            print(
                f"warning: the narrowest search takes {timed[0][2]:.3g} s per sentence, more than "
                f"the budget of {budget:g}",
                file=sys.stderr,
            )
        return chosen, tuple(timed)

    def _seconds(self, settings: Settings) -> float:
        """Return seconds of CPU per sentence of this process."""
        some = self._head.logits.select(range(min(_TIMED, len(self._head.trials))))
        began = time.process_time()
        with searched(self._model, settings, some, 1) as outcomes:
            count = sum(1 for _ in outcomes)
        return (time.process_time() - began) / count

    def _judged(self, lists: Lists) -> Tried:
        best, best_errors = tuning.rerank(lists, self._seed)
        return Tried(lists, int(lists.errors_of_best(lists.settings).sum()), best, best_errors)

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        return Progress(*columns, TimeElapsedColumn(), console=self._console)

    def _search(
        self, settings: Settings, logits: Logits, fused: SearchModel | None = None
    ) -> list[tuple[Hypothesis, ...]]:
        found = []
        # A large language model works in this process alone.
        model, workers = (self._model, self._workers) if fused is None else (fused, 1)
        with searched(model, settings, logits, workers) as outcomes:
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
        cache = self._all.cache
        scores = cache.read_scores(model)
        wanted = dict.fromkeys(one for some in tried.lists.sentences for one in sorted(some) if one)
        missing = [one for one in wanted if one not in scores]
        with self._progress() as progress:
            task = progress.add_task(f"sentences scored by {scorer.name}", total=len(missing))
            for start in range(0, len(missing), _SENTENCES_AT_ONCE):
                some = missing[start : start + _SENTENCES_AT_ONCE]
                new = checked_scores(scorer, some, "", settings.length_penalty)
                cache.add_scores(model, new)
                scores.update(new)
                progress.advance(task, len(some))
        return self._judged(tried.lists.with_llm(scores))


def _without_asking(tried: Tried) -> Tried:
    """Return the same search with settings that never ask the large model meanwhile."""
    settings = dataclasses.replace(tried.lists.settings, fuse_weight=0.0)
    return dataclasses.replace(tried, lists=dataclasses.replace(tried.lists, settings=settings))


def _best_first(tried: Tried) -> int:
    return tried.best_errors


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
