"""`b2txt convert` with files and options that make no sense: one line, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from nejm_run import error_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from b2txt_jax.cli import main
from b2txt_jax.errors import UserError
from b2txt_jax.interop.safetensors_file import read_safetensors


def convert(*command: object) -> int:
    return main(["convert", *map(str, command)])


@pytest.fixture(scope="module")
def workdir(small, tmp_path_factory) -> Path:
    """A converted run."""
    place = tmp_path_factory.mktemp("converted") / "run"
    assert convert("--from-nejm", small[0], "--workdir", place) == 0
    return place


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory) -> Path:
    """Its weights in a safetensors file."""
    file = tmp_path_factory.mktemp("exported") / "m.safetensors"
    assert convert("--to-safetensors", file, "--workdir", workdir) == 0
    return file


def changed(exported: Path, to: Path, change=lambda arrays, metadata: None) -> Path:
    """A copy of the file and of its configuration after `change(arrays, metadata)`."""
    with safe_open(exported, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(arrays, metadata)
    save_file(arrays, to / "m.safetensors", metadata)
    shutil.copy(exported.with_suffix(".json"), to)
    return to / "m.safetensors"


def assert_same_weights(found: Path, expected: Path):
    arrays = load_file(found)
    for name, value in load_file(expected).items():
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)


@pytest.fixture
def older(workdir, tmp_path) -> Path:
    """A run whose latest state has a structure that is not today's."""
    place = shutil.copytree(workdir, tmp_path / "older")
    state = place / "checkpoints/latest/2/tree"
    shutil.rmtree(state)
    shutil.copytree(place / "checkpoints/best/2/tree", state)
    return place


@pytest.mark.slow
def test_the_best_weights_of_an_older_run_can_be_exported(older, workdir, tmp_path, capsys):
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    convert("--to-safetensors", new, "--workdir", workdir)
    capsys.readouterr()
    assert convert("--to-safetensors", old, "--workdir", older) == 0
    assert capsys.readouterr().err == ""  # it has no use for the state, so does not miss it
    assert_same_weights(old, new)

    assert convert("--to-nejm", tmp_path / "out", "--workdir", older) == 0
    (note,) = capsys.readouterr().err.splitlines()
    assert "running means are left out, since the latest state cannot be read" in note
    assert len(note) < 600
    again = tmp_path / "again"
    assert convert("--from-nejm", tmp_path / "out", "--workdir", again) == 0
    assert convert("--to-safetensors", new, "--workdir", again, "--force") == 0
    assert capsys.readouterr().err.count("no optimizer state in the checkpoint") == 1
    assert_same_weights(new, old)

    latest = error_of(capsys, "--to-nejm", tmp_path / "o", "--workdir", older, "--which", "latest")
    assert "leave out --which latest" in latest
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_exporting_changes_nothing_in_the_run(workdir, tmp_path):
    before = sorted(workdir.rglob("*"))
    assert convert("--to-safetensors", tmp_path / "m.safetensors", "--workdir", workdir) == 0
    assert sorted(workdir.rglob("*")) == before


@pytest.mark.parametrize("step", ["nan", "1e12", "-5", "", "2147483648", "9" * 5000, "²"])
def test_a_step_that_is_none_can_be_left_out(exported, tmp_path, step):
    file = changed(exported, tmp_path, lambda a, metadata: metadata.update(b2txt_step=step))
    with pytest.raises(UserError, match=r"metadata b2txt_step is .*--restart"):
        read_safetensors(file)
    assert int(read_safetensors(file, restart=True).state.step) == 0


@pytest.mark.parametrize("score", ["nan", "inf", "-0.5"])
def test_a_score_that_is_none_is_unknown(exported, tmp_path, score):
    def change(arrays, metadata):
        metadata |= {"b2txt_per": score, "b2txt_loss": "nan"}

    run = read_safetensors(changed(exported, tmp_path, change))
    assert (run.best.per, run.best.loss) == (np.inf, np.inf)
    file = changed(exported, tmp_path, lambda a, metadata: metadata.update(b2txt_per="low"))
    with pytest.raises(UserError, match=r"m\.safetensors: metadata b2txt_per is 'low'"):
        read_safetensors(file)


