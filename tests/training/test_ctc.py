"""CTC against the sum over all alignments; against torch in tests/parity. The Pallas kernels run in
Pallas's interpreter."""

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import environment

from b2txt_jax.errors import UserError
from b2txt_jax.training import ctc_pallas
from b2txt_jax.training.ctc import ctc_loss as eager_ctc_loss

ctc_loss = jax.jit(eager_ctc_loss, static_argnums=4)
EVERY = pytest.mark.parametrize("kind", ["scan", "pallas", "triton"])


def by_enumeration(log_probs, label):
    """-ln of the summed probability of every path that collapses to `label`; log_probs [P, C]."""
    total = -np.inf
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        collapsed = [key for key, _ in itertools.groupby(path) if key]
        if collapsed == list(label):
            total = np.logaddexp(total, sum(log_probs[t, c] for t, c in enumerate(path)))
    return -total


@EVERY
@pytest.mark.parametrize("label", [[], [1], [1, 1], [2, 1, 2], [1, 2, 2, 1]])
def test_loss_is_the_sum_over_all_alignments(label, kind):
    logits = np.random.default_rng(len(label)).normal(size=(1, 6, 3)).astype(np.float32)
    padded = np.array([label + [0] * (5 - len(label))])
    loss = ctc_loss(jnp.asarray(logits), np.array([6]), padded, np.array([len(label)]), kind)
    log_probs = np.asarray(jax.nn.log_softmax(logits[0].astype(np.float64)))
    assert float(loss[0]) == pytest.approx(by_enumeration(log_probs, label), rel=1e-5)


@EVERY
def test_rows_that_cannot_be_aligned_are_infinite_with_a_zero_gradient(kind):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 3)), jnp.float32)
    labels = np.array([[1, 1, 1], [1, 2, 1], [1, 2, 1]])
    frames, length = np.array([4, 2, 4]), np.array([3, 3, 3])
    losses = np.asarray(ctc_loss(logits, frames, labels, length, kind))
    assert list(np.isinf(losses)) == [True, True, False]
    gradient = jax.grad(
        lambda x: jnp.where(np.isinf(losses), 0, ctc_loss(x, frames, labels, length, kind)).sum()
    )(logits)
    assert not np.asarray(gradient)[:2].any()
    assert np.isfinite(np.asarray(gradient)).all()
    assert np.asarray(gradient)[2].any()


@EVERY
def test_zero_frames_with_an_empty_label_cost_nothing(kind):
    nothing = np.array([0])
    losses = ctc_loss(jnp.zeros((1, 4, 3)), nothing, np.zeros((1, 2), int), nothing, kind)
    assert float(losses[0]) == 0.0


@EVERY
def test_frames_and_labels_beyond_the_lengths_change_nothing(kind):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 12, 4)).astype(np.float32)
    label = np.array([[1, 2, 2, 3]])
    alone = ctc_loss(jnp.asarray(logits), np.array([12]), label, np.array([4]), kind)
    padded_logits = np.concatenate([logits, rng.normal(size=(1, 9, 4))], axis=1)
    padded_label = np.array([[1, 2, 2, 3, 3, 1]])
    padded = ctc_loss(
        jnp.asarray(padded_logits, jnp.float32), np.array([12]), padded_label, np.array([4]), kind
    )
    assert float(alone[0]) == pytest.approx(float(padded[0]), rel=1e-6)


def random_rows(batch, length, longest, seed=0):
    """Logits, frames, labels and their lengths, some of them empty or without any alignment."""
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(3 * rng.normal(size=(batch, length, 41)), jnp.float32),
        jnp.asarray(rng.integers(0, length + 1, batch), jnp.int32),
        jnp.asarray(rng.integers(1, 5, (batch, longest)), jnp.int32),
        jnp.asarray(rng.integers(0, longest + 1, batch), jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=4)
def losses_and_gradient(logits, frames, labels, length, kind):
    def summed(x):
        losses = eager_ctc_loss(x, frames, labels, length, kind)
        return jnp.where(jnp.isfinite(losses), losses * weights, 0).sum(), losses

    weights = jnp.arange(1, 1 + len(logits))
    (_, losses), gradient = jax.value_and_grad(summed, has_aux=True)(logits)
    return losses, gradient


def assert_kernels_equal_the_scan(rows):
    wanted, wanted_gradient = losses_and_gradient(*rows, "scan")
    for kind in ("pallas", "triton"):
        losses, gradient = losses_and_gradient(*rows, kind)
        np.testing.assert_allclose(losses, wanted, rtol=1e-5)
        np.testing.assert_allclose(gradient, wanted_gradient, atol=2e-5 * len(losses))
    return wanted


@pytest.mark.parametrize(
    ("batch", "length", "longest"),
    [
        (1, 1, 1),
        pytest.param(5, 8, 3, marks=pytest.mark.slow),
        (8, 21, 9),
        pytest.param(3, 40, 70, marks=pytest.mark.slow),
    ],
    ids=["one frame", "whole blocks", "a part of a block", "states beyond a tile"],
)
def test_the_kernels_have_the_values_and_gradients_of_the_scan(batch, length, longest):
    assert_kernels_equal_the_scan(random_rows(batch, length, longest))


@pytest.mark.slow
def test_rows_cut_into_blocks_change_nothing(monkeypatch):
    rows = random_rows(20, 19, 4, seed=1)
    monkeypatch.setattr(ctc_pallas, "_MOST_ENTRIES", 8 * 128)  # 8, 8 and 4 rows
    losses = assert_kernels_equal_the_scan(rows)
    assert 5 < np.isfinite(losses).sum() < 20


ON_EIGHT_DEVICES = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[1])
from test_ctc import losses_and_gradient, random_rows
from b2txt_jax.training.sharding import make_mesh

rows = random_rows(16, 9, 4)
wanted = losses_and_gradient(*rows, "scan")
mesh = make_mesh(2)  # 4 x 2 of 8 devices
placed = jax.device_put(rows, NamedSharding(mesh, P("data")))
for kind in ("pallas", "triton"):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = losses_and_gradient(*placed, kind)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], atol=3e-4)
    assert found[1].sharding.shard_shape((16,)) == (4,)
print(np.isfinite(wanted[0]).sum())
"""


@pytest.mark.slow
def test_the_kernels_run_on_each_device_s_rows():
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, str(Path(__file__).parent)]
    found = subprocess.run(command, env=environment(8), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 3


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="'fast'; needed one of auto, scan, pallas, triton"):
        ctc_loss(*random_rows(1, 2, 1), "fast")
