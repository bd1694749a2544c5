"""How both commands end: Ctrl-C in every stage, a reader that went away, a place not writable."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from b2txt_jax.cli import main as b2txt
from lm_server.errors import UserError
from lm_server.files.atomic_file import UnwritableError, require_writable
from lm_server.process import exit_status

# Work in C that lasts minutes, during which Python runs no handler of a signal.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'x', b'x', 2**31 - 1)"
PROGRAM = """
import os, signal, sys, time
from lm_server import process
process._PATIENCE = 0.5

def ready():
    print('ready', flush=True)

def run():
    {work}
    return 0

sys.exit(process.exit_status(run))
"""


def started(command, **options):
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def running(*lines):
    work = "\n    ".join(lines)
    process = started([sys.executable, "-c", PROGRAM.format(work=work)])
    assert process.stdout.readline() == "ready\n"
    return process


def test_an_interrupt_of_work_that_runs_no_python_is_acknowledged_and_ends_it():
    process = running("ready()", BUSY)
    time.sleep(1.0)  # until it is busy
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline() == "interrupted: stopping; Ctrl-C again ends at once\n"
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "cannot be stopped: ended without it" in error
    assert "Traceback" not in error


def test_an_interrupt_lets_a_command_clean_up():
    process = running(
        "try:", "    ready()", "    while True: time.sleep(0.05)", "finally: print('cleaned')"
    )
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=120)
    assert (process.returncode, output) == (130, "cleaned\n")
    assert "Traceback" not in error


def test_an_interrupt_names_what_it_waits_for_and_a_second_one_ends_at_once():
    own = "signal.signal(signal.SIGINT, lambda *_: None)"
    process = running(own, f"with process.finishing('the save'): ready(); {BUSY}")
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    assert process.stderr.readline().startswith("interrupted: stopping after the save;")
    time.sleep(1.0)  # longer than the patience with others
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (130, "\ninterrupted: ended at once\n")


def test_an_interrupt_of_a_forked_process_is_not_taken_for_the_parents():
    process = running(
        "reading, writing = os.pipe()",
        "child = os.fork()",
        "if not child: os.write(writing, b'x')",
        # Not one long sleep: a signal just before it would not end it.
        "while not child: time.sleep(0.05)",
        "ready(); os.read(reading, 1); os.kill(child, signal.SIGINT)",
        "os.waitpid(child, 0); time.sleep(0.3)",
    )
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stopping" not in error


@pytest.mark.parametrize(
    "command",
    [("b2txt_jax.cli", "infer", "jax"), ("lm_server", "serve", "lm_server.commands.serve")],
)
def test_an_interrupt_of_the_imports_ends_without_a_traceback(command, tmp_path):
    module, name, imported = command
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {imported!r}:\n"
        "            print('importing', flush=True)\n"
        "            time.sleep(100)\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "GLIBC_TUNABLES": ""}
    process = started([sys.executable, "-m", module, name, "--help"], env=environment)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGINT, 130)
    assert error == ""


def test_a_reader_that_goes_away_early_as_head_does_is_no_error():
    process = running("ready(); time.sleep(0.5)", "print('x' * 100_000)")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) == 141


def test_a_broken_connection_is_an_error_also_where_the_output_is_read():
    process = running("ready()", "raise BrokenPipeError(32, 'the other side has gone')")
    output, error = process.communicate(timeout=120)
    assert (process.returncode, output) == (2, "")
    assert error == "error: [Errno 32] the other side has gone\n"


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path, tmp_path / "file" / "x", tmp_path / "pipe"):
        with pytest.raises(UnwritableError, match=rf"--out {wrong} cannot be written"):
            require_writable(wrong)
    with pytest.raises(UnwritableError, match="/proc/x"):  # also the superuser cannot write there
        require_writable(Path("/proc/x"))
    require_writable(tmp_path / "pipe", devices=True)
    require_writable(tmp_path / "new" / "x.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new", "pipe"]
    assert list((tmp_path / "new").iterdir()) == []


SECRET = "redis://:hunter2=hunter2@host:1/0"


@pytest.mark.parametrize(
    "arguments",
    [
        [*("train", "--workdir", "w"), SECRET],
        [SECRET],
        ["evaluate", "--workdir", "w", "--split", SECRET],
        ["evaluate", "--workdir", "w", "--workers", SECRET],
        ["evaluate", "--workdir", SECRET],
        ["evaluate", f"--workdir={SECRET}"],
        ["train", "--workdir", "w", "--config", SECRET],
    ],
)
def test_a_misplaced_url_is_not_repeated_with_its_password(arguments, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["b2txt", *arguments])
    try:
        status = b2txt(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    shown = capsys.readouterr().err
    assert "hunter2" not in shown
    assert "***" in shown


def test_a_url_without_a_login_is_named_in_the_error_about_it(capsys, monkeypatch):
    url = "redis://127.0.0.1:1/0"
    monkeypatch.setattr("sys.argv", ["lm-server", "status", f"--redis={url}"])

    def run() -> int:
        raise UserError(f"no Redis answers at {url}")

    assert exit_status(run) == 2
    assert url in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_no_worker_of_a_pool_outlives_a_killed_command():
    pool = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from lm_server.process import end_with_parent
with ProcessPoolExecutor(2, get_context("fork"), end_with_parent, (os.getpid(),)) as pool:
    list(pool.map(time.sleep, [0.1, 0.1]))
    print("ready", flush=True)
    time.sleep(3600)
"""
    process = started([sys.executable, "-c", pool])
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate(timeout=120)  # returns when nobody holds its output any more


def test_a_result_replaces_nothing_that_is_read_for_it(tmp_path):
    read = tmp_path / "lm" / "lm.bin"
    read.parent.mkdir()
    read.touch()
    (tmp_path / "same").symlink_to(read)
    for wrong, inputs in ((read, [read.parent]), (tmp_path / "same", [read]), (read, [read])):
        with pytest.raises(UnwritableError, match="which is read"):
            require_writable(wrong, inputs=inputs)
    require_writable(tmp_path / "lm" / "new.json", inputs=[read.parent])
