"""Several folders of sessions read as one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from b2txt_jax.config import ConfigError
from b2txt_jax.data.description import DataError
from b2txt_jax.data.joint import absolute, folders
from b2txt_jax.data.loader import TrainingData
from b2txt_jax.data.normalised import NormalisedReader
from b2txt_jax.data.reader import open_folder, session_widths
from b2txt_jax.inference.run import Run
from b2txt_jax.live.statistics import first_statistics, keep_statistics, statistics_file
from b2txt_jax.signal.rolling import cold
from b2txt_jax.training.loop import resolve
from b2txt_jax.training.step import (
    init_state,
    make_augmented_step,
    make_loss,
    packing_rules,
    step_keys,
)
from tests.data.participants import config_of, session


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Two participants, of 5 and of 3 features."""
    large, small = tmp_path / "large", tmp_path / "small"
    session(large, "a.2023.01.01", 5)
    session(large, "a.2023.01.02", 5)
    session(small, "b.2022.01.01", 3)
    return f"{large},{small}"


def test_sessions_of_all_folders_have_zeros_after_their_own_features(root: str) -> None:
    with open_folder(root, 5) as reader:
        assert reader.sessions == ("a.2023.01.01", "a.2023.01.02", "b.2022.01.01")
        (ref, *_) = reader.find_trials(("b.2022.01.01",), "train")
        narrow = open_folder(folders(root)[1], 3)
        own = narrow.read(narrow.find_trials(("b.2022.01.01",), "train")[0])
        for trial in (reader.read(ref), reader.read_into(ref, np.ones((50, 5), np.float16))):
            np.testing.assert_allclose(trial.features[:, :3], own.features, atol=2e-3)
            assert trial.features.shape == (40, 5)
            assert not trial.features[:, 3:].any()
        assert reader.sample(ref).features.shape == (3, 5)
        with pytest.raises(DataError, match="no data_train"):
            reader.find_trials(("c",), "train")
    assert session_widths(root, ("b.2022.01.01", "a.2023.01.01"), 5) == (3, 5)
    assert session_widths(root, ("a.2023.01.01",), 5) == ()


def test_what_cannot_be_joined_is_named(root: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--config\.data\.feature_count=5"):
        open_folder(root, 4)
    session(tmp_path / "more", "b.2022.01.01", 3)
    with pytest.raises(DataError, match=r"b.2022.01.01 is in .*small and in .*more"):
        open_folder(f"{root},{tmp_path / 'more'}", 5)
    with pytest.raises(DataError, match="lists a folder twice"):
        open_folder(f"{root},{folders(root)[0]}/../{folders(root)[0].name}", 5)
    with pytest.raises(DataError, match="nowhere is not there"):
        open_folder(f"{root},{tmp_path}/nowhere", 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no trial"):
        open_folder(f"{root},{tmp_path / 'empty'}", 5)


def test_a_folder_with_a_comma_in_its_name_is_one(tmp_path: Path) -> None:
    session(tmp_path / "a,b", "a.2023.01.01", 3)
    assert folders(str(tmp_path / "a,b")) == (tmp_path / "a,b",)
    assert open_folder(str(tmp_path / "a,b"), 3).sessions == ("a.2023.01.01",)
    assert absolute("x,y") == f"{Path.cwd()}/x,{Path.cwd()}/y"


def test_a_run_keeps_the_widths_of_its_sessions(root: str, tmp_path: Path) -> None:
    config = config_of(root)
    assert resolve(config, tmp_path / "run", False).data.widths == (5, 5, 3)
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, widths=(5, 3)))
    with pytest.raises(ConfigError, match="2 numbers for 3"):
        resolve(wrong, tmp_path / "run", False)


