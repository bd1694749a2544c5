"""pyctcdecode frame by frame, and what it asks of a language model.

pyctcdecode 0.5.0 can only decode a whole sentence (`decode_beams`), so a stream would be searched
anew with every chunk, and it prunes the classes of a frame by a threshold, not by their number.
`StreamingDecoder` therefore repeats the loop of `decode_beams` with beams that it keeps between
frames. It needs two private functions of that version, `_merge_beams` and `_get_lm_beams`, and the
layout of its beams: (text, next word, part of a word, last sign, frames, frames, acoustic score).
"""

from __future__ import annotations

import bisect
import heapq
import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import kenlm
import numpy as np
from pyctcdecode.alphabet import Alphabet
from pyctcdecode.decoder import EMPTY_START_BEAM, NULL_FRAMES, BeamSearchDecoderCTC, _merge_beams
from pyctcdecode.language_model import AbstractLanguageModel, HotwordScorer

from lm_server.lm.reader import ModelFolderError, read_description, read_spellings
from lm_server.protocol import CLASS_COUNT, LM_CLASSES
from lm_server.search.emissions import BLANK_ID, SILENCE_ID
from lm_server.search.interface import BackendError

VERSION = "0.5.0"
IMPOSSIBLE = -1e4
"""Score (ln) of a beginning or a spelling that no word has."""
_LOG10 = math.log(10.0)
_HISTORIES = 16
_NO_HOT_WORDS = HotwordScorer.build_scorer(None, 0.0)
_SIGNS = [chr(ord("A") + number) for number in range(CLASS_COUNT)]
_SIGNS[BLANK_ID], _SIGNS[SILENCE_ID] = "", " "
_ABOVE_SIGNS = "\x7f"


def check_version() -> None:
    """Raise BackendError if another version than the one described above is installed."""
    found = importlib.metadata.version("pyctcdecode")
    if found != VERSION:
        raise BackendError(
            f"pyctcdecode {found} is installed, but this search continues the beams of version "
            f"{VERSION}: pip install --no-deps pyctcdecode=={VERSION}"
        )


def spell(phones: Sequence[str]) -> str:
    """Return the spelling of a pronunciation, one sign per phoneme."""
    return "".join(_SIGNS[LM_CLASSES.index(phone)] for phone in phones)


class Lexicon:
    """Spellings, words and n-gram model of a folder, shared by any number of searches."""

    def __init__(self, folder: Path) -> None:
        """Read `folder`. See `lm_server.search.pyctcdecode.WordModel`."""
        spellings = read_spellings(folder, read_description(folder))
        self.words = spellings.words
        try:
            self.ngram = kenlm.Model(str(folder / "lm.bin"))
        # Of a damaged file KenLM's message may hold its bytes, so that reporting it fails too.
        except Exception as error:
            raise ModelFolderError(
                f"{folder}/lm.bin cannot be read ({error}): build the model again"
            ) from error
        self._start = kenlm.State()
        self.ngram.NullContextWrite(self._start)
        said = sorted(
            ("".join(_SIGNS[one] for one in spelling), words)
            for spelling, words in spellings.homophones.items()
        )
        self._spellings = [spelling for spelling, _ in said]
        self._homophones = [words for _, words in said]
        self._ahead = np.array([self.unigram(self.words[words[0]]) for _, words in said])
        self.look_ahead = lru_cache(1 << 16)(self._look_ahead)

    def unigram(self, word: str) -> float:
        """Return the 1-gram score of a word (ln)."""
        return float(self.ngram.BaseScore(self._start, word, kenlm.State())) * _LOG10

    def homophones(self, spelling: str) -> list[str]:
        """Return the words so spelled, likeliest first."""
        place = bisect.bisect_left(self._spellings, spelling)
        if place == len(self._spellings) or self._spellings[place] != spelling:
            return []
        return [self.words[index] for index in self._homophones[place]]

    def _look_ahead(self, beginning: str) -> float:
        """Return the best 1-gram score (ln) of a word that begins so, or `IMPOSSIBLE`."""
        first = bisect.bisect_left(self._spellings, beginning)
        last = bisect.bisect_left(self._spellings, beginning + _ABOVE_SIGNS)
        return float(self._ahead[first:last].max()) if first < last else IMPOSSIBLE


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

    def __init__(self, lexicon: Lexicon, hot: Mapping[str, dict[str, float]]) -> None:
        """Keep the lexicon, and the hot words' weights by spelling and word."""
        self.word_bonus = 0.0
        self._lexicon, self._hot = lexicon, hot
        self._hot_ahead: dict[str, float] = {}
        for spelling, words in hot.items():
            ahead = max(lexicon.unigram(word) + weight for word, weight in words.items())
            for length in range(1, len(spelling) + 1):
                beginning = spelling[:length]
                self._hot_ahead[beginning] = max(ahead, self._hot_ahead.get(beginning, ahead))

    @property
    def order(self) -> int:
        """Order of the n-gram model."""
        return int(self._lexicon.ngram.order)

    def get_start_state(self) -> Any:
        """Return the state of a sentence without words."""
        state = kenlm.State()
        self._lexicon.ngram.BeginSentenceWrite(state)
        return (History((), state, 0.0, 0.0),)

    def score_partial_token(self, partial_token: str) -> float:
        """Return the best 1-gram score and hot word's weight of words that begin so (ln)."""
        known = self._lexicon.look_ahead(partial_token)
        return max(known, self._hot_ahead.get(partial_token, IMPOSSIBLE))

    def score(self, prev_state: Any, word: str, is_last_word: bool = False) -> tuple[float, Any]:
        """Return the score (ln) that a spelling adds and the state after it. "" only ends."""
        histories = list(prev_state)
        if word:
            choices = dict.fromkeys(self._lexicon.homophones(word), 0.0) | self._hot.get(word, {})
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
        ngram = history.ngram + self._lexicon.ngram.BaseScore(history.state, word, after) * _LOG10
        words = history.words if word == "</s>" else (*history.words, word)
        return History(words, after, ngram, history.bonus + bonus)


class StreamingDecoder(BeamSearchDecoderCTC):
    """pyctcdecode's search of one sentence after another, frame by frame."""

    def __init__(self, language: LanguageModel) -> None:
        super().__init__(Alphabet(_SIGNS, False), language)
        self._language = language
        self.begin()

    def begin(self) -> None:
        """Start a sentence."""
        start = self._language.get_start_state()
        # Scores and states by (text, whether it has ended); scores by part of a word.
        self._scores: dict[Any, Any] = {("", False): (0.0, 0.0, start)}
        self._ahead: dict[str, float] = {}
        self.begin_again()

    def begin_again(self) -> None:
        """Start the same sentence again. What the language model has scored is kept."""
        self._beams: list[Any] = [EMPTY_START_BEAM]

    def advance(self, frame: np.ndarray, classes: int, beam: float, max_active: int) -> None:
        """Search one frame: the log-probabilities [41] (ln) of its likeliest classes."""
        rest = len(frame) - classes
        likely = np.argpartition(frame, rest)[rest:] if rest else range(len(frame))
        grown: list[Any] = []
        for one in likely:
            sign, score = _SIGNS[one], float(frame[one])
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
