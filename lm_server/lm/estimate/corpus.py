"""Text files -> sentences of word ids on disk, ready for counting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm_server.lexicon import text
from lm_server.lm.sorted_ngrams import BEGIN, END

_HELD_OUT_EVERY = 100
_WRITTEN_WORDS = 1 << 16
_BYTES_PER_WORD = 200
"""Memory of a word with its count."""


@dataclass(frozen=True)
class Corpus:
    """Files of normalised text, one sentence per line, with counts."""

    train: Path
    held_out: Path
    counts: text.Counts
    """Counts of the training texts, including sentences held out of them."""
    seen: Counter[str]
    """Frequency of each word in `train`."""
    aside: text.Counts
    """Counts of the held-out texts, 0 without such."""
    forgotten: int = 0
    """Number of times that words seen once were dropped so that the counts fit into memory."""


def read_corpus(
    texts: Sequence[Path],
    held_out: Sequence[Path],
    known: Collection[str],
    memory: int,
    folder: Path,
    progress: Callable[[int], None] = lambda size: None,
) -> Corpus:
    """Normalise text and write it to `folder`.

    Args:
      texts: files of sentences, see `lm_server.lexicon.text`.
      held_out: files of sentences to measure the model on. Without any, every hundredth sentence of
        `texts` is kept for that.
      known: words that keep their hyphens and outer apostrophes.
      memory: bytes that the counts of words may use.
      folder: where the files are written.
      progress: called with the number of bytes read since its last call.

    Raises:
      TextError: a file is missing or is not UTF-8 text, or no held-out sentence can be used.
    """
    train, aside = folder / "train.txt", folder / "held_out.txt"
    counts, seen, forgotten = text.Counts(), Counter[str](), 0
    kept = running = 0
    most = max(memory // _BYTES_PER_WORD, 100_000)
    with train.open("w") as output, aside.open("w") as other:
        for words, change in text.read_words(texts, known, progress):
            if words is None:
                counts += change
                continue
            # Adding up what is kept as `Counts` would take a third of the time.
            kept, running = kept + 1, running + len(words)
            if not held_out and kept % _HELD_OUT_EVERY == 0:
                other.write(" ".join(words) + "\n")
                continue
            output.write(" ".join(words) + "\n")
            seen.update(words)
            if len(seen) > most:
                forgotten += 1
                seen = Counter({word: count for word, count in seen.items() if count > 1})
        counts += text.Counts(sentences=kept, words=running)
        measured = text.Counts()
        for words, change in text.read_words(held_out, known, progress):
            measured += change
            if words is not None:
                other.write(" ".join(words) + "\n")
    if held_out and not measured.sentences:
        raise text.TextError(
            f"no sentence of the held-out text {', '.join(map(str, held_out))} can be used: "
            f"{measured.dropped_digits} dropped for digits, {measured.dropped_letters} for letters "
            f"other than a-z, {measured.empty} without a word; needed English text of the kind "
            "that will be spoken"
        )
    return Corpus(train, aside, counts, seen, measured, forgotten)


def sentences(path: Path) -> Iterator[list[str]]:
    """Yield the sentences of a file of `read_corpus`."""
    with path.open() as lines:
        for line in lines:
            yield line.split()


def write_ids(
    path: Path, ids: Mapping[str, int], out: Path, progress: Callable[[int], None]
) -> np.ndarray:
    """Write the sentences of `path` as ids, with `<s>` and `</s>`, and 0 for other words.

    Returns:
      int32 [tokens], a memory map of `out`.
    """
    begin, end, buffer = ids[BEGIN], ids[END], []
    with out.open("wb") as file:
        for words in sentences(path):
            buffer.append(begin)
            buffer += [ids.get(word, 0) for word in words]
            buffer.append(end)
            if len(buffer) > _WRITTEN_WORDS:
                np.array(buffer, np.int32).tofile(file)
                progress(len(buffer))
                buffer.clear()
        np.array(buffer, np.int32).tofile(file)
        progress(len(buffer))
    if not out.stat().st_size:
        return np.zeros(0, np.int32)
    return np.memmap(out, np.int32, "r")
