"""What happens when launch/ runs against a cloud that tests play."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from launching import (
    program,
    until,
)


def test_up_trains_to_the_end_on_one_vm(cloud):
    done = cloud.run("up", "--", "--config.train.steps=20")
    assert done.returncode == 0, done.stderr
    assert json.loads((cloud.workdir / "finished.json").read_text()) == {"step": 20}
    (start,) = cloud.starts()
    home = cloud.folder / "vms/0"
    assert start["arguments"] == [
        *["train", "--workdir", f"{home}/b2txt_bucket/runs/first"],
        f"--config.data.root={home}/b2txt_data",
        *["--config", "configs/demo.py", "--config.train.steps=20"],
    ]
    assert (home / "b2txt_data/session/data.txt").read_text() == "features"
    assert "transparent_hugepage/enabled" in (home / "sudo").read_text()
    assert "constraints.txt -e .[tpu]" in (home / "uv").read_text()
    assert "still runs and costs" in done.stderr
    assert cloud.calls("queued-resources", "delete") == []


def test_a_preempted_run_goes_on_where_it_was_saved(cloud):
    cloud.play(
        *["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "lost"],
        *["SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"],
    )
    (cloud.workdir / "hold").touch()
    done = cloud.run("up", "--", "--config.train.steps=20", DELETE="yes")
    assert done.returncode == 0, done.stderr
    first, second = cloud.starts()
    assert (first["step"], second["step"]) == (0, 10)
    assert second["arguments"] == first["arguments"]
    assert json.loads((cloud.workdir / "finished.json").read_text()) == {"step": 20}
    assert len(cloud.calls("queued-resources", "create")) == 2
    # One for the lost TPU, one at the end because of DELETE=yes.
    assert len(cloud.calls("queued-resources", "delete")) == 2
    assert not (cloud.folder / "exists").exists()


@pytest.mark.slow  # the other tests play the training
@pytest.mark.timeout(600)
def test_a_real_training_survives_the_loss_of_its_vm(cloud, narrow, tiny_overrides):
    program(
        cloud.folder / "vm_bin/uv",
        "#!/bin/sh\n"
        f'mkdir -p .venv/bin\nprintf "#!/bin/sh\\nexec {sys.executable} -m b2txt_jax.cli '
        '\\"\\$@\\"\\n" >.venv/bin/b2txt\nchmod +x .venv/bin/b2txt\n'
        "cp .venv/bin/b2txt .venv/bin/python\n",
    )
    cloud.play("ACTIVE", "ACTIVE", "lost", "SUSPENDED", "ACTIVE")
    keys = [key for key in tiny_overrides if not key.startswith("--config.data.root=")]
    done = cloud.run(
        *["up", "--", *keys, "--config.train.steps=40", "--config.train.validate_every=40"],
        "--config.train.save_every=5",
        limit=560,
        ACCELERATOR="v5litepod-4",  # as many devices as the tiny batch has rows
        DATA=str(narrow),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((cloud.workdir / "finished.json").read_text())["step"] == 40
    assert len(cloud.calls("queued-resources", "create")) == 2
    log = (cloud.folder / "vms/0/.b2txt_train/log").read_text()
    assert re.search(r"going on from step \d+ of 40", log), log
    # The copy on the VM is what ran.
    assert str(cloud.folder) in (cloud.workdir / "config.json").read_text()


@pytest.mark.slow
def test_a_run_saved_after_a_signal_is_not_taken_for_a_complete_one(cloud):
    (cloud.workdir / "maintenance").touch()
    done = cloud.run("up")
    assert done.returncode == 0, done.stderr
    assert "training saved" in done.stderr
    assert [start["step"] for start in cloud.starts()] == [0, 10]
    assert (cloud.workdir / "finished.json").exists()
    assert len(cloud.calls("queued-resources", "create")) == 1


def test_a_vm_that_shuts_down_lets_the_training_save(cloud):
    for command in ("create", "setup"):
        assert cloud.run(command).returncode == 0
    (cloud.workdir / "hold").touch()
    assert cloud.run("train").returncode == 0
    state = cloud.folder / "vms/0/.b2txt_train"
    until(lambda: (cloud.workdir / "step").exists() and (state / "pid").exists())
    # A shutdown tells all processes at once.
    os.killpg(os.getpgid(int((state / "pid").read_text())), signal.SIGTERM)
    until((state / "exit").exists)
    assert (state / "exit").read_text() == "0\n"


@pytest.mark.slow
def test_a_training_that_has_just_been_asked_for_is_running_and_can_be_stopped(cloud):
    # A machine that is slow to begin with it: until there is a file `go`.
    program(
        cloud.folder / "vm_bin/setsid",
        '#!/bin/sh\nwhile [ ! -e "$CLOUD/go" ]; do sleep 0.05; done\n'
        f'exec {shutil.which("setsid")} "$@"\n',
    )
    state = cloud.folder / "vms/0/.b2txt_train"
    for command in ("create", "setup"):
        assert cloud.run(command).returncode == 0
    (cloud.workdir / "hold").touch()
    with ThreadPoolExecutor() as pool:
        train = pool.submit(cloud.run, "train")
        try:
            until(lambda: (state / "waiter").exists() and (state / "waiter").read_text() != "")
            assert "training: running" in cloud.run("status").stdout
            stop = pool.submit(cloud.run, "stop")
            time.sleep(0.3)
            assert not stop.done()
        finally:
            (cloud.folder / "go").touch()
        assert stop.result().returncode == train.result().returncode == 0
    assert "training: saved" in cloud.run("status").stdout


def test_the_exit_status_is_the_last_thing_that_a_training_leaves(cloud):
    """Once it is there the next training may start, whose process number must stay."""
    program(
        cloud.folder / "vm_bin/rm",
        '#!/bin/sh\ncase "$#$2" in 2*/pid) sleep 0.5 ;; esac\nexec /bin/rm "$@"\n',
    )
    for command in ("create", "setup", "train"):
        assert cloud.run(command).returncode == 0
    state = cloud.folder / "vms/0/.b2txt_train"
    until((state / "exit").exists)
    assert not (state / "pid").exists()


@pytest.mark.slow
def test_up_goes_on_from_a_tpu_that_was_created_and_no_more(cloud):
    assert cloud.run("create").returncode == 0
    done = cloud.run("up")
    assert done.returncode == 0, done.stderr
    assert (cloud.workdir / "finished.json").exists()
    assert len(cloud.calls("queued-resources", "create")) == 1


@pytest.mark.slow
def test_a_training_that_always_ends_early_is_not_restarted_for_ever(cloud):
    text = (cloud.folder / "trainer.py").read_text()
    (cloud.folder / "trainer.py").write_text(text.replace("while step < 20", "while step < 0"))
    done = cloud.run("up", RETRIES="1")
    assert done.returncode == 2
    assert "without completing the run" in done.stderr
    assert len(cloud.starts()) == 2


def test_a_crash_restarts_all_workers_of_a_slice(cloud):
    # One worker is killed once both are there; the other waits at a later step.
    (cloud.workdir / "crash").write_text("2")
    (cloud.workdir / "hold").touch()
    done = cloud.run("up", ACCELERATOR="v5litepod-16")
    assert done.returncode == 0, done.stderr
    assert "training crashed 137" in done.stderr
    assert (cloud.workdir / "finished.json").exists()
    assert all("--distributed" in start["arguments"] for start in cloud.starts())
    assert {home.name for home in (cloud.folder / "vms").glob("*")} == {"0", "1"}


def test_an_error_of_the_users_is_shown_and_not_tried_again(cloud):
    (cloud.workdir / "broken").touch()
    done = cloud.run("up")
    assert done.returncode == 2
    assert "no such configuration key" in done.stdout
    assert "trying again does not mend" in done.stderr
    assert len(cloud.starts()) == 1


@pytest.mark.slow
def test_watch_survives_a_cloud_that_does_not_answer_for_a_while(cloud):
    (cloud.workdir / "hold").touch()
    cloud.play("ACTIVE", "unreachable", "unreachable", "release", "ACTIVE")
    done = cloud.run("up")
    assert done.returncode == 0, done.stderr
    assert "Unable to connect" in done.stderr
    assert len(cloud.starts()) == 1


def test_requests_that_are_refused_end_with_a_message(cloud):
    assert cloud.run("create").returncode == 0
    (cloud.folder / "refusals").write_text("99")
    cloud.play("SUSPENDED")
    done = cloud.run("watch", RETRIES="0")
    assert done.returncode == 2
    assert "RESOURCE_EXHAUSTED" in done.stderr


def test_an_on_demand_tpu_that_failed_is_left_to_a_person(cloud):
    assert cloud.run("create", SPOT="no").returncode == 0
    cloud.play("FAILED")
    done = cloud.run("watch", SPOT="no")
    assert done.returncode == 2
    assert "not a spot TPU" in done.stderr
    assert cloud.calls("queued-resources", "delete") == []


def test_a_bucket_whose_folders_cannot_be_renamed_in_one_step_is_refused(cloud):
    (cloud.folder / "namespace").write_text("")
    assert cloud.run("create").returncode == 0
    done = cloud.run("setup")
    assert done.returncode == 2
    assert "--enable-hierarchical-namespace" in done.stderr
    assert cloud.calls("tpu-vm", "scp") == []


def test_stop_saves_and_train_goes_on_with_data_of_this_machine(cloud, tmp_path):
    data = tmp_path / "my sessions"
    data.mkdir()
    (data / "one").write_text("trial")
    (cloud.workdir / "hold").touch()
    for command in ("create", "setup", "setup", "train"):  # a second setup nests nothing
        done = cloud.run(command, DATA=str(data))
        assert done.returncode == 0, done.stderr
    assert (cloud.folder / "vms/0/b2txt_data/one").read_text() == "trial"
    assert "training: running" in cloud.run("status").stdout
    until(lambda: (cloud.workdir / "starts.jsonl").exists())
    asked = cloud.run("doctor", "--", "--config.data.workers=1", "--x", DATA=str(data)).stdout
    assert f"doctor asked with {cloud.folder}/vms/0" in asked
    assert asked.endswith("--config configs/demo.py --config.data.workers=1\n")
    checked = cloud.run("check-device", "--", "--thorough").stdout
    bucket = cloud.folder / "vms/0/b2txt_bucket"
    assert f"checked with --json {bucket}/runs/first/check_device_" in checked
    assert checked.endswith(".json --thorough\n")
    assert cloud.run("stop").returncode == 0
    step = int((cloud.workdir / "step").read_text())
    assert not (cloud.workdir / "hold").exists()
    assert "training: saved" in cloud.run("status").stdout
    assert cloud.run("watch", DATA=str(data)).returncode == 0
    assert [start["step"] for start in cloud.starts()] == [0, step]
    assert cloud.run("fetch").returncode == 0
    assert (cloud.folder / "out/finished.json").exists()
    assert cloud.run("delete").returncode == 0


@pytest.mark.slow
def test_a_run_on_the_vms_disk_is_fetched_beside_what_was_fetched_before(cloud):
    for command in ("create", "setup"):
        assert cloud.run(command).returncode == 0
    (cloud.folder / "vms/0/home/me/run").mkdir(parents=True)
    (cloud.folder / "vms/0/home/me/run/metrics.jsonl").touch()
    for folder in ("out", "out.2"):
        done = cloud.run("fetch", WORKDIR="/home/me/run", SPOT="no")
        assert done.returncode == 0, done.stderr
        assert (cloud.folder / folder / "metrics.jsonl").exists()
        assert f"the run is in {cloud.folder / folder}" in done.stderr


def test_the_code_on_the_vm_is_what_is_on_the_disk_without_caches(cloud):
    assert cloud.run("create").returncode == 0
    assert cloud.run("setup").returncode == 0
    archive = cloud.folder / "vms/0/b2txt_jax.tar.gz"
    with tarfile.open(archive) as files:
        names = files.getnames()
    needed = {"setup.cfg", "setup.py", "constraints.txt", "configs/demo.py", "launch/on_vm.sh"}
    assert needed <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith(("runs", "."))]
