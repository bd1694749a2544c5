"""Connectionist temporal classification: the loss by forward-backward, with its own gradient
(Graves et al. 2006).

Automatic differentiation of the forward recursion would run a second, larger loop. Instead the
gradient is a closed form: softmax minus the posterior of each class in each frame. On a TPU both
recursions are Pallas kernels (ctc_pallas.py). Elsewhere the backward recursion runs as the forward
recursion of the reversed problem, stacked beside the first, so that one loop of P steps computes
both, on an NVIDIA GPU inside one kernel (ctc_triton.py). Everything is float32: bfloat16 has too
few digits for sums of log-probabilities.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from b2txt_jax.errors import UserError
from b2txt_jax.model.interface import DATA
from b2txt_jax.model.mesh import data_devices, devices_mesh
from b2txt_jax.training import ctc_pallas, ctc_triton
from b2txt_jax.training.ctc_pallas import LOG_ZERO as _LOG_ZERO
from b2txt_jax.training.ctc_pallas import sum3

BLANK = 0
KINDS = ("auto", "scan", "pallas", "triton")
_GPU = ("gpu", "cuda")


def frames_needed(labels: jax.Array, label_length: jax.Array) -> jax.Array:
    """Return the fewest frames that can spell each label, its length plus one blank per immediate
    repeat: [B, L], [B] -> [B]."""
    inside = jnp.arange(1, labels.shape[1]) < label_length[:, None]
    repeats = (labels[:, 1:] == labels[:, :-1]) & inside
    return label_length + repeats.sum(1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ctc_loss(
    logits: jax.Array,
    frames: jax.Array,
    labels: jax.Array,
    label_length: jax.Array,
    kind: str = "auto",
) -> jax.Array:
    """Return the negative log-likelihood (ln) of each label: [B].

    Args:
      logits: float32 [B, P, C], class 0 is the blank.
      frames: valid frames per row, int [B]. Later frames are ignored.
      labels: class ids, int [B, L], padded with anything.
      label_length: int [B].
      kind: of the recursions. 'scan', or 'pallas' or 'triton', which outside a TPU or an NVIDIA
        GPU are Pallas's slow interpreter, meant for tests, or 'auto': the kernels of the platform
        when the devices share the rows evenly, else the scan.

    Rows that no alignment can spell (fewer frames than `frames_needed`) have loss +inf and a zero
    gradient. The caller counts and excludes them. Zero frames with an empty label have loss 0.
    """
    return _loss_and_posterior(logits, frames, labels, label_length, kind)[0]


def _loss_and_posterior(
    logits: jax.Array, frames: jax.Array, labels: jax.Array, label_length: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array]:
    logits = logits.astype(jnp.float32)
    length = logits.shape[1]
    log_probs = jax.nn.log_softmax(logits)
    states = _extended(labels, label_length)
    # [B, P, S]: log-probability of each state's class; exact, since the one-hot product has one
    # term per entry
    one_hot = jax.nn.one_hot(states, logits.shape[2], dtype=jnp.float32)
    emissions = jnp.einsum("bpc,bsc->bps", log_probs, one_hot, precision="highest")

    state_length = 2 * label_length + 1
    alphas, joint = _recursions(emissions, states, frames, state_length, kind)

    log_likelihood = _last_alpha(alphas, frames, state_length)
    feasible = log_likelihood > _LOG_ZERO / 2
    loss = jnp.where(feasible, -log_likelihood, jnp.inf)

    in_states = jnp.arange(states.shape[1]) < state_length[:, None]
    in_frames = jnp.arange(length) < frames[:, None]
    occupied = in_frames[:, :, None] & in_states[:, None, :] & feasible[:, None, None]
    # Each frame's joint sums to the likelihood. Normalising per frame instead of dividing by it
    # removes the rounding error that the two recursions have accumulated.
    joint = jnp.where(occupied, joint, _LOG_ZERO)
    gamma = jnp.where(occupied, jax.nn.softmax(joint, axis=-1), 0.0)
    posterior = jnp.einsum("bps,bsc->bpc", gamma, one_hot, precision="highest")
    counted = (in_frames & feasible[:, None])[:, :, None]
    gradient = jnp.where(counted, jnp.exp(log_probs) - posterior, 0.0)
    empty = (frames == 0) & (label_length == 0)
    return jnp.where(empty, 0.0, loss), gradient


def _extended(labels: jax.Array, label_length: jax.Array) -> jax.Array:
    """Put a blank before, between and after labels: [B, L] -> [B, 2L + 1]. Padding becomes
    blanks."""
    batch, length = labels.shape
    inside = jnp.arange(length) < label_length[:, None]
    kept = jnp.where(inside, labels, BLANK)
    states = jnp.full((batch, 2 * length + 1), BLANK, labels.dtype)
    return states.at[:, 1::2].set(kept)


def _reversal(valid: jax.Array, size: int) -> jax.Array:
    """Return indices that reverse the first `valid` entries of an axis and leave the rest in
    place: [B] -> [B, size]."""
    index = jnp.arange(size)
    return jnp.where(index < valid[:, None], valid[:, None] - 1 - index, index)


def _recursions(
    emissions: jax.Array, states: jax.Array, frames: jax.Array, state_length: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array]:
    """Return the forward variables, and the ln probability of each state in each frame together
    with the label, where both are within the row's lengths: [B, P, S] both."""
    if kind not in KINDS:
        raise UserError(f"the kind of CTC recursion is {kind!r}; needed one of {', '.join(KINDS)}")
    arguments = emissions, states, frames, state_length
    mesh = devices_mesh()
    known = jax.sharding.get_abstract_mesh().abstract_device
    platform = "unknown" if known is None else known.platform
    uneven = emissions.shape[0] % data_devices(mesh) > 0 or 0 in emissions.shape
    if kind == "auto" and not uneven and platform in _GPU:
        kind = "triton"
    if kind == "scan" or (kind == "auto" and (uneven or platform not in ("tpu", "unknown"))):
        return _scanned(*arguments)

    def shared(run: Callable[..., Any]) -> Callable[..., Any]:
        if mesh is None:
            return run
        # A kernel cannot be partitioned. Its rows are independent.
        rows = P(DATA if DATA in mesh.axis_names else None)
        return jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)

    def pallas(*arguments: jax.Array, interpret: bool = False) -> tuple[jax.Array, ...]:
        emissions, states, frames, state_length = arguments
        run = shared(functools.partial(ctc_pallas.recursions, interpret=interpret))
        return run(emissions, _skip_cost(states), frames, state_length)

    def triton(*arguments: jax.Array, interpret: bool = False) -> tuple[jax.Array, ...]:
        recursion = functools.partial(ctc_triton.recursion, interpret=interpret)
        return shared(functools.partial(_scanned, recursion=recursion))(*arguments)

    both: tuple[jax.Array, jax.Array]
    if kind == "triton":
        interpreted = functools.partial(triton, interpret=True)
        both = jax.lax.platform_dependent(*arguments, cuda=triton, default=interpreted)
    else:
        interpreted = functools.partial(pallas, interpret=True)
        other = interpreted if kind == "pallas" else _scanned
        both = jax.lax.platform_dependent(*arguments, tpu=pallas, default=other)
    return both


