"""Movements as neural features: tuning of 4 x 64 electrodes, drift over days, noise, z-scores.

`write.py` describes what is modelled and what is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from b2txt_jax.simulation.speech import LATENT_COUNT, TUNED_COUNT, smooth

ELECTRODES = 64
ARRAYS: tuple[str, ...] = ("ventral 6v", "area 4", "55b", "dorsal 6v")
FEATURES = 2 * ELECTRODES * len(ARRAYS)
_CHANNELS = ELECTRODES * len(ARRAYS)
# Per array: strength of articulatory tuning, strength of activity and onset, lead in bins.
_TUNING = (1.0, 1.0, 0.45, 0.75)
_ACTIVITY = (0.6, 0.8, 0.9, 0.6)
_LEAD = (2, 1, 4, 2)
_TUNED_SHARE = 0.8  # of electrodes; the others record, but are not tuned to speech
_RATE_HZ = (4.0, 40.0)
_BIN_SECONDS = 0.02
_NOISE_SOURCES = 12
_NOISE_BINS = 2.0
_BASELINE_BINS = 150.0
_BURST_SOURCES = 4
_BURSTS_PER_SECOND = 0.5
_BURST_SECONDS = (0.3, 1.2)
_BURST_STRENGTH = 1.5


@dataclass(frozen=True)
class Tuning:
    """One day's electrodes: mixing [latents, 512] (threshold crossings, then spike band power).

    `rate` [256] is the baseline in counts per bin, `alive` [512] is 0 for dead channels, `noise`
    [sources, 512] is how shared noise reaches the features.
    """

    mixing: np.ndarray
    rate: np.ndarray
    alive: np.ndarray
    noise: np.ndarray


@dataclass(frozen=True)
class Drift:
    """What changes from one session to the next.

    Attributes:
      rotation: angle in radians by which articulatory tuning turns.
      renewal: share of each electrode's tuning that is replaced by tuning of its own.
      gain: spread of the change of each feature's strength (log).
      death: probability that an electrode dies.
    """

    rotation: float = 0.8
    renewal: float = 0.05
    gain: float = 0.15
    death: float = 0.01


def first_tuning(rng: np.random.Generator) -> Tuning:
    """Draw the electrodes of the first day."""
    crossings = _electrode_tuning(rng)
    # Spike band power sees the same neurons and some more from further away.
    power = 0.8 * crossings + 0.6 * _electrode_tuning(rng)
    low, high = np.log(_RATE_HZ)
    rate = np.exp(rng.uniform(low, high, _CHANNELS)) * _BIN_SECONDS
    noise = rng.standard_normal((_NOISE_SOURCES, FEATURES)) / np.sqrt(_NOISE_SOURCES)
    return Tuning(np.concatenate([crossings, power], axis=1), rate, np.ones(FEATURES), noise)


def next_tuning(tuning: Tuning, drift: Drift, rng: np.random.Generator) -> Tuning:
    """Return the same electrodes one session later."""
    rotated = tuning.mixing.copy()
    rotated[:TUNED_COUNT] = random_rotation(drift.rotation, rng) @ tuning.mixing[:TUNED_COUNT]
    own = np.concatenate([_electrode_tuning(rng), _electrode_tuning(rng)], axis=1)
    # Shares of variance, so that the strength of tuning stays the same.
    mixing = np.sqrt(1 - drift.renewal) * rotated + np.sqrt(drift.renewal) * own
    gain = np.exp(drift.gain * rng.standard_normal(FEATURES) - drift.gain**2 / 2)
    died = np.tile(rng.random(_CHANNELS) < drift.death, 2)
    offset = np.exp(drift.gain * rng.standard_normal(_CHANNELS))
    return Tuning(
        mixing * gain,
        np.clip(tuning.rate * offset, 0.02, 1.5),
        np.where(died, 0.0, tuning.alive),
        tuning.noise,
    )


def random_rotation(angle: float, rng: np.random.Generator) -> np.ndarray:
    """Draw an orthogonal matrix [tuned, tuned] that turns a vector by about `angle` radians."""
    square = rng.standard_normal((TUNED_COUNT, TUNED_COUNT)) / np.sqrt(2 * TUNED_COUNT)
    skew = angle * (square - square.T) / 2
    identity = np.eye(TUNED_COUNT)
    return np.linalg.solve(identity - skew, identity + skew)  # Cayley transform


def burst_patterns(rng: np.random.Generator) -> np.ndarray:
    """Draw the weights of each source of bursts on the features, [sources, 512].

    Channels of one array have similar weights.
    """
    common = np.repeat(rng.standard_normal((_BURST_SOURCES, len(ARRAYS))), ELECTRODES, axis=1)
    spread = 0.5 * rng.standard_normal((_BURST_SOURCES, FEATURES))
    patterns: np.ndarray = np.tile(common, 2) + spread
    return patterns


def bursts(bins: int, patterns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw movement-like bursts, float32 [bins, 512].

    They begin at random times (Poisson), last 0.3 to 1.2 s, mix the sources at random, and rise and
    fall as a half sine.
    """
    activity = np.zeros((bins, _BURST_SOURCES))
    for _ in range(rng.poisson(_BURSTS_PER_SECOND * bins * _BIN_SECONDS)):
        length = max(1, round(rng.uniform(*_BURST_SECONDS) / _BIN_SECONDS))
        start = int(rng.integers(-length, bins))
        mix = _BURST_STRENGTH * rng.standard_normal(_BURST_SOURCES) / np.sqrt(_BURST_SOURCES)
        shape = np.sin(np.pi * (np.arange(length) + 0.5) / length)[:, None] * mix
        first, last = max(start, 0), min(start + length, bins)
        activity[first:last] += shape[first - start : last - start]
    return (activity @ patterns).astype(np.float32)


