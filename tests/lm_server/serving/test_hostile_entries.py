"""Entries that fail late, take long or are huge cost their own client, and nobody else."""

import json
import logging
import time

import numpy as np
import pytest
import redis
from small_model import say

from lm_server.client.connection import text
from lm_server.errors import MAX_ERROR, shortened
from lm_server.protocol import MAX_CONTEXT, REGISTRY, ProtocolError, encode_logits
from lm_server.search.flashlight import LanguageModel
from lm_server.serving import logs, ownership, session
from lm_server.serving.embedded_redis import embedded_redis
from lm_server.serving.ownership import Limits
from lm_server.serving.parameters import changed_settings
from lm_server.serving.server import Server
from lm_server.serving.session import Entry, Session
from lm_server.settings import Settings

SURROGATE = json.dumps({"\ud800": {"weight": 50, "pronunciations": [["K"]]}})
WIDE = Settings(max_active=5000, beam=1000.0, max_classes=41)


@pytest.fixture(scope="module")
def model(model_folder):
    return LanguageModel(model_folder)


@pytest.fixture(scope="module")
def server_redis():
    with embedded_redis() as own, redis.Redis.from_url(own.url, protocol=2) as connection:
        yield connection


@pytest.fixture
def client(server_redis):
    server_redis.flushall()
    return server_redis


def serving(client, model, settings=None, limits=None, **options):
    return Server(
        client, lambda name: Session(model, settings or Settings(), name, **options), limits
    )


def rounds(server, done, seconds=30):
    """Rounds of the server's loop until something is there."""
    count, deadline = 0, time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not done after {count} rounds"
        server._round(stopping=False)
        count += 1
    return count


def last(client, stream):
    return {text(name): value for name, value in client.xrevrange(stream, count=1)[0][1].items()}


def open_session(client, server, name):
    client.xadd(REGISTRY.requests, {"action": "open", "session": name})
    rounds(server, lambda: name in server.sessions)
    return next(one for one in server.sessions if one.session.name == name)


def noise(frames):
    return np.random.default_rng(0).normal(0, 1, (frames, 41)).astype(np.float32)


def test_a_word_that_cannot_be_sent_is_refused_when_it_comes(model, client):
    server = serving(client, model)
    client.xadd("remote_lm_hot_words", {"words": SURROGATE})
    client.xadd(REGISTRY.requests, {"action": "open", "session": "a", "hot_words": SURROGATE})
    rounds(server, lambda: client.xlen("remote_lm_error") and client.xlen(REGISTRY.answers))
    assert rb"the hot word '\ud800' is no single word" in last(client, "remote_lm_error")["error"]
    assert b"no single word" in last(client, REGISTRY.answers)["error"]
    client.xadd("remote_lm_input", {"logits": encode_logits(say(["the", "cat"]))})
    rounds(server, lambda: client.xlen("remote_lm_output_partial"))
    assert last(client, "remote_lm_output_partial")["lm_response_partial"] == b"the cat"


def test_an_answer_that_cannot_be_composed_is_an_error_and_a_dead_letter(model_folder, client):
    broken = LanguageModel(model_folder)
    server = serving(client, broken)
    logits = encode_logits(say(["the", "cat"]))
    for number, (stream, fields) in enumerate(
        [("finalize", {"done": 0, "request_id": "7"}), ("input", {"logits": logits})], start=1
    ):
        broken.words = [word.strip("\ud800") for word in broken.words]
        client.xadd("remote_lm_input", {"logits": logits})
        rounds(server, lambda: client.xlen("remote_lm_output_partial") == number)  # noqa: B023
        broken.words = [f"{word}\ud800" for word in broken.words]
        client.xadd(f"remote_lm_{stream}", fields)
        rounds(server, lambda: client.xlen("remote_lm_error") == number)  # noqa: B023
        assert b"UnicodeEncodeError" in last(client, "remote_lm_error")["error"]
        letter = last(client, REGISTRY.dead)
        assert letter["stream"].decode() == f"remote_lm_{stream}"
        assert b"UnicodeEncodeError" in letter["reason"]
    assert client.xrange("remote_lm_error")[0][1][b"request_id"] == b"7"
    assert letter["field:logits"] == logits


