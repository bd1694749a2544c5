"""A real server process on a real Redis, spoken to as published clients speak."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
import redis
from processes import (
    ROOT,
    children,
    free_port,
    is_running,
    serving,
    start_redis,
    start_server,
    wait_ready,
    wait_until,
)
from small_model import say

from lm_server.__main__ import main
from lm_server.client.connection import connect
from lm_server.protocol import decode_scoring, encode_logits
from lm_server.search.flashlight import LanguageModel
from lm_server.serving.embedded_redis import embedded_redis
from lm_server.serving.server import Server
from lm_server.serving.session import Session
from lm_server.settings import Settings


class NejmClient:
    """A client written from the reference: one last-seen id per answer stream, from the clock."""

    def __init__(self, connection, answers=("remote_lm_error",)):
        self.redis = connection
        seconds, micros = connection.time()
        now = seconds * 1000 + micros // 1000
        names = ["done_resetting", "output_partial", "output_final", "done_finalizing"]
        names += ["done_updating_params", "error"]
        self.seen = {f"remote_lm_{name}": now for name in names}

    def wait(self, name, seconds=120.0):
        stream = f"remote_lm_{name}"
        answer = self.redis.xread({stream: self.seen[stream]}, count=1, block=int(seconds * 1000))
        assert answer, f"no answer on {stream}"
        self.seen[stream], fields = answer[0][1][0]
        return {key.decode(): value.decode() for key, value in fields.items()}

    def reset(self):
        self.redis.xadd("remote_lm_reset", {"done": 0})
        return self.wait("done_resetting")

    def send(self, logits):
        self.redis.xadd("remote_lm_input", {"logits": np.float32(logits).tobytes()})
        return self.wait("output_partial")["lm_response_partial"]

    def finalize(self):
        self.redis.xadd("remote_lm_finalize", {"done": 0})
        final = self.wait("output_final")
        assert self.wait("done_finalizing") == {"done": "1"}
        return final

    def decode(self, words):
        self.reset()
        self.send(say(words))
        return self.finalize()["lm_response_final"].split()


@pytest.fixture
def client(server):
    with server.client() as connection:
        connection.flushall()
        yield NejmClient(connection)


def test_a_published_client_gets_its_sentence(client):
    assert client.reset() == {"done": "1"}
    assert client.send(say(["the", "cat", "sat"])) == "the cat sat"
    final = client.finalize()
    assert final["lm_response_final"] == "the cat sat"
    assert final["context_str"] == ""
    candidates = decode_scoring(final["scoring"])
    assert candidates[0].sentence == "the cat sat"
    assert len(final["scoring"].split(";")) == 5 * len(candidates)


def test_a_sentence_in_many_chunks_has_a_partial_for_each_and_the_same_final(client):
    logits = say(["the", "dog", "saw", "the", "cat"])
    client.reset()
    whole = client.send(logits)
    expected = client.finalize()
    client.reset()
    partials = [client.send(frame[None]) for frame in logits]
    assert len(partials) == len(logits)
    assert partials[-1] == whole
    assert [len(p.split()) for p in partials] == sorted(len(p.split()) for p in partials)
    assert client.finalize() == expected


def test_parameters_are_updated_and_told(client):
    client.redis.xadd(
        "remote_lm_update_params", {"acoustic_scale": 0.35, "blank_penalty": 90.0, "alpha": 0.55}
    )
    assert client.wait("done_updating_params") == {"done": "1"}
    told = client.redis.xrevrange("remote_lm_args", count=1)[0][1]
    assert told[b"acoustic_scale"] == b"0.35"
    assert told[b"blank_penalty"] == b"90.0"
    assert client.decode(["the", "cat"]) == ["the", "cat"]
    client.redis.xadd("remote_lm_update_params", {"acoustic_scale": 1.5, "blank_penalty": 8})
    client.wait("done_updating_params")


def test_the_server_answers_after_flushall_and_tells_its_settings_again(client):
    assert wait_until(lambda: client.redis.xlen("remote_lm_args") == 1)
    for words in (["a", "cat"], ["the", "dog", "ran"]):
        client.redis.flushall()
        assert client.decode(words) == words
    assert wait_until(lambda: client.redis.xlen("remote_lm_args") == 1)


def test_a_stream_that_begins_anew_with_smaller_ids_is_read(client):
    client.decode(["a", "cat"])
    client.redis.flushall()
    client.redis.xadd("remote_lm_reset", {"done": 0}, id="5-1")
    assert client.redis.xread({"remote_lm_done_resetting": "0-0"}, block=5000)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (np.zeros((7, 40), np.float32).tobytes(), "1120 bytes; needed a multiple of 164"),
        (np.full((3, 41), np.nan, np.float32).tobytes(), "NaN"),
    ],
)
def test_logits_of_the_wrong_shape_get_an_error_entry_and_the_next_sentence_its_answer(
    client, payload, reason
):
    client.reset()
    sent = client.redis.xadd("remote_lm_input", {"logits": payload})
    error = client.wait("error")
    assert reason in error["error"]
    assert error["stream"] == "remote_lm_input"
    assert error["entry_id"] == sent.decode()
    assert client.decode(["the", "cat", "ran"]) == ["the", "cat", "ran"]


@pytest.mark.parametrize("value", ["1e30", "3000000000"])
def test_a_setting_that_no_search_can_have_is_refused_and_the_server_stays(client, server, value):
    client.redis.xadd("remote_lm_update_params", {"max_active": value})
    assert "needed a number from 1 to 10000" in client.wait("error")["error"]
    assert client.decode(["the", "cat", "ran"]) == ["the", "cat", "ran"]
    assert server.process.poll() is None


class Faulty(Session):
    """A session that fails in the middle of every sentence of 7 frames."""

    def handle(self, entry, context=""):
        reply = yield from super().handle(entry, context)
        if len(entry.fields.get("logits", b"")) == 7 * 164:
            raise ZeroDivisionError("a fault of ours")
        return reply


def test_a_fault_of_ours_is_answered_and_logged_and_the_server_goes_on(model_folder, caplog):
    stop = threading.Event()
    with (
        embedded_redis() as own,
        redis.Redis.from_url(own.url, protocol=2) as connection,
        connect(own.url, 5.0, stop) as side,
    ):
        model = LanguageModel(model_folder)
        server = Server(side, lambda name: Faulty(model, Settings(), name))
        thread = threading.Thread(target=server.run, args=(stop,))
        thread.start()
        try:
            client = NejmClient(connection)
            for count in (1, 2):
                client.reset()
                sent = connection.xadd("remote_lm_input", {"logits": bytes(7 * 164)})
                error = client.wait("error")
                assert "ZeroDivisionError: a fault of ours" in error["error"]
                assert error["entry_id"] == sent.decode()
                assert f"failures so far: {{'ZeroDivisionError': {count}}}" in caplog.text
                # The rest of a sentence is no sentence.
                connection.xadd("remote_lm_input", {"logits": encode_logits(say(["a"]))})
                assert "the beginning of this sentence is lost" in client.wait("error")["error"]
                client.reset()
                assert client.send(say(["a", "cat"])) == "a cat"
                assert client.finalize()["lm_response_final"] == "a cat"
        finally:
            stop.set()
            thread.join(timeout=120)
    assert "Traceback" in caplog.text


def test_the_context_travels_with_the_final_answer(client):
    client.redis.set("contextual_decoding_current_context", "  what was said before ")
    client.reset()
    client.send(say(["a", "dog"]))
    assert client.finalize()["context_str"] == "what was said before"


def test_messages_sent_without_waiting_are_taken_in_order(client):
    sentences = [["the", "cat"], ["a", "dog", "ran"], ["the", "bat", "sat"]] * 10
    for words in sentences:
        client.redis.xadd("remote_lm_reset", {"done": 0})
        for part in np.array_split(say(words), 3):
            client.redis.xadd("remote_lm_input", {"logits": encode_logits(part)})
        client.redis.xadd("remote_lm_finalize", {"done": 0})
        # Ids of different streams within one millisecond have no order.
        time.sleep(0.002)
    got = [client.wait("output_final")["lm_response_final"].split() for _ in sentences]
    assert got == sentences
    assert client.redis.xlen("remote_lm_output_partial") == 3 * len(sentences)


def test_answered_entries_do_not_pile_up_in_the_embedded_redis(client):
    for _ in range(3):
        client.decode(["the", "cat"])
    streams = ("remote_lm_reset", "remote_lm_input", "remote_lm_finalize")
    assert wait_until(lambda: sum(client.redis.xlen(name) for name in streams) == 0)


def test_an_input_stream_that_is_no_stream_does_not_end_the_server(client):
    client.redis.set("remote_lm_input", "someone else's")
    time.sleep(0.5)
    client.redis.delete("remote_lm_input")
    client.redis.xadd("remote_lm_reset", {"done": 0})
    client.wait("done_resetting")
    assert client.decode(["a", "cat"]) == ["a", "cat"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_server_and_embedded_redis_with_exit_code_0(model_folder, how):
    with serving("--lm", str(model_folder), "--embedded-redis") as running:
        (redis_process,) = children(running.process.pid)
        socket = running.url.removeprefix("unix://")
        assert os.path.exists(socket)
        running.process.send_signal(how)
        assert running.process.wait(timeout=120) == 0
        assert not is_running(redis_process)
        assert not os.path.exists(os.path.dirname(socket))
        assert "Traceback" not in running.process.stderr.read()


def test_killing_the_parent_ends_server_and_redis(model_folder):
    """The parent is killed with SIGKILL, and so can do nothing about its children."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-m', 'lm_server', *sys.argv[1:]],\n"
            "                         stdout=subprocess.PIPE, text=True)\n"
            "print(child.pid, child.stdout.readline(), flush=True)\n"
            "time.sleep(600)\n",
            *("serve", "--lm", str(model_folder), "--embedded-redis", "--exit-with-parent"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        line = parent.stdout.readline()
        assert "lm-server ready" in line
        server_process = int(line.split()[0])
        (redis_process,) = children(server_process)
        assert is_running(redis_process)
    finally:
        parent.kill()
        parent.communicate()
    assert wait_until(lambda: not is_running(server_process))
    assert wait_until(lambda: not is_running(redis_process))


def test_killing_the_server_ends_its_redis(model_folder, monkeypatch, request):
    # A folder of its own, short enough for a socket: any other server that starts on this machine
    # would clear away what this one leaves.
    own = tempfile.mkdtemp(prefix="lm-")
    request.addfinalizer(lambda: shutil.rmtree(own, ignore_errors=True))
    monkeypatch.setenv("TMPDIR", own)
    monkeypatch.setattr(tempfile, "tempdir", None)
    with serving("--lm", str(model_folder), "--embedded-redis") as running:
        (redis_process,) = children(running.process.pid)
        running.process.kill()
        running.process.wait()
        assert wait_until(lambda: not is_running(redis_process))
        folder = os.path.dirname(running.url.removeprefix("unix://"))
        assert os.path.exists(folder)
    # The next server clears away what the killed one could not.
    with embedded_redis():
        assert not os.path.exists(folder)


def test_an_embedded_redis_that_dies_ends_the_server_with_its_reason(model_folder):
    with serving("--lm", str(model_folder), "--embedded-redis") as running:
        (redis_process,) = children(running.process.pid)
        os.kill(redis_process, signal.SIGKILL)
        assert running.process.wait(timeout=120) == 2
        assert "error: the embedded Redis ended" in running.process.stderr.read()


def test_the_server_waits_for_a_redis_that_starts_late_and_outlives_its_restart(model_folder):
    port = free_port()
    url = f"redis://:secret@127.0.0.1:{port}/0"
    process = start_server("--lm", str(model_folder), "--redis", url, "--wait-seconds", "30")
    first = second = None
    try:
        time.sleep(0.3)
        first, connection = start_redis(port, "--requirepass", "secret")
        running = wait_ready(process, url)
        # The password is not shown to whoever reads the output.
        assert f"redis=redis://***@127.0.0.1:{port}/0" in running.line
        assert NejmClient(connection).decode(["the", "cat"]) == ["the", "cat"]

        first.kill()
        first.wait()
        time.sleep(0.5)
        second, connection = start_redis(port, "--requirepass", "secret")
        client = NejmClient(connection)
        # The client's first message may come before the server is back; it is not lost.
        assert client.decode(["a", "dog", "ran"]) == ["a", "dog", "ran"]
        assert process.poll() is None
    finally:
        for one in (process, first, second):
            if one is not None:
                one.kill()
        output = process.communicate()
        for one in (first, second):
            if one is not None:
                one.wait()
    assert "secret" not in "".join(output)


def test_no_redis_at_the_start_is_an_error_after_the_wait(model_folder):
    started = time.monotonic()
    process = start_server(
        *("--lm", str(model_folder), "--wait-seconds", "0.5"),
        *("--redis", f"redis://127.0.0.1:{free_port()}/0"),
    )
    output, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert time.monotonic() - started < 100
    assert re.search(r"^error: no Redis answers at redis://127\.0\.0\.1:\d+/0 after 0\.5 s", error)
    assert output == ""


@pytest.mark.parametrize(
    ("url", "reason"),
    [("localhost", "is no Redis URL"), ("redis://:wrong@{address}/0", "refuses us")],
)
def test_a_wrong_url_or_password_is_an_error_at_once(model_folder, url, reason):
    port = free_port()
    process, _ = start_redis(port, "--requirepass", "right")
    try:
        address = f"127.0.0.1:{port}"
        server = start_server(
            "--lm",
            str(model_folder),
            "--redis",
            url.format(address=address),
            "--wait-seconds",
            "60",
        )
        _, error = server.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert server.returncode == 2
    assert error.startswith("error: ")
    assert reason in error
    assert "wrong" not in error.replace("wrong:", "").split("refuses")[0]


def test_a_folder_without_a_model_is_an_error(tmp_path):
    server = start_server("--lm", str(tmp_path), "--embedded-redis")
    _, error = server.communicate(timeout=120)
    assert server.returncode == 2
    assert f"error: {tmp_path} is no model folder, lm.json is missing in it" in error
    assert "Traceback" not in error


def test_a_setting_outside_its_range_is_an_error(model_folder):
    server = start_server("--lm", str(model_folder), "--embedded-redis", "--acoustic-scale", "0")
    _, error = server.communicate(timeout=120)
    assert server.returncode == 2
    assert "error: acoustic_scale is 0.0; needed" in error


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--lease-seconds", "0.1", "--lease-seconds is 0.1; needed at least 0.5"),
        ("--max-sentence-frames", "10001", "needed at least 1 and at most 10000"),
        ("--session-idle-seconds", "0", "needed at least 0.001"),
        ("--ceiling", "max_active", "needed SETTING=VALUE with one of"),
        ("--ceiling", "max_actives=3", "needed SETTING=VALUE with one of"),
        ("--ceiling", "max-active=99", "needed a number from 500"),
        ("--ceiling", "beam=1001", "to 1000"),
    ],
)
def test_a_limit_outside_its_range_is_an_error(tmp_path, capsys, option, value, reason):
    assert main(["serve", "--lm", str(tmp_path), option, value]) == 2
    assert reason in capsys.readouterr().err


def test_two_embedded_servers_do_not_meet():
    with embedded_redis() as one, embedded_redis() as two:
        assert one.url != two.url
        with redis.Redis.from_url(one.url) as first, redis.Redis.from_url(two.url) as second:
            first.set("key", "value")
            assert second.get("key") is None
            assert first.config_get("save") == {"save": ""}
            assert first.config_get("port") == {"port": "0"}
        assert one.alive
    assert not one.alive
    assert not two.alive


def test_a_backlog_longer_than_one_read_is_taken_in_order(server, client):
    sentences = [["the", "cat"], ["a", "dog", "ran"], ["the", "bat", "sat"]]
    server.process.send_signal(signal.SIGSTOP)
    try:
        for words in sentences:
            client.redis.xadd("remote_lm_reset", {"done": 0})
            for frame in say(words):
                client.redis.xadd("remote_lm_input", {"logits": encode_logits(frame[None])})
            client.redis.xadd("remote_lm_finalize", {"done": 0})
            time.sleep(0.002)
    finally:
        server.process.send_signal(signal.SIGCONT)
    got = [client.wait("output_final")["lm_response_final"].split() for _ in sentences]
    assert got == sentences
