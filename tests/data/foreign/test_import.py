"""`b2txt import`: small files of each exact schema, whole and broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io

from b2txt_jax import cli
from b2txt_jax.data.reader import open_folder
from b2txt_jax.phonemes import sentence_to_ids

T12 = "train/t12.2022.04.28.mat"
INNER = "t16.2024.05.06_sentences_raw.mat"


def cells(values: list[Any]) -> np.ndarray:
    """A MATLAB cell array [1, N]."""
    out = np.empty((1, len(values)), object)
    out[0, :] = values
    return out


def t12_session(seed: int = 0, trials: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    lengths = [int(rng.integers(20, 40)) for _ in range(trials)]
    file = {
        f"tx{i}": cells([rng.poisson(2, (n, 256)).astype(np.uint8) for n in lengths])
        for i in range(1, 5)
    }
    text = ["Hello, the well-known world.", "It's good!", "I am here", "What's that?"]
    return file | {
        "spikePow": cells([rng.gamma(2, 5.0, (n, 256)) for n in lengths]),
        "sentenceText": np.array([f"{one:40}" for one in text[:trials]]),
        "blockIdx": np.array([[1], [1], [2], [2]])[:trials],
    }


def inner_session(size: int = 20) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    bins = 200
    return {
        "binnedTX": rng.poisson(2, (bins, 6)).astype(np.uint8),
        "spikePow": rng.gamma(2, 5.0, (bins, 6)),
        "blockNum": np.repeat([3, 4], bins // 2)[:, None],
        "goTrialEpochs": np.array([[1, 41], [60, 100], [101, 141], [150, 200]]),
        "delayTrialEpochs": np.array([[1, 1], [42, 59], [101, 101], [142, 149]]),
        "trialCues": np.array([[1], [3], [2], [1]]),
        "cueList": cells(["hello world", "good", "DO_NOTHING"]),
        "binSize": size,
    }


def save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, content)


def run(name: str, source: Path, out: Path, *more: str) -> int:
    return cli.main(["import", name, "--source", str(source), "--out", str(out), *more])


@pytest.fixture
def t12(tmp_path: Path) -> Path:
    for number, folder in enumerate(("train", "test", "competitionHoldOut")):
        content = t12_session(number)
        if folder == "competitionHoldOut":
            content["sentenceText"] = np.array([" " * 5] * 4)
        save(tmp_path / "source" / folder / "t12.2022.04.28.mat", content)
    return tmp_path / "source"


def test_t12_becomes_sessions_that_training_reads(t12: Path, tmp_path: Path) -> None:
    assert run("t12", t12, tmp_path / "out") == 0
    with open_folder(tmp_path / "out/hdf5_data_final", 256) as reader:
        assert reader.sessions == ("t12.2022.04.28",)
        trials = {s: reader.find_trials(reader.sessions, s) for s in ("train", "val", "test")}
        assert [len(one) for one in trials.values()] == [4, 4, 4]
        first = reader.read(trials["train"][0])
        assert reader.read(trials["test"][0]).labels is None
    assert first.sentence == "Hello, the well-known world."
    words = ["hello", "the", "well", "known", "world"]
    assert first.labels is not None
    # One silence after each word: none inside of a word with a hyphen.
    parts = [sentence_to_ids([word]) for word in words]
    np.testing.assert_array_equal(
        first.labels, np.concatenate([parts[0], parts[1], parts[2][:-1], parts[3], parts[4]])
    )
    content = t12_session(0)
    raw = [
        np.hstack([content["tx1"][0, i][:, :128], content["spikePow"][0, i][:, :128]])
        for i in range(4)
    ]
    together = np.vstack(raw[:2])  # the first block
    expected = (raw[0] - together.mean(axis=0)) / (together.std(axis=0) + 1e-8)
    np.testing.assert_allclose(first.features, expected, atol=1e-5)


def test_bins_of_10_ms_are_paired_counts_added_power_averaged(tmp_path: Path) -> None:
    content = inner_session(10)
    save(tmp_path / "s" / INNER, content)
    assert run("inner-speech", tmp_path / "s", tmp_path / "out", "--skip-cue", "DO_NOTHING") == 0
    with open_folder(tmp_path / "out/hdf5_data_final", 12) as reader:
        (train,) = reader.find_trials(reader.sessions, "train")
        val = reader.find_trials(reader.sessions, "val")
        trial = reader.read(train)
        assert [reader.read(one).sentence for one in val] == ["good", "hello world"]
    assert (train.bins, train.block, trial.sentence) == (20, 3, "hello world")  # of 41: one is left
    tx = content["binnedTX"][:40].astype(float).reshape(20, 2, 6).sum(axis=1)
    power = content["spikePow"][:40].reshape(20, 2, 6).mean(axis=1)
    both = np.hstack([tx, power])
    expected = (both - both.mean(axis=0)) / (both.std(axis=0) + 1e-8)
    np.testing.assert_allclose(trial.features, expected, atol=1e-5)


def test_the_last_block_with_words_is_for_validation_where_a_later_one_has_none(
    tmp_path: Path,
) -> None:
    content = inner_session()
    content["blockNum"] = np.repeat([3, 4, 5, 6], 50)[:, None]
    content["trialCues"] = np.array([[1], [2], [1], [3]])
    save(tmp_path / "s" / INNER, content)
    assert run("inner-speech", tmp_path / "s", tmp_path / "out", "--skip-cue", "DO_NOTHING") == 0
    with open_folder(tmp_path / "out/hdf5_data_final", 12) as reader:
        blocks = {
            split: [one.block for one in reader.find_trials(reader.sessions, split)]
            for split in ("train", "val")
        }
    assert blocks == {"train": [3, 4], "val": [5]}


def test_a_cue_to_skip_that_no_file_has_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "s" / INNER, inner_session())
    assert run("inner-speech", tmp_path / "s", tmp_path / "out", "--skip-cue", "do nothing") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "--skip-cue 'do nothing' is in no file; needed one of 'DO_NOTHING', 'good'" in error
    assert not (tmp_path / "out").exists()


def test_padding_keeps_crossings_and_power_in_their_halves(tmp_path: Path) -> None:
    save(tmp_path / "s" / INNER, inner_session())
    for out, more in (("a", ()), ("b", ("--pad-to", "20"))):
        options = ("--skip-cue", "DO_NOTHING", *more)
        assert run("inner-speech", tmp_path / "s", tmp_path / out, *options) == 0
    session = f"hdf5_data_final/{INNER.removesuffix('_raw.mat')}/data_train.hdf5"
    with h5py.File(tmp_path / "a" / session) as a, h5py.File(tmp_path / "b" / session) as b:
        plain, padded = a["trial_0000/input_features"][:], b["trial_0000/input_features"][:]
    np.testing.assert_array_equal(padded[:, :6], plain[:, :6])
    np.testing.assert_array_equal(padded[:, 10:16], plain[:, 6:])
    assert not padded[:, 6:10].any()
    assert not padded[:, 16:].any()


def test_unknown_words_are_listed_before_anything_is_written_and_a_lexicon_knows_them(
    t12: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = t12_session()
    content["sentenceText"] = np.array(["qzx hello", "good", "qzx", "zzyzx"])
    save(t12 / T12, content)
    assert run("t12", t12, tmp_path / "out") == 2
    assert "2 words have no pronunciation: qzx, zzyzx" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("t12", t12, tmp_path / "skip", "--skip-unknown") == 0
    assert "3 trials left out" in capsys.readouterr().err
    (tmp_path / "lexicon.txt").write_text("QZX K Z\nzzyzx Z IH K\n")
    assert run("t12", t12, tmp_path / "out", "--lexicon", str(tmp_path / "lexicon.txt")) == 0
    assert "12 trials" in capsys.readouterr().out


def test_an_import_goes_on_and_refuses_other_settings(
    t12: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("t12", t12, tmp_path / "out") == 0
    files = sorted((tmp_path / "out").rglob("*.hdf5"))
    kept = files[0].stat().st_ino
    files[1].unlink()
    assert run("t12", t12, tmp_path / "out") == 0
    assert files[0].stat().st_ino == kept
    assert files[1].exists()
    assert run("t12", t12, tmp_path / "out", "--log") == 2
    assert "other settings" in capsys.readouterr().err
    (tmp_path / "lexicon.txt").write_text("good G UW D\n")
    assert run("t12", t12, tmp_path / "out", "--lexicon", str(tmp_path / "lexicon.txt")) == 2
    assert "other settings" in capsys.readouterr().err


def test_blocks_for_validation_are_refused_where_the_format_has_splits(
    t12: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, blocks in (("t12", "2"), ("inner-speech", "-1")):
        assert run(name, t12, tmp_path / "out", "--val-blocks", blocks) == 2
        assert f"--val-blocks is {blocks} for {name}" in capsys.readouterr().err


def test_a_session_of_files_that_have_changed_is_not_taken_for_the_one_that_was_written(
    t12: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("t12", t12, tmp_path / "out") == 0
    save(t12 / T12, t12_session(trials=3))
    assert run("t12", t12, tmp_path / "out") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "data_train.hdf5 was written of t12.2022.04.28.mat" in error


def change(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update({name: value})


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(name)


def trial(name: str, index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[name].__setitem__((0, index), value)


NAN = np.full((20, 256), np.nan)
BROKEN_T12 = [
    (drop("tx1"), "has no tx1"),
    (drop("spikePow"), "has no spikePow"),
    (drop("sentenceText"), "has no sentenceText"),
    (drop("blockIdx"), "has no blockIdx"),
    (change("blockIdx", np.array([[1], [1], [2]])), "3 in `blockIdx`"),
    (change("blockIdx", np.array([1, 1, 2, 2.5])), "needed whole numbers"),
    (change("blockIdx", np.array([1, 1, 2, np.nan])), "needed whole numbers"),
    (change("blockIdx", np.array(["a", "b", "c", "d"])), "needed whole numbers"),
    (change("sentenceText", np.array(["hello"])), "1 in `sentenceText`"),
    (change("sentenceText", np.arange(4)), "needed texts"),
    (change("sentenceText", np.array(["hello", "", "good", "good"])), "has 0 phonemes"),
    (change("sentenceText", np.array(["hello " * 200, *"abc"])), "needed 1 to 500"),
    (trial("tx1", 1, np.zeros((0, 256))), "trial 1 of `tx1` has no bins"),
    (trial("tx1", 1, np.zeros((9, 256))), "trial 1 of `tx1` has 9 bins, of `spikePow`"),
    (trial("tx1", 1, np.zeros((20, 64))), "at least 128 channels"),
    (trial("tx1", 1, np.zeros((20, 256, 2))), "at least 128 channels"),
    (trial("spikePow", 2, NAN), "trial 2 of `spikePow` has 5120 NaN"),
    (trial("spikePow", 2, "text"), "trial 2 of `spikePow`"),
    (change("tx1", cells([np.zeros((20, 256))] * 5)), "5 trials in `tx1`"),
]
BROKEN_INNER = [
    (drop("binnedTX"), "has no binnedTX"),
    (drop("spikePow"), "has no spikePow"),
    (drop("cueList"), "has no cueList"),
    (drop("trialCues"), "has no trialCues"),
    (drop("goTrialEpochs"), "has no goTrialEpochs"),
    (drop("blockNum"), "has no blockNum"),
    (drop("binSize"), "has no binSize"),
    (change("binSize", 15), "is [15] ms; needed 10 or 20"),
    (change("binSize", np.array([20, 20])), "needed 10 or 20"),
    (change("blockNum", np.ones((9, 1))), "needed bins from 1 to 9"),
    (change("blockNum", np.full((200, 1), 0.5)), "needed whole numbers"),
    (change("trialCues", np.array([1, 2, 3, 4])), "from 1 to 4; needed 1 to 3"),
    (change("trialCues", np.array([0, 1, 1, 1])), "from 0 to 1; needed 1 to 3"),
    (change("trialCues", np.array([1, 1])), "a cue for each trial"),
    (change("goTrialEpochs", np.array([1, 2, 3, 4])), "needed [trials, 2]"),
    (change("goTrialEpochs", np.array([[0, 9]] + [[1, 9]] * 3)), "trial 0 of `goTrialEpochs`"),
    (change("goTrialEpochs", np.array([[1, 9]] * 3 + [[9, 8]])), "is [9, 8]; needed bins"),
    (change("goTrialEpochs", np.array([[1, 9]] * 3 + [[9, 201]])), "is [9, 201]"),
    (change("spikePow", np.full((200, 6), np.inf)), "1200 NaN or infinite values"),
    (change("spikePow", np.zeros((199, 6))), "199 in `spikePow`"),
    (change("cueList", cells(["a", 3, "b"])), "needed texts"),
]


@pytest.mark.parametrize(
    ("name", "mend", "says"),
    [("t12", *one) for one in BROKEN_T12] + [("inner-speech", *one) for one in BROKEN_INNER],
)
def test_a_broken_recording_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    mend: Callable[[dict[str, Any]], None],
    says: str,
) -> None:
    content = t12_session() if name == "t12" else inner_session()
    mend(content)
    file = tmp_path / "source" / (T12 if name == "t12" else INNER)
    save(file, content)
    more = () if name == "t12" else ("--skip-cue", "DO_NOTHING")
    assert (
        run(name, file.parents[1] if name == "t12" else file.parent, tmp_path / "out", *more) == 2
    )
    error = capsys.readouterr().err
    assert says in error
    assert str(file) in error
    assert not list(tmp_path.rglob("data_train.hdf5"))


def test_what_is_no_matlab_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "source" / T12
    save(file, t12_session())
    whole = file.read_bytes()
    for content, says in (
        (whole[: len(whole) // 2], "whole file"),
        (b"", "whole file"),
        (b"not a MATLAB file" * 50, "whole file"),
    ):
        file.write_bytes(content)
        assert run("t12", tmp_path / "source", tmp_path / "out") == 2
        assert says in capsys.readouterr().err
    with h5py.File(file, "w", userblock_size=512) as newer:
        newer["tx1"] = 1
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    with file.open("r+b") as stream:
        stream.write(header)
    assert run("t12", tmp_path / "source", tmp_path / "out") == 2
    assert "version 7.3" in capsys.readouterr().err
    file.unlink()
    assert run("t12", tmp_path / "source", tmp_path / "out") == 2
    assert "holds no T12 recording" in capsys.readouterr().err
