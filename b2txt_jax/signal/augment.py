"""Augmentation of training features: the published noise in its order (NEJM reference, section 4),
and masks.

An augmentation is a pure function (key, features [B, T, D], bins [B]) -> (features, bins) of the
same shapes. `signal.augment` lists them in order: those below by name, others as
`package.module:function` or `package.module:function(setting=value)`.

Those below also take rows of several trials, then with bins [B, S] and `segments`. Their draws are
a function of the key and of a bin's trial and place in it.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from b2txt_jax.config import ConfigError, SignalConfig, imported
from b2txt_jax.segments import (
    Segments,
    inside,
    labels,
    normal,
    owner,
    places,
    spread,
    whole,
    words,
)

Augmented = tuple[jax.Array, jax.Array]
Augmentation = Callable[[jax.Array, jax.Array, jax.Array], Augmented]


def static_gain(
    key: jax.Array, x: jax.Array, bins: jax.Array, std: float, segments: Segments | None = None
) -> Augmented:
    """Mix the channels by a random matrix near the identity, one per trial. Rows of several trials
    are not taken (see `takes_segments`)."""
    noise = jax.random.normal(key, (x.shape[0], x.shape[2], x.shape[2]), x.dtype)
    return x + jnp.einsum("btd,bdk->btk", x, std * noise), bins


def _noise(key: jax.Array, x: jax.Array, segments: Segments | None) -> jax.Array:
    label = labels(segments or whole(x.shape[0]), x.shape[1])
    return normal(key, label, x.shape[2]).astype(x.dtype)


def white_noise(
    key: jax.Array, x: jax.Array, bins: jax.Array, std: float, segments: Segments | None = None
) -> Augmented:
    """Add noise to every value."""
    return x + std * _noise(key, x, segments), bins


def constant_offset(
    key: jax.Array, x: jax.Array, bins: jax.Array, std: float, segments: Segments | None = None
) -> Augmented:
    """Add an offset per trial and channel."""
    segments = segments or whole(x.shape[0])
    offset = normal(key, segments.trial, x.shape[2]).astype(x.dtype)
    return x + std * spread(offset, owner(segments, x.shape[1])), bins


def random_walk(
    key: jax.Array, x: jax.Array, bins: jax.Array, std: float, segments: Segments | None = None
) -> Augmented:
    """Add a random walk over channels.

    NEJM: its axis setting is -1, so that the walk runs over channels, not over time.
    """
    return x + std * jnp.cumsum(_noise(key, x, segments), axis=-1), bins


def random_cut(
    key: jax.Array, x: jax.Array, bins: jax.Array, below: int, segments: Segments | None = None
) -> Augmented:
    """Cut 0 .. below - 1 bins from the start, the same for every trial of the batch.

    A trial still begins where it began. What follows moves up.
    """
    cut = jax.random.randint(key, (), 0, below)
    extended = jnp.pad(x, ((0, 0), (0, below - 1), (0, 0)))
    x = jax.lax.dynamic_slice_in_dim(extended, cut, x.shape[1], axis=1)
    return x, jnp.maximum(bins - cut, 0)


def time_mask(
    key: jax.Array,
    x: jax.Array,
    bins: jax.Array,
    spans: int,
    fraction: float,
    patch: int,
    segments: Segments | None = None,
) -> Augmented:
    """Set spans of whole patches to zero, as masking a model's patches of `patch` bins does.

    Each span's length is a uniform integer from 0 to floor(`fraction` * patches of the trial), and
    its start is uniform among the places where it fits. Spans may overlap. A last patch that the
    trial fills in part counts as one.
    """
    segments = segments or whole(x.shape[0])
    patches = -(-bins.reshape(segments.trial.shape) // patch)
    # By a table of exact integers: a product of floats could fall just below one.
    longest = np.array(
        [int(Fraction(str(fraction)) * n) for n in range(-(-x.shape[1] // patch) + 1)]
    )

    def drawn(trial: jax.Array, patches: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_length, of_start = jax.random.split(jax.random.fold_in(key, trial))
        length = jax.random.randint(of_length, (spans,), 0, jnp.asarray(longest)[patches] + 1)
        start = jax.random.randint(of_start, (spans,), 0, patches - length + 1)
        return start, start + length

    index = owner(segments, x.shape[1])
    first, end = (spread(one, index) for one in jax.vmap(jax.vmap(drawn))(segments.trial, patches))
    place = (places(segments, x.shape[1]) // patch)[..., None]
    masked = ((first <= place) & (place < end)).any(-1)
    return jnp.where(masked[..., None], 0, x), bins


def _kept(
    key: jax.Array, x: jax.Array, rate: float, channels: int, segments: Segments | None
) -> jax.Array:
    """Return which channels of each bin's trial are kept: bool [B, T or 1, channels]."""
    segments = segments or whole(x.shape[0])
    word = words(key, segments.trial[..., None], jnp.arange(channels))[0]
    return spread(word, owner(segments, x.shape[1])) >= np.uint32(rate * 2**32)


