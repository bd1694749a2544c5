"""Reads a model folder of `lm-server build`: its description, words and pronunciations."""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from lm_server.errors import UserError
from lm_server.lexicon.pronunciations import Pronunciation
from lm_server.protocol import LM_CLASSES, PHONEMES

FORMAT = 1
"""Version of the model folder's layout. Other versions are refused."""
DESCRIPTION, TRIE, LEXICON = "lm.json", "lm.bin", "lexicon.txt"
_CLASS = {name: LM_CLASSES.index(name) for name in PHONEMES}
_REMEDY = "build the model again"
_LINKED = "bring it back, or import it again with `lm-server import --kenlm`"


class ModelFolderError(UserError, ValueError):
    """A folder that is not a model folder, or is damaged."""


def read_description(folder: Path) -> dict[str, object]:
    """Read `lm.json` and check the folder against it.

    Raises:
      ModelFolderError: the folder does not exist or has another format, or one of its files is
        missing or damaged.
    """

    def fault(
        text: str,
        remedy: str = f"make one with `lm-server build --text FILE --out {quote(str(folder))}`",
    ) -> ModelFolderError:
        return ModelFolderError(f"{text}: {remedy}")

    if folder.is_file():
        needed = f"needed a model folder: give the one that it lies in, {folder.parent}"
        raise ModelFolderError(f"{folder} is a file; {needed}")
    if not folder.is_dir():
        raise fault(f"there is no model folder {folder}")
    path, trie = folder / DESCRIPTION, folder / TRIE
    if trie.is_symlink() and not trie.exists():
        raise fault(f"{trie} is a link to {trie.readlink()}, which is not there", _LINKED)
    for name in (DESCRIPTION, TRIE, LEXICON):
        if not (folder / name).is_file():
            raise fault(f"{folder} is no model folder, {name} is missing in it")
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise fault(f"{path} cannot be read ({error})") from error
    if not isinstance(description, dict):
        raise fault(f"{path} holds a {type(description).__name__}; needed an object")
    found = description.get("format")
    if found != FORMAT:
        raise fault(f"{folder} has format {found}; this version reads {FORMAT}")
    for name in ("order", "words", "pronunciations"):
        if not isinstance(value := description.get(name), int):
            raise fault(f"{path} has the {name} {value!r}; needed a whole number")
    size = trie.stat().st_size
    wanted = description.get("bytes", size)  # absent in older folders
    if size != wanted:
        text = f"{trie} has {size} bytes, but lm.json says {wanted}: it is damaged, cut short or"
        raise fault(f"{text} another model's", _REMEDY)
    stored = description.get("crc32")
    if stored is not None and checksum(trie) != stored:
        text = (
            f"{trie} is not the file whose checksum lm.json has: it is damaged or another model's"
        )
        raise fault(text, _REMEDY)
    return description


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file, read in pieces."""
    found = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found = zlib.crc32(piece, found)
    return found


@dataclass(frozen=True)
class Spellings:
    """Contents of `lexicon.txt`.

    Attributes:
      words: the vocabulary, likelier words first.
      homophones: indices of the words, likelier ones first, by pronunciation. A pronunciation is
        the phonemes' classes in the language model's order, one byte each.
    """

    words: list[str]
    homophones: dict[bytes, list[int]]


def read_spellings(folder: Path, description: Mapping[str, object]) -> Spellings:
    """Read `lexicon.txt` and check it against `description`.

    Raises:
      ModelFolderError: a line is malformed, or lines are missing.
    """
    path = folder / LEXICON
    words: list[str] = []
    known: set[str] = set()
    homophones: dict[bytes, list[int]] = defaultdict(list)
    count = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for count, line in enumerate(lines, 1):
                word, *phones = line.split() or [""]
                try:
                    spelling = bytes([_CLASS[phone] for phone in phones])
                except KeyError:
                    spelling = b""
                if not spelling:
                    raise ModelFolderError(
                        f"{path}, line {count}, is {line.rstrip()!r}; needed a word and its "
                        f"phonemes: {_REMEDY}"
                    )
                if not words or words[-1] != word:
                    if word in known:
                        raise ModelFolderError(
                            f"{path}, line {count}, has the word {word!r} for a second time; "
                            f"needed all its pronunciations together: {_REMEDY}"
                        )
                    known.add(word)
                    words.append(word)
                homophones[spelling].append(len(words) - 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} cannot be read ({error}): {_REMEDY}") from error
    for name, found in (("words", len(words)), ("pronunciations", count)):
        if found != description[name]:
            raise ModelFolderError(
                f"{path} has {found} {name}, but lm.json says {description[name]}: it is damaged "
                f"or cut short: {_REMEDY}"
            )
    return Spellings(words, homophones)


def find_words(
    folder: Path, wanted: Collection[str]
) -> dict[str, tuple[int, tuple[Pronunciation, ...]]]:
    """Return index and pronunciations of the wanted words that `lexicon.txt` has.

    Raises:
      ModelFolderError: the file can no longer be read.
    """
    found: dict[str, tuple[int, tuple[Pronunciation, ...]]] = {}
    if not wanted:
        return found
    path = folder / LEXICON
    before, index = None, -1
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                word, _, phones = line.partition(" ")
                if word != before:
                    before, index = word, index + 1
                if word in wanted:
                    said = found.get(word, (index, ()))[1]
                    found[word] = (index, (*said, tuple(phones.split())))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} cannot be read ({error}): {_REMEDY}") from error
    return found
