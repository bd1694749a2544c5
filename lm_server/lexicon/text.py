"""Normalised text: lower-case words of a-z, apostrophes and (inside known words) hyphens.

A hyphenated word stays whole if the lexicon has it, and is split otherwise. Numbers are read as
words where there is one way to read them. Other sentences with digits, and those with non-Latin
letters, are dropped and counted, because their spoken form is unknown. Marks of other tools are no
words: `<s>` and `</s>` end sentences, `<unk>` is a word that is not known, entities (`&amp;`) are
resolved, and annotations in brackets (`[laughter]`, `<p>`) are removed and counted.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import html
import io
import itertools
import lzma
import re
import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lm_server.errors import UserError
from lm_server.lexicon.numbers import read_numbers

UNKNOWN = "<unk>"
"""Stands in the text for a word that is not known."""
_UNKNOWNS = re.compile(r"<unk>|<oov>|\[unk\]", re.IGNORECASE)
_SENTENCE_MARK = re.compile(r"</?s>", re.IGNORECASE)
_ANNOTATION = re.compile(
    r"<(?!unk>)/?[A-Za-z!][^<>]{0,200}>|\[[^][]{0,60}\]|\{[^{}]{0,60}\}|-[LR][RCS]B-"
)
_BRACKETS = ("<", "[", "{", "-L", "-R")
_CLITIC = re.compile(
    r" (?<=[A-Za-z] )(['\u2019](?:s|m|re|ve|ll|d)|n['\u2019]t)(?![\w'])", re.IGNORECASE
)
"""Parts of words that tokenisers put apart: `it 's`, `do n't`."""
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'", "\u00b4": "'", "`": "'"})
_DASHES = re.compile(r"--+|[\u2013\u2014\u2015]")
_HYPHENS = str.maketrans({"\u2010": "-", "\u2011": "-", "\u00ad": None})
_DIGIT = re.compile(r"[0-9]")
_AND = re.compile(r"(?<=\s)&(?=\s)")
_NOT_WORD = re.compile(r"[^a-z'\- ]+")
_SENTENCE_END = re.compile(r"([.!?]+)[\"')\]\u201d\u2019]*\s+(?=[\"'(\[\u201c\u2018]*[A-Z])")
_ABBREVIATIONS = frozenset(
    (
        *("mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "gen", "col", "capt", "lt", "sgt"),
        *("rev", "hon", "gov", "sen", "rep", "no", "vol", "fig", "inc", "ltd", "co", "vs", "etc"),
        *("e.g", "i.e"),
    )
)

SUFFIXES = (".txt", ".gz", ".xz")
"""Suffixes of the files that `find_texts` collects from a folder."""
_DAMAGED_ARCHIVE = (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error)
"""Raised while a damaged .gz or .xz file is read."""
_SHOWN, _SHOWN_LENGTH = 5, 20
_LONGEST_LINE = 1 << 24
_SUSPICIOUS_SIZE, _SUSPICIOUS_RATIO = 1 << 28, 200
"""Signs from which on an archive is checked, and how many a byte of it may have."""


class TextError(UserError, ValueError):
    """Text that cannot be used."""


@dataclass(frozen=True)
class Counts:
    """Numbers of a text's sentences, kept and dropped."""

    sentences: int = 0
    words: int = 0
    dropped_digits: int = 0
    dropped_letters: int = 0
    """Sentences with letters outside the Latin alphabet."""
    empty: int = 0
    """Lines without a word."""
    annotations: int = 0
    """Annotations in brackets, such as `[laughter]`, that were removed."""
    examples: tuple[str, ...] = ()
    """The first few words for which sentences were dropped."""

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = vars(self), vars(other)
        total = {name: mine[name] + theirs[name] for name in mine}
        if other.examples:
            total["examples"] = tuple(dict.fromkeys(total["examples"]))[:_SHOWN]
        return Counts(**total)

    def left_out(self, what: str) -> Iterator[str]:
        """Yield what was left out of the text, called `what`, and why: none or several lines."""
        dropped = self.dropped_digits + self.dropped_letters
        if dropped:
            yield (
                f"of {what} {dropped} of {dropped + self.sentences} sentences are left out: "
                f"{self.dropped_digits} for numbers with several readings, {self.dropped_letters} "
                f"for letters other than a-z (such as {', '.join(self.examples)}): write them as "
                "they are spoken"
            )
        if self.annotations:
            yield f"of {what} {self.annotations} annotations in brackets are left out"


@functools.lru_cache(1024)
def _kept(words: int) -> Counts:
    return Counts(sentences=1, words=words)


