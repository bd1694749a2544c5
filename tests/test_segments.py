"""Random draws by trial and place: which words they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from b2txt_jax.segments import words


def test_words_on_a_cpu_are_those_of_jaxs_own_threefry() -> None:
    key = jax.random.key(11)
    label = jnp.asarray([[0], [7], [0xFFFFFFFF]], jnp.uint32)
    channel = jnp.arange(5)
    first, second = (jnp.full((3, 5), half) for half in jax.random.key_data(key))
    counts = jnp.broadcast_to(label, (3, 5)), jnp.broadcast_to(channel, (3, 5)).astype(jnp.uint32)
    expected = threefry2x32_p.bind(first, second, *counts)
    for found, wanted in zip(jax.jit(words)(key, label, channel), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
