"""The English sentences of the package: pools for simulated sessions, text for a language model.

Sources: WordNet 3.0 (example sentences and glosses) and the World English Bible. `corpus/NOTICE`
has their licences and the changes. `scripts/make_corpus.py` writes the files. No
normalised sentence is in two pools, and no sentence of a pool is a line of the language model's
text.
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
"""Names of the corpora in the description CSV of simulated sessions."""

Pool = Literal["train", "val", "test"]


@functools.cache
def load_pool(name: Pool) -> list[tuple[str, str]]:
    """Return the sentences for split `name`: (sentence, corpus name).

    Their order is fixed and shuffled. They have 3-12 words, all of which are in the CMU dictionary.
    """
    pairs = (line.split("\t", 1) for line in _read(f"{name}.txt.xz"))
    return [(sentence, CORPORA[int(corpus)]) for corpus, sentence in pairs]


def language_model_text() -> list[str]:
    """Return normalised sentences of the same sources for a language model, none of them in a pool.

    Lines that contain a whole val or test sentence of four words or more are left out too. Words
    may be missing in the CMU dictionary.
    """
    return _read("language_model.txt.xz")


def _read(name: str) -> list[str]:
    resource = importlib.resources.files("b2txt_jax.simulation") / "corpus" / name
    return lzma.decompress(resource.read_bytes()).decode().splitlines()
