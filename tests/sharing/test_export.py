"""An exported model is the run's, with and without this package."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from b2txt_jax.cli import main
from b2txt_jax.config import Config
from b2txt_jax.inference.run import load_run
from b2txt_jax.interop.convert import write_workdir
from b2txt_jax.interop.nejm import Run
from b2txt_jax.sharing.card import model_card
from b2txt_jax.training.checkpoint import BestScore
from b2txt_jax.training.step import init_state
from tests.conftest import FEATURES

DAY = "t15.2023.08.13"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Config, narrow: Path) -> Path:
    """A run's folder with fresh parameters of four days, whose layers differ."""
    days = sorted(path.name for path in (narrow).iterdir())
    config = replace(tiny_config, data=replace(tiny_config.data, sessions=tuple(days)))
    workdir = tmp_path_factory.mktemp("runs") / "run"
    state = init_state(config, len(days))
    noise = 0.1 * np.random.default_rng(0).normal(size=state.params["day"]["bias"].shape)
    state.params["day"]["bias"] += noise.astype(np.float32)
    write_workdir(workdir, Run(config, state, BestScore(0.5, 9.0, 0)))
    for name, parameters in (("ours", load_run(workdir).fingerprint), ("other", "0")):
        (workdir / "lm_settings").mkdir(exist_ok=True)
        about = {"about": {"checkpoint": {"parameters": parameters}}}
        (workdir / "lm_settings" / f"{name}.json").write_text(json.dumps(about))
    return workdir


@pytest.fixture(scope="module")
def shared(run: Path) -> Path:
    folder = run.parent / "shared"
    assert main(["export-model", str(folder), "--workdir", str(run), "--license", "cc0-1.0"]) == 0
    return folder


def test_the_exported_model_is_read_as_a_run(run: Path, shared: Path, narrow: Path) -> None:
    ours, theirs = load_run(run), load_run(shared)
    assert theirs.fingerprint == ours.fingerprint
    assert (theirs.step, theirs.sessions) == (ours.step, ours.sessions)
    root = f"--config.data.root={narrow}"
    trial, expected = load_run(shared, [root]).logits("val")[0], ours.logits("val")[0]
    np.testing.assert_array_equal(trial.logits, expected.logits)


def test_nothing_of_the_machine_is_in_it_and_its_own_settings_alone(run, shared, narrow) -> None:
    for path in shared.rglob("*"):
        if path.is_file():
            assert str(narrow).encode() not in path.read_bytes(), path
    assert [path.name for path in (shared / "lm_settings").iterdir()] == ["ours.json"]
    phonemes = json.loads((shared / "phonemes.json").read_text())
    assert (len(phonemes), phonemes[1], phonemes[40]) == (41, "AA", "silence")
    card = (shared / "README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\n")
    assert "simulated sessions" in card
    assert load_run(run).fingerprint in card


def test_the_card_speaks_of_day_layers_where_there_are_any(run: Path) -> None:
    ours = load_run(run)
    model = replace(ours.config.model, day_layer=False)
    shares = replace(ours, config=replace(ours.config, model=model))
    cards = [model_card(one, "name", [], "", "cc0-1.0", [], False) for one in (ours, shares)]
    assert ["an input layer for each recording day" in card for card in cards] == [True, False]
    assert "share the model's input layer" in cards[1]


PLAIN = """
import sys
from dataclasses import replace
for name in ("b2txt_jax", "lm_server"):
    sys.modules[name] = None  # as if it were not installed
sys.path.insert(0, sys.argv[1])
import numpy as np
from streaming import Stream
x = np.load(sys.argv[2])
stream = Stream(sys.argv[1], sys.argv[3])
parts = [stream.push(part) for part in np.split(x, [1, 3, 20, 20, 61])]
np.save(sys.argv[4], np.concatenate(parts))
try:
    Stream(sys.argv[1], "t15.1999.01.01")
except ValueError as error:
    assert "needed one of" in str(error)
"""


def test_plain_jax_computes_the_same_logits_to_1e_5(run: Path, shared: Path, tmp_path) -> None:
    x = np.random.default_rng(0).normal(size=(120, FEATURES)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    names = [str(shared), str(tmp_path / "x.npy"), DAY, str(tmp_path / "logits.npy")]
    subprocess.run([sys.executable, "-c", PLAIN, *names], check=True)
    found = np.load(tmp_path / "logits.npy")
    expected = load_run(run, ["--config.signal.eval_padding=valid"]).logits(x, day=DAY)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    other = load_run(run, ["--config.signal.eval_padding=valid"]).logits(x, day="t15.2023.08.18")
    assert np.abs(other - expected).max() > 1e-3  # the day is not ignored


def test_a_stream_that_differs_is_not_exported(run: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("b2txt_jax.sharing.streaming.load_state", broken_state)
    assert main(["export-model", str(tmp_path / "m"), "--workdir", str(run)]) == 2
    assert "the exported step's logits differ by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_causal_model_is_exported_with_its_own_kernel_and_normalisation(
    tmp_path: Path, tiny_config: Config
) -> None:
    signal = replace(tiny_config.signal, smooth_kernel="one_sided", log=True, rolling_seconds=39.98)
    config = replace(tiny_config, signal=signal, data=replace(tiny_config.data, sessions=(DAY,)))
    write_workdir(tmp_path / "run", Run(config, init_state(config, 1), BestScore(0.5, 9.0, 0)))
    command = ["export-model", str(tmp_path / "m"), "--workdir", str(tmp_path / "run")]
    assert main([*command, "--data-statement", "Nobody's."]) == 0
    found = json.loads((tmp_path / "m" / "preprocessing.json").read_text())
    np.testing.assert_allclose(
        found["smoothing"]["taps"], [0.046, 0.110, 0.206, 0.299, 0.339], atol=5e-4
    )
    assert found["smoothing"]["ahead"] == 0
    for text in (found["normalisation"], (tmp_path / "m" / "README.md").read_text()):
        assert "of raw features: sign(x) * ln(1 + |x|), then z-score" in text
        assert "newest bin weighs 0.001, cut at 5" in text


def broken_state(folder: Path) -> list[np.ndarray]:
    with np.load(folder / "streaming_start.npz") as file:
        return [file[str(number)] + 0.5 for number in range(len(file.files))]


def test_recordings_need_a_statement_and_a_folder_is_not_overwritten(
    run: Path, tmp_path: Path, capsys
) -> None:
    config = json.loads((run / "config.json").read_text())
    config["data"]["root"] = str(tmp_path / "elsewhere")
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    (recorded / "checkpoints").symlink_to(run / "checkpoints")
    (recorded / "config.json").write_text(json.dumps(config))
    command = ["export-model", str(tmp_path / "m"), "--workdir", str(recorded), "--no-stream"]
    assert main(command) == 2
    assert "needed --data-statement: whose recordings" in capsys.readouterr().err
    assert main([*command, "--data-statement", "T15, CC0, with consent."]) == 0
    assert "T15, CC0, with consent." in (tmp_path / "m" / "README.md").read_text()
    assert not list((tmp_path / "m").glob("streaming*"))
    assert main([*command, "--data-statement", "x"]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_damaged_weights_are_an_error_in_one_line(shared: Path, tmp_path: Path, capsys) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(
            (shared / name).read_bytes()[: 10_000 if "m" in name[:1] else None]
        )
    out = str(tmp_path / "x.npz")
    assert main(["infer", "--workdir", str(tmp_path), "--out", out]) == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err
