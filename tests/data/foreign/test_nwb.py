"""`b2txt import nwb` and `falcon-h2`: small files of each exact schema, whole and broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from b2txt_jax import cli
from b2txt_jax.data.reader import open_folder
from b2txt_jax.phonemes import sentence_to_ids

Change = Callable[[h5py.File], None]
BRAND = ("--series", "thresholds_bins", "--series", "power_bins", "--text", "cue_text")
BRAND_SERIES, FALCON_SERIES = "acquisition/thresholds_bins", "acquisition/binned_spikes"


def series(
    file: h5py.File, name: str, data: np.ndarray, times: np.ndarray, unit: str = "none"
) -> None:
    group = file.create_group(f"acquisition/{name}")
    group.attrs["neurodata_type"] = "TimeSeries"
    group["data"], group["timestamps"] = data, times
    group["data"].attrs["unit"] = unit


def table(file: h5py.File, **columns: Any) -> None:
    group = file.create_group("intervals/trials")
    group.attrs["colnames"] = list(columns)
    for name, values in columns.items():
        group[name] = values
    group["id"] = np.arange(len(columns["start_time"]))


def features(width: float, count: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts and power of 3 channels, and times from a clock that began long before."""
    rng = np.random.default_rng(0)
    return rng.poisson(2, (count, 3)), rng.gamma(2, 5.0, (count, 3)), 1e5 + np.arange(count) * width


def brand(path: Path, width: float = 0.02) -> None:
    """A file as BRAND's exportNWB writes it, with a stream of trials and one of their texts.

    Its times of each stream's entries are a series of several columns, too.
    """
    counts, power, times = features(width)
    with h5py.File(path, "w") as file:
        file.attrs["nwb_version"] = "2.6.0"
        series(file, "thresholds_bins", counts.astype(np.int16), times)
        series(file, "power_bins", power.astype(np.float32), times)
        series(file, "thresholds_ts", np.stack([times, times], axis=1), times, "seconds")
        series(file, "unusual_monotonic_ts", np.zeros((2, 1)), times[:2], "s")
        at = times[[10, 50, 100, 200]]
        table(
            file,
            start_time=at,
            stop_time=at + 0.6,
            start_indicator=["start_trial"] * 4,
            stop_indicator=["end_trial"] * 4,
            go_cue=[np.nan, *at[1:]],
            cue_text=["hello world", "good", "I am here", "hello"],
            block_num=[1.0, 1.0, 2.0, 3.0],
        )


def falcon(path: Path) -> None:
    """A file of FALCON H2: trials 10 s apart, by gaps in the times."""
    rng = np.random.default_rng(1)
    lengths, step = [30, 25, 40], 0.02
    times = np.concatenate([np.arange(n) * step + 20.0 * i for i, n in enumerate(lengths)])
    with h5py.File(path, "w") as file:
        file.attrs["nwb_version"] = "2.7.0"
        series(file, "binned_spikes", rng.poisson(2, (95, 192)).astype(np.uint8), times)
        mask = np.ones(95, bool)
        mask[:4] = False
        series(file, "eval_mask", mask, times)
        starts = np.array([0.0, 20.0, 40.0])
        table(
            file,
            start_time=starts,
            stop_time=starts + 0.4,
            cue=["it's>me", "who?", "a,b~"],
            block_num=[4, 4, 7],
        )


FILES = {
    "nwb": ("day.nwb", brand, BRAND, 6),
    "falcon-h2": ("sub-T5-held-in-calib_ses-20220518.nwb", falcon, (), 192),
}


def imported(kind: str, folder: Path, *more: str) -> int:
    options = FILES[kind][2]
    return cli.main(
        ["import", kind, "--source", str(folder), "--out", str(folder / "out"), *options, *more]
    )


@pytest.mark.parametrize("width", [0.02, 0.01])
def test_trials_of_brands_export_are_cut_out_by_their_times(tmp_path: Path, width: float) -> None:
    brand(tmp_path / "day.nwb", width)
    assert imported("nwb", tmp_path) == 0
    with open_folder(tmp_path / "out/hdf5_data_final", 6) as reader:
        trials = [reader.read(ref) for ref in reader.find_trials(reader.sessions, "train")]
        assert [one.sentence for one in trials] == ["hello world", "good", "I am here"]
        (val,) = reader.find_trials(reader.sessions, "val")
        assert (val.session, val.block, val.bins) == ("day", 3, 30)
    counts, power, _ = features(width)
    merged = round(0.02 / width)
    both = np.hstack([counts, power])
    raw = [both[at : at + 30 * merged].reshape(30, merged, 6).mean(axis=1) for at in (10, 50)]
    block = np.vstack(raw)
    expected = (raw[0] - block.mean(axis=0)) / (block.std(axis=0) + 1e-8)
    np.testing.assert_allclose(trials[0].features, expected, atol=1e-4)
    np.testing.assert_array_equal(trials[0].labels, sentence_to_ids(["hello", "world"]))


