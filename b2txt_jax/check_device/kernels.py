"""The recurrence and the CTC loss on one device, in each of their forms, against float64 NumPy."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from b2txt_jax.check_device import exact
from b2txt_jax.model.gru.pallas import gru_recurrence_pallas
from b2txt_jax.model.gru.scan import gru_recurrence
from b2txt_jax.model.gru.wavefront import Stack, wavefront
from b2txt_jax.training.ctc import ctc_loss

BOUNDS = {"float32": 2e-5, "bfloat16": 0.02}
"""Largest error of an array, as a share of its largest entry. Float32 is multiplied at the highest
precision. In bfloat16, weights, states and gates are rounded to 8 bits in each of some ten frames
that an entry depends on."""
SIZES = {"a tile": (24, 8, 128), "odd": (17, 5, 72)}
"""(frames, rows, units): what fills a TPU's tiles, and what is padded to them."""
FULL_SIZES = {"the baseline's": (50, 4, 768), "the baseline's, many rows": (50, 32, 768)}


class Comparison(NamedTuple):
    """One form of a kernel against the exact values."""

    name: str
    errors: dict[str, float]
    """Of each result, as a share of its largest exact entry."""
    bound: float

    @property
    def agrees(self) -> bool:
        """Whether all errors are within the bound. NaN is not."""
        return all(error <= self.bound for error in self.errors.values())


