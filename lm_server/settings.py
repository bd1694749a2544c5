"""How a sentence is searched: every knob, its meaning, its range and its command-line option."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields

from lm_server.errors import UserError

LIMITS: Mapping[str, tuple[float, float]] = {
    "acoustic_scale": (0.001, 100.0),
    "blank_penalty": (0.001, 1e6),
    "beam": (0.001, 1000.0),
    "max_active": (1, 10_000),
    "nbest": (1, 10_000),
}
"""Least and greatest value of each setting. Within them the scores of the longest sentence are
finite, a beam cannot reach over `_FORBIDDEN`, and the search's memory stays within a machine's."""


class SettingsError(UserError, ValueError):
    """A setting outside its range; says what was found and what was needed."""


@dataclass(frozen=True)
class Settings:
    """How a sentence is searched.

    Attributes:
      acoustic_scale: factor of the acoustic log-probabilities, against the n-gram model's factor of
        1.
      blank_penalty: ln(blank_penalty) is taken from the blank's log-probability in every frame; 1
        changes nothing.
      beam: hypotheses worse than the best by more than this are dropped (ln of the scaled total).
      max_active: hypotheses kept after each frame.
      nbest: candidate sentences in an answer.
    """

    acoustic_scale: float = 1.2
    blank_penalty: float = 4.0
    beam: float = 18.0
    max_active: int = 100
    nbest: int = 100

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least, greatest = LIMITS[field.name]
            # Written so that NaN is refused too.
            if not least <= value <= greatest:
                raise SettingsError(
                    f"{field.name} is {value}; needed a number from {least:g} to {greatest:g}"
                )
        for name in ("max_active", "nbest"):
            if getattr(self, name) != int(getattr(self, name)):
                raise SettingsError(f"{name} is {getattr(self, name)}; needed a whole number")


_HELP: Mapping[str, str] = {
    "acoustic_scale": "factor of the acoustic log-probabilities",
    "blank_penalty": "ln of it is taken from the blank's log-probability",
    "beam": "hypotheses worse than the best by more than this (ln) are dropped",
    "max_active": "hypotheses kept after each frame",
    "nbest": "candidate sentences in an answer",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for every setting."""
    for field in fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=None,
            help=f"{_HELP[field.name]} (default {field.default:g})",
        )


def from_options(args: argparse.Namespace) -> Settings:
    """The settings that the options of `add_options` give.

    Raises:
      SettingsError: a value is outside its range.
    """
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    return dataclasses.replace(
        Settings(), **{name: value for name, value in given.items() if value is not None}
    )
