"""Trains the model of `g2p` on a pronouncing dictionary.

Each letter is aligned with zero, one or two phonemes, by expectation maximisation over all
alignments of every word. A letter with its phonemes is a graphone. The words are sequences of
graphones, on which an n-gram model is estimated. Source: M. Bisani and H. Ney, "Joint-Sequence
Models for Grapheme-to-Phoneme Conversion" (2008), with graphones of exactly one letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein

from lm_server.lexicon.g2p import LETTERS, graphone
from lm_server.lexicon.pronunciations import Pronunciation
from lm_server.lm.estimate import kneser_ney, pruning
from lm_server.lm.sorted_ngrams import BEGIN, END, UNKNOWN, in_order_of_ids
from lm_server.lm.trie.kenlm_binary import TrieForm, write_trie
from lm_server.protocol import PHONEMES

_MOST = 2
"""Largest number of phonemes of a letter."""
_LEAST_WORDS = 3
"""A graphone of fewer words than this is an error of the alignment or of the dictionary."""
_FORM = TrieForm(8, compressed=True)
_MEMORY = 1 << 30

Entry = tuple[str, Pronunciation]
Aligned = tuple[Pronunciation, ...]
"""The phonemes of each letter of a word."""


@dataclass(frozen=True)
class _Batch:
    """Words with equal numbers of letters and equal numbers of phonemes, as numbers."""

    entries: Sequence[Entry]
    letters: np.ndarray
    phones: np.ndarray


def align(
    entries: Iterable[Entry], rounds: int = 8, progress: Callable[[int], None] = lambda done: None
) -> list[tuple[str, Aligned]]:
    """Return the likeliest alignment of every word that has one.

    Args:
      entries: words of `LETTERS` with a pronunciation.
      rounds: rounds of expectation maximisation.
      progress: called with 1 after each round.
    """
    batches = _batches(entries)
    if not batches:
        return []
    tables = [np.full((len(LETTERS), *(len(PHONEMES),) * said), 1.0) for said in range(_MOST + 1)]
    # Begin with equal probabilities of each number of phonemes, and of each phoneme.
    tables = [table / table.size for table in tables]
    for _ in range(rounds):
        expected = [np.zeros_like(table) for table in tables]
        for batch in batches:
            _expect(batch, tables, expected)
        total = sum(float(table.sum()) for table in expected)
        tables = [table / total for table in expected]
        progress(1)
    return [one for batch in batches for one in _best(batch, tables)]


def _batches(entries: Iterable[Entry]) -> list[_Batch]:
    by_size: dict[tuple[int, int], list[Entry]] = {}
    for word, said in entries:
        if said and len(said) <= _MOST * len(word) and set(word) <= set(LETTERS):
            by_size.setdefault((len(word), len(said)), []).append((word, said))
    letter = {name: number for number, name in enumerate(LETTERS)}
    phone = {name: number for number, name in enumerate(PHONEMES)}
    return [
        _Batch(
            group,
            np.array([[letter[one] for one in word] for word, _ in group]),
            np.array([[phone[one] for one in said] for _, said in group]),
        )
        for group in by_size.values()
    ]


def _steps(batch: _Batch, tables: Sequence[np.ndarray], place: int) -> list[np.ndarray]:
    """Return the probabilities that the letter at `place` has the next 0, 1 and 2 phonemes.

    Each is [words, phonemes + 1 - said], one per phoneme at which the letter may begin.
    """
    letters, phones = batch.letters[:, place, None], batch.phones
    silent = np.repeat(tables[0][letters], phones.shape[1] + 1, axis=1)
    return [silent, tables[1][letters, phones], tables[2][letters, phones[:, :-1], phones[:, 1:]]]


def _expect(batch: _Batch, tables: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    """Add the expected numbers of each letter with each of its phonemes to `expected`."""
    words, length = batch.letters.shape
    width = batch.phones.shape[1] + 1
    steps = [_steps(batch, tables, place) for place in range(length)]
    forward = np.zeros((length + 1, words, width))
    backward = np.zeros((length + 1, words, width))
    forward[0, :, 0] = backward[length, :, -1] = 1.0
    for place in range(length):
        for said, step in enumerate(steps[place]):
            if said < width:
                forward[place + 1, :, said:] += forward[place, :, : width - said] * step
    for place in reversed(range(length)):
        for said, step in enumerate(steps[place]):
            if said < width:
                backward[place, :, : width - said] += backward[place + 1, :, said:] * step
    total = forward[length, :, -1]
    possible = total > 0
    scale = np.where(possible, 1.0 / np.where(possible, total, 1.0), 0.0)[:, None]
    for place in range(length):
        letters, phones = batch.letters[:, place, None], batch.phones
        for said, step in enumerate(steps[place]):
            if said >= width:
                continue
            share = forward[place, :, : width - said] * step * backward[place + 1, :, said:] * scale
            if said == 0:
                np.add.at(expected[0], letters[:, 0], share.sum(axis=1))
            elif said == 1:
                np.add.at(expected[1], (letters, phones), share)
            else:
                np.add.at(expected[2], (letters, phones[:, :-1], phones[:, 1:]), share)


def _best(batch: _Batch, tables: Sequence[np.ndarray]) -> list[tuple[str, Aligned]]:
    words, length = batch.letters.shape
    width = batch.phones.shape[1] + 1
    best = np.zeros((words, width))
    best[:, 0] = 1.0
    chosen = np.zeros((length, words, width), np.int8)
    for place in range(length):
        following = np.zeros((words, width))
        for count, step in enumerate(_steps(batch, tables, place)):
            if count < width:
                found = best[:, : width - count] * step
                better = found > following[:, count:]
                following[:, count:] = np.where(better, found, following[:, count:])
                chosen[place, :, count:] = np.where(better, count, chosen[place, :, count:])
        best = following
    aligned = []
    for row in np.flatnonzero(best[:, -1] > 0):
        word, said = batch.entries[int(row)]
        end, parts = len(said), []
        for place in reversed(range(length)):
            start = end - int(chosen[place, row, end])
            parts.append(said[start:end])
            end = start
        aligned.append((word, tuple(reversed(parts))))
    return aligned


def train(
    entries: Iterable[Entry],
    out: Path,
    order: int,
    ngrams: int,
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, object]:
    """Train a model.

    Args:
      entries: words with a pronunciation. A word with several has several entries.
      out: KenLM file to write. The graphones are written beside it, with the suffix .txt.
      order: graphones of the longest n-gram, up to 6.
      ngrams: largest number of n-grams of order 2 and up.
      folder: for temporary files.
      progress: called with 1 after each round of the alignment.

    Returns:
      Figures of the model.
    """
    aligned = align(entries, progress=progress)
    sequences = [
        [graphone(letter, said) for letter, said in zip(word, parts, strict=True)]
        for word, parts in aligned
    ]
    frequency = Counter(one for sequence in sequences for one in sequence)
    sequences = [s for s in sequences if all(frequency[one] >= _LEAST_WORDS for one in s)]
    units = sorted({one for sequence in sequences for one in sequence})
    words = in_order_of_ids([UNKNOWN, BEGIN, END, *units])
    ids = {word: number for number, word in enumerate(words)}
    tokens = [ids[one] for sequence in sequences for one in [BEGIN, *sequence, END]]
    estimated = kneser_ney.estimate(np.array(tokens, np.int32), words, order, _MEMORY, folder)
    scored = pruning.score(estimated.model, estimated.followed)
    model = pruning.prune(scored, lambda counts: sum(counts[1:]) <= ngrams)
    write_trie(out, model, _FORM)
    out.with_suffix(".txt").write_text("".join(f"{one}\n" for one in units))
    return {"words": len(sequences), "graphones": len(units), "ngrams": model.counts}


def errors(
    said: Mapping[str, tuple[Pronunciation, ...]],
    truth: Mapping[str, tuple[Pronunciation, ...]],
) -> tuple[float, float]:
    """Return (share of wrong words, errors per phoneme) of the first of `said`.

    The reference is the nearest of the pronunciations in `truth`.
    """
    wrong = wrong_phones = phones = 0
    for word, variants in truth.items():
        guess = said[word][0] if said.get(word) else ()
        distance, length = min((Levenshtein.distance(guess, one), len(one)) for one in variants)
        wrong += distance > 0
        wrong_phones += distance
        phones += length
    return wrong / max(len(truth), 1), wrong_phones / max(phones, 1)
