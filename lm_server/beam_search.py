"""Lexicon-constrained CTC beam search with a word n-gram model: begin, step(frames), finish.

flashlight-text does the search. Two things here make it fit phoneme models whose words end in a
silence:

- A pronunciation is spelled into the trie with its silence, which is compulsory. This is both more
  accurate and several times faster than an optional silence. The last word of a sentence is the
  exception, see `BeamSearch.finish`.
- A trie node holds at most six words, but up to fourteen are said alike. Further homophones end in
  copies of the silence class, which score as silence does.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flashlight.lib.text.decoder import (
    CriterionType,
    LexiconDecoder,
    LexiconDecoderOptions,
    SmearingMode,
    Trie,
)
from flashlight.lib.text.decoder.kenlm import KenLM
from flashlight.lib.text.dictionary import Dictionary

from lm_server.errors import UserError
from lm_server.hot_words import HotWord
from lm_server.nbest import Hypothesis, rank
from lm_server.protocol import (
    CLASS_COUNT,
    LM_CLASSES,
    MAX_MESSAGE_FRAMES,
    PHONEMES,
    SILENCE,
    ProtocolError,
    check_logits,
)
from lm_server.search import NO_HOT_WORDS
from lm_server.settings import Settings

_BLANK_ID = 0
_SILENCE_ID = LM_CLASSES.index(SILENCE)
_WORDS_PER_NODE = 6
_LOG10 = math.log(10.0)
_FORBIDDEN = -1e4
"""Log-probability of what the closing frame excludes; far below any frame's, whose floor is
`_FLOOR`."""
_FLOOR = -1e3
FORMAT = 1
MAX_UTTERANCE_FRAMES = MAX_MESSAGE_FRAMES
"""Frames of 80 ms in one sentence (13 minutes): the search remembers every frame."""


class ModelFolderError(UserError, ValueError):
    """A folder that is no model, or a damaged one; says what is missing and how to make it."""


class LanguageModel:
    """A model folder in memory: word list, n-gram model and pronunciation trie; shared by any
    number of searches."""

    def __init__(self, folder: Path) -> None:
        """Reads `folder`, as written by `lm-server build`.

        Raises:
          ModelFolderError: it is no model folder, is of another format, or a file of it is missing
            or damaged.
        """
        self.folder = folder
        self.description = _read_description(folder)
        self.order = int(str(self.description["order"]))
        self.words, spellings = _read_spellings(folder, self.description)
        self._dictionary = Dictionary()
        for word in self.words:
            self._dictionary.add_entry(word)
        try:
            self.ngram = KenLM(str(folder / "lm.bin"), self._dictionary)
        except RuntimeError as error:
            raise ModelFolderError(
                f"{folder}/lm.bin cannot be read ({error}): build the model again"
            ) from error
        self.silences = 1 + (max(map(len, spellings.values()), default=1) - 1) // _WORDS_PER_NODE
        self.trie = self._spell(spellings)

    @property
    def classes(self) -> int:
        """Columns of the search's emissions: the 41 classes and the copies of silence."""
        return CLASS_COUNT + self.silences - 1

    def search(
        self, settings: Settings, hot_words: Mapping[str, HotWord] = NO_HOT_WORDS
    ) -> BeamSearch:
        """A new search; see `lm_server.search.SearchModel`."""
        return BeamSearch(self, settings)

    def _spell(self, spellings: Mapping[tuple[str, ...], list[int]]) -> Trie:
        ids = {name: index for index, name in enumerate(LM_CLASSES)}
        trie = Trie(self.classes, _SILENCE_ID)
        nothing = self.ngram.start(True)
        unigram = [self.ngram.score(nothing, word)[1] for word in range(len(self.words))]
        for phones, homophones in spellings.items():
            spelling = [ids[phone] for phone in phones]
            # The lexicon's order is by probability, so the likeliest homophones end in the true
            # silence.
            for rank_, word in enumerate(homophones):
                copy = rank_ // _WORDS_PER_NODE
                ending = _SILENCE_ID if copy == 0 else CLASS_COUNT + copy - 1
                trie.insert([*spelling, ending], word, unigram[word])
        # Every node learns the best 1-gram score below it, which the search uses until the word is
        # known.
        trie.smear(SmearingMode.MAX)
        return trie


