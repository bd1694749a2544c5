"""The Transformer through every command, as the GRU: train, resume, infer, stream, convert."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from devices import finish, losses, start, train_here
from jax.sharding import PartitionSpec
from safetensors import safe_open

from b2txt_jax.cli import main
from b2txt_jax.config import with_overrides
from b2txt_jax.data.reader import open_folder
from b2txt_jax.inference.run import load_run
from b2txt_jax.signal.smooth import smooth
from b2txt_jax.training.sharding import abstract_state
from b2txt_jax.training.step import model_of
from tests.conftest import FEATURES

SMALL = {
    "name": "transformer",
    "width": 16,
    "layers": 2,
    "heads": 2,
    "head_width": 8,
    "feedforward": 24,
    "context": 2.0,
    "context_least": 0.4,
    "context_most": 2.0,
}
MODEL = [f"--config.model.{key}={value}" for key, value in SMALL.items()]


@pytest.fixture(scope="module")
def overrides(tiny_overrides):
    kept = [one for one in tiny_overrides if "model." not in one]
    return [*kept, *MODEL, "--config.train.log_every=1"]


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("transformer")
    train_here(workdir, [*overrides, "--config.train.steps=3"])
    return workdir


@pytest.mark.slow
def test_a_resumed_run_logs_the_losses_of_a_whole_one(overrides, tmp_path):
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    train_here(resumed, [*overrides, "--config.train.steps=3"])
    assert "going on from step 3" in train_here(resumed, overrides)
    train_here(whole, overrides)
    np.testing.assert_allclose(losses(resumed), losses(whole), rtol=1e-6)


@pytest.mark.slow
def test_inference_equals_a_stream_of_frames(run):
    model = load_run(run)
    config, (trial, *_) = model.config, model.logits("val")
    features = open_folder(config.data.root, FEATURES).read(trial.ref).features[None]
    x = smooth(features, config.signal.smooth_std, config.signal.smooth_size)
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % 4), (0, 0)))
    begin, step = model_of(config, len(config.data.sessions)).stream()
    step = jax.jit(step, donate_argnums=3)
    state, parts = begin(model.params, 1), []
    for first in range(0, x.shape[1], 4):
        logits, state = step(model.params, x[:, first : first + 4], np.array([0]), state)
        parts.append(logits[0])
    assert step._cache_size() == 1
    assert len(parts) == len(trial.logits)
    np.testing.assert_allclose(np.concatenate(parts), trial.logits, atol=5e-5)


@pytest.mark.slow
def test_its_weights_cross_safetensors_bit_for_bit(run, tmp_path, capsys):
    file, copy = tmp_path / "m.safetensors", tmp_path / "copy"
    assert main(["convert", "--to-safetensors", str(file), "--workdir", str(run)]) == 0
    assert main(["convert", "--from-safetensors", str(file), "--workdir", str(copy)]) == 0
    with safe_open(file, framework="np") as stored:
        assert stored.get_tensor("layer0.attention.qkv.weight").shape == (48, 16)
    one, other = load_run(run), load_run(copy)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    for a, b in zip(one.logits("val"), other.logits("val"), strict=True):
        np.testing.assert_array_equal(a.logits, b.logits)
    capsys.readouterr()
    wider = [*("convert", "--from-safetensors", str(file), "--workdir", str(tmp_path / "wider"))]
    assert main([*wider, "--config.model.width=20"]) == 2
    error = capsys.readouterr().err
    assert "the configuration needs (20,)" in error
    assert main(["convert", "--to-nejm", str(tmp_path / "n"), "--workdir", str(run)]) == 2
    assert "needed 'gru': only that has a published format" in capsys.readouterr().err


@pytest.mark.slow
def test_devices_that_share_its_rows_give_the_losses_of_one(overrides, tmp_path):
    few = [*overrides, "--config.data.trials_per_day=2", "--config.train.steps=4"]
    train_here(tmp_path / "alone", few)
    finish(start(tmp_path / "four", few, devices=4))
    np.testing.assert_allclose(losses(tmp_path / "four"), losses(tmp_path / "alone"), rtol=1e-5)


@pytest.mark.parametrize("days", [False, True])
def test_only_day_layers_are_split_over_the_model_axis(tiny_config, days):
    config = with_overrides(tiny_config, [*MODEL, f"--config.model.day_layer={days}"])
    model, state = model_of(config, 3), abstract_state(config, 3)
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    }
    split = {name for name in names if model.spec(name) != PartitionSpec()}
    assert split == {n for n in names if n.endswith(("day/weight", "day/bias"))}
    assert bool(split) is days
