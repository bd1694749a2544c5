"""The choice how the GRU recurrence runs: as a `lax.scan` (scan.py), as Pallas kernels (pallas.py),
or all layers of a stack as one loop (wavefront.py).

The choice is made for the platform that a program is lowered for, not for the machine that lowers
it, so that compiling for a TPU topology on a CPU gives the program that the TPU would run. The
chip and the division of the batch come from the surrounding mesh: wrap the call, or all of a
training step, in `jax.sharding.use_abstract_mesh(mesh.abstract_mesh)`. Where that names another
platform, the kernels are not even traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from b2txt_jax.errors import UserError
from b2txt_jax.model.gru.pallas import gru_recurrence_pallas, plan_for
from b2txt_jax.model.gru.scan import gru_recurrence

KINDS = ("auto", "scan", "pallas", "wavefront")


def along_wavefront(kind: str, layers: int) -> bool:
    """Return whether a stack of so many layers runs as one loop: where `kind` says so, and with
    'auto' where the surrounding mesh is of GPUs. On a TPU and on a CPU it gains nothing."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_gpu = device is not None and device.platform in ("gpu", "cuda", "rocm")
    return layers > 1 and (kind == "wavefront" or (kind == "auto" and on_gpu))


def recurrence(
    projected: jax.Array,
    h0: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    dtype: jnp.dtype,
    kind: str = "auto",
    begins: jax.Array | None = None,
) -> jax.Array:
    """Run the recurrence over time, time first. All kinds compute the same values and gradients.

    Args:
      projected: input projections with the input bias, [P, B, 3H].
      h0: first state, [B, H]. Taken as float32, like weight and bias.
      weight: recurrent weight, float32 [3H, H].
      bias: recurrent bias, float32 [3H].
      dtype: of the recurrent products' operands and of the result. Gates and state stay float32.
      kind: 'scan', 'wavefront', which is the same for a layer alone, or 'pallas', which outside a
        TPU is Pallas's slow interpreter, meant for tests, or 'auto': Pallas on a TPU when the
        weight fits VMEM and the devices share the rows evenly, else the scan.
      begins: frames at which a trial begins, from `h0`, bool [P, B]. None: one trial a row.

    Returns:
      States after each frame, [P, B, H] of `dtype`.

    Raises:
      UserError: an unknown kind, or 'pallas' where 'auto' would run the scan on a TPU.
    """
    # Also for a state or parameters kept in bfloat16, gates and the carried state are float32.
    h0, weight, bias = (value.astype(jnp.float32) for value in (h0, weight, bias))
    arguments = projected, h0, weight, bias, dtype, begins
    if kind in ("scan", "wavefront"):
        return gru_recurrence(*arguments)
    if kind == "pallas":
        default = functools.partial(_bound, gru_recurrence_pallas, dtype, interpret=True)
    elif kind == "auto":
        known = jax.sharding.get_abstract_mesh().abstract_device
        if known is not None and known.platform != "tpu":
            return gru_recurrence(*arguments)  # tracing the kernels takes seconds
        try:
            plan_for(h0.shape[0], h0.shape[1], dtype)
        except UserError:
            return gru_recurrence(*arguments)
        default = functools.partial(_bound, gru_recurrence, dtype)
    else:
        raise UserError(f"model.recurrence is {kind!r}; needed one of {', '.join(KINDS)}")
    states: jax.Array = jax.lax.platform_dependent(
        projected,
        h0,
        weight,
        bias,
        begins,
        tpu=functools.partial(_bound, gru_recurrence_pallas, dtype),
        default=default,
    )
    return states


def _bound(
    function: Callable[..., jax.Array], dtype: jnp.dtype, *arrays: Any, **settings: Any
) -> jax.Array:
    """Call a recurrence with arrays alone as arguments, which `platform_dependent` needs."""
    *inputs, begins = arrays
    return function(*inputs, dtype, begins, **settings)
