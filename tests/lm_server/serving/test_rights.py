"""Rights on a real Redis: what is missing is named, and what is documented is enough."""

import re

import numpy as np
import pytest
import redis
from processes import ROOT, serving
from session_client import SessionClient, ask
from small_model import say
from test_worker import worker

from lm_server.__main__ import main
from lm_server.client import Client, JobClient
from lm_server.protocol import encode_logits, to_rnn_order
from lm_server.search.load import load_model
from lm_server.serving.embedded_redis import embedded_redis
from lm_server.serving.keys.rights import RightsError, check_rights, server_needs, worker_needs
from lm_server.serving.loop import run_rounds
from lm_server.serving.server import Server
from lm_server.serving.session import Session
from lm_server.settings import Settings

USERS = dict(re.findall(r"^ACL SETUSER (\S+) (.*)$", (ROOT / "docs/protocol.md").read_text(), re.M))


@pytest.fixture(scope="module")
def own():
    with embedded_redis() as running:
        yield running


@pytest.fixture
def login(own):
    """Makes a user with these rights and returns its URL."""
    with redis.Redis.from_url(own.url, protocol=2) as connection:
        connection.flushall()
        connection.acl_log_reset()

        def make(name, rights):
            rights = rights.replace(">PASSWORD", ">pw").split()
            connection.execute_command("ACL", "SETUSER", name, "reset", *rights)
            return own.url.replace("unix://", f"unix://{name}:pw@")

        yield make


def refused(url, needed):
    with redis.Redis.from_url(url, protocol=2) as client:
        try:
            check_rights(client, url, needed)
        except RightsError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("user", "needed"),
    [("lm-server", server_needs("me", True)), ("lm-worker", worker_needs("me"))],
)
def test_the_check_names_every_command_that_is_missing_and_changes_nothing(
    login, own, user, needed
):
    rights = USERS[user]
    assert refused(login(user, rights), needed) == ""
    unneeded = {"ping", "select", "client|setinfo", "eval"}  # At least by the redis-py of today.
    for command in set(re.findall(r"\+(\S+)", rights)) - unneeded:
        url = login("less", f"{rights} -{command}")
        assert command.replace("|", " ").upper() in refused(url, needed), command
    with redis.Redis.from_url(own.url, protocol=2) as connection:
        assert connection.keys() == []


@pytest.mark.parametrize(
    ("rights", "key"),
    [
        ("~remote_lm* +@all", "GETRANGE contextual_decoding_current_context"),
        ("~* +@all -@scripting", "EVALSHA"),
        ("~contextual* +@all", "HSET remote_lm_process:"),
        ("%R~remote_lm* ~contextual* +@all", "XADD remote_lm_wake:"),
    ],
)
def test_a_server_without_its_rights_ends_with_one_line(
    login, model_folder, capsys, monkeypatch, rights, key
):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    url = login("lm", f"on >PASSWORD {rights}")
    assert main(["serve", "--lm", str(model_folder), "--redis", url]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: Redis at unix://***@")
    assert key in shown.err
    assert shown.err.count("\n") == 1


def test_a_right_that_is_withdrawn_ends_the_loop_and_is_no_outage(login, own):
    def one_round():
        raise redis.exceptions.NoPermissionError("User lm has no permissions to run 'xread'")

    with pytest.raises(RightsError, match="give its user the rights"):
        run_rounds(one_round, lambda _: False, None, lambda: False)


def test_a_context_that_may_not_be_read_costs_an_error_and_not_the_answer_in_silence(
    login, own, model_folder
):
    url = login("lm", f"{USERS['lm-server']} resetkeys ~remote_lm_*")
    model = load_model(model_folder)
    with (
        redis.Redis.from_url(url, protocol=2) as side,
        redis.Redis.from_url(own.url, protocol=2) as connection,
    ):
        server = Server(side, lambda name: Session(model, Settings(), name))
        connection.xadd("remote_lm_input", {"logits": encode_logits(say(["the", "cat"]))})
        connection.xadd("remote_lm_finalize", {"done": 0})
        for _ in range(2):
            server._round(stopping=False)
        ((_, error),) = connection.xrange("remote_lm_error")
    assert b"the context cannot be read" in error[b"error"]


def test_the_documented_rights_are_enough_for_all_that_is_done(login, own, model_folder, capsys):
    urls = {name: login(name, rights) for name, rights in USERS.items()}
    logits = to_rnn_order(say(["the", "cat"]))
    with (
        redis.Redis.from_url(own.url, protocol=2) as connection,
        serving("--lm", str(model_folder), "--redis", urls["lm-server"], url=own.url),
        worker(model_folder, urls["lm-worker"]),
    ):
        connection.set("remote_lm_input", "a wrong type")
        for session in ("", "ann"):
            with Client(urls["lm-client"], session=session) as client:
                client.update_params(nbest=3)
                assert client.decode(np.asarray(logits)).sentence == "the cat"
        ask(connection, "open", "bob", idle_seconds=0.1)
        SessionClient(connection, "eve").add("hot_words", words="{}")
        with JobClient(urls["lm-client"]) as jobs:
            (result,) = jobs.decode_all([logits], ["trial"])
        assert result.error is None
        assert main(["status", "--redis", urls["lm-status"]]) == 0
    with redis.Redis.from_url(own.url, protocol=2) as connection:
        assert connection.acl_log() == []
