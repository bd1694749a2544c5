"""The reader takes every file that the published loader takes, and names the faults of others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from b2txt_jax.data.description import (
    FILE_NAME,
    Block,
    DataError,
    DataWarning,
    corpora_of,
    read_description,
    trials_of,
    write_description,
)
from b2txt_jax.data.hdf5 import Hdf5Reader, session_file
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.trial import TrialRef, frames_needed

SESSION = "t15.2023.08.13"
LABEL = [16, 3, 21, 25, 40]  # HH AH L OW |


def write_trial(
    file: h5py.File,
    number: int,
    *,
    features: np.ndarray | None = None,
    bins: int | None = None,
    ids: list[int] | None = LABEL,
    seq_len: int | None = None,
    padded: int = 500,
    sentence: object = "Hello.",
    drop: tuple[str, ...] = (),
) -> None:
    """One trial as published, unless told otherwise; `drop` leaves datasets or attributes out."""
    rng = np.random.default_rng(number)
    if features is None:
        features = rng.normal(size=(60 + number, 512)).astype(np.float32)
    group = file.create_group(f"trial_{number:04d}")
    if "input_features" not in drop:
        group["input_features"] = features
    attributes = {
        "n_time_steps": len(features) if bins is None else bins,
        "session": SESSION,
        "block_num": 3,
        "trial_num": number,
    }
    if ids is not None:
        label = np.zeros(padded, np.int32)
        label[: len(ids)] = ids
        codes = np.zeros(500, np.int32)
        codes[:6] = [ord(letter) for letter in "Hello."]
        group["seq_class_ids"], group["transcription"] = label, codes
        attributes["seq_len"] = len(ids) if seq_len is None else seq_len
        attributes["sentence_label"] = sentence
    for name, value in attributes.items():
        if name not in drop and value is not None:
            group.attrs[name] = value
    for name in ("seq_class_ids", "transcription"):
        if name in drop:
            del group[name]


def write_session(
    root: Path, split: str = "train", session: str = SESSION, **trial: object
) -> Path:
    """A session's file with two whole trials and, between them, one made by `trial`."""
    path = root / session / f"data_{split}.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        write_trial(file, 0, ids=None if split == "test" else LABEL)
        write_trial(file, 1, **trial)  # type: ignore[arg-type]
        write_trial(file, 2, ids=None if split == "test" else LABEL)
    return path


def read_all(root: Path, split: str = "train", **options: object) -> list:
    reader = open_folder(root)
    refs = reader.trials([SESSION], split, **options)  # type: ignore[arg-type]
    return [reader.read(ref) for ref in refs]


def test_what_was_written_is_what_is_read(tmp_path: Path) -> None:
    path = write_session(tmp_path)
    first, second, third = read_all(tmp_path)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(second.features, file["trial_0001/input_features"][:])
    assert second.ref == TrialRef(SESSION, "trial_0001", path, 61, 5, 3, 1)
    assert second.ref.name == "t15.2023.08.13/trial_0001"
    assert second.labels.tolist() == LABEL
    assert second.labels.dtype == np.int32
    assert second.features.dtype == np.float32
    assert (first.sentence, third.ref.bins) == ("Hello.", 62)


def test_test_files_have_no_labels(tmp_path: Path) -> None:
    write_session(tmp_path, "test", ids=None)
    trials = read_all(tmp_path, "test")
    assert [(t.labels, t.sentence, t.ref.label_length) for t in trials] == [(None, None, 0)] * 3


def test_val_without_labels_is_refused_only_where_labels_are_needed(tmp_path: Path) -> None:
    write_session(tmp_path, "val", ids=None)
    assert read_all(tmp_path, "val")[1].labels is None
    with pytest.raises(DataError, match=r"data_val.hdf5 trial_0001 has no dataset `seq_class_ids`"):
        open_folder(tmp_path).trials([SESSION], "val", labels_needed=True)


@pytest.mark.parametrize("kind", ["float16", "float64", "int16"])
def test_any_number_type_is_read_as_float32(tmp_path: Path, kind: str) -> None:
    features = np.arange(20 * 512).reshape(20, 512) % 7
    write_session(tmp_path, features=features.astype(kind))
    np.testing.assert_array_equal(read_all(tmp_path)[1].features, features.astype(np.float32))