def test_the_runs_of_a_day_in_brands_folders_are_blocks_of_one_session(tmp_path: Path) -> None:
    for name in ("T15_240813T0930_speech", "T15_240813T1100_speech", "T15_240815T0900_speech"):
        day = f"2024-08-{name[8:10]}"
        path = tmp_path / "T15" / day / "RawData/NWB" / f"{name}.nwb"
        path.parent.mkdir(parents=True, exist_ok=True)
        brand(path)
        with h5py.File(path, "a") as file:
            del file["acquisition/power_bins"]
            if "0930" in name:
                file["acquisition/thresholds_bins/data"][...] += 100
    options = ["--source", str(tmp_path / "T15"), "--out", str(tmp_path / "out")]
    # The times of the streams are no features: there is one series of several channels.
    assert cli.main(["import", "nwb", *options, "--text", "cue_text"]) == 0
    with open_folder(tmp_path / "out/hdf5_data_final", 3) as reader:
        assert reader.sessions == ("T15.2024.08.13", "T15.2024.08.15")
        train, val = (reader.find_trials(reader.sessions[:1], one) for one in ("train", "val"))
        assert [ref.block for ref in train] == [1, 1, 2, 3, 4, 4, 5]
        assert [ref.block for ref in val] == [6]  # the last block of the day, not of each file
        same = [reader.read(train[at]).features for at in (0, 4)]
    # The runs are normalised apart, so that the offset of one of them is gone.
    np.testing.assert_allclose(*same, atol=1e-4)


def test_a_copy_of_a_run_in_another_folder_is_no_further_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The last block is val, so that a copy would be learned from and scored.
    for folder in ("a", "backup"):
        (tmp_path / folder).mkdir()
        brand(tmp_path / folder / "T15_240813T0930_speech.nwb")
    assert imported("nwb", tmp_path) == 2
    assert "are of the same run" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_session_of_two_files_with_other_names_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        brand(tmp_path / folder / "day.nwb")
    assert imported("nwb", tmp_path) == 2
    assert "both hold the session day" in " ".join(capsys.readouterr().err.split())


def test_handwriting_has_letters_as_labels_and_no_masked_bin(tmp_path: Path) -> None:
    falcon(tmp_path / FILES["falcon-h2"][0])
    assert imported("falcon-h2", tmp_path) == 0
    with open_folder(tmp_path / "out/hdf5_data_final", 192) as reader:
        assert reader.sessions == ("t5.2022.05.18",)
        refs = reader.find_trials(reader.sessions, "train")
        assert [ref.bins for ref in refs] == [26, 25]
        first = reader.read(refs[0])
        (val,) = reader.find_trials(reader.sessions, "val")
        assert reader.read(val).sentence == "a,b."
    assert first.sentence == "it's me"
    assert first.labels is not None
    assert first.labels.tolist() == [9, 20, 27, 19, 40, 13, 5]


def test_splits_and_phonemes_of_a_file_are_used(tmp_path: Path) -> None:
    brand(tmp_path / "day.nwb")
    with h5py.File(tmp_path / "day.nwb", "a") as file:
        trials = file["intervals/trials"]
        trials["split"] = ["val", "train", "test", "train"]
        trials["phonemes"] = ["HH |", "G UH D |", "", "Z ZH"]
    assert imported("nwb", tmp_path, "--as-is") == 0
    with open_folder(tmp_path / "out/hdf5_data_final", 6) as reader:
        train = [reader.read(ref) for ref in reader.find_trials(reader.sessions, "train")]
        assert len(reader.find_trials(reader.sessions, "test")) == 1
    assert [one.labels.tolist() for one in train if one.labels is not None] == [
        [15, 33, 9, 40],
        [38, 39],
    ]
    counts, power, _ = features(0.02)
    np.testing.assert_allclose(
        train[0].features, np.hstack([counts, power])[50:80].astype(np.float32), rtol=1e-6
    )


