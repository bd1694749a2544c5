"""`b2txt export --nwb`: what pynwb and `b2txt import nwb` read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pynwb
import pytest
import yaml

from b2txt_jax import cli
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.write_hdf5 import write_trial

SESSION = "t15.2023.08.13"
ABOUT: dict[str, Any] = {
    "session_description": "attempted speech",
    "institution": "University",
    "lab": "Laboratory",
    "unit": "z-score",
    "subject": {"subject_id": "T15", "species": "Homo sapiens", "sex": "M", "age": "P45Y"},
    "sessions": {SESSION: {"session_start_time": "2023-08-13T10:00:00-07:00"}},
    "keywords": ["speech"],
    "series": [
        {"name": "crossings", "columns": [0, 4], "description": "threshold crossings"},
        {"name": "power", "columns": [4, 6]},
    ],
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "sessions" / SESSION
    folder.mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        with h5py.File(folder / f"data_{split}.hdf5", "w") as file:
            for index in range(count):
                group = file.create_group(f"trial_{index:04d}")
                values = rng.normal(size=(20 + index, 6)).astype(np.float32)
                known = (np.array([16, 6, 40]), "hi") if split == "train" else (None, None)
                write_trial(group, SESSION, 5, 2 * index + 1, values, *known)
    return tmp_path / "sessions"


def exported(source: Path, about: Any) -> int:
    metadata = source.parent / "about.yaml"
    metadata.write_text(about if isinstance(about, str) else yaml.safe_dump(about))
    options = ["--source", str(source), "--metadata", str(metadata), "--features", "6"]
    return cli.main(["export", "--nwb", str(source.parent / "nwb"), *options])


def test_pynwb_reads_and_validates_what_is_exported(source: Path) -> None:
    assert exported(source, ABOUT) == 0
    path = source.parent / f"nwb/{SESSION}.nwb"
    assert not pynwb.validate(path=str(path))
    with pynwb.NWBHDF5IO(path, "r") as stream:
        file = stream.read()
        assert file.session_start_time.isoformat() == "2023-08-13T10:00:00-07:00"
        assert (file.subject.subject_id, file.lab, file.session_id) == (
            "T15",
            "Laboratory",
            SESSION,
        )
        series = file.acquisition["crossings"]
        assert (series.rate, series.unit, series.data.shape) == (50.0, "z-score", (104, 4))
        trials = file.trials.to_dataframe()
    assert trials["sentence"].tolist() == ["hi"] * 3 + [""] * 2
    assert trials["phonemes"].tolist() == ["HH AY |"] * 3 + [""] * 2
    np.testing.assert_allclose(trials["stop_time"], [0.4, 0.82, 1.26, 1.66, 2.08])


def test_an_exported_session_is_imported_as_it_was(source: Path, tmp_path: Path) -> None:
    assert exported(source, ABOUT) == 0
    options = ["--source", str(tmp_path / "nwb"), "--out", str(tmp_path / "back"), "--as-is"]
    assert cli.main(["import", "nwb", *options, "--series", "crossings", "--series", "power"]) == 0
    with open_folder(source, 6) as before, open_folder(tmp_path / "back/hdf5_data_final", 6) as now:
        assert now.sessions == before.sessions
        for split in ("train", "test"):
            pairs = zip(*(one.find_trials((SESSION,), split) for one in (before, now)), strict=True)
            for old, new in pairs:
                was, is_ = before.read(old), now.read(new)
                np.testing.assert_array_equal(was.features, is_.features)
                assert (was.sentence, old.block) == (is_.sentence, new.block)
                assert old.trial == new.trial
                assert (was.labels is None) == (is_.labels is None)
                if was.labels is not None and is_.labels is not None:
                    np.testing.assert_array_equal(was.labels, is_.labels)


def test_a_file_of_other_metadata_or_trials_is_not_taken_for_the_one_asked_for(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = source.parent / f"nwb/{SESSION}.nwb"
    assert exported(source, ABOUT) == 0
    kept = path.stat().st_ino
    # Of the same, it is kept, also when the metadata know of a further session.
    more = {"sessions": ABOUT["sessions"] | {"t15.2023.08.18": {"session_start_time": "later"}}}
    assert exported(source, ABOUT | more) == 0
    changes: list[dict[str, Any]] = [
        {"lab": "Another"},
        {"sessions": {SESSION: {"session_start_time": "2023-08-13T11:00:00-07:00"}}},
        {"series": ABOUT["series"][:1]},
    ]
    for change in changes:
        capsys.readouterr()
        assert exported(source, ABOUT | change) == 2
        assert "other metadata, series or trials" in " ".join(capsys.readouterr().err.split())
    assert path.stat().st_ino == kept
    with h5py.File(source / SESSION / "data_train.hdf5", "a") as file:
        file["trial_0001/input_features"][0] += 1
    assert exported(source, ABOUT) == 2
    path.unlink()
    assert exported(source, ABOUT) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lab": None}, "lacks lab"),
        ({"unit": ""}, "lacks unit"),
        ({"subject": {"subject_id": "T15"}}, "lacks subject.species, subject.sex, subject.age"),
        ({"subject": {**ABOUT["subject"], "name": "A B"}}, "unknown keys subject.name"),
        ({"subject": None}, "lacks subject"),
        ({"sessions": {"other": {}}}, f"lacks sessions.{SESSION}.session_start_time"),
        ({"sessions": {SESSION: {"session_start_time": "2023-08-13"}}}, "with its zone"),
        ({"sessions": {SESSION: {"session_start_time": "2023-08-13T10:00:00"}}}, "with its zone"),
        ({"sessions": {SESSION: None}}, "with its zone"),
        ({"hobby": "chess"}, "unknown keys hobby"),
        ({"series": [{"name": "a", "columns": [0, 7]}]}, "of the 6 features"),
        ({"series": [{"name": "a", "columns": [3, 3]}]}, "of the 6 features"),
        ({"series": [{"columns": [0, 3]}]}, "needed a name"),
        ({"series": "all"}, "needed a name"),
        ({"series": [{"name": "a", "columns": [0, 3]}] * 2}, "a different one for each"),
    ],
)
def test_metadata_that_lack_something_are_refused_with_an_example(
    source: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], says: str
) -> None:
    assert exported(source, ABOUT | change) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(source.parent.glob("nwb/*"))


def test_metadata_that_are_no_yaml_are_refused(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, says in (("a: [", "needed YAML"), ("- a", "holds list")):
        assert exported(source, text) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert says in error
        assert "session_start_time: 2023-08-13T10:00:00-07:00" in error
