"""Self-calibration: what a sentence moves, how far, what is taken back, and by whom."""

import argparse
import contextlib
import dataclasses
import json
import time

import jax
import numpy as np
import pytest

from b2txt_jax.calibration.follow import Follower, FollowError, FollowSettings, Kept
from b2txt_jax.calibration.moving import moving_of
from b2txt_jax.cli import main
from b2txt_jax.config import ConfigError, load_config
from b2txt_jax.data.loader import TrainingData
from b2txt_jax.data.reader import open_folder
from b2txt_jax.inference.run import Run
from b2txt_jax.live.command import _following, _separated
from b2txt_jax.live.events import Chosen, Final
from b2txt_jax.live.following import Following
from b2txt_jax.live.model import LiveModel
from b2txt_jax.live.outputs.log import SentenceLog
from b2txt_jax.phonemes import sentence_to_ids
from b2txt_jax.training.step import init_state
from lm_server.hypothesis import Answer, Hypothesis
from tests.calibration.small import small_transformer, transformer_config

DAYS = ("t15.2023.08.11", "t15.2023.08.13")
TEXT = "the cat"
LABELS = sentence_to_ids(TEXT.split())
STRONG = FollowSettings(day_rate=0.01, steps=4, rows=4, bound=1.0)


@pytest.fixture(scope="module")
def run():
    """A run with fresh parameters for bins of 16 features."""
    config = load_config("demo")
    data = dataclasses.replace(
        config.data, sessions=DAYS, feature_count=16, buckets=((80, 16),), eval_batch_size=2
    )
    model = dataclasses.replace(config.model, units=16, layers=1)
    config = dataclasses.replace(config, data=data, model=model)
    return Run(config, init_state(config, 2).params, 0)


def features(seed, bins=72):
    return np.random.default_rng(seed).normal(size=(bins, 16)).astype(np.float32)


def final(id_, seed, confidence, text=TEXT):
    x = features(seed)
    answer = Answer((Hypothesis(tuple(text.split()), -1.0, -1.0),), confidence)
    return Final(id_, "a trial", DAYS[1], answer, None, 0.1, x, x)


def test_a_sentence_moves_the_layer_of_its_day_alone_and_lowers_its_loss(run):
    follower = Follower(run, 1, STRONG)
    done = follower.update(features(0), LABELS)
    assert (done.kept, done.why) == (True, "lower loss")
    assert done.loss_after < done.loss_before
    assert done.earlier_before is None
    moved = jax.tree.map(lambda new, old: not np.array_equal(new, old), follower.params, run.params)
    assert moved.pop("day") == {"weight": True, "bias": True}
    assert not any(jax.tree.leaves(moved))
    np.testing.assert_array_equal(
        follower.params["day"]["weight"][0], run.params["day"]["weight"][0]
    )


@pytest.mark.slow
def test_the_change_against_the_trained_values_stays_within_the_bound(run):
    follower = Follower(run, 1, dataclasses.replace(STRONG, bound=0.001))
    for seed in range(3):
        follower.update(features(seed), LABELS)
    assert 0 < follower.change <= 0.001 * 1.001


@pytest.mark.slow
def test_steps_that_raise_the_loss_of_this_or_earlier_sentences_are_taken_back(run):
    uphill = Follower(run, 1, dataclasses.replace(STRONG, day_rate=-0.01))
    done = uphill.update(features(0), LABELS)
    assert done.loss_after > done.loss_before
    assert (done.kept, done.why) == (False, "the loss of the sentence did not fall")
    assert uphill.change == 0
    follower, reasons = Follower(run, 1, STRONG), set()
    for number in range(40):  # the same bins with two texts that contradict each other
        before, label = follower.moved, LABELS[:: 1 if number % 2 else -1]
        done = follower.update(features(0), label)
        reasons.add(done.why)
        rose = done.earlier_before is not None and done.earlier_after > done.earlier_before
        assert done.kept == (done.loss_after < done.loss_before and not rose)
        assert (follower.moved is before) == (not done.kept)
    assert "the loss of the sentences before rose" in reasons


