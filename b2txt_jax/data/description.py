"""The table that names the corpus of each block of sentences, `t15_copyTaskData_description.csv`.

Columns, as published: Date, Post-implant day, Block number, Number of sentences, Corpus, Split. One
row per block. `Split` is `Train` or `Val/Test`, since val and test may share a block.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from b2txt_jax.errors import UserError
from lm_server.files.atomic_file import replacing

FILE_NAME = "t15_copyTaskData_description.csv"
COLUMNS = ("Date", "Post-implant day", "Block number", "Number of sentences", "Corpus", "Split")

_PUBLISHED = {8234: {"train": 8072}, 2928: {"val": 1426, "test": 1450}}
"""Sentences by the published table -> trials in the published files."""


class DataError(UserError, ValueError):
    """Recorded data that cannot be used. The message names file, trial and field."""


class DataWarning(UserWarning):
    """Recorded data that can be used, but seem to be less than there should be."""


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
    path = _table(root)
    if path is None:
        return {}
    corpora = {}
    for line, row in _rows(path):
        try:
            corpora[_iso(row["Date"]), int(row["Block number"])] = row["Corpus"]
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path} line {line}: block number {row['Block number']!r} is not a whole number"
            ) from error
    return corpora


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of each line of the table and its fields."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            found = rows.fieldnames or ()
            missing = [name for name in ("Date", "Block number", "Corpus") if name not in found]
            if missing:
                raise DataError(
                    f"{path} has the columns {rows.fieldnames}; needed also {missing}: take the "
                    "published table"
                )
            for row in rows:
                yield rows.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}): take the published table") from error


def _table(root: Path | str) -> Path | None:
    root = Path(root)
    candidates = (root / FILE_NAME, root.resolve().parent / FILE_NAME)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def trials_of(root: Path | str, sessions: Sequence[str], split: str) -> tuple[int, bool] | None:
    """Return how many trials of a split the table counts, and whether val and test together. None:
    the table has no such number.

    The published table counts 162 train and 52 val and test sentences that are in no file. So its
    numbers are used for all of its sessions together.

    Raises:
      DataError: as `read_description`.
    """
    path = _table(root)
    if path is None:
        return None
    kind, dates = "Train" if split == "train" else "Val/Test", {*map(session_date, sessions)}
    counts: dict[str, int] = {}
    for _, row in _rows(path):
        number, date = row.get("Number of sentences") or "", _iso(row["Date"] or "")
        if row.get("Split") == kind and number.isdecimal():
            counts[date] = counts.get(date, 0) + int(number)
    published = _PUBLISHED.get(sum(counts.values()))
    if published is not None:
        return (published[split], False) if counts.keys() <= dates else None
    return sum(count for date, count in counts.items() if date in dates), split != "train"


def corpora_of(root: Path | str, blocks: Sequence[tuple[str, int]]) -> list[str | None]:
    """Return the corpus of each (session, block number) by the table, None where it has none.

    Warn where there is a table and none of the blocks is in it.

    Raises:
      DataError: as `read_description`.
    """
    table = read_description(root)
    corpora = [table.get((session_date(session), number)) for session, number in blocks]
    if table and not any(corpora):
        (date, number), (session, block) = next(iter(table)), blocks[0]
        warnings.warn(
            f"no block of {FILE_NAME} is of these trials, so that there are no rates per corpus: "
            f"its first has the date {date!r} and the number {number}, the first trial is of "
            f"{session}, block {block}; needed dates such as 2023-08-13",
            DataWarning,
            stacklevel=2,
        )
    return corpora


def _iso(date: str) -> str:
    """Return 2023-08-11 for `2023-08-11 00:00:00`, as pandas writes it, and others unchanged."""
    try:
        return datetime.datetime.fromisoformat(date.strip()).date().isoformat()
    except ValueError:  # 8/11/2023 is of August or of November
        return date


def write_description(path: Path, blocks: Iterable[Block]) -> None:
    """Write the table as published, with CRLF line ends, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for block in blocks:
        writer.writerow(dataclasses.astuple(block))
    with replacing(path) as unfinished:
        unfinished.write_text(text.getvalue(), encoding="utf-8", newline="")
