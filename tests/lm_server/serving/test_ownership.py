"""Owned sessions on a real Redis: replies are sent once, and orphans go on where they were."""

import threading
import time

import numpy as np
import pytest
import redis
from small_model import say

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


@pytest.fixture
def client():
    with (
        embedded_redis() as own,
        redis.Redis.from_url(own.url, protocol=2, socket_timeout=10) as connection,
    ):
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
    try:
        next(work)
    except StopIteration as end:
        return end.value
    raise AssertionError("a long search")


def hear(owned, client, stream, **fields):
    """As the server does, up to the sending."""
    id_ = client.xadd(stream, fields)
    ms, number = map(int, id_.decode().split("-"))
    entry = Entry(stream, (ms, number), fields)
    owned.handled(entry, handle(owned.session, entry), started=0.0)
    return owned.unsent[-1]


def answer(table, owned, client, stream, **fields):
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
        thread.join(timeout=20)


def test_a_default_session_that_cannot_be_made_ends_the_start(client):
    def make(name):
        raise UserError("the hot words are wrong")

    with pytest.raises(UserError, match="the hot words are wrong"):
        Server(client, make)
    assert not client.exists(owner_key(""))
