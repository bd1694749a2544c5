"""The recursion of CTC as a Pallas kernel for NVIDIA GPUs, lowered by Triton: equations of ctc.py.

A loop of XLA starts several kernels per frame, and their starts are nearly all of its time. Here
one program runs all frames of a row. Its states differ in which they reach: each needs those of one
and two before it, which other threads hold. They meet in the result itself, in memory that the
multiprocessor caches.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from b2txt_jax.training.ctc_pallas import LOG_ZERO, sum3

_WARPS = 4


def _kernel(emissions: Any, skips: Any, start: Any, alphas: Any, *, interpret: bool) -> None:
    """Compute one row: emissions [P, S], cost of skipping to a state [S], ln probability of
    starting in it [S] -> alphas [P, S]."""
    frames, width = alphas.shape
    state = jnp.arange(width)
    skip = skips[...]

    def step(frame: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        alpha, emission = carry
        # Read a frame ahead: the recursion does not wait for it.
        following = emissions[jnp.minimum(frame + 1, frames - 1)]
        if not interpret:
            plgpu.debug_barrier()  # what the other threads stored of the last frame is there

        def earlier(by: int) -> jax.Array:
            from_state = jnp.maximum(state - by, 0)
            found: jax.Array = plgpu.load(alphas.at[frame - 1, from_state])
            return jnp.where(state < by, LOG_ZERO, found)

        alpha = sum3(alpha, earlier(1), earlier(2) + skip) + emission
        alphas[frame] = alpha
        return alpha, following

    first = start[...] + emissions[0]
    alphas[0] = first
    jax.lax.fori_loop(1, frames, step, (first, emissions[min(1, frames - 1)]))


def recursion(
    emissions: jax.Array, skips: jax.Array, start: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Return the forward variables, float32 [B, P, S].

    Args:
      emissions: ln probability of each state's class, float32 [B, P, S].
      skips: 0 where a state may follow the one two before it, else LOG_ZERO, float32 [B, S].
      start: 0 for the states in which a row may begin, else LOG_ZERO, float32 [B, S].
      interpret: run the kernel as ordinary operations, slowly, on any platform.
    """
    batch, frames, states = emissions.shape
    width = pl.next_power_of_2(states)
    beyond = width - states
    wide = jnp.pad(emissions, ((0, 0), (0, 0), (0, beyond)))
    skips, start = (
        jnp.pad(one, ((0, 0), (0, beyond)), constant_values=LOG_ZERO) for one in (skips, start)
    )
    over_time = pl.BlockSpec((None, frames, width), lambda row: (row, 0, 0))
    per_row = pl.BlockSpec((None, width), lambda row: (row, 0))
    alphas: jax.Array = pl.pallas_call(
        functools.partial(_kernel, interpret=interpret),
        grid=(batch,),
        in_specs=[over_time, per_row, per_row],
        out_specs=over_time,
        out_shape=jax.ShapeDtypeStruct((batch, frames, width), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="ctc_forward",
    )(wide, skips, start)
    return alphas[:, :, :states]
