import argparse
import fcntl
import os
import shutil
import signal
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest

from b2txt_jax.config import ConfigError
from b2txt_jax.data import packed, prepare
from b2txt_jax.data.description import DataError, read_description
from b2txt_jax.data.prepare import PackSettings
from b2txt_jax.data.reader import open_folder
from tests.conftest import FEATURES
from tests.data.packing import contents, finished, pack_in_process
from tests.data.packing import packed as pack


@pytest.fixture(scope="module")
def root(simulated):
    return simulated / "hdf5_data_final"


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """Packed without interruption; read it, do not change it."""
    out = tmp_path_factory.mktemp("packed") / "whole"
    assert pack_in_process(root, out).returncode == 0
    return out


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_nothing_of_a_trial_is_lost(root, whole, split):
    original, reader = open_folder(root), open_folder(whole)
    assert reader.sessions == original.sessions
    before = original.trials(original.sessions, split)
    after = reader.trials(original.sessions, split)
    for old, new in zip(before, after, strict=True):
        expected, got = original.read(old), reader.read(new)
        assert got.features.dtype == np.float32
        assert got.features.tobytes() == expected.features.tobytes()
        assert got.sentence == expected.sentence
        assert (got.labels is None) == (expected.labels is None)
        if expected.labels is not None:
            np.testing.assert_array_equal(got.labels, expected.labels)
        same = ("name", "session", "key", "bins", "label_length", "block", "trial")
        assert [getattr(new, n) for n in same] == [getattr(old, n) for n in same]
        assert got.ref == new
    assert read_description(whole) == read_description(root) != {}


@pytest.mark.parametrize(
    ("call", "number"),
    [
        pytest.param("read", 1, marks=pytest.mark.slow),
        ("read", 11),
        pytest.param("fsync", 1, marks=pytest.mark.slow),
        ("replace", 1),
        pytest.param("replace", 2, marks=pytest.mark.slow),
        ("fsync", 12),
        pytest.param("replace", 21, marks=pytest.mark.slow),
    ],
)
def test_after_kill_9_the_same_command_goes_on_and_nothing_half_written_is_used(
    root, whole, tmp_path, call, number
):
    out = tmp_path / "out"
    assert pack_in_process(root, out, call, number).returncode == -signal.SIGKILL
    before = contents(out)
    assert not finished(out)
    with pytest.raises(DataError, match=r"interrupted; call it again|holds no session"):
        open_folder(out).sessions  # noqa: B018
    times = {name: (out / name).stat().st_mtime_ns for name in before}
    result = pack_in_process(root, out)
    assert result.returncode == 0, result.stdout + result.stderr
    assert contents(out) == contents(whole)
    # Files whose index was written are not written again.
    done = [name for name in before if name.endswith(".json")]
    for name in done:
        for kept in (name, name.replace(".json", ".features")):
            assert (out / kept).stat().st_mtime_ns == times[kept]
    assert f"kept={len(done)}" in result.stdout


