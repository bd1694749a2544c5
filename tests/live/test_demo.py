"""The live demo: what it needs, the day it adds, and the commands it runs."""

import dataclasses
import json

import pytest
from rich.console import Console

from b2txt_jax.calibration import command as calibrate
from b2txt_jax.cli import main
from b2txt_jax.data.reader import open_folder
from b2txt_jax.live import command as stream
from b2txt_jax.live.demo import LiveDemo, LiveDemoError, further_day, show_live
from b2txt_jax.live.outputs.page import Page, PageError
from b2txt_jax.simulation.plan import SESSIONS, SimulationSettings
from b2txt_jax.simulation.write import simulate

SETTINGS = SimulationSettings(sessions=2, train=2, val=1, test=1, max_words=3, speaking_rate=2.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a demo as far as the live demo looks at it."""
    out = tmp_path_factory.mktemp("demo")
    simulate(out / "data", SETTINGS)
    for name in ("lm_3gram/lm.json", "run/finished.json"):
        (out / name).parent.mkdir()
        (out / name).write_text("{}")
    return out


@pytest.fixture
def commands(monkeypatch):
    """The commands that are run, in place of running them."""
    found = []
    for module, name in ((stream, "stream"), (calibrate, "calibrate")):
        monkeypatch.setattr(module, "run", lambda args, name=name: found.append((name, args)) or 0)
    return found


def test_without_a_finished_demo_it_says_which_command_makes_one(tmp_path, capsys):
    assert main(["demo", "--live", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no data/simulation.json, lm_3gram/lm.json, run/finished.json" in error
    assert f"`make demo`, or `b2txt demo --out {tmp_path}`" in error


def test_the_further_day_is_that_of_a_simulation_with_one_day_more(finished, tmp_path):
    root = further_day(finished / "data", tmp_path / "more", SETTINGS)
    whole = simulate(tmp_path / "whole", dataclasses.replace(SETTINGS, sessions=3))
    day = SESSIONS[2]
    for split in ("train", "val"):
        one, other = (open_folder(folder) for folder in (root, whole))
        trials = [[r.read(ref) for ref in r.trials([day], split)] for r in (one, other)]
        assert [t.sentence for t in trials[0]] == [t.sentence for t in trials[1]]
        assert all((a.features == b.features).all() for a, b in zip(*trials, strict=True))
    # The demo's own folder is left as it was, so that the demo can be called again.
    assert not (finished / "data/hdf5_data_final" / day).exists()
    simulate(finished / "data", SETTINGS)
    assert further_day(finished / "data", tmp_path / "more", SETTINGS) == root


def test_it_decodes_calibrates_and_decodes_the_same_sentences_live(finished, commands, capsys):
    earlier = finished / "live" / "run"
    earlier.mkdir(parents=True)
    (earlier / "calibration.json").write_text("{}")
    settings = LiveDemo(view=0, sentences=3, speed="2", learned=1)
    assert show_live(finished, settings, Console(width=200)) == 0
    assert not earlier.exists()
    (_, before), (_, calibration), (_, after) = commands
    assert [name for name, _ in commands] == ["stream", "calibrate", "stream"]
    day, root = SESSIONS[2], finished / "live/data/hdf5_data_final"
    # Without --split they are of val.
    assert [(one.replay, one.split, one.limit) for one in (before, after)] == 2 * [(day, None, 3)]
    assert (before.workdir, before.overrides) == (
        finished / "run",
        [f"--config.data.root={root}"],
    )
    assert (calibration.workdir, calibration.session) == (finished / "run", day)
    assert (calibration.data, calibration.out, calibration.sentences) == (root, earlier, 1)
    assert (after.workdir, after.speed, after.view) == (earlier, "2", 0)
    assert (before.speed, before.view, before.no_record) == ("max", None, True)
    printed = capsys.readouterr().out
    assert f"$ b2txt calibrate --workdir {finished / 'run'} --session {day}" in printed


def test_a_taken_port_is_an_error_before_the_work(finished, commands):
    page = Page("127.0.0.1", 0, None, lambda _: None, lambda: None)
    port = int(page.url.rsplit(":", 1)[1].strip("/"))
    with pytest.raises(PageError, match="another --view PORT"):
        show_live(finished, LiveDemo(view=port), Console())
    page.close()
    assert commands == []


def test_a_demo_of_all_days_has_no_further_one(finished, tmp_path):
    for name in ("lm_3gram/lm.json", "run/finished.json", "data/simulation.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text((finished / name).read_text())
    path = tmp_path / "data/simulation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sessions": len(SESSIONS)}))
    with pytest.raises(LiveDemoError, match="fewer --sessions"):
        show_live(tmp_path, LiveDemo(), Console())
