"""CTC against torch in float64 and against the sum over all alignments."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from b2txt_jax.training.ctc import ctc_loss as eager_ctc_loss
from b2txt_jax.training.ctc import frames_needed

ctc_loss = jax.jit(eager_ctc_loss)


def by_enumeration(log_probs, label):
    """-ln of the summed probability of every path that collapses to `label`; log_probs [P, C]."""
    total = -np.inf
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        collapsed = [key for key, _ in itertools.groupby(path) if key]
        if collapsed == list(label):
            total = np.logaddexp(total, sum(log_probs[t, c] for t, c in enumerate(path)))
    return -total


@pytest.mark.parametrize("label", [[], [1], [1, 1], [2, 1, 2], [1, 2, 2, 1]])
def test_loss_is_the_sum_over_all_alignments(label):
    logits = np.random.default_rng(len(label)).normal(size=(1, 6, 3)).astype(np.float32)
    padded = np.array([label + [0] * (5 - len(label))])
    loss = ctc_loss(jnp.asarray(logits), np.array([6]), padded, np.array([len(label)]))
    log_probs = np.asarray(jax.nn.log_softmax(logits[0].astype(np.float64)))
    assert float(loss[0]) == pytest.approx(by_enumeration(log_probs, label), rel=1e-5)


@jax.jit
def loss_and_gradient(logits, frames, labels, label_length, counted):
    def summed(values):
        losses = ctc_loss(values, frames, labels, label_length)
        return jnp.where(counted, losses, 0).sum(), losses

    (_, losses), gradient = jax.value_and_grad(summed, has_aux=True)(logits)
    return losses, gradient


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_losses_and_gradients_equal_torch_for_rows_that_can_be_aligned(seed):
    rng = np.random.default_rng(seed)
    batch, length, classes, longest = 6, 30, 5, 10
    logits = (rng.normal(size=(batch, length, classes)) * 3).astype(np.float32)
    labels = rng.integers(1, classes, (batch, longest)).astype(np.int32)
    label_length = rng.integers(0, longest + 1, batch).astype(np.int32)
    frames = rng.integers(1, length + 1, batch).astype(np.int32)
    feasible = np.asarray(frames_needed(jnp.asarray(labels), jnp.asarray(label_length))) <= frames

    losses, gradient = loss_and_gradient(logits, frames, labels, label_length, feasible)
    mirror = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.ctc_loss(
        mirror.log_softmax(-1).transpose(0, 1),
        torch.tensor(labels),
        torch.tensor(frames),
        torch.tensor(label_length),
        reduction="none",
    )
    np.testing.assert_array_equal(np.isfinite(losses), feasible)
    np.testing.assert_array_equal(np.isfinite(expected.detach().numpy()), feasible)
    np.testing.assert_allclose(
        np.asarray(losses)[feasible], expected.detach().numpy()[feasible], rtol=1e-5, atol=1e-4
    )
    if feasible.any():
        expected[torch.tensor(feasible)].sum().backward()
        # torch's gradient of a row that cannot be aligned is NaN
        rows = np.flatnonzero(feasible)
        np.testing.assert_allclose(np.asarray(gradient)[rows], mirror.grad[rows], atol=2e-5)


def test_rows_that_cannot_be_aligned_are_infinite_with_a_zero_gradient():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 3)), jnp.float32)
    labels = np.array([[1, 1, 1], [1, 2, 1], [1, 2, 1]])
    frames, length = np.array([4, 2, 4]), np.array([3, 3, 3])
    losses = np.asarray(ctc_loss(logits, frames, labels, length))
    assert list(np.isinf(losses)) == [True, True, False]
    gradient = jax.grad(
        lambda x: jnp.where(np.isinf(losses), 0, ctc_loss(x, frames, labels, length)).sum()
    )(logits)
    assert not np.asarray(gradient)[:2].any()
    assert np.isfinite(np.asarray(gradient)).all()
    assert np.asarray(gradient)[2].any()


def test_zero_frames_with_an_empty_label_cost_nothing():
    losses = ctc_loss(jnp.zeros((1, 4, 3)), np.array([0]), np.zeros((1, 2), int), np.array([0]))
    assert float(losses[0]) == 0.0


def test_frames_and_labels_beyond_the_lengths_change_nothing():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 12, 4)).astype(np.float32)
    label = np.array([[1, 2, 2, 3]])
    alone = ctc_loss(jnp.asarray(logits), np.array([12]), label, np.array([4]))
    padded_logits = np.concatenate([logits, rng.normal(size=(1, 9, 4))], axis=1)
    padded_label = np.array([[1, 2, 2, 3, 3, 1]])
    padded = ctc_loss(
        jnp.asarray(padded_logits, jnp.float32), np.array([12]), padded_label, np.array([4])
    )
    assert float(alone[0]) == pytest.approx(float(padded[0]), rel=1e-6)