@pytest.mark.parametrize("text", [b"Caf\xc3\xa9.", np.bytes_(b"Caf\xc3\xa9."), "Café."])
def test_sentences_may_be_bytes_or_text(tmp_path: Path, text: object) -> None:
    write_session(tmp_path, sentence=text)
    assert read_all(tmp_path)[1].sentence == "Café."


@pytest.mark.parametrize("text", [5, b"Caf\xe9.", np.bytes_(b"Caf\xe9.")])
def test_a_sentence_that_is_no_text_is_refused(tmp_path: Path, text: object) -> None:
    write_session(tmp_path, sentence=text)
    with pytest.raises(DataError, match="needed UTF-8 text"):
        read_all(tmp_path)


def test_the_character_codes_stand_in_for_a_missing_sentence(tmp_path: Path) -> None:
    write_session(tmp_path, drop=("sentence_label",))
    assert read_all(tmp_path)[1].sentence == "Hello."


def test_neither_sentence_nor_codes_is_no_error(tmp_path: Path) -> None:
    write_session(tmp_path, drop=("sentence_label", "transcription", "session"))
    trial = read_all(tmp_path)[1]
    assert trial.sentence is None
    assert trial.labels.tolist() == LABEL


def test_rows_after_n_time_steps_are_padding(tmp_path: Path) -> None:
    features = np.full((50, 512), np.nan, np.float32)
    features[:30] = 1
    write_session(tmp_path, features=features, bins=30)
    assert read_all(tmp_path)[1].features.shape == (30, 512)


@pytest.mark.parametrize("padded", [5, 80, 1000])
def test_labels_may_be_padded_to_any_length(tmp_path: Path, padded: int) -> None:
    write_session(tmp_path, padded=padded)
    assert read_all(tmp_path)[1].labels.tolist() == LABEL


def test_attributes_may_have_any_integer_width_and_extras_are_ignored(tmp_path: Path) -> None:
    path = write_session(tmp_path)
    with h5py.File(path, "a") as file:
        group = file["trial_0001"]
        group.attrs["n_time_steps"] = np.uint8(61)
        group.attrs["seq_len"] = np.array([5], np.int64)
        group.attrs["block_num"] = 7.0
        group.attrs["temperature"] = "36.6"
        group["emg"] = np.zeros(4)
        file.create_group("notes")
    trial = read_all(tmp_path)[1]
    assert (trial.ref.bins, trial.ref.label_length, trial.ref.block) == (61, 5, 7)


def test_trials_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = session_file(tmp_path, SESSION, "train")
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        for number in (10_000, 3, 9_999):
            write_trial(file, number, features=np.ones((20, 512), np.float32))
    keys = [ref.key for ref in open_folder(tmp_path).trials([SESSION], "train")]
    assert keys == ["trial_0003", "trial_9999", "trial_10000"]


def test_sessions_without_the_split_are_passed_over_in_the_given_order(tmp_path: Path) -> None:
    later, train_only = "t15.2023.08.18", "t15.2023.08.11"
    for session in (SESSION, later):
        write_session(tmp_path, "val", session)
    write_session(tmp_path, "train", train_only)
    refs = open_folder(tmp_path).trials([later, train_only, SESSION], "val")
    assert [ref.session for ref in refs] == [later] * 3 + [SESSION] * 3
    assert open_folder(tmp_path).sessions == (train_only, SESSION, later)


def test_a_split_without_any_trial_is_refused(tmp_path: Path) -> None:
    write_session(tmp_path)
    with pytest.raises(DataError, match="no val trial in the 1 sessions"):
        open_folder(tmp_path).trials([SESSION], "val")


def test_an_unknown_session_names_its_nearest(tmp_path: Path) -> None:
    write_session(tmp_path)
    write_session(tmp_path, session="t15.2025.03.30")
    with pytest.raises(DataError, match=r"'t15.2023.08.31' has no data_train.*: t15.2023.08.13"):
        open_folder(tmp_path).trials([SESSION, "t15.2023.08.31"], "train")


def test_a_missing_folder_and_an_empty_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not there.*b2txt simulate"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no session"):
        open_folder(tmp_path).sessions  # noqa: B018


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    ref = TrialRef(SESSION, "trial_0000", tmp_path / "gone.hdf5", 60, 5, 1, 0)
    with pytest.raises(DataError, match=r"gone.hdf5 is not there"):
        open_folder(tmp_path).read(ref)


