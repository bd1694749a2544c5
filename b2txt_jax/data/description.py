"""The table that names the corpus of each block of sentences, `t15_copyTaskData_description.csv`.

Columns, as published: Date, Post-implant day, Block number, Number of sentences, Corpus, Split; one
row per block. `Split` is `Train` or `Val/Test`: val and test may share a block's sentences.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from b2txt_jax.errors import UserError

FILE_NAME = "t15_copyTaskData_description.csv"
COLUMNS = (
    "Date",
    "Post-implant day",
    "Block number",
    "Number of sentences",
    "Corpus",
    "Split",
)


class DataError(UserError, ValueError):
    """Recorded data that cannot be used: names file, trial, field, what was found and needed."""


@dataclass(frozen=True)
class Block:
    """One row of the table; `date` is YYYY-MM-DD, `split` is `Train` or `Val/Test`."""

    date: str
    post_implant_day: int
    number: int
    sentences: int
    corpus: str
    split: str


def session_date(session: str) -> str:
    """`t15.2023.08.13` -> `2023-08-13`; a name of another form comes back unchanged."""
    parts = session.split(".")
    return "-".join(parts[1:]) if len(parts) == 4 else session


def read_description(root: Path | str) -> dict[tuple[str, int], str]:
    """(date, block number) -> corpus, by the table in `root` or the folder above; {} without one.

    Raises:
      DataError: a column is missing, or a block number is no number.
    """
    root = Path(root)
    candidates = (root / FILE_NAME, root.resolve().parent / FILE_NAME)
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = [
            name
            for name in ("Date", "Block number", "Corpus")
            if name not in (rows.fieldnames or ())
        ]
        if missing:
            raise DataError(
                f"{path} has the columns {rows.fieldnames}; needed also {missing}: take the "
                "published table"
            )
        corpora = {}
        for row in rows:
            try:
                corpora[row["Date"], int(row["Block number"])] = row["Corpus"]
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{path} line {rows.line_num}: block number {row['Block number']!r} is no "
                    "whole number"
                ) from error
    return corpora


def write_description(path: Path, blocks: Iterable[Block]) -> None:
    """Writes the table as published (CRLF line ends); the file appears whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for block in blocks:
        writer.writerow(
            (
                block.date,
                block.post_implant_day,
                block.number,
                block.sentences,
                block.corpus,
                block.split,
            )
        )
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
    os.replace(temporary, path)