class BeamSearch:
    """The search for one sentence after another: begin, step for every chunk of frames, finish.

    Settings given while a sentence is under way hold from the next `begin`, so that every frame of
    a sentence is scored alike. Where `max_active` cuts through hypotheses of exactly equal scores
    (homophones that the text lacks), which of them stay is arbitrary.
    """

    def __init__(self, model: LanguageModel, settings: Settings) -> None:
        self._model = model
        self.begin(settings)

    def begin(self, settings: Settings | None = None) -> None:
        """Starts a sentence, dropping the one under way."""
        if settings is not None:
            self._decoder = self._make_decoder(settings)
            self.settings = settings
        self._decoder.decode_begin()
        self.frames = 0

    def step(self, logits: np.ndarray) -> tuple[str, ...]:
        """Takes the next frames, [frames, 41] in the language model's order; any number of them.

        Returns:
          The best sentence so far; a word stands in it once its silence has begun.

        Raises:
          ProtocolError: the shape is wrong, a value is not finite, or the sentence becomes too
            long. The sentence under way is unchanged.
        """
        logits = check_logits(logits)
        if self.frames + len(logits) > MAX_UTTERANCE_FRAMES:
            raise ProtocolError(
                f"the sentence would have {self.frames + len(logits)} frames; at most "
                f"{MAX_UTTERANCE_FRAMES} are possible: send finalize or reset between sentences"
            )
        if len(logits):
            self._decode(self._emissions(logits))
            self.frames += len(logits)
        return self._words(self._decoder.get_best_hypothesis(0).words) if self.frames else ()

    def finish(self) -> tuple[Hypothesis, ...]:
        """Ends the sentence: the n best candidates, distinct and best first; none when there were
        no frames.

        A closing frame, in which only silence is possible and costs nothing, completes a last word
        whose own silence was cut off or overlooked. A hypothesis that has its last silence only
        stays in it.
        """
        if not self.frames:
            return ()
        closing = np.full((1, self._model.classes), _FORBIDDEN, np.float32)
        closing[0, _SILENCE_ID] = closing[0, CLASS_COUNT:] = 0.0
        before = self._decoder.get_best_hypothesis(0).emittingModelScore
        self._decode(closing)
        self._decoder.decode_end()
        scale = self.settings.acoustic_scale
        results = self._decoder.get_all_final_hypothesis()
        surplus = 0.0
        if results and max(one.emittingModelScore for one in results) < before + _FORBIDDEN / 2:
            # Every hypothesis stood inside a word that could not end there; the closing frame
            # forbade nothing. (No beam reaches over `_FORBIDDEN`: it is all of them or none.)
            surplus = _FORBIDDEN
        found = [
            Hypothesis(
                self._words(one.words),
                (one.emittingModelScore - surplus) / scale,
                one.lmScore * _LOG10,
            )
            for one in results
        ]
        self.begin()
        return rank(found, scale, self.settings.nbest)

    def _decode(self, emissions: np.ndarray) -> None:
        self._decoder.decode_step(emissions.ctypes.data, *emissions.shape)

    def _words(self, ids: list[int]) -> tuple[str, ...]:
        return tuple(self._model.words[word] for word in ids if word >= 0)

    def _emissions(self, logits: np.ndarray) -> np.ndarray:
        """Logits [frames, 41] -> scaled log-probabilities (ln) [frames, classes of the search]."""
        log_probabilities = scaled_log_probabilities(logits, self.settings)
        copies = np.repeat(
            log_probabilities[:, _SILENCE_ID, None], self._model.silences - 1, axis=1
        )
        return np.ascontiguousarray(np.concatenate([log_probabilities, copies], axis=1), np.float32)

    def _make_decoder(self, settings: Settings) -> LexiconDecoder:
        options = LexiconDecoderOptions(
            beam_size=settings.max_active,
            # All classes in every frame: a weak silence must be able to end a word.
            beam_size_token=self._model.classes,
            beam_threshold=settings.beam,
            # KenLM counts in base 10, the emissions in ln.
            lm_weight=_LOG10,
            word_score=0.0,
            unk_score=-math.inf,
            sil_score=0.0,
            log_add=False,
            criterion_type=CriterionType.CTC,
        )
        return LexiconDecoder(
            options, self._model.trie, self._model.ngram, _SILENCE_ID, _BLANK_ID, -1, [], False
        )