def put(name: str, value: Any) -> Change:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return change


def drop(name: str) -> Change:
    return lambda file: file.__delitem__(name)


def shift(name: str, at: int, value: float) -> Change:
    def change(file: h5py.File) -> None:
        file[name][at] = value

    return change


def elsewhere(file: h5py.File) -> None:
    del file[f"{BRAND_SERIES}/data"]
    file[f"{BRAND_SERIES}/data"] = h5py.ExternalLink("other.hdf5", "/data")
    with h5py.File(Path(file.filename).parent / "other.hdf5", "w") as other:
        other["data"] = np.zeros((400, 3))


T = "intervals/trials"
TIMES = 1e5 + np.arange(400) * 0.02
BROKEN_NWB: list[tuple[Change, str]] = [
    (lambda file: file.attrs.__delitem__("nwb_version"), "no NWB file"),
    (drop(T), "no table of trials"),
    (drop(f"{T}/start_time"), "no table of trials"),
    (drop(f"{T}/stop_time"), "needed `stop_time` among them"),
    (drop(f"{T}/cue_text"), "needed `cue_text` among them"),
    (put(f"{T}/cue_text", np.arange(4)), "needed texts"),
    (put(f"{T}/cue_text", np.full(4, np.nan)), "3 trials have no text"),
    (put(f"{T}/cue_text", ["good", "", "good", "nan"]), "trials have no text"),
    (put(f"{T}/cue_text", ["good"] * 3), "needed one value for each trial"),
    (put(f"{T}/cue_text", [b"\xff", b"a", b"a", b"a"]), "needed UTF-8"),
    (put(f"{T}/block_num", [1, 1, 2, 2.5]), "is 2.5 in trial 3; needed whole numbers"),
    (put(f"{T}/block_num", [np.nan, 1, 2, 2]), "is nan in trial 0; needed whole numbers"),
    (put(f"{T}/block_num", ["a"] * 4), "needed whole numbers"),
    (put(f"{T}/start_time", ["a"] * 4), "needed seconds"),
    (shift(f"{T}/stop_time", 2, 0.0), "trial 2 lasts from"),
    (shift(f"{T}/stop_time", 2, np.nan), "trial 2 lasts from"),
    (put(f"{T}/start_time", TIMES[[10, 50, 100, 200]] + 900), "lasts from"),
    (lambda file: file.__setitem__(f"{T}/split", ["train", "dev", "val", "val"]), "['dev']"),
    (lambda file: file.__setitem__(f"{T}/phonemes", ["XX"] * 4), "the phoneme 'XX'"),
    (drop(BRAND_SERIES), "no time series thresholds_bins"),
    (drop(f"{BRAND_SERIES}/timestamps"), "neither timestamps nor a starting time"),
    (put(f"{BRAND_SERIES}/timestamps", TIMES[:300]), "needed one each"),
    (put(f"{BRAND_SERIES}/timestamps", TIMES[::-1]), "do not rise"),
    (put(f"{BRAND_SERIES}/timestamps", np.repeat(TIMES[::4], 4)), "share a time"),
    (put(f"{BRAND_SERIES}/timestamps", np.full(400, np.nan)), "do not rise"),
    (put(f"{BRAND_SERIES}/timestamps", 1e5 + np.arange(400) * 0.03), "every 30 ms"),
    (put(f"{BRAND_SERIES}/timestamps", 30 * TIMES), "every 600 ms"),
    (put(f"{BRAND_SERIES}/timestamps", TIMES + 0.02 * (np.arange(400) > 20)), "are missing"),
    (put(f"{BRAND_SERIES}/timestamps", TIMES + 500), "has no bins"),
    (shift(f"{T}/stop_time", 0, 1e5 + 9), "and thresholds_bins has samples from"),
    (put(f"{BRAND_SERIES}/timestamps", TIMES + 0.4), "it; needed all"),
    (put(f"{BRAND_SERIES}/data", np.full((400, 3), np.nan)), "NaN or infinite"),
    (put(f"{BRAND_SERIES}/data", ["a"] * 400), "needed numbers"),
    (elsewhere, "not in this file"),
]
F = FALCON_SERIES
BROKEN_FALCON: list[tuple[Change, str]] = [
    (lambda file: file.attrs.__delitem__("nwb_version"), "no NWB file"),
    (drop(T), "no table of trials"),
    (drop(f"{T}/cue"), "needed `cue` among them"),
    (drop(f"{T}/block_num"), "needed `block_num` among them"),
    (drop(F), "no time series binned_spikes"),
    (drop("acquisition/eval_mask"), "no time series eval_mask"),
    (drop(f"{F}/timestamps"), "neither timestamps nor"),
    (put(f"{F}/timestamps", np.arange(95) * 0.02), "3 trials in its table"),
    (put(f"{F}/timestamps", np.arange(95) * 0.01), "every 10 ms"),
    (put(f"{F}/timestamps", np.zeros(95)), "share a time"),
    (put(f"{F}/timestamps", -np.arange(95.0)), "do not rise"),
    (put(f"{F}/data", np.full((95, 192), np.inf)), "NaN or infinite"),
    (put(f"{F}/data", ["a"] * 95), "needed numbers"),
    (put(f"{F}/data", np.zeros((94, 192))), "needed one each"),
    (shift("acquisition/eval_mask/data", slice(0, 30), False), "has no bins"),  # type: ignore[arg-type]
    (put(f"{T}/cue", ["5", "b", "a"]), "the cue '5'"),
    (put(f"{T}/cue", ["", "b", "a"]), "the cue None"),
    (put(f"{T}/cue", [1, 2, 3]), "needed texts"),
    (put(f"{T}/cue", ["a", "b"]), "needed one value for each trial"),
    (put(f"{T}/cue", ["a" * 501] * 3), "needed 1 to 500"),
    (put(f"{T}/block_num", [0.5, 1, 1]), "needed whole numbers"),
]


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [("nwb", *one) for one in BROKEN_NWB] + [("falcon-h2", *one) for one in BROKEN_FALCON],
)
def test_a_broken_file_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, change: Change, says: str
) -> None:
    name, write, *_ = FILES[kind]
    write(tmp_path / name)
    with h5py.File(tmp_path / name, "a") as file:
        change(file)
    assert imported(kind, tmp_path) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert says in error
    assert str(tmp_path / name) in error
    assert not list(tmp_path.rglob("data_train.hdf5"))


