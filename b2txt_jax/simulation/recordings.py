"""The preset `recordings`: attempted speech fitted to what is published of the T15 recordings.

It shares phonemes, articulation and electrodes with the other preset. What differs:

- Speech is slow (30 words per minute), with seconds of silence before and after.
- A phoneme is a movement and a pattern of its own. Its signal is spread over time: electrodes
  follow what comes, what is and what was. Neighbouring phonemes colour each other, and no two
  attempts at a phoneme are the same.
- Noise is correlated over time (40 ms to seconds) and over channels. There are movements without
  speech, bursts and artefacts.
- Days differ mildly, more after a long break. They are of different quality.

docs/simulator.md compares the figures.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.signal import lfilter

from b2txt_jax.data.description import session_date
from b2txt_jax.phonemes import PHONEME_IDS, SILENCE_ID
from b2txt_jax.simulation.neural import ARRAYS, ELECTRODES, FEATURES, random_rotation
from b2txt_jax.simulation.plan import LATE
from b2txt_jax.simulation.speech import LATENT_COUNT, TUNED_COUNT, articulation
from lm_server.protocol import CLASS_COUNT

MOST_BINS = 2500
_MOST_SPOKEN = 2200

_CHANNELS = ELECTRODES * len(ARRAYS)
_BIN_SECONDS = 0.02

# Speech. Durations in bins: medians, and spreads of their logarithms.
_SLOWER = 1.95  # than the phonemes of the other preset
_PAUSE, _PAUSE_SPREAD = 28.0, 0.5
_DURATION_SPREAD = 0.35
_TEMPO_SPREAD = 0.18
_BEFORE, _BEFORE_SPREAD, _LEAST_BEFORE = 155.0, 0.3, 15
_AFTER, _AFTER_SPREAD, _LEAST_AFTER = 85.0, 0.3, 15
_COARTICULATION_BINS = 4.0
_IDENTITIES = 12  # dimensions in which each phoneme has a pattern of its own
_STATES = LATENT_COUNT + _IDENTITIES
_TOKEN_SPREAD = 0.45  # of one attempt at a phoneme, beside targets of about 1
_MOVEMENTS_PER_SECOND = 0.15  # without speech
_GAIN_SPREAD = 0.15  # of a trial, and again within it
_GAIN_BINS = 100.0

# Electrodes. What is to come, what is, what was: shift in bins, width, strength.
_VIEWS = ((8, 6.0, 0.5), (0, 1.5, 1.0), (-8, 6.0, 0.5))
_ARRAY_TUNING = (1.0, 1.0, 0.45, 0.75)
_ARRAY_ACTIVITY = (0.6, 0.8, 0.9, 0.6)
_TUNED_SHARE = 0.8
_RATE_HZ = (4.0, 40.0)
# Shared noise: time constants in bins of eight sources each, half of them of single arrays.
_NOISE_BINS = (2.0, 10.0, 60.0)
_SOURCES = 24
_NOISE = 0.65
_WANDER, _WANDER_BINS = 0.3, 400.0
_KNOTS = 160  # of a block, at least its bins / 400
_BURSTS_PER_SECOND, _BURST_BINS, _BURST = 0.1, (10, 75), 1.5
_ARTEFACTS_PER_SECOND, _ARTEFACT_BINS, _ARTEFACT = 0.03, (1, 6), 4.0
_POWER_SPREAD, _POWER_LIMIT = 0.3, 8.0  # of the logarithm, of the ratio to the baseline

# Days. Shares of each electrode's tuning that are renewed per session, per year, of one day alone.
_RENEWED, _RENEWED_A_YEAR, _DAY_ALONE = 0.01, 1.0, 0.06
_ROTATION = 0.4
_GAIN, _DEATH = 0.12, 0.002
_STRENGTH = 0.9  # beside that of the other preset
_QUALITY_SPREAD, _LATE_QUALITY = 0.3, 0.7


@dataclass(frozen=True)
class Participant:
    """What stays: targets of each class at its begin and end, and its duration in bins."""

    targets: np.ndarray  # float32 [41, 2, states]
    bins: np.ndarray  # [41]
    patterns: np.ndarray  # float32 [bursts, 512]


@dataclass(frozen=True)
class Day:
    """One session's electrodes: threshold crossings, then spike band power."""

    mixing: np.ndarray  # float32 [views x states, 512]
    rate: np.ndarray  # float32 [256], counts per bin
    alive: np.ndarray  # float32 [512], 0: dead
    noise: np.ndarray  # float32 [sources, 512]
    quality: float  # of the modulation by speech


