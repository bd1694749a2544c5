"""Logits -> emissions, which a search sums: scaled log-probabilities, mixed by a class confusion if
there is one. A blank may replace a silence, and frames that are almost certainly blank are left
out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lm_server.protocol import LM_CLASSES, SILENCE
from lm_server.settings import LIMITS, Settings
from lm_server.settings.confusion import mixed

BLANK_ID = 0
SILENCE_ID = LM_CLASSES.index(SILENCE)
FLOOR = -1e3
"""Least log-probability of a class (ln), before the acoustic scale."""


def scaled_log_probabilities(logits: np.ndarray, settings: Settings) -> np.ndarray:
    """Return acoustic_scale * (log-softmax(logits), less ln(blank_penalty) for the blank): float64
    [frames, 41], ln."""
    return _scaled(log_probabilities(logits, settings), settings)


def log_probabilities(logits: np.ndarray, settings: Settings) -> np.ndarray:
    """Return log-softmax(logits), mixed by the settings' class confusion: float64 [frames, 41], ln.

    The one place where the confusion is applied.
    """
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True)
    found = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    if settings.confusion is not None:
        found = mixed(found, settings.confusion.matrix)
    return np.maximum(found, FLOOR)


def _scaled(of_classes: np.ndarray, settings: Settings) -> np.ndarray:
    scaled = settings.acoustic_scale * of_classes
    scaled[:, BLANK_ID] -= settings.acoustic_scale * math.log(settings.blank_penalty)
    return scaled


@dataclass
class Emissions:
    """Emissions of one sentence after another, chunk by chunk.

    Attributes:
      settings: those of the current sentence.
      skipped: score of the frames left out so far, each as blank (ln, with the acoustic scale).
    """

    settings: Settings
    skipped: float = 0.0
    _after_blank: bool = False

    def begin(self, settings: Settings) -> None:
        """Start a sentence."""
        self.settings = settings
        self.skipped = 0.0
        self._after_blank = False

    def of(self, logits: np.ndarray) -> np.ndarray:
        """Return emissions [searched frames, 41] of logits [frames, 41] in the language model's
        order: float64, ln.

        A silence costs at most `silence_penalty` more than the blank, and at most thrice that more
        than the likeliest class, whatever the acoustic scale. Where the logits lack the silence
        between two words, a blank completes the first word, or else a spare frame of a phoneme.
        """
        settings = self.settings
        of_classes = log_probabilities(logits, settings)
        scaled = _scaled(of_classes, settings)
        never = settings.silence_penalty == LIMITS["silence_penalty"][1]
        penalty = math.inf if never else settings.silence_penalty
        instead = np.maximum(scaled[:, BLANK_ID], scaled.max(axis=1, initial=-np.inf) - 2 * penalty)
        scaled[:, SILENCE_ID] = np.maximum(scaled[:, SILENCE_ID], instead - penalty)
        if settings.ctc_blank_skip_threshold >= 1.0 or not len(scaled):
            return scaled
        blank = of_classes[:, BLANK_ID] > math.log(settings.ctc_blank_skip_threshold)
        left_out = blank & np.concatenate([[self._after_blank], blank[:-1]])
        self._after_blank = bool(blank[-1])
        self.skipped += float(scaled[left_out, BLANK_ID].sum())
        return scaled[~left_out]
