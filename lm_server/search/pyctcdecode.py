"""The model folder searched with pyctcdecode: pure Python, adds up the alignments of a sentence.

pyctcdecode's words are spellings here, a sign per phoneme, between silences. The language model
inside knows the lexicon: a beginning that no word has is as good as impossible, one that some word
has looks ahead to the likeliest, and a spelling stands for all its homophones, of whose histories
the `_HISTORIES` best are kept and come out as candidates.

Where all hypotheses have come to beginnings that no word has, or nothing was heard although
phonemes are the likeliest classes of some frames, the sentence is searched again with `_wider`
settings.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import kenlm
import numpy as np
from pyctcdecode.alphabet import Alphabet
from pyctcdecode.decoder import BeamSearchDecoderCTC, _merge_beams, _sort_and_trim_beams
from pyctcdecode.language_model import AbstractLanguageModel, HotwordScorer

from lm_server.hypothesis import Hypothesis, rank
from lm_server.lm.reader import ModelFolderError, find_words, read_description, read_spellings
from lm_server.protocol import (
    CLASS_COUNT,
    LM_CLASSES,
    PHONEMES,
    ProtocolError,
    check_logits,
)
from lm_server.search.emissions import BLANK_ID, SILENCE_ID, Emissions
from lm_server.search.flashlight import MAX_UTTERANCE_FRAMES
from lm_server.search.hot_words import HotWord, check_hot_words
from lm_server.search.interface import NO_HOT_WORDS, NoSentenceError
from lm_server.settings import Settings

_LOG10 = math.log(10.0)
_IMPOSSIBLE = -1e4
_HISTORIES = 16
_WIDE_BEAM = 50.0
_WIDE_ACTIVE = (100, 500)
"""Least beam (ln) and numbers of hypotheses of further searches, which look at all classes; the
last takes 0.1 s per frame."""
_SIGNS = [chr(ord("A") + number) for number in range(CLASS_COUNT)]
_SIGNS[BLANK_ID], _SIGNS[SILENCE_ID] = "", " "
_SIGN = {name: _SIGNS[LM_CLASSES.index(name)] for name in PHONEMES}


@dataclass(frozen=True)
class _History:
    """One way to write what a hypothesis has said: its words, n-gram state, scores (ln)."""

    words: tuple[str, ...]
    state: Any
    ngram: float
    bonus: float

    @property
    def total(self) -> float:
        return self.ngram + self.bonus


class WordModel:
    """A model folder in memory; shared by any number of searches."""

    backend = "pyctcdecode"

    def __init__(self, folder: Path) -> None:
        """Reads `folder`, as written by `lm-server build`.

        Raises:
          ModelFolderError: it is no model folder, or a file of it is missing or damaged.
        """
        self.folder = folder
        spellings = read_spellings(folder, read_description(folder))
        self.words = spellings.words
        try:
            self.ngram = kenlm.Model(str(folder / "lm.bin"))
        # Of a damaged file KenLM's message may hold its bytes, so that reporting it fails too.
        except Exception as error:
            raise ModelFolderError(
                f"{folder}/lm.bin cannot be read ({error}): build the model again"
            ) from error
        said = sorted(
            ("".join(_SIGNS[one] for one in spelling), words)
            for spelling, words in spellings.homophones.items()
        )
        self._spellings = [spelling for spelling, _ in said]
        self._homophones = [words for _, words in said]
        self._ahead = np.array([self.unigram(self.words[words[0]]) for _, words in said])
        self.look_ahead = lru_cache(1 << 16)(self._look_ahead)

    def search(
        self, settings: Settings, hot_words: Mapping[str, HotWord] = NO_HOT_WORDS
    ) -> WordSearch:
        """A new search; see `lm_server.search.interface.SearchModel`."""
        return WordSearch(self, settings, hot_words)

    def unigram(self, word: str) -> float:
        """1-gram score of a word (ln)."""
        state, after = kenlm.State(), kenlm.State()
        self.ngram.NullContextWrite(state)
        return self.ngram.BaseScore(state, word, after) * _LOG10

    def homophones(self, spelling: str) -> list[str]:
        """Words so spelled, likeliest first."""
        place = bisect.bisect_left(self._spellings, spelling)
        if place == len(self._spellings) or self._spellings[place] != spelling:
            return []
        return [self.words[index] for index in self._homophones[place]]

    def _look_ahead(self, beginning: str) -> float:
        """Best 1-gram score (ln) of a word that begins so."""
        first = bisect.bisect_left(self._spellings, beginning)
        # Above every sign of a phoneme.
        last = bisect.bisect_left(self._spellings, beginning + "\x7f")
        return float(self._ahead[first:last].max()) if first < last else _IMPOSSIBLE


_NOTHING_YET: tuple[Any, ...] = ("", "", "", None, [], (-1, -1), 0.0)
"""pyctcdecode's hypothesis before the first frame."""


