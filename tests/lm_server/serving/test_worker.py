"""Jobs on a real Redis, decoded by real processes that are killed, paused and restarted."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import redis
from processes import ROOT, children, free_port, start_redis, wait_until
from small_model import say

from lm_server.client.client import LanguageModelUnavailableError
from lm_server.client.jobs import JobClient
from lm_server.protocol import REGISTRY, Job, process_key, results_stream, to_lm_order, to_rnn_order
from lm_server.rescoring.ranking import ngram_answer
from lm_server.search.load import load_model
from lm_server.serving.embedded_redis import embedded_redis
from lm_server.serving.worker import Terms, Worker
from lm_server.settings import Settings

SENTENCES = [["the", "cat"], ["a", "dog", "ran"], ["the", "bat", "sat"], ["the", "dog"]]
DEADLY = np.zeros((7, 41), np.float32)
SLOW = say(["the"])
WILFUL = Path(__file__).parents[1] / "wilful_worker.py"


@contextlib.contextmanager
def process(*command):
    started = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    try:
        assert "ready" in started.stdout.readline()
        yield started
    finally:
        started.send_signal(signal.SIGCONT)
        started.terminate()
        try:
            started.wait(timeout=120)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        started.stdout.close()


def worker(model_folder, url, *options):
    return process(
        *("-m", "lm_server", "worker", "--lm", model_folder, "--redis", url),
        *("--lease-seconds", "1", "--workers", "1", *options),
    )


def wilful(model_folder, url, lease=1.0, processes=1, seconds=0.0, stuck=60.0):
    return process(WILFUL, model_folder, url, lease, processes, seconds, stuck)


@pytest.fixture
def url():
    with embedded_redis() as own:
        yield own.url


@pytest.fixture
def connection(url):
    with redis.Redis.from_url(url, protocol=2) as client:
        yield client


def trials(count):
    """Logits in the network's order and the words that they say."""
    said = [SENTENCES[i % len(SENTENCES)] for i in range(count)]
    return [to_rnn_order(say(words, frames=2 + i // 4)) for i, words in enumerate(said)], said


def in_background(function, *arguments, **options):
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments, **options)))
    thread.start()
    return thread, found


def held(connection):
    """Ids of jobs that a worker has."""
    try:
        return connection.xpending_range("remote_lm_jobs", "workers", "-", "+", 100)
    except redis.exceptions.ResponseError:
        return []


def test_workers_share_jobs_and_each_has_the_offline_decoders_answer_once(model_folder, url):
    logits, said = trials(40)
    seen = []
    with worker(model_folder, url, "--workers", "2"), JobClient(url) as client:
        found = client.decode_all(
            logits,
            [f"trial {i}" for i in range(40)],
            {"acoustic_scale": 0.9},
            lambda done, of: seen.append((done, of)),
        )
        assert client.duplicates == 0
    assert [one.answer.sentence.split() for one in found] == said
    assert seen == [(i + 1, 40) for i in range(40)]
    search = load_model(model_folder).search(Settings(acoustic_scale=0.9))
    for trial, one in zip(logits, found, strict=True):
        search.begin()
        search.step(to_lm_order(trial))
        expected = ngram_answer(search.finish(), search.settings).hypotheses
        assert {(c.sentence, c.acoustic, c.ngram, c.total) for c in one.answer.hypotheses} == {
            (c.sentence.strip(), c.acoustic, c.ngram, c.total) for c in expected
        }


def test_nothing_of_a_finished_batch_stays_in_redis(model_folder, url, connection):
    logits, _ = trials(3)
    with worker(model_folder, url), JobClient(url) as client:
        client.decode_all(logits, ["a", "b", "c"])
    assert connection.xlen("remote_lm_jobs") == 0
    assert not held(connection)
    assert not [key for key in connection.keys("*") if b"batch" in key]


