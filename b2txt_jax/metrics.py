"""Error rates: edit distance over phonemes or words, summed before dividing, as NEJM does."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from rapidfuzz.distance import Levenshtein

from b2txt_jax.phonemes import BLANK_ID
from lm_server.lexicon.text_rules import scored_words
from lm_server.protocol import check_logits

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True)
class ErrorRate:
    """`errors` insertions, deletions and substitutions against `length` phonemes or words."""

    errors: int
    length: int

    def __post_init__(self) -> None:
        if self.errors < 0 or self.length < 0:
            raise ValueError(
                f"{self.errors} errors in {self.length} are impossible; both must be 0 or more: "
                "look at how they were counted"
            )

    @property
    def rate(self) -> float | None:
        """errors / length, above 1 with very many insertions. None without any reference."""
        return self.errors / self.length if self.length else None

    def __add__(self, other: ErrorRate) -> ErrorRate:
        return ErrorRate(self.errors + other.errors, self.length + other.length)

    def __str__(self) -> str:
        rate = "no reference" if self.rate is None else f"{100 * self.rate:.2f} %"
        return f"{rate} ({self.errors}/{self.length})"


@dataclass(frozen=True)
class Difference(Generic[Item]):
    """A stretch of an alignment: `decoded` items for `reference` items, equal when `same`."""

    same: bool
    reference: tuple[Item, ...]
    decoded: tuple[Item, ...]


def edit_distance(reference: Sequence[Hashable], decoded: Sequence[Hashable]) -> int:
    """Return the fewest insertions, deletions and substitutions from `decoded` to `reference`."""
    return Levenshtein.distance(*_numbered(reference, decoded))


def differences(reference: Sequence[Item], decoded: Sequence[Item]) -> list[Difference[Item]]:
    """Return a best alignment as stretches that agree or differ. Joined they are both inputs."""
    stretches = []
    for op in Levenshtein.opcodes(*_numbered(reference, decoded)):
        truth = tuple(reference[op.src_start : op.src_end])
        found = tuple(decoded[op.dest_start : op.dest_end])
        stretches.append(Difference(op.tag == "equal", truth, found))
    return stretches


def error_rate(reference: Sequence[Hashable], decoded: Sequence[Hashable]) -> ErrorRate:
    """Return the edit distance of one trial with its reference length."""
    return ErrorRate(edit_distance(reference, decoded), len(reference))


def total(rates: Iterable[ErrorRate]) -> ErrorRate:
    """Sum errors and lengths: the aggregate rate, in which a long sentence weighs more."""
    return sum(rates, ErrorRate(0, 0))


def total_by(keys: Sequence[Key], rates: Sequence[ErrorRate]) -> dict[Key, ErrorRate]:
    """Return the aggregate rate per key (a session, a corpus), in order of first appearance.

    Raises:
      ValueError: there are more keys than rates, or fewer.
    """
    _check_lengths(keys, rates, "keys", "rates")
    groups: dict[Key, ErrorRate] = {}
    for key, rate in zip(keys, rates, strict=True):
        groups[key] = groups.get(key, ErrorRate(0, 0)) + rate
    return groups


def greedy_decode(logits: np.ndarray) -> np.ndarray:
    """Return the best class per frame, repeats collapsed, blanks dropped: [P, 41] -> int32 [L].

    Silence stays, as it does in a label.

    Raises:
      ProtocolError: the logits are not [frames, 41] or hold NaN or infinity.
    """
    best = check_logits(logits).argmax(axis=1)
    starts = np.ones(len(best), bool)
    starts[1:] = best[1:] != best[:-1]
    return best[starts & (best != BLANK_ID)].astype(np.int32)


def phoneme_error_rates(
    labels: Sequence[np.ndarray], decoded: Sequence[np.ndarray]
) -> list[ErrorRate]:
    """Return one rate per trial from class ids. Silence counts as a phoneme (NEJM).

    Raises:
      ValueError: the two lists differ in length.
    """
    _check_lengths(labels, decoded, "labels", "decoded phoneme sequences")
    pairs = zip(labels, decoded, strict=True)
    return [error_rate([int(i) for i in truth], [int(i) for i in found]) for truth, found in pairs]


def word_error_rates(references: Sequence[str], decoded: Sequence[str]) -> list[ErrorRate]:
    """Return one rate per sentence over normalised words.

    Raises:
      ValueError: the two lists differ in length.
    """
    _check_lengths(references, decoded, "true sentences", "decoded sentences")
    pairs = zip(references, decoded, strict=True)
    return [error_rate(scored_words(truth), scored_words(found)) for truth, found in pairs]


def _numbered(first: Sequence[Hashable], second: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    # rapidfuzz compares hashes, which may collide (hash(-1) == hash(-2), "a" and 97). Small
    # numbers cannot.
    number: dict[Hashable, int] = {}
    first_ids = [number.setdefault(item, len(number)) for item in first]
    return first_ids, [number.setdefault(item, len(number)) for item in second]


def _check_lengths(
    first: Sequence[object], second: Sequence[object], first_name: str, second_name: str
) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"found {len(first)} {first_name} and {len(second)} {second_name}; "
            "needed one of each per trial"
        )
