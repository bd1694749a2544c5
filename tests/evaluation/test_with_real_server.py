"""Claims about the whole way: logits, a real `lm-server` process with its Redis, sentences."""

import argparse
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import psutil
import pytest

from b2txt_jax.evaluation.command import OptionsError, child_options, language_model
from b2txt_jax.evaluation.evaluate import evaluate, run_language_model, run_workers
from b2txt_jax.metrics import ErrorRate
from b2txt_jax.phonemes import sentence_to_ids
from lm_server.client.client import (
    Client,
    LanguageModelError,
    LanguageModelUnavailableError,
)
from lm_server.client.process import serve_child

SAID = ["how are you today", "the cat sat on the mat", "yes i can see the dog"]


def logits_of(sentence: str) -> np.ndarray:
    """Logits [P, 41] that speak the sentence clearly, with some noise."""
    best = [i for p in sentence_to_ids(sentence.split()) for i in (p, p, 0)]
    noise = np.random.default_rng(0).normal(0, 0.5, (len(best), 41))
    return (noise + 8 * np.eye(41)[best]).astype(np.float32)


@pytest.fixture(scope="module")
def model(build_lm) -> Path:
    return build_lm(SAID)


def test_sentences_come_back_and_are_scored(model: Path) -> None:
    names = [f"t15.2023.08.13/trial_000{n}" for n in range(4)]
    logits = [*(logits_of(sentence) for sentence in SAID), np.full((9, 41), np.nan, np.float32)]
    before = {process.pid for process in psutil.process_iter()}
    with serve_child(model) as url:
        results = run_language_model(logits, names, url)
        started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        with Client(url) as client:
            whole = client.decode(logits[0])
            chunks = client.decode(logits[0], chunk_frames=5)
            with pytest.raises(LanguageModelError, match="nbest is -3"):
                client.update_params(nbest=-3)
            client.update_params(nbest=1)
            assert len(client.decode(logits[0]).hypotheses) == 1
    answers = [one.answer for one in results]
    assert [answer and answer.sentence for answer in answers] == [*SAID, None]
    assert all(answer.hypotheses[0].llm is None for answer in answers if answer)
    assert [c.sentence for c in chunks.hypotheses] == [c.sentence for c in whole.hypotheses]
    assert all(0.0 < (word.confidence or 0.0) <= 1.0 for word in whole.words)
    totals = [c.total or 0.0 for c in whole.hypotheses]
    assert totals == sorted(totals, reverse=True)
    result = evaluate(
        split="val",
        results=results,
        logits=[*logits[:3], np.zeros((0, 41), np.float32)],
        sentences=["How are you today?", "The cat sat on the mat.", "Yes, I can see a dog.", "No."],
    )
    assert result.wer is not None
    assert result.wer.all == ErrorRate(2, 17)  # "a" heard as "the"; the failed trial's word
    assert "NaN" in result.failed[0].reason
    assert len(started) >= 2  # the server and its Redis
    assert not any(p.is_running() and p.status() != "zombie" for p in started)


def test_workers_give_what_the_server_gives_and_name_what_fails(model: Path) -> None:
    names = [f"t15.2023.08.13/trial_000{n}" for n in range(4)]
    logits = [*(logits_of(sentence) for sentence in SAID), np.full((9, 41), np.nan, np.float32)]
    told: list[tuple[int, int]] = []
    before = {process.pid for process in psutil.process_iter()}
    with language_model(None, model, workers=2) as (url, name):
        found = run_workers(logits, names, url, lambda done, of: told.append((done, of)))
        started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    with language_model(None, model) as (url, _):
        expected = run_language_model(logits, names, url)
    assert name == str(model)
    assert [one.answer and one.answer.sentence for one in found] == [*SAID, None]
    assert [one.answer for one in found] == [one.answer for one in expected]
    assert [one.name for one in found] == names
    assert "NaN" in str(found[3].error)
    assert told[-1] == (4, 4)
    assert told == sorted(told)
    assert len(started) >= 4  # their parent, two workers, and a Redis
    assert not any(p.is_running() and p.status() != "zombie" for p in started)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"redis": "redis://h", "lm": Path("d")}, "--redis and --lm are both given"),
        ({"workers": 2}, "--workers 2 needs --lm DIR"),
        ({"workers": -1}, "--workers is -1"),
        ({"workers": 0}, "needed --redis URL"),
        ({"workers": 0, "redis": "redis://h", "lm": Path("d")}, "no --lm"),
        ({"llm": "d", "redis": "redis://h"}, "--llm is for a server that is started here"),
        ({"settings": Path("f")}, "--settings is for a server that is started here"),
        ({"lm_options": "--beam 9"}, "--lm-options is for a server that is started here"),
        ({"lm": Path("d"), "lm_options": "--x 'a"}, "needed options as a shell takes them"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: dict[str, object], reason: str
) -> None:
    given = {"redis": None, "lm": None, "workers": None, "llm": None, "settings": None}
    given["lm_options"] = ""
    with pytest.raises(OptionsError, match=re.escape(reason)):
        child_options(argparse.Namespace(**(given | options)))


def test_further_options_reach_the_server_that_is_started() -> None:
    given = argparse.Namespace(
        redis=None, lm=Path("d"), workers=None, llm="m", settings=None, lm_options="--a 'b c'"
    )
    assert child_options(given) == ["--llm", "m", "--a", "b c"]


def test_a_folder_without_a_model_is_told_in_the_servers_words(tmp_path: Path) -> None:
    with pytest.raises(LanguageModelUnavailableError) as caught, serve_child(tmp_path / "none"):
        pass
    assert "exit code 2" in str(caught.value)
    assert "lm-server build" in str(caught.value)


def test_nothing_stays_behind_when_we_are_killed(model: Path) -> None:
    code = f"""
        import time
        from lm_server.client.process import serve_child
        with serve_child({str(model)!r}) as url:
            print(url, flush=True)
            time.sleep(60)
    """
    ours = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert ours.stdout is not None
    assert ours.stdout.readline()
    started = psutil.Process(ours.pid).children(recursive=True)
    assert len(started) >= 2
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    ours.stdout.close()
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive
