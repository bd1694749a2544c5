"""A model folder: `lm.json` (what the model is, its figures), `lm.bin` (KenLM trie) and
`lexicon.txt` (words with their pronunciations, likelier words first).

It appears whole or not at all: it is made beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import kenlm
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining

from lm_server.lexicon.pronunciations import Lexicon, format_lexicon
from lm_server.lm.arpa import ModelError
from lm_server.lm.sorted_ngrams import END, UNKNOWN, SortedModel

FORMAT = 1
"""Version of the model folder's layout; readers refuse others."""
DESCRIPTION, TRIE, LEXICON = "lm.json", "lm.bin", "lexicon.txt"


@contextlib.contextmanager
def folder_in_place_of(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` when the block ends well, else vanishes.

    What a build on this machine left behind when it was killed is removed first.

    Raises:
      ModelError: `out` is something else than a model folder, or cannot be written.
    """
    target = out.resolve()
    if target.exists() and not (
        target.is_dir() and ((target / DESCRIPTION).is_file() or not any(target.iterdir()))
    ):
        raise ModelError(
            f"{out} is there but is no model folder; needed a new, empty or model folder: "
            "choose another"
        )
    prefix = f"{_prefix(target)}{os.getpid()}."
    # The name is known before the folder is there, so that a signal at any moment finds it.
    folder = target.parent / f"{prefix}{secrets.token_hex(4)}"
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_orphans(target)
            folder.mkdir()
        except OSError as error:
            raise ModelError(
                f"cannot write beside {out} ({error}): choose a folder that you may write to"
            ) from error
        yield folder
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f"{prefix}old.", dir=target.parent))
            os.rename(target, old)
            os.rename(folder, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.{platform.node()}."


def _remove_orphans(target: Path) -> None:
    """Removes the temporary folders of processes of this machine that are no more."""
    for path in target.parent.glob(f"{_prefix(target)}*"):
        number = re.match(r"\d+", path.name.removeprefix(_prefix(target)))
        if number and not Path(f"/proc/{number[0]}").exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True)


def write_lexicon(path: Path, lexicon: Lexicon, model: SortedModel) -> None:
    """Writes the words, likelier ones first: the search looks at homophones in this order."""
    log10 = dict(zip(model.words, model.orders[0].log10.tolist(), strict=True))
    unseen = log10[UNKNOWN]
    by_probability = sorted(lexicon.entries, key=lambda word: -log10.get(word, unseen))
    ordered = Lexicon({word: lexicon.entries[word] for word in by_probability})
    with path.open("w") as file:
        file.writelines(format_lexicon(ordered))


def write_description(path: Path, description: Mapping[str, object]) -> None:
    """Writes lm.json."""
    path.write_text(json.dumps({"format": FORMAT, **description}, indent=2) + "\n")


def measure(
    trie: Path, sentences: Iterable[Sequence[str]], known: Collection[str]
) -> dict[str, float | int | None]:
    """Perplexity per lexicon word and sentence end, and the share of words outside it."""
    model = kenlm.Model(str(trie))
    log10, scored, words, outside, count = 0.0, 0, 0, 0, 0
    for sentence in sentences:
        count += 1
        inside = [word if word in known else UNKNOWN for word in sentence]
        words += len(inside)
        outside += inside.count(UNKNOWN)
        for word, (score, _, _) in zip(
            [*inside, END], model.full_scores(" ".join(inside)), strict=True
        ):
            if word != UNKNOWN:
                log10 += score
                scored += 1
    return {
        "perplexity": 10 ** (-log10 / scored) if words else None,
        "oov_rate": outside / words if words else None,
        "held_out_sentences": count,
    }


class Stages:
    """Progress bars, one per stage of the work, each appearing when its stage begins."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def advance(self, stage: str, done: int, total: int) -> None:
        """Moves a stage's bar by `done` of `total`."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], advance=done, total=total)

    def finish(self, stage: str) -> None:
        """Fills a stage's bar."""
        self.advance(stage, 0, 1)
        self._progress.update(self._tasks[stage], total=1, completed=1)


def progress_columns() -> tuple[TextColumn, BarColumn, TaskProgressColumn, Elapsed, Remaining]:
    """What the progress bars show."""
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        Elapsed(),
        Remaining(),
    )
