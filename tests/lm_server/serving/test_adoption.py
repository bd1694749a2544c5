"""Sessions that cannot be taken over cost nobody else their server."""

import threading

import pytest
import redis
from small_model import say

from lm_server.errors import UserError
from lm_server.protocol import REGISTRY, encode_logits, owner_key
from lm_server.search.load import load_model
from lm_server.serving.embedded_redis import embedded_redis
from lm_server.serving.server import Server
from lm_server.serving.session import Session
from lm_server.settings import Settings


@pytest.fixture
def client():
    with (
        embedded_redis() as own,
        redis.Redis.from_url(own.url, protocol=2, socket_timeout=10) as found,
    ):
        yield found


def test_a_session_that_cannot_be_made_is_left_to_others_and_the_rest_is_served(
    model_folder, client, caplog
):
    model = load_model(model_folder)

    def make(name):
        if name == "greedy":
            raise UserError("all clients together have too many hot words")
        return Session(model, Settings(), name)

    description = '{"idle_seconds": 60, "session": {"settings": {}}}'
    for name in ("greedy", "modest"):
        client.hset(REGISTRY.sessions, name, description)
    server = Server(client, make)
    assert sorted(server.conversations) == ["", "modest"]
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
