"""What tuning has worked out, on disk: candidate lists by search, and scores by sentence.

An interrupted tuning goes on from here. Every file is named by a digest of what it was made from,
so that another model, other logits or other settings never meet it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lm_server.hypothesis import Hypothesis
from lm_server.settings import Settings

_FORMAT = 1
_OF_RANKING = (
    *("do_opt", "alpha", "length_penalty", "top_candidates_to_augment"),
    *("score_penalty_percent", "confidence_temperature"),
)
"""Settings that the search does not know."""


class Cache:
    """A folder of results; `inputs` says what all of them were made from."""

    def __init__(self, folder: Path, inputs: Sequence[object]) -> None:
        self.folder = folder
        self._inputs = [_FORMAT, *map(str, inputs)]
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, kind: str, *what: object) -> Path:
        text = json.dumps([*self._inputs, *map(str, what)])
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.jsonl"

    def _search_file(self, settings: Settings) -> Path:
        values = dataclasses.asdict(settings)
        return self._file(
            "nbest", {name: values[name] for name in values if name not in _OF_RANKING}
        )

    def read_search(self, settings: Settings) -> list[tuple[Hypothesis, ...]] | None:
        """Candidates of every trial under these settings; None if they are not there."""
        try:
            lines = self._search_file(settings).read_text(encoding="utf-8").splitlines()
            return [
                tuple(
                    Hypothesis(tuple(sentence.split()), acoustic, ngram, bonus=bonus)
                    for sentence, acoustic, ngram, bonus in json.loads(line)
                )
                for line in lines
            ]
        except (OSError, ValueError, TypeError):
            return None

    def write_search(self, settings: Settings, found: Sequence[Sequence[Hypothesis]]) -> None:
        """Keeps the candidates of every trial; the file appears whole or not at all."""
        file = self._search_file(settings)
        temporary = file.with_suffix(f".{os.getpid()}")
        try:
            with temporary.open("w", encoding="utf-8") as output:
                for some in found:
                    rows = [(one.sentence, one.acoustic, one.ngram, one.bonus) for one in some]
                    output.write(json.dumps(rows) + "\n")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    def read_scores(self, model: Sequence[object]) -> dict[str, float]:
        """Sentence -> score (ln) of this model, as far as known."""
        scores = {}
        try:
            lines = self._file("scores", *model).read_text(encoding="utf-8").splitlines()
        except OSError:
            return {}
        for line in lines:
            try:
                sentence, score = json.loads(line)
            except (ValueError, TypeError):
                # The last line of an interrupted run.
                continue
            if isinstance(score, float) and math.isfinite(score):
                scores[str(sentence)] = score
        return scores

    def add_scores(self, model: Sequence[object], scores: Mapping[str, float]) -> None:
        """Keeps more scores of this model."""
        with self._file("scores", *model).open("a", encoding="utf-8") as output:
            output.writelines(json.dumps(pair) + "\n" for pair in scores.items())


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and sizes in a folder with its small files' contents."""
    found = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
        return found.hexdigest()
    for file_ in sorted(one for one in path.iterdir() if one.is_file()):
        size = file_.stat().st_size
        found.update(f"{file_.name} {size}\n".encode())
        if size < 1 << 16:
            found.update(file_.read_bytes())
    return found.hexdigest()
