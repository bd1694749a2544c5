"""Words that one client wants recognised, such as names: their weights and pronunciations."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lm_server.errors import UserError
from lm_server.lexicon.pronunciations import LexiconError, Pronunciation
from lm_server.lexicon.text import fold
from lm_server.lm.reader import find_words
from lm_server.protocol import PHONEMES, decode_hot_words
from lm_server.search.sliced import Sliced

MAX_HOT_WORDS = 500
"""Hot words of one search."""
MAX_WEIGHT = 50.0
"""Greatest weight of a hot word (ln)."""
_MAX_PHONEMES = 60
_MAX_LETTERS = 100
_MAX_PRONUNCIATIONS = 2000
"""Pronunciations of all hot words of one search together."""


class HotWordError(UserError, ValueError):
    """A hot word that cannot be used."""


@dataclass(frozen=True)
class HotWord:
    """How much a word is favoured.

    Attributes:
      weight: added to a sentence's total for every occurrence (ln), above 0.
      pronunciations: its pronunciations. If empty, those of the model's lexicon, else the guesses
        of `lm_server.lexicon.g2p.pronounce`.
    """

    weight: float
    pronunciations: tuple[Pronunciation, ...] = ()


def parse_hot_words(text: str | bytes) -> dict[str, HotWord]:
    """Parse JSON {word: weight, or {weight, pronunciations}}.

    Raises:
      ProtocolError: it is not JSON of that form.
    """
    entries = decode_hot_words(text)
    return {word: HotWord(one.weight, one.pronunciations) for word, one in entries.items()}


def check_hot_words(
    folder: Path, hot_words: Mapping[str, HotWord]
) -> tuple[dict[str, HotWord], dict[str, int]]:
    """Return hot words as the lexicon writes them, with all their pronunciations, and the
    vocabulary's indices.

    Args:
      folder: the model folder, whose lexicon pronounces the words that it has.
      hot_words: words as a client sent them.

    Returns:
      The hot words, and the index of each that the lexicon has.

    Raises:
      HotWordError: a word, a weight or a pronunciation cannot be used, or there are too many.
      ModelFolderError: the folder's lexicon cannot be read any more.
    """
    if len(hot_words) > MAX_HOT_WORDS:
        raise HotWordError(
            f"there are {len(hot_words)} hot words; at most {MAX_HOT_WORDS} are possible: put "
            "lasting ones into the model with `lm-server build --lexicon`"
        )
    total = sum(len(one.pronunciations) for one in hot_words.values())
    if total > _MAX_PRONUNCIATIONS:
        raise HotWordError(
            f"the hot words have {total} pronunciations; at most {_MAX_PRONUNCIATIONS} are "
            "possible: send fewer"
        )
    known = find_words(folder, {fold(word) for word in hot_words})
    checked: dict[str, HotWord] = {}
    for given, hot in hot_words.items():
        word = fold(given)
        if word in checked:
            raise HotWordError(
                f"the hot word {word!r} is given twice, as {given!r} too: leave one out"
            )
        # What is not printable (half a surrogate pair, a control character) cannot be sent or shown
        # in an answer.
        signs = word.isprintable() and not set(word) & set(" ;<>")
        if not signs or not 0 < len(word) <= _MAX_LETTERS:
            raise HotWordError(
                f"the hot word {word[:_MAX_LETTERS]!r} is no single word: needed 1 to "
                f"{_MAX_LETTERS} printable characters without spaces, semicolons or <>"
            )
        if not 0 < hot.weight <= MAX_WEIGHT or not math.isfinite(hot.weight):
            raise HotWordError(
                f"the hot word {word!r} has the weight {hot.weight}; needed a number above 0, at "
                f"most {MAX_WEIGHT:g} (ln)"
            )
        said = hot.pronunciations or (known[word][1] if word in known else _guessed(word))
        # Without stress, which lexicons mark (`EY1`).
        said = tuple(dict.fromkeys(tuple(p.rstrip("012") for p in phones) for phones in said))
        for phones in said:
            if set(phones) - set(PHONEMES) or not 0 < len(phones) <= _MAX_PHONEMES:
                raise HotWordError(
                    f"the hot word {word!r} is said {' '.join(phones)!r}; needed 1-{_MAX_PHONEMES} "
                    f"phonemes of {' '.join(PHONEMES)}"
                )
        checked[word] = HotWord(hot.weight, said)
    return checked, {word: index for word, (index, _) in known.items()}


def guess_ahead(hot_words: Mapping[str, HotWord]) -> Sliced[None]:
    """Guess what `check_hot_words` may need. Yield between words, of which each takes 20 ms."""
    wanted = [fold(word) for word, hot in hot_words.items() if not hot.pronunciations]
    for number, word in enumerate(wanted[:MAX_HOT_WORDS]):
        if number:
            yield
        with contextlib.suppress(HotWordError):  # The lexicon may have it.
            _guessed(word)


@functools.lru_cache(maxsize=4 * MAX_HOT_WORDS)
def _guessed(word: str) -> tuple[Pronunciation, ...]:
    # Imported late: it needs KenLM, which `--help` must not.
    from lm_server.lexicon.g2p import pronounce

    try:
        return pronounce(word)
    except LexiconError as error:
        raise HotWordError(
            f"the hot word {word!r} is not in the model's lexicon, and its pronunciation cannot be "
            f"guessed ({error}): add a pronunciation"
        ) from error
