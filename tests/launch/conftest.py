"""A played cloud: VMs are folders, and their commands really run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

# pytest imports tests by path; the modules that they share are found here.
sys.path.insert(0, str(Path(__file__).parent))

from launching import REPOSITORY, Cloud, program

# A program in the place of `b2txt` on a VM: 20 steps, saved after each; waits at step 10 while
# there is a file `hold`; is killed at step 5 if there is a file `crash`, as soon as the number of
# starts is the one in it.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path

arguments = sys.argv[1:]
if arguments[0] == "check-device":
    print("checked with", *arguments[1:]); sys.exit()
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


@pytest.fixture
def cloud(tmp_path):
    folder = tmp_path / "the cloud"
    for name in ("vm_bin", "bin", "gs/bucket/data/session", "gs/bucket/runs/first"):
        (folder / name).mkdir(parents=True)
    (folder / "gs/bucket/data/session/data.txt").write_text("features")
    (folder / "namespace").write_text("True")
    python = f"{sys.executable} -I -S"  # nothing but the standard library: a quick start
    gcloud = f'#!/bin/sh\nexec {python} {REPOSITORY}/tests/launch/stand_in_gcloud.py "$@"\n'
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
