"""The English sentences of the package: pools for simulated sessions, text for a language model.

Sources: WordNet 3.0 (example sentences and glosses) and the World English Bible; licences and
changes stand in `corpus/NOTICE` beside the files. `scripts/make_corpus.py` writes the files. No
sentence, in its normalised form, is in two of the pools, and none of the pools' sentences is a line
of the language model's text.
"""

from __future__ import annotations

import functools
import importlib.resources
import lzma
from typing import Literal

WORDNET_EXAMPLES = "WordNet examples"
WORDNET_GLOSSES = "WordNet glosses"
WORLD_ENGLISH_BIBLE = "World English Bible"
CORPORA: tuple[str, ...] = (WORDNET_EXAMPLES, WORDNET_GLOSSES, WORLD_ENGLISH_BIBLE)
"""Names of the corpora, as they stand in the description CSV of simulated sessions."""

Pool = Literal["train", "val", "test"]


@functools.cache
def load_pool(name: Pool) -> list[tuple[str, str]]:
    """The sentences that sessions of split `name` are made of: (sentence, corpus name).

    They come in a fixed, shuffled order, have 3-12 words, and every word of their normalised form
    is in the CMU dictionary.
    """
    lines = _read(f"{name}.txt.xz")
    pairs = []
    for line in lines:
        corpus, sentence = line.split("\t", 1)
        pairs.append((sentence, CORPORA[int(corpus)]))
    return pairs


def language_model_text() -> list[str]:
    """Normalised sentences of the same sources for a language model, none of them in a pool.

    Lines that hold a whole val or test sentence of four words or more are left out too. Words need
    not be in the CMU dictionary.
    """
    return _read("language_model.txt.xz")


def _read(name: str) -> list[str]:
    resource = importlib.resources.files("b2txt_jax.simulate") / "corpus" / name
    return lzma.decompress(resource.read_bytes()).decode().splitlines()
