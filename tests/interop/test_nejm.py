"""A published checkpoint and its converted run hold the same weights and train on alike."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch
from nejm_run import Run, args_with, save

from b2txt_jax.errors import UserError
from b2txt_jax.interop.errors import ConversionError
from b2txt_jax.interop.nejm import COMPILED_PREFIX, read_nejm, write_nejm
from b2txt_jax.interop.weights import expected_shapes, from_named, moments_of, to_named
from b2txt_jax.model.interface import make_model
from b2txt_jax.training.checkpoint import BestScore
from b2txt_jax.training.optimizer import make_optimizer
from b2txt_jax.training.step import model_of

DAYS = [(0, 1), (0, 2), (2,), (0, 1), (0,), (0, 2)]
"""Days of each step's batch."""


@pytest.fixture
def trained() -> Run:
    """Six steps with random gradients; day 1 has had two of them."""
    run = Run(args_with())
    for step, days in enumerate(DAYS):
        run.step(run.random_gradient(step, days))
    return run


def named_parameters(run: Run) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in run.model.named_parameters()}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_weights_come_and_go_bit_for_bit(trained, tmp_path):
    run = read_nejm(trained.save(tmp_path / "theirs"))
    assert_same(to_named(run.state.params), named_parameters(trained))
    assert (run.best.per, run.best.loss, run.best.step) == (0.25, 12.5, 6)
    write_nejm(tmp_path / "back", run)
    loaded = torch.load(tmp_path / "back/checkpoint/best_checkpoint", weights_only=True)
    other = Run(args_with(), seed=1)
    other.model.load_state_dict(loaded["model_state_dict"], strict=True)
    assert_same(named_parameters(other), named_parameters(trained))
    assert (loaded["val_PER"], loaded["val_loss"]) == (0.25, 12.5)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(trained, tmp_path, prefix):
    run = read_nejm(trained.save(tmp_path / "theirs", prefix))
    assert_same(to_named(run.state.params), named_parameters(trained))


def test_a_compiled_model_takes_names_with_its_prefix(trained, tmp_path):
    write_nejm(tmp_path, read_nejm(trained.save(tmp_path / "theirs")), COMPILED_PREFIX)
    loaded = torch.load(tmp_path / "checkpoint/best_checkpoint", weights_only=True)
    other = Run(args_with(), seed=1)
    torch.compile(other.model).load_state_dict(loaded["model_state_dict"], strict=True)
    assert_same(named_parameters(other), named_parameters(trained))


def test_the_optimizers_state_comes_and_goes_bit_for_bit(trained, tmp_path):
    run = read_nejm(trained.save(tmp_path / "theirs"))
    assert int(run.state.step) == 6
    assert moments_of(run.state).steps["day_biases.1"] == 2
    write_nejm(tmp_path / "back", run)
    loaded = torch.load(tmp_path / "back/checkpoint/best_checkpoint", weights_only=True)
    expected = trained.checkpoint()
    assert loaded["scheduler_state_dict"].keys() == expected["scheduler_state_dict"].keys()
    assert loaded["scheduler_state_dict"]["last_epoch"] == 6
    state = loaded["optimizer_state_dict"]["state"]
    assert state.keys() == expected["optimizer_state_dict"]["state"].keys()
    for index, entry in expected["optimizer_state_dict"]["state"].items():
        for name, value in entry.items():
            assert torch.equal(state[index][name], value), (index, name)
    for ours, theirs in zip(
        loaded["optimizer_state_dict"]["param_groups"],
        expected["optimizer_state_dict"]["param_groups"],
        strict=True,
    ):
        assert ours.keys() == theirs.keys()
        assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-6)
        for name in ("params", "weight_decay", "group_type", "initial_lr", "betas", "eps"):
            assert ours[name] == theirs[name]


def ours_after(run, gradients) -> dict[str, np.ndarray]:
    """Our parameters after steps with these gradients."""
    optimizer = make_optimizer(run.config.optimizer, model_of(run.config, 3).group)
    params, state = run.state.params, run.state.optimizer
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        full = {n: gradient.get(n, np.zeros_like(v)) for n, v in to_named(params).items()}
        tree = from_named(full, run.config.model.layers, len(run.config.data.sessions))
        updates, state = update(tree, state, params)
        params = optax.apply_updates(params, updates)
    return to_named(jax.tree.map(np.asarray, params))