def split_sentences(line: str) -> list[str]:
    """Split a line at full stops, question and exclamation marks before a capital letter.

    Abbreviations such as "Mr." and initials such as "J." do not end a sentence.

    >>> split_sentences("Mr. J. Doe left. Why?")
    ['Mr. J. Doe left.', 'Why?']
    """
    sentences, start = [], 0
    for match in _SENTENCE_END.finditer(line):
        words_before = line[start : match.start()].split()
        last = words_before[-1].lstrip("\"'([\u201c\u2018").lower() if words_before else ""
        initial = last != "i" and re.fullmatch(r"[a-z]", last)
        if match.group(1) == "." and (initial or last in _ABBREVIATIONS):
            continue
        sentences.append(line[start : match.end()].strip())
        start = match.end()
    rest = line[start:].strip()
    return [*sentences, rest] if rest else sentences


def fold(text: str) -> str:
    """Return text in lower case, without accents, and with the apostrophes and hyphens of ASCII.

    >>> fold("O\u2019Brien, Jos\u00e9")
    "o'brien, jose"
    """
    text = text.translate(_APOSTROPHES).translate(_HYPHENS)
    # NFKD separates letters from their accents. It also turns "½" and "²" into digits.
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(letters).casefold()


def normalise(sentence: str, known: Collection[str] = frozenset()) -> tuple[str, ...] | str:
    """Return the words of a sentence, or the `Counts` field under which it is dropped.

    `<unk>` is returned as it is.

    Args:
      sentence: any text. Case, accents and punctuation are removed.
      known: words that keep their hyphens and their outer apostrophes ("x-ray", "'em", "boys'").
    """
    digits = _DIGIT.search(sentence)
    if digits:
        sentence = read_numbers(sentence)
    if sentence.isascii():
        folded = sentence.replace("`", "'").lower()
        if digits and _DIGIT.search(folded):
            return "dropped_digits"
    else:
        folded = fold(sentence)
        if any(c.isnumeric() for c in folded):
            return "dropped_digits"
        if any(c.isalpha() and not "a" <= c <= "z" for c in folded):
            return "dropped_letters"
    if "-" in folded or not sentence.isascii():
        folded = _DASHES.sub(" ", folded)
    words: list[str] = []
    if UNKNOWN in folded:
        parts = [_NOT_WORD.sub(" ", part) for part in folded.split(UNKNOWN)]
        tokens = f" {UNKNOWN} ".join(parts).split()
    else:
        tokens = _NOT_WORD.sub(" ", folded).split()
    for token in tokens:
        if token in known or token == UNKNOWN:
            words.append(token)
        else:
            words += _words_of_token(token, known)
    return tuple(words) if words else "empty"


def _words_of_token(token: str, known: Collection[str]) -> list[str]:
    if token.isalpha():
        return [token]
    bare = token.strip("'-")
    for candidate in (token.strip("-"), token.lstrip("'-"), token.rstrip("'-"), bare):
        if candidate in known:
            return [candidate]
    if "-" in bare:
        return [word for part in bare.split("-") for word in _words_of_token(part, known)]
    return [bare] if bare else []


def read_words(
    paths: Iterable[Path],
    known: Collection[str] = frozenset(),
    progress: Callable[[int], None] = lambda size: None,
) -> Iterator[tuple[tuple[str, ...] | None, Counts]]:
    """Read text files (.txt, .gz, .xz in UTF-8, one or more sentences per line).

    Args:
      paths: the files, read in this order.
      known: see `normalise`.
      progress: called with the number of bytes (compressed) read since its last call.

    Yields:
      (words of one sentence or None if it was dropped, increment of the counts).

    Raises:
      TextError: a file is missing, is not UTF-8, or is a damaged archive.
    """
    for path in paths:
        done = 0
        with open_text(path) as (lines, position):
            for number, line in enumerate(lines):
                plain, annotations = without_marks(line)
                if annotations:
                    yield None, Counts(annotations=annotations)
                for sentence in itertools.chain.from_iterable(map(split_sentences, plain)):
                    words = normalise(sentence, known)
                    if isinstance(words, str):
                        why = () if words == "empty" else _reason(sentence, words)
                        dropped: dict[str, Any] = {words: 1, "examples": why}
                        yield None, Counts(**dropped)
                    else:
                        yield words, _kept(len(words))
                if number % 1024 == 0:
                    progress(position() - done)
                    done = position()
            progress(position() - done)


