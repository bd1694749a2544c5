"""What a run loses when it is killed, preempted, out of disk, or given a damaged checkpoint."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time

import h5py
import jax
import numpy as np
import pytest
from devices import TRAIN, finish, losses, start

from b2txt_jax.config import with_overrides
from b2txt_jax.training.checkpoint import CheckpointError
from b2txt_jax.training.loop import FINISHED_FILE, train
from b2txt_jax.training.tracker import TrainingError

STEPS = 12
MORE = [
    "--config.data.trials_per_day=1",
    f"--config.train.steps={STEPS}",
    "--config.train.log_every=1",
    "--config.train.validate_every=5",
    "--config.train.save_every=1",
]


@pytest.fixture(scope="module")
def uninterrupted(tiny_overrides, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(workdir, [*tiny_overrides, *MORE]))
    assert json.loads((workdir / FINISHED_FILE).read_text())["step"] == STEPS
    return losses(workdir)


def wait_for(condition, run, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.002)


def test_killed_in_the_middle_of_saves_a_run_ends_bit_identical(
    tiny_overrides, uninterrupted, tmp_path
):
    latest = tmp_path / "checkpoints" / "latest"
    for fewest in (1, 4):
        [run] = start(tmp_path, [*tiny_overrides, *MORE])
        wait_for(lambda n=fewest: any(p.name == str(n) for p in latest.glob("*")), run)
        # A folder of this name exists only while a save is on its way.
        wait_for(lambda: any(latest.glob("*orbax-checkpoint-tmp*")), run)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert not (tmp_path / FINISHED_FILE).exists()
    outputs = finish(start(tmp_path, [*tiny_overrides, *MORE]))
    assert "going on from step" in outputs[0]
    assert losses(tmp_path) == uninterrupted


def test_preemption_saves_says_so_and_exits_0(tiny_overrides, uninterrupted, tmp_path):
    [run] = start(tmp_path, [*tiny_overrides, *MORE, "--config.train.save_every=1000"])
    metrics = tmp_path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size, run)
    run.send_signal(signal.SIGTERM)
    output = " ".join(run.communicate(timeout=120)[0].split())
    assert run.returncode == 0, output
    if "stopped at step" in output:  # else it was done before the signal came
        assert "it is saved: the same command goes on from there" in output
        assert not (tmp_path / FINISHED_FILE).exists()
        finish(start(tmp_path, [*tiny_overrides, *MORE, "--config.train.save_every=1000"]))
    assert losses(tmp_path) == uninterrupted


def test_a_full_disk_is_one_error_that_names_the_step_and_loses_no_earlier_one(
    tiny_overrides, uninterrupted, tmp_path
):
    two = [*tiny_overrides, *MORE, "--config.train.steps=2"]
    finish(start(tmp_path, two))

    def no_large_file():
        # The system refuses to let a file grow beyond this, as it would on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    failed = subprocess.run(
        [*TRAIN, "--workdir", str(tmp_path), *tiny_overrides, *MORE],
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=no_large_file,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": ""},
        check=False,
    )
    message = " ".join(failed.stderr.split())
    assert failed.returncode == 2, message
    assert "error: saving step 3 " in message
    assert "File too large" in message
    assert "Complete checkpoints that are left: steps [1, 2]" in message
    # TensorStore's threads may print of their own closed loop; no traceback may be of this program.
    assert not re.search(r'File "[^"]*/b2txt_jax/(training/|cli)', failed.stderr), failed.stderr
    finish(start(tmp_path, [*tiny_overrides, *MORE]))
    assert losses(tmp_path) == uninterrupted


def test_a_damaged_latest_checkpoint_names_its_step_and_the_way_out(tiny_config, tmp_path):
    config = with_overrides(tiny_config, ["--config.train.steps=4"])
    train(with_overrides(config, ["--config.train.steps=3"]), tmp_path)
    latest = tmp_path / "checkpoints" / "latest"
    assert sorted(path.name for path in latest.iterdir()) == ["2", "3"]
    for path in (latest / "3").rglob("*"):
        if path.is_file() and path.stat().st_size > 2000:
            path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"latest/3 cannot be read.*to go on from step 2"):
        train(config, tmp_path)
    shutil.rmtree(latest / "3")
    assert train(config, tmp_path).step == 4


@pytest.fixture
def poisoned(tiny_config, simulated, tmp_path):
    """A copy of the sessions with trials whose features overflow float32 in the augmentation."""
    root = tmp_path / "data"
    shutil.copytree(simulated / "hdf5_data_final", root)
    session = sorted(path.name for path in root.iterdir())[1]
    with h5py.File(root / session / "data_train.hdf5", "r+") as file:
        for name in list(file)[:4]:
            features = file[name]["input_features"]
            features[...] = np.full(features.shape, 3e38, np.float32)
    return with_overrides(
        tiny_config,
        [
            f"--config.data.root={root}",
            "--config.train.log_every=1",
            "--config.signal.static_gain_std=0.5",
        ],
    ), session


def test_a_step_that_is_not_finite_stops_the_run_and_names_step_and_trials(poisoned, tmp_path):
    config, session = poisoned
    with pytest.raises(TrainingError, match=rf"step \d+: loss .*{session}/trial_"):
        train(config, tmp_path / "run")


def test_a_step_that_is_not_finite_is_skipped_and_counted_where_so_configured(poisoned, tmp_path):
    config, session = poisoned
    config = with_overrides(config, ["--config.train.on_nonfinite=skip"])
    result = train(config, tmp_path / "run")
    assert result.finished
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert skipped
    for line in skipped:
        assert any(name.startswith(session) for name in line["trials"])
    finished = json.loads((tmp_path / "run" / FINISHED_FILE).read_text())
    assert finished["skipped_steps"] == len(skipped)
    # A failure is not a number: only steps that count have a loss.
    steps = {line["step"] for line in lines if line["kind"] == "train" and "loss" in line}
    assert steps == set(range(1, 7)) - {line["step"] for line in skipped}
    assert all(np.isfinite(line["loss"]) for line in lines if line["kind"] == "val")


def test_buckets_left_open_are_chosen_from_the_data_and_kept_for_the_run(tiny_config, tmp_path):
    config = with_overrides(tiny_config, ["--config.data.buckets=()", "--config.train.steps=2"])
    train(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["data"]["buckets"]
    assert written
    assert jax.tree.leaves(written)
    longer = with_overrides(config, ["--config.train.steps=3"])
    assert train(longer, tmp_path).step == 3
