"""The model folder searched by pyctcdecode: pure Python, sums all alignments of a sentence.

pyctcdecode's words are spellings here, one sign per phoneme, separated by silences. A beginning
that no word has is scored as impossible. Any other looks ahead to its likeliest word.

All beams may end inside beginnings that no word has, or without a word although phonemes are the
likeliest classes of some frames. Then the sentence is searched again with `_wider` settings.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from lm_server.hypothesis import Hypothesis, rank
from lm_server.lm.reader import ModelFolderError, read_description, read_spellings
from lm_server.protocol import CLASS_COUNT, LM_CLASSES, PHONEMES
from lm_server.search.emissions import BLANK_ID, SILENCE_ID, Emissions
from lm_server.search.hot_words import HotWord, check_hot_words
from lm_server.search.interface import (
    NO_HOT_WORDS,
    ONLY_MAX_ACTIVE,
    Backend,
    NoSentenceError,
    next_frames,
)
from lm_server.settings import Settings

# pyctcdecode and kenlm are imported late: BACKEND must be readable without them.
BACKEND = Backend(
    requires=("pyctcdecode", "kenlm"),
    # Its metadata demands numpy below 2, but it works with later versions.
    install="pip install --no-deps pyctcdecode==0.5.0 pygtrie",
    lacks={"min_active": ONLY_MAX_ACTIVE},
)
_WIDE_BEAM = 50.0
_WIDE_ACTIVE = (100, 500)
"""Least beam (ln) and numbers of hypotheses of further searches, which search all classes; the last
takes 0.1 s per frame."""
_SIGNS = [chr(ord("A") + number) for number in range(CLASS_COUNT)]
_SIGNS[BLANK_ID], _SIGNS[SILENCE_ID] = "", " "
_SIGN = {name: _SIGNS[LM_CLASSES.index(name)] for name in PHONEMES}


def load(folder: Path) -> WordModel:
    """Read a model folder; see `lm_server.search.load.load_model`."""
    from lm_server.search.pyctcdecode_stream import check_version

    check_version()
    return WordModel(folder)


class WordModel:
    """A model folder in memory, shared by any number of searches."""

    backend = "pyctcdecode"

    def __init__(self, folder: Path) -> None:
        """Read `folder`, as written by `lm-server build`.

        Raises:
          ModelFolderError: it is no model folder, or a file of it is missing or damaged.
        """
        import kenlm

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

    def search(
        self, settings: Settings, hot_words: Mapping[str, HotWord] = NO_HOT_WORDS
    ) -> WordSearch:
        """Return a new search; see `lm_server.search.interface.SearchModel`."""
        return WordSearch(self, settings, hot_words)

    def unigram(self, word: str) -> float:
        """Return the 1-gram score of a word (ln)."""
        import kenlm

        return float(self.ngram.BaseScore(self._start, word, kenlm.State())) * math.log(10.0)

    def homophones(self, spelling: str) -> list[str]:
        """Return the words so spelled, likeliest first."""
        place = bisect.bisect_left(self._spellings, spelling)
        if place == len(self._spellings) or self._spellings[place] != spelling:
            return []
        return [self.words[index] for index in self._homophones[place]]

    def _look_ahead(self, beginning: str) -> float:
        """Return the best 1-gram score (ln) of a word that begins so, or `IMPOSSIBLE`."""
        from lm_server.search.pyctcdecode_stream import IMPOSSIBLE

        first = bisect.bisect_left(self._spellings, beginning)
        # Above every sign of a phoneme.
        last = bisect.bisect_left(self._spellings, beginning + "\x7f")
        return float(self._ahead[first:last].max()) if first < last else IMPOSSIBLE


class WordSearch:
    """The search for one sentence after another; see `lm_server.search.interface.Search`."""

    def __init__(
        self, model: WordModel, settings: Settings, hot_words: Mapping[str, HotWord]
    ) -> None:
        from lm_server.search.pyctcdecode_stream import LanguageModel, StreamingDecoder

        hot: dict[str, dict[str, float]] = defaultdict(dict)
        for word, one in check_hot_words(model.folder, hot_words)[0].items():
            for phones in one.pronunciations:
                hot["".join(_SIGN[phone] for phone in phones)][word] = one.weight
        self._language = LanguageModel(model, hot)
        self._decoder = StreamingDecoder(_SIGNS, self._language)
        self._emissions = Emissions(settings)
        self.begin(settings)

    def begin(self, settings: Settings | None = None) -> None:
        """Start a sentence and drop the current one."""
        if settings is not None:
            self.settings = settings
            self._language.word_bonus = settings.word_bonus
        self._emissions.begin(self.settings)
        self._decoder.begin()
        # Kept for a further search (at most 3 MB, of the longest sentence).
        self._searched: list[np.ndarray] = []
        self.frames = 0

    def step(self, logits: np.ndarray) -> tuple[str, ...]:
        """Search the next frames; return the best words so far."""
        logits = next_frames(logits, self.frames)
        if len(logits):
            self._searched.append(self._emissions.of(logits))
            self._advance(self._searched[-1], self.settings)
        self.frames += len(logits)
        return self._decoder.best_words()

    def finish(self) -> tuple[Hypothesis, ...]:
        """End the sentence; return distinct hypotheses, best first, none if there were no frames.

        Raises:
          NoSentenceError: no hypothesis is left, not even by the wider searches.
        """
        if not self.frames:
            return ()
        frames, width = self.frames, self.settings
        found = self._found()
        for width in _wider(self.settings):
            if found and (found[0].words or not self._spoken()):
                break
            self._decoder.begin_again()
            for chunk in self._searched:
                self._advance(chunk, width)
            found = self._found()
        self.begin()
        if not found:
            raise NoSentenceError(
                f"no sentence of the model's words fits these {frames} frames, searched with "
                f"beam {width.beam:g}, max_active {width.max_active} and all {CLASS_COUNT} "
                "classes: raise beam and max_active, or use the search flashlight"
            )
        return found

    def _advance(self, emissions: np.ndarray, width: Settings) -> None:
        for frame in emissions:
            self._decoder.advance(frame, width.max_classes, width.beam, width.max_active)

    def _spoken(self) -> bool:
        """Return whether a phoneme is the likeliest class of some frame."""
        likeliest = np.concatenate([chunk.argmax(axis=1) for chunk in self._searched])
        return not np.isin(likeliest, (BLANK_ID, SILENCE_ID)).all()

    def _found(self) -> tuple[Hypothesis, ...]:
        """Return the hypotheses if the sentence ended here; none if no beam is left."""
        settings, skipped = self.settings, self._emissions.skipped
        acoustic: dict[tuple[str, ...], float] = {}
        histories = {}
        for score, some in self._decoder.ended():
            for one in some:
                # Other spellings of the same words are the same sentence.
                before = acoustic.get(one.words, -math.inf)
                acoustic[one.words] = float(np.logaddexp(before, score))
                histories[one.words] = one
        found = [
            Hypothesis(
                words,
                (acoustic[words] + skipped) / settings.acoustic_scale,
                one.ngram,
                bonus=one.bonus,
            )
            for words, one in histories.items()
        ]
        return rank(found, settings.acoustic_scale, settings.nbest, settings.lattice_beam)


def _wider(settings: Settings) -> list[Settings]:
    """Return the settings of further searches, each wider; none if the first was as wide."""
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
