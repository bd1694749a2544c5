"""The table that names the corpus of each block of sentences, `t15_copyTaskData_description.csv`.

Columns, as published: Date, Post-implant day, Block number, Number of sentences, Corpus, Split. One
row per block. `Split` is `Train` or `Val/Test`, since val and test may share a block.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from b2txt_jax.errors import UserError
from lm_server.atomic_file import replacing

FILE_NAME = "t15_copyTaskData_description.csv"
COLUMNS = ("Date", "Post-implant day", "Block number", "Number of sentences", "Corpus", "Split")


class DataError(UserError, ValueError):
    """Recorded data that cannot be used. The message names file, trial and field."""


@dataclass(frozen=True)
class Block:
    """One row of the table, its fields in the order of `COLUMNS`.

    `date` is YYYY-MM-DD, `split` is `Train` or `Val/Test`.
    """

    date: str
    post_implant_day: int
    number: int
    sentences: int
    corpus: str
    split: str


def session_date(session: str) -> str:
    """Return `2023-08-13` for `t15.2023.08.13`, and a name of another form unchanged."""
    parts = session.split(".")
    return "-".join(parts[1:]) if len(parts) == 4 else session


def read_description(root: Path | str) -> dict[tuple[str, int], str]:
    """Return (date, block number) -> corpus, by the table in `root` or the folder above, or {}.

    Raises:
      DataError: a column is missing, or a block number is not a number.
    """
    root = Path(root)
    candidates = (root / FILE_NAME, root.resolve().parent / FILE_NAME)
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        found = rows.fieldnames or ()
        missing = [name for name in ("Date", "Block number", "Corpus") if name not in found]
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
                    f"{path} line {rows.line_num}: block number {row['Block number']!r} is not "
                    "a whole number"
                ) from error
    return corpora


def write_description(path: Path, blocks: Iterable[Block]) -> None:
    """Write the table as published, with CRLF line ends, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for block in blocks:
        writer.writerow(dataclasses.astuple(block))
    with replacing(path) as unfinished:
        unfinished.write_text(text.getvalue(), encoding="utf-8", newline="")
