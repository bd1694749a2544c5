"""What comes back from a language-model server: candidates, and what can go wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lm_server.errors import UserError
from lm_server.protocol import ProtocolError, Scored, decode_scoring


class LanguageModelError(UserError, RuntimeError):
    """The server refused a message, or answered with nothing that can be used."""


class LanguageModelUnavailableError(LanguageModelError):
    """Redis or the server behind it does not answer; the next trial would fare no better."""


@dataclass(frozen=True)
class Decoded:
    """What became of one trial: `candidates` best first, or None with the reason in `error`.

    `problem` says why they are the n-gram model's although a large model should have rescored them.
    """

    name: str
    candidates: list[Scored] | None
    error: str | None
    seconds: float
    problem: str | None = None


def mask_password(url: str) -> str:
    """A Redis URL fit for messages: `redis://user:***@host:6379/0`."""
    # Up to the last @ of all, so that a password with a forgotten %2F is not shown by half.
    login_masked = re.sub(r"(://[^:@/?]*):.*@", r"\1:***@", url)
    return re.sub(r"(?i)([?&]password=)[^&]*", r"\1***", login_masked)


def candidates_of(answer: Mapping[bytes, bytes]) -> list[Scored]:
    """Fields of a final entry -> candidates, best total first, each sentence once.

    A candidate may be the empty sentence: nothing was said. A server writes 0 for "no large
    language model"; where all candidates have it, `llm` is None.

    Raises:
      LanguageModelError: there is no candidate, or the scores cannot be read.
    """
    best = answer.get(b"lm_response_final", b"").decode()
    if b"scoring" not in answer:
        unknown = float("nan")
        # Without scores, an empty text is what published servers send when they found nothing.
        candidates = [Scored(best, unknown, unknown, None, unknown)] if best.strip() else []
    else:
        try:
            candidates = decode_scoring(answer[b"scoring"].decode())
        except ProtocolError as error:
            raise LanguageModelError(f"the scores of {best!r} cannot be read: {error}") from error
    if not candidates:
        raise LanguageModelError(
            "the server found no sentence, not even an empty one, for these logits: were there "
            "frames? If so, widen its beam, or look at the logits' scale"
        )
    unscored = all(candidate.llm == 0.0 for candidate in candidates)
    candidates = [
        Scored(
            *(one.sentence.strip(), one.acoustic, one.ngram),
            *(None if unscored else one.llm, one.total),
        )
        for one in candidates
    ]
    unique: dict[str, Scored] = {}
    for candidate in sorted(candidates, key=lambda scored: scored.total, reverse=True):
        unique.setdefault(candidate.sentence, candidate)
    return list(unique.values())


def error_text(fields: Mapping[bytes, bytes]) -> str:
    """What an error entry says."""
    for name in (b"error", b"message"):
        if name in fields:
            return fields[name].decode(errors="replace")
    texts = (
        f"{key.decode(errors='replace')}={v.decode(errors='replace')}" for key, v in fields.items()
    )
    return ", ".join(texts) or "without a text"
