"""True sentences to compare decoded ones with, and how word errors are counted."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein

from lm_server.errors import UserError

_DROPPED = re.compile(r"[^a-zA-Z\- ']")
_HELP = (
    "needed lines `trial<TAB>sentence`, JSON lines {trial, sentence}, a CSV with these columns, or "
    "an .npz file of `b2txt infer --split val`"
)


class ReferencesError(UserError, ValueError):
    """True sentences that cannot be used; names file and line, what was found and needed."""


def normalise(sentence: str) -> tuple[str, ...]:
    """The words that count, as the published evaluation (and `b2txt evaluate`) counts them."""
    text = _DROPPED.sub("", sentence)
    for found, replacement in (("- ", " "), ("--", ""), (" '", "'")):
        text = text.replace(found, replacement)
    return tuple(text.lower().split())


def word_errors(reference: Sequence[str], sentence: str) -> int:
    """Word edits between a reference (normalised words) and a decoded sentence."""
    return int(Levenshtein.distance(reference, normalise(sentence)))


def read_references(path: Path) -> dict[str, tuple[str, ...]]:
    """Reads trial -> normalised words; the format is told by the file's name and first line.

    Raises:
      ReferencesError: the file is missing or in none of the formats, or has a trial twice.
    """
    if not path.is_file():
        raise ReferencesError(f"there is no file {path} with true sentences: {_HELP}")
    found: dict[str, tuple[str, ...]] = {}
    for trial, sentence in _pairs(path):
        if trial in found:
            raise ReferencesError(f"{path} has the trial {trial} twice: keep one of them")
        found[trial] = normalise(sentence)
    if not found:
        raise ReferencesError(f"{path} holds no sentences: {_HELP}")
    return found


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".npz":
        yield from _pairs_of_archive(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ReferencesError(f"{path} cannot be read ({error}): {_HELP}") from error
    if path.suffix in (".json", ".jsonl") or text.lstrip().startswith("{"):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    one = json.loads(line)
                    yield str(one["trial"]), str(one["sentence"])
                except (ValueError, KeyError, TypeError) as error:
                    raise ReferencesError(
                        f"{path}, line {number}: no trial and sentence ({error}): {_HELP}"
                    ) from error
    elif path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text))
        if not {"trial", "sentence"} <= set(rows.fieldnames or ()):
            raise ReferencesError(f"{path} has the columns {rows.fieldnames}: {_HELP}")
        for row in rows:
            yield str(row["trial"]), str(row["sentence"])
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                trial, tab, sentence = line.partition("\t")
                if not tab:
                    raise ReferencesError(f"{path}, line {number}, is {line[:60]!r}: {_HELP}")
                yield trial.strip(), sentence


def _pairs_of_archive(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"trial", "sentence"} <= set(file.files):
                raise ReferencesError(
                    f"{path} has the fields {sorted(file.files)} and no true sentences: give them "
                    f"with --refs FILE; {_HELP}"
                )
            trials, sentences = file["trial"], file["sentence"]
    except ReferencesError:
        raise
    # numpy, zipfile and zlib fail in many ways on a damaged archive.
    except Exception as error:
        raise ReferencesError(f"{path} cannot be read ({error}): {_HELP}") from error
    yield from zip(map(str, trials), map(str, sentences), strict=True)