@pytest.mark.parametrize("kept", [0, 100, 5_000, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = write_session(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"data_train.hdf5 \(\d+ bytes\) cannot be opened as HDF5"):
        open_folder(tmp_path).trials([SESSION], "train")


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    write_session(tmp_path).write_text("id,text\n" * 1000)
    with pytest.raises(DataError, match="cannot be opened as HDF5"):
        open_folder(tmp_path).trials([SESSION], "train")


def test_damage_inside_a_file_is_named_whatever_it_hits(tmp_path: Path) -> None:
    path = write_session(tmp_path)
    whole = path.read_bytes()
    noise = np.random.default_rng(0)
    refused = read = 0
    starts = range(0, len(whole), len(whole) // 60)
    for start in starts:
        damaged = bytearray(whole)
        damaged[start : start + 200] = noise.bytes(len(damaged[start : start + 200]))
        path.write_bytes(bytes(damaged))
        try:
            read_all(tmp_path)
        except DataError as error:
            refused += "data_train.hdf5" in str(error)
        else:
            read += 1
    assert (refused > 0, refused + read) == (True, len(starts))


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        ({"drop": ("input_features",)}, "has no dataset `input_features`"),
        ({"drop": ("seq_class_ids",)}, "has no dataset `seq_class_ids`"),
        ({"drop": ("n_time_steps",)}, "has no attribute `n_time_steps`"),
        ({"drop": ("seq_len",)}, "has no attribute `seq_len`"),
        ({"drop": ("block_num",)}, "has no attribute `block_num`"),
        ({"features": np.ones((30, 500), np.float32)}, r"is \[30, 500\]; needed \[T, 512\]"),
        ({"features": np.ones(512, np.float32)}, r"is \[512\]; needed \[T, 512\]"),
        ({"features": np.full((30, 512), b"1.5", "S3")}, r"\|S3; needed float32 numbers"),
        ({"features": np.ones((30, 512), bool)}, "is bool; needed float32 numbers"),
        ({"bins": 62}, "`n_time_steps` is 62; needed 1 to 61"),
        ({"bins": 0}, "`n_time_steps` is 0; needed 1 to 61"),
        ({"bins": -5}, "`n_time_steps` is -5"),
        ({"bins": 30.5}, "`n_time_steps` is .*30.5.*; needed one whole number"),
        ({"bins": np.inf}, "`n_time_steps` is .*inf.*; needed one whole number"),
        ({"bins": -np.inf}, "`n_time_steps` is .*inf.*; needed one whole number"),
        ({"bins": "many"}, "`n_time_steps` is 'many'; needed one whole number"),
        ({"seq_len": 501}, "`seq_len` is 501; needed 0 to 500"),
        ({"seq_len": -1}, "`seq_len` is -1"),
        ({"ids": [16, 3, 41, 40]}, "id 41 at position 2 of 4; needed 1 to 40"),
        ({"ids": [-1, 3]}, "id -1 at position 0 of 2"),
        ({"seq_len": 6}, "id 0 at position 5 of 6"),
    ],
)
def test_each_fault_names_file_trial_field_found_and_needed(
    tmp_path: Path, trial: dict, message: str
) -> None:
    path = write_session(tmp_path, **trial)
    with pytest.raises(DataError, match=message) as caught:
        read_all(tmp_path)
    assert str(path) in str(caught.value)
    assert "trial_0001" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted_and_placed(tmp_path: Path, value: float) -> None:
    features = np.ones((30, 512), np.float32)
    features[12, 77] = features[20, 3] = value
    write_session(tmp_path, features=features)
    refs = open_folder(tmp_path).trials([SESSION], "train")
    with pytest.raises(DataError, match=r"trial_0001.*2 NaN or infinite.*bin 12, feature 77"):
        open_folder(tmp_path).read(refs[1])


def test_a_trial_shorter_than_a_patch_is_refused_where_a_patch_is_needed(tmp_path: Path) -> None:
    write_session(tmp_path, features=np.ones((9, 512), np.float32))
    assert read_all(tmp_path)[1].ref.bins == 9
    with pytest.raises(DataError, match=r"trial_0001.*9 bins; the model needs 14"):
        open_folder(tmp_path).trials([SESSION], "train", min_bins=14)


def test_other_feature_counts_are_read_when_asked_for(tmp_path: Path) -> None:
    path = session_file(tmp_path, SESSION, "train")
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        write_trial(file, 0, features=np.ones((20, 256), np.float32))
    reader = open_folder(tmp_path, 256)
    (ref,) = reader.trials([SESSION], "train")
    assert reader.read(ref).features.shape == (20, 256)


def test_a_reader_with_one_open_file_reads_what_single_reads_give(tmp_path: Path) -> None:
    sessions = [SESSION, "t15.2023.08.18", "t15.2023.08.20"]
    for session in sessions:
        write_session(tmp_path, session=session)
    refs = open_folder(tmp_path).trials(sessions, "train")
    order = np.random.default_rng(0).integers(0, len(refs), 60)
    with Hdf5Reader(tmp_path, open_files=1) as reader, ThreadPoolExecutor(4) as pool:
        trials = list(pool.map(lambda i: reader.read(refs[i]), order))
    for i, trial in zip(order, trials, strict=True):
        assert trial.ref == refs[i]
        with h5py.File(refs[i].path) as file:
            np.testing.assert_array_equal(trial.features, file[f"{refs[i].key}/input_features"])


@pytest.mark.parametrize(
    ("labels", "frames"), [([], 0), ([5], 1), ([5, 5], 3), ([5, 6, 5], 3), ([4, 4, 4, 40, 40], 8)]
)
def test_frames_needed_counts_a_blank_between_equal_labels(labels: list[int], frames: int) -> None:
    assert frames_needed(np.array(labels, np.int32)) == frames


PUBLISHED_TABLE = (
    "Date,Post-implant day,Block number,Number of sentences,Corpus,Split\r\n"
    "2023-08-11,25,2,20,50-Word,Train\r\n"
    "2023-08-13,27,8,40,Switchboard,Val/Test"
)


@pytest.mark.parametrize("folder", [".", "hdf5_data_final"])
def test_the_published_table_is_found_beside_or_above_the_sessions(
    tmp_path: Path, folder: str
) -> None:
    (tmp_path / "hdf5_data_final").mkdir()
    (tmp_path / "t15_copyTaskData_description.csv").write_bytes(PUBLISHED_TABLE.encode())
    corpora = read_description(tmp_path / folder)
    assert corpora == {("2023-08-11", 2): "50-Word", ("2023-08-13", 8): "Switchboard"}


@pytest.mark.parametrize("written", ["2023-08-11 00:00:00", "2023-08-11T00:00"])
def test_dates_with_a_time_are_read_as_dates(tmp_path: Path, written: str) -> None:
    table = tmp_path / "t15_copyTaskData_description.csv"
    table.write_text(PUBLISHED_TABLE.replace("2023-08-11", written))
    with warnings.catch_warnings(action="error"):
        corpora = corpora_of(tmp_path, [("t15.2023.08.11", 2), ("t15.2023.08.11", 3)])
    assert corpora == ["50-Word", None]


def test_a_table_without_any_of_the_blocks_is_warned_of(tmp_path: Path) -> None:
    table = tmp_path / "t15_copyTaskData_description.csv"
    table.write_text(PUBLISHED_TABLE.replace("2023-08-", "8/").replace(",25,", "/2023,25,"))
    with pytest.warns(DataWarning, match=r"first has the date '8/11/2023'.*needed dates such as"):
        assert corpora_of(tmp_path, [("t15.2023.08.11", 2)]) == [None]


def test_no_table_is_no_error_but_a_wrong_one_is(tmp_path: Path) -> None:
    assert read_description(tmp_path) == {}
    table = tmp_path / "t15_copyTaskData_description.csv"
    table.write_text("Date,Corpus\n2023-08-11,50-Word\n")
    with pytest.raises(DataError, match=r"needed also .'Block number'."):
        read_description(tmp_path)
    table.write_text(PUBLISHED_TABLE.replace(",2,20", ",two,20"))
    with pytest.raises(DataError, match=r"line 2: block number 'two'"):
        read_description(tmp_path)


def dangling(path: Path) -> None:
    path.symlink_to("/nowhere/data.hdf5")


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (dangling, r"18/data_test.hdf5 is a link to /nowhere/data.hdf5, which is not there"),
        (Path.mkdir, r"18/data_test.hdf5 is a folder"),
        (
            lambda path: path.with_suffix(".h5").touch(),
            r"data_test.h5 is there, and no data_test.h",
        ),
        (lambda path: path.with_suffix(".HDF5").touch(), r"data_test.HDF5 is there.*rename it"),
        (lambda path: path.with_suffix(".hdf5.gz").touch(), r"test.hdf5.gz is there.*unpack it"),
        (lambda path: path.with_suffix(".partial").touch(), r"data_test.partial is there"),
    ],
)
def test_what_stands_in_for_a_file_of_trials_is_an_error_and_not_a_session_without_them(
    tmp_path: Path, put: Callable[[Path], None], message: str
) -> None:
    write_session(tmp_path, "test", ids=None)
    later = write_session(tmp_path, session="t15.2023.08.18").parent
    put(later / "data_test.hdf5")
    with pytest.raises(DataError, match=message):
        open_folder(tmp_path).trials([SESSION, later.name], "test")