def test_a_job_that_cannot_be_decoded_is_a_result_with_the_reason(model_folder, url, connection):
    job = Job("b", "bad", np.zeros((1, 41), np.float32)).fields()
    for name, change in (
        ("short", {"logits": bytes(10)}),
        ("settings", {"settings": b'{"beam": "wide"}'}),
        ("unknown", {"settings": b'{"beem": 1}'}),
        ("no object", {"settings": b"[1]"}),
        ("surrogate", {"hot_words": b'{"\\ud800": {"weight": 50, "pronunciations": [["K"]]}}'}),
        ("wide", {"settings": b'{"max_active": 500}'}),
        (b"latin \xe9", {"logits": bytes(10)}),
        ("huge", {"settings": b'{"' + b"n" * 900_000 + b'": 1}'}),
    ):
        connection.hset("remote_lm_batch:b", name, "queued")
        connection.xadd("remote_lm_jobs", {**job, "job": name, "request_id": "r7", **change})
    connection.xadd("remote_lm_jobs", {"job": "without a batch"})
    stream = results_stream("b")
    with worker(model_folder, url, "--preset", "fast", "--ceiling", "max_active=400"):
        assert wait_until(lambda: connection.xlen(stream) == 8)
        assert wait_until(lambda: connection.xlen("remote_lm_jobs") == 0)
    results = {fields[b"job"].decode("latin-1"): fields for _, fields in connection.xrange(stream)}
    assert b"10 bytes; needed a multiple of 164" in results["short"][b"error"]
    assert b"beam is" in results["settings"][b"error"]
    assert b"there is no parameter 'beem'" in results["unknown"][b"error"]
    assert b"no JSON object" in results["no object"][b"error"]
    assert results["short"][b"request_id"] == b"r7"
    assert rb"the hot word '\ud800' is no single word" in results["surrogate"][b"error"]
    assert b"max_active is 500; this server allows at most 400" in results["wide"][b"error"]
    assert b"10 bytes" in results["latin \xe9"][b"error"]
    assert len(results["huge"][b"error"]) < 2100
    # What names no result is kept for the operator.
    ((_, letter),) = connection.xrange(REGISTRY.dead)
    assert letter[b"field:job"] == b"without a batch"
    assert b"session id is ''" in letter[b"reason"]


def test_a_worker_killed_in_the_middle_of_a_sentence_loses_nothing(model_folder, url, connection):
    logits, said = trials(6)
    logits[0], said[0] = to_rnn_order(SLOW), None
    with JobClient(url) as client:
        with wilful(model_folder, url, seconds=60.0) as slow:
            thread, found = in_background(client.decode_all, logits, list("abcdef"))
            assert wait_until(lambda: len(held(connection)) == 1)
            (child,) = children(slow.pid)
            slow.send_signal(signal.SIGSTOP)  # It must not start another one.
            os.kill(child, signal.SIGKILL)
            with worker(model_folder, url):
                thread.join(timeout=120)
        assert not thread.is_alive()
        (decoded,) = found
        assert all(one.error is None for one in decoded)
        assert [one.answer.sentence.split() for one in decoded[1:]] == said[1:]
        assert client.duplicates == 0


def test_a_slow_but_living_worker_keeps_its_job(model_folder, url, connection):
    with wilful(model_folder, url, lease=1.0, seconds=4.0), JobClient(url) as client:
        thread, found = in_background(client.decode_all, [to_rnn_order(SLOW)], ["slow"])
        assert wait_until(lambda: len(held(connection)) == 1)
        owner = held(connection)[0]["consumer"]
        with worker(model_folder, url):
            while thread.is_alive():
                for one in held(connection):
                    assert one["consumer"] == owner
                    assert one["times_delivered"] == 1
                time.sleep(0.05)
        (decoded,) = found
        assert decoded[0].error is None
        assert decoded[0].seconds > 4.0


def test_a_long_search_is_no_stuck_worker(model_folder, url, connection):
    # Together the steps, and the end alone, take longer than a lease and the time between two
    # signs of life.
    job = Job("b", "long", np.concatenate([say(["the", "cat"])] * 40)[:209])
    connection.hset("remote_lm_batch:b", "long", "queued")
    connection.xadd("remote_lm_jobs", job.fields())
    with wilful(model_folder, url, lease=0.5, seconds=0.8, stuck=1.0, processes=2):
        assert wait_until(lambda: connection.xlen(results_stream("b")) == 1, seconds=60)
    ((_, result),) = connection.xrange(results_stream("b"))
    assert result[b"attempt"] == b"1"
    assert float(result[b"seconds"]) > 3 * 0.8


def test_a_paused_worker_that_wakes_after_its_job_was_given_away_adds_no_second_result(
    model_folder, url, connection
):
    batch = "paused"
    with wilful(model_folder, url, seconds=2.0) as slow:
        connection.hset(f"remote_lm_batch:{batch}", "slow", "queued")
        connection.xadd("remote_lm_jobs", Job(batch, "slow", SLOW).fields())
        assert wait_until(lambda: len(held(connection)) == 1)
        (child,) = children(slow.pid)
        os.kill(child, signal.SIGSTOP)
        with worker(model_folder, url):
            assert wait_until(lambda: connection.xlen(results_stream(batch)) == 1)
        ((_, result),) = connection.xrange(results_stream(batch))
        assert result[b"attempt"] == b"2"
        os.kill(child, signal.SIGCONT)
        name = f"worker-{os.uname().nodename}"
        key = next(k for k in connection.keys(process_key("worker-*")) if str(child).encode() in k)
        assert wait_until(lambda: connection.hget(key, "unwanted") == b"1"), name
    assert connection.xlen(results_stream(batch)) == 1


