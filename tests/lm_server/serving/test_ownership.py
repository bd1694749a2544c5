"""Owned sessions on a real Redis: replies are sent once, and orphans go on where they were."""

import json
import threading
import time

import numpy as np
import pytest
import redis
from small_model import say

from lm_server.__main__ import main
from lm_server.errors import UserError
from lm_server.protocol import REGISTRY, encode_logits, owner_key
from lm_server.search.hot_words import HotWord
from lm_server.search.load import load_model
from lm_server.serving.embedded_redis import embedded_redis
from lm_server.serving.ownership import Limits, OwnedSessions
from lm_server.serving.server import Server
from lm_server.serving.session import Entry, Session
from lm_server.settings import Settings


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder)


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch):
    monkeypatch.setattr("lm_server.serving.server._BLOCK_MS", 10)


@pytest.fixture(scope="module")
def url():
    with embedded_redis() as own:
        yield own.url


@pytest.fixture
def client(url):
    with redis.Redis.from_url(url, protocol=2, socket_timeout=10) as connection:
        connection.flushall()
        yield connection


def owning(client, me, model, settings=None, limits=None, **options):
    """A table that owns the default session, and that session; its replay is done."""
    client.delete(owner_key(""))
    table = OwnedSessions(
        client, me, lambda name: Session(model, settings or Settings(), name, **options), limits
    )
    table.adopt(at_once=True)
    (owned,) = table
    for _ in owned.work or ():
        pass
    return table, owned


def handle(session, entry):
    work = session.handle(entry)
    while True:  # in as many slices as a busy machine needs
        try:
            next(work)
        except StopIteration as end:
            return end.value


def hear(owned, client, stream, /, **fields):
    """As the server does, up to the sending."""
    id_ = client.xadd(stream, fields)
    ms, number = map(int, id_.decode().split("-"))
    entry = Entry(stream, (ms, number), fields)
    owned.handled(entry, handle(owned.session, entry), started=0.0)
    return owned.unsent[-1]


def answer(table, owned, client, stream, /, **fields):
    unsent = hear(owned, client, stream, **fields)
    table.send(owned, unsent.reply.messages(), unsent)


def test_an_answer_sent_again_because_its_reply_was_lost_comes_once(model, client):
    table, owned = owning(client, "me", model)
    unsent = hear(owned, client, "remote_lm_reset", done=b"0")
    for _ in range(3):
        table.send(owned, unsent.reply.messages(), unsent)
    assert client.xlen("remote_lm_done_resetting") == 1
    # A Redis that forgot everything has not answered either.
    client.flushall()
    table.send(owned, unsent.reply.messages(), unsent)
    assert client.xlen("remote_lm_done_resetting") == 1


def test_a_server_whose_session_another_has_taken_sends_nothing(model, client):
    table, owned = owning(client, "me", model)
    client.set("remote_lm_owner", "another")
    answer(table, owned, client, "remote_lm_reset", done=b"0")
    assert owned.lost
    assert not client.xlen("remote_lm_done_resetting")
    table.drop_lost()
    assert not table.names
    assert client.get("remote_lm_owner") == b"another"


def test_a_renewal_notices_that_another_has_taken_the_session(model, client):
    table, owned = owning(client, "me", model)
    table.renew()
    assert not owned.lost
    assert 0 < client.pttl("remote_lm_owner") <= 4000
    client.set("remote_lm_owner", "another")
    table.renew()
    assert owned.lost


@pytest.mark.parametrize("trimmed", [False, True], ids=["whole", "trimmed"])
def test_another_server_hears_the_sentence_again_or_knows_that_it_cannot(model, client, trimmed):
    table, first = owning(client, "first", model, Settings(beam=11.0))
    answer(table, first, client, "remote_lm_update_params", nbest=b"7")
    logits = say(["the", "cat", "sat"])
    for start in range(0, len(logits), 10):
        payload = encode_logits(logits[start : start + 10])
        answer(table, first, client, "remote_lm_input", logits=payload)
        time.sleep(0.002)
    if trimmed:
        client.xtrim("remote_lm_input", maxlen=1, approximate=False)
    _, second = owning(client, "second", model, Settings(beam=12.0))
    # What the client asked for goes on; what it did not is as this server was started.
    assert second.session.settings == Settings(nbest=7, beam=12.0)
    assert second.positions == first.positions
    assert client.xlen("remote_lm_error") == trimmed
    if trimmed:
        assert second.session.frames == 0
    else:
        assert second.session.frames == len(logits)
        end = Entry("remote_lm_finalize", (1, 0))
        final, expected = (handle(one.session, end).messages()[0] for one in (second, first))
        assert final == expected


