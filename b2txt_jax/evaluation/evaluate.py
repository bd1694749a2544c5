"""From decoded trials to `evaluation.json`: what failed, PER, WER with and without language model.

`run_language_model` is the only part that leaves this process; `evaluate` is pure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from b2txt_jax.evaluation.greedy_words import greedy_words
from b2txt_jax.metrics import (
    ErrorRate,
    error_rate,
    greedy_decode,
    phoneme_error_rates,
    total,
    total_by,
    word_error_rates,
)
from lm_server.client.answers import Decoded
from lm_server.client.client import Client, Progress
from lm_server.client.jobs import JobClient
from lm_server.protocol import Scored
from lm_server.text_rules import scored_words

UNKNOWN_CORPUS = "unknown"


@dataclass(frozen=True)
class Failure:
    """A trial without an answer of the language model, and why."""

    trial: str
    reason: str


@dataclass(frozen=True)
class Rates:
    """One kind of error rate: in all, per session, per corpus (empty when no corpus is known)."""

    all: ErrorRate
    per_session: Mapping[str, ErrorRate]
    per_corpus: Mapping[str, ErrorRate]

    def to_json(self) -> dict[str, Any]:
        """{all, per_session, per_corpus}, each with errors, length, rate (null without length)."""
        return {
            "all": _rate_json(self.all),
            "per_session": {name: _rate_json(r) for name, r in self.per_session.items()},
            "per_corpus": {name: _rate_json(r) for name, r in self.per_corpus.items()},
        }


@dataclass(frozen=True)
class SentenceResult:
    """One trial: `decoded` is None where the language model failed, `true` where there is none.

    `errors` of `words` true words are wrong; a failed trial has all of them wrong. Both are None
    without a true sentence.
    """

    trial: str
    true: str | None
    decoded: str | None
    errors: int | None
    words: int | None


@dataclass(frozen=True)
class Evaluation:
    """Everything that `evaluation.json` holds; rates are None for a split without references."""

    split: str
    trials: int
    failed: tuple[Failure, ...]
    per: Rates | None
    wer: Rates | None
    wer_without_lm: Rates | None
    seconds_per_sentence: float | None
    settings: Mapping[str, Any]
    sentences: tuple[SentenceResult, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain objects for `json.dump`."""
        return {
            "split": self.split,
            "trials": self.trials,
            "failed": [vars(failure) for failure in self.failed],
            "per": self.per and self.per.to_json(),
            "wer": self.wer and self.wer.to_json(),
            "wer_without_lm": self.wer_without_lm and self.wer_without_lm.to_json(),
            "seconds_per_sentence": self.seconds_per_sentence,
            "settings": dict(self.settings),
            "sentences": [vars(sentence) for sentence in self.sentences],
        }


class LanguageModelRun(NamedTuple):
    """What a language model made of all trials.

    Attributes:
      decoded: per trial the candidates, best first, or None when it failed.
      failures: the trials that failed.
      seconds: per decoded sentence; None when there is none.
      not_rescored: the trials with the n-gram model's answer where a large model should have
        rescored it.
    """

    decoded: list[list[Scored] | None]
    failures: list[Failure]
    seconds: float | None
    not_rescored: list[Failure]


def session_of(trial: str) -> str:
    """`t15.2023.08.13/trial_0007` -> `t15.2023.08.13`."""
    return trial.split("/", 1)[0]


def run_language_model(
    logits: Sequence[np.ndarray],
    names: Sequence[str],
    url: str,
    progress: Progress | None = None,
    connect: Callable[[str], Client] = Client,
) -> LanguageModelRun:
    """Decodes every trial on the server at `url`, one after another.

    Args:
      logits: per trial [frames, 41] in the RNN's order.
      names: per trial, such as `t15.2023.08.13/trial_0007`.
      url: Redis, where the server listens.
      progress: called as progress(trials done, trials in all).
      connect: makes the client, for other time-outs than the usual ones.

    Raises:
      LanguageModelUnavailableError: Redis or the server does not answer, at the start or any more.
    """
    with connect(url) as client:
        client.check()
        return _summed_up(list(client.decode_all(logits, names, progress)))


