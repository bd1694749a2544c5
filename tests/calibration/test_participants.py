"""A recording day is added to a run of several participants, and decoded live."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from b2txt_jax.calibration.calibrate import Spoken, extended
from b2txt_jax.cli import main
from b2txt_jax.data.joint import folders
from b2txt_jax.data.reader import open_folder
from b2txt_jax.inference.run import load_run
from b2txt_jax.interop.convert import write_workdir
from b2txt_jax.interop.nejm import Run as Converted
from b2txt_jax.live.model import LiveModel
from b2txt_jax.live.sources.interface import Bin
from b2txt_jax.live.sources.replay import Replay
from b2txt_jax.training.checkpoint import BestScore
from b2txt_jax.training.loop import resolve
from b2txt_jax.training.step import init_state
from tests.data.participants import config_of, session

OLD = ("a.2023.01.01", "a.2023.01.02", "b.2022.01.01")
FEW = ["--steps=1", "--rows=2"]


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A run of random weights, of two participants with 5 and 3 features."""
    for name, width in zip(OLD, (5, 5, 3), strict=True):
        session(tmp_path / ("small" if name[0] == "b" else "large"), name, width)
    config = resolve(config_of(f"{tmp_path / 'large'},{tmp_path / 'small'}"), tmp_path, False)
    folder = tmp_path / "run"
    write_workdir(folder, Converted(config, init_state(config, 3), BestScore(1.0, 1.0, 0)))
    return folder


def test_a_new_day_has_its_own_width_in_a_run_of_several(tmp_path: Path) -> None:
    session(session(tmp_path / "large", OLD[0], 5).parent / "small", OLD[2], 3)
    both = resolve(config_of(f"{tmp_path / 'large'},{tmp_path / 'small'}"), tmp_path, False)
    one = resolve(config_of(str(tmp_path / "large")), tmp_path, False)
    trials = [Spoken(2, np.zeros((40, 5)), np.ones(3))]
    widths = [
        extended(config, "new", trials, width).data.widths
        for config, width in ((both, 3), (both, 5), (both, None), (one, 3), (one, 5), (one, None))
    ]
    assert widths == [(5, 3, 3), (5, 3, 5), (5, 3, 5), (5, 3), (), ()]


def test_a_replay_sends_the_features_that_were_recorded(tmp_path: Path) -> None:
    session(session(tmp_path / "large", OLD[0], 5).parent / "small", OLD[2], 3)
    with open_folder(f"{tmp_path / 'large'},{tmp_path / 'small'}", 5) as reader:
        for name, width in ((OLD[0], 5), (OLD[2], 3)):
            refs = reader.find_trials([name], "val")
            events = Replay(reader, refs[:1], float("inf")).read(1.0)
            more = Replay(reader, refs[:1], float("inf"))
            sent = [*(events or []), *(more.read(1.0) or []), *(more.read(1.0) or [])]
            assert {len(one.features) for one in sent if isinstance(one, Bin)} == {width}


@pytest.mark.slow
def test_a_day_in_a_participants_folder_starts_from_that_participants_days(
    workdir: Path, tmp_path: Path
) -> None:
    session(tmp_path / "small", "b.2022.01.02", 3)
    out = tmp_path / "out"
    new = ["--session", "b.2022.01.02", "--data", str(tmp_path / "small"), "--out", str(out)]
    assert main(["calibrate", "--workdir", str(workdir), *new, *FEW]) == 0
    before, after = load_run(workdir), load_run(out)
    assert after.sessions == (*OLD, "b.2022.01.02")
    assert after.config.data.widths == (5, 5, 3, 3)
    assert after.config.data.root == before.config.data.root
    report = json.loads((out / "calibration.json").read_text())
    assert report["start"] == {"kind": "last", "day": OLD[2]}
    weight = np.asarray(after.params["day"]["weight"])
    assert (weight[3, :3] != weight[2, :3]).any()
    np.testing.assert_array_equal(weight[3, 3:], weight[2, 3:])
    was = {one.ref.name: one.logits for one in before.logits("val")}
    found = after.logits("val")
    assert len(found) == len(was) + 4
    for one in found:
        if one.ref.name in was:
            np.testing.assert_allclose(one.logits, was[one.ref.name], atol=1e-6)


@pytest.mark.slow
def test_a_day_elsewhere_starts_from_days_of_its_width_and_is_one_more_folder(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session(tmp_path / "new", "a.2023.01.03", 5)
    out = tmp_path / "out"
    new = ["--session", "a.2023.01.03", "--data", str(tmp_path / "new"), "--out", str(out)]
    assert main(["calibrate", "--workdir", str(workdir), *new, *FEW]) == 0
    after = load_run(out)
    assert folders(after.config.data.root)[2] == out / "sessions"
    assert after.config.data.widths == (5, 5, 3, 5)
    report = json.loads((out / "calibration.json").read_text())
    assert set(report["start"]["losses"]) == set(OLD[:2])
    assert {one.ref.session for one in after.logits("val")} == {*OLD, "a.2023.01.03"}
    session(tmp_path / "large", "a.2023.01.04", 5)
    session(tmp_path / "new", "a.2023.01.04", 5)
    new[1], new[5] = "a.2023.01.04", str(tmp_path / "other")
    assert main(["calibrate", "--workdir", str(workdir), *new, *FEW]) == 2
    assert "a session a.2023.01.04 too" in capsys.readouterr().err
    session(tmp_path / "wide", "c.2024.01.01", 6)
    new[1], new[3] = "c.2024.01.01", str(tmp_path / "wide")
    assert main(["calibrate", "--workdir", str(workdir), *new, *FEW]) == 2
    assert "6 features a bin; needed at most 5" in capsys.readouterr().err


@pytest.mark.slow
def test_live_bins_of_a_narrower_participant_are_decoded_as_its_trials_are(workdir: Path) -> None:
    run = load_run(workdir)
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    model = LiveModel(run, OLD[2])
    live = np.concatenate([*(model.push(one[None]) for one in x), model.finish()])
    np.testing.assert_allclose(live, run.logits(x, OLD[2]), atol=1e-5)