def test_a_session_whose_folder_is_a_dangling_link_is_an_error(tmp_path: Path) -> None:
    write_session(tmp_path)
    (tmp_path / "t15.2023.08.18").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"08.18 is a link to .*gone, which is not there"):
        open_folder(tmp_path).sessions  # noqa: B018


def test_a_session_with_files_of_another_ending_alone_is_an_error(tmp_path: Path) -> None:
    write_session(tmp_path)
    write_session(tmp_path, session="t15.2023.08.18").rename(
        tmp_path / "t15.2023.08.18/data_train.h5"
    )
    reader = open_folder(tmp_path)
    with pytest.raises(DataError, match=r"data_train.h5 is there, and no data_train.hdf5"):
        reader.trials(reader.sessions, "train")


def test_hidden_folders_are_no_sessions_and_others_without_trials_are_named(tmp_path: Path) -> None:
    write_session(tmp_path)
    for place in (".ipynb_checkpoints/data_val-checkpoint.hdf5", ".cache/data_val.hdf5"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).touch()
    with warnings.catch_warnings(action="error"):
        assert open_folder(tmp_path).sessions == (SESSION,)
    (tmp_path / "t15.2023.08.18").mkdir()
    (tmp_path / "t15.2023.08.18/data_val (1).hdf5").touch()
    with pytest.warns(DataWarning, match=r"no sessions, since.*: t15.2023.08.18 \(1 folders"):
        assert open_folder(tmp_path).sessions == (SESSION,)


