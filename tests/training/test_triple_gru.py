"""The triple GRU in the one training loop: logs, decoding, an early end."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from b2txt_jax.config import with_overrides
from b2txt_jax.inference.run import load_run
from b2txt_jax.interop.convert import read_workdir
from b2txt_jax.interop.errors import ConversionError
from b2txt_jax.signal.smooth import smooth
from b2txt_jax.training.checkpoint import BestScore
from b2txt_jax.training.loop import out_of_patience, train
from b2txt_jax.training.sharding import abstract_state
from b2txt_jax.training.step import model_of
from tests.conftest import FEATURES

STEPS = 4


@pytest.fixture(scope="module")
def config(tiny_config):
    model = {"name": "triple_gru", "layers": 1, "noise_units": 8}
    model |= {"noise_layers": 1, "noisy_layers": 1}
    overrides = [f"--config.model.{key}={value}" for key, value in model.items()]
    tiny_config = with_overrides(tiny_config, overrides)
    schedule = dataclasses.replace(
        tiny_config.train, steps=STEPS, log_every=1, validate_every=2, save_every=2
    )
    return dataclasses.replace(tiny_config, train=schedule)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("triple")
    assert train(config, workdir).finished
    return workdir


def logged(workdir, kind):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


@pytest.mark.slow
def test_the_parts_losses_and_the_growing_reversal_are_logged(config, run):
    steps = logged(run, "train")
    assert [one["step"] for one in steps] == [1, 2, 3, 4]
    for one in steps:
        total = one["clean_loss"] + config.model.noisy_weight * one["noisy_loss"]
        assert one["loss"] == pytest.approx(total, rel=1e-5)
        assert one["noise_rms"] > 0
    progress = np.arange(STEPS) / STEPS
    expected = 2 / (1 + np.exp(-10 * progress)) - 1
    np.testing.assert_allclose([one["reversal"] for one in steps], expected, atol=1e-6)


@pytest.mark.slow
def test_validation_tells_the_clean_and_the_noisy_per(run):
    for one in logged(run, "val"):
        assert one["per"] > 0
        assert one["noisy_per"] > 0


@pytest.mark.slow
def test_inference_decodes_the_clean_path_and_a_stream_equals_it(config, run):
    model = load_run(run)
    trials = model.logits("val")
    trial = trials[0]
    x = _smoothed(config, trial)
    start, step = model_of(config, len(model.config.data.sessions)).stream()
    day = np.array([model.config.data.sessions.index(trial.ref.session)])
    state, parts = start(model.params, 1), []
    step = jax.jit(step)
    for first in range(0, x.shape[1], 40):
        logits, state = step(model.params, x[:, first : first + 40], day, state)
        parts.append(logits[0])
    streamed = np.concatenate(parts)[: len(trial.logits)]
    np.testing.assert_allclose(streamed, trial.logits, atol=2e-5)


def _smoothed(config, trial):
    from b2txt_jax.data.reader import open_folder

    features = open_folder(config.data.root, FEATURES).read(trial.ref).features[None]
    return smooth(features, config.signal.smooth_std, config.signal.smooth_size)


@pytest.mark.slow
def test_conversion_says_that_only_the_baseline_has_a_published_format(run):
    with pytest.raises(ConversionError, match="'triple_gru'; needed 'gru'"):
        read_workdir(run, "best")


def test_every_wide_parameter_and_moment_of_the_noise_model_is_shared_by_devices(config):
    wide = dataclasses.replace(config.model, noise_units=0)
    for model in (config.model, wide):
        changed = dataclasses.replace(config, model=model)
        shapes = abstract_state(changed, 3)
        for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            shared = "noise/" in name or "day/" in name
            assert (model_of(changed, 3).spec(name) != PartitionSpec()) is (
                shared and leaf.ndim > 0 and not name.endswith("steps")
            )


@pytest.mark.parametrize(
    ("patience", "since", "stops"), [(0, 9, False), (2, 0, False), (2, 1, False), (2, 2, True)]
)
def test_patience_counts_validations_since_the_best(tiny_config, patience, since, stops):
    schedule = dataclasses.replace(tiny_config.train, patience=patience, validate_every=100)
    config = dataclasses.replace(tiny_config, train=schedule)
    assert out_of_patience(config, BestScore(0.5, 1.0, 437, since)) is stops