def test_two_files_of_one_session_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "T5_2022.05.18_held_in_calib.nwb", FILES["falcon-h2"][0]
    for name in names:
        falcon(tmp_path / name)
    assert imported("falcon-h2", tmp_path) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in names)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", list(FILES))
def test_what_is_no_nwb_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    name, write, *_ = FILES[kind]
    assert imported(kind, tmp_path) == 2
    assert "needed" in capsys.readouterr().err
    write(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for content in (b"", b"text" * 100, whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(content)
        assert imported(kind, tmp_path) == 2
        assert "cannot be read as NWB" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["nwb", "falcon-h2"])
def test_options_that_files_with_labels_and_splits_have_no_use_for_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    name, write, _, _ = FILES[kind]
    write(tmp_path / name)
    (tmp_path / "lexicon.txt").write_text("good G UW D\n")
    with h5py.File(tmp_path / name, "a") as file:
        if kind == "nwb":
            file["intervals/trials/phonemes"] = ["HH |", "G UH D |", "Z", "Z ZH"]
            file["intervals/trials/split"] = ["val", "train", "train", "train"]
    for more in (["--skip-unknown"], ["--lexicon", str(tmp_path / "lexicon.txt")]):
        assert imported(kind, tmp_path, *more) == 2
        assert "has labels of its own" in " ".join(capsys.readouterr().err.split())
    if kind == "nwb":
        assert imported(kind, tmp_path, "--val-blocks", "2") == 2
        assert "has splits of its own" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    assert imported(kind, tmp_path) == 0


def test_a_series_that_is_named_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brand(tmp_path / "day.nwb")
    assert imported("nwb", tmp_path, "--series", "power_bins") == 2
    assert "--series power_bins is there 2 times" in " ".join(capsys.readouterr().err.split())


def test_the_names_of_several_series_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brand(tmp_path / "day.nwb")
    arguments = ["import", "nwb", "--source", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--text", "cue_text"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "2 time series of several channels (power_bins, thresholds_bins, thresh" in error
    assert "--series" in error
    assert cli.main([*arguments, "--log"]) == 2
    assert "--log belong to the format t12" in " ".join(capsys.readouterr().err.split())
