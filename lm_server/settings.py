"""How a sentence is searched: every knob, its meaning, its range and its command-line option."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lm_server.errors import UserError

FORMAT = 1
"""Of settings files."""
LIMITS: Mapping[str, tuple[float, float]] = {
    "acoustic_scale": (0.001, 100.0),
    "blank_penalty": (0.001, 1e6),
    "beam": (0.001, 1000.0),
    "max_active": (1, 10_000),
    "nbest": (1, 10_000),
    "max_classes": (1, 41),
    "word_bonus": (-100.0, 100.0),
    "silence_penalty": (0.0, 1000.0),
    "lattice_beam": (0.0, 1e6),
    "ctc_blank_skip_threshold": (0.01, 1.0),
    "min_active": (0, 10_000),
    "do_opt": (0, 1),
    "alpha": (0.0, 1.0),
    "length_penalty": (-100.0, 100.0),
    "top_candidates_to_augment": (0, 100),
    "score_penalty_percent": (0.0, 1.0),
    "confidence_temperature": (0.01, 1000.0),
}
"""Least and greatest value of each setting. Within them the scores of the longest sentence are
finite, a beam cannot reach over `_FORBIDDEN`, and the search's memory stays within a machine's."""

WHOLE = ("max_active", "max_classes", "min_active", "nbest", "do_opt", "top_candidates_to_augment")
"""Settings that are whole numbers."""

ONLY_IN: Mapping[str, tuple[str, ...]] = {
    "min_active": ("wfst",),
    "max_active": ("flashlight", "pyctcdecode", "wfst"),
    "max_classes": ("flashlight", "pyctcdecode"),
    "nbest": ("flashlight", "pyctcdecode"),
    "lattice_beam": ("flashlight", "pyctcdecode"),
    "word_bonus": ("flashlight", "pyctcdecode"),
    "silence_penalty": ("flashlight", "pyctcdecode"),
    "rescore": (),
}
"""Searches in which a setting has an effect, for the settings that not every search has."""


_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    # As the published decoder is run.
    "wfst": {"acoustic_scale": 0.325, "blank_penalty": 90.0, "beam": 17.0, "max_active": 7000},
}


def without_effect(name: str, backend: str) -> str | None:
    """Why a setting or published parameter has no effect in a search, or None where it has one."""
    if backend in ONLY_IN.get(name, (backend,)):
        return None
    reasons = {
        "min_active": "it keeps at most max_active hypotheses, all within the beam",
        "max_classes": "it looks at every class",
        "nbest": "it finds only the best sentence",
        "lattice_beam": "it finds only the best sentence",
        "word_bonus": "its scores are those of the graph that it reads",
        "silence_penalty": "where a silence may be missing is written in the model that it reads",
        "rescore": "its first pass has the whole n-gram model already",
    }
    return f"{name} has no effect in the search {backend}: {reasons[name]}"


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
      max_classes: so many of the likeliest classes of a frame are looked at; 41 is all.
      word_bonus: added to a candidate's total for every word (ln).
      silence_penalty: a blank can stand for a silence, at this cost (ln, before the acoustic
        scale), and any other frame at thrice the cost; so a silence that the logits lack between
        two words does not break the sentence. 1000 demands every silence (and then needs a
        max_classes of 41).
      lattice_beam: candidates whose total is worse than the best by more than this (ln) are left
        out.
      ctc_blank_skip_threshold: of neighbouring frames in which the blank's probability is above
        this, only the first is searched; the others count as blank. 1 searches every frame.
      min_active: hypotheses kept even outside the beam; only the search `wfst` has such.
      do_opt: 1: a large language model, where one is loaded, rescores the candidates; 0: never.
      alpha: its share of the language models' score: (1 - alpha) * ngram + alpha * llm.
      length_penalty: taken from its score for every token (ln).
      top_candidates_to_augment: so many of the best candidates exchange their differing words,
        which gives new candidates; 0: none.
      score_penalty_percent: a new candidate's scores are its parents' mean made worse by this
        fraction (0.01 is 1 %).
      confidence_temperature: confidences are the softmax of the candidates' totals over this.
    """

    acoustic_scale: float = 1.5
    blank_penalty: float = 8.0
    beam: float = 14.0
    max_active: int = 100
    nbest: int = 100
    max_classes: int = 10
    word_bonus: float = 0.0
    silence_penalty: float = 2.5
    lattice_beam: float = 1e6
    ctc_blank_skip_threshold: float = 1.0
    min_active: int = 200
    do_opt: int = 1
    alpha: float = 0.55
    length_penalty: float = 0.0
    top_candidates_to_augment: int = 20
    score_penalty_percent: float = 0.01
    confidence_temperature: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least, greatest = LIMITS[field.name]
            # Written so that NaN is refused too.
            if not least <= value <= greatest:
                raise SettingsError(
                    f"{field.name} is {value}; needed a number from {least:g} to {greatest:g}"
                )
        for name in WHOLE:
            if getattr(self, name) != int(getattr(self, name)):
                raise SettingsError(f"{name} is {getattr(self, name)}; needed a whole number")


def default_settings(backend: str) -> Settings:
    """A search's own defaults."""
    return dataclasses.replace(Settings(), **_DEFAULTS.get(backend, {}))  # type: ignore[arg-type]


