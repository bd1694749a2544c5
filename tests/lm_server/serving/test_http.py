"""The operators' port of real processes, and the examples of docs/operations.md."""

import configparser
import re
import shlex
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import redis
from processes import ROOT, free_port, serving, wait_until
from prometheus_client.parser import text_string_to_metric_families
from session_client import SessionClient
from small_model import say
from test_worker import worker

from lm_server.__main__ import _parser, main
from lm_server.client import JobClient
from lm_server.protocol import to_rnn_order
from lm_server.serving.embedded_redis import embedded_redis
from lm_server.serving.status import Heartbeat, Meter


def get(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metrics(port):
    """Value by name and bucket, of a page that Prometheus's own parser reads."""
    code, page = get(port, "/metrics")
    assert code == 200
    return {
        (sample.name, sample.labels.get("le", "")): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def test_a_server_shows_its_life_and_its_figures_on_loopback(model_folder):
    port = free_port()
    with serving("--lm", str(model_folder), "--embedded-redis", "--http", str(port)) as running:
        with running.client() as connection:
            client = SessionClient(connection, "ann")
            assert client.decode(["the", "cat"]) == ["the", "cat"]
            client.send([[1.0] * 40])
            client.wait("error")
        assert get(port, "/live") == get(port, "/ready") == (200, "ready\n")
        assert get(port, "/")[0] == 404
        assert wait_until(lambda: metrics(port)["lm_server_errors_total", ""] == 1)
        found = metrics(port)
        listening = Path(f"/proc/{running.process.pid}/net/tcp").read_text()
    assert found["lm_server_sentences_total", ""] == 1
    assert found["lm_server_sessions", ""] == 2
    assert found["lm_server_ready", ""] == 1
    assert 1e7 < found["lm_server_memory_bytes", ""] < 1e10
    for kind in ("partial", "final"):
        name = f"lm_server_{kind}_seconds"
        assert found[f"{name}_bucket", "+Inf"] == found[f"{name}_count", ""] == 1
        assert found[f"{name}_bucket", "0.001"] <= found[f"{name}_bucket", "30.0"] == 1
        assert 0 < found[f"{name}_sum", ""] < 30
    # Nobody else can reach it: 0100007F is 127.0.0.1.
    assert re.findall(rf"(\w+):{port:04X} 00000000:0000", listening) == ["0100007F"]


def test_the_workers_of_a_command_have_one_port(model_folder):
    port = free_port()
    with (
        embedded_redis() as own,
        worker(model_folder, own.url, "--workers", "2", "--http", str(port)),
        JobClient(own.url) as jobs,
    ):
        jobs.decode_all([to_rnn_order(say(["the", "cat"]))] * 3, list("abc"))
        assert wait_until(lambda: get(port, "/ready") == (200, "2 workers show signs of life\n"))
        page = get(port, "/metrics")[1]
        sums = [float(n) for n in re.findall(r"lm_server_sentences_total\{.*\} (\S+)", page)]
        assert len(sums) == 2
        assert wait_until(lambda: "lm_server_jobs_waiting 0.0" in get(port, "/metrics")[1])
        own.process.terminate()
        assert wait_until(lambda: get(port, "/ready")[0] == 503)
        assert get(port, "/live")[0] == 200


def test_a_process_without_redis_is_alive_and_not_ready_and_a_stuck_one_neither():
    with redis.Redis(port=1) as nowhere:
        parts = ("me", "server", Meter(), dict, lambda: None)
        heartbeat = Heartbeat(nowhere, *parts)
        found = heartbeat.report()
        assert (found.live, found.ready, found.reason) == (True, False, "no connection to Redis")
        stuck = Heartbeat(nowhere, *parts, stuck_seconds=-1.0).report()
        assert (stuck.live, stuck.ready, stuck.reason) == (False, False, "stuck")


@pytest.mark.parametrize("address", ["web", "70000", "host.invalid:80", "-1", "{taken}"])
def test_a_port_that_cannot_be_opened_is_an_error(model_folder, capsys, monkeypatch, address):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = address.format(taken=taken.getsockname()[1])
        assert main(["serve", "--lm", str(model_folder), f"--http={address}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --http {address}: ")


def blocks(language):
    page = (ROOT / "docs/operations.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def test_the_example_units_are_units_whose_commands_exist():
    units = blocks("ini")
    assert len(units) == 2
    for text in units:
        unit = configparser.ConfigParser(interpolation=None, strict=False)
        unit.optionxform = str
        unit.read_string(text)
        program, *arguments = shlex.split(unit["Service"]["ExecStart"])
        assert program.endswith("/lm-server")
        _parser().parse_args(arguments)


def test_the_example_container_installs_the_extra_and_runs_a_command_that_exists():
    (recipe,) = blocks("dockerfile")
    assert "pip install --no-cache-dir '.[lm]' -c constraints.txt" in recipe
    entry, command = (
        re.search(rf"^{one} \[(.*)\]$", recipe, re.M)[1] for one in ("ENTRYPOINT", "CMD")
    )
    assert entry == '"lm-server"'
    _parser().parse_args([word.strip(' "') for word in command.split(",")])
    file = (ROOT / "containers/lm_server.Containerfile").read_text()
    assert file.partition("\n")[2] == recipe
