"""The published pickles of figures, `t15_copyTask.pkl` and `t15_personalUse.pkl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.errors import UserError
from lm_server.files.plain_pickle import PickleError, read_pickle

_NEEDED = "needed a pickle of the published data set (Dryad dncjsxm85): download it again"
COPY_TASK = (
    "decoded_logits",
    "cue_sentence",
    "cue_sentence_phonemes",
    "decoded_phonemes_raw",
    "decoded_sentence",
    "decoded_sentence_phonemes",
    "post_implant_day",
    "vocab_size",
)


class PublishedDataError(UserError, ValueError):
    """A published file that cannot be used. Names file and field."""


@dataclass(frozen=True)
class CopyTask:
    """Sentences of the copy task, one row each.

    Attributes:
      day: after the implantation, int [N].
      vocabulary: 50 or 125000 words, int [N].
      cue, decoded: sentences.
      cue_phonemes, decoded_phonemes: of them, as names.
      logits: [frames, 41] each.
    """

    day: np.ndarray
    vocabulary: np.ndarray
    cue: list[str]
    decoded: list[str]
    cue_phonemes: list[list[str]]
    decoded_phonemes: list[list[str]]
    logits: list[np.ndarray]


@dataclass(frozen=True)
class PersonalUse:
    """Sentences of personal use, and what a day added up to.

    Attributes:
      day: of each sentence, after the implantation, int [N].
      rating: of its correctness, as the person gave it. Texts.
      words_per_minute: float [N], NaN where it is unknown.
      hours, sentences: of each day that it was used on.
    """

    day: np.ndarray
    rating: list[str]
    words_per_minute: np.ndarray
    hours: Mapping[int, float]
    sentences: Mapping[int, int]


def read_copy_task(path: Path) -> CopyTask:
    """Read `t15_copyTask.pkl`.

    Raises:
      PublishedDataError: it cannot be read, or a field is missing or of another length.
    """
    found = _read(path)
    columns = _columns(path, found, COPY_TASK)
    try:
        return CopyTask(
            _whole(columns["post_implant_day"]),
            _whole(columns["vocab_size"]),
            [_text(one) for one in columns["cue_sentence"]],
            [_text(one) for one in columns["decoded_sentence"]],
            [_phonemes(one) for one in columns["cue_sentence_phonemes"]],
            [_phonemes(one) for one in columns["decoded_phonemes_raw"]],
            [_logits(one) for one in columns["decoded_logits"]],
        )
    except (ValueError, TypeError) as error:
        raise PublishedDataError(f"{path}: {error}; needed the published file") from error


def read_personal_use(path: Path) -> PersonalUse:
    """Read `t15_personalUse.pkl`.

    Raises:
      PublishedDataError: it cannot be read, or a field is missing or of another length.
    """
    found = _read(path)
    names = ("trialized_info", "total_use_time", "total_trial_count")
    missing = [name for name in names if not isinstance(found, Mapping) or name not in found]
    if missing:
        raise PublishedDataError(f"{path} has no {missing[0]}; needed {', '.join(names)}")
    trials = ("post_implant_day", "correctness_rating", "wpm")
    columns = _columns(path, found["trialized_info"], trials)
    try:
        days = _whole(columns["post_implant_day"])
        seconds, counts = (_by_day(found[name]) for name in names[1:])
        used = [day for day in sorted(seconds) if seconds[day]]
        return PersonalUse(
            days,
            [_text(one) for one in columns["correctness_rating"]],
            np.array([np.nan if one is None else one for one in columns["wpm"]], float).ravel(),
            {day: seconds[day] / 3600 for day in used},
            {day: int(counts[day]) for day in used},
        )
    except (ValueError, TypeError, KeyError) as error:
        raise PublishedDataError(f"{path}: {error!r}; needed the published file") from error


def _read(path: Path) -> Any:
    try:
        return read_pickle(path, _NEEDED)
    except PickleError as error:
        raise PublishedDataError(str(error)) from error


def _columns(path: Path, found: Any, names: tuple[str, ...]) -> dict[str, list[Any]]:
    if isinstance(found, list | tuple) and all(isinstance(one, Mapping) for one in found):
        found = {name: [one.get(name) for one in found] for name in names}
    missing = [name for name in names if not isinstance(found, Mapping) or name not in found]
    if missing:
        has = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise PublishedDataError(f"{path} has no {missing[0]}, only {has}; needed {names}")
    columns = {}
    for name in names:
        value = found[name]
        if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
            raise PublishedDataError(f"{path}: {name} is {type(value).__name__}; needed a list")
        columns[name] = list(value)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or not min(lengths.values()):
        raise PublishedDataError(f"{path} has columns of lengths {lengths}; needed the same, not 0")
    return columns


def _whole(values: list[Any]) -> np.ndarray:
    array = np.array([np.asarray(value).reshape(()) for value in values], float)
    if not np.isfinite(array).all() or (array != np.round(array)).any():
        raise ValueError(f"found {array[:5].tolist()} ...; needed whole numbers")
    return array.astype(np.int64)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(()).item()
    return "" if value is None else str(value)


def _phonemes(value: Any) -> list[str]:
    parts = value.split() if isinstance(value, str) else [_text(one) for one in value]
    return [one.strip() for one in parts]


def _logits(value: Any) -> np.ndarray:
    array = np.asarray(value, np.float32)
    array = array[0] if array.ndim == 3 and len(array) == 1 else array
    if array.ndim != 2:
        raise ValueError(f"logits are {array.shape}; needed [frames, 41]")
    return array


def _by_day(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"found {type(value).__name__}; needed values by day")
    return {int(day): float(np.asarray(one).sum()) for day, one in value.items()}
