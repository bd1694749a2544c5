"""Live decoding under every kind of fault, with a small model, as the soak script feeds it."""

import importlib.util
import json
import signal
import sys
from pathlib import Path

import pytest

from b2txt_jax.cli import main

SCRIPT = Path(__file__).parents[2] / "scripts/soak_live.py"


@pytest.fixture
def soak():
    spec = importlib.util.spec_from_file_location("soak_live", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, before)


def test_no_fault_loses_doubles_or_changes_a_sentence(
    soak, tmp_path, tiny_overrides, build_lm, monkeypatch
):
    run = tmp_path / "run"
    assert main(["train", "--config", "demo", "--workdir", str(run), *tiny_overrides]) == 0
    lm = build_lm(["how are you today", "the cat sat on the mat"])
    out = tmp_path / "soak.json"
    arguments = ["--workdir", str(run), "--lm", str(lm), "--hours", "0", "--out", str(out)]
    arguments += ["--faults", str(len(soak.FAULTS))]
    monkeypatch.setattr(sys, "argv", ["soak_live.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        soak.main()
    figures = json.loads(out.read_text())
    assert figures["faults"] == dict.fromkeys(soak.FAULTS, 1)
    assert figures["answered"] == figures["sentences_sent"] == figures["sentences"]
    assert (figures["lost"], figures["doubled"], figures["changed"]) == (0, 0, 0)
    assert ended.value.code == 0
    problems = {"dropped", "late", "doubled", "jumps", "wrong width", "missing values"}
    assert set(figures["problems"]) >= problems
