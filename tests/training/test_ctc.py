"""CTC against the sum over all alignments; against torch in tests/parity."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from b2txt_jax.training.ctc import ctc_loss as eager_ctc_loss

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
