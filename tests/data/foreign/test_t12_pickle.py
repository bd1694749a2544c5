"""`b2txt import t12-pickle`: the competition's pickle, whole and broken."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from b2txt_jax import cli
from b2txt_jax.data.reader import open_folder

Content = dict[str, Any]


def day(texts: list[Any], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    lengths = [20 + 3 * index for index in range(len(texts))]
    labels = np.zeros((len(texts), 500), np.int32)
    labels[:, :3] = [16, 6, 40]
    return {
        "sentenceDat": [rng.normal(size=(count, 256)) for count in lengths],
        "transcriptions": texts,
        "phonemes": list(labels),
        "timeSeriesLens": np.array(lengths),
        "phoneLens": np.full(len(texts), 3),
        "phonePerTime": 3 / np.array(lengths, np.float32),
    }


def content() -> Content:
    codes = np.zeros(500, np.int32)
    codes[:3] = list(map(ord, "Hi."))
    return {
        "train": [day(["Hi there qzx", np.str_("Hi ")], 0), day([codes], 1)],
        "test": [day(["hi"], 2)],
        "competition": [day(["", ""], 3)],
    }


def imported(found: Any, folder: Path) -> int:
    path = folder / "ptDecoder_ctc"
    path.write_bytes(pickle.dumps(found))
    return cli.main(["import", "t12-pickle", "--source", str(path), "--out", str(folder / "out")])


def test_pronunciations_are_refused_since_it_has_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ptDecoder_ctc"
    path.write_bytes(pickle.dumps(content()))
    command = ["import", "t12-pickle", "--source", str(path), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--skip-unknown"]) == 2
    assert "has labels of its own" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_days_become_sessions_with_their_own_labels_and_unchanged_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = content()
    assert imported(found, tmp_path) == 0
    assert "2 of 24 days, which are named as the first ones" in capsys.readouterr().err
    with open_folder(tmp_path / "out/hdf5_data_final", 256) as reader:
        first, second, fifth = reader.sessions
        # The competition holds out sentences of 15 days, the first of which is the fifth.
        assert (first, second, fifth) == ("t12.2022.04.28", "t12.2022.05.05", "t12.2022.05.24")
        train = [reader.read(one) for one in reader.find_trials((first, second), "train")]
        assert len(reader.find_trials((first,), "val")) == 1
        held_out = [reader.read(one) for one in reader.find_trials((fifth,), "test")]
    assert [one.sentence for one in train] == ["Hi there qzx", "Hi", "Hi."]
    for one in train:
        assert one.labels is not None
        assert one.labels.tolist() == [16, 6, 40]
    raw = found["train"][0]["sentenceDat"][1].astype(np.float32)
    np.testing.assert_array_equal(train[1].features, raw)
    assert [(one.labels, one.sentence) for one in held_out] == [(None, None)] * 2


def change(name: str, value: Any) -> Callable[[Content], Any]:
    return lambda found: found["train"][0].update({name: value})


def entry(name: str, value: Any) -> Callable[[Content], Any]:
    return lambda found: found["train"][0][name].__setitem__(1, value)


def drop(name: str) -> Callable[[Content], Any]:
    return lambda found: found["train"][0].pop(name)


BROKEN: list[tuple[Callable[[Content], Any], str]] = [
    (lambda found: found.clear(), "needed a dict of train, test, competition"),
    (lambda found: found.update(train=found["train"] * 13), "has 26 days"),
    (lambda found: found.update(competition=found["test"] * 16), "has 16 days"),
    (lambda found: found.update(train={"a": 1}), "has dict days"),
    (lambda found: found.update(train=[3]), "day 0 of `train` is int"),
    (drop("sentenceDat"), "has no `sentenceDat`"),
    (drop("transcriptions"), "has no `transcriptions`"),
    (drop("phonemes"), "has no `phonemes`"),
    (drop("timeSeriesLens"), "has no `timeSeriesLens`"),
    (drop("phoneLens"), "has no `phoneLens`"),
    (change("phoneLens", 7), "has int as `phoneLens`"),
    (change("phoneLens", [3]), "1 in `phoneLens`"),
    (change("transcriptions", ["a"]), "1 in `transcriptions`"),
    (entry("timeSeriesLens", 19), "has 23 bins, by `timeSeriesLens` 19"),
    (change("timeSeriesLens", [20, 23.5]), "needed whole numbers"),
    (entry("sentenceDat", np.zeros((0, 256))), "has no bins"),
    (entry("sentenceDat", np.zeros(256)), "needed numbers [bins"),
    (entry("sentenceDat", np.full((23, 256), np.nan)), "NaN or infinite"),
    (entry("transcriptions", np.array([-1, 5])), "needed character codes"),
    (entry("transcriptions", np.array(["a"])), "needed whole numbers"),
    (entry("phonemes", np.array([1, 41, 3])), "ids from 1 to 41"),
    (entry("phonemes", np.array([1, 0, 3])), "ids from 0 to 3"),
    (entry("phoneLens", 501), "`phoneLens` is 501"),
    (entry("phoneLens", 0), "`phoneLens` is 0"),
]


@pytest.mark.parametrize(("mend", "says"), BROKEN)
def test_a_broken_pickle_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mend: Callable[[Content], Any],
    says: str,
) -> None:
    found = content()
    mend(found)
    assert imported(found, tmp_path) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert says in error
    assert "ptDecoder_ctc" in error
    assert not list(tmp_path.rglob("data_train.hdf5"))


class Runs:
    """Unpickled, it would end this process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (__import__("os")._exit, (3,))


def test_a_pickle_that_runs_code_or_is_cut_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imported({"train": [Runs()]}, tmp_path) == 2
    assert "may run code" in capsys.readouterr().err
    path = tmp_path / "cut"
    path.write_bytes(pickle.dumps(content())[:1000])
    arguments = ["import", "t12-pickle", "--source", str(path), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert "no readable pickle" in capsys.readouterr().err
    path.unlink()
    assert cli.main(arguments) == 2
    assert "formatCompetitionData" in capsys.readouterr().err
