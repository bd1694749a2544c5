"""True sentences that decoded ones are compared with, and the count of word errors."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein

from lm_server.errors import UserError
from lm_server.lexicon.text_rules import scored_words

_HELP = (
    "needed lines `trial<TAB>sentence`, JSON lines {trial, sentence}, a CSV with these columns, or "
    "an .npz file of `b2txt infer --split val`"
)


class ReferencesError(UserError, ValueError):
    """A file of true sentences that cannot be used."""


def word_errors(reference: Sequence[str], sentence: str) -> int:
    """Return the word edits between a reference (normalised words) and a decoded sentence."""
    return int(Levenshtein.distance(reference, scored_words(sentence)))


def known_trials(trials: Sequence[str], references: Mapping[str, tuple[str, ...]]) -> list[int]:
    """Return the indices of the trials that have a reference. Name the number of others.

    Raises:
      ReferencesError: none has.
    """
    known = [index for index, trial in enumerate(trials) if trial in references]
    if not known:
        raise ReferencesError(
            f"none of the {len(trials)} trials of the logits (first {(*trials, '-')[0]}) is among "
            f"the {len(references)} true sentences (first {next(iter(references), '-')}); needed "
            "the same names: check both files"
        )
    if len(known) < len(trials):
        print(
            f"warning: {len(trials) - len(known)} trials have no true sentence: left out",
            file=sys.stderr,
        )
    return known


def read_references(path: Path) -> dict[str, tuple[str, ...]]:
    """Read trial -> normalised words. The file's name and first line determine the format.

    Raises:
      ReferencesError: the file is missing or in none of the formats, or has a trial twice.
    """
    if not path.is_file():
        raise ReferencesError(f"there is no file {path} with true sentences: {_HELP}")
    found: dict[str, tuple[str, ...]] = {}
    pairs = _pairs_of_archive(path) if path.suffix == ".npz" else _pairs_of_text(path)
    for trial, sentence in pairs:
        if trial in found:
            raise ReferencesError(f"{path} has the trial {trial} twice: keep one of them")
        found[trial] = scored_words(sentence)
    if not found:
        raise ReferencesError(f"{path} holds no sentences: {_HELP}")
    return found


def _pairs_of_text(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ReferencesError(f"{path} cannot be read ({error}): {_HELP}") from error
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text))
        if not {"trial", "sentence"} <= set(rows.fieldnames or ()):
            raise ReferencesError(f"{path} has the columns {rows.fieldnames}: {_HELP}")
        for row in rows:
            # A comma too few leaves None, and one without quotes in a sentence a further column.
            if None in (row["trial"], row["sentence"]) or None in row:
                raise ReferencesError(
                    f"{path}, line {rows.line_num}, has another number of columns than its first "
                    "line: put sentences with commas in quotes"
                )
            yield row["trial"].strip(), row["sentence"]
        return
    as_json = path.suffix in (".json", ".jsonl") or text.lstrip().startswith("{")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            if as_json:
                one = json.loads(line)
                trial, sentence = one["trial"], one["sentence"]
            else:
                trial, sentence = line.split("\t", 1)
            if not (isinstance(trial, str) and isinstance(sentence, str)):
                raise ValueError("no texts")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ReferencesError(f"{path}, line {number}, is {line[:60]!r}: {_HELP}") from error
        yield trial.strip(), sentence


def _pairs_of_archive(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"trial", "sentence"} <= set(file.files):
                raise ReferencesError(
                    f"{path} has the fields {sorted(file.files)} and no true sentences: name them "
                    f"with --refs FILE; {_HELP}"
                )
            trials, sentences = file["trial"], file["sentence"]
    except ReferencesError:
        raise
    # numpy, zipfile and zlib fail in many ways on a damaged archive.
    except Exception as error:
        raise ReferencesError(f"{path} cannot be read ({error}): {_HELP}") from error
    yield from zip(map(str, trials), map(str, sentences), strict=True)
