"""Rescoring goes on beside the search: who waits for it, and who does not."""

import contextlib
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import redis
from processes import ROOT, serving, wait_until
from session_client import SessionClient
from small_model import say
from test_causal_lm import make
from test_offline import write

from lm_server.__main__ import main
from lm_server.client.client import Client
from lm_server.client.connection import connect
from lm_server.client.jobs import JobClient
from lm_server.client.process import serve_child
from lm_server.protocol import decode_scoring, to_rnn_order
from lm_server.rescoring.answering import Answering
from lm_server.rescoring.causal_lm import CausalLM
from lm_server.rescoring.scorer import RescoringError
from lm_server.search.load import load_model
from lm_server.serving.embedded_redis import embedded_redis
from lm_server.serving.ownership import Limits
from lm_server.serving.server import Server
from lm_server.serving.session import Session
from lm_server.settings import Settings


class Scorer:
    """Prefers long sentences; waits for `go` first, and fails when told to."""

    name = "a stand-in"

    def __init__(self):
        self.go, self.fail, self.asked = threading.Event(), False, 0

    def score(self, sentences, context="", length_penalty=0.0):
        self.asked += 1
        self.go.wait(30)
        if self.fail:
            raise RescoringError("out of memory")
        return np.array([len(one) / 1000 for one in sentences])


@contextlib.contextmanager
def running(model_folder, scorer, rescore_seconds=20.0):
    """A server in this process, so that the test has its scorer in hand; and two connections."""
    model = load_model(model_folder)
    stop, answering = threading.Event(), Answering(scorer, rescore_seconds)
    with (
        embedded_redis() as own,
        redis.Redis.from_url(own.url, protocol=2) as connection,
        connect(own.url, 5.0, stop) as side,
    ):
        server = Server(
            side,
            lambda name: Session(model, Settings(), name, answering),
            Limits(grace_seconds=0.5),
        )
        thread = threading.Thread(target=server.run, args=(stop,))
        thread.start()
        try:
            yield own.url, connection
        finally:
            if isinstance(scorer, Scorer):
                scorer.go.set()
            stop.set()
            thread.join(timeout=120)
            answering.close()


def test_other_sessions_are_served_while_one_waits_for_its_rescoring(model_folder):
    scorer = Scorer()
    with running(model_folder, scorer) as (_, connection):
        waiting, other = SessionClient(connection), SessionClient(connection, "other")
        waiting.send(say(["the", "cat"]))
        waiting.add("finalize", done=0, request_id="f1")
        assert wait_until(lambda: scorer.asked == 1)
        # The next sentence of the same client is searched, but told only in its turn.
        waiting.add("reset", done=0, request_id="r2")
        waiting.send(say(["a", "dog"]))
        other.send(say(["the", "bat"]))
        assert other.wait("output_partial")["lm_response_partial"] == "the bat"
        time.sleep(0.3)
        assert not connection.xlen("remote_lm_output_final")
        assert not connection.xlen("remote_lm_done_resetting")
        scorer.go.set()
        final = waiting.wait("output_final")
        assert (final["rescored"], final["request_id"]) == ("1", "f1")
        assert final["lm_response_final"] == "the cat"
        best = decode_scoring(final["scoring"])[0]
        assert best.llm == pytest.approx(len("the cat") / 1000)
        assert 0.0 < float(final["confidence"]) <= 1.0
        assert len(json.loads(final["word_confidences"])) == 2
        waiting.wait("done_resetting")

        def in_their_turn():
            names = ("output_final", "done_finalizing", "done_resetting", "output_partial")
            ids = [connection.xrange(f"remote_lm_{name}")[-1][0] for name in names]
            return ids == sorted(ids)

        assert wait_until(in_their_turn)  # the second sentence's partial comes last


