"""`submission.csv`: one decoded sentence per trial, in the format of the published benchmark."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from lm_server.atomic_file import replacing


class SubmissionWarning(UserWarning):
    """A submission that can be written, but will not be accepted as it is."""


def write_submission(path: Path, sentences: Sequence[str]) -> None:
    """Write `id,text` with ids 0..N-1, whole or not at all.

    Args:
      path: the CSV file.
      sentences: decoded sentences in the published order: sessions in the order of the list of
        sessions, then trials. A failed trial must be there as an empty text, or all ids after it
        would be wrong.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("id", "text"))
        writer.writerows(enumerate(sentences))