def test_a_corrected_sentence_is_not_replayed_though_another_came_after_it(run):
    follower = Follower(run, 1, STRONG)
    follower.update(features(0), LABELS[::-1], "wrong")
    follower.update(features(1), LABELS, "right")
    follower.forget("wrong")
    done = follower.update(features(1), LABELS, "right again")
    assert done.earlier_before == done.loss_before  # of the one sentence that is left


@pytest.mark.parametrize(("by", "share"), [(0.1, 0.5), (-0.1, 1.0)])
def test_what_has_not_helped_with_new_sentences_goes_half_of_the_way_back(run, by, share):
    follower, free = (Follower(run, 1, STRONG) for _ in range(2))
    for one in (follower, free):
        one.update(features(0), LABELS)
    follower._fresh.extend([by] * 3)
    done, _ = follower.update(features(0), LABELS), free.update(features(0), LABELS)
    assert done.kept
    assert ("half of the way back" in done.why) == (share < 1)
    for name, value in free.moved.items():
        start = follower.start[name]
        np.testing.assert_allclose(follower.moved[name], start + share * (value - start), atol=1e-6)


def test_a_sentence_too_short_for_its_text_changes_nothing(run):
    follower = Follower(run, 1, STRONG)
    done = follower.update(features(0, bins=20), LABELS)
    assert (done.kept, done.why) == (False, "too short for its text")


@pytest.mark.parametrize("adapt", ["all", "adapters"])
def test_everything_does_not_follow(run, adapt):
    with pytest.raises(ConfigError, match="moves the day's layer or the patch embedding"):
        Follower(run, 1, FollowSettings(adapt=adapt))


def test_the_patch_embedding_follows_faster_where_it_follows_alone(run):
    beside, alone = moving_of(run.config, 1, "patch"), moving_of(transformer_config(DAYS, 16), 1)
    assert FollowSettings().rates_of(beside).shared == 0.00003
    assert FollowSettings().rates_of(alone).shared == 0.0003
    assert FollowSettings(shared_rate=0.5).rates_of(alone).shared == 0.5


def following(run, folder, background=False, **more):
    model = LiveModel(run)
    kept = Kept(folder, run)
    follower = Follower(run, 1, dataclasses.replace(STRONG, **more))
    return model, Following(model, follower, kept, 0.9, background), kept


def weight(model):
    model.begin()
    return np.asarray(model.params["day"]["weight"][1])


@pytest.mark.slow
def test_the_patch_embedding_of_a_model_without_day_layers_follows_live(tmp_path):
    run = small_transformer(DAYS, 16)
    model, kept = LiveModel(run), Kept(tmp_path / "day", run)
    strong = dataclasses.replace(STRONG, shared_rate=0.01)
    follower = Follower(run, 1, strong)
    output = Following(model, follower, kept, 0.9, background=False)
    x = features(0)
    model.warm_up()
    programs = model.programs

    def streamed():
        model.begin()
        return np.concatenate([model.push(x), model.finish()])

    trained = streamed()
    np.testing.assert_allclose(trained, run.logits(x, DAYS[1]), atol=1e-5)
    output.show(final("a", 1, 0.95))
    (line,) = lines(tmp_path / "day")
    assert (line["kept"], line["loss_after"] < line["loss_before"]) == (True, True)
    assert {name.split("/")[0] for name in follower.moved} == {"embed"}
    followed = streamed()
    assert np.abs(followed - trained).max() > 1e-3
    whole = dataclasses.replace(run, params=jax.tree.map(np.asarray, follower.params))
    np.testing.assert_allclose(followed, whole.logits(x, DAYS[1]), atol=1e-5)
    assert model.programs == programs
    kept.undo(1)
    output.close()
    fresh = LiveModel(run)
    again = Following(fresh, Follower(run, 1, strong), kept, 0.9, background=False)
    again.close()
    fresh.begin()
    np.testing.assert_array_equal(np.concatenate([fresh.push(x), fresh.finish()]), trained)


