"""`lm-server build`: text and a lexicon -> a model folder.

The folder holds `lm.json` (what the model is, its figures), `lm.bin` (KenLM trie) and `lexicon.txt`
(words with their pronunciations, likelier words first). It appears whole or not at all: it is built
beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import kenlm
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from lm_server import ngram, text
from lm_server.kenlm_trie import write_trie
from lm_server.lexicon import Lexicon, format_lexicon, read_lexicon
from lm_server.ngram import MAX_ORDER, OUTSIDE, Model, ModelError

FORMAT = 1
"""Version of the model folder's layout; readers refuse others."""
DESCRIPTION, TRIE, LEXICON = "lm.json", "lm.bin", "lexicon.txt"
_HELD_OUT_EVERY = 100


@dataclass(frozen=True)
class _Prepared:
    """Text ready for training, and what was seen in it."""

    train: Path
    held_out: list[tuple[str, ...]]
    counts: text.Counts
    seen: Counter[str]
    outside: int
    """Running words that the lexicon does not have."""


def build(
    texts: Sequence[Path],
    order: int,
    lexicon: str | Path,
    out: Path,
    console: Console | None = None,
) -> None:
    """Builds a model folder.

    Args:
      texts: files of sentences (.txt, .gz, .xz), see `lm_server.text`.
      order: length of the longest n-grams, 1-5.
      lexicon: `cmudict` or a file in its format.
      out: folder to write; a model folder there is replaced.
      console: where progress is shown; by default the terminal's error output.

    Raises:
      TextError: a text file is missing, unreadable, or no sentence of the texts can be used.
      LexiconError: the lexicon cannot be used.
      ModelError: `order` is out of range, `out` is in use for something else, or training fails.
    """
    if not 1 <= order <= MAX_ORDER:
        raise ModelError(f"the order is {order}; needed 1-{MAX_ORDER} words: 3 is a good start")
    ngram.check_trainer(order)
    console = console or Console(stderr=True)
    for path in texts:
        if not path.is_file():
            raise text.TextError(
                f"there is no text file {path}; needed .txt, .gz or .xz: check the path"
            )
    with (
        _folder_in_place_of(out) as folder,
        tempfile.TemporaryDirectory(prefix="lm-build-", dir=folder.parent) as work,
    ):
        with _progress(console) as progress:
            task = progress.add_task("reading the lexicon", total=None)
            words = read_lexicon(lexicon)
            progress.update(task, total=1, completed=1)
            prepared = _prepare(texts, words, Path(work), progress)
            model, trainer = _train(prepared, order, Path(work), progress)
            model = ngram.spread_unseen(model, prepared.seen, len(words) - len(prepared.seen))
            task = progress.add_task("writing the KenLM trie", total=sum(model.counts))
            write_trie(
                folder / TRIE, model.words, model.orders, lambda rows: progress.advance(task, rows)
            )
            _write_lexicon(folder / LEXICON, words, model)
            quality = _perplexity(folder / TRIE, prepared.held_out, words.entries)
        description = {
            "format": FORMAT,
            "order": order,
            "trainer": trainer,
            "words": len(words),
            "pronunciations": words.pronunciations,
            "words_in_text": len(prepared.seen),
            "ngrams": model.counts,
            "sentences": prepared.counts.sentences,
            "running_words": prepared.counts.words,
            "dropped_with_digits": prepared.counts.dropped_digits,
            "dropped_with_other_letters": prepared.counts.dropped_letters,
            "outside_lexicon_rate": prepared.outside / max(prepared.counts.words, 1),
            **quality,
            "unseen_word_log10": float(model.orders[0].log10[0]),
            "lexicon": str(lexicon),
            "texts": [path.name for path in texts],
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    _report(console, out, description)


def _prepare(texts: Sequence[Path], lexicon: Lexicon, work: Path, progress: Progress) -> _Prepared:
    task = progress.add_task("reading the text", total=sum(path.stat().st_size for path in texts))
    counts, seen, outside, held_out = text.Counts(), Counter[str](), 0, []
    known = lexicon.entries
    train = work / "train.txt"
    read = text.read_words(texts, known, lambda size: progress.advance(task, size))
    with train.open("w") as output:
        for words, change in read:
            counts += change
            if words is None:
                continue
            inside = [word if word in known else OUTSIDE for word in words]
            outside += inside.count(OUTSIDE)
            if counts.sentences % _HELD_OUT_EVERY == 0:
                held_out.append(words)
                continue
            seen.update(inside)
            output.write(" ".join(inside) + "\n")
    seen.pop(OUTSIDE, None)
    if not seen:
        raise text.TextError(
            f"no sentence of {', '.join(map(str, texts))} can be used: "
            f"{counts.sentences} sentences, {counts.dropped_digits} dropped for digits, "
            f"{counts.dropped_letters} for letters other than a-z, and none has a word of the "
            "lexicon: needed English text, one or more sentences per line"
        )
    return _Prepared(train, held_out, counts, seen, outside)


def _train(prepared: _Prepared, order: int, work: Path, progress: Progress) -> tuple[Model, str]:
    if order == 1:
        with prepared.train.open() as lines:
            return ngram.count_unigrams(line.split() for line in lines), ngram.trainer_name(1)
    task = progress.add_task(f"training with {ngram.trainer_name(order)}", total=None)
    arpa = work / "lm.arpa"
    trainer = ngram.train_arpa(prepared.train, arpa, order, lambda: progress.update(task))
    progress.update(task, total=1, completed=1)
    with arpa.open("rb") as lines:
        total = sum(1 for _ in lines)
    task = progress.add_task("reading the n-grams", total=total)
    model = ngram.read_arpa(arpa, lambda rows: progress.advance(task, rows))
    progress.update(task, completed=total)
    return ngram.repair_zeros(ngram.without_outside(model)), trainer


def _write_lexicon(path: Path, lexicon: Lexicon, model: Model) -> None:
    """Writes the words, likelier ones first: the search looks at homophones in this order."""
    log10 = dict(zip(model.words, model.orders[0].log10.tolist(), strict=True))
    unseen = log10[ngram.UNKNOWN]
    by_probability = sorted(lexicon.entries, key=lambda word: -log10.get(word, unseen))
    ordered = Lexicon({word: lexicon.entries[word] for word in by_probability})
    path.write_text("".join(format_lexicon(ordered)))


def _perplexity(
    trie: Path, sentences: Sequence[Sequence[str]], known: Collection[str]
) -> dict[str, float | int | None]:
    """Perplexity per lexicon word and sentence end, and the share of words outside it."""
    model = kenlm.Model(str(trie))
    log10, scored, words, outside = 0.0, 0, 0, 0
    for sentence in sentences:
        inside = [word if word in known else ngram.UNKNOWN for word in sentence]
        words += len(inside)
        outside += inside.count(ngram.UNKNOWN)
        for word, (score, _, _) in zip(
            [*inside, ngram.END], model.full_scores(" ".join(inside)), strict=True
        ):
            if word != ngram.UNKNOWN:
                log10 += score
                scored += 1
    return {
        "perplexity": 10 ** (-log10 / scored) if scored else None,
        "oov_rate": outside / words if words else None,
        "held_out_sentences": len(sentences),
    }


@contextlib.contextmanager
def _folder_in_place_of(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` when the block ends well, else vanishes."""
    target = out.resolve()
    if target.exists() and not (
        target.is_dir() and ((target / DESCRIPTION).is_file() or not any(target.iterdir()))
    ):
        raise ModelError(
            f"{out} is there but is no model folder; needed a new, empty or model folder: "
            "choose another"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ModelError(
            f"cannot write beside {out} ({error}): choose a folder that you may write to"
        ) from error
    try:
        yield folder
        folder.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.rename(target, old)
            os.rename(folder, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def _report(console: Console, out: Path, description: Mapping[str, object]) -> None:
    perplexity = description["perplexity"]
    held_out = "too little text to measure it"
    if isinstance(perplexity, float) and math.isfinite(perplexity):
        held_out = f"{perplexity:.0f} on {description['held_out_sentences']} held-out sentences"
    console.print(
        f"{out}: order {description['order']} by {description['trainer']}, "
        f"{description['words']} words, n-grams {description['ngrams']}, "
        f"{description['sentences']} sentences; perplexity {held_out}",
        highlight=False,
        soft_wrap=True,
    )
