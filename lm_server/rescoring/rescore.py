"""Rescoring beside the search: a thread that asks a large language model about finished sentences.

Nothing here imports torch or transformers before a model is loaded.
"""

from __future__ import annotations

import argparse
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from lm_server.hypothesis import Hypothesis
from lm_server.rescoring.answer import (
    Answer,
    RescoringError,
    SentenceScorer,
    augmented,
    checked_scores,
    ranked_answer,
    sentences_to_score,
)
from lm_server.settings import Settings

_LOG = logging.getLogger(__name__)
DEFAULT_MODEL = "facebook/opt-6.7b"
"""What `--llm` without a folder means; the published server's model."""
TEXT_FORMS = ("auto", "plain", "sentence")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "float16", "bfloat16")
_MERGED = 8
"""Waiting sentences that one batch takes at most, so that none waits long for the others."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --llm and what says how to run it."""
    parser.add_argument(
        "--llm",
        nargs="?",
        const=DEFAULT_MODEL,
        default=None,
        metavar="DIR",
        help="rescore with the causal language model in this folder (transformers format), or one "
        f"of the Hugging Face cache by its name (without a value {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--llm-device", choices=DEVICES, default="auto", help="where it runs (default: GPU if any)"
    )
    parser.add_argument(
        "--llm-dtype",
        choices=DTYPES,
        default="auto",
        help="its numbers (default: float16 on a GPU, float32 on a CPU; bfloat16 is faster on CPUs "
        "made for it, and coarser)",
    )
    parser.add_argument(
        "--llm-text",
        choices=TEXT_FORMS,
        default="auto",
        help="what it reads: plain: the words as they are, as published for OPT; sentence: "
        "capitalised and with a full stop (default: as its folder says, else plain)",
    )


def from_options(args: argparse.Namespace) -> SentenceScorer | None:
    """The scorer that the options of `add_options` ask for; None without --llm.

    Raises:
      RescoringError: the model cannot be loaded.
    """
    if args.llm is None:
        return None
    return load_scorer(args.llm, args.llm_device, args.llm_text, args.llm_dtype)


def load_scorer(
    folder: Path | str, device: str = "auto", text_form: str = "auto", dtype: str = "auto"
) -> SentenceScorer:
    """Loads a causal language model; takes seconds to minutes.

    Args:
      folder: a folder in the format of transformers, or the name (owner/model) of one in the
        Hugging Face cache. Nothing is downloaded.
      device: auto (a GPU if there is one), cpu or cuda.
      text_form: one of TEXT_FORMS.
      dtype: one of DTYPES; auto is float16 on a GPU, float32 on a CPU.

    Raises:
      RescoringError: there is no such model or it cannot be used; says how to get one.
      ModuleNotFoundError: the extra `llm` is not installed.
    """
    from lm_server.rescoring.causal_lm import CausalLM

    return CausalLM(folder, device, text_form, dtype)


@dataclass(frozen=True)
class _Task:
    candidates: tuple[Hypothesis, ...]
    settings: Settings
    context: str
    sentences: list[str]
    answer: Future[Answer]

    @property
    def key(self) -> tuple[str, float]:
        """What sentences of one batch have in common: context, length penalty."""
        return self.context, self.settings.length_penalty


class RescoringQueue:
    """Completes answers in a thread of its own, in the order of submission.

    What waits when a batch ends goes into the next one together (as long as the context is the
    same), so a sentence is done one batch after the batch that runs when it comes.
    """

    def __init__(self, scorer: SentenceScorer | None) -> None:
        """Without a scorer the answers are those of the n-gram model."""
        self._scorer = scorer
        self._waiting: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="rescoring", daemon=True)
        self._thread.start()

    def submit(
        self, hypotheses: Sequence[Hypothesis], settings: Settings, context: str = ""
    ) -> Future[Answer]:
        """Takes a finished sentence's candidates; the future gives what `answer.complete` would.

        A future may be cancelled while it waits.

        Raises:
          RescoringError: the queue is closed.
        """
        candidates = augmented(hypotheses, settings)
        sentences = sentences_to_score(candidates, settings)
        answer: Future[Answer] = Future()
        task = _Task(candidates, settings, context, sentences, answer)
        with self._changed:
            if self._closed:
                raise RescoringError("the rescoring queue is closed: the server is stopping")
            self._waiting.append(task)
            self._changed.notify()
        return answer

    @property
    def waiting(self) -> int:
        """Sentences that no batch has taken yet."""
        return len(self._waiting)

    def close(self) -> None:
        """Completes what was submitted and ends the thread; nothing can be submitted any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                tasks = self._next_batch()
            if not tasks:
                return
            running = [task for task in tasks if task.answer.set_running_or_notify_cancel()]
            if running:
                self._complete(running)

    def _next_batch(self) -> list[_Task]:
        """The first that wait, as far as they have one context; none when all is done."""
        tasks: list[_Task] = []
        while self._waiting and len(tasks) < _MERGED:
            if tasks and self._waiting[0].key != tasks[0].key:
                break
            tasks.append(self._waiting.popleft())
        return tasks

    def _complete(self, tasks: Sequence[_Task]) -> None:
        scores: dict[str, float] | None = None
        problem: str | None = None
        sentences = list(dict.fromkeys(one for task in tasks for one in task.sentences))
        if self._scorer is not None and sentences:
            try:
                scores = checked_scores(self._scorer, sentences, *tasks[0].key)
            except RescoringError as error:
                if len(tasks) > 1:
                    # One sentence's fault must not be the others'.
                    for task in tasks:
                        self._complete([task])
                    return
                problem = str(error)
        for task in tasks:
            asked = bool(task.sentences)
            try:
                task.answer.set_result(
                    ranked_answer(
                        task.candidates,
                        task.settings,
                        scores if asked else None,
                        problem if asked else None,
                    )
                )
            # Whatever it is belongs to this sentence; the thread goes on with the others.
            except Exception as error:
                _LOG.exception("completing an answer failed")
                task.answer.set_exception(error)
