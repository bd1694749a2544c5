"""Learning without labels, and a run that starts from what was learned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest

from b2txt_jax.config import CONFIG_FILE, Config, ConfigError, load_config, write_config
from b2txt_jax.data.description import DataError
from b2txt_jax.data.loader import Batch
from b2txt_jax.data.write_hdf5 import write_trial
from b2txt_jax.inference.run import load_run
from b2txt_jax.signal.smooth import smooth_as
from b2txt_jax.training.loop import resolve, train
from b2txt_jax.training.pretrain import (
    HEAD,
    make_pretraining_loss,
    make_pretraining_step,
    pretrain,
    pretraining_state,
)
from b2txt_jax.training.step import init_state, model_of
from b2txt_jax.training.warm_start import warm_started

WIDTH = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two sessions of sine waves without labels, and a tiny model."""
    root = tmp_path_factory.mktemp("unlabelled")
    rng = np.random.default_rng(0)
    for name in ("a.2023.01.01", "a.2023.01.02"):
        (root / name).mkdir()
        with h5py.File(root / name / "data_train.hdf5", "w") as file:
            for index in range(6):
                phase = rng.uniform(0, 6, WIDTH)
                wave = np.sin(np.arange(80)[:, None] / 10 + phase) * 1.4
                group = file.create_group(f"trial_{index:04d}")
                write_trial(group, name, 1, index, wave.astype(np.float32), None, None)
    keys = {
        "data.root": root,
        "data.feature_count": WIDTH,
        "data.days_per_batch": 2,
        "data.trials_per_day": 2,
        "model.units": 16,
        "model.layers": 1,
        "model.recurrence": "scan",
        "model.rnn_dropout": 0,
        "model.input_dropout": 0,
        "optimizer.warmup_steps": 0,
        "train.steps": 40,
        "train.save_every": 20,
    }
    return load_config("demo", [f"--config.{key}={value}" for key, value in keys.items()])


@pytest.fixture(scope="module")
def pretrained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    workdir = tmp_path_factory.mktemp("runs") / "pretrained"
    return workdir, pretrain(config, workdir)


def batch_of(bins: list[int]) -> Batch:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(len(bins), 60, WIDTH)).astype(np.float32)
    for row, count in enumerate(bins):
        features[row, count:] = 0
    days = np.arange(len(bins), dtype=np.int32) % 2
    none = np.zeros((len(bins), 1), np.int32)
    return Batch(features, np.array(bins, np.int32), days, none, none[:, 0])


@pytest.mark.slow
def test_the_target_is_the_mean_of_the_bins_after_those_that_a_frame_is_of(config: Config) -> None:
    batch, bias = batch_of([60, 37]), np.arange(WIDTH, dtype=np.float32)
    params = pretraining_state(config, 2).params
    params[HEAD]["bias"] = jax.numpy.array(bias)
    loss = make_pretraining_loss(config, 2, 0.0)(params, batch, jax.random.key(0))
    errors = []
    for row, count in enumerate(batch.bins):
        # A patch of 14 bins every 4. Smoothing looks 4 bins ahead.
        for first in range(14 + 4, 60, 4):
            if first + 4 <= count:
                mean = batch.features[row, first : first + 4].mean(axis=0)
                errors.append((bias - mean) ** 2)
    assert len(errors) == 10 + 4
    np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-5)


def test_what_is_predicted_was_not_seen(config: Config) -> None:
    batch, model = batch_of([60]), model_of(config, 2)
    params = model.init(jax.random.key(0))

    def states(features: np.ndarray) -> np.ndarray:
        x = smooth_as(jax.numpy.array(features), config.signal)
        return np.asarray(model.apply(params, x, batch.bins, batch.day).logits)

    frame = 5
    first = frame * 4 + 14 + 4  # of its target
    later, earlier = batch.features.copy(), batch.features.copy()
    later[:, first:] += 1.0
    earlier[:, first - 1] += 1.0
    before = states(batch.features)
    np.testing.assert_array_equal(states(later)[:, : frame + 1], before[:, : frame + 1])
    assert (states(earlier)[:, frame] != before[:, frame]).any()


def test_hidden_channels_and_channels_of_others_do_not_reach_the_loss(config: Config) -> None:
    narrow = dataclasses.replace(config, data=dataclasses.replace(config.data, widths=(5, 3)))
    params, batch = pretraining_state(config, 2).params, batch_of([60, 60])
    params[HEAD]["bias"] = jax.numpy.ones(WIDTH)
    loss = make_pretraining_loss(narrow, 2, 0.3)
    other = batch._replace(features=batch.features.copy())
    other.features[1, :, 3:] += 9.0
    key = jax.random.key(0)
    assert loss(params, other, key) == loss(params, batch, key)
    other.features[0, :, 3:] += 9.0
    assert loss(params, other, key) != loss(params, batch, key)


