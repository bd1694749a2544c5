"""What a language-model server sends back, and what can go wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from lm_server.errors import UserError
from lm_server.hypothesis import Answer, Hypothesis
from lm_server.protocol import ProtocolError, decode_scoring


class LanguageModelError(UserError, RuntimeError):
    """The server refused a message, or its answer cannot be used."""


class LanguageModelUnavailableError(LanguageModelError):
    """Redis or the server behind it does not answer. The next trial would fare no better."""


@dataclass(frozen=True)
class Result:
    """One decoded trial. `answer` is None where it failed, for the reason `error`."""

    name: str
    answer: Answer | None
    error: str | None
    seconds: float


def read_answer(fields: Mapping[bytes, bytes]) -> Answer:
    """Return the answer in a final entry or a job's result.

    Its hypotheses are distinct, the server's answer first, then by their totals. One may be the
    empty sentence: nothing was said. A published server sends no confidences, and without an n-best
    list no scores, which are NaN then.

    Raises:
      LanguageModelError: there is no candidate, or the scores or confidences cannot be read.
    """
    best = _text(fields, b"lm_response_final")
    if b"scoring" in fields:
        try:
            found = decode_scoring(_text(fields, b"scoring"))
        except ProtocolError as error:
            raise LanguageModelError(f"the scores of {best!r} cannot be read: {error}") from error
    else:
        nan = float("nan")
        # Without scores, an empty text is what published servers send when they found nothing.
        found = [Hypothesis(tuple(best.split()), nan, nan, total=nan)] if best.strip() else []
    if not found:
        raise LanguageModelError(
            "the server found no sentence, not even an empty one, for these logits: were there "
            "frames? If so, widen its beam, or look at the logits' scale"
        )
    unique: dict[tuple[str, ...], Hypothesis] = {}
    # Rounded as the server ranks, whose order stays where totals are equal.
    for one in sorted(found, key=lambda one: round(one.total or 0.0, 6), reverse=True):
        unique.setdefault(one.words, one)
    hypotheses = tuple(unique.values())
    if b"lm_response_final" in fields:
        # By `minimum_bayes_risk` a server answers another than the likeliest.
        hypotheses = tuple(sorted(hypotheses, key=lambda one: one.sentence != best))
    try:
        words = tuple(map(float, json.loads(fields.get(b"word_confidences", b"[]"))))
        confidence, temperature = (
            float(fields[name]) if name in fields else None
            for name in (b"confidence", b"temperature")
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise LanguageModelError(f"the confidences of {best!r} cannot be read: {error}") from error
    return Answer(
        hypotheses,
        confidence,
        words if len(words) == len(hypotheses[0].words) else (),
        fields.get(b"rescored") == b"1",
        _text(fields, b"problem") or None,
        temperature,
    )


def error_text(fields: Mapping[bytes, bytes]) -> str:
    """Return the message of an error entry."""
    for name in (b"error", b"message"):
        if name in fields:
            return _text(fields, name)
    pairs = (f"{name.decode(errors='replace')}={_text(fields, name)}" for name in fields)
    return ", ".join(pairs) or "without a text"


def _text(fields: Mapping[bytes, bytes], name: bytes) -> str:
    return fields.get(name, b"").decode(errors="replace")
