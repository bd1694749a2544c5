"""A fingerprint is the same for the same data wherever they are, and names what was changed."""

import os
import shutil
from pathlib import Path

import h5py
import pytest

from b2txt_jax.config import with_overrides
from b2txt_jax.data.description import DataError
from b2txt_jax.data.fingerprint import check_same_data, differences, fingerprint
from b2txt_jax.data.reader import open_folder
from b2txt_jax.training.loop import train
from tests.conftest import FEATURES
from tests.data.packing import packed

SESSION = "t15.2023.08.13"


def of(root: Path) -> dict:
    reader = open_folder(root, FEATURES)
    return fingerprint(reader, reader.trials(reader.sessions, "train"))


@pytest.fixture(scope="module")
def root(narrow: Path) -> Path:
    return narrow


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def remove_trial(file: h5py.File) -> None:
    del file["trial_0002"]


def zero_features(file: h5py.File) -> None:
    file["trial_0002/input_features"][:] = 0


def other_label(file: h5py.File) -> None:
    file["trial_0002/seq_class_ids"][0] = 1 + file["trial_0002/seq_class_ids"][0] % 39


def cut(file: h5py.File) -> None:
    file["trial_0002"].attrs["n_time_steps"] -= 1


def other_sentence(file: h5py.File) -> None:
    file["trial_0002"].attrs["sentence_label"] = "Another one."


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (remove_trial, "had 8 trials, has 7"),
        (zero_features, "has other features"),
        (other_label, "has other lengths, labels or sentences"),
        (cut, "has other lengths, labels or sentences"),
        (other_sentence, "has other lengths, labels or sentences"),
    ],
)
def test_a_change_of_one_trial_is_named_by_its_file(root, copy, change, text) -> None:
    with h5py.File(copy / SESSION / "data_train.hdf5", "a") as file:
        change(file)
    assert differences(of(root), of(copy)) == [f"{SESSION}/data_train {text}"]


def test_copies_and_packed_copies_have_the_same_fingerprint(root, copy, tmp_path) -> None:
    assert of(copy) == of(root) == of(packed(root, tmp_path / "packed", features=FEATURES))
    rounded = of(packed(root, tmp_path / "rounded", "float16", features=FEATURES))
    assert rounded != of(root)
    assert differences(of(root), rounded) == []
    shutil.rmtree(copy / SESSION)
    assert differences(of(root), of(copy)) == [f"{SESSION}/data_train is missing"]


def test_a_run_without_fingerprint_or_with_a_damaged_one_has_a_way_on(tmp_path: Path) -> None:
    check_same_data(tmp_path, {"dtype": "float32", "files": {}})
    (tmp_path / "data.json").write_text("[1]")
    with pytest.raises(DataError, match=r"data.json is no fingerprint.*delete it to go on"):
        check_same_data(tmp_path, {"dtype": "float32", "files": {}})


@pytest.mark.slow
def test_a_run_is_not_resumed_on_changed_data_before_the_user_says_so(
    tiny_config, copy, tmp_path
) -> None:
    run, short = tmp_path / "run", ["--config.train.steps=1", f"--config.data.root={copy}"]
    config = with_overrides(tiny_config, short)
    train(config, run)
    with h5py.File(copy / SESSION / "data_val.hdf5", "a") as file:
        file["trial_0001/input_features"][:] = 0
    with pytest.raises(DataError, match=rf"{SESSION}/data_val has other .*delete .*run/data.json"):
        train(config, run)
    (run / "data.json").unlink()
    assert train(config, run).finished
    assert len((run / "calls.jsonl").read_text().splitlines()) == 2


def test_a_fifo_in_the_place_of_the_fingerprint_is_refused_and_not_waited_for(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "data.json")
    with pytest.raises(OSError, match="no regular file"):
        check_same_data(tmp_path, {"dtype": "float32", "files": {}})
