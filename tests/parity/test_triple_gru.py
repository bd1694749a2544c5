"""The triple GRU against PyTorch: two plain backward passes in the place of the reversal."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from b2txt_jax.config import load_config
from b2txt_jax.model.gru.baseline import GRUSettings
from b2txt_jax.model.interface import make_model, parameter_count

FEATURES, DAYS, ROWS, BINS = 6, 3, 3, 22
SMALL = dataclasses.replace(
    load_config("configs/triple_gru.py").model,
    units=10,
    layers=2,
    noisy_layers=1,
    patch_size=4,
    patch_stride=2,
    dtype="float32",
    recurrence="scan",
)
BOTTLENECK = dataclasses.replace(SMALL, noise_units=7)
MODELS = {"full": SMALL, "bottleneck": BOTTLENECK}


@functools.cache
def forward_of(model):
    """Jitted: op by op, every loop would be compiled anew."""
    return jax.jit(make_model(model, FEATURES, DAYS).full)


@functools.cache
def apply_of(model):
    return jax.jit(make_model(model, FEATURES, DAYS).apply)


@functools.cache
def gradient_of(model):
    network = make_model(model, FEATURES, DAYS)

    def loss(params, x, bins, day, key, reversal):
        if model.name == "gru":
            outputs = network.apply(params, x, bins, day, key)
        else:
            outputs = network.full(params, x, bins, day, key, reversal)
        return sum(objectives(outputs.logits, outputs.aux.get("noisy", outputs.logits)))

    return jax.jit(jax.grad(loss))


def fresh(model):
    shapes = jax.eval_shape(lambda: make_model(model, FEATURES, DAYS).init(jax.random.key(0)))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape, scale=0.3), jnp.float32), shapes
    )


def data():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(ROWS, BINS, FEATURES)).astype(np.float32)
    return x, np.full(ROWS, BINS), np.array([0, 2, 0])


class Torch(nn.Module):
    """Written from the description, with PyTorch's own GRU; patches are built, nothing is fused."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        size = max(model.patch_size, 1)
        width = size * FEATURES
        hidden = model.noise_units or width
        self.noise = nn.GRU(width, hidden, model.noise_layers, batch_first=True)
        self.clean = nn.GRU(width, model.units, model.layers, batch_first=True)
        self.noisy = nn.GRU(width, model.units, model.noisy_layers, batch_first=True)
        self.double()

    def load(self, params):
        to = lambda a: torch.tensor(np.asarray(a, np.float64))  # noqa: E731
        self.values = jax.tree.map(to, params)
        for leaf in jax.tree.leaves(self.values):
            leaf.requires_grad_(True)

    def run(self, part, x):
        values = self.values[part]
        module = getattr(self, part)
        names = [name for name, _ in module.named_parameters()]
        weights = {n: values["gru"][n].reshape(getattr(module, n).shape) for n in names}
        layers = module.num_layers
        h0 = values["h0"].reshape(1, 1, -1).expand(layers, x.shape[0], -1).contiguous()
        return torch.func.functional_call(module, weights, (x, h0))[0]

    def inputs(self, part, x, day):
        weight, bias = (self.values[part]["day"][name][day] for name in ("weight", "bias"))
        x = nn.functional.softsign(x @ weight + bias[:, None])
        size, stride = max(self.model.patch_size, 1), max(self.model.patch_stride, 1)
        stride = stride if self.model.patch_size else 1
        frames = x.unfold(1, size, stride).transpose(2, 3)
        return frames.reshape(x.shape[0], frames.shape[1], -1)

    def head(self, part, x):
        return x @ self.values[part]["head"]["weight"].T + self.values[part]["head"]["bias"]

    def noise_of(self, x, day):
        states = self.run("noise", self.inputs("noise", x, day))
        if self.model.noise_units:
            out = self.values["noise"]["out"]
            states = states @ out["weight"].T + out["bias"]
        return states

    def clean_of(self, x, day, noise):
        return self.head("clean", self.run("clean", self.inputs("clean", x, day) - noise))

    def noisy_of(self, noise):
        return self.head("noisy", self.run("noisy", noise))


