"""The preset `recordings`: what is published of the recordings, as far as no training is needed."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from b2txt_jax.data.description import DataError
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.trial import Trial
from b2txt_jax.simulation import neural, recordings, write
from b2txt_jax.simulation.plan import (
    LATE,
    SESSIONS,
    TRAIN_ONLY,
    PlannedBlock,
    SimulationSettings,
    plan_sessions,
)
from b2txt_jax.simulation.write import simulate
from lm_server.lexicon.text_rules import normalise

SMALL = SimulationSettings(preset="recordings", sessions=3, train=4, val=2, test=1, seed=5)


@pytest.fixture(scope="module")
def published() -> dict[str, list[PlannedBlock]]:
    return plan_sessions(SimulationSettings(preset="recordings"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recordings")
    simulate(out, SMALL)
    return out


def trials_of(folder: Path, sessions: int = 3) -> dict[tuple[str, str, int], Trial]:
    reader = open_folder(folder / "hdf5_data_final")
    return {
        (ref.session, split, ref.trial): reader.read(ref)
        for split in ("train", "val", "test")
        for ref in reader.trials(SESSIONS[:sessions], split)
    }


def test_the_whole_set_has_as_many_sessions_and_sentences_as_published(published: dict) -> None:
    counts = Counter(s.split for plan in published.values() for b in plan for s in b.sentences)
    assert len(published) == 45
    assert counts == {"train": 8072, "val": 1426, "test": 1450}
    without_val = [
        index
        for index, plan in enumerate(published.values())
        if all(block.is_train for block in plan)
    ]
    assert without_val == list(TRAIN_ONLY)


def test_sentences_are_as_long_as_published(published: dict) -> None:
    sentences = [s for plan in published.values() for block in plan for s in block.sentences]
    assert 28.5 < np.mean([len(s.labels) for s in sentences]) < 30
    assert 6.4 < np.mean([len(normalise(s.text).split()) for s in sentences]) < 6.8


def test_val_repeats_train_as_often_as_published(published: dict) -> None:
    by_split: dict[tuple[str, bool], list[str]] = {}
    for index, plan in enumerate(published.values()):
        for sentence in itertools.chain.from_iterable(block.sentences for block in plan):
            by_split.setdefault((sentence.split, index >= LATE), []).append(sentence.text)
    train = {*by_split["train", False], *by_split["train", True]}
    early, late = (np.mean([t in train for t in by_split["val", n]]) for n in (False, True))
    assert 0.05 < early < 0.09
    assert 0.35 < late < 0.5


def test_trials_are_as_long_as_published_with_silence_around(published: dict) -> None:
    person = recordings.participant(np.random.default_rng(0))
    sentences = [s for plan in published.values() for block in plan for s in block.sentences]
    sampled = sentences[::20]
    rng = np.random.default_rng(1)
    bins = np.array([len(recordings.attempt(s.labels, person, 1.0, rng)) for s in sampled])
    assert 845 < bins.mean() < 905
    assert bins.min() >= 100
    assert bins.max() <= recordings.MOST_BINS
    assert 0.6 < np.mean((bins > 500) & (bins < 1200)) < 0.95


def test_the_longest_sentence_spoken_slowly_still_fits() -> None:
    person = recordings.participant(np.random.default_rng(0))
    labels = np.tile(np.array([5, 12, 40]), 40)
    for seed in range(10):
        trajectory = recordings.attempt(labels, person, 0.5, np.random.default_rng(seed))
        assert len(trajectory) <= recordings.MOST_BINS
        activity = trajectory[:, recordings.LATENT_COUNT - 2]
        assert activity[:5].max() < 0.3
        assert activity[-5:].max() < 0.3


@pytest.mark.slow
def test_a_trial_is_a_function_of_seed_session_block_and_place(
    folder: Path, tmp_path: Path
) -> None:
    simulate(tmp_path, dataclasses.replace(SMALL, sessions=2))
    everything, fewer = trials_of(folder), trials_of(tmp_path, 2)
    assert len(fewer) == 2 * 4 + 2 + 1
    for place, trial in fewer.items():
        np.testing.assert_array_equal(trial.features, everything[place].features)


@pytest.mark.slow
def test_processes_do_not_change_the_result(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_FEWEST_FOR_PROCESSES", 0)
    simulate(tmp_path, dataclasses.replace(SMALL, sessions=2), jobs=2)
    serial, parallel = trials_of(folder, 2), trials_of(tmp_path, 2)
    assert serial.keys() == parallel.keys()
    for place, trial in serial.items():
        np.testing.assert_array_equal(trial.features, parallel[place].features)


def test_raw_features_are_those_before_the_z_score(folder: Path, tmp_path: Path) -> None:
    simulate(tmp_path, dataclasses.replace(SMALL, sessions=2, raw=True))
    raw, scored = trials_of(tmp_path, 2), trials_of(folder)
    train = [place for place in raw if place[:2] == (SESSIONS[1], "train")]
    assert len({raw[place].ref.block for place in train}) == 1
    stacked = np.concatenate([raw[place].features for place in train])
    counts, power = stacked[:, :256], stacked[:, 256:]
    np.testing.assert_array_equal(counts, np.round(counts))
    assert counts.min() == 0
    assert power.min() > 0
    neural.z_score(stacked)
    expected = np.concatenate([scored[place].features for place in train])
    np.testing.assert_allclose(stacked, expected, atol=1e-4)


def test_noise_is_correlated_over_time_and_channels() -> None:
    silence = [np.array([40])] * 12
    day = recordings.first_day(np.random.default_rng(0))
    trials = recordings.record_block(
        silence, day, 0.0, 1.0, 0.0, (0, 0), lambda name, *n: np.random.default_rng([*n, len(name)])
    )
    power = np.log(np.concatenate(trials)[:, 256:])
    power = (power - power.mean(0)) / power.std(0)
    assert np.mean(power[:-10] * power[10:]) > 0.05
    correlations = np.abs(np.corrcoef(power.T)[np.triu_indices(256, 1)])
    assert correlations.mean() > 2 / np.sqrt(len(power))


def similarity(first: recordings.Day, other: recordings.Day) -> float:
    a, b = first.mixing.ravel(), other.mixing.ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_days_differ_mildly_and_more_after_a_break() -> None:
    days = recordings.days(SESSIONS, 1.0, lambda name, n: np.random.default_rng([len(name), n]))
    apart = [similarity(days[0], day) for day in days]
    assert apart[1] > 0.75
    assert apart[1] > apart[20] > apart[44]
    # Half a year lies between the last session of 2024 and the first of 2025.
    assert similarity(days[38], days[39]) < similarity(days[37], days[38]) - 0.1
    late, early = (np.mean([d.quality for d in part]) for part in (days[LATE:], days[:LATE]))
    assert late < 0.85 * early


def test_no_drift_leaves_days_alike() -> None:
    days = recordings.days(SESSIONS[:3], 0.0, lambda name, n: np.random.default_rng([len(name), n]))
    np.testing.assert_allclose(days[2].mixing, days[0].mixing, atol=1e-6)


def test_an_electrode_follows_what_comes_what_is_and_what_was() -> None:
    trajectory = np.zeros((101, 1), np.float32)
    trajectory[50] = 1
    peaks = [int(recordings._shifted(trajectory, shift, 2.0).argmax()) for shift in (8, 0, -8)]
    assert peaks == [42, 50, 58]


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(DataError, match="--preset is 'real'; needed one of strong_drift, recordin"):
        SimulationSettings(preset="real")