def without_marks(line: str) -> tuple[list[str], int]:
    """Return the parts of a line between marks of sentences, and the number of annotations in it.

    >>> without_marks("<s> it 's R&amp;D [laughter] </s> <s> so <UNK> </s>")
    (["it's R&D", 'so <unk>'], 1)
    """
    if "&" in line:
        # Twice, because some tools escape what is escaped already.
        line = _AND.sub("and", html.unescape(html.unescape(line)))
    if "'" in line or "\u2019" in line:
        line = _CLITIC.sub(r"\1", line)
    if not any(map(line.__contains__, _BRACKETS)):
        return [line], 0
    parts, removed = [], 0
    for part in _SENTENCE_MARK.split(_UNKNOWNS.sub(UNKNOWN, line)):
        plain, number = _ANNOTATION.subn(" ", part)
        removed += number
        if plain.strip():
            parts.append(plain.strip())
    return parts, removed


def _reason(sentence: str, dropped_as: str) -> tuple[str, ...]:
    """Return the first word for which a sentence is dropped, if one alone is the reason."""
    found = (word for word in read_numbers(sentence).split() if normalise(word) == dropped_as)
    return tuple(word[:_SHOWN_LENGTH] for word in itertools.islice(found, 1))


def find_texts(paths: Iterable[Path]) -> list[Path]:
    """Replace each folder by all .txt, .gz and .xz files below it, sorted by name.

    Raises:
      TextError: a path does not exist, or a folder holds no text.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(
                one
                for one in path.rglob("*")
                if one.suffix.lower() in SUFFIXES and one.is_file() and not one.name.startswith(".")
            )
            if not below:
                raise TextError(
                    f"the folder {path} holds no text; needed {', '.join(SUFFIXES)} files in it or "
                    "below it"
                )
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise TextError(
                f"there is no text file {path}; needed .txt, .gz or .xz, or a folder of such "
                "files: check the path"
            )
    return list(dict.fromkeys(found))


@contextmanager
def open_text(
    path: Path,
    failure: type[Exception] = TextError,
    kind: str = "text",
    needed: str = ".txt, .gz or .xz",
) -> Iterator[tuple[Iterator[str], Callable[[], int]]]:
    """Open plain, gzip or xz text, chosen by the suffix or the first bytes.

    Args:
      path: the file.
      failure: exception for a file that is missing or turns out not to be text.
      kind: name of the file's role in that message, such as "lexicon".
      needed: description of the expected content in that message.

    Yields:
      (lines, function that returns the number of bytes read from the file so far).
    """
    if not path.is_file():
        raise failure(f"there is no {kind} file {path}; needed {needed}: check the path")
    try:
        raw = path.open("rb")
    except OSError as error:
        raise failure(f"{path} cannot be read ({error}): check its rights") from error
    # Text of some editors begins with a byte order mark, which is no part of a word.
    with raw, io.TextIOWrapper(_unpacked(path, raw), encoding="utf-8-sig") as text:
        try:
            yield _bounded(path, text, raw.tell, failure), raw.tell
        except UnicodeDecodeError as error:
            raise failure(
                f"{path} is not UTF-8 text ({error}); needed {needed}: check the path, or convert "
                "it, for example with iconv"
            ) from error
        except _DAMAGED_ARCHIVE as error:
            raise failure(
                f"{path} is a damaged archive ({error}): fetch or pack it again"
            ) from error


def beginning(path: Path, size: int = 1 << 16) -> bytes:
    """Return the first bytes of a plain, gzip or xz file, fewer if the archive is damaged."""
    with path.open("rb") as raw, contextlib.suppress(*_DAMAGED_ARCHIVE):
        return _unpacked(path, raw).read(size)
    return b""


def _unpacked(
    path: Path, raw: io.BufferedReader
) -> io.BufferedReader | gzip.GzipFile | lzma.LZMAFile:
    first, suffix = raw.peek(8), path.suffix.lower()
    if suffix == ".gz" or first.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".xz" or first.startswith(b"\xfd7zXZ"):
        return lzma.LZMAFile(raw)
    return raw


def _bounded(
    path: Path, text: TextIO, position: Callable[[], int], failure: type[Exception]
) -> Iterator[str]:
    """Yield lines, none of them so long, nor so many of so few bytes, that they fill the memory or
    the disk."""
    signs = 0
    while line := text.readline(_LONGEST_LINE):
        signs += len(line)
        if len(line) == _LONGEST_LINE:
            raise failure(
                f"{path} has a line of more than {_LONGEST_LINE} signs; needed text with line "
                "breaks: put one sentence on each line"
            )
        if signs > _SUSPICIOUS_SIZE and signs > _SUSPICIOUS_RATIO * position():
            raise failure(
                f"{path} unpacks to more than {_SUSPICIOUS_RATIO} times its size; needed text, "
                "which packs to a tenth: if it is right all the same, unpack it first"
            )
        yield line
