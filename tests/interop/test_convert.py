"""`b2txt convert`: converted runs decode as PyTorch does, train on, and go back unchanged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
import torch
from nejm_run import GRUDecoder, Run, args_with, error_of, save
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter1d

from b2txt_jax.cli import main
from b2txt_jax.config import read_written_config
from b2txt_jax.inference.run import Run as TrainedRun
from b2txt_jax.interop.convert import read_workdir
from b2txt_jax.interop.nejm import read_nejm
from b2txt_jax.interop.weights import moments_of, to_named
from b2txt_jax.metrics import error_rate, greedy_decode, total
from b2txt_jax.training.checkpoint import Checkpoints
from b2txt_jax.training.step import init_state
from lm_server.lm.build import build

SESSIONS = ["t15.2023.08.11", "t15.2023.08.13"]
LENGTHS = {SESSIONS[0]: [100, 737], SESSIONS[1]: [2000]}
"""Bins of the trials."""


@pytest.fixture(scope="module")
def trials(simulated, tmp_path_factory) -> Path:
    """Simulated trials one after another until they have LENGTHS, in the published layout."""
    root = tmp_path_factory.mktemp("trials")
    for session, lengths in LENGTHS.items():
        source = sorted((simulated / "hdf5_data_final").iterdir())[1] / "data_val.hdf5"
        (root / session).mkdir()
        with h5py.File(source) as from_file, h5py.File(root / session / "data_val.hdf5", "w") as to:
            signal = np.concatenate([trial["input_features"][:] for trial in from_file.values()])
            for number, bins in enumerate(lengths):
                name = f"trial_{number:04d}"
                from_file.copy(from_file["trial_0000"], to, name)
                del to[name]["input_features"]
                repeats = -(-bins // len(signal))
                to[name]["input_features"] = np.tile(signal, (repeats, 1))[:bins]
                to[name].attrs.update(n_time_steps=bins, session=session, trial_num=number)
    return root


@pytest.fixture(scope="module", params=[96, pytest.param(768, marks=pytest.mark.slow)])
def five_layers(trials, tmp_path_factory, request):
    """A model of five layers in PyTorch, at 768 units the published one, and its converted run."""
    args = args_with(
        model__n_units=request.param,
        model__n_layers=5,
        model__n_input_features=512,
        model__patch_size=14,
        model__patch_stride=4,
        dataset__sessions=SESSIONS,
        dataset__dataset_dir=str(trials),
    )
    torch.manual_seed(0)
    model = GRUDecoder(args)
    folder = tmp_path_factory.mktemp("full")
    run = read_nejm(
        save(folder / "theirs", {"model_state_dict": model.state_dict()}, args),
        ["--config.data.buckets=((2000, 64),)", "--config.data.eval_batch_size=3"],
    )
    (folder / "theirs/checkpoint/best_checkpoint").unlink()
    return model, run


def smooth(x: np.ndarray, padding: str) -> torch.Tensor:
    """[T, D] -> [1, T', D]: the published kernel, by scipy; PyTorch's convolution."""
    impulse = np.zeros(100)
    impulse[50] = 1
    kernel = gaussian_filter1d(impulse, 2)
    kernel = kernel[kernel > 0.01] / kernel[kernel > 0.01].sum()
    weight = torch.tensor(kernel, dtype=torch.float32).view(1, 1, -1)
    channels = torch.tensor(x).T[:, None]
    return torch.nn.functional.conv1d(channels, weight, padding=padding)[:, 0].T[None]


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_logits_of_five_layers_are_pytorchs(five_layers, trials, padding):
    model, run = five_layers
    signal = dataclasses.replace(run.config.signal, eval_padding=padding)
    config = dataclasses.replace(run.config, signal=signal)
    found = TrainedRun(config, run.state.params, 0).logits("val")
    assert [trial.ref.bins for trial in found] == [100, 737, 2000]
    for trial in found:
        with h5py.File(trials / trial.ref.session / "data_val.hdf5") as file:
            features = file[trial.ref.key]["input_features"][:]
        with torch.no_grad():
            day = SESSIONS.index(trial.ref.session)
            expected = model(smooth(features, padding), day).numpy()
        assert trial.logits.shape == expected.shape
        assert expected.std() > 0.1
        difference = np.abs(trial.logits - expected).max()
        print(f"{padding} {trial.ref.bins} bins: {difference:.1e}")
        assert difference < 1e-4


def weights(run: Run) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in run.model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)


def test_from_nejm_train_and_back(small, tmp_path, capsys):
    folder, theirs = small
    workdir = tmp_path / "run"
    command = ["convert", "--from-nejm", str(folder), "--workdir", str(workdir)]
    assert main([*command, "--config.data.buckets=((180, 40),)"]) == 0
    printed = capsys.readouterr()
    assert "4 sessions, step 2, validation PER 25.00 %" in printed.out
    assert "left out, without effect here: batches_per_save, checkpoint_dir" in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert_same(to_named(read_workdir(workdir, "best").state.params), weights(theirs))

    back = tmp_path / "back"
    assert main(["convert", "--to-nejm", str(back), "--workdir", str(workdir)]) == 0
    loaded = torch.load(back / "checkpoint/best_checkpoint", weights_only=True)
    other = Run(theirs.args, seed=1)
    other.model.load_state_dict(loaded["model_state_dict"], strict=True)
    assert_same(weights(other), weights(theirs))
    other.optimizer.load_state_dict(loaded["optimizer_state_dict"])
    assert {float(state["step"]) for state in other.optimizer.state.values()} == {2.0}
    assert len(other.optimizer.state) == len(weights(theirs)) - 2  # day 2 had no trial yet

    # Training goes on from step 2 without a configuration file, to step 4.
    assert main(["train", "--workdir", str(workdir)]) == 0
    assert "going on from step 2 of 4" in capsys.readouterr().out
    latest = read_workdir(workdir, "latest")
    assert int(latest.state.step) == 4
    assert max(moments_of(latest.state).steps.values()) == 4
    assert main(["infer", "--workdir", str(workdir), "--out", str(tmp_path / "logits.npz")]) == 0


@pytest.mark.slow
def test_a_converted_run_can_be_evaluated(small, tmp_path):
    workdir, text, words = tmp_path / "run", tmp_path / "text.txt", tmp_path / "words.dict"
    assert main(["convert", "--from-nejm", str(small[0]), "--workdir", str(workdir)]) == 0
    text.write_text("The cat sat.\nA cat ran.\n" * 50)
    words.write_text("a AH\ncat K AE T\nran R AE N\nsat S AE T\nthe DH AH\n")
    build([text], 2, str(words), tmp_path / "lm")
    # A model of two steps may leave a trial without a sentence: that trial is named, status 1.
    assert main(["evaluate", "--workdir", str(workdir), "--lm", str(tmp_path / "lm")]) in (0, 1)
    result = json.loads((workdir / "val/lm/evaluation.json").read_text())
    assert (result["trials"], result["settings"]["step"]) == (12, 2)

    # Its phoneme error rate is that of the weights as they came.
    found = read_nejm(small[0])
    trials = TrainedRun(found.config, found.state.params, 2).logits("val")
    rates = [error_rate(t.labels.tolist(), greedy_decode(t.logits).tolist()) for t in trials]
    assert result["per"]["all"]["errors"] == total(rates).errors > 0


@pytest.mark.slow
def test_the_latest_state_is_what_trains_on_elsewhere(small, tmp_path, capsys):
    folder, _ = small
    workdir, back = tmp_path / "run", tmp_path / "back"
    main(["convert", "--from-nejm", str(folder), "--workdir", str(workdir)])
    config = read_written_config(workdir / "config.json")
    with Checkpoints(workdir) as checkpoints:
        state, best = checkpoints.restore_latest(init_state(config, 4))
        later = jax.tree.map(lambda leaf: leaf + 1, state)
        checkpoints.save_latest(3, later, best)
    for which, step, entries in (("best", 2, 0), ("latest", 3, 19)):
        command = ["convert", "--to-nejm", str(back), "--workdir", str(workdir), "--force"]
        assert main([*command, "--which", which]) == 0
        assert ("running means are left out" in capsys.readouterr().err) == (which == "best")
        loaded = torch.load(back / "checkpoint/best_checkpoint", weights_only=True)
        assert loaded["scheduler_state_dict"]["last_epoch"] == step
        assert len(loaded["optimizer_state_dict"]["state"]) == entries
        expected = (state if which == "best" else later).params["h0"]
        np.testing.assert_array_equal(loaded["model_state_dict"]["h0"].numpy(), expected)
        assert loaded["val_PER"] == (0.25 if which == "best" else np.inf)


def test_safetensors_there_and_back_bit_for_bit(small, tmp_path, capsys):
    folder, theirs = small
    first, second, file = tmp_path / "first", tmp_path / "second", tmp_path / "m.safetensors"
    main(["convert", "--from-nejm", str(folder), "--workdir", str(first)])
    assert main(["convert", "--to-safetensors", str(file), "--workdir", str(first)]) == 0
    # PyTorch users load it into the published model as it is.
    Run(theirs.args, seed=1).model.load_state_dict(load_file(file), strict=True)
    with safe_open(file, framework="np") as opened:
        inside = json.loads(opened.metadata()["b2txt_config"])
    assert inside == json.loads((tmp_path / "m.json").read_text())
    assert main(["convert", "--from-safetensors", str(file), "--workdir", str(second)]) == 0
    assert "step 2, validation PER 25.00 %" in capsys.readouterr().out
    assert_same(to_named(read_workdir(second, "best").state.params), weights(theirs))
    assert (second / "config.json").read_text() == (first / "config.json").read_text()
    again = tmp_path / "again.safetensors"
    main(["convert", "--to-safetensors", str(again), "--workdir", str(second)])
    assert_same(load_file(again), load_file(file))


@pytest.mark.slow
def test_keys_can_be_changed_and_training_restarted_on_the_way_in(small, tmp_path):
    folder, _ = small
    command = ["convert", "--from-nejm", str(folder), "--workdir", str(tmp_path / "run")]
    changes = ["--config.optimizer.learning_rate=0.001", "--root", str(tmp_path), "--restart"]
    assert main([*command, *changes]) == 0
    config = read_written_config(tmp_path / "run/config.json")
    assert config.optimizer.learning_rate == 0.001
    assert config.data.root == str(tmp_path)
    with Checkpoints(tmp_path / "run") as checkpoints:
        state, best = checkpoints.restore_latest(init_state(config, 4))
    assert int(state.step) == 0
    assert best is None  # the first validation replaces the best, whatever it is


def test_errors_end_with_one_line_and_leave_nothing_behind(small, tmp_path, capsys):
    folder, _ = small
    workdir = tmp_path / "run"
    assert "holds no checkpoint" in error_of(capsys, "--from-nejm", tmp_path, "--workdir", workdir)
    wrong = ("--from-nejm", folder, "--workdir", workdir, "--config.model.units=9")
    assert "the configuration needs (1, 1, 9)" in error_of(capsys, *wrong)
    assert "train first" in error_of(capsys, "--to-nejm", tmp_path / "o", "--workdir", workdir)
    assert list(tmp_path.iterdir()) == []

    workdir.mkdir()
    (workdir / "notes.txt").write_text("mine")
    taken = error_of(capsys, "--from-nejm", folder, "--workdir", workdir)
    assert "is not empty" in taken
    assert "--force" in taken
    for _ in range(2):
        assert (
            main(["convert", "--from-nejm", str(folder), "--workdir", str(workdir), "--force"]) == 0
        )
    assert (workdir / "notes.txt").read_text() == "mine"

    file = tmp_path / "m.safetensors"
    file.write_bytes(b"something")
    to = ("--to-safetensors", file, "--workdir", workdir)
    assert "m.safetensors exists" in error_of(capsys, *to)
    assert file.read_bytes() == b"something"
    back = ("--from-safetensors", file, "--workdir", tmp_path / "new")
    assert "not a whole safetensors file" in error_of(capsys, *back)
    assert "by --from only" in error_of(capsys, *to, "--force", "--config.train.seed=1")
    assert main(["convert", *map(str, to), "--force"]) == 0
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    assert "not a whole safetensors file" in error_of(capsys, *back)
    assert not (tmp_path / "new").exists()
