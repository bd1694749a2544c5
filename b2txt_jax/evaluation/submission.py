"""`submission.csv`: one decoded sentence per trial, as the published benchmark takes it."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path


def write_submission(path: Path, sentences: Sequence[str]) -> None:
    """Writes `id,text` with ids 0..N-1; the file appears whole or not at all.

    Args:
      path: the CSV file.
      sentences: decoded sentences in the published order: sessions in the order of the list of
        sessions, then trials. A trial that failed must be given too (as an empty text), or all ids
        after it would be wrong.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(("id", "text"))
            writer.writerows(enumerate(sentences))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
