"""Chunk by chunk as whole trials, with one program, for both families of models."""

import dataclasses

import jax
import numpy as np
import pytest

from b2txt_jax.config import load_config
from b2txt_jax.inference.run import Run
from b2txt_jax.live.model import LiveModel
from b2txt_jax.model.interface import make_model

TRANSFORMER = {"width": 16, "layers": 2, "heads": 2, "head_width": 8, "feedforward": 32}
SMALL = {
    "demo": ("demo", {"units": 16, "layers": 2}),
    "transformer": ("transformer_demo", TRANSFORMER),
    "calibrated transformer": ("transformer_demo", TRANSFORMER | {"day_change": True}),
}
DAYS = ("t15.2023.08.11", "t15.2023.08.13")


@pytest.fixture(
    scope="module",
    params=[
        "demo",
        pytest.param("transformer", marks=pytest.mark.slow),
        pytest.param("calibrated transformer", marks=pytest.mark.slow),
    ],
)
def run(request):
    """A run with random parameters."""
    recipe, small = SMALL[request.param]
    config = load_config(recipe)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sessions=DAYS, feature_count=16, buckets=((64, 8),)),
        model=dataclasses.replace(config.model, **small),
    )
    model = make_model(config.model, 16, 2)

    def init(key):  # perturbed: zeros and identities would hide mistakes
        noise = jax.random.key(1)
        params = model.init(key)
        return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(noise, a.shape), params)

    params = jax.jit(init)(jax.random.key(0))
    return Run(config, params, 0)


@pytest.mark.parametrize("kernel", [pytest.param("symmetric", marks=pytest.mark.slow), "one_sided"])
def test_chunks_give_the_logits_of_the_whole_trial_with_one_compiled_program(run, kernel):
    signal = dataclasses.replace(run.config.signal, smooth_kernel=kernel)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, signal=signal))
    rng = np.random.default_rng(0)
    model = LiveModel(run, DAYS[1], chunk_frames=2)
    model.warm_up()
    assert model.lookahead_seconds == (0.08 if kernel == "symmetric" else 0)
    for bins in (14, 15, 21, 47, 64):
        x = rng.normal(size=(bins, 16)).astype(np.float32)
        model.begin()
        parts = [model.push(x[i : i + 3]) for i in range(0, bins, 3)]
        live = np.concatenate([*parts, model.finish()])
        whole = run.logits(x, DAYS[1])
        assert live.shape == whole.shape
        np.testing.assert_allclose(live, whole, atol=1e-5)
    assert model.programs == 1


@pytest.mark.slow
def test_a_sentence_too_short_for_a_frame_has_none_and_the_next_one_is_whole(run):
    model = LiveModel(run)
    least = run.config.model.least_bins
    if least > 1:
        model.push(np.ones((least - 1, 16), np.float32))
        assert model.finish().shape == (0, 41)
    model.begin()
    x = np.random.default_rng(1).normal(size=(30, 16)).astype(np.float32)
    live = np.concatenate([model.push(x), model.finish()])
    np.testing.assert_allclose(live, run.logits(x, DAYS[1]), atol=1e-5)
