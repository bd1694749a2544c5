import dataclasses
import itertools
import shutil
import threading
import time

import h5py
import numpy as np
import pytest

from b2txt_jax.config import load_config
from b2txt_jax.data import loader
from b2txt_jax.data.batches.layout import Rules
from b2txt_jax.data.description import DataError
from b2txt_jax.data.loader import (
    EvaluationData,
    TrainingData,
    bucket_of,
    configured_sessions,
    read_ahead,
    resolve_buckets,
)
from b2txt_jax.data.packed import read_manifest
from b2txt_jax.data.reader import open_folder
from tests.conftest import FEATURES, REPOSITORY
from tests.data.packing import packed


def filled(batch):
    """The arrays of a batch. Those of rows that trials share are None in others."""
    return [value for value in batch if value is not None]


def frames_of_bins(bins):
    return (bins - 14) // 4 + 1


def find_sessions(root):
    return open_folder(root, FEATURES).sessions


def training(config, root=None):
    data = config.data if root is None else dataclasses.replace(config.data, root=str(root))
    return TrainingData(data, configured_sessions(data), 14, frames_of_bins)


@pytest.fixture(scope="module")
def tiny_config(tiny_overrides):
    """With two buckets, so that there is one to choose."""
    overrides = [*tiny_overrides, "--config.data.buckets=((160, 40), (320, 80))"]
    return load_config(REPOSITORY / "configs/demo.py", overrides)


@pytest.fixture
def copy(narrow, tmp_path):
    """A copy of the sessions that a test may damage."""
    shutil.copytree(narrow, tmp_path / "copy")
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
        for got, expected in zip(filled(batch), filled(data.batch(2, step)), strict=True):
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


def test_reading_ahead_keeps_the_order_and_a_bounded_number_of_items():
    begun = []

    def load(item):
        begun.append(item)
        time.sleep(0.001 * (item % 3))
        return item

    for expected, got in enumerate(read_ahead(load, range(40), ahead=3)):
        assert got == expected
        assert len(begun) <= expected + 3  # three ahead of the ones before this
    assert sorted(begun) == list(range(40))


@pytest.mark.parametrize(
    ("cores", "megabytes", "threads", "ahead"),
    [
        (1, 20, 2, 4),
        (2, 20, 2, 4),
        (8, 20, 4, 6),
        (224, 20, 16, 18),
        (224, 200, 16, 5),
        (8, 2000, 4, 2),
    ],
)
def test_threads_follow_the_cores_and_batches_ahead_are_bounded_in_bytes(
    monkeypatch, cores, megabytes, threads, ahead
):
    monkeypatch.setattr(loader.os, "sched_getaffinity", lambda _: set(range(cores)))
    assert loader.reading_threads() == threads
    assert loader.batches_ahead(megabytes * 2**20) == ahead