@pytest.mark.slow
def test_stream_moves_a_layer_of_the_days_own_though_days_share_everything(tmp_path):
    run, x = small_transformer(DAYS, 16), features(1)
    args = argparse.Namespace(adapt="auto", adapt_confidence=0.9, adapt_bound=1.0, workdir=tmp_path)
    decoding = _separated(args, run)
    model = LiveModel(decoding, DAYS[1])
    with contextlib.ExitStack() as stack:
        output = _following(args, run, decoding, model, False, stack)
        output.show(final("a", 0, 0.95))
    (line,) = lines(tmp_path / "adapted" / DAYS[1])
    assert line["kept"]
    with np.load(tmp_path / "adapted" / DAYS[1] / "000001.npz") as file:
        assert set(file.files) == {"day/weight", "day/bias", "model"}
        assert str(file["model"]) == run.fingerprint
    model.begin()
    followed = dataclasses.replace(decoding, params=jax.tree.map(np.asarray, model.params))
    trained = run.logits(x, DAYS[0])
    np.testing.assert_array_equal(followed.logits(x, DAYS[0]), trained)
    assert np.abs(followed.logits(x, DAYS[1]) - trained).max() > 1e-4
    args.adapt = "patch"
    assert _separated(args, run) is run
    args.adapt = None
    assert _separated(args, run) is run


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


@pytest.mark.parametrize("background", [False, True])
def test_a_certain_sentence_moves_the_model_from_the_next_sentence_on(run, tmp_path, background):
    model, output, kept = following(run, tmp_path / "day", background)
    trained = weight(model)
    output.show(final("a", 0, 0.5))
    output.show(final("b", 1, None))
    output.show(final("c", 2, 0.95))
    in_use = np.asarray(model.params["day"]["weight"][1])
    output.close()
    np.testing.assert_array_equal(in_use, trained)  # until the next sentence begins
    assert not np.array_equal(weight(model), trained)
    (line,) = lines(tmp_path / "day")
    assert (line["id"], line["source"], line["kept"]) == ("c", "certain", True)
    assert kept.updates == 1
    again, other, _ = following(run, tmp_path / "day")
    other.close()
    np.testing.assert_array_equal(weight(again), weight(model))


def test_a_choice_is_learned_from_and_a_correction_first_takes_the_wrong_text_back(run, tmp_path):
    model, output, kept = following(run, tmp_path / "day")
    output.show(final("a", 0, 0.5))
    output.show(Chosen("a", TEXT, False))
    output.show(final("b", 1, 0.99, "a hat"))
    output.show(Chosen("b", "a hat", False))  # known already
    output.show(Chosen("b", "xyzzy", True))
    found = [(one.get("event"), one.get("source")) for one in lines(tmp_path / "day")]
    assert found[:2] == [("update", "chosen"), ("update", "certain")]
    assert found[-1] == ("left out", "corrected")
    assert kept.updates == 1  # that of the first sentence alone
    with np.load(tmp_path / "day" / "000001.npz") as file:
        np.testing.assert_array_equal(weight(model), file["day/weight"])
    output.close()


def test_a_second_correction_takes_back_no_other_sentence(run, tmp_path):
    model, output, kept = following(run, tmp_path / "day")
    output.show(final("a", 0, 0.99))
    output.show(final("b", 1, 0.99, "a hat"))
    assert kept.updates == 2
    output.show(Chosen("b", "xyzzy", True))  # left out, since no dictionary has it
    output.show(Chosen("b", "xyzzyx", True))
    output.close()
    assert kept.updates == 1
    with np.load(tmp_path / "day" / "000001.npz") as file:
        np.testing.assert_array_equal(weight(model), file["day/weight"])