def comparisons(
    device: jax.Device, thorough: bool
) -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Yield (name, comparison) of every kernel that the device has.

    Pallas kernels run compiled on a TPU. Elsewhere its interpreter runs them at the small sizes.
    """
    on_tpu = device.platform == "tpu"
    sizes = SIZES | (FULL_SIZES if thorough else {})
    for dtype, kind, (size, shape) in itertools.product(BOUNDS, ("scan", "pallas"), sizes.items()):
        if kind == "pallas" and not on_tpu and size in FULL_SIZES:
            continue
        if size == "a tile" and not (thorough or (on_tpu and kind == "pallas")):
            continue
        how = "" if kind == "scan" or on_tpu else ", interpreted"
        name = f"recurrence {kind}{how}, {dtype}, {size} size"
        yield name, functools.partial(_recurrence, name, device, kind, dtype, shape)
    for dtype in BOUNDS:
        name = f"recurrence wavefront, {dtype}, odd size"
        yield name, functools.partial(_wavefront, name, device, dtype)
    for kind in ("scan", "pallas"):
        how = "" if kind == "scan" or on_tpu else ", interpreted"
        name = f"CTC loss {kind}{how}"
        yield name, functools.partial(_ctc, name, device, kind, thorough)


def _errors(found: dict[str, Any], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    errors = {}
    for name, exact_value in wanted.items():
        ours = np.asarray(found[name], np.float64)
        same = ours == exact_value  # also both infinite
        with np.errstate(invalid="ignore"):
            apart = np.where(same, 0.0, np.abs(ours - exact_value))
        scale = np.abs(exact_value[np.isfinite(exact_value)]).max(initial=1e-30)
        errors[name] = float(apart.max() / scale)
    return errors


def _recurrence(
    name: str, device: jax.Device, kind: str, dtype: str, shape: tuple[int, int, int]
) -> Comparison:
    frames, rows, hidden = shape
    normal, begins = _Draws(dtype), _begins(frames, rows)
    inputs = {
        "projected": normal(1, frames, rows, 3 * hidden),
        "h0": normal(0.3, rows, hidden),
        "weight": normal(hidden**-0.5, 3 * hidden, hidden),
        "bias": normal(0.3, 3 * hidden),
    }
    cotangent = normal(1, frames, rows, hidden)
    run: Callable[..., jax.Array] = gru_recurrence
    if kind == "pallas":
        run = functools.partial(gru_recurrence_pallas, interpret=device.platform != "tpu")

    def states(projected: jax.Array, *rest: jax.Array) -> jax.Array:
        compute = jnp.dtype(dtype)
        return run(projected.astype(compute), *rest, compute, jnp.asarray(begins))

    found = _values_and_gradients(states, inputs, cotangent, device)
    wanted = exact.gru(**inputs, begins=begins, d_states=cotangent)
    return Comparison(name, _errors(found, wanted), BOUNDS[dtype])


def _wavefront(name: str, device: jax.Device, dtype: str) -> Comparison:
    (frames, rows, hidden), layers = SIZES["odd"], 3
    normal, begins = _Draws(dtype), _begins(frames, rows)
    inputs = {
        "projected": normal(1, frames, rows, 3 * hidden),
        "h0": normal(0.3, rows, hidden),
        "weight_ih": normal(hidden**-0.5, layers - 1, 3 * hidden, hidden),
        "bias_ih": normal(0.3, layers - 1, 3 * hidden),
        "weight_hh": normal(hidden**-0.5, layers, 3 * hidden, hidden),
        "bias_hh": normal(0.3, layers, 3 * hidden),
    }
    cotangent = normal(1, frames, rows, hidden)

    def states(projected: jax.Array, h0: jax.Array, *stack: jax.Array) -> jax.Array:
        compute = jnp.dtype(dtype)
        first = projected.astype(compute)
        return wavefront(first, h0, Stack(*stack), compute, begins=jnp.asarray(begins))

    found = _values_and_gradients(states, inputs, cotangent, device)
    wanted = exact.gru_stack(**inputs, begins=begins, d_states=cotangent)
    return Comparison(name, _errors(found, wanted), BOUNDS[dtype])


class _Draws:
    """Normal draws that `dtype` holds without rounding."""

    def __init__(self, dtype: str) -> None:
        self._dtype, self._rng = jnp.dtype(dtype), np.random.default_rng(0)

    def __call__(self, scale: float, *shape: int) -> np.ndarray:
        drawn = scale * self._rng.normal(size=shape)
        return drawn.astype(self._dtype).astype(np.float32)


def _begins(frames: int, rows: int) -> np.ndarray:
    """Return where trials of rows begin, about ten frames apart."""
    begins: np.ndarray = np.random.default_rng(1).random((frames, rows)) < 0.1
    begins[0] = True
    return begins


def _values_and_gradients(
    function: Callable[..., jax.Array],
    inputs: dict[str, np.ndarray],
    cotangent: np.ndarray,
    device: jax.Device,
) -> dict[str, Any]:
    """Return the states and the gradients of a function of named arrays, as in `exact`."""

    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = function(*arrays)
        return (states.astype(jnp.float32) * cotangent).sum(), states

    with jax.default_device(device), jax.default_matmul_precision("highest"):
        every = tuple(range(len(inputs)))
        gradients, states = jax.jit(jax.grad(loss, every, has_aux=True))(*inputs.values())
    named = {f"d_{key}": value for key, value in zip(inputs, gradients, strict=True)}
    return {"states": states.astype(jnp.float32), **named}


def _ctc(name: str, device: jax.Device, kind: str, thorough: bool) -> Comparison:
    rng = np.random.default_rng(1)
    rows, length, most = (16, 200, 60) if thorough else (6, 30, 8)
    logits = rng.normal(scale=2, size=(rows, length, 41)).astype(np.float32)
    labels = rng.integers(1, 41, (rows, most)).astype(np.int32)
    labels[:, 1] = labels[:, 0]  # a repeat needs a blank between
    label_length = rng.integers(2, most + 1, rows).astype(np.int32)
    frames = rng.integers(2 * most, length + 1, rows).astype(np.int32)
    frames[0] = label_length[0] - 1  # cannot be spelled
    wanted = exact.ctc(logits, frames, labels, label_length)

    def loss(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = ctc_loss(logits, frames, labels, label_length, kind)
        return jnp.where(jnp.isfinite(losses), losses, 0).sum(), losses

    with jax.default_device(device):
        gradient, losses = jax.jit(jax.grad(loss, has_aux=True))(logits)
    return Comparison(name, _errors({"loss": losses, "d_logits": gradient}, wanted), 2e-5)
