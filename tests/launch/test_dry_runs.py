"""What launch/ would run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import pytest
from launching import (
    REPOSITORY,
    SETTINGS,
    TOOL,
    call,
    dry,
    program,
    remote_words,
    verbs,
    words,
)


def test_one_vm_is_created_set_up_trained_on_and_watched():
    commands = dry("up")
    assert verbs(commands)[:9] == [
        "describe",
        "create",
        "describe",
        "gcloud storage",
        "tar -czf",
        "scp",
        "ssh setup",
        "ssh start",
        "gcloud storage",
    ]
    create, start = commands[1], remote_words(commands[7])
    assert "--accelerator-type=v5litepod-8" in create
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    assert "--spot" not in create
    assert start[2:] == [
        *["start", "gs://bucket/runs/first", "gs://bucket/data", "--config", "configs/demo.py"]
    ]


def test_a_slice_trains_on_all_workers_as_one_run():
    commands = dry("train", ACCELERATOR="v4-32")
    assert len(commands) == 1
    assert "--worker=all" in commands[0]
    assert "--distributed" in remote_words(commands[0])


@pytest.mark.parametrize(
    ("accelerator", "runtime", "distributed"),
    [
        ("v4-8", "tpu-ubuntu2204-base", False),
        ("v5litepod-16", "v2-alpha-tpuv5-lite", True),
        ("v5p-8", "v2-alpha-tpuv5", False),
        ("v6e-8", "v2-alpha-tpuv6e", False),
        ("v6e-256", "v2-alpha-tpuv6e", True),
    ],
)
def test_each_generation_gets_its_software_and_its_number_of_processes(
    accelerator, runtime, distributed
):
    assert f"--runtime-version={runtime}" in dry("create", ACCELERATOR=accelerator)[0]
    rows = ("--config.data.trials_per_day=64", "--config.data.eval_batch_size=256")
    start = remote_words(dry("train", "--", *rows, ACCELERATOR=accelerator)[0])
    assert ("--distributed" in start) == distributed


def test_after_a_preemption_the_same_training_command_runs_on_a_new_spot_tpu():
    extra = ("--", "--config.train.steps=7")
    commands = dry("recreate", *extra, SPOT="yes")
    assert verbs(commands)[:3] == ["describe", "delete", "create"]
    assert "--spot" in commands[2]
    assert commands[-1] == dry("train", *extra, SPOT="yes")[0]
    assert remote_words(commands[-1])[-1] == "--config.train.steps=7"


def test_a_dry_run_lists_words_that_a_shell_reads_back_as_they_were_meant(tmp_path):
    data = tmp_path / "my data; touch oops"
    data.mkdir()
    workdir = "gs://bucket/a run's $folder"
    commands = dry("setup", DATA=str(data), WORKDIR=workdir)
    copied = [command for command in commands if command[4] == "scp"]
    assert [command[6] for command in copied] == ["/tmp/b2txt_jax.tar.gz", str(data)]
    setup = remote_words(commands[-1])
    assert setup[-2:] == [workdir, ""]
    value = "--config.data.sessions=('a b', 'c')"
    assert remote_words(dry("train", "--", value, WORKDIR=workdir)[0])[-1] == value


def test_a_dry_run_starts_no_program_of_the_cloud(tmp_path):
    program(tmp_path / "gcloud", f"#!/bin/sh\ntouch {tmp_path}/called\n")
    for command in ("up", "status", "log", "stop", "fetch", "delete"):
        done = call("--dry-run", command, path=f"{tmp_path}:{os.environ['PATH']}")
        assert "gcloud" in done.stdout
    assert not (tmp_path / "called").exists()


def test_settings_come_from_a_file_and_flags_win(tmp_path):
    env = tmp_path / "my.env"
    env.write_text("# mine\nZONE=europe-west4-b\nNAME=other\n\nWORKDIR=gs://bucket/$(touch oops)\n")
    done = subprocess.run(
        [
            *[str(TOOL), "--project", "my-project", "--accelerator", "v4-8"],
            *["--env", str(env), "--name", "mine", "--dry-run", "delete"],
        ],
        capture_output=True,
        text=True,
    )
    assert shlex.split(done.stdout)[5:7] == ["mine", "--zone=europe-west4-b"]
    assert not (tmp_path / "oops").exists()


def test_line_ends_of_windows_spaces_and_remarks_are_no_part_of_a_value(tmp_path):
    env = tmp_path / "my.env"
    lines = [
        "# mine",
        "  # all mine",
        "PROJECT=my-project",
        "ZONE=us-west4-a # near",
        "NAME = b2txt ",
    ]
    lines += ["", "ACCELERATOR=v4-8\t# 4 chips", "WORKDIR=gs://bucket/run#1"]
    env.write_bytes("\r\n".join(lines).encode())
    done = subprocess.run(
        [str(TOOL), "--env", str(env), "--dry-run", "fetch"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout)[-2:] == ["gs://bucket/run#1", "runs/b2txt"]
    create = [str(TOOL), "--env", str(env), "--dry-run", "create"]
    first = subprocess.run(create, capture_output=True, text=True).stdout.splitlines()[0]
    assert {"b2txt", "--zone=us-west4-a", "--accelerator-type=v4-8"} <= set(shlex.split(first))
    env.write_text('NAME="b2txt"\n')
    done = subprocess.run(create, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'line 1: found NAME="b2txt"; needed the value without quotes' in done.stderr


def test_a_dry_run_of_which_only_the_first_line_is_read_ends():
    tool = shlex.join([str(TOOL), *words({**SETTINGS, "POLL_SECONDS": "60"}), "--dry-run"])
    for command in ("create", "up"):
        reader = subprocess.run(
            ["bash", "-c", f"{tool} {command} | {{ read -r line; exec <&-; echo $line; }}"],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert reader.stdout.startswith("gcloud compute tpus queued-resources")
        assert reader.stderr == ""


def test_a_dry_run_shows_the_new_request_of_spot_tpus_alone_and_the_deletion():
    assert verbs(dry("up")).count("create") == 1
    assert verbs(dry("up", SPOT="yes")).count("create") == 2
    assert verbs(dry("up")).count("delete") == 0
    assert verbs(dry("up", DELETE="yes"))[-1] == "delete"
    on_disk = verbs(dry("up", DELETE="yes", WORKDIR="/home/me/run"))
    assert on_disk[-2:] == ["scp", "delete"]


BASELINE = "configs/nejm_baseline.py"


@pytest.mark.parametrize(
    ("more", "arguments", "message"),
    [
        ({"ACCELERATOR": "v5litepod-64", "CONFIG": BASELINE}, (), ""),
        ({"ACCELERATOR": "v4-128", "CONFIG": BASELINE}, (), ""),  # 64 chips
        (
            {"ACCELERATOR": "v5litepod-128", "CONFIG": BASELINE},
            (),
            "--config.data.trials_per_day=32 --config.data.eval_batch_size=128",
        ),
        ({"ACCELERATOR": "v5litepod-128", "CONFIG": BASELINE}, (32, 128, 1), ""),
        ({"ACCELERATOR": "v5litepod-128", "CONFIG": BASELINE}, (16, 64, 2), ""),
        ({"ACCELERATOR": "v5litepod-128", "CONFIG": BASELINE}, (32, 64, 1), "validation 64"),
        ({"ACCELERATOR": "v6e-32"}, (), "a batch has 16 rows"),  # the demo's are fewer
    ],
)
def test_a_slice_that_a_batch_cannot_be_shared_by_is_refused_before_it_costs(
    more, arguments, message
):
    keys = ("data.trials_per_day", "data.eval_batch_size", "parallel.model_axis")
    given = [f"--config.{key}={value}" for key, value in zip(keys, arguments, strict=False)]
    for command in ("up", "train", "create"):
        done = call("--dry-run", command, "--", *given, **more)
        assert done.returncode == (2 if message and command != "create" else 0), done.stderr
        assert message in done.stderr
        assert bool(done.stderr) == bool(message)


def test_the_example_settings_are_complete():
    done = subprocess.run(
        [str(TOOL), "--env", str(REPOSITORY / "launch/example.env"), "--dry-run", "up"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--spot" in done.stdout


def test_the_runbook_has_the_settings_of_the_example_and_evaluates_what_is_fetched():
    def settings(lines: list[str]) -> dict[str, str]:
        lines = [line.partition(" #")[0].strip() for line in lines]
        return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))

    example = settings((REPOSITORY / "launch/example.env").read_text().splitlines())
    runbook = (REPOSITORY / "docs/tpu.md").read_text()
    block = next(text for text in re.findall(r"```env\n(.*?)```", runbook, re.DOTALL))
    assert settings(block.splitlines()) == example
    assert f"b2txt evaluate --workdir {example['OUT']} " in runbook


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("create", {"ZONE": "", "NAME": ""}, "not set: ZONE NAME;"),
        ("up", {"DATA": ""}, "not set: DATA;"),
        ("up", {"ACCELERATOR": "tpu7x-8"}, "Kubernetes Engine only"),
        ("up", {"ACCELERATOR": "h100"}, "needed v4-N, v5litepod-N, v5p-N or v6e-N"),
        ("up", {"WORKDIR": "/home/me/run", "SPOT": "yes"}, "is lost when a spot VM is preempted"),
        ("up", {"WORKDIR": "/home/me/run", "ACCELERATOR": "v6e-16"}, "checkpoint together"),
        ("up", {"WORKDIR": "gs://bucket"}, "needed a folder in the bucket"),
        ("up", {"CONFIG": "configs/nosuch.py"}, "configs/nosuch.py"),
        ("up", {"DATA": "/no/such/folder"}, "there is no folder /no/such/folder"),
        ("up", {"SPOT": "maybe"}, "needed yes or no"),
        ("up", {"POLL_SECONDS": "a minute"}, "needed a number above 0"),
        ("up", {"POLL_SECONDS": "0"}, "needed a number above 0"),
        ("up", {"POLL_SECONDS": "1m"}, "needed a number above 0"),
        ("trian", {}, "unknown command 'trian'"),
    ],
)
def test_a_setting_that_cannot_work_is_named_before_anything_runs(command, more, message):
    done = call("--dry-run", command, **more)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
