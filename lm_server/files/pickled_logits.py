"""Pickled logits of phoneme-to-words-lm -> a logits file as `b2txt infer` writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_server.files.atomic_file import replacing
from lm_server.files.logits_file import LogitsFileError
from lm_server.files.plain_pickle import PickleError, read_pickle
from lm_server.protocol import CLASSES, ProtocolError, check_logits

_NEEDED = "needed a pickle of {logits, adjusted_lens, transcription}, each with one entry per trial"
_USED = ("logits", "adjusted_lens", "transcription")


@dataclass(frozen=True)
class _Trials:
    logits: list[np.ndarray]
    sentences: list[str] | None
    ignored: tuple[str, ...]


def convert(path: Path, out: Path, tokens: Sequence[str] = CLASSES) -> tuple[int, list[str]]:
    """Write an .npz file with `logits`, `frames`, `trial` and, where known, `sentence`.

    Args:
      path: the pickle.
      out: the file to write.
      tokens: the classes of the logits' columns, by default in the RNN's order, from which the
        package's own scripts reorder them.

    Returns:
      The number of trials, and the fields of the pickle that have no place in the file.

    Raises:
      LogitsFileError: the pickle cannot be read, holds other objects, or a field is not as needed.
    """
    try:
        found = read_pickle(path, _NEEDED)
    except PickleError as error:
        raise LogitsFileError(str(error)) from error
    trials = _trials(path, found)
    order = [list(tokens).index(name) for name in CLASSES]
    fields = {
        "logits": np.concatenate([one[:, order] for one in trials.logits]),
        "frames": np.array([len(one) for one in trials.logits], np.int32),
        "trial": np.array([f"trial_{i:05d}" for i in range(len(trials.logits))]),
        "classes": np.array(CLASSES),
    }
    if trials.sentences is not None:
        fields["sentence"] = np.array(trials.sentences)
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.savez(file, **fields)  # type: ignore[arg-type]
    return len(trials.logits), list(trials.ignored)


def _trials(path: Path, found: Any) -> _Trials:
    if isinstance(found, list | tuple) and found and all(isinstance(x, Mapping) for x in found):
        names = set(found[0])
        if any(set(one) != names for one in found):
            raise LogitsFileError(f"{path} has trials with different fields; {_NEEDED}")
        found = {name: [one[name] for one in found] for name in names}
    if not isinstance(found, Mapping) or "logits" not in found:
        what = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise LogitsFileError(f"{path} holds {what}; {_NEEDED}")
    if "adjusted_len" in found and "adjusted_lens" not in found:
        found = {**found, "adjusted_lens": found["adjusted_len"]}
        del found["adjusted_len"]
    count = _length(path, "logits", found["logits"])
    for name in ("adjusted_lens", "transcription"):
        if name in found and (other := _length(path, name, found[name])) != count:
            raise LogitsFileError(f"{path} has {count} logits and {other} of {name}; {_NEEDED}")
    if not count:
        raise LogitsFileError(f"{path} has no trial; {_NEEDED}")
    logits = []
    for i in range(count):
        one = np.asarray(found["logits"][i])
        if one.ndim == 3 and len(one) == 1:
            one = one[0]
        try:
            frames = int(found["adjusted_lens"][i]) if "adjusted_lens" in found else len(one)
            if one.ndim == 2 and not 0 <= frames <= len(one):
                raise ProtocolError(f"adjusted_lens is {frames}, but there are {len(one)} frames")
            logits.append(check_logits(one[:frames] if one.ndim == 2 else one))
        except (ProtocolError, ValueError, TypeError) as error:
            raise LogitsFileError(f"{path}, trial {i}: {error}") from error
    sentences = None
    if "transcription" in found:
        sentences = [_text(path, i, found["transcription"][i]) for i in range(count)]
    ignored = sorted(str(name) for name in set(found) - set(_USED))
    return _Trials(logits, sentences, tuple(ignored))


def _length(path: Path, name: str, value: Any) -> int:
    if (
        isinstance(value, str | bytes)
        or not hasattr(value, "__len__")
        or isinstance(value, Mapping)
    ):
        raise LogitsFileError(f"{path} has {name} of type {type(value).__name__}; {_NEEDED}")
    return len(value)


def _text(path: Path, trial: int, value: Any) -> str:
    """Return a sentence, given as a text or as codes of characters with zeros after them."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return str(value)
    codes = np.asarray(value)
    if codes.ndim == 1 and codes.dtype.kind in "iu" and ((codes >= 0) & (codes < 0x110000)).all():
        return "".join(map(chr, codes[: int(np.argmin(codes)) if 0 in codes else None]))
    raise LogitsFileError(
        f"{path}, trial {trial}: the transcription is {type(value).__name__}; needed a text or "
        "codes of characters"
    )
