"""The model folder searched by pyctcdecode: pure Python, sums all alignments of a sentence.

pyctcdecode's words are spellings here, one sign per phoneme, separated by silences. A beginning
that no word has is scored as impossible. Any other looks ahead to its likeliest word.

All beams may end inside beginnings that no word has, or without a word although phonemes are the
likeliest classes of some frames. Then the sentence is searched again with `_wider` settings.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from lm_server.hypothesis import Hypothesis, rank
from lm_server.protocol import CLASS_COUNT
from lm_server.search.emissions import BLANK_ID, SILENCE_ID, Emissions
from lm_server.search.hot_words import HotWord, check_hot_words
from lm_server.search.interface import (
    NO_FUSION,
    NO_HOT_WORDS,
    ONLY_MAX_ACTIVE,
    OWN_WIDTH,
    Backend,
    NoSentenceError,
    next_frames,
)
from lm_server.settings import PRESET, PRESETS, Settings

# pyctcdecode and kenlm are imported late: BACKEND must be readable without them.
BACKEND = Backend(
    requires=("pyctcdecode", "kenlm"),
    # Its metadata demands numpy below 2, but it works with later versions.
    install="pip install --no-deps pyctcdecode==0.5.0 pygtrie",
    # Wider ones take seconds per sentence.
    defaults=PRESETS["fast"],
    lacks={"min_active": ONLY_MAX_ACTIVE, PRESET: OWN_WIDTH, **NO_FUSION},
)
_WIDE_BEAM = 50.0
_WIDE_ACTIVE = (100, 500)
"""Least beam (ln) and numbers of hypotheses of further searches, which search all classes. The last
takes 0.1 s per frame."""


def load(folder: Path) -> WordModel:
    """Read a model folder. See `lm_server.search.load.load_model`."""
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
        from lm_server.search.pyctcdecode_stream import Lexicon

        self.folder = folder
        self.lexicon = Lexicon(folder)
        self.words = self.lexicon.words

    def search(
        self, settings: Settings, hot_words: Mapping[str, HotWord] = NO_HOT_WORDS
    ) -> WordSearch:
        """Return a new search. See `lm_server.search.interface.SearchModel`."""
        return WordSearch(self, settings, hot_words)


class WordSearch:
    """The search for one sentence after another. See `lm_server.search.interface.Search`."""

    def __init__(
        self, model: WordModel, settings: Settings, hot_words: Mapping[str, HotWord]
    ) -> None:
        from lm_server.search.pyctcdecode_stream import LanguageModel, StreamingDecoder, spell

        hot: dict[str, dict[str, float]] = defaultdict(dict)
        for word, one in check_hot_words(model.folder, hot_words)[0].items():
            for phones in one.pronunciations:
                hot[spell(phones)][word] = one.weight
        self._language = LanguageModel(model.lexicon, hot)
        self._decoder = StreamingDecoder(self._language)
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
        """Search the next frames. Return the best words so far."""
        logits = next_frames(logits, self.frames)
        if len(logits):
            self._searched.append(self._emissions.of(logits))
            self._advance(self._searched[-1], self.settings)
        self.frames += len(logits)
        return self._decoder.best_words()

    def finish(self) -> tuple[Hypothesis, ...]:
        """End the sentence. Return distinct hypotheses, best first, none if there were no frames.

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
        """Return the hypotheses if the sentence ended here. None if no beam is left."""
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
    """Return the settings of further searches, each wider. None if the first was as wide."""
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
