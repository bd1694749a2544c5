"""Pronouncing dictionaries: the CMU dictionary, or a file of lines `word PH PH ...`.

A word may have several lines, one per pronunciation. Phonemes are ARPAbet. Stress digits are
removed, and so are CMU's numbers of variants, `word(2)`. Lines that begin with `;;;`, `##` or `# `,
and what follows ` #`, are comments.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lm_server.errors import UserError
from lm_server.lexicon.text import open_text
from lm_server.protocol import PHONEMES

_PHONEME_SET = frozenset(PHONEMES)
_WORD = re.compile(r"(?=.*[a-z])[a-z'\-]+")
_VARIANT = re.compile(r"\(\d+\)$")

Pronunciation = tuple[str, ...]


class LexiconError(UserError, ValueError):
    """A lexicon or vocabulary that cannot be used."""


@dataclass(frozen=True)
class Lexicon:
    """Words with their pronunciations, in the file's order, the preferred one first."""

    entries: Mapping[str, tuple[Pronunciation, ...]]
    skipped: int = 0
    """Words left out because of characters other than a-z, apostrophe and hyphen (`a.m.`)."""

    def __contains__(self, word: object) -> bool:
        return word in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def pronunciations(self) -> int:
        """Number of (word, pronunciation) pairs."""
        return sum(len(said) for said in self.entries.values())


def is_word(word: str) -> bool:
    """Return whether a word has only a-z, apostrophes and hyphens, and at least one letter."""
    return _WORD.fullmatch(word) is not None


def fields_of(line: str) -> list[str]:
    """Return the word, without its number and in lower case, and what follows it on a line.

    Comments are removed. Nothing is left of a line that has nothing else.

    >>> fields_of("AALBORG(2) AA1 L B AO0 R G # place, danish")
    ['aalborg', 'AA1', 'L', 'B', 'AO0', 'R', 'G']
    """
    word, *rest = line.split() or [""]
    if word in ("", "#") or word.startswith((";;;", "##")):
        return []
    said = itertools.takewhile(lambda field: not field.startswith("#"), rest)
    return [_VARIANT.sub("", word).lower(), *said]


def parse_lexicon(lines: Iterable[str], name: str) -> Lexicon:
    """Parse lines in the CMU format. Errors call the source `name`.

    Raises:
      LexiconError: a line has no pronunciation or an unknown phoneme, or no word is left.
    """
    entries: dict[str, list[Pronunciation]] = {}
    skipped: set[str] = set()
    for number, line in enumerate(lines, 1):
        fields = fields_of(line)
        if not fields:
            continue
        word, *said = fields
        phones = tuple(phone.rstrip("012") for phone in said)
        if not phones:
            raise LexiconError(
                f"{name}, line {number}: the word {word!r} has no pronunciation; "
                "needed `word PH PH ...`: write its phonemes after it or delete the line"
            )
        unknown = [phone for phone in phones if phone not in _PHONEME_SET]
        if unknown:
            raise LexiconError(
                f"{name}, line {number}: the word {word!r} has the unknown phoneme {unknown[0]!r}; "
                f"needed ARPAbet: {' '.join(PHONEMES)}"
            )
        if not is_word(word):
            skipped.add(word)
            continue
        variants = entries.setdefault(word, [])
        if phones not in variants:
            variants.append(phones)
    if not entries:
        raise LexiconError(f"{name} holds no word; needed at least one line `word PH PH ...`")
    return Lexicon({word: tuple(said) for word, said in entries.items()}, len(skipped))


def read_lexicon(source: str | Path) -> Lexicon:
    """Read `cmudict` (the dictionary in this package) or a file (.txt, .gz, .xz).

    Raises:
      LexiconError: the file is missing, is not UTF-8 text, is a damaged archive, or has a faulty
        line.
    """
    return _cmudict() if str(source) == "cmudict" else _read(Path(source), str(source))


@functools.cache
def _cmudict() -> Lexicon:
    """Read the package's dictionary once: its 134,000 lines take a second."""
    resource = importlib.resources.files("lm_server.lexicon") / "resources" / "cmudict.txt.xz"
    with importlib.resources.as_file(resource) as path:
        return _read(path, "cmudict")


def _read(path: Path, name: str) -> Lexicon:
    needed = "`cmudict` or a file of lines `word PH PH ...`"
    with open_text(path, LexiconError, "lexicon", needed) as (lines, _):
        return parse_lexicon(lines, name)


def format_lexicon(lexicon: Lexicon) -> Iterator[str]:
    """Yield the lines of the lexicon's file format, each with its line break."""
    for word, said in lexicon.entries.items():
        for phones in said:
            yield f"{word} {' '.join(phones)}\n"
