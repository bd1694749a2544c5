"""Orthogonal matrices made by products alone are those that a QR decomposition gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from b2txt_jax.model.orthogonal import orthogonal, polar_factor


def test_it_is_the_polar_factor_of_an_independent_library():
    gaussian = np.random.default_rng(0).normal(size=(600, 200)).astype(np.float32)
    expected, _ = scipy.linalg.polar(gaussian.astype(np.float64))
    np.testing.assert_allclose(polar_factor(jnp.asarray(gaussian)), expected, atol=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_matrix_too_wide_for_qr_has_orthonormal_columns(seed, monkeypatch):
    monkeypatch.setattr("b2txt_jax.model.orthogonal._QR_COLUMNS", 8)
    made = np.asarray(jax.jit(lambda key: orthogonal(key, 768, 256))(jax.random.key(seed)))
    np.testing.assert_allclose(made.T @ made, np.eye(256), atol=3e-6)
    assert made.dtype == np.float32


def test_its_entries_are_distributed_as_those_of_qr():
    keys = jax.random.split(jax.random.key(0), 400)
    draw = jax.vmap(lambda key: polar_factor(jax.random.normal(key, (96, 32))))
    ours = np.asarray(draw(keys))
    qr = np.asarray(jax.vmap(lambda key: orthogonal(key, 96, 32))(keys))
    # One entry, a product of two in a row and of two in a column: equal in distribution.
    for of in (
        lambda one: one[:, 5, 7],
        lambda one: one[:, 5, 7] * one[:, 5, 8],
        lambda one: one[:, 5, 7] * one[:, 6, 7],
        lambda one: np.trace(one[:, :32], axis1=1, axis2=2),
    ):
        assert scipy.stats.ks_2samp(of(ours), of(qr)).pvalue > 1e-3
    # Of a uniform column, the square of an entry is Beta(1/2, 95/2).
    assert scipy.stats.kstest(ours[:, 3, 3] ** 2, scipy.stats.beta(0.5, 47.5).cdf).pvalue > 1e-3
