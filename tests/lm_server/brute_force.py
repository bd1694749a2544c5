"""A decoder that lists every path: slow, plain, and sharing no code with the searches.

Scoring, as docs/search.md defines it: in every frame a path has one class. Repeats and blanks
removed, it must spell words, each followed by at least one silence; the last may lack its own.
acoustic = sum over frames of ln softmax, less ln(blank_penalty) for a blank; a silence scores at
least what the blank does less silence_penalty / acoustic_scale, and what the likeliest class does
less thrice that. total = acoustic_scale * acoustic + ngram + bonus.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from lm_server.protocol import LM_CLASSES, SILENCE
from lm_server.settings import Settings

BLANK, SIL = 0, LM_CLASSES.index(SILENCE)
PHONES = ("AH", "T", "Z")
USED = (BLANK, SIL, *(LM_CLASSES.index(name) for name in PHONES))

Lexicon = Mapping[str, Sequence[tuple[str, ...]]]


@dataclass(frozen=True)
class Candidate:
    words: tuple[str, ...]
    acoustic: float
    ngram: float
    bonus: float
    total: float


def log_probabilities(logits: np.ndarray, settings: Settings) -> list[list[float]]:
    """[frames][41], ln, with both penalties, without the acoustic scale."""
    rows = []
    for frame in logits.astype(float).tolist():
        top = max(frame)
        norm = top + math.log(math.fsum(math.exp(value - top) for value in frame))
        row = [value - norm for value in frame]
        row[BLANK] -= math.log(settings.blank_penalty)
        penalty = settings.silence_penalty / settings.acoustic_scale
        row[SIL] = max(row[SIL], row[BLANK] - penalty, max(row) - 3 * penalty)
        rows.append(row)
    return rows


def decode(
    logits: np.ndarray,
    lexicon: Lexicon,
    ngram: Callable[[Sequence[str]], float],
    settings: Settings,
    weights: Mapping[str, float] | None = None,
    add: bool = False,
) -> list[Candidate]:
    """Every sentence that a path over `USED` spells, best first.

    Args:
      logits: [frames, 41], few frames.
      lexicon: words and how they are said.
      ngram: ln probability of a sentence.
      settings: acoustic_scale, penalties, word_bonus; nothing is left out.
      weights: those of hot words.
      add: a sentence's acoustic score is of all its paths together, not of the best.
    """
    weights = weights or {}
    scores = log_probabilities(logits, settings)
    by_tokens: dict[tuple[int, ...], list[float]] = {}
    for path in itertools.product(USED, repeat=len(scores)):
        collapsed = [c for c, before in zip(path, (None, *path), strict=False) if c != before]
        tokens = tuple(c for c in collapsed if c != BLANK)
        score = math.fsum(row[c] for row, c in zip(scores, path, strict=True))
        by_tokens.setdefault(tokens, []).append(score)
    found: dict[tuple[str, ...], list[float]] = {}
    said = {
        tuple(LM_CLASSES.index(phone) for phone in phones): word
        for word, pronunciations in lexicon.items()
        for phones in pronunciations
    }
    homophones = {
        spelling: [
            word
            for word, pronunciations in lexicon.items()
            if spelling in {tuple(LM_CLASSES.index(p) for p in phones) for phones in pronunciations}
        ]
        for spelling in said
    }
    for tokens, paths in by_tokens.items():
        pieces = [tuple(run) for quiet, run in itertools.groupby(tokens, SIL.__eq__) if not quiet]
        for words in itertools.product(*(homophones.get(piece, []) for piece in pieces)):
            found.setdefault(words, []).extend(paths)
    scale = settings.acoustic_scale
    candidates = []
    for words, paths in found.items():
        acoustic = max(paths)
        if add:
            # The scale belongs to the paths: a search adds up what it has scaled.
            acoustic += math.log(math.fsum(math.exp(scale * (p - acoustic)) for p in paths)) / scale
        bonus = settings.word_bonus * len(words) + sum(weights.get(word, 0.0) for word in words)
        total = scale * acoustic + ngram(words) + bonus
        candidates.append(Candidate(words, acoustic, ngram(words), bonus, total))
    return sorted(candidates, key=lambda one: (-round(one.total, 6), one.words))


@dataclass(frozen=True)
class Problem:
    """A lexicon, a bigram model and logits, small enough for `decode`."""

    lexicon: dict[str, tuple[tuple[str, ...], ...]]
    unigrams: dict[str, float]
    backoffs: dict[str, float]
    bigrams: dict[tuple[str, str], float]
    logits: np.ndarray

    def ngram(self, words: Sequence[str]) -> float:
        """ln probability of a sentence, its end included."""
        total = 0.0
        for one, two in itertools.pairwise(["<s>", *words, "</s>"]):
            # A word that the model lacks is <unk>, which has no bigrams and no back-off.
            known = two if two in self.unigrams else "<unk>"
            direct = self.bigrams.get((one, two))
            total += (
                self.backoffs.get(one, 0.0) + self.unigrams[known] if direct is None else direct
            )
        return total * math.log(10)

    def arpa(self) -> str:
        """The bigram model as text."""
        lines = ["\\data\\", f"ngram 1={len(self.unigrams)}", f"ngram 2={len(self.bigrams)}"]
        lines += ["", "\\1-grams:"]
        for word, log10 in self.unigrams.items():
            lines.append(f"{log10!r}\t{word}\t{self.backoffs.get(word, 0.0)!r}")
        lines += ["", "\\2-grams:"]
        lines += [f"{log10!r}\t{' '.join(pair)}" for pair, log10 in self.bigrams.items()]
        return "\n".join([*lines, "", "\\end\\", ""])

    def write(self, folder: Path) -> Path:
        """The problem's model folder."""
        folder.mkdir(parents=True, exist_ok=True)
        # KenLM reads this text as well as its own binary format.
        (folder / "lm.bin").write_text(self.arpa())
        ordered = sorted(self.lexicon, key=lambda word: -self.unigrams[word])
        lines = [f"{word} {' '.join(said)}\n" for word in ordered for said in self.lexicon[word]]
        (folder / "lexicon.txt").write_text("".join(lines))
        description = {
            "format": 1,
            "order": 2,
            "words": len(self.lexicon),
            "pronunciations": len(lines),
        }
        (folder / "lm.json").write_text(json.dumps(description))
        return folder