@pytest.mark.slow
def test_waves_without_labels_are_learned_and_a_call_goes_on(
    config: Config, pretrained: tuple[Path, float]
) -> None:
    workdir, error = pretrained
    assert error < 0.9  # of a variance of 0.98
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=45))
    pretrain(longer, workdir)
    lines = (workdir / "pretraining.jsonl").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f'{{"step": {step}' for step in (10, 20, 30, 40, 45)
    ]


@pytest.mark.slow
def test_a_finished_pretraining_called_again_has_the_error_that_it_had(
    config: Config, pretrained: tuple[Path, float]
) -> None:
    workdir, _ = pretrained
    log = workdir / "pretraining.jsonl"
    before = log.read_text()
    error = json.loads(before.splitlines()[-1])["loss"]
    log.write_text(before + '{"step": 41, "lo')  # killed amid a line
    assert pretrain(config, workdir) == error
    assert log.read_text() == before


@pytest.mark.slow
def test_a_run_starts_from_the_weights_and_the_day_layers_of_its_sessions(
    config: Config, pretrained: tuple[Path, float]
) -> None:
    sessions = ("b.new", "a.2023.01.02")
    keys = {"sessions": sessions}
    new = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **keys),
        train=dataclasses.replace(config.train, warm_start=str(pretrained[0]), ema=0.9),
    )
    fresh = init_state(new, 2)
    day = np.asarray(fresh.params["day"]["weight"])
    state, said = warm_started(fresh, new)
    assert "day layers of 1 sessions" in said
    weight = np.asarray(state.params["day"]["weight"])
    np.testing.assert_array_equal(weight[0], day[0])
    assert (weight[1] != day[1]).any()
    learned = np.asarray(state.params["gru"]["weight_hh_l0"])
    assert (learned != np.asarray(fresh.params["gru"]["weight_hh_l0"])).any()
    assert state.params[HEAD]["weight"].shape == (41, 16)
    assert state.ema is not None
    np.testing.assert_array_equal(state.ema["gru"]["weight_hh_l0"], learned)
    other = dataclasses.replace(new, model=dataclasses.replace(new.model, units=7))
    kept = warm_started(init_state(other, 2), other)[1]
    assert "fresh: " in kept
    assert "gru/weight_hh_l0" in kept


@pytest.mark.slow
def test_training_does_not_go_on_in_the_folder_of_a_pretrained_run(
    config: Config, pretrained: tuple[Path, float], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"--config.train.warm_start={pretrained[0]}"):
        train(config, pretrained[0])
    (tmp_path / "checkpoints/latest/1").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds a trained run"):
        pretrain(config, tmp_path)


def test_a_pretrained_run_gives_no_logits(tmp_path: Path) -> None:
    (tmp_path / "pretraining.jsonl").touch()
    with pytest.raises(ConfigError, match="holds a pretrained run, which has no map to phonemes"):
        load_run(tmp_path)


def test_a_call_with_another_split_share_or_data_does_not_go_on(
    config: Config, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints/latest/1").mkdir(parents=True)
    (tmp_path / "pretraining.jsonl").touch()
    write_config(resolve(config, tmp_path, resumed=False), tmp_path / CONFIG_FILE)
    (tmp_path / "pretraining.json").write_text('{"split": "train", "hidden": 0.3}')
    (tmp_path / "data.json").write_text('{"dtype": "float32", "files": {}}')
    for other in ({"split": "val"}, {"hidden": 0.5}):
        with pytest.raises(ConfigError, match=r"--split train --hidden 0\.3, and this is"):
            pretrain(config, tmp_path, **other)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="data are not those"):
        pretrain(config, tmp_path)


def test_what_cannot_be_pretrained_or_started_from_is_named(config: Config, tmp_path: Path) -> None:
    triple = load_config("triple_gru_small", [f"--config.data.root={config.data.root}"])
    with pytest.raises(ConfigError, match="'triple_gru' cannot be pretrained"):
        make_pretraining_step(triple, 2, 0.3)
    with pytest.raises(ConfigError, match="--hidden is 1"):
        pretrain(config, tmp_path / "run", hidden=1.0)
    missing = dataclasses.replace(config.train, warm_start=str(tmp_path / "nowhere"))
    resolved = resolve(config, tmp_path / "run", False)
    with pytest.raises(ConfigError, match="train first"):
        warm_started(init_state(resolved, 2), dataclasses.replace(resolved, train=missing))