@pytest.mark.slow
def test_the_change_of_a_calibrated_day_follows_within_the_bound(run, tmp_path):
    config = transformer_config(DAYS, 16)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, day_change=True))
    follower = Follower(
        Run(config, init_state(config, 2).params, 0), 1, dataclasses.replace(STRONG, bound=0.01)
    )
    before = follower.params["day"]["weight"]
    done = [follower.update(features(seed), LABELS) for seed in range(3)]
    assert done[0].kept
    after = follower.params["day"]["weight"]
    np.testing.assert_array_equal(after[0], before[0])
    # Measured against the identity that the change is added to.
    moved = float(np.sqrt(sum(np.square(follower.moved[name]).sum() for name in follower.moved)))
    assert 0 < moved <= 0.01 * np.sqrt(16) * 1.001


def test_updates_are_taken_back_one_by_one_or_all(run, tmp_path):
    kept, start = Kept(tmp_path, run), {"day/weight": np.zeros(3), "day/bias": np.zeros(2)}
    for value in range(1, 14):
        kept.save({name: np.full_like(one, value) for name, one in start.items()})
    assert kept.undo(2) == 11
    assert float(kept.load(start)["day/weight"][0]) == 11
    with pytest.raises(FollowError, match="has the last 8"):
        kept.undo(9)
    assert kept.undo(None) == 0
    np.testing.assert_array_equal(kept.load(start)["day/weight"], start["day/weight"])
    kept.save({"day/weight": np.ones(4), "day/bias": np.zeros(2)})
    with pytest.raises(FollowError, match="learned by another model"):
        kept.load(start)


def test_a_damaged_update_is_named(run, tmp_path):
    kept, start = Kept(tmp_path, run), {"day/weight": np.zeros(300)}
    kept.save(start)
    path = tmp_path / "000001.npz"
    whole = path.read_bytes()
    for part in (b"", whole[:1], whole[:900], whole[:-40]):
        path.write_bytes(part)
        with pytest.raises(FollowError, match=r"000001.npz is damaged .*take it back"):
            kept.load(start)


@pytest.mark.slow
def test_an_update_that_fails_is_named_and_later_sentences_are_learned(run, tmp_path, monkeypatch):
    _, output, kept = following(run, tmp_path / "day", background=True)
    monkeypatch.setattr(kept, "save", lambda _: (_ for _ in ()).throw(RuntimeError("no memory")))
    output.show(final("a", 0, 0.95))
    deadline = time.monotonic() + 120
    while output.failed is None and time.monotonic() < deadline:
        time.sleep(0.01)
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"an update failed \(no memory\)"):
        output.show(final("b", 1, 0.95))
    output.close()
    assert output.failed is None
    assert lines(tmp_path / "day")[-1]["id"] == "b"


def test_a_record_of_confirmed_sentences_is_data_to_train_on(run, tmp_path):
    log = SentenceLog(tmp_path / "log")
    for number in range(12):
        one = final(f"s{number:02d}", number, 0.5)
        if number == 0:
            one.raw[3, 5] = np.nan
        log.show(one)
        if number != 11:
            log.show(Chosen(one.id, "xyzzy" if number == 10 else TEXT, False))
    log.close()
    reader = open_folder(tmp_path / "log", 16)
    with pytest.warns(UserWarning, match="1 confirmed sentences .* are left out: 'xyzzy'"):
        assert reader.sessions == (DAYS[1],)
    assert [len(reader.find_trials(DAYS[1:], one)) for one in ("train", "val", "test")] == [8, 2, 0]
    trial = reader.read(reader.trials(DAYS[1:], "train")[0])
    assert trial.labels.tolist() == LABELS.tolist()
    assert trial.features[3, 5] == pytest.approx(np.delete(features(0)[:, 5], 3).mean(), abs=1e-5)
    data = dataclasses.replace(run.config.data, root=str(tmp_path / "log"), days_per_batch=1)
    with pytest.warns(UserWarning, match="left out"):
        training = TrainingData(data, DAYS[1:], 14, lambda bins: (bins - 14) // 4 + 1)
    assert training.batch(0, 0).label_length.tolist() == [len(LABELS)] * data.trials_per_day


def test_undo_says_what_it_cannot(capsys, tmp_path):
    assert main(["stream", "--workdir", str(tmp_path), "--undo=none"]) == 2
    assert "needed a number of updates, or all" in capsys.readouterr().err
