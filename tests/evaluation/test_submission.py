"""Claims about submission.csv."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from b2txt_jax.evaluation.submission import write_submission

SENTENCES = ["how are you", 'she said "no", twice', "", "caf\u00e9", "two\nlines"]


def test_rows_are_numbered_in_the_order_given(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "submission.csv"
    write_submission(path, SENTENCES)
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    assert rows == [["id", "text"], *([str(n), text] for n, text in enumerate(SENTENCES))]


def test_texts_are_quoted_only_where_the_format_needs_it(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    write_submission(path, SENTENCES)
    expected = (
        'id,text\n0,how are you\n1,"she said ""no"", twice"\n2,\n3,caf\u00e9\n4,"two\nlines"\n'
    )
    assert path.read_bytes().decode() == expected


def test_a_failure_half_way_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    write_submission(path, ["first"])
    before = path.read_bytes()

    def broken() -> Iterator[str]:
        yield "second"
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_submission(path, broken())  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
