"""The installed package is complete: code, configurations and data files, from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import REPOSITORY

pytest.importorskip("setuptools")

PROGRAM = """
import b2txt_jax
from b2txt_jax.config import find_config_file, load_config
from b2txt_jax.phonemes import pronunciations
from b2txt_jax.simulation.corpus import load_pool
assert find_config_file("demo").parent.parent.name == "b2txt_jax"
assert load_config("triple_gru_small").model.units == 128
assert "hello" in pronunciations() and load_pool("val")
print(b2txt_jax.__file__)
"""


def test_a_wheel_holds_code_configurations_and_data_and_works_outside_the_checkout(tmp_path):
    source = tmp_path / "source"
    for name in ("b2txt_jax", "lm_server", "configs"):
        shutil.copytree(
            REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "target")
    expected = {f"b2txt_jax/configs/{path.name}" for path in REPOSITORY.glob("configs/*.py")}
    for package in ("b2txt_jax", "lm_server"):
        for path in (REPOSITORY / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(path.relative_to(REPOSITORY).as_posix())
    assert expected <= names
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "target")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "target"))