def objectives(logits, noisy):
    """Two smooth functions of the logits that weigh every value apart."""
    count = logits.shape[0] * logits.shape[1] * logits.shape[2]
    if isinstance(logits, torch.Tensor):
        weights = torch.sin(torch.arange(count, dtype=torch.float64)).reshape(logits.shape)
        return (weights * logits).sum(), (weights.flip(0) * noisy**2).sum()
    weights = jnp.sin(jnp.arange(count, dtype=jnp.float32)).reshape(logits.shape)
    return (weights * logits).sum(), (weights[::-1] * noisy**2).sum()


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def test_the_parts_give_what_pytorch_gives(model):
    params, (x, bins, day) = fresh(model), data()
    outputs = forward_of(model)(params, x, bins, day)
    peer = Torch(model)
    peer.load(params)
    x64, day64 = torch.tensor(x, dtype=torch.float64), torch.tensor(day)
    noise = peer.noise_of(x64, day64)
    np.testing.assert_allclose(outputs.aux["noise"], noise.detach(), atol=2e-6)
    np.testing.assert_allclose(outputs.logits, peer.clean_of(x64, day64, noise).detach(), atol=1e-5)
    np.testing.assert_allclose(outputs.aux["noisy"], peer.noisy_of(noise).detach(), atol=1e-5)


@pytest.mark.parametrize("factor", [pytest.param(0.0, marks=pytest.mark.slow), 0.3, 1.0])
def test_gradients_are_those_of_two_passes(model, factor):
    """First the adversary's loss, whose gradient at the noise is taken out, multiplied by -factor
    and sent into the noise model by hand; then the clean loss."""
    params, (x, bins, day) = fresh(model), data()
    ours = gradient_of(model)(params, x, bins, day, None, factor)

    peer = Torch(model)
    peer.load(params)
    x64, day64 = torch.tensor(x, dtype=torch.float64), torch.tensor(day)
    noise = peer.noise_of(x64, day64)
    given = noise.detach().requires_grad_(True)
    noisy = peer.noisy_of(given)
    objectives(noisy, noisy)[1].backward()
    noise.backward(-factor * given.grad)
    noise = peer.noise_of(x64, day64)
    logits = peer.clean_of(x64, day64, noise)
    objectives(logits, logits)[0].backward()
    flat = jax.tree_util.tree_flatten_with_path(ours)[0]
    for (path, one), other in zip(flat, jax.tree.leaves(peer.values), strict=True):
        scale = max(1.0, float(other.grad.abs().max()))
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            np.asarray(one) / scale, other.grad.numpy() / scale, atol=2e-5, err_msg=name
        )


def test_the_full_model_has_687_568_466_parameters():
    model = load_config("configs/triple_gru.py").model
    shapes = jax.eval_shape(lambda: make_model(model, 512, 45).init(jax.random.key(0)))
    assert parameter_count(shapes) == 687_568_466
    assert parameter_count({**shapes["noise"], "day": {}}) == 616_655_872
    assert parameter_count({**shapes["clean"], "day": {}}) == 25_408_553
    assert parameter_count(shapes["noisy"]) == 21_865_001
    assert parameter_count([shapes["noise"]["day"], shapes["clean"]["day"]]) == 23_639_040


def test_inference_gives_the_clean_logits_of_the_full_pass(model):
    params, (x, bins, day) = fresh(model), data()
    full = forward_of(model)(params, x, bins, day).logits
    decoded = apply_of(model)(params, x, bins, day).logits
    np.testing.assert_array_equal(decoded, full)


