"""Logits like those of a trained CTC model, for sentences outside the language model's text.

A phoneme is a segment of 2-5 frames. Its middle frames have evidence for the phoneme and for
similarly articulated ones, the others for the blank. Noise causes confusions, deletions and
insertions. The logits do not depend on words. Real logits need their own settings (acoustic_scale,
blank_penalty).
"""

from __future__ import annotations

import itertools
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein

from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.lexicon.text import normalise
from lm_server.protocol import CLASS_COUNT, LM_CLASSES, SILENCE

CORPUS = Path(__file__).parents[1] / "b2txt_jax" / "simulation" / "corpus"
_IDS = {name: index for index, name in enumerate(LM_CLASSES)}
_ALIKE = (
    "P B M",
    "T D N",
    "K G NG",
    "F V TH DH",
    "S Z SH ZH CH JH",
    "L R ER",
    "W UW UH OW",
    "Y IY IH",
    "EH AE EY IH",
    "AA AO AH AW",
    "AY OY EY",
    "AH UH IH EH",
    "HH F TH",
)
"""Phonemes that differ in one feature of articulation and are confused with each other."""


def label(
    words: Sequence[str],
    lexicon: Mapping[str, tuple[tuple[str, ...], ...]],
    dropped: float = 0.0,
    rng: np.random.Generator | None = None,
) -> list[int]:
    """Return the class ids of words in the language model's order, with a silence after each word.

    The share `dropped` of the silences is left out.
    """
    ids = []
    for word in words:
        ids += [_IDS[phone] for phone in lexicon[word][0]]
        if rng is None or rng.random() >= dropped:
            ids.append(_IDS[SILENCE])
    return ids


def similarity() -> np.ndarray:
    """Return [41, 41]: 1 on the diagonal, 0.6 for phonemes articulated alike, 0 otherwise."""
    alike = np.eye(CLASS_COUNT)
    for group in _ALIKE:
        for one, other in itertools.permutations([_IDS[p] for p in group.split()], 2):
            alike[one, other] = 0.6
    return alike


def simulate(ids: Sequence[int], strength: float, rng: np.random.Generator) -> np.ndarray:
    """Simulate logits [frames, 41] in the language model's order. `strength` is in ln per frame."""
    alike = similarity()
    frames = [np.zeros((2, CLASS_COUNT))]
    frames[0][:, 0] = 6.0
    for one in ids:
        length = int(rng.integers(2, 6))
        segment = np.zeros((length, CLASS_COUNT))
        segment[:, 0] = 6.0
        middle = slice((length - 1) // 2, length // 2 + 1)
        evidence = strength * alike[one] + rng.normal(0.0, 1.7, CLASS_COUNT)
        segment[middle] += evidence
        segment[middle, 0] = 0.55 * strength + rng.normal(0.0, 1.7)
        frames.append(segment)
    logits = np.concatenate(frames) + rng.normal(0.0, 0.5, (sum(map(len, frames)), CLASS_COUNT))
    return logits.astype(np.float32)


def greedy(logits: np.ndarray) -> list[int]:
    """Return the best class per frame, without repeats and blanks."""
    best = logits.argmax(axis=1)
    return [int(c) for c, before in zip(best, [0, *best[:-1]], strict=True) if c not in (0, before)]


def simulate_at(
    labels: Sequence[Sequence[int]], per: float, seed: int
) -> tuple[list[np.ndarray], float]:
    """Simulate logits with a phoneme error rate of greedy decoding near `per`.

    Return the logits of every label, and the rate reached.
    """
    low, high = 1.0, 30.0
    for _ in range(12):
        strength = (low + high) / 2
        rng = np.random.default_rng(seed)
        logits = [simulate(ids, strength, rng) for ids in labels]
        errors = sum(
            Levenshtein.distance(greedy(x), list(ids))
            for x, ids in zip(logits, labels, strict=True)
        )
        reached = errors / sum(map(len, labels))
        low, high = (strength, high) if reached > per else (low, strength)
    return logits, reached


def held_out(count: int, seed: int, name: str) -> list[tuple[str, ...]]:
    """Return sentences of the package's pool `name` whose words are all in the dictionary."""
    known = read_lexicon("cmudict").entries
    lines = lzma.decompress((CORPUS / f"{name}.txt.xz").read_bytes()).decode().splitlines()
    found = []
    for line in np.random.default_rng(seed).permutation(lines):
        words = normalise(str(line).split("\t", 1)[1], known)
        if not isinstance(words, str) and all(word in known for word in words):
            found.append(words)
        if len(found) == count:
            break
    return found
