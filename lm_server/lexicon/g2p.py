"""Guessed pronunciations of words outside the lexicon, from a joint n-gram model of letters and
phonemes.

The model is trained on the CMU dictionary (`g2p_training`, `scripts/make_g2p.py`). `lm.json` counts
the words of a model whose pronunciations are guessed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import kenlm

from lm_server.lexicon.pronunciations import LexiconError, Pronunciation, is_word

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
_BEAM = 24
"""Partial pronunciations kept after each letter."""
_LONGEST = 60
"""Letters of the longest word that is accepted."""
_VARIANTS = 2
"""Guessed pronunciations of a word of a model."""


def graphone(letter: str, said: Sequence[str]) -> str:
    """Return the model's word for a letter and its phonemes: `x:K_S`, `e:`."""
    return f"{letter}:{'_'.join(said)}"


@dataclass(frozen=True)
class _Model:
    ngrams: kenlm.Model
    units: Mapping[str, tuple[tuple[str, Pronunciation], ...]]
    """Per letter, its graphones with their phonemes."""


def read_model(path: Path) -> _Model:
    """Read a model written by `g2p_training.train`."""
    units = defaultdict(list)
    for unit in path.with_suffix(".txt").read_text().split():
        letter, _, said = unit.partition(":")
        units[letter].append((unit, tuple(said.split("_")) if said else ()))
    return _Model(kenlm.Model(str(path)), {one: tuple(said) for one, said in units.items()})


@functools.cache
def _shipped() -> _Model:
    folder = importlib.resources.files("lm_server.lexicon") / "resources"
    with contextlib.ExitStack() as stack:
        stack.enter_context(importlib.resources.as_file(folder / "g2p.txt"))
        return read_model(stack.enter_context(importlib.resources.as_file(folder / "g2p.bin")))


def pronounce(word: str, limit: int = 3, model: _Model | None = None) -> tuple[Pronunciation, ...]:
    """Return the likeliest pronunciations of a word, best first.

    Args:
      word: lower-case letters, apostrophes and hyphens. The parts around hyphens are pronounced
        separately.
      limit: largest number of pronunciations returned.
      model: by default that of the package.

    Raises:
      LexiconError: the word has other characters, has no letter, or is too long.
    """
    if not is_word(word) or len(word) > _LONGEST:
        raise LexiconError(
            f"cannot guess the pronunciation of {word[:_LONGEST]!r}; needed a word of at most "
            f"{_LONGEST} letters a-z, apostrophes and hyphens: give its pronunciation"
        )
    model = model or _shipped()
    parts = [part for part in word.split("-") if part.strip("'")]
    together: list[tuple[float, Pronunciation]] = [(0.0, ())]
    for part in parts:
        # The best of a part each time: all combinations of many parts would be too many.
        both = itertools.product(together, _say(part, limit, model))
        joined = ((one[0] + other[0], one[1] + other[1]) for one, other in both)
        together = sorted(joined, key=lambda one: -one[0])[: 4 * limit]
    return tuple(dict.fromkeys(phones for _, phones in together))[:limit]


def guess_pronunciations(word: str) -> tuple[Pronunciation, ...]:
    """Return the pronunciations under which a model gets a word, or none if none can be guessed."""
    try:
        return pronounce(word, _VARIANTS)
    except LexiconError:
        return ()


def _say(word: str, limit: int, model: _Model) -> list[tuple[float, Pronunciation]]:
    """Return (log10 probability, pronunciation) of a word without hyphens, best first."""
    start = kenlm.State()
    model.ngrams.BeginSentenceWrite(start)
    hypotheses: list[tuple[float, Pronunciation, kenlm.State]] = [(0.0, (), start)]
    for letter in word:
        found: dict[tuple[Pronunciation, kenlm.State], float] = {}
        for score, phones, state in hypotheses:
            for unit, said in model.units[letter]:
                following = kenlm.State()
                total = score + model.ngrams.BaseScore(state, unit, following)
                key = (phones + said, following)
                if total > found.get(key, -float("inf")):
                    found[key] = total
        best = sorted(found.items(), key=lambda item: -item[1])[:_BEAM]
        hypotheses = [(score, phones, state) for (phones, state), score in best]
    ended: dict[Pronunciation, float] = {}
    for score, phones, state in hypotheses:
        total = score + model.ngrams.BaseScore(state, "</s>", kenlm.State())
        if phones and total > ended.get(phones, -float("inf")):
            ended[phones] = total
    if not ended:
        raise LexiconError(f"cannot guess the pronunciation of {word!r}: give its pronunciation")
    return sorted(((score, phones) for phones, score in ended.items()), reverse=True)[:limit]
