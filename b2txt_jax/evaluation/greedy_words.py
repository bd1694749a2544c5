"""Words without a language model: greedy phonemes, split at silences, looked up one by one.

Each group of phonemes is looked up exactly in the CMU dictionary. The rate shows what the language
model adds: there is no search, and neighbouring words do not matter. A group without an entry stays
a placeholder, which counts as one wrong word. Of words with equal pronunciations, the one wins
whose first pronunciation it is, then the more common one in the package's training sentences ("you"
before "yu"), then the shorter spelling, then the alphabetic order.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable

from b2txt_jax.phonemes import BLANK_ID, SILENCE_ID, pronunciations
from b2txt_jax.simulation.corpus import load_pool
from lm_server.lexicon.text_rules import scored_words
from lm_server.protocol import CLASSES

# Normalisation would change entries such as "a.m." to something that no reference contains. Of the
# names of letters ("r" sounds like "are"), only two are words.
_WORD = re.compile(r"[ai]|[a-z]+(?:['-]?[a-z]+)+")


@functools.cache
def words_by_pronunciation() -> dict[tuple[str, ...], str]:
    """Return ARPAbet phonemes without stress -> the word that stands for them."""
    common = Counter(word for text, _ in load_pool("train") for word in scored_words(text))
    best: dict[tuple[str, ...], tuple[int, int, int, str]] = {}
    for word, entries in pronunciations().items():
        if not _WORD.fullmatch(word):
            continue
        for rank, phones in enumerate(entries):
            candidate = (rank, -common[word], len(word), word)
            if phones not in best or candidate < best[phones]:
                best[phones] = candidate
    return {phones: found[-1] for phones, found in best.items()}


def greedy_words(ids: Iterable[int]) -> tuple[str, ...]:
    """Return the words of decoded class ids (no blanks).

    An unmatched group becomes `<HH-AH-L>`. In capitals, it equals no scored word.

    Raises:
      ValueError: a blank or an id outside the 41 classes is among the ids.
    """
    lookup = words_by_pronunciation()
    words: list[str] = []
    group: list[str] = []
    for value in (*ids, SILENCE_ID):  # A last word needs no silence after it.
        index = int(value)
        if not BLANK_ID < index <= SILENCE_ID:
            raise ValueError(
                f"class id {index} is no phoneme and no silence; needed 1-{SILENCE_ID}: "
                "decode greedily first"
            )
        if index != SILENCE_ID:
            group.append(CLASSES[index])
        elif group:
            words.append(lookup.get(tuple(group), f"<{'-'.join(group)}>"))
            group = []
    return tuple(words)
