"""Several clients at once on one real server, and several servers on one real Redis."""

import contextlib
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import redis
from processes import serving, wait_until
from session_client import SessionClient, ask
from small_model import say

from lm_server.client.client import (
    Client,
    LanguageModelError,
    LanguageModelUnavailableError,
)
from lm_server.protocol import decode_scoring, to_rnn_order
from lm_server.serving.embedded_redis import embedded_redis
from lm_server.settings import Settings


@pytest.fixture
def connection(server):
    with server.client() as client:
        client.flushall()
        yield client


@contextlib.contextmanager
def servers(model_folder, count, *options):
    """Servers that share a Redis, and a connection to it."""
    with embedded_redis() as own, contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(serving("--lm", str(model_folder), "--redis", own.url, *options))
            for _ in range(count)
        ]
        yield running, stack.enter_context(redis.Redis.from_url(own.url, protocol=2))


def owner(connection, session=""):
    return connection.get(f"remote_lm_owner:{session}" if session else "remote_lm_owner")


def test_sessions_and_the_default_one_are_served_at_once_without_meeting(connection):
    clients = [SessionClient(connection, name) for name in ("", "ann", "bob")]
    sentences = [["the", "cat", "sat"], ["a", "dog", "ran"], ["the", "bat", "ate", "the", "hat"]]
    for client in clients:
        client.add("reset", done=0)
    # Frame by frame in turns: a search that is shared would mix them up.
    logits = [say(words) for words in sentences]
    for frame in range(max(map(len, logits))):
        for client, rows in zip(clients, logits, strict=True):
            if frame < len(rows):
                client.send(rows[frame : frame + 1])
    for client, words in zip(clients, sentences, strict=True):
        client.add("finalize", done=0)
        assert client.wait("output_final")["lm_response_final"].split() == words
    assert connection.xlen("remote_lm_output_partial:ann") == len(logits[1])
    for client in clients[1:]:
        assert ask(connection, "close", client.session)["done"] == "1"


def test_a_session_has_its_own_settings_context_and_hot_words(connection):
    ann = SessionClient(connection, "ann", nbest="2", acoustic_scale="0.5")
    bob = SessionClient(connection, "bob")
    connection.set("contextual_decoding_current_context:ann", "ann's words")
    connection.set("contextual_decoding_current_context", "everybody's words")
    finals = []
    for client in (ann, bob):
        client.send(say(["the", "cat"]))
        client.add("finalize", done=0)
        finals.append(client.wait("output_final"))
    assert [final["context_str"] for final in finals] == ["ann's words", ""]
    few, many = (decode_scoring(final["scoring"]) for final in finals)
    assert few[0].total == pytest.approx(0.5 * few[0].acoustic + few[0].ngram)
    assert many[0].total == pytest.approx(
        Settings().acoustic_scale * many[0].acoustic + many[0].ngram
    )
    assert ann.wait("args")["nbest"] == "2"

    # "to", "too" and "two" are said alike; only a hot word brings a rare one to the front.
    assert ann.decode(["to"]) == bob.decode(["to"])
    usual = bob.decode(["to"])
    rare = next([word] for word in ("two", "too", "to") if [word] != usual)
    ann.add("hot_words", words=json.dumps({rare[0]: 20.0}), request_id="h1")
    assert ann.wait("done_updating_hot_words") == {"done": "1", "request_id": "h1"}
    assert ann.decode(["to"]) == rare
    assert bob.decode(["to"]) == usual
    ann.add("hot_words", words="{}")
    ann.wait("done_updating_hot_words")
    assert ann.decode(["to"]) == usual
    ann.add("hot_words", words=json.dumps({"a b": 1.0}))
    assert "hot word" in ann.wait("error")["error"]
    ann.add("hot_words", words="[1]")
    assert "words are a JSON list" in ann.wait("error")["error"]
    for client in (ann, bob):
        ask(connection, "close", client.session)