@st.composite
def problems(draw: st.DrawFn, frames: int = 6) -> Problem:
    """Two to four words of one to three phonemes, some alike, with a random bigram model."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    names = ["ann", "bo", "cat", "dee"][: draw(st.integers(2, 4))]
    phones = st.lists(st.sampled_from(PHONES), min_size=1, max_size=3).map(tuple)
    lexicon = {
        name: tuple(draw(st.lists(phones, min_size=1, max_size=2, unique=True))) for name in names
    }

    def log10(least: float, greatest: float) -> float:
        # As float32, so that the files hold exactly what the reference adds.
        return float(np.float32(rng.uniform(least, greatest)))

    unigrams = {"<unk>": log10(-3, -2), "<s>": -99.0, "</s>": log10(-2, -0.5)}
    unigrams |= {name: log10(-2, -0.5) for name in names}
    backoffs = {name: log10(-0.6, -0.05) for name in ["<s>", *names]}
    possible = list(itertools.product(["<s>", *names], [*names, "</s>"]))
    chosen = rng.permutation(len(possible))[: draw(st.integers(1, 6))]
    bigrams = {possible[index]: log10(-1.5, -0.1) for index in chosen}
    count = draw(st.integers(1, frames))
    logits = np.full((count, len(LM_CLASSES)), -300.0, np.float32)
    logits[:, USED] = rng.normal(0.0, 3.0, (count, len(USED)))
    return Problem(lexicon, unigrams, backoffs, bigrams, logits)