def test_a_gap_in_the_numbers_of_a_split_is_named(tmp_path: Path) -> None:
    path = write_session(tmp_path, "test", ids=None)
    with h5py.File(path, "a") as file:
        del file["trial_0001"]
    with pytest.warns(
        DataWarning,
        match=rf"1 test trials are missing.*: {SESSION}/trial_0001; ids of a submission",
    ):
        assert len(open_folder(tmp_path).trials([SESSION], "test")) == 2
    with h5py.File(path, "a") as file:
        file.move("trial_0000", "trial_0005")
    with pytest.warns(
        DataWarning, match=r"4 test .*trial_0000 to trial_0001, .*0003 to trial_0004"
    ):
        open_folder(tmp_path).trials([SESSION], "test")


def test_sessions_without_a_split_are_named_unless_published_so(tmp_path: Path) -> None:
    sessions = [SESSION, "t15.2023.08.11", "t15.2023.08.18", "t15.2023.08.20"]
    write_session(tmp_path, "val")
    for session in sessions[1:3]:
        write_session(tmp_path, session=session)
    h5py.File(write_session(tmp_path, "val", sessions[3]), "w").close()
    with pytest.warns(DataWarning, match=r"2 of 4 sessions have no val trial: .*08.18, .*08.20;"):
        open_folder(tmp_path).trials(sessions, "val")
    with warnings.catch_warnings(action="error"):
        open_folder(tmp_path).trials(sessions[:2], "val")


def external_storage(group: h5py.Group, other: Path) -> None:
    other.write_bytes(bytes(60 * 512 * 4))
    del group["input_features"]
    place = [(str(other), 0, h5py.h5f.UNLIMITED)]
    group.create_dataset("input_features", (60, 512), "f4", external=place)
    group.attrs["n_time_steps"] = 60