def speckle(
    key: jax.Array, x: jax.Array, bins: jax.Array, rate: float, segments: Segments | None = None
) -> Augmented:
    """Set each feature of a trial to zero with probability `rate`, in all of its bins."""
    return jnp.where(_kept(key, x, rate, x.shape[2], segments), x, 0), bins


def channel_mask(
    key: jax.Array, x: jax.Array, bins: jax.Array, rate: float, segments: Segments | None = None
) -> Augmented:
    """Set each channel of a trial to zero with probability `rate`: both of its features, threshold
    crossings and band power, which are the two halves of the features.

    Raises:
      ConfigError: the number of features is odd.
    """
    if x.shape[2] % 2:
        raise ConfigError(
            f"signal.augment lists 'channel_mask' and data.feature_count is {x.shape[2]}; needed "
            "two features per channel: list 'speckle', which masks single features, instead"
        )
    kept = _kept(key, x, rate, x.shape[2] // 2, segments)
    return jnp.where(jnp.tile(kept, (1, 1, 2)), x, 0), bins


_AFTER_SMOOTHING = frozenset({"time_mask"})
"""What acts on smoothed features wherever it is listed. Smoothing would fill what it masked."""
_SEGMENTED = frozenset(
    one.__name__
    for one in (
        white_noise,
        constant_offset,
        random_walk,
        random_cut,
        time_mask,
        speckle,
        channel_mask,
    )
)


def takes_segments(signal: SignalConfig) -> bool:
    """Return whether all listed augmentations take rows of several trials: ours, but the gain."""
    listed = zip(signal.augment, augmentations(signal), strict=True)
    return all(one is None or name in _SEGMENTED for name, one in listed)


@functools.cache
def augmentations(signal: SignalConfig) -> tuple[Augmentation | None, ...]:
    """Return the listed augmentations with their settings. None for one that changes nothing.

    Raises:
      ConfigError: a name is unknown, cannot be imported, or its settings cannot be read.
    """
    ours: dict[str, Augmentation | None] = {
        function.__name__: functools.partial(function, std=std) if std > 0 else None
        for function, std in (
            (static_gain, signal.static_gain_std),
            (white_noise, signal.white_noise_std),
            (constant_offset, signal.constant_offset_std),
            (random_walk, signal.random_walk_std),
        )
    }
    cut = functools.partial(random_cut, below=signal.random_cut)
    ours["random_cut"] = cut if signal.random_cut > 1 else None
    ours["time_mask"] = functools.partial(
        time_mask,
        spans=signal.time_mask_spans,
        fraction=signal.time_mask_fraction,
        patch=signal.time_mask_patch,
    )
    ours["speckle"] = functools.partial(speckle, rate=signal.speckle_rate)
    ours["channel_mask"] = functools.partial(channel_mask, rate=signal.channel_mask_rate)
    return tuple(ours[name] if name in ours else _foreign(name, ours) for name in signal.augment)


def _foreign(entry: str, ours: dict[str, Augmentation | None]) -> Augmentation:
    """Import `package.module:function(setting=value)`."""
    name, bracket, rest = entry.partition("(")
    if not all(name.partition(":")):
        raise ConfigError(
            f"configuration key signal.augment lists {entry!r}; needed one of {', '.join(ours)}, "
            "or package.module:function"
        )
    try:
        call = ast.parse(f"f({rest}" if bracket else "f()", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("not setting=value, ...")
        settings = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"configuration key signal.augment lists {entry!r}, whose settings cannot be read "
            f"({error}); needed package.module:function(setting=value, ...)"
        ) from error
    return functools.partial(imported(name, "signal.augment"), **settings)


def augment(
    key: jax.Array,
    features: jax.Array,
    bins: jax.Array,
    signal: SignalConfig,
    smoothed: bool = False,
    segments: Segments | None = None,
) -> Augmented:
    """Apply the configured augmentations: features [B, T, D], bins [B] -> the same shapes.

    With `segments`, of which signal.augment must allow it (see `takes_segments`), bins are [B, S].

    Call it twice with the same key, before smoothing, and after it with `smoothed` for the
    augmentations that act there.

    NEJM: noise is added to the padding too and leaks back through the smoothing. Here padding stays
      zero, so that how far a trial is padded never changes what is learned from it.
    """
    functions = augmentations(signal)
    keys = jax.random.split(key, len(functions) or 1)
    for name, one, own_key in zip(signal.augment, functions, keys, strict=False):
        if one is not None and (name in _AFTER_SMOOTHING) == smoothed:
            more = {"segments": segments} if segments is not None else {}
            features, bins = one(own_key, features, bins, **more)
    if smoothed:  # Smoothing has carried the trial's end into the padding, as in evaluation.
        return features, bins
    belongs = inside(segments, bins, features.shape[1])
    return jnp.where(belongs[..., None], features, 0), bins