def test_the_state_of_the_previous_version_is_read(model, client):
    logits = say(["the", "cat"])
    id_ = client.xadd("remote_lm_input", {"logits": encode_logits(logits)}).decode()
    state = {
        "sentence": f'{{"first": "{id_}", "frames": {len(logits)}}}',
        "session": '{"settings": {"nbest": 5}, "hot_words": {"hat": {"weight": 3.0, '
        '"pronunciations": [["HH", "AE", "T"]]}}}',
        "remote_lm_input": id_,
    }
    client.hset("remote_lm_state", mapping=state)
    _, owned = owning(client, "me", model)
    assert owned.session.settings == Settings(nbest=5)
    assert owned.session.hot_words == {"hat": HotWord(3.0, (("HH", "AE", "T"),))}
    assert owned.session.frames == len(logits)


@pytest.mark.parametrize(
    ("said", "expected"),
    [(None, {"bat": HotWord(2.0)}), ('{"hat": 3}', {"hat": HotWord(3.0)}), ("{}", {})],
    ids=["the client said nothing", "the client's", "the client wants none"],
)
def test_hot_words_are_the_new_servers_unless_the_client_gave_some(model, client, said, expected):
    table, first = owning(client, "first", model, hot_words={"cat": HotWord(1.0)})
    if said is not None:
        answer(table, first, client, "remote_lm_hot_words", words=said.encode())
    answer(table, first, client, "remote_lm_input", logits=encode_logits(say(["the"])))
    _, second = owning(client, "second", model, hot_words={"bat": HotWord(2.0)})
    assert second.session.hot_words == expected


def test_the_entries_of_a_sentence_are_deleted_when_it_is_answered(model, client):
    table, owned = owning(client, "me", model)
    for stream, fields in (
        ("remote_lm_reset", {"done": b"0"}),
        ("remote_lm_input", {"logits": encode_logits(say(["a"]))}),
        ("remote_lm_input", {"logits": b"refused"}),
        ("remote_lm_update_params", {"nbest": b"3"}),
    ):
        answer(table, owned, client, stream, **fields)
    lengths = {name: client.xlen(name) for name in owned.inputs}
    assert lengths["remote_lm_reset"] == lengths["remote_lm_update_params"] == 0
    assert lengths["remote_lm_input"] == 2
    answer(table, owned, client, "remote_lm_finalize", done=b"0")
    assert sum(client.xlen(name) for name in owned.inputs) == 0


def test_what_cannot_be_restored_is_left_at_this_servers_settings(model, client, caplog):
    client.hset("remote_lm_state", "session", '{"settings": {"from the future": 1}}')
    _, found = owning(client, "me", model, Settings(nbest=9))
    assert found.session.settings.nbest == 9
    assert "cannot be used here" in caplog.text


def test_a_client_in_the_state_that_is_no_name_holds_no_session(model, client, caplog):
    client.hset("remote_lm_state", "session", '{"settings": {}, "client": {"a": 1}}')
    _, found = owning(client, "me", model)
    assert found.session.client == ""
    assert "needed its name" in caplog.text


def test_a_backlog_beyond_the_limit_is_dropped_and_its_client_gets_an_error(model, client):
    table, owned = owning(client, "me", model, limits=Limits(backlog=5))
    ids = [client.xadd("remote_lm_input", {"logits": encode_logits(say(["a"]))}) for _ in range(6)]
    owned.take({"remote_lm_input": [Entry("remote_lm_input", (1, 0))]})
    table.look_after()
    assert not client.xlen("remote_lm_input")
    assert not owned.ready
    assert "{}-{}".format(*owned.positions["remote_lm_input"]) == ids[-1].decode()
    ((_, error),) = client.xrange("remote_lm_error")
    assert b"6 entries waited; at most 5 may" in error[b"error"]


