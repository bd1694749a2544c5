"""Decoding without Redis: trials in this process, or logits files -> JSON lines on all cores."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lm_server.files.logits_file import Logits, LogitsFileError
from lm_server.files.resumable import resumable
from lm_server.files.several_logits import in_turn
from lm_server.hypothesis import Answer, Hypothesis
from lm_server.process import end_with_parent
from lm_server.protocol import ProtocolError, check_logits, to_lm_order
from lm_server.rescoring.answering import Answering, PendingAnswer
from lm_server.rescoring.consensus import METHODS, together
from lm_server.rescoring.load import load_scorer
from lm_server.rescoring.scorer import SentenceScorer
from lm_server.search.hot_words import HotWord
from lm_server.search.interface import NO_HOT_WORDS, NoSentenceError, Search, SearchModel
from lm_server.search.load import default_settings, load_model, without_effect
from lm_server.settings import (
    NAMES,
    PRESET,
    Settings,
    SettingsError,
    changed,
    preset,
    read_settings,
)

HotWords = Mapping[str, float | HotWord]
"""Words to favour, each with its weight (ln)."""
_worker: tuple[Search, Logits] | None = None
"""What a worker process searches with. Set before the fork, so that all share one memory."""
_AHEAD = 64
"""Sentences that may wait for their rescoring."""
_LINE_EVERY = 30.0
"""Seconds between lines of progress where no terminal shows a bar."""


class Decoder:
    """A model folder in memory, with a large language model where one was named.

    Attributes:
      settings: of its searches.
    """

    def __init__(
        self,
        folder: Path | str,
        backend: str = "flashlight",
        settings: Settings | Mapping[str, float | str] | Path | str | None = None,
        llm: Path | str | None = None,
        fuse: bool = False,
    ) -> None:
        """Read the models. See `lm_server.load`."""
        usual = default_settings(backend)
        if settings is None or isinstance(settings, Mapping):
            given = dict(settings or {})
            wide = given.pop(PRESET, None)
            if unknown := given.keys() - set(NAMES):
                raise SettingsError(
                    f"there is no setting {min(unknown)!r}; known are {', '.join(NAMES)}"
                )
            if wide is not None and without_effect(PRESET, backend) is None:
                usual = changed(usual, preset(wide))
            settings = changed(usual, given)  # type: ignore[arg-type]  # it checks the types
        elif not isinstance(settings, Settings):
            settings = read_settings(Path(settings), usual, backend)
        self.settings = settings
        self._model = load_model(Path(folder), backend)
        scorer = None if llm is None else load_scorer(llm)
        if fuse:
            if scorer is None:
                raise SettingsError("fuse needs a large language model to ask: give llm too")
            from lm_server.rescoring.growing import growing
            from lm_server.search.fused import FusedModel

            self._model = FusedModel(self._model, lambda: growing(scorer))
        self._answering = Answering(scorer)

    def search(self, hot_words: HotWords | None = None) -> Search:
        """Start a streaming search: `begin`, `step(frames)`, `finish`.

        `step` expects frames [frames, 41] in the language model's order (`protocol.to_lm_order`),
        and returns the best words so far.

        Args:
          hot_words: word -> weight (ln), or a HotWord with pronunciations.

        Raises:
          HotWordError: a hot word cannot be used.
        """
        words = {
            word: one if isinstance(one, HotWord) else HotWord(one)
            for word, one in (hot_words or {}).items()
        }
        return self._model.search(self.settings, words)

    @overload
    def decode(
        self, logits: np.ndarray, *, hot_words: HotWords | None = None, context: str = ""
    ) -> Answer: ...

    @overload
    def decode(
        self, logits: Sequence[np.ndarray], *, hot_words: HotWords | None = None, context: str = ""
    ) -> list[Answer]: ...

    def decode(
        self,
        logits: np.ndarray | Sequence[np.ndarray],
        *,
        hot_words: HotWords | None = None,
        context: str = "",
    ) -> Answer | list[Answer]:
        """Decode one trial, or a list of trials.

        Args:
          logits: [frames, 41] in the RNN's class order, as `Run.logits` of b2txt_jax returns them,
            or a sequence of such arrays.
          hot_words: word -> weight (ln), or a HotWord with pronunciations.
          context: what was said before. Only a large language model uses it.

        Returns:
          An answer, or a list of answers in the order of the trials. One whose rescoring failed is
          the n-gram answer and has a `problem`.

        Raises:
          ProtocolError: the shape is wrong, a value is not finite, or the sentence is too long.
          NoSentenceError: no sentence was found for a trial's frames.
          HotWordError: a hot word cannot be used.
        """
        search = self.search(hot_words)
        single = isinstance(logits, np.ndarray) and logits.ndim != 3
        pending = []
        for one in [logits] if single else logits:
            search.begin()
            search.step(to_lm_order(check_logits(np.asarray(one))))
            pending.append(self._answering.submit(search.finish(), self.settings, context))
        answers = [one.result() for one in pending]
        return answers[0] if single else answers


@dataclass(frozen=True)
class Outcome:
    """One searched trial: its candidates, or the problem with it."""

    trial: str
    hypotheses: tuple[Hypothesis, ...]
    problem: str | None


_Found = tuple[Outcome, Answer | None]
_Line = tuple[dict[str, Any] | None, list[str]]


def decode_trial(search: Search, trial: str, logits: np.ndarray) -> Outcome:
    """Search one trial, [frames, 41] in the RNN's order."""
    search.begin()
    try:
        search.step(to_lm_order(logits))
        return Outcome(trial, search.finish(), None)
    except (ProtocolError, NoSentenceError) as error:
        return Outcome(trial, (), f"trial {trial}: {error}")