def test_a_full_disk_is_told_and_leaves_no_half_file(root, whole, tmp_path):
    out = tmp_path / "out"
    sizes = sorted((path.stat().st_size for path in whole.rglob("*.features")), reverse=True)
    limit = (sizes[0] + sizes[-1]) // 2
    result = pack_in_process(root, out, limit=limit)
    assert result.returncode == 2, result.stderr
    assert "cannot be written: File too large" in result.stdout
    assert "free space and call `b2txt prepare` again" in result.stdout
    assert not finished(out)
    assert not [name for name in contents(out) if name.endswith(".partial")]
    assert pack_in_process(root, out).returncode == 0
    assert contents(out) == contents(whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB, as many as the sessions need and a half."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield small
    subprocess.run(["umount", small], check=True)


def test_a_disk_without_room_is_told_before_anything_is_written(root, small_disk):
    (small_disk / "filler").write_bytes(bytes(15_000_000))
    with pytest.raises(DataError, match=r"has 0\.0\d GB free; needed 0\.0\d GB: free space"):
        pack(root, small_disk / "out")
    assert contents(small_disk / "out") == {}


def test_a_disk_that_others_fill_meanwhile_is_told_and_later_packing_goes_on(
    root, whole, small_disk
):
    out = small_disk / "out"
    result = pack_in_process(root, out, "fill", 20)
    assert result.returncode == 2, result.stderr
    assert "cannot be written: No space left on device" in result.stdout
    assert not finished(out)
    left = contents(out)
    assert left == {name: contents(whole)[name] for name in left}
    (small_disk / "filler").unlink()
    assert pack_in_process(root, out).returncode == 0
    assert contents(out) == contents(whole)


def test_damaged_files_alone_are_packed_again(root, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    first, second, third = sorted(out.rglob("*.features"))[:3]
    octets = bytearray(first.read_bytes())
    octets[len(octets) // 2] ^= 1
    first.write_bytes(octets)
    os.truncate(second, second.stat().st_size - 1)
    third.with_suffix(".json").write_text("{")
    done = prepare.prepare(root, out, PackSettings())
    assert (done.written, done.kept) == (3, len(list(out.rglob("*.features"))) - 3)
    assert contents(out) == contents(whole)
    told = capsys.readouterr().err
    for path in (first, second, third):
        assert f"packing again: {path.with_suffix('')}" in told


def test_a_changed_source_is_packed_again(root, tmp_path):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(root, copy)
    pack(copy, out)
    session = open_folder(copy).sessions[1]
    with h5py.File(copy / session / "data_val.hdf5", "r+") as file:
        file["trial_0001/input_features"][3, 5] = 123.5
    done = prepare.prepare(copy, out, PackSettings())
    assert (done.written, done.kept) == (1, 9)
    reader = open_folder(out)
    (ref,) = [ref for ref in reader.trials([session], "val") if ref.key == "trial_0001"]
    assert reader.read(ref).features[3, 5] == 123.5


def test_features_too_large_for_float16_are_refused_with_the_trials_name(root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    session = open_folder(copy).sessions[0]
    with h5py.File(copy / session / "data_train.hdf5", "r+") as file:
        file["trial_0003/input_features"][3, 5] = 70_000.0
    with pytest.raises(DataError, match=r"trial_0003 has values up to 70000, too large for float1"):
        pack(copy, tmp_path / "out", "float16")
    pack(copy, tmp_path / "other", "bfloat16")


def test_packed_and_other_files_do_not_mix(root, whole, tmp_path):
    with pytest.raises(DataError, match=r"holds HDF5 sessions; .* choose another --out"):
        pack(root, root)
    with pytest.raises(DataError, match=r"packed as float32; bfloat16 was asked for"):
        pack(root, whole, "bfloat16")
    with pytest.raises(DataError, match=r"--dtype is 'float8'; needed one of"):
        PackSettings(dtype="float8")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file; needed a folder"):
        pack(root, tmp_path / "file")


def test_a_folder_of_something_else_is_left_alone(root, tmp_path):
    (tmp_path / "pages.md").write_text("text")
    with pytest.raises(DataError, match=r"did not write: pages.md; needed a new or empty folder"):
        pack(root, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pages.md"]


def test_two_calls_do_not_write_to_one_folder(root, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another `b2txt prepare` is writing"):
            pack(root, out)
    assert contents(out) == {}


CONFIG = Path(__file__).parents[2] / "configs/demo.py"


def call(*arguments, overrides=()):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    args = parser.parse_args([str(argument) for argument in arguments])
    args.overrides = list(overrides)
    return prepare.run(args)


def test_the_command_prints_buckets_and_padding(root, tmp_path, capsys):
    assert call("--root", root, "--out", tmp_path / "out", "--dtype", "bfloat16") == 0
    told = capsys.readouterr().out
    assert "4 sessions, 53 trials" in told
    assert "buckets (bins x labels)" in told
    assert "% of a training batch" in told
    assert packed.read_manifest(tmp_path / "out").dtype.name == "bfloat16"


def test_the_command_takes_sessions_and_patches_from_a_configuration(
    root, tmp_path, tiny_overrides, capsys
):
    out = tmp_path / "out"
    two = open_folder(root).sessions[:2]
    overrides = [*tiny_overrides, f"--config.data.sessions={two}"]
    assert call("--config", CONFIG, "--out", out, overrides=overrides) == 0
    assert open_folder(out, FEATURES).sessions == two
    with pytest.raises(DataError, match=r"has \d+ bins; the model needs 5000"):
        call(
            *("--config", CONFIG, "--out", tmp_path / "other"),
            overrides=[*overrides, "--config.model.patch_size=5000"],
        )
    with pytest.raises(ConfigError, match="without --config"):
        call("--root", root, "--out", out, overrides=["--config.data.feature_count=3"])
    with pytest.raises(ConfigError, match="neither --root nor --config"):
        call("--out", out)
