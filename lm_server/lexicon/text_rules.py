"""Sentences as they are scored: the normalisation of the published NEJM evaluation.

Both the true and the decoded sentence go through `normalise` before words are counted, so that a
word error rate of ours can stand beside a published one.
"""

from __future__ import annotations

import re

_DROPPED = re.compile(r"[^a-zA-Z\- ']")
# The order matters and is the published one: a dash pair before a space loses its second dash to
# the first rule, so that "a -- b" keeps one dash as a word of its own. Sentences of the copy task
# hold none; exactness keeps rates equal.
_REPLACEMENTS = (("- ", " "), ("--", ""), (" '", "'"))


def normalise(sentence: str) -> str:
    """Keep letters, hyphen, space and apostrophe, lower case, tidy dashes, single spaces.

    Characters outside ASCII, digits, tabs and line ends are removed without a space in their place.
    """
    text = _DROPPED.sub("", sentence)
    for found, replacement in _REPLACEMENTS:
        text = text.replace(found, replacement)
    return " ".join(text.lower().split())


def scored_words(sentence: str) -> tuple[str, ...]:
    """The words that are counted: the normalised sentence split at spaces."""
    return tuple(normalise(sentence).split())
