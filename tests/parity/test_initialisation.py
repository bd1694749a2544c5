"""Fresh parameters against torch's initialisers: two-sample tests with fixed seeds."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from published import PublishedDecoder, differences
from scipy.stats import ks_2samp

from b2txt_jax.config import load_config
from b2txt_jax.model.interface import make_model

FEATURES, DAYS, SEEDS = 8, 2, 300
MODEL = dataclasses.replace(
    load_config("configs/nejm_baseline.py").model, units=24, layers=2, patch_size=3
)


@pytest.fixture(scope="module")
def draws():
    """Values of each parameter over many seeds, here and in PyTorch, [seeds, ...]; the first
    of ours as a tree."""
    draw = jax.jit(lambda key: make_model(MODEL, FEATURES, DAYS).init(key))
    # One by one: many QR decompositions at once can block each other on a machine of two cores.
    each = [draw(key) for key in jax.random.split(jax.random.key(0), SEEDS)]
    params = jax.tree.map(lambda *values: np.stack(values), *each)
    ours = {name: np.asarray(value) for name, value in params["gru"].items()}
    ours |= {f"out.{name}": np.asarray(value) for name, value in params["head"].items()}
    ours["h0"] = np.asarray(params["h0"])
    torch.manual_seed(0)
    decoders = [PublishedDecoder(MODEL, FEATURES, DAYS) for _ in range(SEEDS)]
    states = [
        {name.removeprefix("gru."): value for name, value in decoder.state_dict().items()}
        for decoder in decoders
    ]
    theirs = {name: np.stack([state[name].numpy() for state in states]) for name in ours}
    return ours, theirs, each[0]


NAMES = [
    *(
        f"{name}_l{layer}"
        for layer in range(2)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ),
    "out.weight",
    "out.bias",
    "h0",
]


@pytest.mark.parametrize("name", NAMES)
def test_values_have_torchs_distribution_and_bounds(draws, name):
    ours, theirs = draws[0][name], draws[1][name]
    assert ours.shape == theirs.shape
    # Few enough values that they are independent draws, also of an orthogonal matrix.
    few = np.linspace(0, ours[0].size - 1, 5).astype(int)
    columns = [values.reshape(SEEDS, -1)[:, few].ravel() for values in (ours, theirs)]
    assert ks_2samp(*columns).pvalue > 0.01
    assert ours.std() == pytest.approx(theirs.std(), rel=0.03)
    assert np.abs(ours.mean()) < 4 * ours.std() / np.sqrt(ours.size)
    if "weight_hh" not in name:
        # Both are uniform: the extremes over many draws are the bounds.
        assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=0.01)


@pytest.mark.parametrize("layer", [0, 1])
def test_recurrent_weights_are_orthogonal_over_the_whole_matrix_as_torchs(draws, layer):
    for values in (side[f"weight_hh_l{layer}"] for side in draws[:2]):
        gram = np.einsum("sij,sik->sjk", values, values)
        np.testing.assert_allclose(gram, np.tile(np.eye(24), (SEEDS, 1, 1)), atol=1e-5)


def test_the_distribution_test_sees_the_wrong_fan(draws):
    ours = draws[0]["weight_ih_l0"][:, 0, :5].ravel()
    # Xavier per gate instead of over the three gates
    per_gate = ours * np.sqrt((3 * 24 + 24) / (24 + 24))
    assert ks_2samp(per_gate, draws[1]["weight_ih_l0"][:, 0, :5].ravel()).pvalue < 0.01


def test_day_layers_begin_as_torchs_identity(draws):
    found = differences(PublishedDecoder(MODEL, FEATURES, DAYS), draws[2], gradients=False)
    assert {value for name, value in found.items() if name.startswith("day")} == {0.0}


def test_layers_and_parts_do_not_share_draws(draws):
    ours = draws[0]
    for first, second in (("bias_ih_l0", "bias_hh_l0"), ("bias_ih_l0", "bias_ih_l1")):
        correlation = np.corrcoef(ours[first].ravel(), ours[second].ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(ours[first].size)
