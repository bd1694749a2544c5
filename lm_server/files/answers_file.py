"""JSON lines of answers, as `lm-server decode` and `b2txt evaluate` write them, read again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_server.errors import UserError
from lm_server.files.atomic_file import regular


class AnswersFileError(UserError, ValueError):
    """A file of answers that cannot be used. The message names the line."""


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of a file of answers by trial, in their order.

    Raises:
      AnswersFileError: the file cannot be read, or a line is not an answer.
    """
    try:
        # Not at other signs, such as U+2028, which texts may hold.
        lines = [one for one in regular(path).read_text("utf-8").split("\n") if one.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise AnswersFileError(f"{path} cannot be read ({error}): decode again") from error
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            answer = json.loads(line)
            trial = answer["trial"]
            if not isinstance(trial, str) or trial in found:
                raise ValueError(f"trial {trial!r} is no name, or there twice")
            sentences = [one["sentence"] for one in answer["nbest"]]
            if not all(isinstance(one, str) for one in [answer["sentence"], *sentences]):
                raise ValueError("a sentence is no text")
            temperature = answer.get("temperature")
            if not (temperature is None or 0 < float(temperature) < math.inf):
                raise ValueError(f"temperature is {temperature!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise AnswersFileError(
                f"{path} line {number} is no answer of `b2txt evaluate` or `lm-server decode` "
                f"({error!r}): decode again"
            ) from error
        found[trial] = answer
    return found


def scored_nbest(answer: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """Return the sentences of an answer, best first, with their totals (ln) over its temperature.

    The softmax of these is the confidence of each, so that systems whose totals have other scales
    can be compared. If a sentence has no total, the first alone is returned, which is what the
    system says.
    """
    found = answer["nbest"]
    totals = [one.get("total") for one in found]
    if not all(isinstance(total, float | int) and math.isfinite(total) for total in totals):
        return [(one["sentence"], None) for one in found[:1]]
    temperature = answer.get("temperature") or 1.0
    return [
        (one["sentence"], total / temperature) for one, total in zip(found, totals, strict=True)
    ]


def unscored(sentence: str, total: float | None) -> dict[str, Any]:
    """Return a sentence as an entry of `nbest` that has no scores but its total."""
    scores = dict.fromkeys(("acoustic", "ngram", "bonus", "llm"))
    return {"sentence": sentence, **scores, "total": total}
