"""The words of a model and their pronunciations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_server.lexicon.g2p import guess_pronunciations
from lm_server.lexicon.pronunciations import Lexicon, LexiconError, Pronunciation, is_word
from lm_server.lexicon.text import UNKNOWN, open_text

SEEN_LEAST = 5
"""Least frequency in the text of a word outside the lexicon, if the vocabulary has no limit. Rarer
ones are mostly misspellings."""
_SHOWN = 5


@dataclass(frozen=True)
class Vocabulary:
    """The words of a model, with the numbers of guessed and rejected ones."""

    lexicon: Lexicon
    guessed: int = 0
    """Words with guessed pronunciations (`g2p`)."""
    left_out: int = 0
    """Frequent words of the text for which there is no pronunciation."""


def read_word_list(path: Path) -> list[str]:
    """Return the first word of every line of a file, without repetitions.

    Raises:
      LexiconError: the file is missing, is not text, has no word, or has something else in it.
    """
    words: dict[str, None] = {}
    needed = "a number of words, or a file with one word per line"
    with open_text(path, LexiconError, "vocabulary", needed) as (lines, _):
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if not fields:
                continue
            word = fields[0].lower()
            if not is_word(word):
                raise LexiconError(
                    f"{path}, line {number}: {fields[0]!r} is no word; needed letters a-z, "
                    "apostrophes and hyphens: write it as it is spoken, or delete the line"
                )
            words[word] = None
    if not words:
        raise LexiconError(f"{path} holds no word; needed one word per line")
    return list(words)


def choose_vocabulary(
    seen: Counter[str],
    lexicon: Lexicon,
    wanted: int | Sequence[str] | None,
    guess: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Vocabulary:
    """Choose the model's words.

    Args:
      seen: frequency of each word in the text.
      lexicon: the known pronunciations.
      wanted: a number of words, taken from the text by frequency, a list of words, or None for the
        whole lexicon and, with `guess`, the frequent other words of the text.
      guess: whether words outside the lexicon get guessed pronunciations (`g2p`). They are left out
        otherwise.
      progress: called with the number of words looked up, and the number to look up.

    Raises:
      LexiconError: a listed word has no pronunciation, or the number of words is not positive.
    """
    entries: dict[str, tuple[Pronunciation, ...]] = {}
    if isinstance(wanted, int):
        if wanted < 1:
            raise LexiconError(f"the vocabulary is {wanted} words; needed at least 1")
        # Ties are broken by spelling, so that a build can be repeated.
        candidates = sorted(seen.keys() - {UNKNOWN}, key=lambda word: (-seen[word], word))
        limit = wanted
    elif wanted is not None:
        candidates, limit = list(wanted), len(wanted)
    else:
        entries = dict(lexicon.entries)
        often = [word for word, count in seen.items() if count >= SEEN_LEAST] if guess else []
        candidates = sorted(word for word in often if word not in lexicon and word != UNKNOWN)
        limit = len(entries) + len(candidates)
    missing, guessed = [], 0
    for number, word in enumerate(candidates, 1):
        if len(entries) == limit:
            break
        said = lexicon.entries.get(word) or (guess_pronunciations(word) if guess else ())
        if said:
            entries[word] = said
            guessed += word not in lexicon
        else:
            missing.append(word)
        if isinstance(wanted, int):
            progress(len(entries), limit)
        else:
            progress(number, len(candidates))
    if missing and not isinstance(wanted, int | None):
        what = "have no pronunciation that can be guessed" if guess else "are not in the lexicon"
        remedy = "" if guess else "add --g2p, or "
        raise LexiconError(
            f"{len(missing)} words of the vocabulary {what}, among them "
            f"{', '.join(missing[:_SHOWN])}: {remedy}give a lexicon that has them, or take them "
            "off the list"
        )
    return Vocabulary(Lexicon(entries), guessed, len(missing))
