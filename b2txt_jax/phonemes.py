"""The 41 classes, and words to class ids by their CMU pronunciations.

A sentence's label is its words' phonemes (ARPAbet without stress), with a silence after every word,
the last one included (NEJM reference). Class ids are in the RNN's order: 0 blank, 1-39 phonemes,
40 silence.
"""

from __future__ import annotations

import functools
import importlib.resources
import lzma
from collections.abc import Iterable, Sequence

import numpy as np

from lm_server.protocol import CLASS_COUNT, CLASSES, PHONEMES

BLANK_ID = 0
SILENCE_ID = CLASS_COUNT - 1
PHONEME_IDS: dict[str, int] = {name: 1 + index for index, name in enumerate(PHONEMES)}


@functools.cache
def pronunciations() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Return the CMU dictionary: lower-case word -> pronunciations (ARPAbet without stress).

    The preferred pronunciation comes first.
    """
    # A data file of the server's package: reading it imports none of the server's code.
    resource = importlib.resources.files("lm_server.lexicon") / "resources" / "cmudict.txt.xz"
    found: dict[str, list[tuple[str, ...]]] = {}
    for line in lzma.decompress(resource.read_bytes()).decode().splitlines():
        word, *phones = line.split()
        found.setdefault(word, []).append(tuple(phones))
    return {word: tuple(entries) for word, entries in found.items()}


def sentence_to_ids(words: Sequence[str]) -> np.ndarray:
    """Return the label of lower-case words, int32 [L].

    It is each word's first CMU pronunciation, with a silence after each word.

    Raises:
      ValueError: a word is not in the CMU dictionary.
    """
    dictionary = pronunciations()
    ids: list[int] = []
    for word in words:
        if word not in dictionary:
            raise ValueError(
                f"the word {word!r} is not in the CMU dictionary; spell it otherwise or leave the "
                f"sentence out"
            )
        ids += [PHONEME_IDS[phone] for phone in dictionary[word][0]]
        ids.append(SILENCE_ID)
    return np.array(ids, np.int32)


def ids_to_text(ids: Iterable[int]) -> str:
    """Return class ids as readable phonemes.

    >>> ids_to_text([16, 3, 21, 25, 40])
    'HH AH L OW |'
    """
    return " ".join(CLASSES[int(i)].strip() for i in ids)