@pytest.mark.parametrize("scale", [0.1, 10.0], ids=["unclipped", "clipped"])
def test_training_goes_on_as_in_pytorch(trained, tmp_path, scale):
    run = read_nejm(trained.save(tmp_path / "theirs"))
    days = [(1, 2), (0,), (1,), (0, 1)]
    gradients = [
        {n: scale * g for n, g in trained.random_gradient(100 + k, days[k]).items()}
        for k in range(4)
    ]
    before = named_parameters(trained)
    before = {name: value.copy() for name, value in before.items()}
    for gradient in gradients:
        trained.step(gradient)
    after = named_parameters(trained)
    found = ours_after(run, gradients)
    for name, value in after.items():
        moved = np.abs(value - before[name]).max()
        assert moved > 1e-4, name
        np.testing.assert_allclose(found[name], value, atol=1e-4 * moved, rtol=2e-7, err_msg=name)


def test_pytorch_goes_on_where_we_stopped(trained, tmp_path):
    """The other way round: our state, written, loaded there, and one more step on both sides."""
    run = read_nejm(trained.save(tmp_path / "theirs"))
    write_nejm(tmp_path / "back", run)
    loaded = torch.load(tmp_path / "back/checkpoint/best_checkpoint", weights_only=True)
    other = Run(args_with(), seed=1)
    other.model.load_state_dict(loaded["model_state_dict"])
    other.optimizer.load_state_dict(loaded["optimizer_state_dict"])
    other.scheduler.load_state_dict(loaded["scheduler_state_dict"])
    gradients = [other.random_gradient(7, (0, 1)), other.random_gradient(8, (1, 2))]
    for gradient in gradients:
        other.step(gradient)
    found = ours_after(run, gradients)
    for name, value in named_parameters(other).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_checkpoint_without_optimizer_keeps_its_place_in_the_schedule(trained, tmp_path):
    checkpoint = trained.checkpoint()
    del checkpoint["optimizer_state_dict"], checkpoint["val_loss"]
    run = read_nejm(save(tmp_path / "theirs", checkpoint, trained.args))
    assert int(run.state.step) == 6
    assert moments_of(run.state).steps == {}
    assert run.best.loss == np.inf
    assert any("running means start from zero" in note for note in run.notes)
    counts = [
        int(leaf.count)
        for leaf in jax.tree.leaves(
            run.state.optimizer, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
        )
        if isinstance(leaf, optax.ScaleByScheduleState)
    ]
    assert counts == [6, 6, 6]


def test_restart_takes_the_weights_alone(trained, tmp_path):
    run = read_nejm(trained.save(tmp_path / "theirs"), restart=True)
    assert int(run.state.step) == 0
    assert moments_of(run.state).steps == {}
    assert_same(to_named(run.state.params), named_parameters(trained))


def test_a_folder_its_checkpoint_folder_and_a_file_are_all_taken(trained, tmp_path):
    folder = trained.save(tmp_path / "theirs")
    paths = (folder, folder / "checkpoint", folder / "checkpoint/best_checkpoint")
    assert len({read_nejm(path).config for path in paths}) == 1


def changed(change):
    """A trained run's checkpoint and settings after `change(checkpoint, args)`."""
    run = Run(args_with())
    run.step(run.random_gradient(0, (0, 1, 2)))
    checkpoint, args = run.checkpoint(), run.args
    change(checkpoint, checkpoint["model_state_dict"], args)
    return checkpoint, args


