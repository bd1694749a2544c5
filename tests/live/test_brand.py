"""Nodes of BRAND on a real Redis, started and fed as its supervisor and its nodes do it.

The conventions are those of BRAND's Python base class and supervisor. tests/slow/test_brand.py runs
these themselves.
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import redis
import yaml
from live_speech import FEATURES, SAID, SpokenModel, bins_of

import b2txt_jax.live.brand
import lm_server.client.brand
from b2txt_jax.live.brand import Parameters, _Watched, parameters_of
from b2txt_jax.live.outputs.brand import BrandOutput
from b2txt_jax.live.session import LiveSession, Stop
from b2txt_jax.live.sources.brand import BrandInput, BrandStream
from b2txt_jax.live.sources.interface import Begin, Bin, End, SourceError
from b2txt_jax.live.words import Words
from lm_server.client.brand import BrandError, Node, number_of
from lm_server.client.connection import RedisUnavailableError
from lm_server.serving.embedded_redis import embedded_redis

BRAND = Path(__file__).parents[2] / "brand"


def supergraph(client, **nodes):
    """Publish a graph as the supervisor does: nickname=parameters."""
    listed = {
        nickname: {"name": nickname, "nickname": nickname, "parameters": parameters}
        for nickname, parameters in nodes.items()
    }
    client.xadd("supergraph_stream", {"data": json.dumps({"graph_name": "g", "nodes": listed})})


def feature(client, stream, values, number, sync="{}"):
    """Add an entry as BRAND's nodes do."""
    fields = {
        "ts": time.monotonic_ns().to_bytes(8, "little"),
        "sync": sync,
        "i": number.to_bytes(8, "little"),
        "samples": values.tobytes(),
    }
    client.xadd(stream, fields)


@pytest.fixture
def client(live_server):
    client = redis.Redis.from_url(live_server, protocol=2)
    yield client
    client.delete("supergraph_stream", "features", "marks", "d_state", "d_logits", "d_text")


def node_of(url, nickname="d"):
    socket = url.removeprefix("unix://")
    return Node.from_arguments(
        argparse.Namespace(
            nickname=nickname, redis_host="127.0.0.1", redis_port=1, redis_socket=socket
        )
    )


def test_a_sentence_of_the_graph_becomes_stamped_logits_and_text(client, live_server, intake):
    node = node_of(live_server)
    source = BrandStream(node, BrandInput("features", "samples", "float32", FEATURES, 20, "marks"))
    client.xadd("marks", {"mark": "begin", "name": "block 1"})
    for number, row in enumerate(bins_of(SAID[1])):
        feature(client, "features", row, number, json.dumps({"clock": number}))
    client.xadd("marks", {"mark": "end"})

    class Ending:
        """The source until its end mark."""

        def read(self, timeout):
            events = source.read(timeout)
            ended = self.ended if hasattr(self, "ended") else False
            self.ended = ended or any(isinstance(event, End) for event in events)
            return None if ended else events

        def close(self):
            pass

    with Words(lambda: contextlib.nullcontext((live_server, "server"))) as words:
        output = BrandOutput(node, "d_logits", "d_text", lambda: source.origin)
        LiveSession(Ending(), intake, SpokenModel(), words, [output]).run()
    frames = [fields for _, fields in client.xrange("d_logits")]
    rows = bins_of(SAID[1])
    assert len(frames) == len(rows) // 4
    for place, fields in enumerate(frames):
        last = 4 * place + 3
        assert number_of(fields[b"i"]) == place
        assert number_of(fields[b"i_in"]) == last
        assert json.loads(fields[b"sync"]) == {"clock": last}
        assert 0 <= time.monotonic_ns() - int.from_bytes(fields[b"ts"], "little") < 60e9
        np.testing.assert_array_equal(np.frombuffer(fields[b"logits"], "<f4"), rows[4 * place])
    texts = [(fields[b"event"], fields[b"text"]) for _, fields in client.xrange("d_text")]
    described = yaml.safe_load((BRAND / "nodes/b2txt_decoder/b2txt_decoder.yaml").read_text())
    for name, stream in described["RedisStreams"]["Outputs"].items():
        assert stream["type_nwb"] == "TimeSeries"
        fields_of = {key: one for key, one in stream.items() if isinstance(one, dict)}
        for _, entry in client.xrange(name.replace("b2txt_decoder", "d")):
            for key, one in fields_of.items():
                # As the export reads it: text, or so many numbers of that type.
                size = one["chan_per_stream"] * one["samp_per_stream"]
                assert {"unit", "description"} <= set(one["nwb"])
                if one["sample_type"] != "str":
                    assert len(np.frombuffer(entry[key.encode()], one["sample_type"])) == size
                assert key.encode() in entry
    assert texts[0] == (b"begin", b"")
    assert texts[-1] == (b"final", SAID[1].encode())
    assert any(event == b"partial" for event, _ in texts)
    assert client.xrange("d_state")[0][1] == {b"code": b"0", b"status": b"initialized"}


