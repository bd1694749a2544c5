"""Claims about the server as a child process, with stand-ins for its command line."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lm_server.client.client import LanguageModelUnavailableError
from lm_server.client.process import serve_child

READY = 'print("loading", flush=True); print("lm-server ready redis=unix:///s lm=D", flush=True)'


def command(tmp_path: Path, body: str) -> list[str]:
    """A stand-in that writes its process id and arguments, then does `body`."""
    script = tmp_path / "server.py"
    head = f"""
        import os, signal, subprocess, sys, time
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        open({str(tmp_path / "args")!r}, "w").write(" ".join(sys.argv[1:]))
    """
    script.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    return [sys.executable, "-S", str(script)]


def alive(pid_file: Path) -> bool:
    """Whether that process still runs (an unreaped one does not)."""
    try:
        state = Path(f"/proc/{pid_file.read_text()}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid_file: Path, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid_file):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_yields_the_url_of_the_ready_line_and_stops_the_child_afterwards(tmp_path: Path) -> None:
    server = command(tmp_path, f"{READY}\ntime.sleep(60)")
    with serve_child("some dir", ["--beam", "300"], command=server) as url:
        assert url == "unix:///s"
        assert alive(tmp_path / "pid")
    assert gone(tmp_path / "pid", 0.5)
    assert (tmp_path / "args").read_text() == (
        "serve --lm some dir --embedded-redis --exit-with-parent --beam 300"
    )


def test_an_error_inside_the_block_stops_the_child_too(tmp_path: Path) -> None:
    server = command(tmp_path, f"{READY}\ntime.sleep(60)")
    with pytest.raises(KeyboardInterrupt), serve_child("D", command=server):
        raise KeyboardInterrupt
    assert gone(tmp_path / "pid", 0.5)


def test_a_child_that_fails_is_an_error_with_its_words_and_exit_code(tmp_path: Path) -> None:
    server = command(tmp_path, 'print("no lm.json in D", file=sys.stderr); sys.exit(2)')
    with pytest.raises(LanguageModelUnavailableError) as caught, serve_child("D", command=server):
        pass
    assert "exit code 2" in str(caught.value)
    assert "no lm.json in D" in str(caught.value)
    assert "serve --lm D" in str(caught.value)


def test_a_child_that_never_gets_ready_is_stopped_and_named(tmp_path: Path) -> None:
    server = command(
        tmp_path, 'print("still loading", file=sys.stderr, flush=True); time.sleep(60)'
    )
    named = pytest.raises(LanguageModelUnavailableError, match=r"(?s)within 1 s.*still loading")
    with named, serve_child("D", command=server, ready_timeout=1.0):
        pass
    assert gone(tmp_path / "pid", 0.5)


def test_a_child_that_ignores_the_request_to_stop_is_killed(tmp_path: Path) -> None:
    body = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{READY}\ntime.sleep(60)"
    with serve_child("D", command=command(tmp_path, body), stop_timeout=0.3):
        pass
    assert gone(tmp_path / "pid", 0.5)


def test_what_a_killed_child_left_running_is_ended_with_it(tmp_path: Path) -> None:
    left = tmp_path / "redis_pid"
    body = f"""
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(left)!r}, "w").write(str(child.pid))
        {READY}
        time.sleep(60)
    """
    with serve_child("D", command=command(tmp_path, body)):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        assert alive(left)
    assert gone(left)


def test_a_child_that_writes_a_lot_does_not_stand_still(tmp_path: Path) -> None:
    body = f"""
        {READY}
        for stream in (sys.stdout, sys.stderr):
            stream.write("x" * 79 + "\\n")
            for _ in range(5000):
                stream.write("x" * 79 + "\\n")
            stream.flush()
        open({str(tmp_path / "done")!r}, "w").close()
        time.sleep(60)
    """
    with serve_child("D", command=command(tmp_path, body)):
        deadline = time.monotonic() + 10
        while not (tmp_path / "done").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_child_sees_another_parent_when_this_process_is_killed(tmp_path: Path) -> None:
    """What `--exit-with-parent` goes by: nothing stands between the child and this process."""
    body = f"""
        parent = os.getppid()
        {READY}
        while os.getppid() == parent:
            time.sleep(0.02)
    """
    server = command(tmp_path, body)
    code = f"""
        import time
        from lm_server.client.process import serve_child
        with serve_child("D", command={server!r}) as url:
            print(url, flush=True)
            time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "unix:///s\n"
    time.sleep(0.2)
    assert alive(tmp_path / "pid")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(tmp_path / "pid", 30.0)