def _scanned(
    emissions: jax.Array,
    states: jax.Array,
    frames: jax.Array,
    state_length: jax.Array,
    recursion: Recursion | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute _recursions as one loop over frames, by default a scan."""
    reversed_frames = _reversal(frames, emissions.shape[1])
    reversed_states = _reversal(state_length, states.shape[1])
    mirrored = jnp.take_along_axis(emissions, reversed_frames[:, :, None], axis=1)
    mirrored = jnp.take_along_axis(mirrored, reversed_states[:, None, :], axis=2)
    mirrored_ids = jnp.take_along_axis(states, reversed_states, axis=1)

    # On a new axis: appended rows would have to move between the devices that share the batch.
    alphas, betas = jax.vmap(recursion or _scan)(
        jnp.stack([emissions, mirrored]),
        _skip_cost(jnp.stack([states, mirrored_ids])),
        _start_cost(jnp.stack([state_length, state_length]), states.shape[1]),
    )
    betas = jnp.take_along_axis(betas, reversed_states[:, None, :], axis=2)
    betas = jnp.take_along_axis(betas, reversed_frames[:, :, None], axis=1)
    return alphas, alphas + betas - emissions


def _skip_cost(states: jax.Array) -> jax.Array:
    """Return 0 where a state may follow the one two before it, else LOG_ZERO: [..., S] ->
    [..., S].

    It may when it is a label that differs from the label before it.
    """
    index = jnp.arange(states.shape[-1])
    before = jnp.roll(states, 2, axis=-1)
    may_skip = (index % 2 == 1) & (index >= 2) & (states != before)
    return jnp.where(may_skip, 0.0, _LOG_ZERO)


def _start_cost(state_length: jax.Array, size: int) -> jax.Array:
    """Return 0 for the states in which a row may begin, else LOG_ZERO: [...] -> [..., S]."""
    index = jnp.arange(size)
    return jnp.where((index < 2) & (index < state_length[..., None]), 0.0, _LOG_ZERO)


Recursion = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(emissions [B, P, S], cost of skipping to a state [B, S], of starting in it [B, S]) -> forward
variables, ln [B, P, S]."""


def _scan(emissions: jax.Array, skips: jax.Array, start: jax.Array) -> jax.Array:
    """Compute the forward variables frame by frame, see Recursion."""

    def step(alpha: jax.Array, frame: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = jnp.pad(alpha[:, :-1], ((0, 0), (1, 0)), constant_values=_LOG_ZERO)
        two = jnp.pad(alpha[:, :-2], ((0, 0), (2, 0)), constant_values=_LOG_ZERO) + skips
        alpha = sum3(alpha, one, two) + frame
        return alpha, alpha

    by_time = emissions.swapaxes(0, 1)
    if by_time.shape[0] == 0:
        return emissions
    first = start + by_time[0]
    rest = jax.lax.scan(step, first, by_time[1:])[1]
    return jnp.concatenate([first[None], rest]).swapaxes(0, 1)


def _last_alpha(alphas: jax.Array, frames: jax.Array, state_length: jax.Array) -> jax.Array:
    """Return the ln likelihood, from the last frame's two final states: [B, P, S] -> [B]."""
    if alphas.shape[1] == 0:
        return jnp.full(frames.shape, _LOG_ZERO)
    row = jnp.take_along_axis(alphas, jnp.maximum(frames - 1, 0)[:, None, None], axis=1)[:, 0]
    last = jnp.take_along_axis(row, state_length[:, None] - 1, axis=1)[:, 0]
    second = jnp.take_along_axis(row, jnp.maximum(state_length - 2, 0)[:, None], axis=1)[:, 0]
    second = jnp.where(state_length > 1, second, _LOG_ZERO)
    return jnp.where(frames > 0, jnp.logaddexp(last, second), _LOG_ZERO)


def _ctc_forward(
    logits: jax.Array, frames: jax.Array, labels: jax.Array, label_length: jax.Array, kind: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    loss, gradient = _loss_and_posterior(logits, frames, labels, label_length, kind)
    return loss, (gradient, logits[:0])


def _ctc_backward(
    kind: str, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array | None, ...]:
    gradient, logits_like = saved
    # A row that is left out has a zero cotangent and a zero gradient, not 0 * inf = NaN.
    return (gradient * cotangent[:, None, None]).astype(logits_like.dtype), None, None, None


ctc_loss.defvjp(_ctc_forward, _ctc_backward)


def segment_logits(logits: jax.Array, first: jax.Array) -> jax.Array:
    """Cut trials out of the rows that they share: logits [R, P, C], first frame of each trial in
    the rows one after another [N], any for none -> [N, P, C].

    A trial's frames are followed by those of others, and at the end of the rows by zeros.
    """
    rows, frames, classes = logits.shape
    joined = jnp.pad(logits.reshape(rows * frames, classes), ((0, frames), (0, 0)))
    return jax.vmap(lambda at: jax.lax.dynamic_slice_in_dim(joined, at, frames))(first)


def greedy_ids(logits: jax.Array) -> jax.Array:
    """Return the best class of each frame: [B, P, C] -> int32 [B, P]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