def participant(rng: np.random.Generator) -> Participant:
    """Draw one participant."""
    table = articulation()
    targets = np.zeros((CLASS_COUNT, 2, _STATES), np.float32)
    targets[:, :, :LATENT_COUNT] = table.targets
    own = rng.standard_normal((CLASS_COUNT, 1, _IDENTITIES)) * 0.7
    spoken = list(PHONEME_IDS.values())
    targets[spoken, :, LATENT_COUNT:] = own[spoken]
    bins = table.bins * _SLOWER
    bins[SILENCE_ID] = _PAUSE
    common = np.repeat(rng.standard_normal((8, len(ARRAYS))), ELECTRODES, axis=1)
    patterns = np.tile(common, 2) + 0.5 * rng.standard_normal((8, FEATURES))
    return Participant(targets, bins, patterns.astype(np.float32))


def first_day(rng: np.random.Generator) -> Day:
    """Draw the electrodes as they were implanted. Quality is 1."""
    crossings = _tuning(rng)
    # Spike band power sees the same neurons and some more from further away.
    power = 0.8 * crossings + 0.6 * _tuning(rng)
    low, high = np.log(_RATE_HZ)
    rate = np.exp(rng.uniform(low, high, _CHANNELS)) * _BIN_SECONDS
    noise = rng.standard_normal((_SOURCES, FEATURES))
    arrays = np.tile(np.repeat(np.arange(len(ARRAYS)), ELECTRODES), 2)
    source = np.arange(_SOURCES) % 8
    noise[(source[:, None] >= 4) & (source[:, None] - 4 != arrays)] = 0
    noise /= np.linalg.norm(noise, axis=0)
    return Day(
        np.concatenate([crossings, power], axis=1).astype(np.float32),
        rate.astype(np.float32),
        np.ones(FEATURES, np.float32),
        noise.astype(np.float32),
        1.0,
    )


def days(
    sessions: Sequence[str], drift: float, rng_of: Callable[[str, int], np.random.Generator]
) -> list[Day]:
    """Return the electrodes of each session.

    Slow changes add up from session to session, with the time between them. Each session differs a
    little from that course.

    Args:
      sessions: names, from the first one.
      drift: factor of all changes.
      rng_of: returns randomness by purpose and index of the session.
    """
    course = first_day(rng_of("tuning", 0))
    found: list[Day] = []
    before: datetime.date | None = None
    for index, session in enumerate(sessions):
        date = datetime.date.fromisoformat(session_date(session))
        if before is not None:
            rng = rng_of("drift", index)
            years = (date - before).days / 365
            course = _changed(course, drift * (_RENEWED + _RENEWED_A_YEAR * years), rng)
            died = rng.random(_CHANNELS) < drift * _DEATH
            alive = np.where(np.tile(died, 2), np.float32(0), course.alive)
            course = Day(course.mixing, course.rate, alive, course.noise, 1.0)
        before = date
        rng = rng_of("day", index)
        today = _apart(course, drift, rng)
        quality = float(np.exp(_QUALITY_SPREAD * rng.standard_normal()))
        if index >= LATE:
            quality *= _LATE_QUALITY
        found.append(dataclasses.replace(today, quality=quality))
    return found