def test_a_request_that_breaks_the_server_is_answered_and_set_aside(model, client):
    def make(name):
        if name:
            raise ZeroDivisionError("a fault of ours")
        return Session(model, Settings(), name)

    server = Server(client, make)
    client.xadd(REGISTRY.requests, {"action": "open", "session": "a", "request_id": "8"})
    rounds(server, lambda: client.xlen(REGISTRY.answers))
    answer = last(client, REGISTRY.answers)
    assert answer["request_id"] == b"8"
    assert b"ZeroDivisionError" in answer["error"]
    assert b"a fault of ours" in last(client, REGISTRY.dead)["reason"]
    server._round(stopping=False)
    assert client.xlen(REGISTRY.answers) == 1


def test_an_expensive_session_has_no_more_time_than_another(model, client):
    server = serving(client, model)
    greedy, quick = (open_session(client, server, name) for name in ("greedy", "quick"))
    wide = {"max_active": 5000, "beam": 1000, "max_classes": 41}
    client.xadd("remote_lm_update_params:greedy", wide)
    time.sleep(0.002)
    client.xadd("remote_lm_input:greedy", {"logits": encode_logits(noise(900))})
    rounds(server, lambda: greedy.work is not None and greedy.session.frames > 60)
    for frame in np.repeat(say(["the", "cat"]), 4, axis=0):
        client.xadd("remote_lm_input:quick", {"logits": encode_logits(frame[None])})
    sent = client.xlen("remote_lm_input:quick")
    before, frames = greedy.used, greedy.session.frames
    slices = rounds(server, lambda: client.xlen("remote_lm_output_partial:quick") == sent)
    # In turns of an entry and a slice of 100 frames it would be all of the frames.
    assert greedy.session.frames < frames + 100
    assert greedy.used - before < max(0.5, 3 * (quick.used - before))
    assert slices < sent


def test_a_wide_search_has_short_slices(model):
    wide = Session(model, WIDE)
    work = wide.handle(Entry("remote_lm_input", fields={"logits": encode_logits(noise(7))}))
    assert [wide.frames for _ in work] == [2, 4, 6]


def test_a_sentence_for_which_a_wide_search_lacks_memory_is_refused(model):
    wide = Session(model, Settings(max_active=10_000))
    with pytest.raises(ProtocolError, match="with max_active 10000 at most 500 are possible"):
        next(wide.search_frames(noise(501)))


def test_an_entry_beyond_its_deadline_ends_its_sentence(model, client):
    server = serving(client, model, WIDE, Limits(entry_seconds=0.05))
    client.xadd("remote_lm_input", {"logits": encode_logits(noise(900))})
    rounds(server, lambda: client.xlen("remote_lm_error"))
    error = last(client, "remote_lm_error")["error"]
    assert b"took more than 0.05 s of computing: the sentence is dropped" in error
    (owned,) = server.sessions
    assert owned.session.frames == 0
    assert not owned.ready


def test_the_end_of_a_sentence_yields_before_it_is_composed(model):
    """200 s of sentences that differ at their beginning, their end and in between."""
    rng = np.random.default_rng(0)
    logits = np.concatenate([say(["to", "ate", "bat", "cat"], strength=3.0)] * 60)[:2500]
    one = Session(model, Settings())
    for _ in one.search_frames(logits + rng.normal(0, 1, logits.shape).astype(np.float32)):
        pass
    assert sum(1 for _ in one.handle(Entry("remote_lm_finalize"))) > 3


def test_guessing_the_pronunciations_of_many_hot_words_yields_between_them(model):
    words = json.dumps({f"zu{chr(97 + n)}word": 1.0 for n in range(9)}).encode()
    work = Session(model, Settings()).handle(Entry("remote_lm_hot_words", fields={"words": words}))
    assert sum(1 for _ in work) == 8


def test_a_value_above_its_ceiling_is_refused_and_one_at_it_is_not():
    ceilings = {"max_active": 1000.0}
    assert changed_settings(Settings(), {"max_active": b"1000"}, ceilings).max_active == 1000
    with pytest.raises(ProtocolError, match="max_active is 1001; this server allows at most 1000"):
        changed_settings(Settings(), {"max_active": b"1001"}, ceilings)


def test_a_session_may_not_be_opened_above_a_ceiling(model, client):
    server = serving(client, model, ceilings={"max_active": 200.0})
    client.xadd(REGISTRY.requests, {"action": "open", "session": "a", "max_active": 300})
    client.xadd("remote_lm_update_params", {"max_active": 300})
    rounds(server, lambda: client.xlen(REGISTRY.answers) and client.xlen("remote_lm_error"))
    assert b"allows at most 200" in last(client, REGISTRY.answers)["error"]
    assert b"allows at most 200" in last(client, "remote_lm_error")["error"]


