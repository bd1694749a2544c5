"""Submissions to the published benchmarks: one decoded sentence per trial.

T15 (Brain-to-Text '25) takes a CSV `id,text` with ids 0..N-1: sessions in the order of the list of
sessions, then trials. T12 (Brain-to-Text '24) takes a text file with a sentence a line.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from b2txt_jax.evaluation.results import ResultsError
from lm_server.files.atomic_file import regular, replacing

HEADER = ("id", "text")


class SubmissionWarning(UserWarning):
    """A submission that can be written, but will not be accepted as it is."""


def write_submission(path: Path, sentences: Sequence[str]) -> None:
    """Write `id,text` with ids 0..N-1, or with the suffix .txt a sentence a line, whole or not at
    all.

    Args:
      path: the file.
      sentences: decoded sentences in the published order. A failed trial must be there as an empty
        text, or all ids after it would be wrong.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        if path.suffix == ".txt":
            stream.writelines(f"{sentence}\n" for sentence in sentences)
            return
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(enumerate(sentences))


def read_texts(path: Path) -> list[str]:
    """Read the sentences of a submission: a .csv with ids 0..N-1, or a sentence a line.

    Raises:
      ResultsError: it cannot be read, or an id is missing, twice or out of order.
    """
    try:
        text = regular(path).read_text("utf-8-sig")
        if path.suffix == ".txt":
            return text.removesuffix("\n").split("\n") if text else []
        rows = list(csv.reader(text.splitlines(), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ResultsError(
            f"{path} cannot be read ({error}); needed a submission: id,text, or a sentence a line"
        ) from error
    if not rows or tuple(rows[0]) != HEADER:
        raise ResultsError(f"{path} begins with {rows[:1]}; needed the header id,text")
    for number, row in enumerate(rows[1:]):
        if len(row) != 2 or row[0] != str(number):
            raise ResultsError(
                f"{path} line {number + 2} is {','.join(row)[:80]!r}; needed the id {number} and a "
                "text: ids count from 0, each once, in order"
            )
    return [row[1] for row in rows[1:]]
