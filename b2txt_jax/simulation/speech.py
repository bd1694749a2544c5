"""Sentences as movements: phonemes -> durations -> articulatory trajectories in 20 ms bins.

`write.py` describes what is modelled and what is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from b2txt_jax.data.trial import frames_needed
from b2txt_jax.phonemes import PHONEME_IDS, SILENCE_ID
from lm_server.protocol import CLASS_COUNT

LATENTS: tuple[str, ...] = (
    *("labial", "dental", "alveolar", "palatal", "velar", "glottal"),
    *("stop", "fricative", "nasal", "approximant", "lateral", "rhotic"),
    *("voiced", "vowel", "high", "back", "rounded", "tense"),
    *("activity", "onset"),
)
"""Dimensions of a trajectory: place, manner and voicing of consonants, height, backness, rounding
and tenseness of vowels, whether speech is attempted, a pulse at the begin of each phoneme."""
LATENT_COUNT = len(LATENTS)
TUNED_COUNT = LATENT_COUNT - 2
"""The first `TUNED_COUNT` dimensions are articulatory. Activity and onset follow."""

PATCH_BINS, STRIDE_BINS = 14, 4
"""The published model's patches. Every trial is long enough for CTC with them."""

_PLACE = {
    "labial": "B P M F V W",
    "dental": "DH TH F V",
    "alveolar": "D T N S Z L R",
    "palatal": "CH JH SH ZH Y R",
    "velar": "G K NG W",
    "glottal": "HH",
}
_MANNER = {
    "stop": "B D G K P T CH JH",
    "fricative": "DH F HH S SH TH V Z ZH CH JH",
    "nasal": "M N NG",
    "approximant": "L R W Y",
    "lateral": "L",
    "rhotic": "R ER",
}
_VOICED = ("B", "D", "DH", "G", "JH", "L", "M", "N", "NG", "R", "V", "W", "Y", "Z", "ZH")
# Vowels as (high, back, rounded, tense), each -1..1; a diphthong glides to its second target.
_VOWELS: dict[str, tuple[tuple[float, ...], ...]] = {
    "AA": ((-1.0, 0.6, -0.5, 1.0),),
    "AE": ((-0.8, -0.8, -0.5, -0.5),),
    "AH": ((-0.2, 0.1, -0.5, -1.0),),
    "AO": ((-0.5, 0.9, 0.7, 0.6),),
    "AW": ((-1.0, 0.2, -0.5, 0.3), (0.8, 0.9, 1.0, -0.3)),
    "AY": ((-1.0, 0.2, -0.5, 0.3), (0.9, -0.9, -0.5, -0.3)),
    "EH": ((-0.3, -0.8, -0.5, -0.8),),
    "ER": ((0.0, 0.1, 0.3, 0.5),),
    "EY": ((0.1, -0.8, -0.5, 0.8), (0.8, -1.0, -0.5, 0.3)),
    "IH": ((0.6, -0.7, -0.5, -1.0),),
    "IY": ((1.0, -1.0, -0.5, 1.0),),
    "OW": ((0.0, 0.9, 0.7, 0.8), (0.8, 1.0, 1.0, 0.3)),
    "OY": ((-0.4, 1.0, 0.9, 0.4), (0.9, -0.9, -0.5, -0.3)),
    "UH": ((0.6, 0.7, 0.5, -1.0),),
    "UW": ((1.0, 1.0, 1.0, 1.0),),
}
# Mean durations in bins of attempted speech, which is far slower than natural speech.
_BINS = {"stop": 7.0, "fricative": 9.0, "nasal": 8.0, "approximant": 8.0}
_SHORT_VOWEL, _LONG_VOWEL, _DIPHTHONG, _PAUSE = 9.0, 12.0, 14.0, 9.0
_LEAD_BINS = (12, 25)
_DURATION_SPREAD = 0.25
_RATE_SPREAD = 0.12
_AMPLITUDE_SPREAD = 0.12
_COARTICULATION_BINS = 2.0


@dataclass(frozen=True)
class Articulation:
    """Per class: targets [41, 2, latents] at its begin and its end, mean duration in bins [41]."""

    targets: np.ndarray
    bins: np.ndarray


