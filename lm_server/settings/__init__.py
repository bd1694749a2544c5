"""Settings of the search and of what follows it, each declared once: default, range, meaning.

Options, checks, settings files, `--help` and the parameters of `update_params` (which have the
settings' names) are derived from the declarations. What a search does not know, and defaults of its
own, stand in that search's file (`lm_server.search.interface.Backend`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lm_server.errors import UserError
from lm_server.files.atomic_file import regular, replacing
from lm_server.protocol import unique
from lm_server.settings.confusion import Confusion, ConfusionError

FORMAT = 3
"""Version of settings files. In format 1, silence_penalty was in units of log-probabilities. Before
format 3 there was no class confusion."""
NOT_NEEDED: Mapping[str, str] = {"rescore": "its first pass has the whole n-gram model already"}
"""Parameters of the published server that are accepted without effect, with the reason."""
Stage = Literal["search", "fusion", "answer", "rescoring"]
DEFAULT_PRESET = "accurate"
PRESET = "preset"
"""Where settings are given by name, the name under which a preset stands among them."""


class SettingsError(UserError, ValueError):
    """A setting outside its range, or a settings file that cannot be used."""


def setting(
    default: float,
    least: float,
    greatest: float,
    meaning: str,
    stage: Stage = "search",
    **presets: float,
) -> Any:
    """Declare a setting. One with a whole default must be a whole number.

    Args:
      default: its value unless something else is given.
      least: the least value.
      greatest: the greatest value.
      meaning: its meaning and unit, for the docstring's reader and for `--help`.
      stage: what it changes: the search, what a large language model does in it, the answer made
        of the search's hypotheses, or rescoring by a large language model.
      presets: its values in other presets than the default one.
    """
    metadata = {
        "limits": (float(least), float(greatest)),
        "meaning": meaning,
        "stage": stage,
        "presets": {DEFAULT_PRESET: default, **presets} if presets else {},
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """How a sentence is searched and answered.

    Within the ranges, the scores of the longest sentence are finite, no beam reaches across the
    score of a forbidden class, and the search's memory stays within a machine's.
    """

    acoustic_scale: float = setting(
        1.5, 0.001, 100, "factor of the acoustic log-probabilities; the n-gram model's is 1"
    )
    blank_penalty: float = setting(
        8.0, 0.001, 1e6, "its ln is subtracted from the blank's log-probability in every frame"
    )
    beam: float = setting(
        25.0,
        0.001,
        1000,
        "hypotheses worse than the best by more than this (ln) are dropped",
        balanced=18.0,
        fast=14.0,
    )
    max_active: int = setting(
        500, 1, 10_000, "hypotheses kept after each frame", balanced=200, fast=100
    )
    nbest: int = setting(100, 1, 10_000, "hypotheses in an answer")
    max_classes: int = setting(
        41,
        1,
        41,
        "number of likeliest classes of a frame that are searched; 41: all",
        balanced=41,
        fast=10,
    )
    word_bonus: float = setting(0.0, -100, 100, "added to the total for every word (ln)")
    # In the total's units, or sharp logits, whose acoustic scale is small, would lack every silence
    # for next to nothing. Where none may be missing, max_classes must be 41: the silence is often
    # unlikely.
    silence_penalty: float = setting(
        3.75,
        0,
        1000,
        "subtracted from the total (ln) for a silence between words that a blank stands in for; "
        "thrice that for any other frame; 1000: never, which needs --max-classes 41",
    )
    lattice_beam: float = setting(
        1e6, 0, 1e6, "hypotheses whose total is worse than the best by more (ln) are left out"
    )
    ctc_blank_skip_threshold: float = setting(
        1.0,
        0.01,
        1,
        "of neighbouring frames whose blank is more probable than this, only the first is "
        "searched, the others count as blank; 1: every frame is searched",
    )
    min_active: int = setting(200, 0, 10_000, "hypotheses kept even outside the beam")
    do_opt: int = setting(
        1, 0, 1, "1: rescore with the large language model, if one is loaded; 0: never", "rescoring"
    )
    alpha: float = setting(
        0.55, 0, 1, "score of the language models: (1 - alpha) * ngram + alpha * llm", "rescoring"
    )
    length_penalty: float = setting(
        0.0, -100, 100, "subtracted from the large model's score for every token (ln)", "rescoring"
    )
    fuse_weight: float = setting(
        1.0,
        0,
        2,
        "with --fuse: how much of the large model's part of the score counts during the search; 1: "
        "as much as in the answer",
        "fusion",
    )
    fuse_frames: int = setting(
        30, 1, 10_000, "with --fuse: the large model is asked every so many frames", "fusion"
    )
    fuse_hypotheses: int = setting(
        25, 1, 10_000, "with --fuse: best hypotheses that it is asked about", "fusion"
    )
    fuse_beam: float = setting(
        8.0,
        0,
        1e6,
        "with --fuse: hypotheses whose total with the large model's part is worse than the best by "
        "more (ln) are neither asked about nor rescored",
        "fusion",
    )
    top_candidates_to_augment: int = setting(
        20, 0, 100, "best hypotheses that exchange their differing words; 0: none", "answer"
    )
    score_penalty_percent: float = setting(
        0.01, 0, 1, "fraction by which an exchange worsens its parents' mean scores", "answer"
    )
    confidence_temperature: float = setting(
        1.0, 0.01, 1000, "confidences are the softmax of the totals divided by this", "answer"
    )
    minimum_bayes_risk: int = setting(
        0,
        0,
        1,
        "1: the answer is the hypothesis with the fewest word errors to expect by the confidences; "
        "0: the likeliest one",
        "answer",
    )
    confusion: Confusion | None = None
    """Mixes the posteriors of every frame. No number, so that only a settings file can hold it."""

    def __post_init__(self) -> None:
        for field in declared():
            value = getattr(self, field.name)
            least, greatest = field.metadata["limits"]
            # Written so that NaN is refused too.
            if not least <= value <= greatest:
                raise SettingsError(
                    f"{field.name} is {value}; needed a number from {least:g} to {greatest:g}"
                )
            if type(field.default) is int and value != int(value):
                raise SettingsError(f"{field.name} is {value}; needed a whole number")


def declared() -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields that `setting` has declared, which are numbers."""
    return tuple(field for field in fields(Settings) if field.metadata)


