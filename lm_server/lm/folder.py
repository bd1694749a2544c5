"""Writes a model folder: `lm.json` (description and figures), `lm.bin` (KenLM trie) and
`lexicon.txt` (words with their pronunciations, likelier words first).

The folder appears whole or not at all: it is made beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import kenlm
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lm_server.lexicon.pronunciations import Lexicon, format_lexicon
from lm_server.lm.arpa import ModelError
from lm_server.lm.reader import DESCRIPTION, FORMAT, LEXICON, TRIE, checksum
from lm_server.lm.sorted_ngrams import END, UNKNOWN, SortedModel
from lm_server.lm.trie.kenlm_binary import TrieForm, write_trie


@contextlib.contextmanager
def folder_in_place_of(out: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `out` if the block succeeds, and is removed otherwise.

    Folders left behind by killed builds of this machine are removed first.

    Raises:
      ModelError: `out` exists and is not a model folder, or cannot be written.
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
    # The name is known before the folder exists, so that a signal at any moment finds it.
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
    """Remove the temporary folders of processes of this machine that have ended."""
    for path in target.parent.glob(f"{_prefix(target)}*"):
        number = re.match(r"\d+", path.name.removeprefix(_prefix(target)))
        if number and not Path(f"/proc/{number[0]}").exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True)


class Stages:
    """Progress bars, one per stage of the work, each shown when its stage begins."""

    def __init__(self, console: Console | None) -> None:
        """Show the bars on `console`, by default the terminal's error output."""
        self._console = console or Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, *times, console=self._console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, stage: str, done: int, total: int) -> None:
        """Advance a stage's bar by `done` of `total`."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], advance=done, total=total)

    def finish(self, stage: str) -> None:
        """Fill a stage's bar."""
        self.advance(stage, 0, 1)
        self._progress.update(self._tasks[stage], total=1, completed=1)

    def print(self, line: str) -> None:
        """Print a line as it is."""
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def write_model(
    folder: Path,
    model: SortedModel,
    lexicon: Lexicon,
    form: TrieForm,
    held_out: Iterable[Sequence[str]],
    stages: Stages,
) -> dict[str, Any]:
    """Write the trie and the lexicon, and measure the model.

    Args:
      folder: an empty folder.
      model: the n-grams.
      lexicon: the words with their pronunciations.
      form: the kind of KenLM trie.
      held_out: sentences to measure on.
      stages: shows progress.

    Returns:
      The figures that `lm.json` has for every model.
    """
    total, stage = sum(model.counts), "writing the KenLM trie"
    trie = folder / TRIE
    write_trie(trie, model, form, lambda rows: stages.advance(stage, rows, total))
    stages.finish(stage)
    likely = dict(zip(model.words, model.orders[0].log10.tolist(), strict=True))
    write_lexicon(folder / LEXICON, lexicon, likely, likely[UNKNOWN])
    quality = measure(kenlm.Model(str(trie)), held_out, lexicon.entries)
    stages.finish("measuring on held-out sentences")
    return {
        "order": len(model.orders),
        "words": len(lexicon),
        "pronunciations": lexicon.pronunciations,
        "ngrams": model.counts,
        "quantised_bits": form.bits,
        "compressed_pointers": form.compressed,
        "bytes": trie.stat().st_size,
        "crc32": checksum(trie),
        **quality,
    }


def write_lexicon(path: Path, lexicon: Lexicon, log10: Mapping[str, float], unseen: float) -> None:
    """Write the words, likelier ones first. The search tries homophones in this order."""
    by_probability = sorted(lexicon.entries, key=lambda word: -log10.get(word, unseen))
    ordered = Lexicon({word: lexicon.entries[word] for word in by_probability})
    with path.open("w") as file:
        file.writelines(format_lexicon(ordered))


def measure(
    model: kenlm.Model, sentences: Iterable[Sequence[str]], known: Collection[str]
) -> dict[str, float | int | None]:
    """Return the perplexity per lexicon word and sentence end, and the rate of other words."""
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


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write `lm.json`."""
    text = json.dumps({"format": FORMAT, **description}, indent=2)
    (folder / DESCRIPTION).write_text(text + "\n")


def report(stages: Stages, out: Path, description: Mapping[str, Any]) -> None:
    """Print the main figures of `lm.json`."""
    perplexity, outside = description["perplexity"], description["oov_rate"]
    measured = "perplexity not measured, for lack of held-out text"
    if perplexity is not None and math.isfinite(perplexity):
        measured = (
            f"perplexity {perplexity:.0f} on {description['held_out_sentences']} held-out "
            f"sentences, of whose words {outside:.2%} are outside the vocabulary"
        )
    text = f", {description['sentences']} sentences" if "sentences" in description else ""
    stages.print(
        f"{out}: order {description['order']}, {description['words']} words "
        f"({description['guessed_pronunciations']} with guessed pronunciations), n-grams "
        f"{description['ngrams']}, {description['bytes'] / 1e6:.1f} MB{text}; {measured}"
    )
