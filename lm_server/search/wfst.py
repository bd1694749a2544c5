"""Kaldi's decoder on a published graph, `TLG.fst` with `words.txt`: the best sentence only.

The graph composes CTC's rules, the lexicon and the n-gram model. Its input labels are the classes
in the language model's order, counted from 1. Its output labels are the numbers in `words.txt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from lm_server.hypothesis import Hypothesis
from lm_server.lm.reader import ModelFolderError
from lm_server.search.emissions import Emissions
from lm_server.search.hot_words import HotWord
from lm_server.search.interface import (
    NO_FUSION,
    NO_HOT_WORDS,
    OWN_WIDTH,
    Backend,
    BackendError,
    next_frames,
)
from lm_server.settings import PRESET, Settings

# kaldifst and kaldi_decoder are imported late: BACKEND must be readable without them.
BACKEND = Backend(
    requires=("kaldifst", "kaldi_decoder"),
    install="install them from the checkout: pip install '.[wfst]' -c constraints.txt",
    # As the published decoder is run.
    defaults={"acoustic_scale": 0.325, "blank_penalty": 90.0, "beam": 17.0, "max_active": 7000},
    lacks={
        "max_classes": "it searches every class",
        "nbest": "it finds only the best sentence",
        "lattice_beam": "it finds only the best sentence",
        "minimum_bayes_risk": "it finds only the best sentence",
        "word_bonus": "its scores are those of the graph that it reads",
        PRESET: OWN_WIDTH,
        **NO_FUSION,
        "silence_penalty": "the graph that it reads defines where a silence may be missing",
    },
)

_NO_WORDS = frozenset({"<eps>", "<s>", "</s>"})
_DEMAND_SILENCE = 1000.0


def load(folder: Path) -> GraphModel:
    """Read a published model folder. See `lm_server.search.load.load_model`."""
    return GraphModel(folder)


class GraphModel:
    """A published model folder in memory, shared by any number of searches."""

    backend = "wfst"

    def __init__(self, folder: Path) -> None:
        """Read `TLG.fst` and `words.txt`.

        Raises:
          ModelFolderError: a file is missing or damaged.
        """
        import kaldifst

        self.folder = folder
        for name in ("TLG.fst", "words.txt"):
            if not (folder / name).is_file():
                raise ModelFolderError(
                    f"{folder} has no {name}; the search wfst needs a published model's folder: "
                    "use the one that holds TLG.fst, or the search flashlight with a folder "
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
                f"{folder}/TLG.fst is no graph that OpenFst reads: download or copy it again"
            )

    def search(
        self, settings: Settings, hot_words: Mapping[str, HotWord] = NO_HOT_WORDS
    ) -> GraphSearch:
        """Return a new search. See `lm_server.search.interface.SearchModel`."""
        if hot_words:
            raise BackendError(
                "the search wfst has no hot words, because its graph is fixed: import the model "
                "with `lm-server import-kaldi` and use the search flashlight"
            )
        return GraphSearch(self, settings)

    def words_of(self, labels: list[int]) -> tuple[str, ...]:
        """Return the words of output labels.

        Raises:
          ModelFolderError: a label is not in `words.txt`.
        """
        try:
            names = [self._names[label] for label in labels]
        except KeyError as error:
            raise ModelFolderError(
                f"{self.folder}/TLG.fst has the word {error}, which words.txt lacks: needed the "
                "words.txt of the same model"
            ) from error
        return tuple(name for name in names if _is_word(name))


class GraphSearch:
    """The search for one sentence after another. See `lm_server.search.interface.Search`."""

    def __init__(self, model: GraphModel, settings: Settings) -> None:
        self._model = model
        self._emissions = Emissions(settings)
        self.begin(settings)

    def begin(self, settings: Settings | None = None) -> None:
        """Start a sentence and drop the current one."""
        if settings is not None:
            from kaldi_decoder import FasterDecoder, FasterDecoderOptions

            self.settings = settings
            options = FasterDecoderOptions(
                beam=settings.beam,
                max_active=max(settings.max_active, 2),
                min_active=min(settings.min_active, max(settings.max_active, 2) - 1),
            )
            self._decoder = FasterDecoder(self._model.graph, options)
        # The graph defines which silences are optional.
        self._emissions.begin(replace(self.settings, silence_penalty=_DEMAND_SILENCE))
        self._decoder.init_decoding()
        self.frames = 0

    def step(self, logits: np.ndarray) -> tuple[str, ...]:
        """Search the next frames. Return the best words so far."""
        from kaldi_decoder import DecodableCtc

        logits = next_frames(logits, self.frames)
        if len(logits):
            emissions = np.ascontiguousarray(self._emissions.of(logits), np.float32)
            if len(emissions):
                done = self._decoder.num_frames_decoded()
                self._decoder.advance_decoding(DecodableCtc(emissions, done))
            self.frames += len(logits)
        best = self._best(final=False) if self.frames else None
        return best.words if best else ()

    def finish(self) -> tuple[Hypothesis, ...]:
        """End the sentence. Return the best one, or none if there were no frames."""
        best = self._best(final=True) if self.frames else None
        self.begin()
        return (best,) if best else ()

    def _best(self, final: bool) -> Hypothesis | None:
        import kaldifst

        found, path = self._decoder.get_best_path(use_final_probs=final)
        if not found:
            return None
        _, _, labels, weight = kaldifst.get_linear_symbol_sequence(path)
        acoustic = (self._emissions.skipped - weight.value2) / self.settings.acoustic_scale
        return Hypothesis(self._model.words_of(labels), acoustic, -weight.value1)


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
