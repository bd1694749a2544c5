"""Results of tuning on disk: hypotheses of every search, and scores of every sentence.

An interrupted tuning resumes from here. The name of a file is a digest of everything that its
content depends on, so other models, logits or settings never use it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lm_server.files.atomic_file import replacing
from lm_server.hypothesis import Hypothesis
from lm_server.lm.reader import DESCRIPTION, TRIE
from lm_server.settings import Settings, names_of

_FORMAT = 2


class Cache:
    """A folder of results, all of which depend on `inputs`."""

    def __init__(self, folder: Path, inputs: Sequence[object]) -> None:
        self.folder = folder
        self._inputs = [_FORMAT, *map(str, inputs)]
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, kind: str, *what: object) -> Path:
        text = json.dumps([*self._inputs, *map(str, what)])
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.jsonl"

    def _search_file(self, settings: Settings) -> Path:
        values = {name: getattr(settings, name) for name in names_of("search")}
        of_it = [values] if settings.confusion is None else [values, settings.confusion]
        return self._file("nbest", *of_it)

    def _seconds_file(self, settings: Settings) -> Path:
        # The scales as well, on which the number of hypotheses within the beam depends.
        return self._file("seconds", settings)

    def read_search(self, settings: Settings) -> list[tuple[Hypothesis, ...]] | None:
        """Return the hypotheses of every trial under these settings. None if there are none."""
        try:
            lines = self._search_file(settings).read_text(encoding="utf-8").splitlines()
            return [
                tuple(
                    Hypothesis(tuple(sentence.split()), acoustic, ngram, bonus=bonus)
                    for sentence, acoustic, ngram, bonus in json.loads(line)
                )
                for line in lines
            ]
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def write_search(self, settings: Settings, found: Sequence[Sequence[Hypothesis]]) -> None:
        """Keep the hypotheses of every trial."""
        with (
            replacing(self._search_file(settings)) as temporary,
            temporary.open("w", encoding="utf-8") as output,
        ):
            for some in found:
                rows = [(one.sentence, one.acoustic, one.ngram, one.bonus) for one in some]
                output.write(json.dumps(rows) + "\n")

    def read_seconds(self, settings: Settings) -> float | None:
        """Return the seconds per sentence that were measured with these settings, if any."""
        try:
            return float(json.loads(self._seconds_file(settings).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write_seconds(self, settings: Settings, seconds: float) -> None:
        """Keep the seconds per sentence."""
        with replacing(self._seconds_file(settings)) as temporary:
            temporary.write_text(json.dumps(seconds) + "\n", encoding="utf-8")

    def read_scores(self, model: Sequence[object]) -> dict[str, float]:
        """Return sentence -> score (ln) of this model, as far as known."""
        scores = {}
        try:
            lines = self._file("scores", *model).read_text(encoding="utf-8").splitlines()
        except OSError:
            return {}
        for line in lines:
            try:
                sentence, score = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                # The last line of an interrupted run.
                continue
            if isinstance(score, float) and math.isfinite(score):
                scores[str(sentence)] = score
        return scores

    def add_scores(self, model: Sequence[object], scores: Mapping[str, float]) -> None:
        """Keep more scores of this model."""
        with self._file("scores", *model).open("a", encoding="utf-8") as output:
            output.writelines(json.dumps(pair) + "\n" for pair in scores.items())


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a folder's files.

    The n-grams of a model folder are not read where lm.json has their checksum. Weights of a large
    language model are read as a whole: other training changes neither their names nor their size.
    """
    if path.is_file():
        return _file_digest(path)
    found = hashlib.sha256()
    unread = {TRIE} if _has_checksum(path) else set()
    for one in sorted(one for one in path.iterdir() if one.is_file()):
        held = one.stat().st_size if one.name in unread else _file_digest(one)
        found.update(f"{one.name} {held}\n".encode())
    return found.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_checksum(folder: Path) -> bool:
    try:
        return json.loads((folder / DESCRIPTION).read_bytes()).get("crc32") is not None
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