def test_jobs_that_kill_their_workers_are_set_aside_and_the_others_are_decoded(
    model_folder, url, connection
):
    logits, said = trials(10)
    for number in range(5):
        logits[number] = to_rnn_order(DEADLY)
    names = [f"trial {i}" for i in range(10)]
    # They end fifteen workers as soon as these start.
    with wilful(model_folder, url, lease=0.5, processes=2) as own, JobClient(url) as client:
        found = client.decode_all(logits, names)
        assert own.poll() is None
    letters = [fields for _, fields in connection.xrange(REGISTRY.dead)]
    assert sorted(one[b"field:job"].split(b" ", 1)[1] for one in letters) == [
        f"trial {number}".encode() for number in range(5)
    ]
    for one, letter in zip(found[:5], letters, strict=True):
        assert "3 workers had this job and ended, were lost or could not write" in one.error
        assert letter[b"reason"].startswith(b"3 workers had this job")
        assert len(letter[b"field:logits"]) == DEADLY.nbytes
    assert [one.answer.sentence.split() for one in found[5:]] == said[5:]


def test_jobs_of_a_client_that_left_are_dropped(model_folder, url, connection):
    with JobClient(url) as client:
        client._send(Job(client.batch, "0 x", say(["a"])).fields())
        stream = results_stream(client.batch)
    assert connection.xlen("remote_lm_jobs") == 1
    with worker(model_folder, url):
        assert wait_until(lambda: connection.xlen("remote_lm_jobs") == 0)
    assert not connection.exists(stream)


@pytest.mark.parametrize("lasting", [True, False], ids=["append-only file", "no persistence"])
def test_accepted_jobs_survive_a_restart_of_redis(model_folder, tmp_path, lasting):
    port = free_port()
    options = ("--appendonly", "yes", "--dir", str(tmp_path)) if lasting else ()
    server, connection = start_redis(port, *options)
    url = f"redis://127.0.0.1:{port}/0"
    logits, said = trials(30)
    logits[5], said[5] = to_rnn_order(SLOW), None
    try:
        with wilful(model_folder, url, seconds=1.5), JobClient(url) as client:
            thread, found = in_background(client.decode_all, logits, [str(i) for i in range(30)])
            assert wait_until(lambda: connection.xlen(results_stream(client.batch)) == 5)
            server.kill()
            server.wait()
            time.sleep(0.3)
            server, connection = start_redis(port, *options)
            thread.join(timeout=120)
            assert not thread.is_alive()
            (decoded,) = found
            assert [one.error for one in decoded] == [None] * 30
            del decoded[5], said[5]
            assert [one.answer.sentence.split() for one in decoded] == said
            assert client.duplicates == 0
    finally:
        server.kill()
        server.wait()


def test_without_a_worker_the_client_says_so(url):
    with (
        JobClient(url, timeout=0.5) as client,
        pytest.raises(LanguageModelUnavailableError, match="start `lm-server worker"),
    ):
        client.decode_all([np.zeros((3, 41), np.float32)], ["alone"])


def test_a_missing_worker_is_named_within_seconds_and_waited_for(url):
    said = []

    with (
        JobClient(url, timeout=3, notice=said.append) as client,
        pytest.raises(LanguageModelUnavailableError),
    ):
        client.decode_all([np.zeros((3, 41), np.float32)], ["alone"])
    (text,) = said  # before the time was over
    assert "start `lm-server worker --lm DIR" in text


def test_workers_that_end_or_died_leave_the_group(model_folder, url, connection):
    def names():
        return {one["name"] for one in connection.xinfo_consumers("remote_lm_jobs", "workers")}

    with worker(model_folder, url):
        assert wait_until(lambda: connection.exists("remote_lm_jobs") and len(names()) == 1)
        for name in ("dead", "holds"):
            connection.xgroup_createconsumer("remote_lm_jobs", "workers", name)
        (living,) = names() - {b"dead", b"holds"}
        assert wait_until(lambda: names() == {living})
    assert names() == set()


def test_results_that_no_worker_wrote_are_counted_and_cost_no_trial(url, connection):
    with JobClient(url, timeout=5) as client:
        good = {"job": "0 alone", "error": "a worker's", "seconds": "soon"}
        for fields in ({"x": 1}, {"job": "x"}, {"job": "7 y"}, {"job": "9" * 5000}, good):
            connection.xadd(results_stream(client.batch), fields)
        (result,) = client.decode_all([np.zeros((3, 41), np.float32)], ["alone"])
    assert result.error == "a worker's"
    assert client.foreign == 4


