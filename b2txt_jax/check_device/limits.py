"""What a device can do at most: published, and measured with one large product and one copy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from b2txt_jax.tpu.chips import CHIPS, DEVICE_KINDS, Chip


def chip_of(device: jax.Device) -> Chip | None:
    """Return the published figures of a TPU. None for another device."""
    name = DEVICE_KINDS.get(device.device_kind)
    return CHIPS[name] if name else None


def seconds_of(run: Callable[[], Any], least: float = 0.5) -> float:
    """Return the least seconds of a call whose result is on the device, of calls for `least` s."""
    jax.block_until_ready(run())
    found: list[float] = []
    until = time.perf_counter() + least
    while len(found) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - started)
    return min(found)


def measured_flops(device: jax.Device, dtype: str) -> float:
    """Return the FLOP/s of one large square product."""
    size = 1024 if device.platform == "cpu" else 8192
    a = jax.device_put(jnp.full((size, size), 0.5, dtype), device)
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    return 2 * size**3 / seconds_of(lambda: product(a))


def measured_bandwidth(device: jax.Device) -> float:
    """Return the bytes a second that the device's memory reads and writes."""
    entries = 1 << (24 if device.platform == "cpu" else 27)
    a = jax.device_put(jnp.zeros(entries, jnp.float32), device)
    add = jax.jit(lambda x: x + 1)
    return 8 * entries / seconds_of(lambda: add(a))


def product_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Return the FLOPs of the matrix products and convolutions of a call, loops multiplied out.

    Of alternatives the one with the most counts. Kernels count as what they declare.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = [_flops(one) for one in _inside(params)]
        operands: list[Any] = [one.aval for one in equation.invars]
        result: Any = equation.outvars[0].aval if equation.outvars else None
        if name == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            shape = operands[0].shape
            total += 2 * result.size * math.prod(shape[axis] for axis in summed)
        elif name == "conv_general_dilated":
            weight = operands[1]
            outputs = weight.shape[params["dimension_numbers"].rhs_spec[0]]
            holes = math.prod(params["lhs_dilation"])
            total += 2 * result.size * weight.size // outputs // holes
        elif name == "pallas_call":
            total += params["cost_estimate"].flops if params["cost_estimate"] else sum(inner)
        elif name == "cond":
            total += max(inner)
        else:
            times = params["length"] if name == "scan" else 1
            if name == "shard_map":
                times = params["mesh"].size
            total += times * sum(inner)
    return total


def _inside(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one