@pytest.mark.parametrize("how", ["fails", "takes too long"])
def test_a_rescoring_that_comes_to_nothing_gives_the_ngram_answer_marked_so(model_folder, how):
    scorer = Scorer()
    if how == "fails":
        scorer.fail = True
        scorer.go.set()
    with running(model_folder, scorer, rescore_seconds=0.5) as (url, connection):
        client = SessionClient(connection)
        client.send(say(["the", "cat"]))
        client.add("finalize", done=0, request_id="f1")
        final = client.wait("output_final")
        assert final["lm_response_final"] == "the cat"
        assert final["rescored"] == "0"
        reason = "out of memory" if how == "fails" else "took longer than 0.5 s"
        assert reason in final["problem"]
        candidates = decode_scoring(final["scoring"])
        assert candidates[0].total == pytest.approx(
            Settings().acoustic_scale * candidates[0].acoustic + candidates[0].ngram
        )
        error = client.wait("error")
        assert (error["severity"], error["request_id"]) == ("warning", "f1")
        assert error["error"] == f"not rescored: {final['problem']}"
        # Our client takes the answer, and tells what was amiss.
        with Client(url) as ours:
            decoded = next(ours.decode_all([to_rnn_order(say(["a", "dog"]))], ["t"]))
        assert decoded.error is None
        assert reason in decoded.answer.problem
        assert decoded.answer.sentence == "a dog"
        assert decoded.answer.hypotheses[0].llm is None


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return make(tmp_path_factory.mktemp("opt") / "opt", "opt")


def test_a_real_model_rescores_sentences_and_files(model_folder, opt, tmp_path):
    said = (["the", "cat"], ["a", "dog", "ran"])
    with (
        running(model_folder, CausalLM(opt, "cpu"), rescore_seconds=600) as (url, _),
        Client(url, timeout=600) as client,
    ):
        by_server = [client.decode(to_rnn_order(say(words))) for words in said]
    write(tmp_path / "logits.npz", [" ".join(words) for words in said])
    command = ["decode", "--lm", str(model_folder), "--logits", str(tmp_path / "logits.npz")]
    options = ["--llm", str(opt), "--llm-device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "out.jsonl"), *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for served, line in zip(by_server, lines, strict=True):
        assert line["rescored"]
        assert served.problem is None
        best = line["nbest"][0]
        assert best["llm"] < 0
        assert served.hypotheses[0].sentence == best["sentence"]
        assert served.hypotheses[0].llm == pytest.approx(best["llm"], abs=1e-3)


@pytest.mark.slow
def test_a_real_model_rescores_sentences_jobs_and_files(model_folder, opt, tmp_path):
    logits = [to_rnn_order(say(words)) for words in (["the", "cat"], ["a", "dog", "ran"])]
    options = ["--llm", str(opt), "--llm-device", "cpu", "--fuse", "--fuse-frames", "2"]
    # On a busy machine, the first sentence's rescoring takes longer than by default it may.
    patient = ["--rescore-seconds", "600"]
    with serving("--lm", str(model_folder), "--embedded-redis", *options, *patient) as server:
        with Client(server.url, timeout=600) as client:
            by_server = [client.decode(one) for one in logits]
        with server.client() as connection:
            assert connection.xrange("remote_lm_output_final")[-1][1][b"rescored"] == b"1"
    given = [*options, *patient, "--workers", "1"]
    with (
        serve_child(model_folder, given, subcommand="worker") as url,
        JobClient(url) as client,
    ):
        by_worker = client.decode_all(logits, ["a", "b"])
    write(tmp_path / "logits.npz", ["the cat", "a dog ran"])
    command = ["decode", "--lm", str(model_folder), "--logits", str(tmp_path / "logits.npz")]
    assert main([*command, "--out", str(tmp_path / "out.jsonl"), *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for served, job, line in zip(by_server, by_worker, lines, strict=True):
        assert line["rescored"]
        assert job.answer.problem is None
        best = line["nbest"][0]
        assert best["llm"] < 0
        for one in (served.hypotheses[0], job.answer.hypotheses[0]):
            assert one.sentence == best["sentence"]
            assert one.llm == pytest.approx(best["llm"], abs=1e-3)


@pytest.mark.slow
def test_a_large_model_that_is_not_there_is_an_error_at_the_start(model_folder, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_server", "worker", "--lm", str(model_folder)),
            *("--embedded-redis", "--workers", "1", "--llm", str(tmp_path / "nowhere")),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