def _set(place, key, value):
    place[key] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, m, a: m.pop("gru.bias_hh_l1"), r"missing weights gru\.bias_hh_l1, unknown w"),
        (lambda c, m, a: _set(m, "extra", torch.ones(1)), "unknown weights extra"),
        (lambda c, m, a: _set(m, "module.h0", m["h0"]), "h0 twice, under different prefixes"),
        (lambda c, m, a: _set(a["model"], "n_units", 7), r"h0 is \(1, 1, 5\).*needs \(1, 1, 7\)"),
        (lambda c, m, a: _set(a["model"], "n_layers", 1), "2 GRU layers.*needs 1"),
        (lambda c, m, a: _set(a["model"], "n_layers", 10**6), "2 GRU layers.*needs 1000000"),
        (lambda c, m, a: _set(a["model"], "n_units", 10**12), r"h0 is \(1, 1, 5\).*10{12}\)"),
        (lambda c, m, a: a["dataset"]["sessions"].pop(), "3 day layers.*lists 2 sessions"),
        (lambda c, m, a: m["out.weight"].data.fill_(np.nan), r"out\.weight has 205 values.*NaN"),
        (lambda c, m, a: _set(m, "h0", m["h0"].long()), "h0 holds int64; needed floating"),
        (lambda c, m, a: _set(m, "h0", "text"), "h0 is str"),
        (lambda c, m, a: c.pop("model_state_dict"), "has no model_state_dict, it holds"),
        (
            lambda c, m, a: _set(c["scheduler_state_dict"], "last_epoch", -3),
            "last_epoch -3.*--restart",
        ),
        (
            lambda c, m, a: c["optimizer_state_dict"]["param_groups"].pop(),
            r"groups of \[5, 6\] parameters; needed \[5, 6, 6\].*--restart",
        ),
        (
            lambda c, m, a: c["optimizer_state_dict"]["state"][0].pop("exp_avg"),
            "lacks exp_avg.*--restart",
        ),
        (
            lambda c, m, a: _set(c["optimizer_state_dict"]["state"][0], "step", torch.tensor(9.0)),
            r"counts \[1, 9\] updates.*--restart",
        ),
        (
            lambda c, m, a: _set(c["optimizer_state_dict"]["state"][0], "exp_avg", torch.ones(2)),
            r"optimizer state: gru\.bias_ih_l0 is \(2,\).*--restart",
        ),
        (
            lambda c, m, a: c["optimizer_state_dict"]["state"][0]["exp_avg_sq"].fill_(-1),
            r"exp_avg_sq of gru\.bias_ih_l0 has values below 0.*--restart",
        ),
    ],
)
def test_faults_are_named_with_what_was_needed(tmp_path, change, message):
    folder = save(tmp_path / "theirs", *changed(change))
    with pytest.raises(ConversionError, match=message):
        read_nejm(folder)


def _optimizer(checkpoint):
    return checkpoint["optimizer_state_dict"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: _set(o, "param_groups", [1, 2]), "param_groups that are not AdamW's"),
        (lambda o: _set(o, "param_groups", None), "param_groups that are not AdamW's"),
        (lambda o: _set(o["param_groups"][0], "params", [[0], [1]]), "param_groups that are not"),
        (lambda o: _set(o["param_groups"][1], "params", [0] * 6), "name a parameter twice"),
        (lambda o: _set(o, "state", {0: 5}), "needed one dictionary per parameter"),
        (lambda o: _set(o, "state", [1]), "needed one dictionary per parameter"),
        (lambda o: _set(o["state"][0], "step", "x"), "gru.bias_ih_l0 has step 'x'"),
        (lambda o: _set(o["state"][0], "step", torch.tensor(np.nan)), "has step nan"),
        (lambda o: _set(o["state"][0], "step", torch.ones(2)), r"has step array\(\[1"),
        (lambda o: _set(o["state"][0], "step", torch.tensor(2.5)), r"has step 2\.5"),
        (lambda o: _set(o["state"][0], "step", 2**31), "has step 2147483648"),
    ],
)
def test_an_optimizer_that_makes_no_sense_can_be_left_out(tmp_path, change, message):
    checkpoint, args = changed(lambda c, m, a: change(_optimizer(c)))
    folder = save(tmp_path / "theirs", checkpoint, args)
    with pytest.raises(ConversionError, match=f"{message}.*--restart"):
        read_nejm(folder)
    assert int(read_nejm(folder, restart=True).state.step) == 0


@pytest.mark.parametrize("step", [2**40, "5", 1.5, [1]])
def test_a_step_that_is_none_can_be_left_out(tmp_path, step):
    change = changed(lambda c, m, a: _set(c["scheduler_state_dict"], "last_epoch", step))
    folder = save(tmp_path / "theirs", *change)
    with pytest.raises(ConversionError, match=r"needed the number of steps done.*--restart"):
        read_nejm(folder)
    assert int(read_nejm(folder, restart=True).state.step) == 0


@pytest.mark.parametrize("score", [np.nan, -0.1, "0.1", 10**400, torch.ones(2)])
def test_a_score_that_is_none_is_beaten_by_any(tmp_path, score):
    change = changed(lambda c, m, a: c.update(val_PER=score, val_loss=np.float64(np.nan)))
    run = read_nejm(save(tmp_path / "theirs", *change))
    assert (run.best.per, run.best.loss) == (np.inf, np.inf)
    assert BestScore(1.0, 100.0, 2).beats(run.best)


