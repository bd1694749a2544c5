"""Augmentation of training features, in the published order (NEJM reference, section 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from b2txt_jax.config import SignalConfig


def time_mask(bins: jax.Array, length: int) -> jax.Array:
    """True where a bin belongs to the trial: [B] -> [B, length, 1]."""
    return (jnp.arange(length) < bins[:, None])[..., None]


def augment(
    key: jax.Array, features: jax.Array, bins: jax.Array, signal: SignalConfig
) -> tuple[jax.Array, jax.Array]:
    """Adds noise and cuts the start: features [B, T, D], bins [B] -> the same shapes.

    Static gain (a random mixing matrix near the identity, per trial), white noise, an offset per
    trial and channel, a random walk over channels, and one cut of 0 .. random_cut - 1 bins from the
    start of every trial of the batch.

    NEJM: noise is added to the padding too and leaks back through the smoothing; here padding stays
      zero, so that how far a trial is padded never changes what is learned from it.
    """
    gain_key, white_key, offset_key, walk_key, cut_key = jax.random.split(key, 5)
    batch, length, channels = features.shape
    if signal.static_gain_std > 0:
        noise = jax.random.normal(gain_key, (batch, channels, channels), features.dtype)
        features = features + jnp.einsum("btd,bdk->btk", features, signal.static_gain_std * noise)
    if signal.white_noise_std > 0:
        noise = jax.random.normal(white_key, features.shape, features.dtype)
        features = features + signal.white_noise_std * noise
    if signal.constant_offset_std > 0:
        noise = jax.random.normal(offset_key, (batch, 1, channels), features.dtype)
        features = features + signal.constant_offset_std * noise
    if signal.random_walk_std > 0:
        noise = jax.random.normal(walk_key, features.shape, features.dtype)
        # NEJM: its axis setting is -1, so that the walk runs over channels, not over time.
        features = features + signal.random_walk_std * jnp.cumsum(noise, axis=-1)
    if signal.random_cut > 1:
        cut = jax.random.randint(cut_key, (), 0, signal.random_cut)
        extended = jnp.pad(features, ((0, 0), (0, signal.random_cut - 1), (0, 0)))
        features = jax.lax.dynamic_slice_in_dim(extended, cut, length, axis=1)
        bins = jnp.maximum(bins - cut, 0)
    return jnp.where(time_mask(bins, length), features, 0), bins
