"""A published checkpoint and its converted run hold the same weights and train on alike."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch
from nejm_run import Run, args_with, save

from b2txt_jax.interop.errors import ConversionError
from b2txt_jax.interop.nejm import COMPILED_PREFIX, read_nejm, write_nejm
from b2txt_jax.interop.weights import from_named, moments_of, to_named
from b2txt_jax.training.optimizer import make_optimizer

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
    optimizer = make_optimizer(run.config.optimizer)
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
        (lambda c, m, a: _set(a["model"], "n_layers", 1), "unknown weights gru.weight_ih_l1"),
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
            r"optimizer state: gru\.bias_ih_l0 is \(2,\)",
        ),
    ],
)
def test_faults_are_named_with_what_was_needed(tmp_path, change, message):
    folder = save(tmp_path / "theirs", *changed(change))
    with pytest.raises(ConversionError, match=message):
        read_nejm(folder)


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