def virtual(group: h5py.Group, other: Path) -> None:
    with h5py.File(other, "w") as file:
        file["x"] = np.zeros((60, 512), np.float32)
    layout = h5py.VirtualLayout((60, 512), "f4")
    layout[:] = h5py.VirtualSource(other, "x", (60, 512))
    del group["input_features"]
    group.create_virtual_dataset("input_features", layout)
    group.attrs["n_time_steps"] = 60


def linked(name: str) -> Callable[[h5py.Group, Path], None]:
    def link(group: h5py.Group, other: Path) -> None:
        group.file.flush()
        other.write_bytes(Path(group.file.filename).read_bytes())
        place, key = (group, name) if name else (group.file, "trial_0001")
        del place[key]
        place[key] = h5py.ExternalLink(other, f"trial_0001/{name}")

    return link


@pytest.mark.parametrize(
    "put",
    [external_storage, virtual, *map(linked, ("", "input_features", "seq_class_ids"))],
    ids=["external storage", "virtual", "trial", "features", "labels"],
)
def test_no_other_file_is_read_through_a_file_of_trials(
    tmp_path: Path, put: Callable[[h5py.Group, Path], None]
) -> None:
    with h5py.File(write_session(tmp_path), "a") as file:
        put(file["trial_0001"], tmp_path / "secret")
    with pytest.raises(DataError, match=r"is not in this file, but in .*secret; needed one file"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    "codes", [[-3, 5], [2**22, 5], [1e9, 5.0], [np.nan, 5.0], [b"abc"], [[67, 68]]]
)
def test_codes_that_are_no_characters_are_named(tmp_path: Path, codes: list) -> None:
    path = write_session(tmp_path, drop=("sentence_label", "transcription"))
    with h5py.File(path, "r+") as file:
        file["trial_0001"]["transcription"] = np.array(codes)
    with pytest.raises(DataError, match=r"trial_0001: `transcription` is .* needed integers"):
        read_all(tmp_path)


def test_a_wrong_label_is_found_when_trials_are_listed_before_any_is_read(tmp_path: Path) -> None:
    path = write_session(tmp_path, ids=[5, 3], drop=("seq_class_ids",))
    with h5py.File(path, "r+") as file:
        file["trial_0001"]["seq_class_ids"] = np.array([2**32 + 5, 3])  # 5 in 32 bits
    reader = Hdf5Reader(tmp_path)
    with pytest.raises(DataError, match="id 4294967301 at position 0 of 2"):
        reader.trials(reader.sessions, "train")


@pytest.mark.parametrize(("split", "number"), [("train", 3), ("val", 3), ("test", 3)])
def test_trials_missing_at_the_end_are_noticed_by_the_table_of_blocks(
    tmp_path: Path, split: str, number: int, recwarn: pytest.WarningsRecorder
) -> None:
    for one in ("train", "val", "test"):
        write_session(tmp_path, one)
    blocks = [(3, "Train"), (6, "Val/Test")]
    table = [Block("2023-08-13", 27, 3, count, "50-Word", kind) for count, kind in blocks]
    write_description(tmp_path / FILE_NAME, table)
    reader = Hdf5Reader(tmp_path)
    assert len(reader.trials([SESSION], split)) == number
    assert not recwarn
    with h5py.File(session_file(tmp_path, SESSION, split), "a") as file:
        del file[sorted(file)[-1]]
    with pytest.warns(DataWarning, match="may have lost its last trials"):
        reader.trials([SESSION], split)


@pytest.mark.parametrize("others", [8, 0], ids=["one of its sessions", "all of its sessions"])
def test_the_published_table_counts_sentences_that_are_in_no_file(
    tmp_path: Path, others: int
) -> None:
    table = [Block("2023-08-13", 27, 3, 8234 - others, "50-Word", "Train")]
    table += [Block("2023-08-18", 32, 1, others, "50-Word", "Train")] * bool(others)
    write_description(tmp_path / FILE_NAME, table)
    assert trials_of(tmp_path, [SESSION], "train") == (None if others else (8072, False))


def test_a_table_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes("Date,Block number,Corpus\n".encode("utf-16"))
    with pytest.raises(DataError, match="cannot be read"):
        read_description(tmp_path)
