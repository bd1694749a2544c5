"""Words that one client wants recognised, such as names: how likely, and how they are said."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lm_server.errors import UserError
from lm_server.lexicon.pronunciations import LexiconError, Pronunciation
from lm_server.protocol import PHONEMES, ProtocolError, decode_hot_words

MAX_HOT_WORDS = 500
"""Hot words of one search."""
MAX_WEIGHT = 50.0
"""Greatest weight of a hot word (ln)."""
_MAX_PHONEMES = 60


class HotWordError(UserError, ValueError):
    """A hot word that cannot be used; says what was found and what was needed."""


@dataclass(frozen=True)
class HotWord:
    """How much a word is wanted.

    Attributes:
      weight: added to the sentence's total for every time that the word is in it (ln), above 0.
      pronunciations: how it is said; empty: as the model's lexicon says, or else as
        `lm_server.lexicon.g2p.pronounce` guesses.
    """

    weight: float
    pronunciations: tuple[Pronunciation, ...] = ()


def parse_hot_words(text: str | bytes) -> dict[str, HotWord]:
    """JSON {word: weight, or {weight, pronunciations}} -> hot words.

    Raises:
      ProtocolError: it is not JSON of that form.
    """
    entries = decode_hot_words(text)
    return {word: HotWord(one.weight, one.pronunciations) for word, one in entries.items()}


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds --hot-words."""
    parser.add_argument(
        "--hot-words",
        type=Path,
        metavar="FILE",
        help='words to favour, such as names, as JSON: {"WORD": WEIGHT} or {"WORD": {"weight": W, '
        '"pronunciations": [["K", "AE", "T"]]}}; weights are added to a sentence\'s score (ln)',
    )


def from_options(args: argparse.Namespace) -> dict[str, HotWord]:
    """The hot words of --hot-words; none without it. The search checks what they are.

    Raises:
      HotWordError: the file cannot be read or is not as needed.
    """
    if args.hot_words is None:
        return {}
    try:
        return parse_hot_words(args.hot_words.read_bytes())
    except (OSError, ProtocolError) as error:
        raise HotWordError(f"--hot-words {args.hot_words}: {error}") from error


def check_hot_words(
    hot_words: Mapping[str, HotWord], lexicon: Mapping[str, tuple[Pronunciation, ...]]
) -> dict[str, HotWord]:
    """Hot words with all their pronunciations.

    Args:
      hot_words: words as a client gave them; letters become lower case.
      lexicon: how the model's words are said; only hot words are looked up.

    Raises:
      HotWordError: a word, a weight or a pronunciation cannot be used, or there are too many.
    """
    if len(hot_words) > MAX_HOT_WORDS:
        raise HotWordError(
            f"there are {len(hot_words)} hot words; at most {MAX_HOT_WORDS} are possible: put "
            "lasting ones into the model with `lm-server build --lexicon`"
        )
    checked = {}
    for given, hot in hot_words.items():
        word = given.lower()
        if not word or any(sign.isspace() or sign == ";" for sign in word):
            raise HotWordError(
                f"the hot word {word!r} is no single word: needed one without spaces or semicolons"
            )
        if not 0 < hot.weight <= MAX_WEIGHT or not math.isfinite(hot.weight):
            raise HotWordError(
                f"the hot word {word!r} has the weight {hot.weight}; needed a number above 0, at "
                f"most {MAX_WEIGHT:g} (ln)"
            )
        checked[word] = HotWord(hot.weight, hot.pronunciations or _said(word, lexicon))
        for phones in checked[word].pronunciations:
            unknown = [phone for phone in phones if phone not in PHONEMES]
            if unknown or not 0 < len(phones) <= _MAX_PHONEMES:
                raise HotWordError(
                    f"the hot word {word!r} is said {' '.join(phones)!r}; needed 1-{_MAX_PHONEMES} "
                    f"phonemes of {' '.join(PHONEMES)}"
                )
    return checked


def _said(word: str, lexicon: Mapping[str, tuple[Pronunciation, ...]]) -> tuple[Pronunciation, ...]:
    # Here, because it needs KenLM, which a command's --help must do without.
    from lm_server.lexicon.g2p import pronounce

    if word in lexicon:
        return lexicon[word]
    try:
        return pronounce(word)
    except LexiconError as error:
        raise HotWordError(
            f"the hot word {word!r} is not in the model's lexicon, and how it is said cannot be "
            f"guessed ({error}): give its pronunciation"
        ) from error
