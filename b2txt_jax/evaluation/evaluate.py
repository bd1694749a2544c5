"""From decoded trials to `evaluation.json`: what failed, PER, WER with and without language model.

Every rate is also counted apart for sentences that occur in the train split and those that do not.

`run_language_model` and `run_workers` alone leave this process. `evaluate` is pure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.evaluation.greedy_words import greedy_words
from b2txt_jax.evaluation.intervals import Interval, bootstrap_interval
from b2txt_jax.metrics import (
    ErrorRate,
    error_rate,
    greedy_decode,
    phoneme_error_rates,
    total,
    total_by,
    word_error_rates,
)
from lm_server.client.answers import Result
from lm_server.client.client import Client, Progress
from lm_server.client.jobs import JobClient
from lm_server.files.atomic_file import replacing
from lm_server.hypothesis import Answer
from lm_server.lexicon.text_rules import normalise, scored_words

UNKNOWN_CORPUS = "unknown"


@dataclass(frozen=True)
class Failure:
    """A trial without an answer of the language model, with the reason."""

    trial: str
    reason: str


@dataclass(frozen=True)
class Rates:
    """One kind of error rate: of all trials, per session, per corpus (empty if none is known).

    Attributes:
      all, per_session, per_corpus: the rates.
      trials: how many there are.
      interval: of `all`. None: there is too little to draw from.
      seen, unseen: the same of the trials whose sentence occurs in the train split, and of the
        others. None: it is not known which do.
    """

    all: ErrorRate
    per_session: Mapping[str, ErrorRate]
    per_corpus: Mapping[str, ErrorRate]
    trials: int
    interval: Interval | None
    seen: Rates | None = None
    unseen: Rates | None = None

    def to_json(self) -> dict[str, Any]:
        """Return {all, trials, interval, per_session, per_corpus, seen, unseen}.

        Rates have errors, length and rate. The halves have no halves.
        """
        found = {
            "all": _rate_json(self.all),
            "trials": self.trials,
            "interval": self.interval and self.interval.to_json(),
            "per_session": {name: _rate_json(r) for name, r in self.per_session.items()},
            "per_corpus": {name: _rate_json(r) for name, r in self.per_corpus.items()},
        }
        if self.seen and self.unseen:
            found |= {"seen": self.seen.to_json(), "unseen": self.unseen.to_json()}
        return found


@dataclass(frozen=True)
class Row:
    """One trial: its answer and what was really said.

    Attributes:
      trial: its name.
      true: what was said. None: unknown.
      answer: of the language model. None: it failed.
      rate: errors against the true words. A failed trial has all of them wrong. None: unknown.
      oracle: the same of the hypothesis in the n-best list that is nearest to the truth.
      seen: whether the sentence occurs in the train split. None: unknown.
      per: errors against the true phonemes. None: unknown.
      corpus: of the sentence. None: unknown.
    """

    trial: str
    true: str | None
    answer: Answer | None
    rate: ErrorRate | None
    oracle: ErrorRate | None = None
    seen: bool | None = None
    per: ErrorRate | None = None
    corpus: str | None = None

    @property
    def decoded(self) -> str | None:
        """The decoded sentence. None: the trial failed."""
        return self.answer.sentence if self.answer and self.answer.hypotheses else None

    def to_json(self) -> dict[str, Any]:
        """Return {trial, true, decoded, errors, oracle_errors, words, phoneme_errors, phonemes,
        corpus, seen}."""
        return {
            "trial": self.trial,
            "true": self.true,
            "decoded": self.decoded,
            "errors": self.rate and self.rate.errors,
            "oracle_errors": self.oracle and self.oracle.errors,
            "words": self.rate and self.rate.length,
            "phoneme_errors": self.per and self.per.errors,
            "phonemes": self.per and self.per.length,
            "corpus": self.corpus,
            "seen": self.seen,
        }


@dataclass(frozen=True)
class Evaluation:
    """The content of `evaluation.json`. Rates are None for a split without references."""

    split: str
    trials: int
    failed: tuple[Failure, ...]
    per: Rates | None
    wer: Rates | None
    wer_oracle: Rates | None
    """Of each n-best list's hypothesis nearest to the truth: no re-ranking gets below it."""
    wer_without_lm: Rates | None
    seconds_per_sentence: float | None
    checkpoint: Mapping[str, Any]
    """Step, weights and parameters, how it was chosen, and what the decoder was tuned for."""
    settings: Mapping[str, Any]
    made: Mapping[str, Any]
    """Date, command, commit and versions, and fingerprints of the data and of the parameters."""
    sentences: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain objects for `json.dump`."""
        return {
            "split": self.split,
            "trials": self.trials,
            "failed": [vars(failure) for failure in self.failed],
            "per": self.per and self.per.to_json(),
            "wer": self.wer and self.wer.to_json(),
            "wer_oracle": self.wer_oracle and self.wer_oracle.to_json(),
            "wer_without_lm": self.wer_without_lm and self.wer_without_lm.to_json(),
            "seconds_per_sentence": self.seconds_per_sentence,
            "checkpoint": dict(self.checkpoint),
            "settings": dict(self.settings),
            "made": dict(self.made),
            "sentences": [row.to_json() for row in self.sentences],
        }


def session_of(trial: str) -> str:
    """Return `t15.2023.08.13` of `t15.2023.08.13/trial_0007`."""
    return trial.split("/", 1)[0]


def run_language_model(
    logits: Sequence[np.ndarray],
    names: Sequence[str],
    url: str,
    progress: Progress | None = None,
    connect: Callable[[str], Client] = Client,
) -> list[Result]:
    """Decode every trial on the server at `url`, one after another.

    Args:
      logits: per trial [frames, 41] in the RNN's order.
      names: per trial, such as `t15.2023.08.13/trial_0007`.
      url: Redis, where the server listens.
      progress: called as progress(trials done, trials in all).
      connect: makes the client, for other time-outs than the usual ones.

    Raises:
      LanguageModelUnavailableError: Redis or the server does not answer, or stopped answering.
    """
    with connect(url) as client:
        client.check()
        return list(client.decode_all(logits, names, progress))


def run_workers(
    logits: Sequence[np.ndarray],
    names: Sequence[str],
    url: str,
    progress: Progress | None = None,
) -> list[Result]:
    """As `run_language_model`, by the `lm-server worker` processes at `url`, many at a time.

    Raises:
      LanguageModelUnavailableError: Redis stays away, or there is no worker.
    """
    with JobClient(url, notice=lambda text: print(text, file=sys.stderr)) as client:
        return client.decode_all(logits, names, progress=progress)


def evaluate(
    *,
    split: str,
    results: Sequence[Result],
    logits: Sequence[np.ndarray] | None,
    labels: Sequence[np.ndarray] | None = None,
    sentences: Sequence[str] | None = None,
    corpora: Sequence[str | None] | None = None,
    train_sentences: Collection[str] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    made: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score decoded trials against what was said, where that is known.

    Args:
      split: `val` or `test`.
      results: of `run_language_model` or `run_workers`, in the published order. A failed trial
        counts with all its words as errors, so that failing cannot improve a rate.
      logits: per trial [frames, 41] in the RNN's order. None: unknown, so that there is no PER.
      labels: per trial the true class ids. None: the test split.
      sentences: per trial the true sentence. None: the test split.
      corpora: per trial its corpus, None where it is unknown. None: no corpus is known.
      train_sentences: what is said in the train split. A sentence occurs there if it equals one
        after the normalisation of the WER. None: unknown.
      checkpoint: that made the logits.
      settings: whatever explains the figures (checkpoint, language model, scales).
      made: the origin of the result.

    Raises:
      ValueError: the lists differ in length.
    """
    given = {"logits": logits, "labels": labels, "sentences": sentences, "corpora": corpora}
    for what, values in given.items():
        if values is not None and len(values) != len(results):
            raise ValueError(
                f"found {len(values)} {what} for {len(results)} trials; needed one each"
            )

    sessions = [session_of(result.name) for result in results]
    known = [corpus or UNKNOWN_CORPUS for corpus in corpora or ()] if any(corpora or ()) else None
    seen: Sequence[bool | None] = [None] * len(results)
    if sentences is not None and train_sentences is not None:
        in_train = set(map(normalise, train_sentences))
        seen = [normalise(sentence) in in_train for sentence in sentences]

    def some(rates: Sequence[ErrorRate], trials: Sequence[int]) -> Rates:
        chosen, days = [rates[n] for n in trials], [sessions[n] for n in trials]
        per_corpus = total_by([known[n] for n in trials], chosen) if known else {}
        interval = bootstrap_interval(days, chosen)
        return Rates(total(chosen), total_by(days, chosen), per_corpus, len(trials), interval)

    def grouped(rates: Sequence[ErrorRate]) -> Rates:
        found = some(rates, range(len(results)))
        if sentences is None or train_sentences is None:
            return found
        return replace(
            found,
            seen=some(rates, [n for n, in_train in enumerate(seen) if in_train]),
            unseen=some(rates, [n for n, in_train in enumerate(seen) if not in_train]),
        )

    greedy = [greedy_decode(frames) for frames in logits or ()]
    true: Sequence[str | None] = [None] * len(results)
    rates: Sequence[ErrorRate | None] = [None] * len(results)
    oracle: Sequence[ErrorRate | None] = [None] * len(results)
    phonemes: Sequence[ErrorRate | None] = [None] * len(results)
    per = wer = wer_oracle = without_lm = None
    if labels is not None and logits is not None:
        phoneme_rates = phoneme_error_rates(labels, greedy)
        phonemes, per = phoneme_rates, grouped(phoneme_rates)
    if sentences is not None:
        answers = [result.answer for result in results]
        texts = [answer.sentence if answer else "" for answer in answers]
        word_rates = word_error_rates(sentences, texts)
        nearest = [_oracle(said, answer) for said, answer in zip(sentences, answers, strict=True)]
        true, rates, wer = sentences, word_rates, grouped(word_rates)
        oracle, wer_oracle = nearest, grouped(nearest)
        if logits is not None:
            pairs = zip(sentences, greedy, strict=True)
            without_lm = grouped([error_rate(scored_words(s), greedy_words(g)) for s, g in pairs])
    rows = tuple(
        Row(result.name, said, result.answer, *rest)
        for result, said, *rest in zip(
            results,
            true,
            rates,
            oracle,
            seen,
            phonemes,
            corpora or [None] * len(results),
            strict=True,
        )
    )
    times = [result.seconds for result in results if result.answer is not None]
    return Evaluation(
        split=split,
        trials=len(results),
        failed=tuple(
            Failure(row.trial, result.error or "the language model found no sentence for it")
            for row, result in zip(rows, results, strict=True)
            if row.decoded is None
        ),
        per=per,
        wer=wer,
        wer_oracle=wer_oracle,
        wer_without_lm=without_lm,
        seconds_per_sentence=sum(times) / len(times) if times else None,
        checkpoint=dict(checkpoint or {}),
        settings=dict(settings or {}),
        made=dict(made or {}),
        sentences=rows,
    )


def _oracle(sentence: str, answer: Answer | None) -> ErrorRate:
    """Return the errors of the n-best list's hypothesis that is nearest to the truth."""
    texts = [one.sentence for one in answer.hypotheses] if answer else []
    words = scored_words(sentence)
    found = [error_rate(words, scored_words(text)) for text in texts or [""]]
    return min(found, key=lambda rate: rate.errors)


def submission_texts(evaluation: Evaluation) -> list[str]:
    """Return the sentences for `submission.csv`, in order. A failed trial keeps an empty row."""
    return [row.decoded or "" for row in evaluation.sentences]


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write `evaluation.json`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_answers(path: Path, evaluation: Evaluation) -> None:
    """Write each trial's answer as a line of JSON, as `lm-server decode` does. A failed trial has
    no line."""
    lines = (
        json.dumps({"trial": row.trial, **_finite(row.answer.as_json())}, ensure_ascii=False)
        for row in evaluation.sentences
        if row.answer
    )
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _finite(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer with None for scores that a server did not send, which are NaN."""
    for one in answer["nbest"]:
        one |= {key: None for key, value in one.items() if value != value}
    return answer


def _rate_json(rate: ErrorRate) -> dict[str, Any]:
    return {"errors": rate.errors, "length": rate.length, "rate": rate.rate}