def test_what_is_read_ahead_is_the_share_of_this_host(tiny_config, monkeypatch):
    asked = []

    def ahead(batch_bytes):
        asked.append(batch_bytes)
        return 2

    monkeypatch.setattr(loader, "batches_ahead", ahead)
    data = training(tiny_config)
    rows = tiny_config.data.batch_rows
    for wanted in (None, slice(0, rows // 2)):
        next(data.batches(0, 0, 1, wanted))
    whole = rows * 320 * FEATURES * 4
    assert asked == [whole, whole // 2]


def test_an_error_is_raised_in_its_place_and_ends_reading_ahead():
    begun = []

    def load(item):
        begun.append(item)
        if item == 5:
            raise OSError("broken")
        return item

    loaded = read_ahead(load, itertools.count(), ahead=3)
    assert list(itertools.islice(loaded, 5)) == list(range(5))
    with pytest.raises(OSError, match="broken"):
        next(loaded)
    assert max(begun) <= 5 + 3
    assert list(loaded) == []


def test_reading_ahead_stops_with_its_threads_when_it_is_closed_early():
    begun = []

    def load(item):
        begun.append(item)
        return item

    loaded = read_ahead(load, itertools.count(), ahead=3)
    assert next(loaded) == 0
    loaded.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("read-ahead")]
    assert len(begun) <= 4


@pytest.fixture(scope="module", params=["HDF5", "float32", "bfloat16"])
def stored(request, tiny_config, tmp_path_factory):
    """The tiny configuration's data section, with the sessions as HDF5 or packed."""
    if request.param == "HDF5":
        return tiny_config.data
    out = tmp_path_factory.mktemp("packed") / request.param
    return dataclasses.replace(
        tiny_config.data,
        root=str(packed(tiny_config.data.root, out, request.param, features=FEATURES)),
    )


def rows_of_hosts(rows, hosts):
    return [slice(host * rows // hosts, (host + 1) * rows // hosts) for host in range(hosts)]


def assert_concatenation(parts, whole):
    by_field = zip(*map(filled, parts), strict=True)
    for pieces, expected in zip(by_field, filled(whole), strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), expected)
        assert {piece.dtype for piece in pieces} == {expected.dtype}


@pytest.mark.parametrize("hosts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_hosts_batches_of_shared_rows_are_the_global_batch_in_pieces(tiny_config, hosts):
    stored = dataclasses.replace(
        tiny_config.data, days_per_batch=2, trials_per_day=16, buckets=(), packing="on"
    )
    sessions, rules = find_sessions(stored.root), Rules(4, 4, True, 4)

    def batches(rows=None):
        data = TrainingData(stored, sessions, 14, frames_of_bins, rules, (3, 12))
        assert data.packed
        return data.batches(3, 5, 12, rows)

    parts = [batches(rows) for rows in rows_of_hosts(32, hosts)]
    data = TrainingData(stored, sessions, 14, frames_of_bins)
    for step, (expected, *pieces) in enumerate(zip(batches(), *parts, strict=True), start=5):
        assert_concatenation(pieces, expected)
        assert (expected.trial >= 0).sum(1).max() > 1
        alone = data.batch(3, step)  # the same trials, labels and days, one a row
        for row, segment in np.argwhere(expected.trial >= 0):
            trial, first = expected.trial[row, segment], expected.start[row, segment]
            bins = expected.bins[row, segment]
            assert (bins, expected.day[row]) == (alone.bins[trial], alone.day[trial])
            np.testing.assert_array_equal(
                expected.features[row, first : first + bins], alone.features[trial, :bins]
            )
        found = expected.label_length[expected.slot >= 0]
        assert sorted(found) == sorted(alone.label_length)
        assert np.count_nonzero(expected.features.any(-1)) == alone.bins.sum()


@pytest.mark.parametrize("plan", ["days", "epochs"])
@pytest.mark.parametrize("hosts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_hosts_training_batches_are_the_global_batch_in_pieces(stored, hosts, plan):
    stored = dataclasses.replace(stored, days_per_batch=4, trials_per_day=2, buckets=(), plan=plan)
    whole = list(
        TrainingData(stored, find_sessions(stored.root), 14, frames_of_bins).batches(3, 5, 25)
    )
    parts = [
        TrainingData(stored, find_sessions(stored.root), 14, frames_of_bins).batches(3, 5, 25, rows)
        for rows in rows_of_hosts(8, hosts)
    ]
    assert len({batch.features.shape for batch in whole}) > 1
    for expected, *pieces in zip(whole, *parts, strict=True):
        assert_concatenation(pieces, expected)


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_evaluation_batches_are_the_global_batch_in_pieces(stored, hosts):
    def data():
        return EvaluationData(stored, find_sessions(stored.root), "val", 14, labels=True)

    parts = [data().batches(rows) for rows in rows_of_hosts(4, hosts)]
    seen = []
    for (indices, trials, expected), *pieces in zip(data().batches(), *parts, strict=True):
        assert_concatenation([batch for _, _, batch in pieces], expected)
        assert [index for got, _, _ in pieces for index in got] == indices
        assert [t.ref for _, got, _ in pieces for t in got] == [t.ref for t in trials]
        seen += indices
    assert sorted(seen) == list(range(12))


def test_packed_float32_gives_the_batches_of_hdf5_bit_for_bit(tiny_config, tmp_path):
    out = packed(tiny_config.data.root, tmp_path / "out", features=FEATURES)
    both = [training(tiny_config, root) for root in (tiny_config.data.root, out)]
    for step in range(12):
        for got, expected in zip(*(filled(data.batch(1, step)) for data in both), strict=True):
            assert (got.dtype, got.tobytes()) == (expected.dtype, expected.tobytes())
    held_out = [
        EvaluationData(
            dataclasses.replace(tiny_config.data, root=str(root)),
            find_sessions(root),
            "test",
            14,
            labels=False,
        )
        for root in (tiny_config.data.root, out)
    ]
    for (_, _, got), (_, _, expected) in zip(*(data.batches() for data in held_out), strict=True):
        for a, b in zip(filled(got), filled(expected), strict=True):
            assert a.tobytes() == b.tobytes()


def test_packed_half_precision_stays_so_until_the_step(tiny_config, tmp_path):
    out = packed(tiny_config.data.root, tmp_path / "out", "float16", features=FEATURES)
    half, single = training(tiny_config, out), training(tiny_config)
    assert (half.features_dtype, single.features_dtype) == (np.float16, np.float32)
    got, expected = half.batch(1, 0).features, single.batch(1, 0).features
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, expected.astype(np.float16))


def test_without_configured_buckets_those_of_prepare_are_taken_on_either_layout(
    tiny_config, tmp_path
):
    sessions = configured_sessions(tiny_config.data)
    data = dataclasses.replace(tiny_config.data, buckets=(), days_per_batch=4, trials_per_day=16)
    out = packed(data.root, tmp_path / "out", features=FEATURES)
    on_packed = dataclasses.replace(data, root=str(out))
    chosen = resolve_buckets(data, sessions)
    assert resolve_buckets(on_packed, sessions) == chosen == read_manifest(out).buckets
    assert 1 < len(chosen) <= 6
    assert resolve_buckets(tiny_config.data, sessions) == tiny_config.data.buckets
    shapes = set()
    for step in range(30):
        batch = TrainingData(on_packed, sessions, 14, frames_of_bins).batch(0, step)
        shapes.add((batch.features.shape[1], batch.labels.shape[1]))
    assert shapes <= set(chosen)
    EvaluationData(data, sessions, "test", 14, labels=False)


def test_an_epoch_of_the_loader_has_every_trial_once(tiny_config):
    data = dataclasses.replace(tiny_config.data, days_per_batch=4, trials_per_day=2, plan="epochs")
    loader = TrainingData(data, configured_sessions(data), 14, frames_of_bins)
    everything = sorted(ref.name for refs in loader.refs_of_day for ref in refs)
    assert len(everything) % 8 == 0
    for epoch in range(2):
        steps = range(epoch * len(everything) // 8, (epoch + 1) * len(everything) // 8)
        assert sorted(ref.name for step in steps for _, ref in loader.rows(0, step)) == everything


def test_the_padding_of_epochs_is_that_of_their_batches(tiny_config):
    data = dataclasses.replace(tiny_config.data, days_per_batch=4, trials_per_day=2, plan="epochs")
    loader = TrainingData(data, configured_sessions(data), 14, frames_of_bins)
    real = padded = 0
    for step in range(4000):
        refs = [ref for _, ref in loader.rows(0, step)]
        real += sum(ref.bins for ref in refs)
        padded += len(refs) * bucket_of(refs, loader.buckets)[0]
    assert loader.padding == pytest.approx(1 - real / padded, abs=0.005)


def test_no_trial_to_choose_buckets_from_is_told(tiny_config, tmp_path):
    (tmp_path / "t15.2023.08.11").mkdir()
    with h5py.File(tmp_path / "t15.2023.08.11" / "data_val.hdf5", "w"):
        pass
    data = dataclasses.replace(tiny_config.data, buckets=(), root=str(tmp_path))
    with pytest.raises(DataError, match="has no trial in the 1 sessions"):
        resolve_buckets(data, find_sessions(tmp_path))


def test_a_damaged_packed_trial_is_named_to_the_training_loop(tiny_config, tmp_path):
    out = packed(tiny_config.data.root, tmp_path / "out", features=FEATURES)
    for path in out.rglob("data_train.features"):
        path.write_bytes(b"\1" * path.stat().st_size)
    with pytest.raises(DataError, match=r"data_train.features trial_\d+ does not match its check"):
        list(training(tiny_config, out).batches(0, 0, 3))