_HELP: Mapping[str, str] = {
    "acoustic_scale": "factor of the acoustic log-probabilities",
    "blank_penalty": "ln of it is taken from the blank's log-probability",
    "beam": "hypotheses worse than the best by more than this (ln) are dropped",
    "max_active": "hypotheses kept after each frame",
    "nbest": "candidate sentences in an answer",
    "max_classes": "likeliest classes of a frame that are looked at; 41: all",
    "word_bonus": "added to the total for every word (ln)",
    "silence_penalty": "cost (ln) of a silence between words that the logits lack; 1000: never",
    "lattice_beam": "candidates worse than the best by more than this (ln) are left out",
    "ctc_blank_skip_threshold": "of frames in a row with a likelier blank, search only the first",
    "min_active": "hypotheses kept even outside the beam (search wfst only)",
    "do_opt": "1: rescore with the large language model, where one is loaded; 0: never",
    "alpha": "the large model's share of the language models' score, 0 to 1",
    "length_penalty": "ln taken from the large model's score for every token",
    "top_candidates_to_augment": "best candidates that exchange their differing words; 0: none",
    "score_penalty_percent": "fraction by which the scores of exchanged candidates are worse",
    "confidence_temperature": "confidences are the softmax of the totals over this",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for every setting, and one for a file of them."""
    parser.add_argument(
        "--settings",
        type=Path,
        default=None,
        metavar="FILE",
        help="settings as `lm-server tune` writes them; the options below go before it",
    )
    for field in fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=None,
            help=f"{_HELP[field.name]} (default {field.default:g})",
        )


def from_options(args: argparse.Namespace) -> Settings:
    """The settings that the options of `add_options` give: the file's, changed by the others.

    Raises:
      SettingsError: a value is outside its range, or the file cannot be used.
    """
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    backend = getattr(args, "backend", "flashlight")
    base = (
        read_settings(args.settings, backend)
        if args.settings is not None
        else default_settings(backend)
    )
    return dataclasses.replace(
        base, **{name: value for name, value in given.items() if value is not None}
    )


_OF_RESCORING = ("alpha", "do_opt", "length_penalty", "llm_device", "llm_dtype", "llm_text")


def warn_without_effect(args: argparse.Namespace) -> list[str]:
    """Prints a line on the error output for every given option that changes nothing; gives the
    lines."""
    backend = getattr(args, "backend", "flashlight")
    lines = []
    for name in dict.fromkeys([*(field.name for field in fields(Settings)), *_OF_RESCORING]):
        # "auto" is the device's default.
        if getattr(args, name, None) in (None, "auto"):
            continue
        reason = without_effect(name, backend)
        if reason is None and name in _OF_RESCORING and getattr(args, "llm", None) is None:
            reason = f"{name} has no effect without --llm: no large language model rescores"
        if reason is not None:
            lines.append(f"warning: --{name.replace('_', '-')} is given, but {reason}")
    for line in lines:
        print(line, file=sys.stderr)
    return lines


def read_settings(path: Path, backend: str = "flashlight") -> Settings:
    """Reads a settings file: JSON {"format": 1, "settings": {name: value}, ...}; settings that it
    lacks keep the search's defaults.

    Raises:
      SettingsError: the file is missing, is no settings file, or a setting is unknown or outside
        its range, or they are another search's.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"the settings file {path} cannot be read ({error}): make one with `lm-server tune`"
        ) from error
    values = found.get("settings") if isinstance(found, dict) else None
    if not isinstance(values, dict) or found.get("format") != FORMAT:
        raise SettingsError(
            f"{path} is no settings file of format {FORMAT}; needed "
            f'{{"format": {FORMAT}, "settings": {{...}}}}: make one with `lm-server tune`'
        )
    about = found.get("about")
    of = about.get("backend", backend) if isinstance(about, dict) else backend
    if of != backend:
        raise SettingsError(
            f"{path} was tuned for the search {of}, and this is {backend}: the same numbers mean "
            f"something else there. Give --backend {of}, or tune again with --backend {backend}"
        )
    known: dict[str, Any] = {field.name: type(field.default) for field in fields(Settings)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise SettingsError(
                f"{path} has the setting {name!r}; known are {', '.join(known)}: leave it out"
            )
        kind = known[name]
        fits = (int, float) if kind is float else kind
        if isinstance(value, bool) or not isinstance(value, fits):
            raise SettingsError(
                f"{path}: {name} is {value!r}; needed a "
                f"{'number' if kind is float else 'whole number' if kind is int else 'text'}"
            )
        given[name] = kind(value)
    try:
        return dataclasses.replace(default_settings(backend), **given)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def write_settings(path: Path, settings: Settings, about: Mapping[str, Any] | None = None) -> None:
    """Writes a settings file, whole or not at all; `about` says how they were found.

    Raises:
      SettingsError: it cannot be written.
    """
    content = {"format": FORMAT, "settings": dataclasses.asdict(settings), "about": about or {}}
    if path.exists() and not path.is_file():
        raise SettingsError(
            f"cannot write {path}: it is there and is no regular file: choose another place"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise SettingsError(
            f"cannot write {path} ({error}): choose a place that you may write to"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
