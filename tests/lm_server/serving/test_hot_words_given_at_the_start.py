"""Hot words of a file hold for everything that a server, a worker or `decode` decodes."""

import json

import numpy as np
import pytest
import redis
from processes import serving
from session_client import SessionClient
from small_model import say
from test_offline import run, write
from test_worker import worker

from lm_server.protocol import HotWordEntry, Job, results_stream
from lm_server.serving.embedded_redis import embedded_redis


@pytest.fixture
def file(tmp_path):
    """Without it, "the cat ate" is heard; "eight" sounds alike."""
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"eight": 20.0}))
    return path


def sentences(tmp_path):
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    return [json.loads(line)["sentence"] for line in lines]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_decode(model_folder, tmp_path, file, workers):
    write(tmp_path / "logits.npz", ["the cat ate", "a dog ran"])
    assert run(model_folder, tmp_path, "--workers", workers) == 0
    assert sentences(tmp_path) == ["the cat ate", "a dog ran"]
    assert run(model_folder, tmp_path, "--workers", workers, "--hot-words", str(file)) == 0
    assert sentences(tmp_path) == ["the cat eight", "a dog ran"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"),
        ("[1]", "words are a JSON list"),
        ('{"a b": 1}', "no single word"),
        ('{"cat": -1}', "weight -1"),
        ('{"cat": 1' + 400 * "0" + "}", "beyond all numbers"),
        (
            '{"cat": {"weight": 1, "pronunciation": [["K"]]}}',
            "has 'pronunciation', which is unknown",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_told_and_nothing_is_written(
    model_folder, tmp_path, capsys, content, told
):
    path = tmp_path / "names.json"
    if content is not None:
        path.write_text(content)
    write(tmp_path / "logits.npz", ["the cat"])
    assert run(model_folder, tmp_path, "--hot-words", str(path)) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_worker_has_its_own_and_a_job_may_have_others(model_folder, file):
    logits = np.asarray(say(["the", "cat", "ate"]))
    jobs = [
        Job("b", "the worker's", logits),
        Job("b", "none", logits, hot_words={}),
        Job("b", "its own", logits, hot_words={"hat": HotWordEntry(30.0, (("EY", "T"),))}),
        Job("b", "the worker's again", logits),
        Job("b", "wrong", logits, hot_words={"a b": HotWordEntry(1.0)}),
    ]
    with embedded_redis() as own, redis.Redis.from_url(own.url, protocol=2) as connection:
        for job in jobs:
            connection.hset("remote_lm_batch:b", job.name, "queued")
            connection.xadd("remote_lm_jobs", job.fields())
        with worker(model_folder, own.url, "--hot-words", file):
            found = {}
            position = "0"
            while len(found) < len(jobs):
                answer = connection.xread({results_stream("b"): position}, block=15_000)
                assert answer, f"only {sorted(found)} came"
                for id_, fields in answer[0][1]:
                    position, found[fields[b"job"].decode()] = id_, fields
    said = {name: fields.get(b"lm_response_final", b"").decode() for name, fields in found.items()}
    assert said["the worker's"] == said["the worker's again"] == "the cat eight"
    assert said["none"] == "the cat ate"
    assert said["its own"] == "the cat hat"
    assert b"no single word" in found["wrong"][b"error"]


def test_every_session_of_a_server_begins_with_them(model_folder, file):
    options = ("--lm", str(model_folder), "--embedded-redis", "--hot-words", str(file))
    with serving(*options) as server, server.client() as connection:
        ann = SessionClient(connection, "ann")
        bob = SessionClient(connection, "bob", hot_words="{}")
        assert ann.decode(["the", "cat", "ate"]) == ["the", "cat", "eight"]
        assert bob.decode(["the", "cat", "ate"]) == ["the", "cat", "ate"]