def test_a_long_search_does_not_delay_another_session(model, client):
    server = Server(client, lambda name: Session(model, Settings(), name))
    client.xadd(REGISTRY.requests, {"action": "open", "session": "quick"})
    server._round(stopping=False)
    (greedy, quick) = server.sessions
    client.xadd("remote_lm_input", {"logits": encode_logits(np.zeros((10_000, 41)))})
    server._round(stopping=False)
    client.xadd("remote_lm_input:quick", {"logits": encode_logits(say(["a", "cat"]))})
    time.sleep(0.002)
    client.xadd("remote_lm_finalize:quick", {"done": 0})
    for _ in range(2):
        server._round(stopping=False)
    assert client.xlen("remote_lm_output_final:quick") == 1
    assert greedy.busy
    assert not quick.busy


def test_a_session_that_cannot_be_made_is_left_to_others_and_the_rest_is_served(
    model, client, caplog
):
    def make(name):
        if name == "greedy":
            raise UserError("all clients together have too many hot words")
        return Session(model, Settings(), name)

    description = '{"idle_seconds": 60, "session": {"settings": {}}}'
    for name in ("greedy", "modest"):
        client.hset(REGISTRY.sessions, name, description)
    server = Server(client, make)
    assert server.sessions.names == ["", "modest"]
    assert "session 'greedy' cannot be taken over: all clients" in caplog.text
    assert not client.exists(owner_key("greedy"))
    stop = threading.Event()
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    try:
        client.xadd("remote_lm_input", {"logits": encode_logits(say(["the", "cat"]))})
        client.xadd("remote_lm_finalize", {"done": 0})
        answers = client.xread({"remote_lm_output_final": "0"}, block=10_000)
        assert answers[0][1][0][1][b"lm_response_final"] == b"the cat"
    finally:
        stop.set()
        thread.join(timeout=120)


def test_a_default_session_that_cannot_be_made_ends_the_start(client):
    def make(name):
        raise UserError("the hot words are wrong")

    with pytest.raises(UserError, match="the hot words are wrong"):
        Server(client, make)
    assert not client.exists(owner_key(""))


def test_another_server_searches_the_entries_of_the_sentences_own_client(model, client):
    table, first = owning(client, "first", model)
    logits = say(["the", "cat"])
    for name in (b"ann", b"bob", b"ann"):
        fields = {"logits": encode_logits(logits), "client": name}
        answer(table, first, client, "remote_lm_input", **fields)
    answer(table, first, client, "remote_lm_finalize", done=b"0", client=b"bob")
    _, second = owning(client, "second", model)
    assert second.session.frames == 2 * len(logits)
    assert second.session.client == "ann"
    # Its name is still taken.
    entry = Entry("remote_lm_reset", (10**15, 0), {"client": b"bob"})
    assert handle(second.session, entry).messages()[0].stream == "remote_lm_error"


GONE = b"the beginning of this sentence is lost"


def finals(client, session=""):
    suffix = f":{session}" if session else ""
    found = client.xrange(f"remote_lm_output_final{suffix}")
    return [fields[b"lm_response_final"].decode() for _, fields in found]


def errors(client, session=""):
    suffix = f":{session}" if session else ""
    return [fields[b"error"] for _, fields in client.xrange(f"remote_lm_error{suffix}")]


def rounds(server, count=3):
    for _ in range(count):
        server._round(stopping=False)


def serve(client, model, name="me", **limits):
    """A server in this process. `rounds` runs it."""
    chosen = Limits(**{"sessions": 8, **limits})
    return Server(client, lambda id_: Session(model, Settings(), id_), chosen, name=name)


def spoken(client, words, stream="input", session=""):
    suffix = f":{session}" if session else ""
    fields = {"logits": encode_logits(say(words))} if stream == "input" else {"done": 0}
    client.xadd(f"remote_lm_{stream}{suffix}", fields)
    time.sleep(0.002)


