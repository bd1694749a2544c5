import dataclasses
import shutil

import h5py
import numpy as np
import pytest

from b2txt_jax.data.hdf5 import DataError, find_sessions
from b2txt_jax.data.loader import EvaluationData, TrainingData, bucket_of, configured_sessions


def frames_of_bins(bins):
    return (bins - 14) // 4 + 1


def training(config, root=None):
    data = config.data if root is None else dataclasses.replace(config.data, root=str(root))
    return TrainingData(data, configured_sessions(data), 14, frames_of_bins)


@pytest.fixture
def copy(simulated, tmp_path):
    """A copy of the simulated sessions that a test may damage."""
    shutil.copytree(simulated / "hdf5_data_final", tmp_path / "copy")
    return tmp_path / "copy"


def change_first_train_trial(root, change):
    session = find_sessions(root)[0]
    with h5py.File(root / session / "data_train.hdf5", "r+") as file:
        change(file["trial_0000"])
    return f"{session}/trial_0000"


def test_a_batch_holds_its_trials_as_they_stand_in_the_files(tiny_config):
    data = training(tiny_config)
    batch, rows = data.batch(seed=1, step=5), data.rows(seed=1, step=5)
    for row, (day, ref) in enumerate(rows):
        with h5py.File(ref.path) as file:
            features = file[ref.key]["input_features"][:]
            labels = file[ref.key]["seq_class_ids"][: ref.label_length]
        np.testing.assert_array_equal(batch.features[row, : ref.bins], features)
        np.testing.assert_array_equal(batch.labels[row, : ref.label_length], labels)
        assert not batch.features[row, ref.bins :].any()
        assert not batch.labels[row, ref.label_length :].any()
        assert (batch.bins[row], batch.day[row]) == (ref.bins, day)
    assert (batch.features.shape[1], batch.labels.shape[1]) in tiny_config.data.buckets


def test_reading_ahead_gives_the_batches_of_the_same_steps_in_order(tiny_config):
    data = training(tiny_config)
    for step, batch in zip(range(3, 8), data.batches(seed=2, start=3, stop=8), strict=True):
        for got, expected in zip(batch, data.batch(seed=2, step=step), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_evaluation_gives_every_trial_once_in_batches_of_bucket_shapes(tiny_config):
    sessions = configured_sessions(tiny_config.data)
    data = EvaluationData(tiny_config.data, sessions, "val", 14, labels=True)
    seen = []
    for indices, trials, batch in data.batches():
        assert batch.features.shape[:2] in [
            (tiny_config.data.eval_batch_size, bins) for bins, _ in tiny_config.data.buckets
        ]
        for row, (index, trial) in enumerate(zip(indices, trials, strict=True)):
            assert data.refs[index] == trial.ref
            assert sessions[batch.day[row]] == trial.ref.session
            np.testing.assert_array_equal(batch.features[row, : trial.ref.bins], trial.features)
        assert not batch.bins[len(indices) :].any()
        seen += indices
    assert sorted(seen) == list(range(12))  # 3 sessions with val, 4 sentences each


def test_a_trial_that_fits_no_bucket_is_named_with_its_size(tiny_config):
    data = dataclasses.replace(tiny_config.data, buckets=((60, 200),))
    with pytest.raises(DataError, match=r"t15\.\S+/trial_\d+ has \d+ bins .* add a larger one"):
        TrainingData(data, configured_sessions(data), 14, frames_of_bins)


def test_the_smallest_bucket_that_holds_all_is_taken(tiny_config):
    refs = training(tiny_config).refs_of_day[0]
    longest = max(ref.bins for ref in refs)
    assert bucket_of(refs, ((longest - 1, 500), (longest, 500), (2000, 500))) == (longest, 500)


def test_a_label_longer_than_the_frames_is_refused_with_the_trials_name(tiny_config, copy):
    def lengthen(trial):
        trial.attrs["seq_len"] = frames_of_bins(trial.attrs["n_time_steps"]) + 1
        trial["seq_class_ids"][:] = 5

    name = change_first_train_trial(copy, lengthen)
    config = dataclasses.replace(tiny_config.data, buckets=((320, 400),))
    with pytest.raises(DataError, match=rf"{name} has a label of .* drop the trial"):
        TrainingData(
            dataclasses.replace(config, root=str(copy)), find_sessions(copy), 14, frames_of_bins
        )


def test_repeats_that_need_more_frames_than_there_are_are_refused_when_read(tiny_config, copy):
    def repeat(trial):
        trial.attrs["seq_len"] = frames_of_bins(trial.attrs["n_time_steps"]) - 2
        trial["seq_class_ids"][:] = 5

    name = change_first_train_trial(copy, repeat)
    buckets = dataclasses.replace(tiny_config.data, buckets=((320, 400),), root=str(copy))
    data = TrainingData(buckets, find_sessions(copy), 14, frames_of_bins)
    drawn = (step for step in range(200) if name in [ref.name for _, ref in data.rows(0, step)])
    with pytest.raises(DataError, match=name):
        data.batch(0, next(drawn))


def test_an_error_in_the_background_reaches_the_training_loop(tiny_config, copy):
    def spoil(trial):
        trial["input_features"][3, 4] = np.nan

    for session in find_sessions(copy):
        with h5py.File(copy / session / "data_train.hdf5", "r+") as file:
            for trial in file.values():
                spoil(trial)
    with pytest.raises(DataError, match=r"NaN.* bin 3, feature 4"):
        list(training(tiny_config, copy).batches(0, 0, 3))
