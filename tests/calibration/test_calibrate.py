"""A recording day is added to a run: what moves, what stays, what is refused."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest

from b2txt_jax.calibration.calibrate import (
    Material,
    Settings,
    calibrate,
    kept_out,
    shortened,
    spoken,
)
from b2txt_jax.calibration.moving import moving_of, named
from b2txt_jax.calibration.trials import Mixture, Scorer, Spoken, batch_of, shape_for
from b2txt_jax.calibration.tune import Rates, Tuner
from b2txt_jax.cli import main
from b2txt_jax.config import load_config
from b2txt_jax.data.hdf5 import Hdf5Reader
from b2txt_jax.data.reader import open_folder
from b2txt_jax.inference.run import Run, load_run
from b2txt_jax.interop.convert import write_workdir
from b2txt_jax.interop.nejm import Run as Converted
from b2txt_jax.metrics import error_rate, greedy_decode, total
from b2txt_jax.training.checkpoint import BestScore
from b2txt_jax.training.ctc import ctc_loss
from b2txt_jax.training.step import init_state
from tests.calibration.small import small_transformer, transformer_config
from tests.conftest import FEATURES

FEW = ["--steps=2", "--rows=4"]


@pytest.fixture(scope="module")
def days(narrow):
    return open_folder(narrow).sessions


@pytest.fixture(scope="module")
def workdir(tiny_config, narrow, days, tmp_path_factory):
    """A run of the first three days with random day layers, whose folder has these days alone."""
    folder = tmp_path_factory.mktemp("calibrated")
    root = folder / "old"
    root.mkdir()
    for day in days[:3]:
        (root / day).symlink_to(narrow / day)
    data = dataclasses.replace(tiny_config.data, root=str(root), sessions=days[:3])
    config = dataclasses.replace(tiny_config, data=data)
    state = init_state(config, 3)
    noise = jax.random.normal(jax.random.key(1), state.params["day"]["bias"].shape)
    state.params["day"]["bias"] = state.params["day"]["bias"] + 0.3 * noise
    write_workdir(folder / "run", Converted(config, state, BestScore(1.0, 1.0, 0)))
    return folder / "run"


@pytest.fixture(scope="module")
def written(workdir, narrow, days, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new"
    command = ["calibrate", "--workdir", str(workdir), "--session", days[3], "--out", str(out)]
    data = ["--data", str(narrow)]
    assert main([*command, *data, *FEW, "--curve", "4", "--day-rate=0.01"]) == 0
    return out


def test_the_new_run_has_a_day_more_and_old_days_are_decoded_as_before(workdir, written, days):
    before, after = load_run(workdir), load_run(written)
    assert after.sessions == days
    old, new = before.params["day"]["weight"], after.params["day"]["weight"]
    np.testing.assert_array_equal(new[:3], old)
    report = json.loads((written / "calibration.json").read_text())
    start = days.index(report["start"]["day"])
    assert 0 < np.abs(new[3] - new[start]).max() < 0.03  # two steps of at most 0.01 each
    trials = after.logits("val")
    assert {one.ref.session for one in trials} == set(days[1:])  # the first has no val
    was = {one.ref.name: one.logits for one in before.logits("val")}
    for one in trials:
        if one.ref.name in was:
            np.testing.assert_allclose(one.logits, was[one.ref.name], atol=1e-6)
    assert report["old_days"]["before"] == report["old_days"]["after"]
    assert [one["sentences"] for one in report["curve"]] == [0, 4, 8]
    assert report["per"]["before"] is not None
    assert not (written / "sessions" / days[3]).is_dir() or (written / "sessions").is_dir()


def test_the_layer_starts_from_the_old_day_with_the_lowest_loss(workdir, written, narrow, days):
    report = json.loads((written / "calibration.json").read_text())
    run = load_run(workdir)
    reader = open_folder(narrow, FEATURES)
    trials = spoken(reader, reader.trials([days[3]], "train"), 3)
    labels, lengths = np.zeros((8, 40), np.int32), np.array([len(one.labels) for one in trials])
    for row, one in enumerate(trials):
        labels[row, : lengths[row]] = one.labels
    for day, found in report["start"]["losses"].items():
        of_trials = run.logits([one.features for one in trials], day)
        logits, frames = np.zeros((8, 45, 41), np.float32), np.array([len(x) for x in of_trials])
        for row, one in enumerate(of_trials):
            logits[row, : len(one)] = one
        loss = ctc_loss(logits, frames, labels, lengths).sum() / lengths.sum()
        assert found == pytest.approx(float(loss), rel=1e-4)
    assert report["start"]["losses"][report["start"]["day"]] == min(
        report["start"]["losses"].values()
    )


def test_before_the_first_sentence_the_day_is_decoded_with_the_layer_of_the_last(
    workdir, written, narrow, days
):
    run, reader = load_run(workdir), open_folder(narrow, FEATURES)
    trials = spoken(reader, reader.trials([days[3]], "val"), 3)
    logits = run.logits([one.features for one in trials], days[2])
    decoded = [[int(label) for label in greedy_decode(one)] for one in logits]
    rates = [
        error_rate(one.labels.tolist(), found) for one, found in zip(trials, decoded, strict=True)
    ]
    report = json.loads((written / "calibration.json").read_text())
    assert report["start"]["day"] != days[2]  # which the sentences chose
    assert report["per"]["before"] == pytest.approx(total(rates).rate)
    assert report["curve"][0] == {"sentences": 0, "per": report["per"]["before"]}


def small_run(days, kind: str) -> Run:
    """Return a run without day layers. Its values are random, since ones and zeros hide much."""
    if kind == "transformer":
        run = small_transformer(days, FEATURES)
    else:
        config = load_config("demo", ["--config.model.day_layer=False"])
        data = dataclasses.replace(config.data, sessions=tuple(days), feature_count=FEATURES)
        model = dataclasses.replace(config.model, units=16, layers=1)
        config = dataclasses.replace(config, data=data, model=model)
        run = Run(config, init_state(config, len(days)).params, 0)
    noise = jax.random.key(1)
    noisy = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(noise, x.shape), run.params)
    return dataclasses.replace(run, params=noisy)


@pytest.mark.parametrize("kind", ["transformer", pytest.param("gru", marks=pytest.mark.slow)])
def test_a_model_without_day_layers_gets_one_for_the_new_day_and_old_days_stay_bit_for_bit(
    narrow, days, kind
):
    reader, run = open_folder(narrow, FEATURES), small_run(days[:2], kind)
    old = [(reader, reader.trials([day], "train")) for day in days[:2]]
    old_val = spoken(reader, old[1][1][:2], 1)
    settings = Settings(steps=2, rows=4, day_rate=0.01)
    now = run
    for place, day in enumerate(days[2:4], start=2):
        new = spoken(reader, reader.trials([day], "train")[:3], place)
        done = calibrate(now, day, Material(new, new, old, old_val), settings)
        assert done.report["old_days"]["before"] == done.report["old_days"]["after"]
        assert {path.split("/")[0] for path in done.report["moved"]} == {"day"}
        now = Run(done.config, done.params, 1)
    x = old_val[0].features
    trained = run.logits(x, days[0])
    for day in days[:2]:
        np.testing.assert_array_equal(now.logits(x, day), trained)
    first, second = (now.logits(x, day) for day in days[2:4])
    assert np.abs(first - trained).max() > 1e-3
    assert np.abs(second - trained).max() > 1e-3
    assert not np.array_equal(first, second)
    before = named(run.params)
    for path, value in named(now.params).items():
        if not path.startswith("day/"):
            np.testing.assert_array_equal(value, before[path])


@pytest.mark.slow
@pytest.mark.parametrize("adapt", ["patch", "adapters"])
def test_without_day_layers_a_part_that_days_share_moves_and_old_days_are_replayed(
    narrow, days, adapt
):
    reader = open_folder(narrow, FEATURES)
    run = small_transformer(days[:3], FEATURES)
    old = [(reader, reader.trials([day], "train")) for day in days[:3]]
    new = spoken(reader, reader.trials([days[3]], "train")[:3], 3)
    material = Material(new, [], old)
    settings = Settings(adapt=adapt, rank=2, steps=1, rows=5, start="last")
    one, again = (calibrate(run, days[3], material, settings) for _ in range(2))
    before = named(run.params)
    moved = {
        name: np.asarray(value) - np.asarray(before[name])
        for name, value in named(one.params).items()
        if not np.array_equal(value, before[name])
    }
    if adapt == "patch":
        assert moved
        assert all(name.startswith("embed/") for name in moved)
    else:
        assert set(moved) == {name for name, value in before.items() if value.ndim == 2}
        for change in moved.values():
            assert np.linalg.matrix_rank(change, tol=1e-3 * np.linalg.norm(change)) <= 2
    assert one.report["replayed_days"] == 3
    jax.tree.map(np.testing.assert_array_equal, one.params, again.params)


@pytest.mark.slow
def test_a_calibration_that_costs_old_days_too_much_leaves_the_trained_values(
    narrow, days, monkeypatch
):
    reader = open_folder(narrow, FEATURES)
    run = small_transformer(days[:3], FEATURES)
    material = Material(
        spoken(reader, reader.trials([days[3]], "train")[:3], 3),
        [],
        [(reader, reader.trials([day], "train")) for day in days[:3]],
    )
    settings = Settings(adapt="patch", steps=1, rows=5, start="last", old_rise=0)
    losses = itertools.count(1.0)  # each higher than the one before
    monkeypatch.setattr(Scorer, "loss", lambda *_: next(losses))
    found = calibrate(run, days[3], material, settings)
    assert found.report["old_days"]["kept_share"] == 0
    jax.tree.map(np.testing.assert_array_equal, found.params, run.params)


@pytest.mark.parametrize(("most", "share"), [(0.3, 1.0), (0.06, 0.5), (0.0, 0.0)])
def test_a_change_is_shortened_until_the_loss_of_old_days_is_within_the_bound(most, share):
    start, moved = {"a": np.zeros(2)}, {"a": np.array([2.0, -4.0])}
    # 1 at the start, 1.05 half way, 1.2 at the end.
    values, kept = shortened(start, moved, lambda one: 1 + 0.05 * one["a"][0] ** 2, most)
    assert kept == share
    np.testing.assert_allclose(values["a"], share * moved["a"])


def test_old_sentences_that_are_watched_are_not_replayed(narrow, days):
    reader = open_folder(narrow, FEATURES)
    refs = [reader.trials([day], "train") for day in days[:3]]
    new = spoken(reader, reader.trials([days[3]], "train")[:1], 3)
    old = [(reader, some) for some in refs]
    material, watched = kept_out(transformer_config(days, FEATURES), Material(new, old=old))
    replayed = [ref.name for _, some in material.old for ref in some]
    assert {one.day for one in watched} == {0, 1, 2}
    assert sorted([*replayed, *(one.name for one in watched)]) == sorted(
        ref.name for some in refs for ref in some
    )
    assert all(5 * sum(one.day == day for one in watched) <= len(refs[day]) for day in range(3))


def test_a_change_of_low_rank_begins_as_none_and_is_added_to_every_shared_matrix(workdir):
    run = load_run(workdir)
    moving = moving_of(run.config, 2, "adapters", rank=2)
    before, moved = named(run.params), moving.taken(run.params)
    started = named(moving.placed(run.params, moved))
    for name, value in before.items():
        np.testing.assert_array_equal(started[name], value)
    rng = np.random.default_rng(0)
    factors = {
        name: rng.normal(size=value.shape).astype(np.float32)
        for name, value in moved.items()
        if name.endswith((":left", ":right"))
    }
    after = named(moving.placed(run.params, {**moved, **factors}))
    matrices = {name for name, value in before.items() if value.ndim == 2} - {"day/bias"}
    assert {name for name in after if not np.array_equal(after[name], before[name])} == matrices
    for name in matrices:
        change = factors[f"{name}:left"] @ factors[f"{name}:right"]
        assert np.linalg.matrix_rank(change) == 2
        np.testing.assert_allclose(after[name], before[name] + change, atol=1e-5)


def test_the_rates_and_the_replay_fit_what_moves(workdir, days):
    gru, transformer = load_run(workdir).config, transformer_config(days, FEATURES)
    for config, adapt, replay, rate in (
        (gru, None, 0.4, 0.0001),
        (gru, "patch", 0.4, 0.0001),
        (transformer, None, 0.6, 0.001),
        (transformer, "all", 0.6, 0.0001),
    ):
        moving, settings = moving_of(config, 0, adapt), Settings(adapt=adapt)
        assert (settings.replay_of(moving), settings.rates_of(moving).shared) == (replay, rate)
        given = Settings(adapt=adapt, replay=0.1, shared_rate=0.5)
        assert (given.replay_of(moving), given.rates_of(moving).shared) == (0.1, 0.5)


def test_a_batch_is_a_function_of_seed_and_step_and_has_the_share_of_old_trials():
    new, old = ([Spoken(day, np.zeros((1, 1)), np.ones(1), f"{day} {n}") for n in range(5)]
                for day in (1, 0))  # fmt: skip
    mixture = Mixture(new, [[lambda one=one: one for one in old]], 0.4)
    rows = [one.name for one in mixture.rows(0, 3, 10)]
    assert rows == [one.name for one in mixture.rows(0, 3, 10)]
    assert rows != [one.name for one in mixture.rows(1, 3, 10)]
    assert sum(name.startswith("0") for name in rows) == 4
    epoch = [one.name for step in range(5) for one in Mixture(new, [], 0.4).rows(0, step, 2)]
    assert sorted(epoch) == sorted([one.name for one in new] * 2)


def test_steps_lower_the_loss_with_one_compiled_program(workdir, narrow, days):
    run, reader = load_run(workdir), open_folder(narrow, FEATURES)
    trials = spoken(reader, reader.trials([days[2]], "train"), 2)[:4]
    moving = moving_of(run.config, 2)
    tuner = Tuner(run.config, moving, Rates(0.003, 0.0), seed=0, dropout=False)
    params = jax.device_put(run.params, jax.devices()[0])
    (moved, moments), losses = tuner.begin(moving.taken(params)), []
    for step in range(6):
        batch = batch_of(trials, shape_for(trials, 4))
        moved, moments, loss = tuner.step(moved, moments, params, batch, step, 1.0)
        losses.append(loss)
    assert losses[-1] < losses[0]
    assert tuner.programs == 1


@pytest.fixture
def attempt(workdir, narrow, days, tmp_path, capsys):
    """A function that calibrates with other arguments, and returns status and error."""

    def calibrated(session=days[3], data=narrow, *more):
        arguments = ["--workdir", str(workdir), "--session", session, "--data", str(data)]
        status = main(["calibrate", *arguments, "--out", str(tmp_path / "out"), *FEW, *more])
        return status, capsys.readouterr().err

    return calibrated


def copy_of_new_day(narrow, day, folder: Path, change) -> Path:
    shutil.copytree(narrow / day, folder / day)
    with h5py.File(folder / day / "data_train.hdf5", "r+") as file:
        for trial in file.values():
            change(trial)
    return folder


def without_labels(trial):
    del trial["seq_class_ids"], trial.attrs["seq_len"]


def fewer_features(trial):
    features = trial["input_features"][:, : FEATURES // 2]
    del trial["input_features"]
    trial["input_features"] = features


def test_what_cannot_be_calibrated_is_named_and_leaves_no_folder(attempt, narrow, days, tmp_path):
    status, said = attempt("t15.2030.01.01")
    assert (status, "t15.2030.01.01" in said) == (2, True)
    status, said = attempt(days[0])
    assert (status, "has already" in said) == (2, True)
    for change, needed in ((without_labels, "seq_class_ids"), (fewer_features, f"[T, {FEATURES}]")):
        data = copy_of_new_day(narrow, days[3], tmp_path / change.__name__, change)
        status, said = attempt(days[3], data)
        assert (status, needed in said) == (2, True), said
    status, said = attempt(days[3], narrow, "--replay=1")
    assert (status, "needed 0 to below 1" in said) == (2, True)
    for option, instead in (
        ("--rank=2", "needed --adapt adapters"),
        ("--adapter-rate=0.1", "needed --adapt adapters"),
        ("--shared-rate=0.1", "needed --adapt patch or all"),
        ("--old-rise=0.5", "needed --adapt patch or all"),
    ):
        status, said = attempt(days[3], narrow, option)
        assert (status, instead in said) == (2, True), option
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_without_the_data_of_old_days_nothing_is_replayed_and_that_is_said(
    attempt, narrow, days, tmp_path
):
    nowhere = f"--config.data.root={tmp_path / 'nowhere'}"
    status, said = attempt(days[3], narrow, nowhere, "--adapt=all")
    assert status == 0, said
    assert "neither replayed nor scored" in said
    report = json.loads((tmp_path / "out/calibration.json").read_text())
    assert report["replayed_days"] == 0
    assert report["old_days"]["after"] is None
    run = load_run(tmp_path / "out")
    with pytest.warns(UserWarning, match="have no val trial"):
        assert {one.ref.session for one in run.logits("val")} == {days[3]}
    assert isinstance(open_folder(tmp_path / "out/sessions"), Hdf5Reader)