NAMES = tuple(field.name for field in declared())
LIMITS: Mapping[str, tuple[float, float]] = {
    field.name: field.metadata["limits"] for field in declared()
}
"""Least and greatest value of each setting."""
DEFAULTS = Settings()
PRESETS: Mapping[str, Mapping[str, float]] = {
    name: {
        field.name: field.metadata["presets"][name]
        for field in declared()
        if field.metadata["presets"]
    }
    for name in (DEFAULT_PRESET, "balanced", "fast")
}
"""How wide the search is: name -> the settings that the preset decides."""


def names_of(stage: Stage) -> tuple[str, ...]:
    """Return the names of the settings that change one stage."""
    return tuple(field.name for field in declared() if field.metadata["stage"] == stage)


def preset(name: object) -> Mapping[str, float]:
    """Return the settings that a preset decides.

    Raises:
      SettingsError: there is no such preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise SettingsError(f"{PRESET} is {name!r}; needed one of {', '.join(PRESETS)}")
    return PRESETS[name]


def changed(settings: Settings, values: Mapping[str, float]) -> Settings:
    """Return settings with some values replaced. 3.0 becomes 3 where whole numbers are needed.

    Raises:
      SettingsError: a value is no number, or outside its range.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SettingsError(f"{name} is {value!r}; needed a number")
    whole = {field.name for field in declared() if type(field.default) is int}
    fitting = {
        name: (int(value) if value == value // 1 else value) if name in whole else float(value)
        for name, value in values.items()
    }
    return dataclasses.replace(settings, **fitting)  # type: ignore[arg-type]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for every setting, and one for a file of them."""
    parser.add_argument(
        "--settings",
        type=Path,
        default=None,
        metavar="FILE",
        help="settings file of `lm-server tune`; the options below take precedence over it",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default=None,
        help=f"how wide the search is: {', '.join(PRESETS['fast'])} (default {DEFAULT_PRESET}, or "
        "as in --settings; single options take precedence)",
    )
    for field in declared():
        others = "".join(
            f"; {name} {value:g}"
            for name, value in field.metadata["presets"].items()
            if name != DEFAULT_PRESET
        )
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=None,
            help=f"{field.metadata['meaning']} (default {field.default:g}{others})",
        )