def test_bins_of_10_ms_are_paired_and_a_lost_half_is_a_missing_bin(client, live_server):
    source = BrandStream(
        node_of(live_server), BrandInput("features", "samples", "float32", 4, bin_ms=10)
    )
    rows = np.arange(32, dtype="<f4").reshape(8, 4)
    for number in (0, 1, 2, 4, 5, 7, 6):  # 3 is lost, 7 comes before 6
        feature(client, "features", rows[number], number)
    found = []
    while events := source.read(0.05):
        found += events
    assert [one.sequence for one in found] == [0, 2]
    # Counts are added, power is averaged.
    np.testing.assert_array_equal(found[0].features, [4, 6, 4, 5])
    np.testing.assert_array_equal(found[1].features, [36, 38, 20, 21])


def test_a_stream_that_began_anew_with_lower_ids_is_read_again(client, live_server):
    """As after the supervisor's flushDb, where the clock went back."""
    client.xadd("features", {"samples": b""}, id="9999999999999-0")
    source = BrandStream(node_of(live_server), BrandInput("features", "samples", "float32", 4))
    client.delete("features")
    assert source.read(0.01) == []
    feature(client, "features", np.ones(4, "<f4"), 0)
    (one,) = source.read(5.0)
    assert isinstance(one, Bin)
    source.close()


def test_marks_and_bins_keep_the_order_in_which_redis_received_them(client, live_server):
    source = BrandStream(
        node_of(live_server), BrandInput("features", "samples", "int8", 2, marks="marks")
    )
    values = np.array([3, -4], np.int8)
    feature(client, "features", values, 0)
    time.sleep(0.003)
    client.xadd("marks", {"mark": "begin", "name": "x"})
    feature(client, "features", values, 1)
    client.xadd("marks", {"mark": "end"})
    time.sleep(0.003)
    feature(client, "features", values[:1], 2)
    found = []
    while events := source.read(0.05):
        found += events
    kinds = [type(one) for one in found]
    assert kinds == [Bin, Begin, Bin, End, Bin]
    np.testing.assert_array_equal(found[0].features, [3.0, -4.0])
    assert found[4].features.shape == (1,)


def test_parameters_are_the_newest_of_the_node(client, live_server):
    node = node_of(live_server)
    with pytest.raises(BrandError, match="start the graph"):
        node.first_parameters()
    supergraph(client, d={"a": 1}, other={})
    supergraph(client, d={"a": 2})
    assert node.first_parameters() == {"a": 2}
    assert node.parameters() is None
    supergraph(client, other={"a": 3})
    assert node.parameters() is None
    client.xadd("supergraph_stream", {"data": "{"})
    with pytest.raises(BrandError, match="is no supergraph"):
        node.parameters()


def states(client):
    return [(fields[b"status"], fields.get(b"message")) for _, fields in client.xrange("d_state")]


def test_how_a_node_ends_is_in_its_state_stream(client, live_server):
    with pytest.raises(ValueError, match="why"), node_of(live_server).running():
        raise ValueError("why")
    with pytest.raises(SystemExit), node_of(live_server).running():
        raise SystemExit(2)
    with node_of(live_server).running():
        pass
    assert [found for found in states(client) if found[0] != b"initialized"] == [
        (b"NODE_FATAL_ERROR", b"ValueError: why"),
        (b"NODE_SHUTDOWN", None),
        (b"NODE_FATAL_ERROR", b"SystemExit: 2"),
        (b"NODE_SHUTDOWN", None),
        (b"NODE_SHUTDOWN", None),
    ]


def test_a_graph_whose_redis_is_not_there_or_goes_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr(lm_server.client.brand, "_WAIT_SECONDS", 0.1)
    with pytest.raises(RedisUnavailableError, match="no Redis answers"):
        node_of("unix:///nowhere.sock")
    with embedded_redis() as own:
        node = node_of(own.url)
    gone = r"the graph's Redis at .* does not answer"
    with pytest.raises(BrandError, match=gone), node.running():
        node.first_parameters()
    with pytest.raises(ValueError, match="why"), node.running():
        raise ValueError("why")