def decode_file(
    model: SearchModel,
    settings: Settings,
    systems: Mapping[str, Logits],
    out: Path,
    workers: int,
    load_scorer: Callable[[], SentenceScorer | None] = lambda: None,
    hot_words: Mapping[str, HotWord] = NO_HOT_WORDS,
    inputs: Mapping[str, str] = MappingProxyType({}),
    restart: bool = False,
    method: str = METHODS[0],
) -> int:
    """Decode logits files of the same trials to JSON lines: trial, and the fields of
    `Answer.as_json`. Several systems answer each trial together.

    Every answer is written at once (`lm_server.files.resumable`), and an interrupted run is
    resumed. The output appears whole at the end, in the order of the file. A trial that cannot be
    decoded is named on the error output and left out. Sentences are rescored beside the search of
    the next ones.

    Args:
      model: a model folder in memory.
      settings: how to search.
      systems: the logits files in memory, by their names. All have the trials of the first, in its
        order.
      out: the file to write.
      workers: number of processes that search.
      load_scorer: loads the large language model that rescores, if any. Called once, when the
        processes are forked.
      hot_words: words to favour.
      inputs: fingerprints of all that the answers depend on. Only a run with the same is resumed.
      restart: decode all trials again.
      method: of the consensus of several systems.

    Returns:
      Number of trials that a system could not decode, or not rescore although it should.

    Raises:
      LogitsFileError: the output cannot be written.
      ResumeError: an interrupted run had other inputs.
    """
    if out.exists() and not out.is_file():
        raise LogitsFileError(
            f"cannot write {out}: it is there and is no regular file: choose another place"
        )
    trials = next(iter(systems.values())).trials
    problems, total = 0, len(trials)
    try:
        with resumable(out, inputs, restart) as answers:
            left = [i for i, trial in enumerate(trials) if trial not in answers.done]
            if answers.done:
                print(
                    f"resuming: {total - len(left)} of {total} trials are in {answers.path}",
                    file=sys.stderr,
                )
                systems = {name: one.select(left) for name, one in systems.items()}
            each = in_turn(systems)
            try:
                with searched(model, settings, each, workers, hot_words) as outcomes:
                    found = answered(outcomes, settings, load_scorer() if left else None)
                    lines = _lines(found, [trials[i] for i in left], len(systems), method)
                    for line, of_line in _shown(lines, total, total - len(left)):
                        if line is not None:
                            answers.add(line)
                        problems += bool(of_line)
                        for problem in of_line:
                            print(f"warning: {problem}", file=sys.stderr)
            except BaseException:
                answers.interrupted()
                raise
            answers.finish(out, trials)
    except OSError as error:
        raise LogitsFileError(
            f"cannot write {out} ({error}): choose a place that you may write to"
        ) from error
    return problems