def articulation() -> Articulation:
    """Return the table of all 41 classes. Blank and silence are rest."""
    targets = np.zeros((CLASS_COUNT, 2, LATENT_COUNT), np.float32)
    bins = np.full(CLASS_COUNT, _PAUSE)
    column = {name: index for index, name in enumerate(LATENTS)}
    for table in (_PLACE, _MANNER):
        for latent, names in table.items():
            for name in names.split():
                targets[PHONEME_IDS[name], :, column[latent]] = 1.0
    for name, index in PHONEME_IDS.items():
        targets[index, :, column["activity"]] = 1.0
        if name in _VOWELS:
            targets[index, :, column["vowel"]] = 1.0
            targets[index, :, column["voiced"]] = 1.0
            glide = _VOWELS[name]
            first = column["high"]
            targets[index, 0, first : first + 4] = glide[0]
            targets[index, 1, first : first + 4] = glide[-1]
            tense = glide[0][3] > 0
            bins[index] = _DIPHTHONG if len(glide) == 2 else _LONG_VOWEL if tense else _SHORT_VOWEL
        else:
            targets[index, :, column["voiced"]] = 1.0 if name in _VOICED else -1.0
            kinds = [kind for kind in _BINS if name in _MANNER[kind].split()]
            bins[index] = max(_BINS[kind] for kind in kinds)
    # Affricates close, then release.
    for name in ("CH", "JH"):
        targets[PHONEME_IDS[name], 0, column["fricative"]] = 0.0
        targets[PHONEME_IDS[name], 1, column["stop"]] = 0.0
    return Articulation(targets, bins)


def smooth(values: np.ndarray, std: float) -> np.ndarray:
    """Smooth over the first axis with a Gaussian of `std` bins, zeros outside: [T, D] -> [T, D]."""
    reach = int(np.ceil(3 * std))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / std) ** 2)
    kernel /= kernel.sum()
    columns = [np.convolve(column, kernel, mode="full")[reach:-reach] for column in values.T]
    return np.stack(columns, axis=1)


def frames_of(bins: int) -> int:
    """Return the number of frames (patches of 14 bins, every 4 bins) in `bins` bins."""
    return max(0, (bins - PATCH_BINS) // STRIDE_BINS + 1)


def attempt(
    labels: np.ndarray, table: Articulation, speaking_rate: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw one attempt at a sentence.

    Args:
      labels: class ids [L], a silence after each word.
      table: from `articulation()`.
      speaking_rate: 1 is about 65 words per minute. Durations are divided by it.
      rng: source of this trial's tempo, durations and amplitude.

    Returns:
      Its trajectory [T, latents], with silence before and after. T is long enough for CTC with the
      published patches.
    """
    tempo = speaking_rate * np.exp(_RATE_SPREAD * rng.standard_normal())
    spread = np.exp(_DURATION_SPREAD * rng.standard_normal(len(labels)))
    lead_in, lead_out = rng.integers(*_LEAD_BINS, endpoint=True, size=2)
    wanted = table.bins[labels] * spread / tempo
    bins = np.maximum(2, np.rint(wanted)).astype(int)
    while frames_of(int(lead_in + bins.sum() + lead_out)) < frames_needed(labels):
        bins = np.ceil(bins * 1.1).astype(int)
    total = int(lead_in + bins.sum() + lead_out)
    owner = np.repeat(np.arange(len(labels)), bins)
    start = np.cumsum(bins) - bins
    within = ((np.arange(len(owner)) - start[owner] + 0.5) / bins[owner])[:, None]
    begin, end = table.targets[labels[owner], 0], table.targets[labels[owner], 1]
    trajectory = np.zeros((total, LATENT_COUNT), np.float32)
    trajectory[lead_in : lead_in + len(owner)] = begin + within * (end - begin)
    trajectory[lead_in + start[labels != SILENCE_ID], -1] = 3.0
    amplitude = np.exp(_AMPLITUDE_SPREAD * rng.standard_normal())
    # Coarticulation: articulators move before the last target is left.
    return (amplitude * smooth(trajectory, _COARTICULATION_BINS)).astype(np.float32)
