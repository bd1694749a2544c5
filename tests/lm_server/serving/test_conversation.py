"""Answers go out once, on a real Redis, also when nobody knows whether they did."""

import time

import pytest
import redis
from small_model import say

from lm_server.protocol import encode_logits
from lm_server.search.hot_words import HotWord
from lm_server.search.load import load_model
from lm_server.serving.conversation import Conversation, Entry, Sender, resume
from lm_server.serving.embedded_redis import embedded_redis
from lm_server.serving.session import Session
from lm_server.settings import Settings


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder)


@pytest.fixture
def client():
    with embedded_redis() as own, redis.Redis.from_url(own.url, protocol=2) as connection:
        yield connection


def hear(conversation, client, stream, **fields):
    """As the server does, up to the sending."""
    id_ = client.xadd(stream, fields)
    ms, number = map(int, id_.decode().split("-"))
    entry = Entry(stream, (ms, number), fields)
    conversation.took(
        entry,
        conversation.session.handle(stream, entry.name, entry.fields),
        patience=9.0,
        started=0.0,
    )
    return conversation.unsent[-1]


def test_an_answer_sent_again_because_its_reply_was_lost_comes_once(model, client):
    conversation = Conversation(Session(model, Settings()), None, {})
    unsent = hear(conversation, client, "remote_lm_reset", done=b"0")
    for _ in range(3):
        Sender(client, "me").send(conversation, unsent.answers, unsent)
    assert client.xlen("remote_lm_done_resetting") == 1
    # A Redis that forgot everything has not answered either.
    client.flushall()
    Sender(client, "me").send(conversation, unsent.answers, unsent)
    assert client.xlen("remote_lm_done_resetting") == 1


def test_a_server_whose_session_another_has_taken_sends_nothing(model, client):
    conversation = Conversation(Session(model, Settings()), None, {})
    unsent = hear(conversation, client, "remote_lm_reset", done=b"0")
    client.set("remote_lm_owner", "another")
    Sender(client, "me").send(conversation, unsent.answers, unsent)
    assert conversation.lost
    assert not client.xlen("remote_lm_done_resetting")


@pytest.mark.parametrize("trimmed", [False, True], ids=["whole", "trimmed"])
def test_another_server_hears_the_sentence_again_or_knows_that_it_cannot(model, client, trimmed):
    first = Conversation(Session(model, Settings(beam=11.0)), None, {})
    sender = Sender(client, "first")
    unsent = hear(first, client, "remote_lm_update_params", nbest=b"7")
    sender.send(first, unsent.answers, unsent)
    logits = say(["the", "cat", "sat"])
    for start in range(0, len(logits), 10):
        payload = encode_logits(logits[start : start + 10])
        unsent = hear(first, client, "remote_lm_input", logits=payload)
        sender.send(first, unsent.answers, unsent)
        time.sleep(0.002)
    if trimmed:
        client.xtrim("remote_lm_input", maxlen=1, approximate=False)
    second = resume(client, Session(model, Settings(beam=12.0)), None)
    # What the client asked for goes on; what it did not is as this server was started.
    assert second.session.settings == Settings(nbest=7, beam=12.0)
    assert second.positions == first.positions
    assert second.whole is not trimmed
    if not trimmed:
        assert second.session.frames == len(logits)
        final, _ = second.session.handle("remote_lm_finalize", "1-0", {})
        expected, _ = first.session.handle("remote_lm_finalize", "1-0", {})
        assert final == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [(None, {"bat": HotWord(2.0)}), ('{"hat": 3}', {"hat": HotWord(3.0)}), ("{}", {})],
    ids=["the client said nothing", "the client's", "the client wants none"],
)
def test_hot_words_are_the_new_servers_unless_the_client_gave_some(model, client, said, expected):
    first = Conversation(Session(model, Settings(), hot_words={"cat": HotWord(1.0)}), None, {})
    sender = Sender(client, "first")
    entries = [("remote_lm_input", {"logits": encode_logits(say(["the"]))})]
    if said is not None:
        entries.insert(0, ("remote_lm_hot_words", {"words": said.encode()}))
    for stream, fields in entries:
        unsent = hear(first, client, stream, **fields)
        sender.send(first, unsent.answers, unsent)
    second = resume(client, Session(model, Settings(), hot_words={"bat": HotWord(2.0)}), None)
    assert second.session.hot_words == expected


def test_the_entries_of_a_sentence_are_deleted_when_it_is_answered(model, client):
    conversation = Conversation(Session(model, Settings()), None, {})
    sender = Sender(client, "me")
    for stream, fields in (
        ("remote_lm_reset", {"done": b"0"}),
        ("remote_lm_input", {"logits": encode_logits(say(["a"]))}),
        ("remote_lm_input", {"logits": b"refused"}),
        ("remote_lm_update_params", {"nbest": b"3"}),
    ):
        unsent = hear(conversation, client, stream, **fields)
        sender.send(conversation, unsent.answers, unsent)
    lengths = {name: client.xlen(name) for name in conversation.inputs}
    assert lengths["remote_lm_reset"] == lengths["remote_lm_update_params"] == 0
    assert lengths["remote_lm_input"] == 2
    unsent = hear(conversation, client, "remote_lm_finalize", done=b"0")
    sender.send(conversation, unsent.answers, unsent)
    assert sum(client.xlen(name) for name in conversation.inputs) == 0


def test_what_cannot_be_restored_is_left_at_this_servers_settings(model, client, caplog):
    client.hset("remote_lm_state", "session", '{"settings": {"from the future": 1}}')
    found = resume(client, Session(model, Settings(nbest=9)), None)
    assert found.session.settings.nbest == 9
    assert "cannot be used here" in caplog.text
