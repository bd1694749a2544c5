"""Kaldi's decoder on a published graph, `TLG.fst` with its `words.txt`: the best sentence only.

The graph holds CTC's rules, the lexicon and the n-gram model. Its input labels are the classes in
the language model's order, counted from 1; its output labels are the numbers in `words.txt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import kaldifst
import numpy as np
from kaldi_decoder import DecodableCtc, FasterDecoder, FasterDecoderOptions

from lm_server.hypothesis import Hypothesis
from lm_server.lm.reader import ModelFolderError
from lm_server.protocol import ProtocolError, check_logits
from lm_server.search.emissions import Emissions
from lm_server.search.flashlight import MAX_UTTERANCE_FRAMES
from lm_server.search.hot_words import HotWord
from lm_server.search.interface import NO_HOT_WORDS, BackendError
from lm_server.settings import Settings

_NO_WORDS = frozenset({"<eps>", "<s>", "</s>"})
_DEMAND_SILENCE = 1000.0


class GraphModel:
    """A published model folder in memory; shared by any number of searches."""

    backend = "wfst"

    def __init__(self, folder: Path) -> None:
        """Reads `TLG.fst` and `words.txt`.

        Raises:
          ModelFolderError: a file is missing or damaged.
        """
        self.folder = folder
        for name in ("TLG.fst", "words.txt"):
            if not (folder / name).is_file():
                raise ModelFolderError(
                    f"{folder} has no {name}; the search wfst needs a published model's folder: "
                    "give the one that holds TLG.fst, or take the search flashlight with a folder "
                    "of `lm-server build` or `lm-server import-kaldi`"
                )
        self._names = _read_words(folder / "words.txt")
        self.words = [word for word in self._names.values() if _is_word(word)]
        try:
            self.graph = kaldifst.StdFst.read(str(folder / "TLG.fst"))
        except RuntimeError as error:
            raise ModelFolderError(f"{folder}/TLG.fst cannot be read ({error})") from error
        if self.graph is None:
            raise ModelFolderError(
                f"{folder}/TLG.fst is no graph that OpenFst reads: fetch or copy it again"
            )

    def search(
        self, settings: Settings, hot_words: Mapping[str, HotWord] = NO_HOT_WORDS
    ) -> GraphSearch:
        """A new search; see `lm_server.search.interface.SearchModel`."""
        if hot_words:
            raise BackendError(
                "the search wfst has no hot words, because its graph is fixed: import the model "
                "with `lm-server import-kaldi` and take the search flashlight"
            )
        return GraphSearch(self, settings)

    def spoken(self, labels: list[int]) -> tuple[str, ...]:
        """Output labels -> words.

        Raises:
          ModelFolderError: a label is not in `words.txt`.
        """
        try:
            names = [self._names[label] for label in labels]
        except KeyError as error:
            raise ModelFolderError(
                f"{self.folder}/TLG.fst has the word {error}, which words.txt lacks: the two are "
                "not of one model"
            ) from error
        return tuple(name for name in names if _is_word(name))


class GraphSearch:
    """The search for one sentence after another; see `lm_server.search.interface.Search`."""

    def __init__(self, model: GraphModel, settings: Settings) -> None:
        self._model = model
        self._emissions = Emissions(settings)
        self.begin(settings)

    def begin(self, settings: Settings | None = None) -> None:
        """Starts a sentence, dropping the one under way."""
        if settings is not None:
            self.settings = settings
            options = FasterDecoderOptions(
                beam=settings.beam,
                max_active=max(settings.max_active, 2),
                min_active=min(settings.min_active, max(settings.max_active, 2) - 1),
            )
            self._decoder = FasterDecoder(self._model.graph, options)
        # Which silences are optional is written in the graph.
        self._emissions.begin(replace(self.settings, silence_penalty=_DEMAND_SILENCE))
        self._decoder.init_decoding()
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
            emissions = np.ascontiguousarray(self._emissions.of(logits), np.float32)
            if len(emissions):
                done = self._decoder.num_frames_decoded()
                self._decoder.advance_decoding(DecodableCtc(emissions, done))
            self.frames += len(logits)
        best = self._best(final=False) if self.frames else None
        return best.words if best else ()

    def finish(self) -> tuple[Hypothesis, ...]:
        """Ends the sentence: the best one, or none without frames."""
        best = self._best(final=True) if self.frames else None
        self.begin()
        return (best,) if best else ()

    def _best(self, final: bool) -> Hypothesis | None:
        found, path = self._decoder.get_best_path(use_final_probs=final)
        if not found:
            return None
        _, _, labels, weight = kaldifst.get_linear_symbol_sequence(path)
        acoustic = (self._emissions.skipped - weight.value2) / self.settings.acoustic_scale
        return Hypothesis(self._model.spoken(labels), acoustic, -weight.value1)


def _is_word(name: str) -> bool:
    return name not in _NO_WORDS and not name.startswith("#")


def _read_words(path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            word, _, label = line.rpartition(" ")
            if not word or not label.isdigit():
                raise ModelFolderError(
                    f"{path}, line {number}, is {line!r}; needed a word and its number"
                )
            names[int(label)] = word.strip().lower()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} cannot be read ({error})") from error
    return names