def test_other_parameters_stop_the_session_and_those_that_do_not_fit_are_a_warning(
    client, live_server, monkeypatch
):
    monkeypatch.setattr(b2txt_jax.live.brand, "_LOOK_SECONDS", -1.0)
    node, commands = node_of(live_server), queue.SimpleQueue()
    whole = {"workdir": "r", "input_stream": "features", "sentences": "silence"}
    supergraph(client, d=whole)
    now = parameters_of(node.first_parameters(), "d")
    source = BrandStream(node, BrandInput("features", "samples", "float32", 4))
    watched = _Watched(source, node, now, commands)
    supergraph(client, d={**whole, "n_features": 0})
    assert watched.read(0.01) == []
    assert commands.empty()
    (warning,) = [message for status, message in states(client) if status == b"NODE_WARNING"]
    assert b"n_features is 0" in warning
    supergraph(client, d=whole)
    watched.read(0.01)
    assert commands.empty()
    supergraph(client, d={**whole, "day": "t15.2023.08.11"})
    watched.read(0.01)
    assert isinstance(commands.get_nowait(), Stop)
    assert watched.changed["day"] == "t15.2023.08.11"
    client.set("features", "no stream")
    with pytest.raises(SourceError, match="does not let us read features"):
        watched.read(0.01)


def test_bins_are_waited_for_while_redis_is_away(monkeypatch):
    monkeypatch.setattr(b2txt_jax.live.brand, "_LOOK_SECONDS", -1.0)
    with embedded_redis() as own:
        node = node_of(own.url)
        source = BrandStream(node, BrandInput("features", "samples", "float32", 4))
    watched = _Watched(source, node, Parameters("r", "features"), queue.SimpleQueue())
    assert watched.read(0.01) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"workdir": None}, "missing: workdir"),
        ({"imput_stream": "x"}, "unknown: imput_stream"),
        ({"n_features": 0}, "n_features is 0"),
        ({"chunk_frames": "2"}, "chunk_frames is '2'"),
        ({"sentences": "key"}, "needed message or silence"),
        ({"mark_stream": None}, "mark_stream is not there"),
    ],
)
def test_parameters_that_do_not_fit_are_named(change, says):
    whole = {"workdir": "r", "input_stream": "s", "mark_stream": "m"} | change
    with pytest.raises(BrandError, match=says):
        parameters_of({k: v for k, v in whole.items() if v is not None}, "d")


def test_an_input_that_cannot_be_is_refused():
    with pytest.raises(SourceError, match="needed one of float32"):
        BrandInput("s", "f", "object", 4)
    with pytest.raises(SourceError, match="bin_ms is 5"):
        BrandInput("s", "f", "float32", 4, 5)


def test_the_example_graph_has_parameters_that_fit():
    graph = yaml.safe_load((BRAND / "graphs/speech.yaml").read_text())
    for one in graph["nodes"]:
        folder = BRAND / "nodes" / one["name"]
        assert os.access(folder / f"{one['name']}.bin", os.X_OK)
        assert "RedisStreams" in yaml.safe_load((folder / f"{one['name']}.yaml").read_text())
    lm, decoder = (one["parameters"] for one in graph["nodes"])
    assert parameters_of(decoder, "d").mark_stream == "trial_state"
    assert set(lm) == {"log", "lm", "options"}


def test_the_language_model_node_serves_the_graph_and_ends_on_sigint(spoken_lm):
    with embedded_redis() as own:
        client = redis.Redis.from_url(own.url, protocol=2)
        supergraph(client, lm={"lm": str(spoken_lm), "log": "WARNING"})
        command = [str(BRAND / "nodes/lm/lm.bin"), "-n", "lm", "-i", "127.0.0.1", "-p", "6379"]
        command += ["-s", own.url.removeprefix("unix://")]
        script = Path(sys.executable).with_name("lm-server")
        with subprocess.Popen(command, env={**os.environ, "LM_SERVER": str(script)}) as process:
            states, deadline = [], time.monotonic() + 120
            while b"NODE_READY" not in states and time.monotonic() < deadline:
                assert process.poll() is None
                states = [fields[b"status"] for _, fields in client.xrange("lm_state")]
                time.sleep(0.05)
            with Words(lambda: contextlib.nullcontext((own.url, "lm"))) as words:
                words.begin()
                words.send(bins_of(SAID[0])[::4])
                assert words.finalize().sentence == SAID[0]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        states = [fields[b"status"] for _, fields in client.xrange("lm_state")]
        assert states == [b"initialized", b"NODE_READY", b"NODE_SHUTDOWN"]