def run_workers(
    logits: Sequence[np.ndarray],
    names: Sequence[str],
    url: str,
    progress: Progress | None = None,
) -> LanguageModelRun:
    """As `run_language_model`, by the `lm-server worker` processes at `url`, many at a time.

    Raises:
      LanguageModelUnavailableError: Redis stays away, or there is no worker.
    """
    with JobClient(url) as client:
        return _summed_up(client.decode_all(logits, names, progress=progress))


def _summed_up(results: Sequence[Decoded]) -> LanguageModelRun:
    failures = [Failure(r.name, r.error or "") for r in results if r.candidates is None]
    times = [r.seconds for r in results if r.candidates is not None]
    seconds = sum(times) / len(times) if times else None
    problems = [Failure(r.name, r.problem) for r in results if r.problem]
    return LanguageModelRun([r.candidates for r in results], failures, seconds, problems)


def evaluate(
    *,
    split: str,
    names: Sequence[str],
    logits: Sequence[np.ndarray],
    decoded: Sequence[Sequence[Scored] | None],
    labels: Sequence[np.ndarray] | None = None,
    sentences: Sequence[str] | None = None,
    corpora: Sequence[str | None] | None = None,
    failures: Sequence[Failure] = (),
    seconds_per_sentence: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Scores decoded trials against what was said, where that is known.

    Args:
      split: `val` or `test`.
      names: per trial, such as `t15.2023.08.13/trial_0007`, in the published order.
      logits: per trial [frames, 41] in the RNN's order.
      decoded: per trial the language model's candidates, best first, or None when it failed. A
        failed trial counts with all its words as errors, so that failing cannot improve a rate.
      labels: per trial the true class ids; None for the test split.
      sentences: per trial the true sentence; None for the test split.
      corpora: per trial its corpus, None where it is unknown; None when none is known.
      failures: from `run_language_model`: the reasons of the trials that have no candidates.
      seconds_per_sentence: from `run_language_model`.
      settings: whatever explains the figures (checkpoint, language model, scales).

    Raises:
      ValueError: the lists differ in length.
    """
    given = {"logits": logits, "decoded": decoded, "labels": labels, "sentences": sentences}
    for what, values in {**given, "corpora": corpora}.items():
        if values is not None and len(values) != len(names):
            raise ValueError(f"found {len(values)} {what} for {len(names)} trials; needed one each")

    def grouped(rates: Sequence[ErrorRate]) -> Rates:
        known = [corpus or UNKNOWN_CORPUS for corpus in corpora or ()]
        per_corpus = total_by(known, rates) if any(corpora or ()) else {}
        return Rates(total(rates), total_by([session_of(n) for n in names], rates), per_corpus)

    greedy = [greedy_decode(frames) for frames in logits]
    texts = [candidates[0].sentence if candidates else None for candidates in decoded]
    per = wer = without_lm = None
    errors: list[ErrorRate | None] = [None] * len(names)
    if labels is not None:
        per = grouped(phoneme_error_rates(labels, greedy))
    if sentences is not None:
        rates = word_error_rates(sentences, [text or "" for text in texts])
        errors = list(rates)
        wer = grouped(rates)
        pairs = zip(sentences, greedy, strict=True)
        without_lm = grouped([error_rate(scored_words(s), greedy_words(g)) for s, g in pairs])
    reasons = {failure.trial: failure.reason for failure in failures}
    failed = tuple(
        Failure(name, reasons.get(name, "no sentence was given for it"))
        for name, text in zip(names, texts, strict=True)
        if text is None
    )
    results = tuple(
        SentenceResult(
            trial=name,
            true=None if sentences is None else sentences[index],
            decoded=texts[index],
            errors=rate.errors if rate else None,
            words=rate.length if rate else None,
        )
        for index, (name, rate) in enumerate(zip(names, errors, strict=True))
    )
    return Evaluation(
        split=split,
        trials=len(names),
        failed=failed,
        per=per,
        wer=wer,
        wer_without_lm=without_lm,
        seconds_per_sentence=seconds_per_sentence,
        settings=dict(settings or {}),
        sentences=results,
    )


def submission_texts(evaluation: Evaluation) -> list[str]:
    """Sentences for `submission.csv`, in order; a failed trial keeps its row, without a text."""
    return [sentence.decoded or "" for sentence in evaluation.sentences]


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Writes `evaluation.json`; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        text = json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _rate_json(rate: ErrorRate) -> dict[str, Any]:
    return {"errors": rate.errors, "length": rate.length, "rate": rate.rate}