@pytest.mark.slow
def test_noise_never_reaches_features_that_a_session_does_not_have(root: str) -> None:
    config = resolve(config_of(root), Path("run"), False)
    params = init_state(config, 3).params
    data = TrainingData(config.data, config.data.sessions, 14, lambda bins: (bins - 14) // 4 + 1)
    _, batch = data.fill([(2, data.refs_of_day[2][0]), (0, data.refs_of_day[0][0])], (40, 3), 2)
    loss = make_loss(config, 3)
    keys = step_keys(0, np.int32(0))
    gradient = jax.jit(jax.grad(lambda p: loss(p, batch, keys, np.int32(0))[0]))(params)
    weight = np.asarray(gradient["day"]["weight"])
    assert not weight[2, 3:].any()
    assert weight[2, :3].all()
    assert weight[0].all()


@pytest.mark.slow
def test_noise_of_augmented_passes_never_reaches_them_either(root: str) -> None:
    config = resolve(config_of(root), Path("run"), False)
    params = init_state(config, 3).params
    run = Run(config, params, 0)
    batch = next(batch for _, _, batch in run.batches("val") if 2 in batch.day)
    weight = np.asarray(params["day"]["weight"])
    loud = weight.copy()
    loud[2, 3:] = 1e3
    step = jax.jit(make_augmented_step(config, 3))
    plain, other = (
        step({**params, "day": {**params["day"], "weight": one}}, batch, jax.random.key(1)).logits
        for one in (weight, loud)
    )
    np.testing.assert_array_equal(plain, other)


def test_sessions_of_one_folder_are_together_and_normalised_apart_from_others(root: str) -> None:
    signal = dataclasses.replace(config_of(root).signal, rolling_seconds=1.0)
    with open_folder(root, 5) as reader:
        large, small = ("a.2023.01.01", "a.2023.01.02"), ("b.2022.01.01",)
        assert [reader.together(name) for name in (*large, *small)] == [large, large, small]
        with pytest.raises(DataError, match="nowhere"):
            reader.together("nowhere")
        normalised = NormalisedReader(reader, signal)
        first = normalised.find_trials(small, "train")[0]
        np.testing.assert_array_equal(np.stack(normalised.before(first)), np.stack(cold(5)))


def test_a_live_day_begins_with_the_statistics_of_its_own_participant(
    root: str, tmp_path: Path
) -> None:
    config = config_of(root)
    config = dataclasses.replace(
        config, signal=dataclasses.replace(config.signal, rolling_seconds=1.0)
    )
    run = Run(resolve(config, tmp_path, False), {}, 0)
    large, small = folders(root)
    of_large = NormalisedReader(open_folder(large, 5), config.signal).after("a.2023.01.02")
    of_small = NormalisedReader(open_folder(small, 3), config.signal).after("b.2022.01.01")
    for day, expected in (("a.2023.01.01", of_large), ("b.2022.01.01", of_small)):
        path = statistics_file(run, tmp_path, day)
        found = first_statistics(run, path, day)
        np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=1e-2, atol=1e-3)
        assert np.abs(expected.first).max() > 0.1
        keep_statistics(run, path, cold(len(expected.first)))
    assert len([*tmp_path.glob("statistics.*.npz")]) == 2


def test_trials_of_days_with_other_features_share_no_row(root: str) -> None:
    config = config_of(root)
    shared = dataclasses.replace(config, model=dataclasses.replace(config.model, day_layer=False))
    rules = packing_rules(shared, 3, 1)
    assert rules is not None
    assert not rules.one_day
    rules = packing_rules(resolve(shared, Path("run"), False), 3, 1)
    assert rules is not None
    assert rules.one_day


def test_a_trial_may_have_its_own_features_or_zeros_after_them(root: str) -> None:
    config = resolve(config_of(root), Path("run"), False)
    run = Run(config, init_state(config, 3).params, 0)
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (0, 2)))
    own, zeros = (run.logits(one, "b.2022.01.01") for one in (x, padded))
    np.testing.assert_array_equal(own, zeros)
    with pytest.raises(DataError, match=r"needed \[T, 5\]"):
        run.logits(x, "a.2023.01.01")
