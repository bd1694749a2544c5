"""One training per folder, for as long as it lives and no longer."""

import errno
import fcntl
import subprocess
import sys
import warnings

import pytest
from devices import TRAIN

from b2txt_jax.cli import main
from b2txt_jax.training.lock import WorkdirInUseError, locked

HOLDER = """
import sys, time
from pathlib import Path
from b2txt_jax.training.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(900)
"""


def test_a_second_training_in_a_folder_is_refused_and_a_killed_one_leaves_no_lock(
    tiny_overrides, tmp_path, capsys
):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "locked\n"
        refused_beside(first, tiny_overrides, tmp_path, capsys)
    finally:
        first.kill()
        first.communicate()
    with locked(tmp_path):
        pass


def refused_beside(first, tiny_overrides, tmp_path, capsys):
    """Starts a training beside a process that has the lock."""
    status = main([*TRAIN[3:], "--workdir", str(tmp_path), *tiny_overrides])
    said = " ".join(capsys.readouterr().err.split())
    assert status == 2, said
    assert f"error: {tmp_path} is in use by another training (process {first.pid} on " in said
    assert "give another --workdir" in said
    assert first.poll() is None


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_two_trainings_of_one_process_are_two(tmp_path):
    refused = pytest.raises(WorkdirInUseError, match="in use by another training")
    with locked(tmp_path), refused, locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_warned_of_once_and_trained_on(tmp_path, monkeypatch):
    def unsupported(file, operation):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)  # no such file system can be mounted here
    with pytest.warns(UserWarning, match="a file system without locks") as warned, locked(tmp_path):
        pass
    assert len(warned) == 1


def test_another_failure_to_lock_is_an_error(tmp_path, monkeypatch):
    def broken(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.undo()
        with locked(tmp_path):
            pass
