"""Logits that speak a sentence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from b2txt_jax.phonemes import sentence_to_ids


def logits_of(words: Sequence[str]) -> np.ndarray:
    """Logits whose greedy decoding is the words' phonemes: each phoneme, then a blank."""
    ids = [index for phoneme in sentence_to_ids(words) for index in (phoneme, 0)]
    return 9 * np.eye(41, dtype=np.float32)[ids]