@pytest.mark.parametrize(
    ("stream", "fields"),
    [
        ("remote_lm_input", {b"n" * 3_000_000: b"1"}),
        ("remote_lm_hot_words", {b"n" * 3_000_000: b"1"}),
        ("remote_lm_hot_words", {"words": b'{"a": "' + b"w" * 900_000 + b'"}'}),
        ("remote_lm_hot_words", {"words": b'{"' + b"w" * 900_000 + b'": 1}'}),
        ("remote_lm_hot_words", {"words": b"[" * 3_000_000}),
        ("remote_lm_update_params", {b"n" * 3_000_000: b"1"}),
        ("remote_lm_update_params", {"beam": b"w" * 3_000_000}),
        (REGISTRY.requests, {"action": b"w" * 3_000_000, "session": "a"}),
        (REGISTRY.requests, {"action": "open", "session": b"w" * 3_000_000}),
        (REGISTRY.requests, {"action": "open", "session": "a", "idle_seconds": b"w" * 3_000_000}),
    ],
)
def test_errors_and_logs_do_not_repeat_a_huge_entry(model, client, caplog, stream, fields):
    server = serving(client, model)
    client.xadd(stream, fields)
    answers = REGISTRY.answers if stream == REGISTRY.requests else "remote_lm_error"
    rounds(server, lambda: client.xlen(answers))
    error = last(client, answers)
    assert sum(map(len, error.values())) < MAX_ERROR + 600
    assert all(len(record.getMessage()) < MAX_ERROR + 600 for record in caplog.records)


def test_a_shortened_text_keeps_both_ends_and_can_be_sent():
    assert shortened("as it is") == "as it is"
    assert shortened("\ud800") == "\\ud800"
    found = shortened("found " + "é" * 5000 + " needed")
    assert found.startswith("found é")
    assert "(10013 bytes in all)" in found
    assert found.endswith("é needed")
    assert len(found.encode()) < MAX_ERROR


@pytest.mark.parametrize("form", logs.FORMATS)
def test_a_log_line_and_its_traceback_are_bounded(form, capsys):
    handler = logging.StreamHandler()
    root, before = logging.getLogger(), logging.getLogger().handlers
    root.handlers = [handler]
    try:
        logs.use(form)
        try:
            raise ValueError("x" * 1_000_000)
        except ValueError:
            logging.getLogger("t").exception("failed on %s", "y" * 1_000_000)
    finally:
        root.handlers = before
    written = capsys.readouterr().err
    assert "failed on yyy" in written
    assert "Traceback" in written
    assert len(written) < 10_000


def test_an_output_stream_is_bounded_in_bytes(model, client, monkeypatch):
    monkeypatch.setattr(ownership, "_OUTPUT_BYTES", 20_000)
    server = serving(client, model)
    (owned,) = server.sessions
    message = owned.session.refusal("x" * 1500, Entry("remote_lm_input"))
    for _ in range(50):
        server.sessions.send(owned, [message])
        assert client.xlen("remote_lm_error") * 1500 < 22_000
    assert client.xlen("remote_lm_error") * 1500 >= 9_000


def test_scoring_is_bounded_in_bytes_with_a_warning(model, client, monkeypatch):
    monkeypatch.setattr(session, "MAX_SCORING", 300)
    server = serving(client, model)
    client.xadd("remote_lm_input", {"logits": encode_logits(say(["to", "two", "ate", "cat"]))})
    time.sleep(0.002)
    client.xadd("remote_lm_finalize", {"done": 0})
    rounds(server, lambda: client.xlen("remote_lm_error"))
    final, warning = last(client, "remote_lm_output_final"), last(client, "remote_lm_error")
    assert 0 < len(final["scoring"]) <= 300
    assert final["scoring"].startswith(final["lm_response_final"] + b";")
    assert warning["severity"] == b"warning"
    assert b"scoring holds the " in warning["error"]


def test_of_a_long_context_the_last_bytes_are_used_with_a_warning(model, client):
    server = serving(client, model)
    client.set("contextual_decoding_current_context", "x" * 2 * MAX_CONTEXT + "the end")
    client.xadd("remote_lm_input", {"logits": encode_logits(say(["cat"]))})
    time.sleep(0.002)
    client.xadd("remote_lm_finalize", {"done": 0})
    rounds(server, lambda: client.xlen("remote_lm_output_final"))
    context = last(client, "remote_lm_output_final")["context_str"]
    assert len(context) == MAX_CONTEXT
    assert context.endswith(b"xthe end")
    assert last(client, "remote_lm_error")["severity"] == b"warning"
