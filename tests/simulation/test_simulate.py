"""Simulated sessions: the published layout to the letter, made by the settings alone."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from b2txt_jax.data.description import DataError, read_description
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.trial import Trial, frames_needed
from b2txt_jax.phonemes import PHONEME_IDS, SILENCE_ID, sentence_to_ids
from b2txt_jax.simulation import neural, speech
from b2txt_jax.simulation.corpus import CORPORA, load_pool
from b2txt_jax.simulation.plan import SESSIONS, SimulationSettings, plan_sessions
from b2txt_jax.simulation.write import add_arguments, modulation, run, simulate
from lm_server.lexicon.text_rules import normalise

SMALL = SimulationSettings(sessions=3, train=9, val=3, test=4, seed=5)
TABLE = "t15_copyTaskData_description.csv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated")
    simulate(out, SMALL)
    return out


def files_of(folder: Path) -> dict[str, Path]:
    root = folder / "hdf5_data_final"
    return {str(path.relative_to(root)): path for path in sorted(root.rglob("*.hdf5"))}


def trials_of(folder: Path, split: str) -> list[Trial]:
    root = folder / "hdf5_data_final"
    reader = open_folder(root)
    return [reader.read(ref) for ref in reader.trials(reader.sessions, split)]


def contents(path: Path) -> dict:
    """Everything in a file, comparable."""
    found: dict = {}

    def note(name: str, thing: h5py.Group | h5py.Dataset) -> None:
        attributes = {key: (type(value), value) for key, value in thing.attrs.items()}
        data = thing[()].tobytes() if isinstance(thing, h5py.Dataset) else None
        found[name] = (attributes, data, getattr(thing, "dtype", None))

    with h5py.File(path) as file:
        file.visititems(note)
    return found


def test_the_first_session_has_train_sentences_only(folder: Path) -> None:
    expected = {f"{SESSIONS[0]}/data_train.hdf5"} | {
        f"{session}/data_{split}.hdf5"
        for session in SESSIONS[1:3]
        for split in ("train", "val", "test")
    }
    assert set(files_of(folder)) == expected


@pytest.mark.parametrize("split", ["train", "val"])
def test_labelled_files_have_the_published_groups_types_and_padding(
    folder: Path, split: str
) -> None:
    session = SESSIONS[1]
    with h5py.File(folder / "hdf5_data_final" / session / f"data_{split}.hdf5") as file:
        count = getattr(SMALL, split)
        assert list(file) == [f"trial_{i:04d}" for i in range(count)]
        for group in file.values():
            assert set(group) == {"input_features", "seq_class_ids", "transcription"}
            assert set(group.attrs) == {
                "n_time_steps",
                "seq_len",
                "sentence_label",
                "session",
                "block_num",
                "trial_num",
            }
            features, ids, codes = (
                group[name][:] for name in ("input_features", "seq_class_ids", "transcription")
            )
            assert (features.dtype, ids.dtype, codes.dtype) == (np.float32, np.int32, np.int32)
            assert (features.shape[1], ids.shape, codes.shape) == (512, (500,), (500,))
            assert group.attrs["n_time_steps"] == len(features)
            assert group.attrs["session"] == session
            sentence = group.attrs["sentence_label"]
            assert isinstance(sentence, str)
            length = group.attrs["seq_len"]
            label = sentence_to_ids(normalise(sentence).split())
            np.testing.assert_array_equal(ids, np.pad(label, (0, 500 - len(label))))
            assert length == len(label)
            assert ids[length - 1] == SILENCE_ID
            assert bytes(codes[: len(sentence)].astype(np.uint8)).decode() == sentence
            assert not codes[len(sentence) :].any()


def test_test_files_have_no_labels(folder: Path) -> None:
    with h5py.File(folder / "hdf5_data_final" / SESSIONS[2] / "data_test.hdf5") as file:
        assert len(file) == SMALL.test
        for group in file.values():
            assert set(group) == {"input_features"}
            assert set(group.attrs) == {"n_time_steps", "session", "block_num", "trial_num"}


def test_the_table_lists_every_block_as_published(folder: Path) -> None:
    with (folder / TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "Date",
        "Post-implant day",
        "Block number",
        "Number of sentences",
        "Corpus",
        "Split",
    ]
    first = rows[0]
    assert (first["Date"], first["Post-implant day"]) == ("2023-08-11", "25")
    assert {row["Split"] for row in rows} == {"Train", "Val/Test"}
    assert {row["Corpus"] for row in rows} <= set(CORPORA)
    days = {row["Date"]: int(row["Post-implant day"]) for row in rows}
    implanted = {datetime.date.fromisoformat(d) - datetime.timedelta(n) for d, n in days.items()}
    assert len(implanted) == 1
    told = {
        (row["Date"], int(row["Block number"])): int(row["Number of sentences"]) for row in rows
    }
    counted: dict = {}
    for split in ("train", "val", "test"):
        for trial in trials_of(folder, split):
            key = (trial.ref.session[4:].replace(".", "-"), trial.ref.block)
            counted[key] = counted.get(key, 0) + 1
    assert told == counted


def test_a_block_holds_sentences_of_the_corpus_that_the_table_names(folder: Path) -> None:
    corpora = read_description(folder / "hdf5_data_final")
    for split in ("train", "val"):
        corpus_of = dict(load_pool(split))
        for trial in trials_of(folder, split):
            date = trial.ref.session[4:].replace(".", "-")
            assert corpora[date, trial.ref.block] == corpus_of[str(trial.sentence)]


def test_sentences_are_in_no_two_trials_nor_in_the_text_of_the_language_model(
    folder: Path,
) -> None:
    shown = [normalise(str(t.sentence)) for s in ("train", "val") for t in trials_of(folder, s)]
    assert len(shown) == 3 * 9 + 2 * 3
    text = (folder / "language_model_text.txt").read_text().splitlines()
    assert len(set(shown)) == len(shown)
    assert not set(shown) & set(text)
    # Test sentences are not in the files: the plan tells them.
    everything = [
        normalise(sentence.text)
        for plan in plan_sessions(SMALL).values()
        for block in plan
        for sentence in block.sentences
    ]
    assert len(set(everything)) == len(everything) == 3 * 9 + 2 * 7
    assert not set(everything) & set(text)


def test_every_label_can_be_aligned_with_the_published_patches(folder: Path) -> None:
    for trial in (*trials_of(folder, "train"), *trials_of(folder, "val")):
        assert trial.labels is not None
        assert (trial.ref.bins - 14) // 4 + 1 >= frames_needed(trial.labels)


def test_even_the_fastest_speech_can_be_aligned() -> None:
    rng = np.random.default_rng(0)
    table = speech.articulation()
    labels = sentence_to_ids(
        ["the", "best", "sixth", "street", "bookkeeper", "unnaturally", "misspelled", "it"]
    )
    for _ in range(50):
        bins = len(speech.attempt(labels, table, 3.0, rng))
        assert (bins - 14) // 4 + 1 >= frames_needed(labels)


def test_a_seven_word_sentence_takes_six_to_eight_seconds() -> None:
    rng = np.random.default_rng(0)
    table = speech.articulation()
    labels = sentence_to_ids(["you", "can", "see", "the", "code", "right", "now"])
    longer = sentence_to_ids(
        ["several", "people", "noticed", "another", "different", "question", "yesterday"]
    )
    seconds = [0.02 * len(speech.attempt(labels, table, 1.0, rng)) for _ in range(50)]
    more = [0.02 * len(speech.attempt(longer, table, 1.0, rng)) for _ in range(50)]
    assert 4 < np.mean(seconds) < 6 < np.mean(more) < 11


def test_features_are_z_scored_over_each_block(folder: Path) -> None:
    session = SESSIONS[1]
    blocks: dict[int, list[np.ndarray]] = {}
    for split in ("train", "val", "test"):
        for trial in trials_of(folder, split):
            if trial.ref.session == session:
                blocks.setdefault(trial.ref.block, []).append(trial.features)
    assert len(blocks) >= 2
    for features in blocks.values():
        stacked = np.concatenate(features).astype(np.float64)
        np.testing.assert_allclose(stacked.mean(axis=0), 0, atol=1e-3)
        std = stacked.std(axis=0)
        np.testing.assert_allclose(std[std > 0], 1, atol=1e-3)


def test_the_same_settings_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    simulate(tmp_path, SMALL)
    again = files_of(tmp_path)
    for name, path in files_of(folder).items():
        assert contents(path) == contents(again[name]), name
    for name in (TABLE, "simulation.json", "language_model_text.txt"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_another_seed_gives_other_sentences_and_other_features(
    folder: Path, tmp_path: Path
) -> None:
    simulate(tmp_path, dataclasses.replace(SMALL, sessions=2, seed=6))
    first, second = (trials_of(place, "train") for place in (folder, tmp_path))
    assert not {t.sentence for t in first} & {t.sentence for t in second}
    assert not np.array_equal(first[0].features[:50], second[0].features[:50])


def test_a_session_is_the_same_however_many_are_asked_for_and_more_can_be_added(
    folder: Path, tmp_path: Path
) -> None:
    simulate(tmp_path, dataclasses.replace(SMALL, sessions=2))
    first = files_of(tmp_path)
    times = {name: path.stat().st_mtime_ns for name, path in first.items()}
    simulate(tmp_path, SMALL)
    every = files_of(tmp_path)
    assert {name: every[name].stat().st_mtime_ns for name in times} == times
    assert set(every) == set(files_of(folder))
    for name, path in files_of(folder).items():
        assert contents(path) == contents(every[name]), name


def test_fewer_electrodes_are_the_first_of_each_array_and_of_both_kinds(
    folder: Path, tmp_path: Path
) -> None:
    fewer = dataclasses.replace(SMALL, sessions=2, electrodes=3)
    written = Path(simulate(tmp_path, fewer)) / SESSIONS[1] / "data_val.hdf5"
    every = folder / "hdf5_data_final" / SESSIONS[1] / "data_val.hdf5"
    columns = [64 * array + electrode for array in range(8) for electrode in range(3)]
    with h5py.File(written) as some, h5py.File(every) as whole:
        for trial in whole:
            expected = whole[trial]["input_features"][()][:, columns]
            np.testing.assert_allclose(some[trial]["input_features"], expected, atol=1e-6)


def test_a_missing_file_is_made_again_as_it_was(folder: Path, tmp_path: Path) -> None:
    simulate(tmp_path, SMALL)
    lost = files_of(tmp_path)[f"{SESSIONS[2]}/data_val.hdf5"]
    lost.unlink()
    (lost.parent / "data_val.partial").write_bytes(b"an interrupted run")
    simulate(tmp_path, SMALL)
    assert contents(lost) == contents(files_of(folder)[f"{SESSIONS[2]}/data_val.hdf5"])
    assert list(tmp_path.rglob("*.partial")) == []


def test_other_settings_are_refused_unless_forced(tmp_path: Path) -> None:
    few = SimulationSettings(sessions=2, train=2, val=1, test=1)
    simulate(tmp_path, few)
    harder = dataclasses.replace(few, difficulty=0.9)
    with pytest.raises(ValueError, match=r"difficulty 0.5 \(now 0.9\).*--force"):
        simulate(tmp_path, harder)
    before = contents(files_of(tmp_path)[f"{SESSIONS[1]}/data_val.hdf5"])
    simulate(tmp_path, harder, force=True)
    assert contents(files_of(tmp_path)[f"{SESSIONS[1]}/data_val.hdf5"]) != before
    assert json.loads((tmp_path / "simulation.json").read_text())["difficulty"] == 0.9


def test_data_that_was_not_simulated_is_never_overwritten(tmp_path: Path) -> None:
    recorded = tmp_path / "hdf5_data_final" / SESSIONS[0] / "data_train.hdf5"
    recorded.parent.mkdir(parents=True)
    recorded.write_bytes(b"real")
    for force in (False, True):
        with pytest.raises(ValueError, match="may be real recordings"):
            simulate(tmp_path, SMALL, force)
    assert recorded.read_bytes() == b"real"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sessions": 1}, "--sessions is 1; needed 2 to 45"),
        ({"sessions": 46}, "--sessions is 46"),
        ({"difficulty": 1.5}, "--difficulty is 1.5; needed 0.0 to 1.0"),
        ({"min_words": 8, "max_words": 5}, "--max-words is 5; needed 8 to 12"),
        ({"speaking_rate": 0.0}, "--speaking-rate is 0.0"),
        ({"train": 0}, "--train is 0"),
    ],
)
def test_settings_out_of_bounds_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulationSettings(**change)


def test_too_few_sentences_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few sentences of 12 to 12 words"):
        simulate(tmp_path, SimulationSettings(sessions=45, min_words=12))
    assert list(tmp_path.iterdir()) == []


def test_as_many_sentences_as_were_published_can_be_planned() -> None:
    settings = SimulationSettings(sessions=45, train=180, val=33, test=33)
    plans = plan_sessions(settings)
    shown = [s for plan in plans.values() for block in plan for s in block.sentences]
    assert len(shown) == 45 * 180 + 44 * 66
    assert len({normalise(sentence.text) for sentence in shown}) == len(shown)


def test_words_per_sentence_stay_within_bounds() -> None:
    settings = dataclasses.replace(SMALL, min_words=4, max_words=6)
    for plan in plan_sessions(settings).values():
        for block in plan:
            for sentence in block.sentences:
                assert 4 <= len(normalise(sentence.text).split()) <= 6


def test_no_two_phonemes_have_the_same_articulation() -> None:
    targets = speech.articulation().targets
    phonemes = targets[list(PHONEME_IDS.values())].reshape(len(PHONEME_IDS), -1)
    distance = np.linalg.norm(phonemes[:, None] - phonemes[None], axis=-1)
    assert distance[~np.eye(len(phonemes), dtype=bool)].min() > 0.5
    assert not targets[SILENCE_ID].any()


def similarity(first: neural.Tuning, other: neural.Tuning) -> float:
    """Cosine between the articulatory mixings of two days."""
    a, b = (t.mixing[: speech.TUNED_COUNT].ravel() for t in (first, other))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_drift_grows_with_the_number_of_sessions_between() -> None:
    rng = np.random.default_rng(0)
    days = [neural.first_tuning(rng)]
    for _ in range(6):
        days.append(neural.next_tuning(days[-1], neural.Drift(), rng))
    apart = [similarity(days[0], day) for day in days]
    assert apart[0] == pytest.approx(1)
    assert apart[1] > apart[3] > apart[6]
    assert apart[1] < 0.95
    strengths = [np.linalg.norm(day.mixing) for day in days]
    assert strengths[-1] == pytest.approx(strengths[0], rel=0.2)
    alive = [day.alive.sum() for day in days]
    assert alive[0] == 512
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] < 512


def test_no_drift_leaves_the_tuning_as_it_was() -> None:
    rng = np.random.default_rng(0)
    first = neural.first_tuning(rng)
    still = neural.Drift(rotation=0.0, renewal=0.0, gain=0.0, death=0.0)
    np.testing.assert_allclose(neural.next_tuning(first, still, rng).mixing, first.mixing)


def test_tuning_turns_by_about_the_angle_asked_for() -> None:
    rng = np.random.default_rng(0)
    rotation = neural.random_rotation(0.3, rng)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(len(rotation)), atol=1e-12)
    vectors = rng.standard_normal((200, len(rotation)))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    angles = np.arccos(np.sum(vectors * (vectors @ rotation.T), axis=1))
    assert angles.mean() == pytest.approx(0.3, rel=0.2)


def linear_error(strength: float) -> float:
    """Error of the best linear read-out of the trajectories from smoothed features, held out."""
    rng = np.random.default_rng(1)
    table = speech.articulation()
    labels = [rng.integers(1, 40, 20) for _ in range(12)]
    moves = [speech.attempt(label, table, 1.0, rng) for label in labels]
    tuning = neural.first_tuning(rng)
    features = neural.record(moves, tuning, strength, rng)
    neural.z_score(features)
    recorded = np.split(features, np.cumsum([len(move) for move in moves])[:-1])
    smoothed = [speech.smooth(features, 2.0) for features in recorded]
    x, y = np.concatenate(smoothed[:8]), np.concatenate(moves[:8])
    held_x, held_y = np.concatenate(smoothed[8:]), np.concatenate(moves[8:])
    weights = np.linalg.solve(x.T @ x + 1000 * np.eye(512), x.T @ (y - y.mean(axis=0)))
    error = np.mean((held_x @ weights + y.mean(axis=0) - held_y) ** 2)
    return float(error / held_y.var(axis=0).mean())


def test_articulation_is_in_the_features_and_difficulty_hides_it() -> None:
    errors = [linear_error(modulation(difficulty)) for difficulty in (0.0, 0.5, 1.0)]
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.2
    assert linear_error(0.0) > 0.95


def test_channels_that_died_carry_no_speech() -> None:
    rng = np.random.default_rng(1)
    table = speech.articulation()
    moves = [speech.attempt(rng.integers(1, 40, 20), table, 1.0, rng) for _ in range(8)]
    alive = np.ones(512)
    alive[10] = alive[256 + 10] = 0
    tuning = dataclasses.replace(neural.first_tuning(rng), alive=alive)
    recorded = neural.record(moves, tuning, 1.6, rng)
    neural.z_score(recorded)
    trajectory = np.concatenate(moves)
    trajectory -= trajectory.mean(axis=0)
    explained = []
    for channel in (10, 256 + 10):
        fit, *_ = np.linalg.lstsq(trajectory, recorded[:, channel], rcond=None)
        explained.append(np.var(trajectory @ fit))
    typical, *_ = np.linalg.lstsq(trajectory, recorded[:, 256:320], rcond=None)
    assert max(explained) < 0.05 < np.median(np.var(trajectory @ typical, axis=0))


def test_the_command_writes_what_the_function_writes(folder: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--sessions", "3", "--train", "9", "--val", "3", "--test", "4", "--seed", "5"]
    assert run(parser.parse_args(["--out", str(tmp_path), *words])) == 0
    assert (tmp_path / "simulation.json").read_bytes() == (folder / "simulation.json").read_bytes()
    assert set(files_of(tmp_path)) == set(files_of(folder))


def test_bursts_are_shared_by_channels_and_leave_everything_else_alone(tmp_path: Path) -> None:
    plain = dataclasses.replace(SMALL, sessions=2, train=4, val=1, test=1)
    simulate(tmp_path / "plain", plain)
    simulate(tmp_path / "bursts", dataclasses.replace(plain, bursts=2.0))
    before, after = (trials_of(tmp_path / name, "train") for name in ("plain", "bursts"))
    assert [t.sentence for t in before] == [t.sentence for t in after]
    assert [len(t.features) for t in before] == [len(t.features) for t in after]

    def shared(trials: list[Trial]) -> float:
        """Share of the variance of smoothed spike band power on its four largest axes."""
        power = np.concatenate([trial.features[:, 256:] for trial in trials])
        smoothed = speech.smooth(power, 5.0)
        variances = np.linalg.svd(smoothed - smoothed.mean(0), compute_uv=False) ** 2
        return float(variances[:4].sum() / variances.sum())

    assert shared(after) > shared(before) + 0.2


def test_a_folder_made_before_a_setting_existed_goes_on_with_its_default(tmp_path: Path) -> None:
    plain = dataclasses.replace(SMALL, sessions=2, train=3, val=1, test=1)
    simulate(tmp_path, plain)
    path = tmp_path / "simulation.json"
    older = {
        name: value for name, value in json.loads(path.read_text()).items() if name != "bursts"
    }
    path.write_text(json.dumps(older))
    simulate(tmp_path, plain)
    path.write_text(json.dumps(older))
    with pytest.raises(DataError, match="bursts 0"):
        simulate(tmp_path, dataclasses.replace(plain, bursts=1.0))
