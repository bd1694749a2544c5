"""Causal normalisation of raw features: a log transform, then a rolling z-score.

The same function normalises a recorded trial as it is read and a chunk of bins as it arrives, so
that what a model is trained on is what it decodes. The window is exponential, with the mean age of
a window of that many seconds: all of its past is two numbers a channel, which one session hands to
the next. It costs no delay.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from b2txt_jax.config import SignalConfig
from b2txt_jax.errors import DAMAGED_ARRAYS, UserError
from lm_server.files.atomic_file import replacing

BIN_SECONDS = 0.02
_LEAST_DEVIATION = 1e-6
"""Relative to the mean, and absolute. What varies less is constant and becomes 0."""


class StatisticsError(UserError, ValueError):
    """A file of statistics that cannot be used."""


class Statistics(NamedTuple):
    """What is known of each channel, float64 [D]."""

    weight: np.ndarray
    """Share of the window that has been seen, 0 at a cold start, then up to 1."""
    first: np.ndarray
    """Weighted sum of the values. Divided by the weight it is their mean."""
    second: np.ndarray
    """Weighted sum of their squares."""


def cold(features: int) -> Statistics:
    """Return the statistics of channels of which nothing is known."""
    return Statistics(*np.zeros((3, features)))


def changes(signal: SignalConfig) -> bool:
    """Return whether the configuration normalises features at all."""
    return signal.log or signal.rolling_seconds > 0


def described(signal: SignalConfig) -> str:
    """Return in words what the model expects of features, for those who do not have this package.

    >>> from b2txt_jax.config import load_config
    >>> described(load_config("demo").signal)
    'z-score of each feature over the block of sentences'
    """
    if not changes(signal):
        return "z-score of each feature over the block of sentences"
    steps = ["sign(x) * ln(1 + |x|)"] if signal.log else []
    if signal.rolling_seconds > 0:
        clip = f", cut at {signal.rolling_clip:g}" if signal.rolling_clip > 0 else ""
        steps.append(
            "z-score of each feature by exponential averages in which the newest bin weighs "
            f"{_share(signal):.4g}{clip}"
        )
    return "of raw features: " + ", then ".join(steps)


def _share(signal: SignalConfig) -> float:
    """Return what the newest bin weighs in an average."""
    return 2 / (max(signal.rolling_seconds / BIN_SECONDS, 1) + 1)


def normalise(
    x: np.ndarray, before: Statistics, signal: SignalConfig
) -> tuple[np.ndarray, Statistics]:
    """Normalise the next bins of a recording: x [T, D] -> float32 [T, D], and the statistics after.

    A bin is normalised with its own past and itself. A NaN leaves the statistics of its channel
    alone and becomes 0, the mean, where there is a rolling z-score.
    """
    x = np.asarray(x, np.float64)
    if signal.log:
        x = np.sign(x) * np.log1p(np.abs(x))
    if signal.rolling_seconds == 0:
        return x.astype(np.float32), before
    share = _share(signal)
    missing = np.isnan(x)
    if missing.any():
        moments, after = _one_by_one(x, missing, before, share)
    else:
        ones = np.ones((len(x), 1))
        moments = np.stack(
            [
                _averaged(values, old, share)
                for values, old in zip((ones, x, x * x), before, strict=True)
            ]
        )
        after = Statistics(*moments[:, -1]) if len(x) else before
    weight = np.maximum(moments[0], np.finfo(float).tiny)
    mean = moments[1] / weight
    deviation = np.sqrt(np.maximum(moments[2] / weight - mean * mean, 0))
    varies = deviation > _LEAST_DEVIATION * (1 + np.abs(mean))
    z = np.where(varies & ~missing, (x - mean) / np.where(varies, deviation, 1), 0)
    if signal.rolling_clip > 0:
        z = np.clip(z, -signal.rolling_clip, signal.rolling_clip)
    return z.astype(np.float32), after


def _averaged(values: np.ndarray, old: np.ndarray, share: float) -> np.ndarray:
    """Return the exponential average after each bin: [T, D or 1] -> [T, D]."""
    values = np.broadcast_to(values, (len(values), len(old)))
    if not len(values):
        return values
    from scipy.signal import lfilter  # a third of the time that `b2txt train` takes to import

    return np.asarray(lfilter([share], [1, share - 1], values, 0, (1 - share) * old[None])[0])


def _one_by_one(
    x: np.ndarray, missing: np.ndarray, before: Statistics, share: float
) -> tuple[np.ndarray, Statistics]:
    """Return the moments after each bin, [3, T, D], and the last. Missing values add nothing."""
    now, moments = np.stack(before), np.empty((3, *x.shape))
    for bin_, (values, skip) in enumerate(zip(x, missing, strict=True)):
        new = (1 - share) * now + share * np.stack([np.ones_like(values), values, values**2])
        now = moments[:, bin_] = np.where(skip, now, new)
    return moments, Statistics(*now)


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write `mean`, `deviation` and `weight` of each channel, whole or not at all."""
    weight, first, second = statistics
    safe = np.where(weight > 0, weight, 1)
    mean = first / safe
    deviation = np.sqrt(np.maximum(second / safe - mean * mean, 0))
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, mean=mean, deviation=deviation, weight=weight)


def read_statistics(path: Path, features: int) -> Statistics:
    """Read what `write_statistics` wrote.

    Raises:
      StatisticsError: the file cannot be read, or is of another number of features.
    """
    try:
        with np.load(path) as file:
            mean, deviation, weight = (
                np.asarray(file[name], np.float64) for name in ("mean", "deviation", "weight")
            )
        fits = all(
            one.shape == (features,) and np.isfinite(one).all() for one in (mean, deviation, weight)
        )
    except DAMAGED_ARRAYS as error:
        raise StatisticsError(
            f"the statistics {path} cannot be read ({error}); needed a file that `b2txt stream` "
            "wrote: remove it for a cold start"
        ) from error
    if not fits:
        raise StatisticsError(
            f"the statistics {path} are of {mean.shape[0] if mean.ndim else 0} features or hold "
            f"NaN; needed finite numbers of {features}: remove the file for a cold start"
        )
    return Statistics(weight, mean * weight, (deviation**2 + mean**2) * weight)
