"""The two recursions of CTC as Pallas TPU kernels: equations of ctc.py.

A loop of XLA reads and writes every frame in HBM and waits for it. Here a row's states lie along
the lanes of the vector unit, the last frame's variables stay in VMEM, and frames stream past in
blocks: forward, then backward from each row's own last frame, so that nothing is mirrored.

The reach of the states past a label's end is masked by the caller. Rows are independent. Blocks
that overhang the frames or the rows compute on garbage there, which no other entry reads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOG_ZERO = -1e30
_LANES = 128
_FRAMES = 8
"""Frames per step of the grid, unrolled: the stores of one overlap with the next."""
_MOST_ENTRIES = 1 << 15
"""Rows times states of a block: 1 MiB of VMEM per stream and 8 frames."""


def sum3(one: jax.Array, two: jax.Array, three: jax.Array) -> jax.Array:
    """Add probabilities given by their ln, at least LOG_ZERO."""
    top = jnp.maximum(jnp.maximum(one, two), three)
    total = jnp.exp(one - top) + jnp.exp(two - top) + jnp.exp(three - top)
    return jnp.maximum(top + jnp.log(total), LOG_ZERO)


def _forward_kernel(emissions: Any, skips: Any, alphas: Any, carry: Any) -> None:
    """Compute one block: emissions [F, R, S], cost of skipping to a state [R, S] -> alphas
    [F, R, S]."""
    state = jax.lax.broadcasted_iota(jnp.int32, carry.shape, 1)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        # As if a frame before the first had ended in the first blank.
        carry[...] = jnp.where(state == 0, 0.0, LOG_ZERO)

    alpha = carry[...]
    for k in range(emissions.shape[0]):
        one = jnp.where(state < 1, LOG_ZERO, pltpu.roll(alpha, 1, 1))
        two = jnp.where(state < 2, LOG_ZERO, pltpu.roll(alpha, 2, 1)) + skips[...]
        alpha = sum3(alpha, one, two) + emissions[k]
        alphas[k] = alpha
    carry[...] = alpha


def _backward_kernel(
    emissions: Any, alphas: Any, skips: Any, ends: Any, joint: Any, carry: Any
) -> None:
    """Compute one block, last first: emissions and alphas [F, R, S], skips [R, S], each row's last
    frame and number of states [R, 2] -> ln probability of each state in each frame together with
    the label [F, R, S]."""
    step, size = pl.program_id(1), emissions.shape[0]
    first = (pl.num_programs(1) - 1 - step) * size
    state = jax.lax.broadcasted_iota(jnp.int32, carry.shape, 1)
    width = carry.shape[1]
    last, count = ends[:, 0:1], ends[:, 1:2]
    final = jnp.where((state == count - 1) | (state == count - 2), 0.0, LOG_ZERO)

    @pl.when(step == 0)
    def _() -> None:
        carry[...] = jnp.full(carry.shape, LOG_ZERO)

    beta = carry[...]  # of the frame after, with its emission
    for k in reversed(range(size)):
        one = jnp.where(state >= width - 1, LOG_ZERO, pltpu.roll(beta, width - 1, 1))
        two = pltpu.roll(beta + skips[...], width - 2, 1)
        two = jnp.where(state >= width - 2, LOG_ZERO, two)
        after = jnp.where(first + k == last, final, sum3(beta, one, two))
        joint[k] = alphas[k] + after
        beta = jnp.where(first + k <= last, after + emissions[k], beta)
    carry[...] = beta


def recursions(
    emissions: jax.Array,
    skips: jax.Array,
    frames: jax.Array,
    state_length: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the forward variables, and the ln probability of each state in each frame together
    with the label: both float32 [B, P, S].

    Args:
      emissions: ln probability of each state's class, float32 [B, P, S].
      skips: 0 where a state may follow the one two before it, else LOG_ZERO, float32 [B, S].
      frames: valid frames of each row, int [B].
      state_length: states of each row, int [B].
      interpret: run the kernels as ordinary operations, slowly, on any platform.
    """
    batch, length, states = emissions.shape
    width = -(-states // _LANES) * _LANES
    wide = jnp.pad(emissions.swapaxes(0, 1), ((0, 0), (0, 0), (0, width - states)))
    skips = jnp.pad(skips, ((0, 0), (0, width - states)), constant_values=LOG_ZERO)
    ends = jnp.stack([frames - 1, state_length], axis=1).astype(jnp.int32)
    rows = batch
    while rows > 8 and rows * width > _MOST_ENTRIES:
        rows = -(-rows // 16) * 8
    size = min(_FRAMES, length)
    steps = pl.cdiv(length, size)

    def call(kernel: Any, name: str, inputs: list[jax.Array], reverse: bool) -> jax.Array:
        def stream(row: Any, step: Any) -> Any:
            return (steps - 1 - step if reverse else step), row, 0

        streams = pl.BlockSpec((size, rows, width), stream)
        per_row = [pl.BlockSpec((rows, one.shape[-1]), lambda row, _: (row, 0)) for one in inputs]
        result: jax.Array = pl.pallas_call(
            kernel,
            grid=(pl.cdiv(batch, rows), steps),
            in_specs=[
                streams if one.ndim == 3 else spec
                for one, spec in zip(inputs, per_row, strict=True)
            ],
            out_specs=streams,
            out_shape=jax.ShapeDtypeStruct((length, batch, width), jnp.float32),
            scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=10 * length * batch * width,
                transcendentals=4 * length * batch * width,
                bytes_accessed=4 * length * batch * width * (3 if reverse else 2),
            ),
            interpret=interpret,
            name=name,
        )(*inputs)
        return result

    alphas = call(_forward_kernel, "ctc_forward", [wide, skips], False)
    joint = call(_backward_kernel, "ctc_backward", [wide, alphas, skips, ends], True)
    return alphas[:, :, :states].swapaxes(0, 1), joint[:, :, :states].swapaxes(0, 1)