@pytest.mark.parametrize("session", ["", "ann"])
def test_the_rest_of_a_sentence_whose_state_expired_is_an_error_and_no_answer(
    model, client, session
):
    first = serve(client, model, "first")
    if session:
        client.xadd(REGISTRY.requests, {"action": "open", "session": session})
        rounds(first)
    spoken(client, ["the", "dog", "and"], session=session)
    rounds(first)
    # As after 60 s without a server.
    client.delete(owner_key(session), f"remote_lm_state{session and ':'}{session}")
    second = serve(client, model, "second")
    spoken(client, ["had", "a"], session=session)
    spoken(client, [], "finalize", session=session)
    rounds(second, 6)
    assert finals(client, session) == []
    found = errors(client, session)
    assert b"no server was there for it, or none for more than 60 s" in found[0]
    assert all(GONE in one for one in found[1:])
    assert len(found) >= 3
    # The next sentence is whole, with a reset before it or not.
    spoken(client, ["the", "cat"], session=session)
    spoken(client, [], "finalize", session=session)
    rounds(second, 4)
    assert finals(client, session) == ["the cat"]


def test_a_server_that_starts_between_sentences_says_nothing(model, client):
    first = serve(client, model, "first")
    spoken(client, ["the", "cat"])
    spoken(client, [], "finalize")
    rounds(first)
    client.delete("remote_lm_owner", "remote_lm_state")
    second = serve(client, model, "second")
    spoken(client, ["a", "dog"])
    spoken(client, [], "finalize")
    rounds(second)
    assert finals(client) == ["the cat", "a dog"]
    assert errors(client) == []


def test_a_lost_sentence_stays_lost_at_the_next_server(model, client):
    owning(client, "first", model)
    spoken(client, ["the", "cat"])
    client.delete("remote_lm_state")
    table, second = owning(client, "second", model)
    answer(table, second, client, "remote_lm_input", logits=encode_logits(say(["sat"])))
    assert GONE in errors(client)[-1]
    _, third = owning(client, "third", model)
    end = Entry("remote_lm_finalize", (1, 0))
    (refused,) = handle(third.session, end).messages()
    assert GONE in refused.fields["error"]


def test_what_waits_behind_a_backlog_is_no_sentence_of_its_own(model, client):
    server = serve(client, model, backlog=2)
    for _ in range(3):
        spoken(client, ["the", "cat"])
    spoken(client, [], "finalize")
    server.sessions.look_after()
    spoken(client, ["sat"])
    spoken(client, [], "finalize")
    rounds(server)
    assert finals(client) == []
    assert b"3 entries waited; at most 2 may" in errors(client)[0]
    assert [GONE in one for one in errors(client)[1:]] == [True, True]


OPENED = '{"idle_seconds": 60, "session": {"settings": {}}}'
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "value",
    [
        *("no JSON", "{}", "[]", "7", '{"idle_seconds": "x", "session": {}}', DEEP, b"\xff"),
        *('{"idle_seconds": 1e999, "session": {}}', '{"idle_seconds": 60, "session": 7}'),
        '{"idle_seconds": 60, "session": {"settings": {"beam": "wide"}}}',
        '{"idle_seconds": 60, "session": {"settings": {}, "hot_words": {"\\ud800": 1}}}',
        '{"idle_seconds": 60, "session": {"settings": [1]}}',
        '{"idle_seconds": 1' + 400 * "0" + ', "session": {"settings": {}}}',
    ],
)
def test_a_bad_value_in_the_hash_of_open_sessions_costs_its_settings_and_no_more(
    model, client, value
):
    client.hset(REGISTRY.sessions, "ann", value)
    server = serve(client, model)
    assert server.sessions.names == ["", "ann"]
    (warning,) = errors(client, "ann")
    assert b"send them again" in warning
    if value != DEEP:
        assert json.loads(client.hget(REGISTRY.sessions, "ann"))["idle_seconds"] in (60, 600)
    spoken(client, ["the", "cat"], session="ann")
    spoken(client, [], "finalize", session="ann")
    rounds(server)
    assert finals(client, "ann") == ["the cat"]