def read_settings(
    path: Path, defaults: Settings = DEFAULTS, backend: str = "flashlight"
) -> Settings:
    """Read a settings file: JSON {"format": 3, "settings": {name: value}, ...}.

    It may have a class confusion, the rows of `Confusion` under "confusion". Files of formats 1 and
    2 are read as what they meant.

    Args:
      path: the file.
      defaults: values of the settings that it lacks.
      backend: the search that they are for.

    Raises:
      SettingsError: the file is missing or no settings file, it is for another search, or a setting
        is unknown or outside its range.
    """
    try:
        found = json.loads(regular(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(
            f"the settings file {path} cannot be read ({error}): make one with `lm-server tune`"
        ) from error
    values = found.get("settings") if isinstance(found, dict) else None
    if not isinstance(values, dict) or found.get("format") not in (1, 2, FORMAT):
        raise SettingsError(
            f"{path} is no settings file of format {FORMAT}; needed "
            f'{{"format": {FORMAT}, "settings": {{...}}}}: make one with `lm-server tune`'
        )
    about = found.get("about")
    of = about.get("backend", backend) if isinstance(about, dict) else backend
    if of != backend:
        raise SettingsError(
            f"{path} was tuned for the search {of}, and this is {backend}: the same numbers mean "
            f"something else there. Use --backend {of}, or tune again with --backend {backend}"
        )
    for name in values:
        if name not in NAMES:
            raise SettingsError(
                f"{path} has the setting {name!r}; known are {', '.join(NAMES)}: leave it out"
            )
    try:
        read = changed(defaults, values)
        most = LIMITS["silence_penalty"][1]
        if found["format"] == 1 and "silence_penalty" in values and read.silence_penalty < most:
            penalty = read.silence_penalty * read.acoustic_scale
            read = dataclasses.replace(read, silence_penalty=min(penalty, most))
        rows = found.get("confusion")
        # A file says everything: without one, no confusion is meant.
        confusion = None if rows is None else Confusion.of(rows)
        return dataclasses.replace(read, confusion=confusion)
    except (SettingsError, ConfusionError, OverflowError) as error:
        raise SettingsError(f"{path}: {error}") from error


def tuned_for(path: Path) -> dict[str, Any]:
    """Return the checkpoint that a readable settings file was tuned for: step, weights, parameters,
    split, as far as it names them."""
    about = json.loads(path.read_text(encoding="utf-8")).get("about")
    found = about.get("checkpoint") if isinstance(about, dict) else None
    return found if isinstance(found, dict) else {}


def expected_wer(path: Path, logits_sha256: str) -> float:
    """Return the word error rate that a readable settings file expects of other sentences, 0 unless
    it was tuned on these logits."""
    about = json.loads(path.read_text(encoding="utf-8")).get("about")
    if not isinstance(about, dict) or about.get("logits_sha256") != logits_sha256:
        return 0.0
    found = about.get("expected_wer")
    return float(found) if isinstance(found, int | float) else 0.0


def write_settings(path: Path, settings: Settings, about: Mapping[str, Any] | None = None) -> None:
    """Write a settings file atomically. `about` describes how the settings were found.

    Raises:
      SettingsError: it cannot be written.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "settings": {name: getattr(settings, name) for name in NAMES},
        "about": about or {},
    }
    if settings.confusion is not None:
        content["confusion"] = settings.confusion.rows
    if path.exists() and not path.is_file():
        raise SettingsError(
            f"cannot write {path}: it exists and is no regular file: choose another place"
        )
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"cannot write {path} ({error}): choose a place that you may write to"
        ) from error
