import gc
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from b2txt_jax.data import packed
from b2txt_jax.data.description import DataError
from b2txt_jax.data.reader import open_folder
from b2txt_jax.errors import UserError
from tests.data.packing import packed as pack

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def root(simulated):
    return simulated / "hdf5_data_final"


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    return pack(root, tmp_path_factory.mktemp("packed") / "whole")


@pytest.fixture
def copy(whole, tmp_path):
    """A packed folder that a test may damage."""
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def refs_of(root, split="train"):
    reader = open_folder(root)
    return reader.trials(reader.sessions, split)


@pytest.mark.parametrize("dtype", TYPES)
def test_features_are_those_of_hdf5_rounded_to_the_packed_type(root, tmp_path, dtype):
    out = pack(root, tmp_path / "out", dtype)
    reader, original = open_folder(out), open_folder(root)
    assert (reader.dtype, original.dtype) == (TYPES[dtype], np.float32)
    for old, new in zip(refs_of(root), refs_of(out), strict=True):
        expected = original.read(old).features.astype(TYPES[dtype])
        row = np.full((old.bins + 3, 512), 7, TYPES[dtype])
        got = reader.read_into(new, row)
        assert row[: old.bins].tobytes() == expected.tobytes()
        assert (row[old.bins :] == 7).all()
        assert np.shares_memory(got.features, row)
        assert reader.read(new).features.tobytes() == expected.astype(np.float32).tobytes()


@settings(max_examples=25)
@given(st.data())
def test_one_wrong_bit_is_refused_naming_file_and_trial_and_other_trials_are_read(copy_once, data):
    refs = refs_of(copy_once)
    ref = data.draw(st.sampled_from(refs))
    manifest = packed.read_manifest(copy_once)
    place = (ref.session, "train")
    trial = packed.load_split(copy_once, *place, manifest.indices[place]).trials[ref.key]
    position = trial.offset + data.draw(st.integers(0, ref.bins * 2048 - 1))
    octet = 1 << data.draw(st.integers(0, 7))
    flip(ref.path, position, octet)
    try:
        reader = open_folder(copy_once)
        with pytest.raises(DataError, match=rf"{ref.path} {ref.key} does not match its checksum"):
            reader.read(ref)
        for other in refs:
            if other != ref:
                reader.read(other)
    finally:
        flip(ref.path, position, octet)


@pytest.fixture(scope="module")
def copy_once(whole, tmp_path_factory):
    """A copy that a test damages and mends."""
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("packed") / "damaged"))


def flip(path, position, bits):
    with path.open("r+b") as file:
        file.seek(position)
        octet = file.read(1)[0]
        file.seek(position)
        file.write(bytes([octet ^ bits]))


def test_a_truncated_file_is_refused_when_listed_naming_the_first_trial_cut_off(copy):
    ref = refs_of(copy)[5]
    offset = packed.load_split(copy, ref.session, "train", None).trials[ref.key].offset
    os.truncate(ref.path, offset + 10)
    with pytest.raises(
        DataError, match=rf"{ref.path} has {offset + 10} bytes; needed \d+: {ref.key} is"
    ):
        refs_of(copy)


def test_a_file_truncated_while_it_is_open_is_refused_naming_the_trial(copy):
    first, second = refs_of(copy)[:2]
    reader = open_folder(copy)
    reader.read(first)
    os.truncate(first.path, first.bins * 2048 + 100)
    reader.read(first)
    with pytest.raises(DataError, match=rf"{second.path} {second.key}: the file ends .* before"):
        reader.read(second)


def test_a_missing_or_damaged_index_is_refused_naming_it(copy):
    path = refs_of(copy)[0].path
    index = path.with_suffix(".json")
    manifest, whole_index = packed.read_manifest(copy), index.read_bytes()
    index.write_bytes(whole_index.replace(b'"bins": ', b'"bins":  ', 1))
    with pytest.raises(DataError, match=rf"{index} does not match its checksum"):
        packed.load_split(copy, path.parent.name, "train", next(iter(manifest.indices.values())))
    index.unlink()
    with pytest.raises(DataError, match=rf"{index} cannot be read"):
        packed.load_split(copy, path.parent.name, "train", None)
    index.write_bytes(whole_index)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} is not there"):
        refs_of(copy)


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_manifest_is_refused_or_means_the_same(whole, tmp_path_factory, data):
    octets = bytearray((whole / packed.MANIFEST).read_bytes())
    octets[data.draw(st.integers(0, len(octets) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged = tmp_path_factory.getbasetemp() / "damaged manifest"
    damaged.mkdir(exist_ok=True)
    (damaged / packed.MANIFEST).write_bytes(octets)
    found, told = None, str(damaged / packed.MANIFEST)
    try:
        found = packed.read_manifest(damaged)
    except UserError as error:
        told = str(error)
    assert found is None or found == packed.read_manifest(whole)
    assert str(damaged / packed.MANIFEST) in told


def test_another_format_and_other_features_are_refused(copy):
    values = json.loads((copy / packed.MANIFEST).read_text())
    names = open_folder(copy).sessions
    with pytest.raises(DataError, match=r"has 512 features per bin; needed 256"):
        open_folder(copy, 256)
    with pytest.raises(DataError, match=r"'t15.2023.08.1' has no data_train, .* t15.2023.08.1"):
        open_folder(copy).trials(["t15.2023.08.1"], "train")
    with pytest.raises(DataError, match=r"trial_0000: the trial has \d+ bins; the model needs 999"):
        open_folder(copy).trials(names, "train", min_bins=999)
    with pytest.raises(DataError, match=r"no test trial in the 1 sessions .* data_test.features"):
        open_folder(copy).trials(names[:1], "test")
    with pytest.raises(DataError, match=r"has no labels; needed for this split"):
        open_folder(copy).trials(names, "test", labels_needed=True)
    (copy / packed.MANIFEST).write_text(json.dumps({**values, "format": 2}))
    with pytest.raises(DataError, match=r"has format 2; this version reads 1: pack the sessions"):
        open_folder(copy)


def test_several_threads_read_at_once(whole, root):
    original = open_folder(root)
    expected = {ref.name: original.read(ref).features for ref in refs_of(root)}
    reader, refs = open_folder(whole), refs_of(whole) * 6
    with ThreadPoolExecutor(4) as pool:
        for trial in pool.map(reader.read, refs):
            np.testing.assert_array_equal(trial.features, expected[trial.ref.name])


def open_in(folder) -> list[str]:
    """Files of a folder that this process has open. Others may be closed at any time."""
    numbers = os.listdir("/proc/self/fd")
    files = (os.path.realpath(f"/proc/self/fd/{number}") for number in numbers)
    return [file for file in files if file.startswith(os.path.realpath(folder))]


def test_files_are_closed_with_the_reader(whole):
    assert not open_in(whole)
    reader = open_folder(whole)
    for ref in refs_of(whole):
        reader.read(ref)
    assert open_in(whole)
    reader.close()
    assert not open_in(whole)
    reader.read(refs_of(whole)[0])
    del reader
    gc.collect()
    assert not open_in(whole)