def test_an_edited_configuration_beside_the_file_is_not_passed_over(exported, tmp_path):
    file = changed(exported, tmp_path)
    assert read_safetensors(file).notes == ()
    beside = file.with_suffix(".json")
    values = json.loads(beside.read_text())
    values["signal"]["smooth_std"] = 1.0
    beside.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"m\.json.*signal\.smooth_std, 1\.0 and not 2\.0"):
        read_safetensors(file)
    for content in (b"\xff\xfe", b"[1]", b"{}", b"[" * 100_000):
        beside.write_bytes(content)
        (note,) = read_safetensors(file).notes
        assert "m.json is not a configuration" in note or "missing keys" in note
        assert "itself was used" in note


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"7", b"[" * 100_000])
def test_a_configuration_that_is_none_is_named(exported, tmp_path, content):
    file = changed(exported, tmp_path, lambda a, metadata: metadata.pop("b2txt_config"))
    file.with_suffix(".json").write_bytes(content)
    with pytest.raises(UserError, match=r"m\.json is not a configuration"):
        read_safetensors(file)


def test_weights_in_float64_are_rounded_with_a_note(exported, tmp_path):
    def change(arrays, metadata):
        arrays["h0"] = arrays["h0"].astype(np.float64)

    (note,) = read_safetensors(changed(exported, tmp_path, change)).notes
    assert note == "weights in float64 were rounded to float32"


def test_overrides_are_checked_as_the_settings_are(exported):
    with pytest.raises(UserError, match="needs at least 401"):
        read_safetensors(exported, ["--config.signal.smooth_std=50"])


def test_a_run_at_its_end_is_told_how_to_go_on(small, tmp_path, capsys):
    command = ("--from-nejm", small[0], "--workdir", tmp_path / "run", "--force")
    assert convert(*command, "--config.train.steps=2") == 0
    assert "step 2 is the last of 2" in capsys.readouterr().err
    for more in (["--config.train.steps=3"], ["--config.train.steps=2", "--restart"]):
        assert convert(*command, *more) == 0
        assert "is the last of" not in capsys.readouterr().err


FROM, TO, FILE = "--from-nejm {x}", "--to-nejm {x}", "--to-safetensors {x}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{FROM} --which best", "--which does not apply here; it goes with --to-nejm or"),
        (f"{FROM} --compiled-names", "--compiled-names does not apply here"),
        (f"{TO} --restart", "it goes with --from-nejm or --from-safetensors"),
        (f"{TO} --root {{x}}", "--root does not apply here"),
        (f"{TO} --ignore seed", "--ignore does not apply here; it goes with --from-nejm"),
        ("--from-safetensors {x} --ignore seed", "--ignore does not apply here"),
        (f"{FILE} --compiled-names", "--compiled-names does not apply here"),
        (f"{TO} --config.train.seed=1", "by --from only"),
        ("--to-safetensors {x}/new.json", "ends in .json, the suffix of the configuration beside"),
        ("--to-safetensors {folder} --force", "is a folder; needed the name of a file"),
        ("--to-safetensors {file}/m.safetensors", "file is a file; needed a folder"),
        ("--to-nejm {file}", "file is a file; needed a folder"),
        ("--to-nejm {file}/x/y", "file is a file; needed a folder"),
        ("--from-nejm {theirs} --ignore nonsense", "has no such setting"),
    ],
)
def test_options_that_do_not_fit_are_named(workdir, small, tmp_path, capsys, command, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "new" if command.startswith("--from") else workdir
    words = command.format(
        x=tmp_path / "x", folder=tmp_path / "folder", file=tmp_path / "file", theirs=small[0]
    ).split()
    assert message in error_of(capsys, *words, "--workdir", place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_cannot_be_written_into_a_file(small, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/x", "file/x/y"):
        error = error_of(capsys, "--from-nejm", small[0], "--workdir", tmp_path / place)
        assert "file is a file; needed a folder" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