def next_day(day: Day, drift: float, rng: np.random.Generator) -> Day:
    """Return the electrodes after `drift` times the change to a day soon after, at equal quality.

    With one seed, growing values of `drift` lie on a path without jumps.
    """
    return _apart(_changed(day, drift * _RENEWED, rng), drift, rng)


def attempt(
    labels: np.ndarray, person: Participant, speaking_rate: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw one attempt at a sentence: its trajectory, float32 [T, states], T at most 2,500.

    Args:
      labels: class ids [L], a silence after each word. The last one is part of the silence after.
      person: whose speech it is.
      speaking_rate: 1 is about 30 words per minute. All durations are divided by it.
      rng: source of this trial.
    """
    spoken = labels[:-1]
    spread = np.where(spoken == SILENCE_ID, _PAUSE_SPREAD, _DURATION_SPREAD)
    lengths = person.bins[spoken] * np.exp(spread * rng.standard_normal(len(spoken)))
    edges = np.array([_BEFORE, _AFTER]) * np.exp(
        np.array([_BEFORE_SPREAD, _AFTER_SPREAD]) * rng.standard_normal(2)
    )
    tempo = speaking_rate * np.exp(_TEMPO_SPREAD * rng.standard_normal())
    lengths, edges = lengths / tempo, edges / speaking_rate
    # Two frames per label are enough for CTC, also where labels repeat.
    bins = np.maximum(9, np.rint(lengths * min(1.0, _MOST_SPOKEN / max(lengths.sum(), 1)))).astype(
        int
    )
    before, after = np.maximum((_LEAST_BEFORE, _LEAST_AFTER), np.rint(edges)).astype(int)
    before = min(before, MOST_BINS - _LEAST_AFTER - int(bins.sum()))
    total = min(int(before + bins.sum() + after), MOST_BINS)
    owner = np.repeat(np.arange(len(spoken)), bins)
    start = np.cumsum(bins) - bins
    within = ((np.arange(len(owner)) - start[owner] + 0.5) / bins[owner])[:, None]
    begin, end = person.targets[spoken[owner], 0], person.targets[spoken[owner], 1]
    token = _TOKEN_SPREAD * rng.standard_normal((len(spoken), _STATES))
    token[spoken == SILENCE_ID] = 0
    token[:, TUNED_COUNT:LATENT_COUNT] *= 0.5
    trajectory = np.zeros((total, _STATES), np.float32)
    trajectory[before : before + len(owner)] = begin + within * (end - begin) + token[owner]
    trajectory[before + start[spoken != SILENCE_ID], LATENT_COUNT - 1] = 6.0
    _add_movements(trajectory, rng)
    gain = np.exp(_GAIN_SPREAD * (rng.standard_normal() + _wandering(total, 1, _GAIN_BINS, rng)))
    smoothed: np.ndarray = gaussian_filter1d(
        trajectory, _COARTICULATION_BINS, axis=0, mode="constant"
    )
    return smoothed * gain


def record_block(
    labels: Sequence[np.ndarray],
    day: Day,
    strength: float,
    speaking_rate: float,
    bursts: float,
    place: tuple[int, int],
    rng_of: Callable[..., np.random.Generator],
) -> list[np.ndarray]:
    """Return the raw features of a block's trials, float32 [T, 512]: counts, then power.

    Args:
      labels: of each sentence.
      day: the electrodes.
      strength: of the modulation by speech against the noise.
      speaking_rate: of all attempts.
      bursts: strength of bursts and artefacts.
      place: index of the session, number of the block.
      rng_of: returns randomness by purpose and numbers.
    """
    person = participant(rng_of("participant"))
    mixing = day.mixing * np.float32(_STRENGTH * strength * day.quality)
    trials, bins = [], 0
    knots = rng_of("baselines", *place).standard_normal((_KNOTS, FEATURES), dtype=np.float32)
    for trial, sentence in enumerate(labels):
        trajectory = attempt(sentence, person, speaking_rate, rng_of("attempt", *place, trial))
        rng = rng_of("noise", *place, trial)
        views = [_shifted(trajectory, shift, width) for shift, width, _ in _VIEWS]
        drive = np.concatenate(views, axis=1) @ mixing
        drive += _shared_noise(len(drive), rng) @ (day.noise * np.float32(_NOISE))
        drive += _baseline(knots, bins, len(drive))
        if bursts:
            timing = rng_of("bursts", *place, trial)
            drive += np.float32(bursts) * _bursts(len(drive), person.patterns, timing)
        drive *= day.alive
        trials.append(_fired(drive, day.rate, rng))
        bins += len(drive)
    return trials


def _fired(drive: np.ndarray, rate: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return counts and power of the electrodes, float32 [T, 512]. Changes `drive`."""
    # Rates saturate: a neuron does not fire without bound.
    counts = rng.poisson(rate * np.exp(1.5 * np.tanh(drive[:, :_CHANNELS] / 1.5)))
    power = drive[:, _CHANNELS:]
    power += rng.standard_normal(power.shape, dtype=np.float32)
    power = np.minimum(np.exp(np.float32(_POWER_SPREAD) * power), np.float32(_POWER_LIMIT))
    return np.concatenate([counts.astype(np.float32), power], axis=1)


def _baseline(knots: np.ndarray, first: int, bins: int) -> np.ndarray:
    """Return how the baselines wander from bin `first` of a block on, float32 [bins, 512]."""
    place = np.arange(first, first + bins, dtype=np.float32) / np.float32(_WANDER_BINS)
    left = place.astype(int)
    share = (place - left)[:, None]
    left %= _KNOTS - 1
    changes: np.ndarray = knots[left] * (1 - share) + knots[left + 1] * share
    return np.float32(_WANDER) * changes


def _tuning(rng: np.random.Generator) -> np.ndarray:
    """Draw the tuning of each electrode, [views x states, 256]."""
    now = rng.standard_normal((_STATES, _CHANNELS))
    views = []
    for shift, _, strength in _VIEWS:
        # An electrode that follows a movement follows it before and after, too, in its own way.
        view = now if shift == 0 else 0.6 * now + 0.8 * rng.standard_normal(now.shape)
        weights = strength * view / np.sqrt(10.0)
        articulatory = np.ones(_STATES, bool)
        articulatory[TUNED_COUNT:LATENT_COUNT] = False
        weights[articulatory] *= np.repeat(_ARRAY_TUNING, ELECTRODES)
        weights[~articulatory] *= np.repeat(_ARRAY_ACTIVITY, ELECTRODES)
        views.append(weights)
    return np.concatenate(views) * (rng.random(_CHANNELS) < _TUNED_SHARE)


def _apart(course: Day, drift: float, rng: np.random.Generator) -> Day:
    """Return a day that differs a little from the course of all days."""
    today = _changed(course, drift * _DAY_ALONE, rng)
    mixing = _rotated(today.mixing, drift * _ROTATION, rng)
    gain = np.exp(drift * _GAIN * rng.standard_normal(FEATURES)).astype(np.float32)
    offset = np.exp(drift * _GAIN * rng.standard_normal(_CHANNELS)).astype(np.float32)
    rate = np.clip(today.rate * offset, 0.02, 1.5)
    return dataclasses.replace(today, mixing=mixing * gain, rate=rate)


def _changed(day: Day, amount: float, rng: np.random.Generator) -> Day:
    """Renew a share 1 - exp(-amount) of the variance of each electrode's tuning and noise."""
    kept = np.exp(-amount)
    crossings, noise = _tuning(rng), rng.standard_normal(day.noise.shape)
    own = np.concatenate([crossings, 0.8 * crossings + 0.6 * _tuning(rng)], axis=1)
    noise /= np.linalg.norm(noise, axis=0)
    old, new = np.float32(np.sqrt(kept)), np.float32(np.sqrt(1 - kept))
    return Day(
        old * day.mixing + new * own.astype(np.float32),
        day.rate,
        day.alive,
        old * day.noise + new * noise.astype(np.float32),
        day.quality,
    )


def _rotated(mixing: np.ndarray, angle: float, rng: np.random.Generator) -> np.ndarray:
    """Turn the articulatory part of all electrodes' tuning, the same for all views."""
    rotation = random_rotation(angle, rng).astype(np.float32)
    turned = mixing.reshape(len(_VIEWS), _STATES, FEATURES).copy()
    turned[:, :TUNED_COUNT] = np.einsum("ij,vjf->vif", rotation, turned[:, :TUNED_COUNT])
    return turned.reshape(mixing.shape)


def _add_movements(trajectory: np.ndarray, rng: np.random.Generator) -> None:
    """Add movements of the articulators without speech: swallowing, breathing, restlessness."""
    bins = len(trajectory)
    for _ in range(rng.poisson(_MOVEMENTS_PER_SECOND * bins * _BIN_SECONDS)):
        first = int(rng.integers(0, bins))
        length = int(rng.integers(10, 50))
        pattern = 0.7 * rng.standard_normal(TUNED_COUNT).astype(np.float32)
        shape = np.sin(np.pi * (np.arange(length) + 0.5) / length).astype(np.float32)
        part = trajectory[first : first + length, :TUNED_COUNT]
        part += shape[: len(part), None] * pattern


def _shifted(trajectory: np.ndarray, shift: int, width: float) -> np.ndarray:
    """Return what is `shift` bins ahead, blurred by `width` bins."""
    blurred: np.ndarray = gaussian_filter1d(trajectory, width, axis=0, mode="constant")
    if not shift:
        return blurred
    moved = np.zeros_like(blurred)
    if shift > 0:
        moved[:-shift] = blurred[shift:]
    else:
        moved[-shift:] = blurred[:shift]
    return moved


def _wandering(bins: int, count: int, constant: float, rng: np.random.Generator) -> np.ndarray:
    """Draw first-order autoregressive noise of unit variance, float32 [bins, count]."""
    keep = float(np.exp(-1 / constant))
    start = keep * rng.standard_normal((1, count))
    white = np.sqrt(1 - keep**2) * rng.standard_normal((bins, count))
    values, _ = lfilter([1.0], [1.0, -keep], white, axis=0, zi=start)
    return np.asarray(values, np.float32)


def _shared_noise(bins: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the sources of shared noise, float32 [bins, sources]."""
    count = _SOURCES // len(_NOISE_BINS)
    return np.concatenate([_wandering(bins, count, c, rng) for c in _NOISE_BINS], axis=1)


def _bursts(bins: int, patterns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw bursts that rise and fall, and artefacts of a few bins on one array, [bins, 512]."""
    activity = np.zeros((bins, len(patterns)), np.float32)
    for _ in range(rng.poisson(_BURSTS_PER_SECOND * bins * _BIN_SECONDS)):
        length = int(rng.integers(*_BURST_BINS))
        first = int(rng.integers(0, bins))
        mix = _BURST * rng.standard_normal(len(patterns)) / np.sqrt(len(patterns))
        shape = np.sin(np.pi * (np.arange(length) + 0.5) / length)[:, None] * mix
        activity[first : first + length] += shape[: bins - first]
    drive: np.ndarray = activity @ patterns
    for _ in range(rng.poisson(_ARTEFACTS_PER_SECOND * bins * _BIN_SECONDS)):
        first, length = int(rng.integers(0, bins)), int(rng.integers(*_ARTEFACT_BINS))
        array = ELECTRODES * int(rng.integers(len(ARRAYS)))
        for kind in (0, _CHANNELS):
            drive[first : first + length, kind + array : kind + array + ELECTRODES] += _ARTEFACT
    return drive
