"""Words and how they are said: the CMU dictionary or a file in its format, `word PH PH ...` per
line.

A word may stand on several lines, one per pronunciation. Phonemes are ARPAbet; stress digits are
removed. Lines that are empty or begin with `;;;` are skipped, and CMU's numbering of variants,
`word(2)`, is understood.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lm_server.errors import UserError
from lm_server.lexicon.text import DAMAGED_ARCHIVE, open_text
from lm_server.protocol import PHONEMES

_PHONEME_SET = frozenset(PHONEMES)
_WORD = re.compile(r"(?=.*[a-z])[a-z'\-]+")
_VARIANT = re.compile(r"\(\d+\)$")

Pronunciation = tuple[str, ...]


class LexiconError(UserError, ValueError):
    """A lexicon that cannot be used; names file and line, what was found and needed."""


@dataclass(frozen=True)
class Lexicon:
    """Words with their pronunciations, in the file's order, the preferred one first."""

    entries: Mapping[str, tuple[Pronunciation, ...]]
    skipped: int = 0
    """Words left out because they hold other signs than a-z, apostrophe and hyphen (such as
    `a.m.`)."""

    def __contains__(self, word: object) -> bool:
        return word in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def pronunciations(self) -> int:
        """Number of (word, pronunciation) pairs."""
        return sum(len(said) for said in self.entries.values())


def is_word(word: str) -> bool:
    """Whether a word is of a-z, apostrophes and hyphens, with at least one letter."""
    return _WORD.fullmatch(word) is not None


def parse_lexicon(lines: Iterable[str], name: str) -> Lexicon:
    """Lines in the CMU format -> lexicon; `name` stands for the source in errors.

    Raises:
      LexiconError: a line has no pronunciation or an unknown phoneme, or no word is left.
    """
    entries: dict[str, list[Pronunciation]] = {}
    skipped: set[str] = set()
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields or line.startswith(";;;"):
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
        word = _VARIANT.sub("", word).lower()
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
    """Reads `cmudict` (the dictionary in this package) or a file (.txt, .gz, .xz).

    Raises:
      LexiconError: there is no such file, it is no UTF-8 text or a damaged archive, or a line is
        wrong.
    """
    if str(source) == "cmudict":
        return _cmudict()
    path = Path(source)
    if not path.is_file():
        raise LexiconError(
            f"there is no lexicon file {path}; needed `cmudict` or a file of lines `word PH PH ...`"
        )
    return _read(path, str(path))


@functools.cache
def _cmudict() -> Lexicon:
    """The package's dictionary, read once: its 134,000 lines take a second."""
    resource = importlib.resources.files("lm_server.lexicon") / "resources" / "cmudict.txt.xz"
    with importlib.resources.as_file(resource) as path:
        return _read(path, "cmudict")


def _read(path: Path, name: str) -> Lexicon:
    with open_text(path) as (lines, _):
        try:
            return parse_lexicon(lines, name)
        except UnicodeDecodeError as error:
            raise LexiconError(
                f"{name} is not UTF-8 text ({error}): convert it, for example with iconv"
            ) from error
        except DAMAGED_ARCHIVE as error:
            raise LexiconError(
                f"{name} is a damaged archive ({error}): fetch or pack it again"
            ) from error


def format_lexicon(lexicon: Lexicon) -> Iterator[str]:
    """The lexicon as lines of its file format, each with its line break."""
    for word, said in lexicon.entries.items():
        for phones in said:
            yield f"{word} {' '.join(phones)}\n"
