"""Learns a class confusion (`lm_server.settings.confusion`) from sentences whose truth is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lm_server.files.logits_file import Logits
from lm_server.protocol import CLASS_COUNT, to_lm_order
from lm_server.search.emissions import log_probabilities
from lm_server.search.forced import Known, aligned
from lm_server.settings import Settings
from lm_server.settings.confusion import Confusion, of_matrix

_ROUNDS = 30
"""Rounds of expectation and maximisation, after which hardly anything moves."""
_KEPT = 10.0
"""Frames in which, so is assumed, every class stood for itself, besides those that were seen."""
_ANY = 0.01
"""Frames in which, so is assumed, every class stood for each other one."""


@dataclass(frozen=True)
class Aligned:
    """Frames of some trials whose classes are known.

    Attributes:
      log_probabilities: of each trial, without any confusion, float64 [frames, 41] (ln).
      said: the class of every frame of each trial, int64 [frames].
    """

    log_probabilities: tuple[np.ndarray, ...]
    said: tuple[np.ndarray, ...]


def align(
    known: Known,
    settings: Settings,
    logits: Logits,
    references: Sequence[tuple[str, ...]],
    trials: Sequence[int],
) -> Aligned:
    """Align some trials (indices) with their references, by the search's own rules.

    Those whose reference has an unknown word, or more phonemes than frames, are left out.
    """
    plain = dataclasses.replace(settings, confusion=None)
    pairs = []
    for trial in trials:
        if all(word in known for word in references[trial]):
            frames = to_lm_order(logits.of(trial))
            said = aligned(known, settings, frames, references[trial]) if len(frames) else None
            if said is not None:
                pairs.append((log_probabilities(frames, plain), said))
    return Aligned(tuple(one for one, _ in pairs), tuple(one for _, one in pairs))


def learn(*parts: Aligned) -> Confusion:
    """Return the confusion under which what was said is likeliest.

    The product over frames of (p @ M)[class said] is maximised by expectation and maximisation,
    with a Dirichlet prior that prefers the identity.
    """
    every = np.exp(np.concatenate([one for part in parts for one in part.log_probabilities]))
    classes = np.concatenate([one for part in parts for one in part.said])
    prior = _KEPT * np.eye(CLASS_COUNT) + _ANY
    matrix = np.full((CLASS_COUNT, CLASS_COUNT), 1.0 / CLASS_COUNT)
    for _ in range(_ROUNDS):
        meant = every * matrix[:, classes].T
        meant /= meant.sum(axis=1, keepdims=True)
        counts = prior.copy()
        for one in range(CLASS_COUNT):
            counts[:, one] += meant[classes == one].sum(axis=0)
        matrix = counts / counts.sum(axis=1, keepdims=True)
    return of_matrix(matrix)
