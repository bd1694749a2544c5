"""Validations decoded beside a training, by real processes with a small language model."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from b2txt_jax.config import ConfigError, with_overrides
from b2txt_jax.phonemes import sentence_to_ids
from b2txt_jax.training import word_errors
from b2txt_jax.training.loop import train
from b2txt_jax.training.metrics_log import read_metrics
from b2txt_jax.training.word_errors import Decoder, WordErrors

SAID = ["how are you today", "the cat sat on the mat"]
NAMES = ["t15.2023.08.13/trial_0000", "t15.2023.08.13/trial_0001"]


def logits_of(sentence: str) -> np.ndarray:
    """Logits [P, 41] that speak the sentence clearly."""
    best = [i for p in sentence_to_ids(sentence.split()) for i in (p, p, 0)]
    return (9 * np.eye(41)[best]).astype(np.float32)


SPOKEN = [logits_of(sentence) for sentence in SAID]


@pytest.fixture(scope="module")
def lm(build_lm) -> str:
    return str(build_lm(SAID))


@pytest.fixture
def decoder(lm: str, tmp_path: Path) -> Iterator[Decoder]:
    decoder = Decoder(lm, "", tmp_path, NAMES, ["How are you?", SAID[1]])
    yield decoder
    decoder.close()


def outcomes_of(decoder: Decoder) -> list[WordErrors]:
    assert decoder.wait(120)
    return list(decoder.finished())


def pid_of(decoder: Decoder) -> int:
    assert decoder._child is not None
    return decoder._child.pid


def test_errors_are_those_of_the_sentences_and_of_the_nearest_hypotheses(
    decoder: Decoder, tmp_path: Path
) -> None:
    decoder.submit(20, {"raw": SPOKEN, "ema": [SPOKEN[0], np.full((9, 41), np.nan, np.float32)]})
    (found,) = outcomes_of(decoder)
    assert found.step == 20
    assert found.problem is not None
    assert found.problem.startswith("1 failed of 2 trials with averaged weights; the first: ")
    raw, ema = found.counts["raw"], found.counts["ema"]
    # "today" was not said; "cat" and the others were.
    assert (raw["errors"], raw["words"], raw["trials"], raw["failed"]) == (1, 9, 2, 0)
    assert raw["wer"] == pytest.approx(1 / 9)
    assert raw["oracle_errors"] <= raw["errors"]
    assert (ema["errors"], ema["failed"]) == (1 + 6, 1)
    assert "NaN" in ema["first_problem"]
    assert list(tmp_path.rglob("*.npz")) == []


def test_a_failed_trial_is_counted_and_named(decoder: Decoder) -> None:
    decoder.submit(1, {"raw": [SPOKEN[0], np.full((9, 41), np.nan, np.float32)]})
    (found,) = outcomes_of(decoder)
    assert found.problem is not None
    assert found.problem.startswith(f"1 failed of 2 trials; the first: trial {NAMES[1]}")


def test_one_is_decoded_and_of_those_that_wait_the_newest(decoder: Decoder) -> None:
    os.kill(pid_of(decoder), signal.SIGSTOP)
    for step in (1, 2, 3):
        decoder.submit(step, {"raw": SPOKEN})
        while step == 1 and decoder._waiting:  # until it is being decoded
            time.sleep(0.01)
    assert not decoder.wait(0.0)
    assert list(decoder.finished()) == []
    os.kill(pid_of(decoder), signal.SIGCONT)
    assert [one.step for one in outcomes_of(decoder)] == [1, 3]
    assert decoder.replaced == 1


def test_a_process_that_dies_costs_one_validation_and_is_started_again_a_few_times(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_errors, "_MOST_STARTS", 2)
    found = []
    for step, kill in ((1, True), (2, False), (3, True), (4, False)):
        if kill:
            os.kill(pid_of(decoder), signal.SIGKILL)
        decoder.submit(step, {"raw": SPOKEN})
        found += outcomes_of(decoder)
    assert [(one.step, bool(one.counts)) for one in found] == [
        *((1, False), (2, True)),
        *((3, False), (4, False)),
    ]
    assert found[0].problem == "the decoder died (SIGKILL); 1 starts are left"
    assert found[3].problem == "the decoder died 2 times and is not started again"
    assert decoder.died == 2


def test_the_process_ends_with_a_parent_that_is_killed_also_amid_its_work(
    lm: str, tmp_path: Path
) -> None:
    code = f"""
        import time
        from pathlib import Path
        import numpy as np
        from b2txt_jax.training.word_errors import Decoder
        names = [f"day/{{n}}" for n in range(1000)]
        decoder = Decoder({lm!r}, "", Path({str(tmp_path)!r}), names, ["how are you"] * 1000)
        logits = np.random.default_rng(0).normal(0, 3, (300, 41)).astype(np.float32)
        decoder.submit(1, {{"raw": [logits] * 1000}})
        while decoder._waiting or not list(Path({str(tmp_path)!r}).rglob("1_raw.npz")):
            time.sleep(0.01)
        print(decoder._child.pid, flush=True)
        time.sleep(300)
    """
    ours = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert ours.stdout is not None
    child = psutil.Process(int(ours.stdout.readline()))
    assert child.is_running()
    ours.kill()
    ours.wait()
    ours.stdout.close()
    assert not psutil.wait_procs([child], timeout=120)[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm": "nowhere"}, "'nowhere', and the decoder does not start: .*no model folder nowhere"),
        ({"options": "--beam -1"}, "does not start: .*beam is -1"),
        ({"options": "--x 'a"}, "validate_lm_options is .*as a shell takes them"),
        ({"sentences": [None, "x"]}, "1 of 2 validation trials have no sentence.*trial_0000"),
    ],
)
def test_a_decoder_that_cannot_work_is_an_error_at_the_start(
    lm: str, tmp_path: Path, change: dict, message: str
) -> None:
    given = {"lm": lm, "options": "", "sentences": SAID, **change}
    with pytest.raises(ConfigError, match=message):
        Decoder(given["lm"], given["options"], tmp_path / "run", NAMES, given["sentences"])
    assert not (tmp_path / "run").exists()


def changed(config, lm: str, *more: str):
    return with_overrides(config, [f"--config.train.validate_lm={lm}", *more])


def test_a_training_with_a_missing_model_folder_ends_before_it_begins(
    tiny_config, tmp_path
) -> None:
    with pytest.raises(ConfigError, match="no model folder nowhere"):
        train(changed(tiny_config, "nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    alone = with_overrides(tiny_config, ["--config.train.validate_lm_options=--beam=9"])
    with pytest.raises(ConfigError, match=r"needed train\.validate_lm too"):
        train(alone, tmp_path / "run")


def children() -> Sequence[psutil.Process]:
    return [one for one in psutil.Process().children() if "score" in one.cmdline()]


@pytest.mark.slow
def test_a_training_logs_the_wer_with_the_step_that_it_belongs_to(
    tiny_config, lm, tmp_path
) -> None:
    assert train(changed(tiny_config, lm), tmp_path).finished
    lines = read_metrics(tmp_path / "metrics.jsonl")
    found = [line for line in lines if line["kind"] == "val_words"]
    # The one at step 3 may have given way to that at the end, which is waited for.
    assert {line["step"] for line in found} <= {3, 6}
    assert found[-1]["step"] == 6
    for line in found:
        assert line["wer"] == line["errors"] / line["words"]
        assert line["oracle_wer"] <= line["wer"]
        assert line["failed"] == 0
    assert children() == []
    assert not (tmp_path / word_errors.FOLDER).exists()
    assert json.loads((tmp_path / "finished.json").read_text())["validations"] == 2
