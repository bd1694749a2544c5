"""Results of `b2txt evaluate`, made without a run and without a server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from b2txt_jax.evaluation.command import write_results
from b2txt_jax.evaluation.evaluate import evaluate
from b2txt_jax.phonemes import sentence_to_ids
from lm_server.client.answers import Result
from lm_server.hypothesis import Answer, Hypothesis
from lm_server.lexicon.text_rules import scored_words

# pytest imports tests by path; the modules that they share are found here.
sys.path.insert(0, str(Path(__file__).parent))

from spoken import logits_of

Said = Mapping[str, tuple[str | None, Sequence[tuple[str, float]]]]
"""Trial -> (true sentence, hypotheses with their totals, best first)."""


@pytest.fixture
def make_result(tmp_path: Path) -> Callable[..., Path]:
    """Return the function that writes a result's folder from trials, named by `name`."""

    def make(name: str, said: Said, split: str = "val", **given: Any) -> Path:
        answers = []
        for trial, (_, found) in said.items():
            if not found:
                answers.append(Result(trial, None, "timed out", 0.0))
                continue
            hypotheses = tuple(
                Hypothesis(tuple(text.split()), total - 1.0, 1.0, total=total)
                for text, total in found
            )
            words = (0.9,) * len(hypotheses[0].words)
            answers.append(Result(trial, Answer(hypotheses, 0.8, words), None, 0.25))
        true = [text for text, _ in said.values() if text is not None]
        known = split != "test"
        result = evaluate(
            split=split,
            results=answers,
            logits=[
                logits_of(scored_words((found or [("", 0)])[0][0])) for _, found in said.values()
            ],
            labels=[sentence_to_ids(text.split()) for text in true] if known else None,
            sentences=true if known else None,
            checkpoint={"step": 5, "parameters": "0123abcd"},
            made={"date": "2030-01-02T03:04:05+00:00", "command": "b2txt evaluate"},
            **given,
        )
        with (
            pytest.warns()
            if not all(found for _, found in said.values())
            else contextlib.nullcontext()
        ):
            write_results(tmp_path / name, result)
        return tmp_path / name

    return make