def _wider(settings: Settings) -> list[Settings]:
    """The settings of further searches, ever wider; none where the first was as wide."""
    steps = [
        replace(
            settings,
            beam=max(settings.beam, _WIDE_BEAM),
            max_active=max(settings.max_active, active),
            max_classes=CLASS_COUNT,
        )
        for active in _WIDE_ACTIVE
    ]
    return [one for one in dict.fromkeys(steps) if one != settings]


class _Language(AbstractLanguageModel):
    """What one search asks of the model: lexicon, n-grams, word bonus and its hot words."""

    def __init__(
        self, model: WordModel, settings: Settings, hot: Mapping[str, dict[str, float]]
    ) -> None:
        self.settings = settings
        self._model = model
        self._hot = hot
        self._hot_ahead: dict[str, float] = {}
        for spelling, words in hot.items():
            ahead = max(model.unigram(word) + weight for word, weight in words.items())
            for length in range(1, len(spelling) + 1):
                beginning = spelling[:length]
                self._hot_ahead[beginning] = max(ahead, self._hot_ahead.get(beginning, ahead))

    @property
    def order(self) -> int:
        return int(self._model.ngram.order)

    def get_start_state(self) -> Any:
        state = kenlm.State()
        self._model.ngram.BeginSentenceWrite(state)
        return (_History((), state, 0.0, 0.0),)

    def score_partial_token(self, partial_token: str) -> float:
        return max(
            self._model.look_ahead(partial_token),
            self._hot_ahead.get(partial_token, _IMPOSSIBLE),
        )

    def score(
        self, prev_state: tuple[_History, ...], word: str, is_last_word: bool = False
    ) -> tuple[float, tuple[_History, ...]]:
        """`word` is a spelling; an empty one only ends the sentence."""
        histories = list(prev_state)
        if word:
            hot = self._hot.get(word, {})
            choices = dict.fromkeys(self._model.homophones(word), 0.0) | hot
            histories = [
                self._add(history, choice, weight + self.settings.word_bonus)
                for history in prev_state
                for choice, weight in choices.items()
            ]
        if is_last_word:
            ended = [self._add(history, "</s>", 0.0) for history in histories]
            histories = [
                _History(before.words, after.state, after.ngram, before.bonus)
                for before, after in zip(histories, ended, strict=True)
            ]
        if not histories:
            return _IMPOSSIBLE, prev_state
        histories.sort(key=lambda history: -history.total)
        return histories[0].total - prev_state[0].total, tuple(histories[:_HISTORIES])

    def _add(self, history: _History, word: str, bonus: float) -> _History:
        after = kenlm.State()
        ngram = history.ngram + self._model.ngram.BaseScore(history.state, word, after) * _LOG10
        return _History((*history.words, word), after, ngram, history.bonus + bonus)

    def save_to_dir(self, filepath: str) -> None:
        raise NotImplementedError("the model is a folder of `lm-server build` already")

    @classmethod
    def load_from_dir(cls, filepath: str) -> AbstractLanguageModel:
        raise NotImplementedError("read the folder with lm_server.search.interface.load_model")


