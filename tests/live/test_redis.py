"""A Redis stream of features as a source, and final sentences in another, on a real Redis."""

import threading

import numpy as np
import pytest
import redis
from live_speech import FINAL

from b2txt_jax.live.events import Chosen
from b2txt_jax.live.outputs.publish import Publisher
from b2txt_jax.live.outputs.speech import Speech, SpeechError
from b2txt_jax.live.sources.choice import open_source
from b2txt_jax.live.sources.interface import Begin, Bin, End, SourceError
from b2txt_jax.live.sources.redis_stream import RedisStream, split_url
from lm_server.serving.embedded_redis import embedded_redis


def test_bins_marks_and_numbers_arrive_from_now_on(live_server):
    client = redis.Redis.from_url(live_server, protocol=2)
    client.xadd("rig", {"features": np.zeros(4, "<f4").tobytes(), "i": 0})
    source = open_source(f"{live_server}/rig", 4)
    rows = np.arange(8, dtype="<f4").reshape(2, 4)
    client.xadd("rig", {"mark": "begin", "name": "block 3"})
    client.xadd("rig", {"features": rows.tobytes(), "i": 7})
    client.xadd("rig", {"features": rows[0, :3].tobytes(), "i": 9})
    client.xadd("rig", {"mark": "end"})
    begin, first, second, narrow, end = source.read(5.0)
    assert (begin, end) == (Begin("block 3"), End())
    assert (first.sequence, second.sequence, narrow.sequence) == (7, 8, 9)
    np.testing.assert_array_equal(second.features, rows[1])
    assert narrow.features.shape == (3,)
    assert source.read(0.01) == []
    source.close()


def test_a_mark_may_come_with_bins_and_other_marks_are_no_bins(live_server):
    client = redis.Redis.from_url(live_server, protocol=2)
    source = open_source(f"{live_server}/marked", 4)
    row = np.arange(4, dtype="<f4").tobytes()
    client.xadd("marked", {"mark": "begin", "features": row, "i": 0})
    client.xadd("marked", {"mark": "go cue"})
    client.xadd("marked", {"mark": "go cue", "features": row, "i": 1})
    client.xadd("marked", {"mark": "end", "features": row, "i": 2})
    begin, *bins, end = source.read(5.0)
    assert (begin, end) == (Begin(""), End())
    assert [one.sequence for one in bins] == [0, 1, 2]
    source.close()


@pytest.mark.parametrize("noticed", ["the connection was lost", "nothing came"])
def test_after_the_stream_began_anew_bins_arrive_again(live_server, noticed):
    """As after a restart of Redis, or when its clock went back."""
    client = redis.Redis.from_url(live_server, protocol=2)
    client.delete("rig2")
    client.xadd("rig2", {"mark": "end"}, id="9999999999999-0")
    source = RedisStream(f"{live_server}/rig2", 4)
    client.delete("rig2")
    if noticed == "nothing came":
        assert source.read(0.01) == []
    else:
        source._backoff.failed()
    client.xadd("rig2", {"features": np.ones(4, "<f4").tobytes(), "i": 0})
    (one,) = source.read(5.0)
    assert isinstance(one, Bin)
    source.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://127.0.0.1:6379/0", "names no stream"),
        ("redis://secret@host:6379", "names no stream"),
        ("lab://x/y", "needed a URL that begins with"),
        ("nonsense", "needed a URL that begins with"),
    ],
)
def test_a_source_that_cannot_be_is_refused_without_showing_a_password(url, said):
    with pytest.raises(SourceError, match=said) as error:
        open_source(url, 4)
    assert "secret" not in str(error.value)


def test_a_key_that_is_no_stream_is_an_error_that_names_it(live_server):
    client = redis.Redis.from_url(live_server, protocol=2)
    client.set("plain", "text")
    with pytest.raises(SourceError, match=r"does not let us read 'plain' \(WRONGTYPE"):
        RedisStream(f"{live_server}/plain", 4)
    source = RedisStream(f"{live_server}/becomes", 4)
    client.set("becomes", "text")
    with pytest.raises(SourceError, match="does not let us read 'becomes'"):
        source.read(0.01)
    source.close()


def test_the_stream_is_the_last_part_of_the_url():
    assert split_url("redis://h:1/0/a.b", "--source") == ("redis://h:1/0", "a.b")
    assert split_url("unix:///run/r.sock/rig?db=2", "--source") == (
        "unix:///run/r.sock?db=2",
        "rig",
    )


def test_a_final_sentence_is_an_entry_of_the_stream(live_server):
    publisher = Publisher(f"{live_server}/said")
    publisher.show(FINAL)
    publisher.close()
    ((_, entry),) = redis.Redis.from_url(live_server, protocol=2).xrange("said")
    assert entry[b"text"] == b"the cat"
    assert entry[b"id"] == b"s-1"
    assert entry[b"words"] == b'[["the", 0.6], ["cat", 1.0]]'


def test_what_cannot_be_published_is_named_and_sent_with_the_next(live_server):
    client = redis.Redis.from_url(live_server, protocol=2)
    client.set("said2", "no stream")
    publisher = Publisher(f"{live_server}/said2")
    with pytest.raises(ConnectionError, match=r"WRONGTYPE.*to be sent: 1"):
        publisher.show(FINAL)
    client.delete("said2")
    publisher.show(Chosen("s-1", "a cat", True))
    assert [entry[b"text"] for _, entry in client.xrange("said2")] == [b"the cat", b"a cat"]
    publisher.close()
    with embedded_redis() as own:
        publisher = Publisher(f"{own.url}/said")
    with pytest.raises(ConnectionError, match="to be sent: 1"):
        publisher.show(FINAL)


def test_sentences_are_read_aloud_by_a_program_one_after_the_other(tmp_path, monkeypatch):
    program = tmp_path / "speak"
    program.write_text(f"#!/bin/sh\ncat >> {tmp_path}/spoken\n")
    program.chmod(0o755)
    speech = Speech(str(program))
    threads = threading.active_count()
    speech.show(FINAL)
    speech.show(FINAL)
    assert threading.active_count() == threads
    speech.close()
    assert (tmp_path / "spoken").read_text() == "the cat\nthe cat\n"
    program.write_text("#!/bin/sh\nexit 3\n")
    speech = Speech(str(program))
    speech.show(FINAL)
    speech.close()
    with pytest.raises(SpeechError, match="speak ended with 3"):
        speech.show(FINAL)
    with pytest.raises(SpeechError, match=r"no program 'nowhere'.*install espeak-ng"):
        Speech("nowhere")
