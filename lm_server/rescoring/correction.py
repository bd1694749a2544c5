"""Sentences corrected by a large language model: what it is asked, and when its reply counts.

The model reads a numbered list of what decoders wrote down, and replies with one sentence
(generative error correction). It may only change what the decoders are unsure of. Everything here
is pure. What runs a model is `lm_server.rescoring.corrector`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rapidfuzz.distance import Levenshtein

from lm_server.files.answers_file import unscored
from lm_server.lexicon.text_rules import scored_words

INSTRUCTION = (
    "The lines below are attempts to write down one spoken sentence, decoded from brain signals. "
    "Each may have errors. Reply with the sentence that was most likely said, in lower case and "
    "without punctuation. Reply with nothing else."
)

CONFIDENT, SAME, CORRECTED, EMPTY = "confident", "same", "corrected", "empty"
OUTCOMES: Mapping[str, str] = {
    EMPTY: "the decoders have no sentence, so that the model is not asked",
    CONFIDENT: "the decoders are sure, so that the model is not asked",
    SAME: "the reply is the decoders' own sentence",
    CORRECTED: "the reply is used",
    "no_words": "refused: the reply has no words",
    "unfinished": "refused: the reply does not end",
    "too_long": "refused: the list is longer than the model can read",
    "new_word": "refused: a word is neither in the list nor in the vocabulary",
    "too_far": "refused: too many words differ from each sentence of the list",
    "sure_word": "refused: a word that the decoders are sure of is changed",
}
"""What can become of a sentence -> its meaning."""


@dataclass(frozen=True)
class Gate:
    """When a model is asked, and how far its reply may go.

    Attributes:
      confidence: sentences with at least this confidence are left alone.
      word_confidence: words of the decoders' sentence with at least this confidence must stay.
      edits: words that may differ from the nearest sentence of the list.
    """

    confidence: float = 0.9
    word_confidence: float = 0.99
    edits: int = 2


def candidates(lists: Sequence[Sequence[str]], nbest: int) -> list[str]:
    """Return what is listed of several systems' sentences: the first of each, so that equal ones
    count as votes, then the second of each that are not listed yet, and so on.

    >>> candidates([["a b", "a c"], ["a b", "d"]], 2)
    ['a b', 'a b', 'a c', 'd']

    Args:
      lists: of each system, best first.
      nbest: sentences of each.
    """
    found = [one[0] for one in lists if one]
    for rank in range(1, nbest):
        found += dict.fromkeys(
            one[rank] for one in lists if rank < len(one) and one[rank] not in found
        )
    return found


def messages(listed: Sequence[str], answer: str | None = None) -> list[dict[str, str]]:
    """Return the chat about a list, with the reply if it is known.

    >>> messages(["a b", "a c"])[1]["content"]
    '1. a b\\n2. a c'
    """
    lines = "\n".join(f"{number}. {one}" for number, one in enumerate(listed, start=1))
    found = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": lines}]
    return found if answer is None else [*found, {"role": "assistant", "content": answer}]


def is_confident(confidence: float | None, gate: Gate) -> bool:
    """Return whether a sentence is left alone. Without a confidence it is not."""
    return confidence is not None and confidence >= gate.confidence


def outcome(
    reply: str,
    first: str,
    listed: Sequence[str],
    word_confidences: Sequence[float],
    gate: Gate,
    vocabulary: Collection[str] = frozenset(),
) -> str:
    """Return what becomes of a sentence by a reply, one of `OUTCOMES`.

    Args:
      reply: a finished sentence.
      first: the decoders' own sentence.
      listed: the sentences that the model has read.
      word_confidences: of the words of the decoders' own sentence. Ignored where they are not as
        many.
      gate: the limits.
      vocabulary: words that may be used beside those of the list.
    """
    said, own = scored_words(reply), scored_words(first)
    if not said:
        return "no_words"
    if said == own:
        return SAME
    sentences = [own, *(scored_words(one) for one in listed)]
    if not set(said) <= {word for one in sentences for word in one}.union(vocabulary):
        return "new_word"
    if min(Levenshtein.distance(said, one) for one in sentences) > gate.edits:
        return "too_far"
    if len(word_confidences) == len(own):
        kept = {
            place
            for step in Levenshtein.opcodes(own, said)
            if step.tag == "equal"
            for place in range(step.src_start, step.src_end)
        }
        sure = {n for n, one in enumerate(word_confidences) if one >= gate.word_confidence}
        if not sure <= kept:
            return "sure_word"
    return CORRECTED


def with_outcome(answer: Mapping[str, Any], found: str, reply: str | None) -> dict[str, Any]:
    """Return an answer with what became of it. A used reply is its first sentence, without a
    confidence and without a total, so that it stays the first wherever totals rank."""
    about = {"correction": {"outcome": found, "reply": reply}}
    if found != CORRECTED or reply is None:
        return {**answer, **about}
    words = scored_words(reply)
    sentence = " ".join(words)
    others = [one for one in answer["nbest"] if scored_words(one["sentence"]) != words]
    return {
        **answer,
        "sentence": sentence,
        "confidence": None,
        "word_confidences": [],
        "nbest": [unscored(sentence, None), *others],
        **about,
    }