@pytest.mark.parametrize("name", ["../../etc", "", "a b", b"\xff", "x" * 65])
@pytest.mark.parametrize("running", [False, True], ids=["at the start", "while it runs"])
def test_a_bad_name_in_the_hash_of_open_sessions_is_moved_away(model, client, name, running):
    server = serve(client, model) if running else None
    client.hset(REGISTRY.sessions, name, OPENED)
    if server is None:
        server = serve(client, model)
    server.sessions._looked = 0.0
    client.set("remote_lm_input", "makes it set keys aside")
    with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
        rounds(server)
    assert server._set_aside()
    rounds(server)
    assert not client.hexists(REGISTRY.sessions, name)
    place = f"remote_lm_set_aside:fields:{REGISTRY.sessions}"
    assert client.hget(place, name) == OPENED.encode()


@pytest.mark.parametrize(
    "state",
    [
        {"sentence": "no JSON"},
        {"sentence": "[]"},
        {"sentence": DEEP},
        {"sentence": '{"first": 7, "frames": 3}'},
        {"sentence": '{"first": "x-y", "frames": 3}'},
        {"sentence": '{"frames": "many"}'},
        {"remote_lm_input": "abc"},
        {"remote_lm_input": "99999999999999999999-1"},
        {"remote_lm_reset": b"\xff"},
    ],
)
def test_a_state_that_no_server_wrote_is_reported_and_deleted(model, client, state):
    client.hset("remote_lm_state", mapping=state)
    server = serve(client, model)
    assert not client.exists("remote_lm_state")
    (error,) = errors(client)
    assert b"the key remote_lm_state held what no server wrote" in error
    spoken(client, ["the", "cat"])
    spoken(client, [], "reset")
    spoken(client, ["the", "dog"])
    spoken(client, [], "finalize")
    rounds(server, 4)
    assert finals(client) == ["the dog"]
    assert GONE in errors(client)[1]


def test_a_foreign_owner_key_is_not_obeyed_for_ever(model, client):
    client.set("remote_lm_owner", "nobody")
    client.set(owner_key("ann"), "nobody", ex=10**6)
    client.lpush(owner_key("bob"), "nobody")
    for name in ("ann", "bob"):
        client.hset(REGISTRY.sessions, name, OPENED)
    serve(client, model)
    for name in ("", "ann", "bob"):
        assert 0 < client.pttl(owner_key(name)) <= 4000


def test_a_server_leaves_the_lease_of_a_living_one_alone(model, client):
    client.set("remote_lm_owner", "another", px=29_000)
    serve(client, model)
    assert client.pttl("remote_lm_owner") > 20_000


def test_a_key_of_the_wrong_type_costs_no_other_session_its_lease(model, client):
    table, _ = owning(client, "me", model)
    table.add(Session(model, Settings(), "ann"), 60)
    client.delete("remote_lm_owner", owner_key("ann"))
    client.lpush("remote_lm_owner", "x")
    table.renew()
    assert client.get(owner_key("ann")) == b"me"
    assert client.type("remote_lm_owner") == b"none"


@pytest.mark.parametrize("last", ["a string", "the last id"])
def test_what_is_wrong_with_one_stream_stops_nobody(model, client, last):
    server = serve(client, model)
    for stream in ("remote_lm_output_partial", server._wake):
        if last == "a string":
            client.set(stream, "x")
        else:
            client.xadd(stream, {"x": 1}, id=f"{2**64 - 1}-{2**64 - 1}")
    stop = threading.Event()
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    try:
        spoken(client, ["the", "cat"])
        spoken(client, [], "finalize")
        assert client.xread({"remote_lm_output_final": "0"}, block=10_000)
    finally:
        stop.set()
        thread.join(timeout=120)
    assert finals(client) == ["the cat"]
    # Answered once, though the first attempt failed.
    assert client.xlen("remote_lm_output_partial") == 1
    assert client.exists("remote_lm_set_aside:remote_lm_output_partial")


def test_the_status_skips_and_names_what_no_server_wrote(client, url, capsys):
    client.set("remote_lm_process:string", "x")
    client.hset("remote_lm_process:[/red]", "kind", "server")
    client.hset(REGISTRY.sessions, "../etc", "x")
    client.lpush("remote_lm_owner", "x")
    assert main(["status", "--redis", url]) == 1
    shown = capsys.readouterr().out
    for key in ("process:string", "process:[/red]", "open_sessions: '../etc'", "owner"):
        assert f"not written by lm-server: remote_lm_{key}" in shown


