"""Runs `b2txt train` on a chosen number of emulated devices and processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b2txt_jax.cli import main

TRAIN = [sys.executable, "-m", "b2txt_jax.cli", "train", "--config", "configs/demo.py"]


def environment(devices: int) -> dict[str, str]:
    """The environment of a process that sees so many CPU devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    # XLA has one pool of as many threads as there are cores, or devices. Where other work takes one
    # of them, a device that the others wait for never begins. NPROC makes the pool larger.
    threads = str(2 * devices + 2)
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": threads}


def start(
    workdir: Path,
    overrides: Sequence[str],
    devices: int = 1,
    processes: int = 1,
    own: Sequence[Sequence[str]] = (),
) -> list[subprocess.Popen[str]]:
    """Starts the processes of one run, `devices` in each; `own`: further overrides of each."""
    command = [*TRAIN, "--workdir", str(workdir), *overrides]
    base = environment(devices)
    several = processes > 1
    if several:
        command.append("--distributed")
        base |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}"}
        base |= {"JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [*command, *(own[index] if own else ())],
            env={**base, **({"JAX_PROCESS_ID": str(index)} if several else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]


def finish(runs: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Waits for all; their outputs. Fails unless all exit 0."""
    outputs = [run.communicate(timeout=800)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(outputs)
    return outputs


def train_here(workdir: Path, overrides: Sequence[str]) -> str:
    """Runs `b2txt train` in this process, on one device; its output. Fails unless it returns 0."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main([*TRAIN[3:], "--workdir", str(workdir), *overrides])
    assert status == 0, output.getvalue()
    return output.getvalue()


def losses(workdir: Path) -> list[float]:
    """The logged loss of every step."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    entries = [line for line in lines if line["kind"] == "train"]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


def validations(workdir: Path) -> list[dict[str, Any]]:
    """The logged validations, without the time that they took."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in lines
        if line["kind"] == "val"
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
