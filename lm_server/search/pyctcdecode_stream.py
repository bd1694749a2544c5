"""pyctcdecode frame by frame, and what it asks of a language model.

pyctcdecode 0.5.0 can only decode a whole sentence (`decode_beams`), so a stream would be searched
anew with every chunk, and it prunes the classes of a frame by a threshold, not by their number.
`StreamingDecoder` therefore repeats the loop of `decode_beams` with beams that it keeps between
frames. It needs two private functions of that version, `_merge_beams` and `_get_lm_beams`, and the
layout of its beams: (text, next word, part of a word, last sign, frames, frames, acoustic score).
"""

from __future__ import annotations

import heapq
import importlib.metadata
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import kenlm
import numpy as np
from pyctcdecode.alphabet import Alphabet
from pyctcdecode.decoder import EMPTY_START_BEAM, NULL_FRAMES, BeamSearchDecoderCTC, _merge_beams
from pyctcdecode.language_model import AbstractLanguageModel, HotwordScorer

from lm_server.search.interface import BackendError

if TYPE_CHECKING:
    from lm_server.search.pyctcdecode import WordModel

VERSION = "0.5.0"
IMPOSSIBLE = -1e4
"""Score (ln) of a beginning or a spelling that no word has."""
_LOG10 = math.log(10.0)
_HISTORIES = 16
_NO_HOT_WORDS = HotwordScorer.build_scorer(None, 0.0)


def check_version() -> None:
    """Raise BackendError if another version than the one described above is installed."""
    found = importlib.metadata.version("pyctcdecode")
    if found != VERSION:
        raise BackendError(
            f"pyctcdecode {found} is installed, but this search continues the beams of version "
            f"{VERSION}: pip install --no-deps pyctcdecode=={VERSION}"
        )


@dataclass(frozen=True)
class History:
    """One way to write what a beam has said: words, n-gram state, scores (ln)."""

    words: tuple[str, ...]
    state: Any
    ngram: float
    bonus: float

    @property
    def total(self) -> float:
        """The score that histories are compared by (ln)."""
        return self.ngram + self.bonus


class LanguageModel(AbstractLanguageModel):
    """Lexicon, n-grams, word bonus and hot words of one search.

    A "word" of pyctcdecode is a spelling here. The state of a beam is the tuple of the `_HISTORIES`
    best ways to write it with homophones, best first.
    """

    def __init__(self, model: WordModel, hot: Mapping[str, dict[str, float]]) -> None:
        """Keep `model`, and the hot words' weights by spelling and word."""
        self.word_bonus = 0.0
        self._model, self._hot = model, hot
        self._hot_ahead: dict[str, float] = {}
        for spelling, words in hot.items():
            ahead = max(model.unigram(word) + weight for word, weight in words.items())
            for length in range(1, len(spelling) + 1):
                beginning = spelling[:length]
                self._hot_ahead[beginning] = max(ahead, self._hot_ahead.get(beginning, ahead))

    @property
    def order(self) -> int:
        """Order of the n-gram model."""
        return int(self._model.ngram.order)

    def get_start_state(self) -> Any:
        """Return the state of a sentence without words."""
        state = kenlm.State()
        self._model.ngram.BeginSentenceWrite(state)
        return (History((), state, 0.0, 0.0),)

    def score_partial_token(self, partial_token: str) -> float:
        """Return the best 1-gram score and hot word's weight of words that begin so (ln)."""
        known = self._model.look_ahead(partial_token)
        return max(known, self._hot_ahead.get(partial_token, IMPOSSIBLE))

    def score(self, prev_state: Any, word: str, is_last_word: bool = False) -> tuple[float, Any]:
        """Return the score (ln) that a spelling adds and the state after it; "" only ends."""
        histories = list(prev_state)
        if word:
            choices = dict.fromkeys(self._model.homophones(word), 0.0) | self._hot.get(word, {})
            histories = [
                self._add(history, choice, weight + self.word_bonus)
                for history in prev_state
                for choice, weight in choices.items()
            ]
        if is_last_word:
            histories = [self._add(history, "</s>", 0.0) for history in histories]
        if not histories:
            return IMPOSSIBLE, prev_state
        histories.sort(key=lambda history: -history.total)
        return histories[0].total - prev_state[0].total, tuple(histories[:_HISTORIES])

    def _add(self, history: History, word: str, bonus: float) -> History:
        after = kenlm.State()
        ngram = history.ngram + self._model.ngram.BaseScore(history.state, word, after) * _LOG10
        words = history.words if word == "</s>" else (*history.words, word)
        return History(words, after, ngram, history.bonus + bonus)


class StreamingDecoder(BeamSearchDecoderCTC):
    """pyctcdecode's search of one sentence after another, frame by frame."""

    def __init__(self, signs: list[str], language: LanguageModel) -> None:
        """Take the sign of each class: "" for the blank, " " for the silence."""
        super().__init__(Alphabet(signs, False), language)
        self._signs, self._language = signs, language
        self.begin()

    def begin(self) -> None:
        """Start a sentence."""
        start = self._language.get_start_state()
        # Scores and states by (text, whether it has ended); scores by part of a word.
        self._scores: dict[Any, Any] = {("", False): (0.0, 0.0, start)}
        self._ahead: dict[str, float] = {}
        self.begin_again()

    def begin_again(self) -> None:
        """Start the same sentence again; what the language model has scored is kept."""
        self._beams: list[Any] = [EMPTY_START_BEAM]

    def advance(self, frame: np.ndarray, classes: int, beam: float, max_active: int) -> None:
        """Search one frame: the log-probabilities [41] (ln) of its likeliest classes."""
        rest = len(frame) - classes
        likely = np.argpartition(frame, rest)[rest:] if rest else range(len(frame))
        grown: list[Any] = []
        for one in likely:
            sign, score = self._signs[one], float(frame[one])
            for text, following, part, last, _, _, before in self._beams:
                if sign == " " and sign != last:
                    following, part = part, ""
                elif sign != last:
                    part += sign
                grown.append((text, following, part, sign, [], NULL_FRAMES, before + score))
        scored = self._get_lm_beams(_merge_beams(grown), _NO_HOT_WORDS, self._scores, self._ahead)
        least = max(one[-1] for one in scored) - beam
        kept = [one for one in scored if one[-1] >= least]
        self._beams = [one[:-1] for one in heapq.nlargest(max_active, kept, key=itemgetter(-1))]

    def best_words(self) -> tuple[str, ...]:
        """Return the complete words of the best beam."""
        histories: tuple[History, ...] = self._scores[(self._beams[0][0], False)][2]
        return histories[0].words

    def ended(self) -> Iterator[tuple[float, tuple[History, ...]]]:
        """Yield acoustic score (ln) and histories of every sentence that can end here."""
        # The last word needs no silence.
        ends: list[Any] = [
            (text, part, "", None, [], NULL_FRAMES, score)
            for text, _, part, _, _, _, score in self._beams
        ]
        for text, *_, score, total in self._get_lm_beams(
            _merge_beams(ends), _NO_HOT_WORDS, self._scores, self._ahead, is_eos=True
        ):
            if total >= score + IMPOSSIBLE / 2:
                yield score, self._scores[(text, True)][2]

    def __del__(self) -> None:
        # The library keeps every decoder's language model in a table of the class.
        self.cleanup()