class Killed(BaseException):
    """The end of a server's process: nothing is released, sent or caught."""


class Deadly:
    """A search that ends its process at sentences of more than `most` frames."""

    most = 15

    def __init__(self, search):
        self._search = search

    def __getattr__(self, name):
        return getattr(self._search, name)

    def step(self, logits):
        if self._search.frames + len(logits) > self.most:
            raise Killed
        return self._search.step(logits)


class DeadlyModel:
    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def search(self, settings, hot_words):
        return Deadly(self._model.search(settings, hot_words))


def serve_until(client, model, done, seconds=10.0):
    """Servers one after another, each adopting what the last one left. Returns their number."""
    deadline, count = time.monotonic() + seconds, 0
    while True:
        for key in client.keys("remote_lm_owner*"):
            client.delete(key)  # as if the lease had run out
        count += 1
        server = Server(client, lambda name: Session(DeadlyModel(model), Settings(), name))
        try:
            while not done():
                assert time.monotonic() < deadline
                server._round(stopping=False)
        except Killed:
            continue
        return count


def refusals(client, session):
    return [fields for _, fields in client.xrange(f"remote_lm_error:{session}")]


def open_two(client):
    for name in ("deadly", "good"):
        client.hset(REGISTRY.sessions, name, '{"idle_seconds": 60, "session": {"settings": {}}}')


def say_parts(client, session, count):
    part = encode_logits(say(["the"])[:5])
    return [client.xadd(f"remote_lm_input:{session}", {"logits": part}) for _ in range(count)]


def test_an_entry_that_ends_three_servers_is_set_aside_and_no_other_session_suffers(model, client):
    open_two(client)
    ids = say_parts(client, "deadly", 5)
    say_parts(client, "good", 3)
    client.xadd("remote_lm_finalize:good", {"done": "0"})
    good = "remote_lm_output_final:good"
    servers = serve_until(
        client, model, lambda: len(refusals(client, "deadly")) == 3 and client.xlen(good)
    )
    # Three take over from the first. The next drops the sentence (its 3 entries that went well),
    # the entry, and the rest.
    assert servers == 5
    first, second, rest = refusals(client, "deadly")
    assert b"3 servers that took this session over ended" in first[b"error"]
    assert b"3 servers that took this session over ended" in second[b"error"]
    assert (second[b"entry_id"], rest[b"entry_id"]) == (ids[3], ids[4])
    letters = [fields for _, fields in client.xrange(REGISTRY.dead)]
    assert [one[b"entry_id"] for one in letters] == [ids[2], ids[3]]
    assert not refusals(client, "good")
    assert client.xlen(good) == 1
    assert not client.keys("remote_lm_attempts*")


def test_servers_that_end_over_another_sentence_are_not_held_against_a_waiting_one(model, client):
    open_two(client)
    say_parts(client, "good", 2)
    serve_until(client, model, lambda: client.xlen("remote_lm_output_partial:good") == 2)
    # Its sentence waits for its next entry while three servers end.
    say_parts(client, "deadly", 4)
    serve_until(client, model, lambda: len(refusals(client, "deadly")) == 2)
    client.xadd("remote_lm_finalize:good", {"done": "0"})
    serve_until(client, model, lambda: client.xlen("remote_lm_output_final:good"))
    assert not refusals(client, "good")


def test_a_sentence_that_ends_servers_when_it_is_searched_again_is_dropped(
    model, client, monkeypatch
):
    open_two(client)
    say_parts(client, "deadly", 2)
    serve_until(client, model, lambda: client.xlen("remote_lm_output_partial:deadly") == 2)
    monkeypatch.setattr(Deadly, "most", 7)
    assert serve_until(client, model, lambda: len(refusals(client, "deadly")) == 1) == 4
    assert client.xlen(REGISTRY.dead) == 1
    # What the client sends now is a sentence of its own.
    client.xadd("remote_lm_reset:deadly", {"done": "0"})
    say_parts(client, "deadly", 1)
    serve_until(client, model, lambda: client.xlen("remote_lm_output_partial:deadly") == 3)
    assert len(refusals(client, "deadly")) == 1