def record(
    trajectories: list[np.ndarray],
    tuning: Tuning,
    strength: float,
    rng: np.random.Generator,
    bursts: np.ndarray | None = None,
) -> np.ndarray:
    """Return the raw features of one block's trials, one after the other, float32 [all bins, 512].

    Args:
      trajectories: per trial [T, latents].
      tuning: the day's electrodes.
      strength: depth of modulation against the noise (1 is moderate).
      rng: source of all noise of this block.
      bursts: further drive of the electrodes, [all bins, 512].
    """
    drive = _drive(trajectories, tuning) * np.float32(strength)
    bins = len(drive)
    shared = smooth(rng.standard_normal((bins, _NOISE_SOURCES)), _NOISE_BINS)
    shared /= shared.std(axis=0)
    knots = rng.standard_normal((int(bins / _BASELINE_BINS) + 2, FEATURES), dtype=np.float32)
    noise = (shared.astype(np.float32) @ tuning.noise.astype(np.float32)) * np.float32(0.3)
    noise += np.float32(0.15) * _baseline(knots, bins)
    drive += noise
    if bursts is not None:
        drive += bursts
    crossings, power = drive[:, :_CHANNELS], drive[:, _CHANNELS:]
    alive = tuning.alive[:_CHANNELS].astype(np.float32)
    # Rates saturate: a neuron does not fire without bound.
    rates = tuning.rate.astype(np.float32) * np.exp(1.5 * np.tanh(crossings / 1.5) * alive)
    features = np.empty((bins, FEATURES), np.float32)
    features[:, :_CHANNELS] = rng.poisson(rates)
    features[:, _CHANNELS:] = power * alive
    features[:, _CHANNELS:] += rng.standard_normal((bins, _CHANNELS), dtype=np.float32)
    return features


def written(features: np.ndarray, electrodes: int) -> np.ndarray:
    """Return the features of the first `electrodes` of each array: [bins, 512] -> [bins, D]."""
    by_array = features.reshape(len(features), 2, len(ARRAYS), ELECTRODES)
    return by_array[..., :electrodes].reshape(len(features), -1)


def z_score(features: np.ndarray) -> None:
    """Z-score features [bins, 512] over the bins, in place. One that never changes becomes 0."""
    mean, std = features.mean(axis=0), features.std(axis=0)
    features -= mean
    features /= np.where(std > 1e-6, std, 1.0)


def _electrode_tuning(rng: np.random.Generator) -> np.ndarray:
    """Draw independent tuning of each electrode [latents, 256], with the array's strength."""
    weights = rng.standard_normal((LATENT_COUNT, _CHANNELS)) / np.sqrt(6.0)
    weights *= rng.random(_CHANNELS) < _TUNED_SHARE
    weights[:TUNED_COUNT] *= np.repeat(_TUNING, ELECTRODES)
    weights[TUNED_COUNT:] *= np.repeat(_ACTIVITY, ELECTRODES)
    return weights


def _drive(trajectories: list[np.ndarray], tuning: Tuning) -> np.ndarray:
    """Return the drive of the electrodes, float32 [all bins, 512], leads included."""
    mixing = tuning.mixing.astype(np.float32)
    drive = np.empty((sum(len(t) for t in trajectories), FEATURES), np.float32)
    stacked = np.concatenate(trajectories)
    for array, lead in enumerate(_LEAD):
        # Silence around each trial is longer than any lead: no trial reaches its neighbour.
        ahead = np.concatenate([stacked[lead:], np.zeros((lead, LATENT_COUNT), np.float32)])
        for kind in (0, _CHANNELS):
            columns = slice(kind + array * ELECTRODES, kind + (array + 1) * ELECTRODES)
            drive[:, columns] = ahead @ mixing[:, columns]
    return drive


def _baseline(knots: np.ndarray, bins: int) -> np.ndarray:
    """Interpolate [bins, D] between random `knots`: a slowly wandering baseline."""
    place = np.arange(bins, dtype=np.float32) / np.float32(_BASELINE_BINS)
    left = place.astype(int)
    share = (place - left)[:, None]
    return knots[left] * (1 - share) + knots[left + 1] * share