def test_a_score_over_other_sessions_is_not_the_one_to_beat(trained, tmp_path):
    """Session 1 has no val file there and here; the score counts until session 2 is left out."""
    trained.args["dataset"]["dataset_probability_val"] = [0, 1, 1]
    assert read_nejm(trained.save(tmp_path / "all")).best.per == 0.25
    trained.args["dataset"]["dataset_probability_val"] = [0, 0, 1]
    run = read_nejm(trained.save(tmp_path / "fewer"))
    assert run.best.per == np.inf
    assert any("leaves out t15.2023.08.13, whose val files" in note for note in run.notes)


def test_what_float32_and_adamw_cannot_hold_is_told(trained, tmp_path):
    checkpoint = trained.checkpoint()
    weights, state = checkpoint["model_state_dict"], _optimizer(checkpoint)["state"]
    weights["h0"] = weights["h0"].double()
    state[0]["max_exp_avg_sq"] = state[0]["exp_avg_sq"]
    run = read_nejm(save(tmp_path / "theirs", checkpoint, trained.args))
    assert "weights in float64 were rounded to float32" in run.notes
    assert any("AMSGrad's max_exp_avg_sq" in note for note in run.notes)


@pytest.mark.filterwarnings("error")
def test_weights_beyond_float32_are_refused_without_a_warning(trained, tmp_path):
    checkpoint = trained.checkpoint()
    checkpoint["model_state_dict"]["h0"] = torch.full((1, 1, 5), 1e300, dtype=torch.float64)
    with pytest.raises(ConversionError, match=r"h0 has 5 values.*beyond float32"):
        read_nejm(save(tmp_path / "theirs", checkpoint, trained.args))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.signal.smooth_std=50", r"needs at least 401"),
        ("--config.signal.smooth_size=9", r"needs at least 17"),
        ("--config.data.sessions=('a','../b','c')", "'../b' is not the name of a folder"),
        ("--config.model.day_layer=False", "3 day layers.*model.day_layer is False"),
    ],
)
def test_overrides_are_checked_as_the_settings_are(trained, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        read_nejm(trained.save(tmp_path / "theirs"), [override])


@pytest.mark.slow
def test_shapes_by_arithmetic_are_those_of_the_model(trained, tmp_path):
    run = read_nejm(trained.save(tmp_path / "theirs"))
    for change in ({}, {"patch_size": 0, "layers": 1}, {"day_layer": False}):
        model = dataclasses.replace(run.config.model, **change)
        config = dataclasses.replace(run.config, model=model)
        made = to_named(make_model(model, 6, 3 if model.day_layer else 1).init(jax.random.key(0)))
        expected = {name: value.shape for name, value in made.items()}
        assert list(expected_shapes(config).items()) == list(expected.items())


def test_missing_files_are_named(trained, tmp_path):
    with pytest.raises(ConversionError, match="holds no checkpoint; needed checkpoint/best_"):
        read_nejm(tmp_path)
    folder = trained.save(tmp_path / "theirs")
    (folder / "checkpoint/args.yaml").unlink()
    with pytest.raises(ConversionError, match=r"args\.yaml does not exist"):
        read_nejm(folder)


def test_half_precision_weights_become_float32_exactly(trained, tmp_path):
    trained.model.bfloat16()
    checkpoint = {"model_state_dict": trained.model.state_dict()}
    run = read_nejm(save(tmp_path / "theirs", checkpoint, trained.args))
    expected = {n: v.detach().float().numpy() for n, v in trained.model.named_parameters()}
    assert_same(to_named(run.state.params), expected)


def test_sessions_without_a_val_file_are_not_validated_there(trained, tmp_path):
    run = read_nejm(trained.save(tmp_path / "theirs"))
    for session in run.config.data.sessions:
        (tmp_path / "data" / session).mkdir(parents=True)
    (tmp_path / "data/t15.2023.08.18/data_val.hdf5").touch()
    data = dataclasses.replace(run.config.data, root=str(tmp_path / "data"))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    write_nejm(tmp_path / "back", run)
    again = (tmp_path / "back/checkpoint/args.yaml").read_text()
    assert "dataset_probability_val:\n  - 0\n  - 0\n  - 1\n" in again
