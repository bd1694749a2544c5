"""What a run loses when it is killed, preempted, out of disk, or given a damaged checkpoint."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from devices import TRAIN, finish, losses, start, train_here
from rich.console import Console

from b2txt_jax.config import with_overrides
from b2txt_jax.training import loop
from b2txt_jax.training.loop import FINISHED_FILE, resolve, train
from b2txt_jax.training.tracker import Tracker, TrainingError

STEPS = 5
MORE = [
    f"--config.train.steps={STEPS}",
    "--config.train.log_every=1",
    "--config.train.validate_every=5",
    "--config.train.save_every=1",
]
# Never done before the signal.
ENDLESS = 1_000_000
SELDOM = [
    "--config.train.log_every=1",
    f"--config.train.steps={ENDLESS}",
    f"--config.train.validate_every={ENDLESS}",
    f"--config.train.save_every={ENDLESS}",
]


def steps_of(count):
    return f"--config.train.steps={count}"


def rows_for(devices):
    """Overrides that give each device a row."""
    if devices == 1:
        return []
    return ["--config.data.trials_per_day=2", "--config.data.eval_batch_size=8"]


@pytest.fixture(scope="module")
def uninterrupted(tiny_overrides, tmp_path_factory):
    """Losses of the first so many steps, never interrupted by anything."""
    folders = {}

    def of_steps(steps, devices=1, processes=1):
        asked = -(-steps // 8) * 8  # few, and most often enough for the next call too
        key = (devices, processes, asked)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("uninterrupted")
            more = [*tiny_overrides, *rows_for(devices * processes), *SELDOM, steps_of(asked)]
            if devices * processes == 1:
                train_here(folders[key], more)
            else:
                finish(start(folders[key], more, devices, processes))
            assert json.loads((folders[key] / FINISHED_FILE).read_text())["step"] == asked
        return losses(folders[key])[:steps]

    return of_steps


@pytest.fixture(scope="module")
def two_steps(tiny_overrides, tmp_path_factory):
    """The run after two of its steps; copy it, do not change it."""
    workdir = tmp_path_factory.mktemp("two_steps")
    train_here(workdir, [*tiny_overrides, *MORE, steps_of(2)])
    return workdir


def wait_for(condition, run, seconds=600.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [pytest.param((1,), id="once"), pytest.param((1, 4), id="twice", marks=pytest.mark.slow)],
)
def test_killed_in_the_middle_of_saves_a_run_ends_bit_identical(
    kills, tiny_overrides, uninterrupted, tmp_path
):
    """Each kill is sent in the middle of a save, once so many are complete."""
    latest = tmp_path / "checkpoints" / "latest"

    def saved_steps():
        return [int(path.name) for path in latest.glob("*") if path.name.isdigit()]

    for fewest in kills:
        [run] = start(tmp_path, [*tiny_overrides, *MORE, steps_of(ENDLESS)])
        wait_for(lambda n=fewest: max(saved_steps(), default=0) >= n, run)
        # A folder of this name exists only while a save is on its way.
        wait_for(lambda: any(latest.glob("*orbax-checkpoint-tmp*")), run)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert not (tmp_path / FINISHED_FILE).exists()
    saved = max(saved_steps())
    said = train_here(tmp_path, [*tiny_overrides, *MORE, steps_of(saved + 3)])
    assert f"going on from step {saved} of {saved + 3}" in said
    assert losses(tmp_path) == uninterrupted(saved + 3)


@pytest.mark.parametrize(
    ("devices", "processes", "told"),
    [
        pytest.param(1, 1, [0], id="one process", marks=pytest.mark.slow),
        pytest.param(4, 2, [0, 1], id="both of two", marks=pytest.mark.slow),
        pytest.param(4, 2, [1], id="only the second of two", marks=pytest.mark.slow),
    ],
)
def test_preemption_saves_says_so_exits_0_and_goes_on_bit_identical(
    devices, processes, told, tiny_overrides, uninterrupted, tmp_path
):
    more = [*tiny_overrides, *rows_for(devices * processes), *SELDOM]
    runs = start(tmp_path, more, devices, processes)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 600
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            assert [run.poll() for run in runs] == [None] * processes, "ended before the signal"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for index in told:
            runs[index].send_signal(signal.SIGTERM)
        outputs = finish(runs)  # asserts that all exit 0
    finally:
        for run in runs:
            run.kill()  # it would never end by itself
    said = " ".join(outputs[0].split())
    found = re.search(r"stopped at step (\d+) of 1000000; it is saved: the same command goes", said)
    assert found, said
    stopped = int(found[1])
    assert not (tmp_path / FINISHED_FILE).exists()

    more.append(steps_of(stopped + 3))
    if devices * processes == 1:
        said = train_here(tmp_path, more)
    else:
        said = finish(start(tmp_path, more, devices, processes))[0]
    assert f"going on from step {stopped} of {stopped + 3}" in " ".join(said.split())
    assert losses(tmp_path) == uninterrupted(stopped + 3, devices, processes)


@pytest.mark.slow
def test_told_to_end_after_its_second_step_a_run_is_saved_and_goes_on_bit_identical(
    tiny_overrides, uninterrupted, tmp_path, monkeypatch
):
    """As the test above, in this process."""
    started = Tracker.started

    def told(tracker, metrics):
        started(tracker, metrics)
        if tracker.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Tracker, "started", told)
    more = [*tiny_overrides, *SELDOM]
    said = " ".join(train_here(tmp_path, more).split())
    assert "stopped at step 2 of 1000000; it is saved: the same command goes" in said
    assert not (tmp_path / FINISHED_FILE).exists()
    monkeypatch.undo()
    assert "going on from step 2 of 5" in train_here(tmp_path, [*more, steps_of(5)])
    assert losses(tmp_path) == uninterrupted(5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_not_kept_waiting_by_a_compiler_that_never_comes_back(
    number, tiny_config, tmp_path, monkeypatch
):
    asked, given_up = threading.Event(), threading.Event()

    def never(*_):
        asked.set()
        assert given_up.wait(600)

    def tell():
        assert asked.wait(600)
        if not given_up.is_set():
            os.kill(os.getpid(), number)

    monkeypatch.setattr(jax.stages.Lowered, "compile", never)
    teller = threading.Thread(target=tell)
    teller.start()
    said = io.StringIO()
    try:
        result = train(tiny_config, tmp_path, Console(file=said, width=1000))
    finally:
        given_up.set()
        asked.set()
        teller.join()
    assert (result.step, result.compiled, result.stopped_by) == (0, False, number)
    assert "stopped before step 1: the same command starts again there" in said.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_during_compilation_ends_training_without_waiting_for_the_compiler(
    number, status, tiny_overrides, tmp_path
):
    # With all optimisations and without a cache, it takes much longer than what is allowed here.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    larger = ["--config.model.units=256", "--config.model.layers=5"]
    run = subprocess.Popen(
        [*TRAIN, "--workdir", str(tmp_path), *tiny_overrides, *larger],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while "compiling" not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(number)
        sent = time.monotonic()
        said, _ = run.communicate(timeout=600)
        seconds = time.monotonic() - sent
    finally:
        run.kill()
    assert run.returncode == status, said
    assert "stopped before step 1: the same command starts again there" in said
    assert "2 of 2 after" not in said
    assert seconds < 60  # on a machine with other work
    assert ("interrupted: stopping" in said) == (number == signal.SIGINT)
    assert "Traceback" not in said


def no_large_file():
    # The system refuses to let a file grow beyond this: where no disk can be made, the next best.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def fill(disk, left):
    """Takes all of a disk but `left` bytes."""
    with (disk / "filling").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left)


@pytest.fixture
def small_disk(tmp_path):
    """A folder that is a disk of its own, seen by the processes that `enter` starts."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"mount -t tmpfs -o size=200m none {disk} && echo ready && exec sleep 600"
    holder = subprocess.Popen(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if holder.stdout.readline() != "ready\n":
            pytest.skip(f"no disk can be made here: {holder.communicate()[1].strip()}")
        yield Path(f"/proc/{holder.pid}/root{disk}")
    finally:
        holder.kill()
        holder.communicate()


def failing(workdir, overrides, **options):
    """Runs `train`, which must fail with one message, and returns that."""
    failed = subprocess.run(
        [*TRAIN, "--workdir", str(workdir), *overrides],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
        **options,
    )
    message = " ".join(failed.stderr.split())
    assert failed.returncode == 2, message
    assert "Traceback" not in failed.stderr, failed.stderr
    return message


@pytest.mark.slow
def test_a_full_disk_is_one_error_that_names_the_step_and_loses_no_earlier_one(
    tiny_overrides, uninterrupted, two_steps, small_disk
):
    """Logs still fit, and the state no longer does."""
    workdir = small_disk / "run"
    shutil.copytree(two_steps, workdir)
    state = max((workdir / "checkpoints").rglob("*"), key=lambda path: path.stat().st_size)
    fill(small_disk, left=state.stat().st_size // 2)
    message = failing(workdir, [*tiny_overrides, *MORE])
    # The save of step 3 takes the last of it: logging the next one may be what is told first.
    assert re.search(r"error: (saving step 3 |writing the metrics of step [34] )", message), message
    assert "Make room, then start the same command" in message
    (small_disk / "filling").unlink()
    train_here(workdir, [*tiny_overrides, *MORE])
    assert losses(workdir) == uninterrupted(STEPS)


@pytest.mark.slow
def test_a_save_that_the_system_refuses_names_the_step_and_what_is_left(
    tiny_overrides, two_steps, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    # Programs that are compiled here would be such files too.
    none_kept = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    message = failing(workdir, [*tiny_overrides, *MORE], preexec_fn=no_large_file, env=none_kept)
    assert "error: saving step 3 " in message
    assert "File too large" in message
    assert "Complete checkpoints that are left: steps [1, 2]" in message


@pytest.fixture
def poisoned(tiny_config, narrow, tmp_path):
    """A copy of the sessions with trials whose features overflow float32 in the augmentation."""
    root = tmp_path / "data"
    shutil.copytree(narrow, root)
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


@pytest.mark.slow
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


def test_buckets_left_open_are_chosen_from_the_data_and_kept_for_the_run(
    tiny_config, tmp_path, monkeypatch, not_compiled
):
    config = with_overrides(tiny_config, ["--config.data.buckets=()"])
    said = io.StringIO()
    train(config, tmp_path, Console(file=said, width=1000))
    assert "do not suit these trials" not in said.getvalue()
    written = json.loads((tmp_path / "config.json").read_text())["data"]["buckets"]
    assert written
    assert jax.tree.leaves(written)
    # A run that goes on does not choose again.
    monkeypatch.setattr(loop, "resolve_buckets", None)
    longer = with_overrides(config, ["--config.train.steps=7"])
    assert resolve(longer, tmp_path, resumed=True).data.buckets == tuple(map(tuple, written))
