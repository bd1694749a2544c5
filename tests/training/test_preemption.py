"""SIGTERM in the middle of a run, of one process and of several: it saves, and loses nothing."""

import os
import re
import signal
import subprocess
import time

import pytest
from devices import TRAIN, finish, losses, start, train_here

from b2txt_jax.training.loop import FINISHED_FILE

pytestmark = pytest.mark.timeout(900)

# Never done before the signal: a step takes milliseconds, and the signal comes after the first.
ENDLESS = 1_000_000
MORE = [
    "--config.data.trials_per_day=2",
    "--config.data.eval_batch_size=8",
    "--config.train.log_every=1",
    f"--config.train.validate_every={ENDLESS}",
    f"--config.train.save_every={ENDLESS}",
]


@pytest.fixture(scope="module")
def uninterrupted(tiny_overrides, tmp_path_factory):
    """Losses of at least so many steps, never interrupted by a signal, by processes and devices."""
    folders = {}

    def of_steps(steps, devices, processes):
        asked = -(-steps // 10) * 10  # few, and most often enough for the next call too
        key = (devices, processes, asked)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("uninterrupted")
            more = [*tiny_overrides, *MORE, f"--config.train.steps={asked}"]
            if (devices, processes) == (1, 1):
                train_here(folders[key], more)
            else:
                finish(start(folders[key], more, devices, processes))
        return losses(folders[key])[:steps]

    return of_steps


@pytest.mark.parametrize(
    ("devices", "processes", "told"),
    [
        pytest.param(1, 1, [0], id="one process"),
        pytest.param(4, 2, [0, 1], id="both of two", marks=pytest.mark.slow),
        pytest.param(4, 2, [1], id="only the second of two", marks=pytest.mark.slow),
    ],
)
def test_preemption_saves_says_so_exits_0_and_goes_on_bit_identical(
    devices, processes, told, tiny_overrides, uninterrupted, tmp_path
):
    more = [*tiny_overrides, *MORE, f"--config.train.steps={ENDLESS}"]
    runs = start(tmp_path, more, devices, processes)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 300
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

    outputs = finish(
        start(
            tmp_path,
            [*tiny_overrides, *MORE, f"--config.train.steps={stopped + 3}"],
            devices,
            processes,
        )
    )
    assert f"going on from step {stopped} of {stopped + 3}" in " ".join(outputs[0].split())
    assert losses(tmp_path) == uninterrupted(stopped + 3, devices, processes)


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
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while "compiling" not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(number)
        sent = time.monotonic()
        said, _ = run.communicate(timeout=120)
        seconds = time.monotonic() - sent
    finally:
        run.kill()
    assert run.returncode == status, said
    assert "stopped before step 1: the same command starts again there" in said
    assert "2 of 2 after" not in said
    assert seconds < 20  # on a machine with other work
    assert ("interrupted: stopping" in said) == (number == signal.SIGINT)
    assert "Traceback" not in said