def scaled_log_probabilities(logits: np.ndarray, settings: Settings) -> np.ndarray:
    """acoustic_scale * (log-softmax(logits) - ln(blank_penalty) for the blank): float64 [frames,
    41], ln."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    log_probabilities = np.maximum(log_probabilities, _FLOOR)
    log_probabilities[:, _BLANK_ID] -= math.log(settings.blank_penalty)
    return settings.acoustic_scale * log_probabilities


def _read_description(folder: Path) -> dict[str, object]:
    hint = f"make one with `lm-server build --text FILE --out {folder}`"
    if not folder.is_dir():
        raise ModelFolderError(f"there is no model folder {folder}: {hint}")
    for name in ("lm.json", "lm.bin", "lexicon.txt"):
        if not (folder / name).is_file():
            raise ModelFolderError(f"{folder} is no model folder, {name} is missing in it: {hint}")
    try:
        description = json.loads((folder / "lm.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{folder}/lm.json cannot be read ({error}): {hint}") from error
    if not isinstance(description, dict):
        raise ModelFolderError(
            f"{folder}/lm.json holds a {type(description).__name__}; needed an object: {hint}"
        )
    found = description.get("format")
    if found != FORMAT:
        raise ModelFolderError(f"{folder} has format {found}; this version reads {FORMAT}: {hint}")
    for name in ("order", "words", "pronunciations"):
        if not isinstance(description.get(name), int):
            raise ModelFolderError(
                f"{folder}/lm.json has the {name} {description.get(name)!r}; "
                f"needed a whole number: {hint}"
            )
    return description


def _read_spellings(
    folder: Path, description: Mapping[str, object]
) -> tuple[list[str], dict[tuple[str, ...], list[int]]]:
    """`lexicon.txt` -> words, and for each pronunciation the indices of its words, as the file has
    them.

    Raises:
      ModelFolderError: a line is not as `lm-server build` writes it, or lines are missing.
    """
    path, remedy = folder / "lexicon.txt", "build the model again"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} cannot be read ({error}): {remedy}") from error
    phonemes = frozenset(PHONEMES)
    words: list[str] = []
    known: set[str] = set()
    spellings: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, line in enumerate(lines, 1):
        word, *phones = line.split() or [""]
        if not phones or not phonemes.issuperset(phones):
            raise ModelFolderError(
                f"{path}, line {number}, is {line!r}; needed a word and its phonemes: {remedy}"
            )
        if not words or words[-1] != word:
            if word in known:
                raise ModelFolderError(
                    f"{path}, line {number}, has the word {word!r} for a second time; needed all "
                    f"its pronunciations together: {remedy}"
                )
            known.add(word)
            words.append(word)
        spellings[tuple(phones)].append(len(words) - 1)
    for name, count in (("words", len(words)), ("pronunciations", len(lines))):
        if count != description[name]:
            raise ModelFolderError(
                f"{path} has {count} {name}, but lm.json says {description[name]}: it is damaged "
                f"or cut short: {remedy}"
            )
    return words, spellings
