"""Which words a model knows, and how they are said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_server.lexicon.g2p import pronounce
from lm_server.lexicon.pronunciations import Lexicon, LexiconError, Pronunciation, is_word
from lm_server.lexicon.text import DAMAGED_ARCHIVE, open_text

SEEN_LEAST = 5
"""How often the text must have a word that the lexicon lacks, where the vocabulary has no limit:
rarer ones are mostly slips of writing."""
_VARIANTS = 2
"""Pronunciations of a word outside the lexicon."""
_SHOWN = 5


@dataclass(frozen=True)
class Vocabulary:
    """The words of a model, and what was decided about them."""

    lexicon: Lexicon
    guessed: int = 0
    """Words whose pronunciations are guesses (`g2p`)."""
    left_out: int = 0
    """Words of the text, frequent enough, that the lexicon lacks and nothing could say."""


def read_word_list(path: Path) -> list[str]:
    """A file with a word at the beginning of each line -> words, without repetitions.

    Raises:
      LexiconError: there is no such file, it is no text, it has no word, or something in it is no
        word.
    """
    if not path.is_file():
        raise LexiconError(
            f"there is no vocabulary file {path}; needed a number of words, or a file with one "
            "word per line"
        )
    try:
        with open_text(path) as (lines, _):
            words = _listed_words(path, lines)
    except UnicodeDecodeError as error:
        raise LexiconError(
            f"{path} is not UTF-8 text ({error}); needed one word per line: check the path, or "
            "convert it, for example with iconv"
        ) from error
    except DAMAGED_ARCHIVE as error:
        raise LexiconError(
            f"{path} is a damaged archive ({error}): fetch or pack it again"
        ) from error
    if not words:
        raise LexiconError(f"{path} holds no word; needed one word per line")
    return words


def _listed_words(path: Path, lines: Iterable[str]) -> list[str]:
    words: dict[str, None] = {}
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
    return list(words)


def choose_vocabulary(
    seen: Counter[str],
    lexicon: Lexicon,
    wanted: int | Sequence[str] | None,
    guess: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Vocabulary:
    """The model's words.

    Args:
      seen: how often the text has each word.
      lexicon: the known pronunciations.
      wanted: so many of the text's most frequent words; or these words; or None: all of the
        lexicon, and with `guess` the words that the text has often.
      guess: whether words that the lexicon lacks get pronunciations by rule of thumb (`g2p`); they
        are left out otherwise.
      progress: called with the number of words looked up and to look up.

    Raises:
      LexiconError: a listed word has no pronunciation, or a number of words is not positive.
    """
    if isinstance(wanted, int):
        return _by_frequency(seen, lexicon, wanted, guess, progress)
    if wanted is not None:
        return _listed(lexicon, wanted, guess, progress)
    if not guess:
        return Vocabulary(lexicon)
    others = [word for word, count in seen.items() if count >= SEEN_LEAST and word not in lexicon]
    entries, left_out = dict(lexicon.entries), 0
    for number, word in enumerate(sorted(others), 1):
        said = _guess(word)
        if said:
            entries[word] = said
        else:
            left_out += 1
        progress(number, len(others))
    return Vocabulary(Lexicon(entries), len(entries) - len(lexicon.entries), left_out)


def _by_frequency(
    seen: Counter[str],
    lexicon: Lexicon,
    limit: int,
    guess: bool,
    progress: Callable[[int, int], None],
) -> Vocabulary:
    if limit < 1:
        raise LexiconError(f"the vocabulary is {limit} words; needed at least 1")
    entries: dict[str, tuple[Pronunciation, ...]] = {}
    guessed = left_out = 0
    # Words of one frequency in the order of letters, so that a model can be made again.
    for word, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0])):
        if len(entries) == limit:
            break
        said = lexicon.entries.get(word) or (_guess(word) if guess else ())
        if not said:
            left_out += 1
            continue
        guessed += word not in lexicon
        entries[word] = said
        progress(len(entries), limit)
    return Vocabulary(Lexicon(entries), guessed, left_out)


def _listed(
    lexicon: Lexicon, words: Sequence[str], guess: bool, progress: Callable[[int, int], None]
) -> Vocabulary:
    entries: dict[str, tuple[Pronunciation, ...]] = {}
    missing, guessed = [], 0
    for number, word in enumerate(words, 1):
        said = lexicon.entries.get(word) or (_guess(word) if guess else ())
        if said:
            entries[word] = said
            guessed += word not in lexicon
        else:
            missing.append(word)
        progress(number, len(words))
    if missing:
        what = "can be said in no way that is known" if guess else "are not in the lexicon"
        remedy = "" if guess else "add --g2p, or "
        raise LexiconError(
            f"{len(missing)} words of the vocabulary {what}, among them "
            f"{', '.join(missing[:_SHOWN])}: {remedy}give a lexicon that has them, or take them "
            "off the list"
        )
    return Vocabulary(Lexicon(entries), guessed)


def _guess(word: str) -> tuple[Pronunciation, ...]:
    try:
        return pronounce(word, _VARIANTS)
    except LexiconError:
        return ()
