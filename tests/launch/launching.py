"""Running launch/tpu.sh, dry or against a played cloud, and reading what it would run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
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