def _lines(
    found: Iterator[_Found], trials: Sequence[str], systems: int, method: str
) -> Iterator[_Line]:
    """Yield the line of each trial, None where no system has a sentence, and what went wrong.

    `found` has the outcomes of all systems for one trial after the other. A line of several systems
    of which one failed has a `problem`, so that a resumed run decodes it again.
    """
    for trial in trials:
        of_systems, problems = [], []
        for outcome, answer in itertools.islice(found, systems):
            if answer is not None:
                of_systems.append({"trial": trial, **answer.as_json()})
            if outcome.problem:
                problems.append(outcome.problem)
            elif answer is not None and answer.problem:
                problems.append(f"trial {outcome.trial} is not rescored: {answer.problem}")
        line = together(of_systems, method) if of_systems else None
        if line is not None and systems > 1 and problems:
            line["problem"] = "; ".join(problems)
        yield line, problems


def _shown(found: Iterator[_Line], total: int, done: int) -> Iterator[_Line]:
    """Yield everything, and show the progress with the time left, as lines where no terminal is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    began = shown = time.monotonic()
    with Progress(*columns, *times, console=console) as progress:
        task = progress.add_task("decoding", total=total, completed=done)
        for number, one in enumerate(found, 1):
            yield one
            progress.advance(task)
            now = time.monotonic()
            if not console.is_terminal and now - shown >= _LINE_EVERY:
                shown, left = now, (now - began) / number * (total - done - number)
                print(
                    f"decoding: {done + number} of {total}, {timedelta(seconds=round(left))} left",
                    file=sys.stderr,
                )


def answered(
    outcomes: Iterator[Outcome], settings: Settings, scorer: SentenceScorer | None
) -> Iterator[_Found]:
    """Yield each outcome with its answer, in order. None: the search failed."""
    waiting: deque[tuple[Outcome, PendingAnswer | None]] = deque()
    with contextlib.closing(Answering(scorer)) as answering:
        for outcome in outcomes:
            pending = None if outcome.problem else answering.submit(outcome.hypotheses, settings)
            waiting.append((outcome, pending))
            while waiting and (len(waiting) > _AHEAD or _ready(waiting[0][1])):
                yield _settled(*waiting.popleft())
        while waiting:
            yield _settled(*waiting.popleft())


def _ready(pending: PendingAnswer | None) -> bool:
    return pending is None or pending.done()


def _settled(outcome: Outcome, pending: PendingAnswer | None) -> tuple[Outcome, Answer | None]:
    return outcome, None if pending is None else pending.result()


@contextlib.contextmanager
def searched(
    model: SearchModel,
    settings: Settings,
    logits: Logits,
    workers: int,
    hot_words: Mapping[str, HotWord] = NO_HOT_WORDS,
) -> Iterator[Iterator[Outcome]]:
    """Yield the outcome of every trial, in order, from this process or from a pool of workers."""
    search = model.search(settings, hot_words)
    indices = range(len(logits.trials))
    workers = min(workers, max(len(indices), 1))
    if workers == 1:
        yield (decode_trial(search, logits.trials[index], logits.of(index)) for index in indices)
        return
    global _worker
    _worker = (search, logits)
    # Forked before any thread starts (the progress bar has one), with the model already in memory.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _prepare_worker, (os.getpid(),))
    try:
        yield _from_pool(pool, search, logits)
    except BaseException:
        # Nobody needs the sentences under way any more. Some would last minutes.
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _from_pool(pool: ProcessPoolExecutor, search: Search, logits: Logits) -> Iterator[Outcome]:
    """Yield the outcomes in order, from this process once one of the pool was killed."""
    count, done = len(logits.trials), 0
    try:
        for outcome in pool.map(_decode_index, range(count), chunksize=4):
            yield outcome
            done += 1
        return
    except BrokenProcessPool:
        print(
            "warning: a worker process was killed, most often because memory ran out; the "
            f"{count - done} trials that are left are decoded by one process. Next time, use "
            "fewer --workers or a smaller max_active",
            file=sys.stderr,
        )
    # Not by new processes: this one has threads by now, which a fork does not copy.
    for index in range(done, count):
        yield decode_trial(search, logits.trials[index], logits.of(index))


def _prepare_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end this worker when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent)


def _decode_index(index: int) -> Outcome:
    assert _worker is not None
    search, logits = _worker
    return decode_trial(search, logits.trials[index], logits.of(index))