def test_request_ids_come_back_with_every_answer_and_error(connection):
    client = SessionClient(connection, "ids")
    for send in (
        lambda: client.add("reset", done=0, request_id="r1"),
        lambda: client.send(say(["the", "cat"]), request_id="r2"),
        lambda: client.send([[1.0] * 40], request_id="r3"),
        lambda: client.add("update_params", nbest="3", request_id="r4"),
        lambda: client.add("update_params", nbest="wide", request_id="r5"),
        lambda: client.add("finalize", done=0, request_id="r6" + 300 * "x"),
    ):
        send()
        time.sleep(0.005)  # within one millisecond, the order is that of the streams
    assert client.wait("done_resetting")["request_id"] == "r1"
    assert client.wait("output_partial")["request_id"] == "r2"
    assert client.wait("error")["request_id"] == "r3"
    assert client.wait("done_updating_params")["request_id"] == "r4"
    assert client.wait("error")["request_id"] == "r5"
    for stream in ("output_final", "done_finalizing"):
        assert client.wait(stream)["request_id"] == "r6" + 198 * "x"
    ask(connection, "close", "ids")


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"action": "open", "session": "a b"}, "the session id is 'a b'; needed 1 to 64"),
        ({"action": "open"}, "the session id is ''"),
        ({"action": "open", "session": "x", "beem": "3"}, "there is no parameter 'beem'"),
        ({"action": "open", "session": "x", "idle_seconds": "0"}, "idle_seconds is 0"),
        ({"action": "open", "session": "x", "hot_words": "{"}, "no JSON"),
        ({"action": "close", "session": "nobody"}, "there is no open session 'nobody'"),
        ({"action": "listen"}, "the action is 'listen'; needed open or close"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_with_a_reason(connection, request_, reason):
    answer = ask(connection, **request_)
    assert reason in answer["error"]
    assert not connection.hgetall("remote_lm_open_sessions")


def test_a_session_id_is_one_clients_until_it_is_closed(connection):
    SessionClient(connection, "mine")
    assert "is open already" in ask(connection, "open", "mine")["error"]
    ask(connection, "close", "mine")
    again = SessionClient(connection, "mine")
    assert again.opened["done"] == "1"
    assert again.decode(["a", "cat"]) == ["a", "cat"]
    ask(connection, "close", "mine")


def test_an_idle_session_is_closed_and_too_many_are_refused(model_folder):
    with servers(model_folder, 1, "--max-sessions", "2") as (_, connection):
        SessionClient(connection, "one", idle_seconds="1")
        lively = SessionClient(connection, "two", idle_seconds="600")
        assert "all servers are full" in ask(connection, "open", "three")["error"]
        assert wait_until(lambda: not connection.hexists("remote_lm_open_sessions", "one"))

        def reasons():
            answers = connection.xrange("remote_lm_sessions_answer")
            return [fields[b"reason"] for _, fields in answers if b"reason" in fields]

        assert wait_until(lambda: reasons() == [b"idle for 1 s"])
        assert SessionClient(connection, "three").opened["done"] == "1"
        assert lively.decode(["a", "cat"]) == ["a", "cat"]


def test_a_session_outlives_flushall(connection):
    client = SessionClient(connection, "lasting", nbest="7")
    connection.flushall()
    client.seen.clear()
    assert client.decode(["a", "cat"]) == ["a", "cat"]
    assert wait_until(lambda: connection.hexists("remote_lm_open_sessions", "lasting"))
    assert wait_until(lambda: owner(connection, "lasting"))
    ask(connection, "close", "lasting")


def test_a_long_entry_of_one_session_does_not_hold_up_another(connection):
    greedy, quick = SessionClient(connection, "greedy"), SessionClient(connection, "quick")
    noise = np.random.default_rng(0).normal(0, 3, (10_000, 41))
    before = time.monotonic()
    greedy.send(noise)
    for words in (["a", "cat"], ["the", "dog", "ran"]):
        assert quick.decode(words) == words
    quickly = time.monotonic() - before
    greedy.wait("output_partial", 60)
    slowly = time.monotonic() - before
    (quick_done, _), (greedy_done, _) = (
        connection.xrevrange(name, count=1)[0]
        for name in ("remote_lm_done_finalizing:quick", "remote_lm_output_partial:greedy")
    )
    assert quick_done < greedy_done, (quickly, slowly)
    # A session may be closed in the middle of its search; the others go on.
    greedy.send(noise[:1])
    greedy.wait("error")
    greedy.add("reset", done=0)
    greedy.send(noise)
    assert ask(connection, "close", "greedy")["done"] == "1"
    assert quick.decode(["a", "cat"]) == ["a", "cat"]
    ask(connection, "close", "quick")


def test_answered_entries_are_deleted_on_a_shared_redis_too(model_folder):
    with servers(model_folder, 1) as (_, connection):
        client = SessionClient(connection, "tidy")
        for _ in range(3):
            client.decode(["the", "cat"])
        names = ("reset", "input", "finalize")
        assert wait_until(lambda: not sum(connection.xlen(client.name(name)) for name in names))


def test_a_killed_servers_sessions_go_on_at_another_in_the_middle_of_the_sentence(model_folder):
    with servers(model_folder, 2, "--lease-seconds", "1") as (running, connection):
        default = SessionClient(connection)
        client = SessionClient(connection, "moving", nbest="3")
        default.decode(["the", "cat"])
        words = ["the", "dog", "saw", "the", "cat"]
        logits = say(words)
        for one in (default, client):
            one.add("reset", done=0)
            one.send(logits[:10])
            one.send(logits[10:17])
            one.wait("output_partial")
            one.wait("output_partial")
        before = {session: owner(connection, session) for session in ("", "moving")}
        first = next(r for r in running if f"-{r.process.pid}-".encode() in before[""])
        other = next(r for r in running if r is not first)
        # Both sessions may be at one server; what that one holds is what moves.
        first.process.kill()
        for one in (default, client):
            one.send(logits[17:])
            assert one.wait("output_partial", 20)["lm_response_partial"].split() == words
            one.add("finalize", done=0)
            assert one.wait("output_final")["lm_response_final"].split() == words
            assert not connection.xlen(one.name("error"))
        assert f"-{other.process.pid}-".encode() in owner(connection)
        assert connection.xrevrange("remote_lm_args:moving", count=1)[0][1][b"nbest"] == b"3"
        # Nobody was answered twice: the first sentence of the default session and this one.
        assert connection.xlen("remote_lm_output_final") == 2
        assert connection.xlen("remote_lm_output_final:moving") == 1


def test_a_paused_server_that_wakes_leaves_its_session_to_the_one_that_took_it(model_folder):
    with servers(model_folder, 2, "--lease-seconds", "1") as (running, connection):
        client = SessionClient(connection, "paused")
        holder = owner(connection, "paused")
        first = next(r for r in running if f"-{r.process.pid}-".encode() in holder)
        first.process.send_signal(signal.SIGSTOP)
        try:
            client.add("reset", done=0)
            client.send(say(["a", "cat"]))
            client.wait("output_partial", 20)
            assert owner(connection, "paused") != holder
        finally:
            first.process.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        client.add("finalize", done=0)
        assert client.wait("output_final")["lm_response_final"] == "a cat"
        time.sleep(0.5)
        for stream in ("done_resetting", "output_partial", "output_final"):
            assert connection.xlen(client.name(stream)) == 1, stream


def test_a_server_that_is_told_to_stop_lets_a_sentence_end(model_folder):
    with servers(model_folder, 1, "--grace-seconds", "600") as ((running,), connection):
        client = SessionClient(connection)
        client.send(say(["a"]))
        client.wait("output_partial")
        running.process.terminate()
        time.sleep(0.5)
        client.send(say(["cat"]))
        client.add("finalize", done=0)
        assert client.wait("output_final")["lm_response_final"] == "a cat"
        assert running.process.wait(timeout=120) == 0


def test_a_server_that_stops_within_a_sentence_tells_its_client_and_the_next_goes_on(model_folder):
    with servers(model_folder, 1, "--grace-seconds", "0.2") as ((running,), connection):
        client = SessionClient(connection)
        client.send(say(["a"]))
        client.wait("output_partial")
        running.process.terminate()
        assert "the server stops in the middle of a sentence of" in client.wait("error")["error"]
        assert running.process.wait(timeout=120) == 0
        assert owner(connection) is None
        url = running.url
        with serving("--lm", str(model_folder), "--redis", url):
            client.send(say(["cat"]))
            client.add("finalize", done=0)
            assert client.wait("output_final")["lm_response_final"] == "a cat"


def test_our_client_has_a_session_of_its_own(server, connection):
    said = [["the", "cat", "sat"], ["a", "dog", "ran"]]
    found = {}

    def decode(name, words):
        with Client(server.url, session=name) as client:
            client.update_params(nbest=3)
            for _ in range(5):
                best = client.decode(to_rnn_order(say(words)), chunk_frames=3).sentence
                found.setdefault(name, set()).add(best)

    threads = [
        threading.Thread(target=decode, args=(f"client-{i}", words)) for i, words in enumerate(said)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == {f"client-{i}": {" ".join(words)} for i, words in enumerate(said)}
    assert wait_until(lambda: not connection.hgetall("remote_lm_open_sessions"))
    with (
        Client(server.url, session="taken"),
        pytest.raises(LanguageModelError, match="is open already"),
    ):
        Client(server.url, session="taken")


def test_of_two_clients_in_one_session_the_second_is_told_and_the_first_is_right(
    server, connection
):
    logits = to_rnn_order(say(["the", "cat", "sat"]))
    refused = []
    with Client(server.url) as first, Client(server.url, name="second") as second:
        assert first.decode(logits).sentence == "the cat sat"
        for frame in logits:
            first.send(frame[None])
            with pytest.raises(LanguageModelError, match="in use by the client 'client-") as error:
                second.reset()
            refused.append(error)
        assert first.finalize().sentence == "the cat sat"
    assert len(refused) == len(logits)
    # The first has left, so nobody waits.
    with Client(server.url) as third:
        assert third.decode(logits).sentence == "the cat sat"


def test_without_a_server_a_session_is_not_waited_for_in_vain():
    with embedded_redis() as own, pytest.raises(LanguageModelUnavailableError, match="to open"):
        Client(own.url, hello_timeout=0.5, session="alone")


def test_the_servers_status_can_be_read_and_ends_with_it(model_folder):
    with servers(model_folder, 1) as ((running,), connection):
        SessionClient(connection, "seen").decode(["a", "cat"])
        (key,) = connection.keys("remote_lm_process:server-*")
        assert wait_until(lambda: connection.hget(key, "sentences") == b"1")
        status = connection.hgetall(key)
        assert status[b"pid"] == str(running.process.pid).encode()
        assert json.loads(status[b"session_names"]) == ["(default)", "seen"]
        assert float(status[b"partial_ms_p99"]) > 0
        assert status[b"protocol"] == b"2"
        assert 0 < connection.ttl(key) <= 15
        os.kill(running.process.pid, signal.SIGTERM)
        assert wait_until(lambda: not connection.exists(key))


def test_a_session_opened_with_a_setting_without_effect_is_told(connection):
    ann = SessionClient(connection, "ann", min_active="3", rescore="1", nbest="2")
    assert ann.opened["done"] == "1"
    told = [ann.wait("error") for _ in range(2)]
    assert {one["severity"] for one in told} == {"warning"}
    assert {one["error"].split()[0] for one in told} == {"min_active", "rescore"}
    ask(connection, "close", "ann")


def test_the_latency_that_a_server_tells_has_the_search_in_it(connection):
    ann = SessionClient(connection, "ann")
    ann.send(np.concatenate([say(["the", "cat"])] * 400))
    began = time.monotonic()
    ann.wait("output_partial", seconds=60)
    seen = time.monotonic() - began

    def told():
        # The key comes with the next heartbeat.
        keys = connection.keys("remote_lm_process:server-*")
        return max((float(connection.hget(key, "partial_ms_max") or 0) for key in keys), default=0)

    assert wait_until(lambda: told() > 300 * seen)
    ask(connection, "close", "ann")


def test_a_context_key_of_the_wrong_type_is_a_warning_and_stops_nobody(connection):
    ann, bob = (SessionClient(connection, name) for name in ("ann", "bob"))
    connection.lpush("contextual_decoding_current_context:ann", "x")
    for client in (ann, bob):
        client.send(say(["the", "cat"]))
        client.add("finalize", done=0)
    for client in (ann, bob):
        assert client.wait("output_final")["context_str"] == ""
    warning = ann.wait("error")
    assert warning["severity"] == "warning"
    assert "holds no string" in warning["error"]
    assert not connection.xlen("remote_lm_error:bob")
    for client in (ann, bob):
        ask(connection, "close", client.session)


INPUTS = ("reset", "input", "finalize", "update_params", "hot_words")
OUTPUTS = ("done_resetting", "output_partial", "output_final", "done_finalizing")


@pytest.mark.parametrize("stream", [*INPUTS, *OUTPUTS])
def test_a_stream_of_the_wrong_type_is_put_aside_and_stops_nobody(connection, stream):
    ann, bob = (SessionClient(connection, name) for name in ("ann", "bob"))
    connection.set(f"remote_lm_{stream}:ann", "x")
    if stream in INPUTS:
        assert wait_until(lambda: not connection.exists(f"remote_lm_{stream}:ann"))
    ann.add("reset", done=0)
    ann.send(say(["the", "cat"]))
    ann.add("finalize", done=0)
    assert bob.decode(["a", "dog"]) == ["a", "dog"]
    assert wait_until(lambda: connection.type(f"remote_lm_{stream}:ann") != b"string")
    assert ann.wait("output_final")["lm_response_final"] == "the cat"
    for answered in ("done_resetting", "output_partial", "done_finalizing"):
        ann.wait(answered)
    assert ann.decode(["the", "bat"]) == ["the", "bat"]
    warning = ann.wait("error")
    assert warning["severity"] == "warning"
    assert f"remote_lm_{stream}:ann held a string; needed a stream" in warning["error"]
    assert connection.get(f"remote_lm_set_aside:remote_lm_{stream}:ann") == b"x"
    # One answer each, though the first attempt at one failed.
    assert connection.xlen("remote_lm_output_final:ann") == 2
    assert connection.xlen("remote_lm_done_finalizing:ann") == 2
    assert not connection.xlen("remote_lm_error:bob")
    for client in (ann, bob):
        ask(connection, "close", client.session)
    connection.delete(f"remote_lm_set_aside:remote_lm_{stream}:ann")


@pytest.mark.parametrize(
    "key", ["remote_lm_sessions", "remote_lm_sessions_answer", "remote_lm_open_sessions"]
)
def test_a_shared_key_of_the_wrong_type_is_put_aside(connection, key):
    connection.set(key, "x")
    connection.set("remote_lm_input", "y")
    assert wait_until(lambda: not connection.exists("remote_lm_input"))
    if key == "remote_lm_sessions":
        assert wait_until(lambda: connection.type(key) != b"string")
    if key == "remote_lm_sessions_answer":
        # Before there is an answer to read, nobody meets the wrong type.
        connection.xadd("remote_lm_sessions", {"action": "close", "session": "nobody"})
        assert wait_until(lambda: connection.type(key) == b"stream")
    client = SessionClient(connection, "ann")
    assert client.decode(["the", "cat"]) == ["the", "cat"]
    ask(connection, "close", "ann")
    assert connection.get(f"remote_lm_set_aside:{key}") == b"x"
    assert connection.get("remote_lm_set_aside:remote_lm_input") == b"y"
    # A second one goes beside the first.
    connection.delete("remote_lm_input")
    connection.set("remote_lm_input", "z")
    assert wait_until(lambda: connection.get("remote_lm_set_aside:remote_lm_input:2") == b"z")


def test_a_server_starts_where_keys_have_the_wrong_type(model_folder):
    with embedded_redis() as own, redis.Redis.from_url(own.url, protocol=2) as connection:
        for key in ("remote_lm_input", "remote_lm_open_sessions", "remote_lm_sessions"):
            connection.set(key, "x")
        connection.lpush("remote_lm_state", "x")
        with serving("--lm", str(model_folder), "--redis", own.url):
            client = SessionClient(connection, "ann")
            assert client.decode(["the", "cat"]) == ["the", "cat"]
            assert SessionClient(connection).decode(["a", "dog"]) == ["a", "dog"]
