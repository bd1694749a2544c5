"""What both sides agree on: classes, their order, stream names and message contents.

This is the only module that the JAX side imports from `lm_server`; it needs numpy and the standard
library alone. The streams and their fields are those of the published NEJM server, so that either
end can be exchanged for the published one; `Streams.error` is ours and tells a client why an entry
was refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PHONEMES: tuple[str, ...] = (
    *("AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH"),
    *("IH", "IY", "JH", "K", "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH"),
    *("UH", "UW", "V", "W", "Y", "Z", "ZH"),
)
BLANK = "BLANK"
SILENCE = " | "
CLASSES: tuple[str, ...] = (BLANK, *PHONEMES, SILENCE)
"""The 41 classes in the RNN's order: CTC blank, 39 phonemes, silence."""
LM_CLASSES: tuple[str, ...] = (BLANK, SILENCE, *PHONEMES)
"""The same classes in the language model's order: blank, silence, 39 phonemes."""
CLASS_COUNT = len(CLASSES)

MAX_MESSAGE_FRAMES = 10_000
"""Frames of 80 ms that one input entry may hold, as many as a sentence (13 minutes, 1.6 MB); more
is refused as an error entry."""

_RNN_OF_LM = np.array([CLASSES.index(name) for name in LM_CLASSES])
_LM_OF_RNN = np.array([LM_CLASSES.index(name) for name in CLASSES])


class ProtocolError(ValueError):
    """A message that breaks the protocol; says what was found, what was needed, what to do."""


@dataclass(frozen=True)
class Streams:
    """Names of the Redis streams (published NEJM names)."""

    reset: str = "remote_lm_reset"
    input: str = "remote_lm_input"
    finalize: str = "remote_lm_finalize"
    update_params: str = "remote_lm_update_params"
    done_resetting: str = "remote_lm_done_resetting"
    partial: str = "remote_lm_output_partial"
    final: str = "remote_lm_output_final"
    done_finalizing: str = "remote_lm_done_finalizing"
    done_updating_params: str = "remote_lm_done_updating_params"
    args: str = "remote_lm_args"
    error: str = "remote_lm_error"


@dataclass(frozen=True)
class Scored:
    """One candidate sentence; every score is a natural logarithm (ln).

    `acoustic` is unscaled. `llm` is None when no large language model scored the sentence.
    """

    sentence: str
    acoustic: float
    ngram: float
    llm: float | None
    total: float


def to_lm_order(logits: np.ndarray) -> np.ndarray:
    """Reorders classes from the RNN's order to the language model's: [..., 41] -> [..., 41]."""
    return np.asarray(logits)[..., _RNN_OF_LM]


def to_rnn_order(logits: np.ndarray) -> np.ndarray:
    """Reorders classes from the language model's order to the RNN's: [..., 41] -> [..., 41]."""
    return np.asarray(logits)[..., _LM_OF_RNN]


def check_logits(logits: np.ndarray, what: str = "logits") -> np.ndarray:
    """Returns `logits` as contiguous float32 [frames, 41].

    Raises:
      ProtocolError: it is not [frames, 41], or a value is NaN or infinite.
    """
    array = np.asarray(logits)
    if array.ndim != 2 or array.shape[1] != CLASS_COUNT:
        raise ProtocolError(
            f"{what} have shape {array.shape}; needed [frames, {CLASS_COUNT}] "
            "(blank, silence and 39 phonemes): send one row per 80 ms frame"
        )
    array = np.ascontiguousarray(array, dtype=np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        frame = int(np.argwhere(~finite)[0, 0])
        raise ProtocolError(
            f"{what} hold {int((~finite).sum())} NaN or infinite values, the first in frame "
            f"{frame}; needed finite numbers: look for a diverged model or broken input features"
        )
    return array


def encode_logits(logits: np.ndarray) -> bytes:
    """Logits [frames, 41] in the language model's order -> bytes of the input entry's `logits`
    field.

    Raises:
      ProtocolError: the shape is wrong or a value is not finite.
    """
    return check_logits(logits).astype("<f4").tobytes()


def decode_logits(payload: bytes) -> np.ndarray:
    """Bytes of an input entry -> float32 [frames, 41] in the language model's order.

    Raises:
      ProtocolError: the bytes are no whole number of frames, are too many, or hold NaN or infinity.
    """
    frame_bytes = 4 * CLASS_COUNT
    if len(payload) % frame_bytes:
        raise ProtocolError(
            f"logits have {len(payload)} bytes; needed a multiple of {frame_bytes} "
            f"({CLASS_COUNT} float32 per frame): send float32 [frames, {CLASS_COUNT}] as raw bytes"
        )
    frames = len(payload) // frame_bytes
    if frames > MAX_MESSAGE_FRAMES:
        raise ProtocolError(
            f"logits have {frames} frames; at most {MAX_MESSAGE_FRAMES} fit one entry: "
            "send them in chunks"
        )
    return check_logits(np.frombuffer(payload, dtype="<f4").reshape(frames, CLASS_COUNT))


def encode_scoring(candidates: Sequence[Scored]) -> str:
    """Candidates -> the final entry's `scoring` field, `sentence;ac;ngram;llm;total` joined by `;`.

    The published format has no room for "not rescored": it is written as 0.0, as published servers
    do.

    Raises:
      ProtocolError: a sentence holds a `;`, which the format cannot carry.
    """
    fields: list[str] = []
    for candidate in candidates:
        if ";" in candidate.sentence:
            raise ProtocolError(
                f"sentence {candidate.sentence!r} holds a ';', the separator of `scoring`"
            )
        llm = 0.0 if candidate.llm is None else candidate.llm
        scores = (candidate.acoustic, candidate.ngram, llm, candidate.total)
        fields += [candidate.sentence, *(repr(float(score)) for score in scores)]
    return ";".join(fields)


def decode_scoring(text: str) -> list[Scored]:
    """The `scoring` field -> candidates, in the order sent; an empty text is an empty list.

    Raises:
      ProtocolError: the number of fields is no multiple of five, or a score is no number.
    """
    if not text:
        return []
    fields = text.split(";")
    if len(fields) % 5:
        raise ProtocolError(
            f"scoring has {len(fields)} fields; needed five per candidate: "
            "sentence;ac;ngram;llm;total"
        )
    candidates = []
    for start in range(0, len(fields), 5):
        try:
            acoustic, ngram, llm, total = (float(field) for field in fields[start + 1 : start + 5])
        except ValueError as error:
            raise ProtocolError(
                f"scoring of {fields[start]!r} is not four numbers: {error}"
            ) from error
        candidates.append(Scored(fields[start], acoustic, ngram, llm, total))
    return candidates
