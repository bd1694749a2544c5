"""CTC against torch.nn.CTCLoss in float64: values and gradients, of the scan and of the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from b2txt_jax.training.ctc import ctc_loss, frames_needed


@functools.partial(jax.jit, static_argnums=5)
def loss_and_gradient(logits, frames, labels, label_length, counted, kind):
    def summed(values):
        losses = ctc_loss(values, frames, labels, label_length, kind)
        return jnp.where(counted, losses, 0).sum(), losses

    (_, losses), gradient = jax.value_and_grad(summed, has_aux=True)(logits)
    return losses, gradient


def torch_losses(logits, frames, labels, label_length):
    mirror = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    losses = torch.nn.CTCLoss(blank=0, reduction="none")(
        mirror.log_softmax(-1).transpose(0, 1),
        torch.tensor(labels),
        torch.tensor(frames),
        torch.tensor(label_length),
    )
    return mirror, losses


def compare(logits, frames, labels, label_length, atol=2e-5):
    """Asserts that both agree on losses, on which rows are infeasible, and on gradients."""
    mirror, expected = torch_losses(logits, frames, labels, label_length)
    feasible = np.isfinite(expected.detach().numpy())
    needed = np.asarray(frames_needed(jnp.asarray(labels), jnp.asarray(label_length)))
    np.testing.assert_array_equal(needed <= frames, feasible)
    wanted = expected.detach().numpy()
    if feasible.any():
        # torch's gradient of a row that cannot be aligned is NaN
        expected[torch.tensor(feasible)].sum().backward()
    for kind in ("scan", "pallas", "triton"):
        losses, gradient = loss_and_gradient(logits, frames, labels, label_length, feasible, kind)
        np.testing.assert_array_equal(np.isfinite(losses), feasible)
        np.testing.assert_allclose(
            np.asarray(losses)[feasible], wanted[feasible], rtol=1e-5, atol=1e-4
        )
        assert not np.asarray(gradient)[~feasible].any()
        if feasible.any():
            theirs = mirror.grad.numpy()[feasible]
            np.testing.assert_allclose(np.asarray(gradient)[feasible], theirs, atol=atol)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_losses_and_gradients_equal_torch(seed):
    rng = np.random.default_rng(seed)
    batch, length, classes, longest = 6, 30, 5, 10
    compare(
        (rng.normal(size=(batch, length, classes)) * 3).astype(np.float32),
        rng.integers(1, length + 1, batch).astype(np.int32),
        rng.integers(1, classes, (batch, longest)).astype(np.int32),
        rng.integers(0, longest + 1, batch).astype(np.int32),
    )


ROWS = {
    "empty label": ([], 30),
    "empty label in one frame": ([], 1),
    "one label in one frame": ([3], 1),
    "as many frames as labels": ([1, 2, 3, 4, 1, 2], 6),
    "all repeats, one frame too few": ([2, 2, 2, 2], 6),
    "all repeats, just enough frames": ([2, 2, 2, 2], 7),
    "all repeats, many frames": ([2, 2, 2, 2], 30),
    "repeats with others between": ([1, 1, 2, 2, 1, 1], 12),
    "two labels taking turns": ([1, 2] * 5, 30),
    "far too few frames": ([1, 2, 3, 4, 1, 2, 3, 4, 1, 2], 3),
}


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_empty_repeated_and_infeasible_labels_equal_torch(scale):
    rng = np.random.default_rng(0)
    labels = np.zeros((len(ROWS), 10), np.int32)
    for row, (label, _) in enumerate(ROWS.values()):
        labels[row, : len(label)] = label
    compare(
        (rng.normal(size=(len(ROWS), 30, 5)) * scale).astype(np.float32),
        np.array([frames for _, frames in ROWS.values()], np.int32),
        labels,
        np.array([len(label) for label, _ in ROWS.values()], np.int32),
    )


@pytest.mark.slow
def test_a_long_sentence_with_confident_logits_equals_torch():
    rng = np.random.default_rng(3)
    labels = rng.integers(1, 41, (2, 110)).astype(np.int32)
    logits = rng.normal(size=(2, 497, 41))
    for row in range(2):
        logits[row, 4 * np.arange(110) + 20, labels[row]] += 12
        logits[row, ::2, 0] += 10
    compare(
        logits.astype(np.float32), np.array([497, 480], np.int32), labels, np.array([110, 64]), 1e-4
    )