def test_status_shows_workers_and_jobs(model_folder, url, connection):
    with worker(model_folder, url), JobClient(url) as client:
        client.decode_all(trials(4)[0], list("abcd"))
        key = connection.keys(process_key("worker-*"))[0]
        assert wait_until(lambda: connection.hget(key, "sentences") == b"4")
        command = [sys.executable, "-m", "lm_server", "status", "--redis", url]
        plain = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        told = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT)
    assert plain.returncode == told.returncode == 0
    assert "jobs: 0 waiting, 0 under way" in plain.stdout
    found = json.loads(told.stdout)
    (one,) = found["processes"]
    assert one["kind"] == "worker"
    assert one["sentences"] == "4"
    assert float(one["final_ms_p99"]) >= float(one["final_ms_p50"]) > 0
    assert float(one["memory_mb"]) > 10
    assert found["jobs"] == {"in_stream": 0, "under_way": 0, "waiting": 0}


def test_a_model_that_is_none_ends_the_worker_with_an_error(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "lm_server", "worker", "--lm", str(tmp_path), "--embedded-redis"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=30,
    )
    assert found.returncode == 2
    assert "is no model folder" in found.stderr
    assert "Traceback" not in found.stderr


def test_keys_of_the_wrong_type_are_put_aside_and_cost_no_job_its_result(
    model_folder, url, connection
):
    connection.set("remote_lm_jobs", "no stream")
    with worker(model_folder, url):
        assert wait_until(lambda: connection.type("remote_lm_jobs") == b"stream")
        connection.set(results_stream("b"), "no stream")
        connection.hset("remote_lm_batch:b", "cat", "queued")
        connection.xadd("remote_lm_jobs", Job("b", "cat", say(["the", "cat"])).fields())
        assert wait_until(lambda: connection.type(results_stream("b")) == b"stream")
        ((_, result),) = connection.xrange(results_stream("b"))
    assert (result[b"lm_response_final"], result[b"attempt"]) == (b"the cat", b"1")
    for key in ("remote_lm_jobs", results_stream("b")):
        assert connection.get(f"remote_lm_set_aside:{key}") == b"no stream"


def test_a_job_is_told_of_settings_without_effect(model_folder, url, connection):
    job = Job("b", "cat", say(["the", "cat"]), {"min_active": 3, "nbest": 2})
    connection.hset("remote_lm_batch:b", "cat", "queued")
    connection.xadd("remote_lm_jobs", job.fields())
    with worker(model_folder, url):
        assert wait_until(lambda: connection.xlen(results_stream("b")) == 1)
    ((_, result),) = connection.xrange(results_stream("b"))
    assert result[b"warning"].startswith(b"min_active has no effect in the search flashlight")
    assert b"nbest" not in result[b"warning"]


def test_no_logits_is_an_error_and_a_result_that_cannot_be_written_leaves_its_job_pending(
    model_folder, url, connection
):
    for batch, job in (("wt", "kept"), ("b", "empty"), ("b", "good")):
        connection.hset(f"remote_lm_batch:{batch}", job, "queued")
        fields = Job(batch, job, say(["the", "cat"])).fields()
        if job == "empty":
            del fields["logits"]
        connection.xadd("remote_lm_jobs", fields)
    connection.rename("remote_lm_batch:wt", "hidden")
    connection.set("remote_lm_batch:wt", "no hash")
    with worker(model_folder, url):
        assert wait_until(lambda: connection.xlen(results_stream("b")) == 2)
    results = {fields[b"job"]: fields for _, fields in connection.xrange(results_stream("b"))}
    assert b"needed `logits`" in results[b"empty"][b"error"]
    assert b"error" not in results[b"good"]
    assert connection.hget("hidden", "kept") == b"queued"
    assert len(held(connection)) == 1


def test_a_job_that_is_set_aside_does_not_wait_for_the_key_of_its_batch(model_folder, connection):
    connection.set("remote_lm_batch:wt", "no hash")
    connection.xadd("remote_lm_jobs", Job("wt", "kept", say(["the", "cat"])).fields())
    one = Worker(connection, load_model(model_folder), Settings())
    one._join()
    job = one._take(wait=False)
    job.attempt = Terms().attempts + 1
    one._decode(job)
    one._send(job)
    ((_, letter),) = connection.xrange(REGISTRY.dead)
    assert letter[b"field:job"] == b"kept"
    assert not connection.xlen("remote_lm_jobs")
