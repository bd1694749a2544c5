"""Plays `gcloud` and the VMs behind it: a stand-in for a cloud that tests cannot have.

A folder CLOUD holds everything: `calls.jsonl` (argument lists), `states` (what the next looks at
the queued resource find, one per line; the last stays), `vms/<n>` (homes of the workers), `gs`
(buckets). Commands given to `ssh` really run, in a worker's home, with programs of `vm_bin` first
on the path. `lost` in `states` takes the VMs away as a preemption does: processes killed, homes
gone. It waits until the stand-in for a training is at step 10, or a real one has a checkpoint,
and then removes the file `hold` that keeps the former from going on; `release` removes that file
alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

CLOUD = Path(os.environ["CLOUD"])


def fail(message: str) -> int:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    return 1


def bucket_path(url: str) -> Path:
    return CLOUD / "gs" / url.removeprefix("gs://")


def workers(arguments: list[str]) -> list[Path]:
    homes = sorted((CLOUD / "vms").glob("*"))
    return homes if "--worker=all" in arguments else homes[:1]


def take_vms_away() -> None:
    for pid in (CLOUD / "vms").glob("*/.b2txt_train/pid"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
    shutil.rmtree(CLOUD / "vms", ignore_errors=True)


def under_way(run: Path) -> bool:
    if any(path.name.isdigit() for path in (run / "checkpoints/latest").glob("*")):
        return True
    return (run / "step").exists() and (run / "step").read_text() == "10"


def create(arguments: list[str]) -> int:
    if (CLOUD / "exists").exists():
        return fail("ALREADY_EXISTS: queued resource")
    refusals = CLOUD / "refusals"
    if refusals.exists() and (left := int(refusals.read_text())):
        refusals.write_text(str(left - 1))
        return fail("RESOURCE_EXHAUSTED: quota")
    kind, size = arguments[arguments.index("create") :], 0
    kind = [value for value in kind if value.startswith("--accelerator-type=")]
    size = int(kind[0].rpartition("-")[2])
    for number in range(max(1, size // 8)):
        (CLOUD / f"vms/{number}").mkdir(parents=True)
    (CLOUD / "exists").touch()
    return 0


def describe() -> int:
    if not (CLOUD / "exists").exists():
        return fail("NOT_FOUND: Resource was not found")
    states = (CLOUD / "states").read_text().split()
    if len(states) > 1:
        (CLOUD / "states").write_text("\n".join(states[1:]))
    run = next((CLOUD / "gs").glob("*/runs/*"))
    if states[0] == "lost":
        end = time.monotonic() + 300  # a busy machine compiles for long
        while not under_way(run) and time.monotonic() < end:
            time.sleep(0.02)
        take_vms_away()
        (run / "hold").unlink(missing_ok=True)
        print("SUSPENDED")
    elif states[0] == "release":
        (run / "hold").unlink(missing_ok=True)
        print("ACTIVE")
    elif states[0] == "unreachable":
        return fail("Unable to connect to the server")
    else:
        print(states[0])
    return 0


def ssh(arguments: list[str]) -> int:
    command = next(value for value in arguments if value.startswith("--command="))
    status = 0
    for home in workers(arguments):
        environment = {
            **os.environ,
            "HOME": str(home),
            "PATH": f"{CLOUD / 'vm_bin'}:{os.environ['PATH']}",
        }
        done = subprocess.run(
            ["bash", "-c", command.removeprefix("--command=")], cwd=home, env=environment
        )
        status = status or done.returncode
    return status


def scp(arguments: list[str]) -> int:
    source, target = [value for value in arguments if not value.startswith("--")]
    if ":" not in target:
        home = workers(["--worker=0"])[0]
        shutil.copytree(home / source.partition(":")[2].lstrip("/"), target)
        return 0
    for home in workers(arguments):
        to = home / target.partition(":")[2]
        if Path(source).is_dir():
            shutil.copytree(source, to / Path(source).name if to.exists() else to)
        else:
            shutil.copy(source, to)
    return 0


def storage(arguments: list[str]) -> int:
    if arguments[:2] == ["buckets", "describe"]:
        print((CLOUD / "namespace").read_text())
        return 0
    if arguments[0] == "ls":
        if not bucket_path(arguments[1]).exists():
            return fail("One or more URLs matched no objects.")
        print(arguments[1])
        return 0
    source, target = [value for value in arguments[1:] if not value.startswith("--")]
    shutil.copytree(bucket_path(source), target, dirs_exist_ok=True)
    return 0


def main(arguments: list[str]) -> int:
    with (CLOUD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if arguments[0] == "storage":
        return storage(arguments[1:])
    match arguments[2:4]:
        case ["queued-resources", "create"]:
            return create(arguments)
        case ["queued-resources", "describe"]:
            return describe()
        case ["queued-resources", "delete"]:
            take_vms_away()
            (CLOUD / "exists").unlink()
            return 0
        case ["tpu-vm", "describe"]:
            print("READY")
            return 0
        case ["tpu-vm", "ssh"]:
            return ssh(arguments[4:])
        case ["tpu-vm", "scp"]:
            return scp(arguments[4:])
    return fail(f"not played: {arguments}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
