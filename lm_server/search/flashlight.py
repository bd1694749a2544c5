"""Lexicon-constrained CTC beam search of flashlight-text with a word n-gram model.

It is adapted to phoneme models whose words end in a silence:

- Every pronunciation in the trie ends in a compulsory silence. That is more accurate and several
  times faster than an optional one. A blank replaces a silence that the logits lack, see
  `lm_server.search.emissions`. The last word of a sentence needs none, see `BeamSearch.finish`.
- Only the likeliest classes of a frame are searched (`max_classes`). This loses no silence, which
  costs little more than a blank.
- Any number of words may share a pronunciation, and each search may have hot words of its own, see
  `lm_server.search.hot_trie`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lm_server.hypothesis import Hypothesis, rank
from lm_server.lm.reader import ModelFolderError, read_description, read_spellings
from lm_server.protocol import CLASS_COUNT
from lm_server.search.emissions import BLANK_ID, SILENCE_ID, Emissions
from lm_server.search.hot_trie import MAX_CLASSES, SPARE_WORDS, HotTrie, Numbers, spell
from lm_server.search.hot_words import HotWord, check_hot_words
from lm_server.search.interface import NO_HOT_WORDS, ONLY_MAX_ACTIVE, Backend, next_frames
from lm_server.settings import Settings

if TYPE_CHECKING:
    from flashlight.lib.text.decoder import LM, DecodeResult, LexiconDecoder, Trie

# flashlight is imported late: BACKEND must be readable without it.
BACKEND = Backend(
    requires=("flashlight.lib.text.decoder.kenlm",), lacks={"min_active": ONLY_MAX_ACTIVE}
)
_LOG10 = math.log(10.0)
_FORBIDDEN = -1e4
"""Log-probability of classes that the closing frame excludes, and of other searches' hot words. Far
below every other, whose floor is `lm_server.search.emissions.FLOOR`."""


def load(folder: Path) -> LanguageModel:
    """Read a model folder. See `lm_server.search.load.load_model`."""
    return LanguageModel(folder)


class LanguageModel:
    """A model folder in memory, shared by any number of searches: words, n-grams, and the trie of
    pronunciations."""

    backend = "flashlight"

    def __init__(self, folder: Path) -> None:
        """Read `folder`, as written by `lm-server build`.

        Raises:
          ModelFolderError: it is no model folder, has another format, or a file of it is missing or
            damaged.
        """
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary

        self.folder = folder
        self.description = read_description(folder)
        self.order = int(str(self.description["order"]))
        spellings = read_spellings(folder, self.description)
        self.words = spellings.words
        # The n-gram model numbers its words only here. Later hot words use the spare entries, which
        # it scores as unknown words.
        dictionary = Dictionary()
        for word in self.words:
            dictionary.add_entry(word)
        for number in range(SPARE_WORDS):
            dictionary.add_entry(f"<hot {number}>")
        try:
            self.ngram = KenLM(str(folder / "lm.bin"), dictionary)
        # Of a damaged file KenLM's message may hold its bytes, so that reporting it fails too.
        except Exception as error:
            raise ModelFolderError(
                f"{folder}/lm.bin cannot be read ({error}): build the model again"
            ) from error
        del dictionary
        self.trie = self._spell(spellings.homophones)
        self._spare = Numbers(len(self.words), SPARE_WORDS)
        self._classes = Numbers(CLASS_COUNT, MAX_CLASSES - CLASS_COUNT)
        self._hot_tries: weakref.WeakValueDictionary[frozenset[tuple[str, HotWord]], HotTrie] = (
            weakref.WeakValueDictionary()
        )

    def search(
        self, settings: Settings, hot_words: Mapping[str, HotWord] = NO_HOT_WORDS
    ) -> BeamSearch:
        """Return a new search. See `lm_server.search.interface.SearchModel`."""
        return BeamSearch(self, settings, hot_words)

    def hot_trie(self, hot_words: Mapping[str, HotWord]) -> HotTrie:
        """Return the trie's entries for hot words, shared by all searches with the same words.

        Raises:
          HotWordError: a hot word cannot be used, or all clients together have too many.
          ModelFolderError: the folder was removed.
        """
        same = frozenset(hot_words.items())
        shared = self._hot_tries.get(same)
        if shared is not None:
            return shared
        checked, indices = check_hot_words(self.folder, hot_words)
        made = HotTrie(self.trie, self.ngram, self._classes, self._spare, checked, indices)
        self._hot_tries[same] = made
        return made

    def _spell(self, homophones: dict[bytes, list[int]]) -> Trie:
        from flashlight.lib.text.decoder import SmearingMode, Trie

        trie = Trie(MAX_CLASSES, SILENCE_ID)
        nothing = self.ngram.start(True)
        while homophones:
            spelling, words = homophones.popitem()
            # The first is the likeliest.
            unigram = self.ngram.score(nothing, words[0])[1]
            spell(trie, [*spelling, SILENCE_ID], words, unigram)
        # Every node stores the best 1-gram score below it, which the search uses until the word is
        # known.
        trie.smear(SmearingMode.MAX)
        return trie


class BeamSearch:
    """The search for one sentence after another: begin, step for every chunk of frames, finish.

    Settings change only with `begin`, so that every frame of a sentence is scored alike. Where
    `max_active` separates hypotheses with equal scores (homophones that the text lacks), the choice
    among them is arbitrary.
    """

    def __init__(
        self,
        model: LanguageModel,
        settings: Settings,
        hot_words: Mapping[str, HotWord] = NO_HOT_WORDS,
    ) -> None:
        self._model = model
        self._ngram = self._scoring(model.ngram)
        self._hot = model.hot_trie(hot_words) if hot_words else None
        self._emissions = Emissions(settings)
        self.begin(settings)

    @staticmethod
    def _scoring(ngram: LM) -> LM:
        """Return what scores the words during the search."""
        return ngram

    def begin(self, settings: Settings | None = None) -> None:
        """Start a sentence and drop the current one."""
        if settings is not None:
            self._decoder = self._make_decoder(settings)
            self.settings = settings
        self._emissions.begin(self.settings)
        self._decoder.decode_begin()
        self.frames = 0

    def step(self, logits: np.ndarray) -> tuple[str, ...]:
        """Search the next frames. Return the best words so far, each once its silence has begun."""
        logits = next_frames(logits, self.frames)
        if len(logits):
            self._decode(self._emissions.of(logits))
            self.frames += len(logits)
        return self._words(self._decoder.get_best_hypothesis(0).words) if self.frames else ()

    def finish(self) -> tuple[Hypothesis, ...]:
        """End the sentence. Return distinct hypotheses, best first, none if there were no frames.

        A closing frame, in which only silence is possible and costs nothing, completes a last word
        whose own silence was cut off. A hypothesis that already has its last silence stays in it.
        """
        if not self.frames:
            return ()
        closing = np.full((1, CLASS_COUNT), _FORBIDDEN)
        closing[0, SILENCE_ID] = 0.0
        before = self._decoder.get_best_hypothesis(0).emittingModelScore
        self._decode(closing)
        self._before_end()
        self._decoder.decode_end()
        results = self._decoder.get_all_final_hypothesis()
        surplus = 0.0
        if results and max(one.emittingModelScore for one in results) < before + _FORBIDDEN / 2:
            # Every hypothesis was inside a word that could not end there, so the closing frame
            # changed no order. (No beam reaches across `_FORBIDDEN`: it is all of them or none.)
            surplus = _FORBIDDEN
        ranked = self._ranked([self._hypothesis(one, surplus) for one in results])
        self.begin()
        return ranked

    def _before_end(self) -> None:
        """Do what is left to do before the sentence's last scores are added."""

    def _ranked(self, found: list[Hypothesis]) -> tuple[Hypothesis, ...]:
        settings = self.settings
        return rank(found, settings.acoustic_scale, settings.nbest, settings.lattice_beam)

    def _hypothesis(self, result: DecodeResult, surplus: float) -> Hypothesis:
        words = self._words(result.words)
        weights = 0.0
        if self._hot:
            weights = sum(
                self._hot.weights[token]
                for token in result.tokens
                if token in self._hot.weights  # entrances weigh 0, endings last one frame
            )
        return Hypothesis(
            words,
            (result.emittingModelScore - surplus - weights + self._emissions.skipped)
            / self.settings.acoustic_scale,
            result.lmScore * _LOG10,
            bonus=weights + self.settings.word_bonus * len(words),
        )

    def _decode(self, emissions: np.ndarray) -> None:
        """Search emissions [frames, 41], with this search's own classes as further columns."""
        if self._hot:
            every = np.full((len(emissions), self._hot.columns), _FORBIDDEN)
            every[:, :CLASS_COUNT] = emissions
            for own, source in self._hot.sources.items():
                every[:, own] = emissions[:, source] + self._hot.weights[own]
            emissions = every
        ready = np.ascontiguousarray(emissions, np.float32)
        self._decoder.decode_step(ready.ctypes.data, *ready.shape)

    def _words(self, ids: list[int]) -> tuple[str, ...]:
        vocabulary, extra = self._model.words, self._hot.words if self._hot else {}
        known = len(vocabulary)
        return tuple(
            [vocabulary[word] if word < known else extra[word] for word in ids if word >= 0]
        )

    def _make_decoder(self, settings: Settings) -> LexiconDecoder:
        from flashlight.lib.text.decoder import (
            CriterionType,
            LexiconDecoder,
            LexiconDecoderOptions,
        )

        options = LexiconDecoderOptions(
            beam_size=settings.max_active,
            # A search's own classes copy others, and may displace these among the likeliest.
            beam_size_token=settings.max_classes + (len(self._hot.sources) if self._hot else 0),
            beam_threshold=settings.beam,
            # KenLM counts in base 10, the emissions in ln.
            lm_weight=_LOG10,
            word_score=settings.word_bonus,
            unk_score=-math.inf,
            sil_score=0.0,
            log_add=False,
            criterion_type=CriterionType.CTC,
        )
        return LexiconDecoder(
            options, self._model.trie, self._ngram, SILENCE_ID, BLANK_ID, -1, [], False
        )