class WordSearch:
    """The search for one sentence after another; see `lm_server.search.interface.Search`."""

    def __init__(
        self, model: WordModel, settings: Settings, hot_words: Mapping[str, HotWord]
    ) -> None:
        self._decoder: BeamSearchDecoderCTC | None = None
        self._model = model
        known = find_words(model.folder, {word.lower() for word in hot_words})
        checked = check_hot_words(hot_words, {word: said for word, (_, said) in known.items()})
        self._hot: dict[str, dict[str, float]] = defaultdict(dict)
        for word, hot in checked.items():
            for phones in hot.pronunciations:
                self._hot["".join(_SIGN[phone] for phone in phones)][word] = hot.weight
        self._emissions = Emissions(settings)
        self._no_hot_words = HotwordScorer.build_scorer(None, 0.0)
        self.begin(settings)

    def begin(self, settings: Settings | None = None) -> None:
        """Starts a sentence, dropping the one under way."""
        if settings is not None:
            self.settings = settings
            self._free_decoder()
            language = _Language(self._model, settings, self._hot)
            self._language = language
            self._decoder = BeamSearchDecoderCTC(Alphabet(_SIGNS, False), language)
        self._emissions.begin(self.settings)
        self._scores: dict[Any, Any] = {("", False): (0.0, 0.0, self._language.get_start_state())}
        self._ahead: dict[str, float] = {}
        self._beams: list[Any] = [_NOTHING_YET]
        self._searched: list[np.ndarray] = []
        self.frames = 0

    def step(self, logits: np.ndarray) -> tuple[str, ...]:
        """Takes the next frames; gives the best sentence so far."""
        logits = check_logits(logits)
        if self.frames + len(logits) > MAX_UTTERANCE_FRAMES:
            raise ProtocolError(
                f"the sentence would have {self.frames + len(logits)} frames; at most "
                f"{MAX_UTTERANCE_FRAMES} are possible: send finalize or reset between sentences"
            )
        if len(logits):
            # Kept for a second search (at most 3 MB, of the longest sentence).
            self._searched.append(self._emissions.of(logits))
            for frame in self._searched[-1]:
                self._advance(frame, self.settings)
        self.frames += len(logits)
        text = self._beams[0][0]
        _, _, histories = self._scores[(text, False)]
        return histories[0].words

    def finish(self) -> tuple[Hypothesis, ...]:
        """Ends the sentence: the n best candidates, distinct and best first; none without
        frames.

        Raises:
          NoSentenceError: no hypothesis is left, of the wider searches neither.
        """
        if not self.frames:
            return ()
        frames, width = self.frames, self.settings
        found = self._ended()
        for width in _wider(self.settings):
            if found and (found[0].words or not self._spoken()):
                break
            self._beams = [_NOTHING_YET]
            for chunk in self._searched:
                for frame in chunk:
                    self._advance(frame, width)
            found = self._ended()
        self.begin()
        if not found:
            raise NoSentenceError(
                f"no sentence of the model's words fits these {frames} frames, searched with "
                f"beam {width.beam:g}, max_active {width.max_active} and all {CLASS_COUNT} "
                "classes: raise beam and max_active, or take the search flashlight"
            )
        return found

    def _spoken(self) -> bool:
        """Whether a phoneme is the likeliest class of some frame."""
        likeliest = np.concatenate([chunk.argmax(axis=1) for chunk in self._searched])
        return not np.isin(likeliest, (BLANK_ID, SILENCE_ID)).all()

    def _ended(self) -> tuple[Hypothesis, ...]:
        """The candidates, were the sentence to end here; none if no hypothesis is left."""
        # The last word needs no silence.
        ends: list[Any] = [
            (text, part, "", None, [], (-1, -1), score)
            for text, _, part, _, _, _, score in self._beams
        ]
        scale, skipped = self.settings.acoustic_scale, self._emissions.skipped
        found: dict[tuple[str, ...], Hypothesis] = {}
        for text, *_, score, total in self._score(_merge_beams(ends), ended=True):
            if total < score + _IMPOSSIBLE / 2:
                continue
            for history in self._scores[(text, True)][2]:
                acoustic = score
                if history.words in found:
                    # Said in another way: one sentence all the same.
                    before = found[history.words].acoustic * scale - skipped
                    acoustic = float(np.logaddexp(before, score))
                found[history.words] = Hypothesis(
                    history.words,
                    (acoustic + skipped) / scale,
                    history.ngram,
                    bonus=history.bonus,
                )
        settings = self.settings
        return rank(found.values(), scale, settings.nbest, settings.lattice_beam)

    def _advance(self, frame: np.ndarray, settings: Settings) -> None:
        """One frame, as pyctcdecode's own loop goes, but for the likeliest classes only."""
        rest = CLASS_COUNT - settings.max_classes
        likely = np.argpartition(frame, rest)[rest:] if rest else range(CLASS_COUNT)
        grown: list[Any] = []
        for one in likely:
            sign, score = _SIGNS[one], float(frame[one])
            for text, following, part, last, _, _, before in self._beams:
                total = before + score
                if not sign or sign == last:
                    grown.append((text, following, part, sign, [], (-1, -1), total))
                elif sign == " ":
                    grown.append((text, part, "", sign, [], (-1, -1), total))
                else:
                    grown.append((text, following, part + sign, sign, [], (-1, -1), total))
        beams = self._score(_merge_beams(grown), ended=False)
        least = max(beam[-1] for beam in beams) - settings.beam
        kept = [beam for beam in beams if beam[-1] >= least]
        self._beams = [beam[:-1] for beam in _sort_and_trim_beams(kept, settings.max_active)]

    def _score(self, beams: list[Any], ended: bool) -> list[Any]:
        assert self._decoder is not None
        return self._decoder._get_lm_beams(
            beams, self._no_hot_words, self._scores, self._ahead, is_eos=ended
        )

    def _free_decoder(self) -> None:
        # The library keeps every decoder's model in a table of the class.
        if self._decoder is not None:
            self._decoder.cleanup()

    def __del__(self) -> None:
        self._free_decoder()