@pytest.mark.slow
def test_the_modes_do_not_retrace_each_other(model):
    params, (x, bins, day) = fresh(model), data()
    traced = []

    def counting(name, function):
        def counted(*arguments):
            traced.append(name)
            return function(*arguments)

        return jax.jit(counted)

    full = counting("full", make_model(model, FEATURES, DAYS).full)
    decode = counting("decode", make_model(model, FEATURES, DAYS).apply)
    for factor in (0.1, 0.2, 0.3):
        full(params, x, bins, day, jax.random.key(0), jnp.float32(factor))
        decode(params, x, bins, day)
    assert traced == ["full", "decode"]


PATCHES = {"patches": {}, "no patches": {"patch_size": 0}}
KINDS = {
    "baseline": GRUSettings(
        name="gru",
        units=10,
        layers=2,
        patch_size=4,
        patch_stride=2,
        dtype="float32",
        recurrence="scan",
    ),
    "full": dataclasses.replace(SMALL, noise_layers=1),
    "bottleneck": dataclasses.replace(BOTTLENECK, noise_layers=1),
}


PATHS = pytest.mark.parametrize(
    ("kind", "patches"),
    [
        pytest.param("baseline", "patches", marks=pytest.mark.slow),
        pytest.param("full", "no patches", marks=pytest.mark.slow),
        ("bottleneck", "patches"),
        pytest.param("baseline", "no patches", marks=pytest.mark.slow),
        pytest.param("full", "patches", marks=pytest.mark.slow),
        pytest.param("bottleneck", "no patches", marks=pytest.mark.slow),
    ],
)
"""Every kind, and both with patches and without; all pairs in `make test-slow`."""


@PATHS
def test_chunk_by_chunk_equals_the_whole_trial(kind, patches):
    """Also where a chunk is too short for a frame, and where one gives several."""
    model = dataclasses.replace(KINDS[kind], **PATCHES[patches])
    params, (x, bins, day) = fresh(model), data()
    whole = apply_of(model)(params, x, bins, day).logits
    start, step = make_model(model, FEATURES, DAYS).stream()
    step = jax.jit(step)
    state, parts, first = start(params, ROWS), [], 0
    for size in (2, 2, 7, 2, 9):
        logits, state = step(params, x[:, first : first + size], day, state)
        parts.append(logits)
        first += size
    assert first == BINS
    streamed = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(streamed, whole, atol=3e-6)


@pytest.mark.slow
@PATHS
def test_bfloat16_goes_through_every_path_and_stays_near_float32(kind, patches):
    exact = dataclasses.replace(KINDS[kind], **PATCHES[patches])
    half = dataclasses.replace(exact, dtype="bfloat16")
    params, (x, bins, day) = fresh(exact), data()
    whole = np.asarray(apply_of(exact)(params, x, bins, day).logits)

    gradient = gradient_of(half)(params, x, bins, day, jax.random.key(3), 0.5)
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
    logits = apply_of(half)(params, x, bins, day).logits
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, whole, atol=0.1)
    start, step = make_model(half, FEATURES, DAYS).stream()
    step = jax.jit(step)
    first, state = step(params, x[:, :10], day, start(params, ROWS))
    second, _ = step(params, x[:, 10:], day, state)
    streamed = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(streamed, logits, atol=0.02)

    def rounded(values):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), values)

    # States, features and parameters that somebody keeps in bfloat16.
    kept = state._replace(states=rounded(state.states))
    second, after = step(params, x[:, 10:].astype(jnp.bfloat16), day, kept)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), logits, atol=0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.states)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(
        apply_of(half)(rounded(params), x, bins, day).logits, logits, atol=0.2
    )


@pytest.mark.slow
def test_recomputed_frames_change_no_gradient():
    params, (x, bins, day) = fresh(SMALL), data()
    again = gradient_of(dataclasses.replace(SMALL, recompute_frames=4))
    recomputed = again(params, x, bins, day, None, 0.3)
    kept = gradient_of(SMALL)(params, x, bins, day, None, 0.3)
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)
