"""The optimizer against torch's AdamW, LambdaLR and clip_grad_norm_, written as the recipe says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from published import optimizer_and_schedule, rate_factor

from b2txt_jax.config import load_config
from b2txt_jax.model.interface import make_model
from b2txt_jax.training.optimizer import (
    make_optimizer,
    warmup_cosine,
    warmup_steps,
)

CONFIG = load_config("configs/nejm_baseline.py")
MODEL = make_model(CONFIG.model, 512, 45)


@pytest.mark.parametrize("step", [0, 1, 999, 1000, 1001, 60_000, 119_999, 120_000, 200_000])
def test_the_learning_rate_is_the_published_one(step):
    rate = warmup_cosine(0.005, 0.0001, 1000, 120_000)(jnp.asarray(step))
    assert float(rate) == pytest.approx(
        0.005 * rate_factor(step, 0.0001 / 0.005, 1000, 120_000), 1e-4
    )


def test_step_decay_is_that_of_torch_after_a_linear_warm_up():
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([parameter], lr=0.002)
    schedule = torch.optim.lr_scheduler.MultiStepLR(theirs, [30, 45], gamma=0.1)
    ours = jax.jit(warmup_steps(0.002, 10, (30, 45), 0.1))
    for step in range(60):
        expected = schedule.get_last_lr()[0] * min(step / 10, 1)
        assert float(ours(step)) == pytest.approx(expected, rel=1e-5)
        theirs.step()
        schedule.step()
    assert float(warmup_steps(0.002, 0, (), 0.1)(0)) == pytest.approx(0.002)


def test_every_parameter_has_exactly_one_group():
    params = jax.eval_shape(lambda: MODEL.init(jax.random.key(0)))
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    by_path = {path.replace("/", "."): MODEL.group(path, leaf) for path, leaf in paths.items()}
    assert len(by_path) == len(jax.tree.leaves(params)) == 2 + 20 + 2 + 1
    assert set(by_path.values()) == {"weights", "biases", "day"}
    assert {name for name, group in by_path.items() if group == "day"} == {
        "day.weight",
        "day.bias",
    }
    expected = {f"gru.bias_{kind}_l{k}" for kind in ("ih", "hh") for k in range(5)}
    assert {n for n, group in by_path.items() if group == "biases"} == {*expected, "head.bias"}
    assert by_path["h0"] == "weights"


DAYS, FEATURES, CLASSES = 6, 5, 4
TARGET = dataclasses.replace(
    CONFIG.optimizer,
    learning_rate=0.05,
    learning_rate_min=0.001,
    warmup_steps=20,
    decay_steps=180,
    day_learning_rate=0.02,
    day_learning_rate_min=0.002,
    day_warmup_steps=30,
    day_decay_steps=150,
    weight_decay=0.1,
    day_weight_decay=0.05,
    clip_norm=2.0,
)


def problem(steps):
    """A regression through the day layers; each step has trials of two of six days."""
    rng = np.random.default_rng(0)
    params = {
        "day": {
            "weight": np.tile(np.eye(FEATURES), (DAYS, 1, 1)),
            "bias": np.zeros((DAYS, FEATURES)),
        },
        "head": {"weight": rng.normal(size=(CLASSES, FEATURES)), "bias": rng.normal(size=CLASSES)},
        "h0": rng.normal(size=(1, 1, FEATURES)),
    }
    data = [
        (
            rng.normal(size=(4, FEATURES)),
            np.repeat(rng.choice(DAYS, 2, replace=False), 2),
            3 * rng.normal(size=(4, CLASSES)),
        )
        for _ in range(steps)
    ]
    return jax.tree.map(lambda a: a.astype(np.float32), params), data


def torch_run(params, data, config):
    """Parameters after the steps and how many of these were clipped; a parameter per day."""
    rows = {
        name: [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in values]
        for name, values in params["day"].items()
    }
    rest = [
        torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for value in (params["head"]["weight"], params["head"]["bias"], params["h0"])
    ]
    weight, bias, h0 = rest
    days = [*rows["weight"], *rows["bias"]]
    adamw, schedule = optimizer_and_schedule(config, [bias], days, [weight, h0])
    clipped = 0
    for x, day, target in data:
        adamw.zero_grad()
        mixed = torch.stack(
            [
                torch.tensor(row) @ rows["weight"][d] + rows["bias"][d]
                for row, d in zip(x, day, strict=True)
            ]
        )
        states = torch.nn.functional.softsign(mixed) + h0[0]
        (states @ weight.T + bias - torch.tensor(target)).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_([*days, *rest], config.clip_norm)
        clipped += bool(norm > config.clip_norm)
        adamw.step()
        schedule.step()
    days_after = {name: torch.stack(values) for name, values in rows.items()}
    after = {"day": days_after, "head": {"weight": weight, "bias": bias}, "h0": h0}
    return jax.tree.map(lambda value: value.detach().numpy(), after), clipped


def our_run(params, data, config):
    optimizer = make_optimizer(config, MODEL.group)

    def loss(params, x, day, target):
        mixed = jnp.einsum("bd,bdk->bk", x, params["day"]["weight"][day])
        states = jax.nn.soft_sign(mixed + params["day"]["bias"][day]) + params["h0"][0]
        outputs = states @ params["head"]["weight"].T + params["head"]["bias"]
        return jnp.square(outputs - target).sum()

    @jax.jit
    def step(params, state, batch):
        updates, state = optimizer.update(jax.grad(loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for x, day, target in data:
        params, state = step(params, state, (x.astype(np.float32), day, target.astype(np.float32)))
    return params


@pytest.mark.parametrize("clip_norm", [60.0, 0.5], ids=["clipped at times", "always clipped"])
def test_two_hundred_steps_equal_torch_adamw_with_three_groups_and_clipping(clip_norm):
    config = dataclasses.replace(TARGET, clip_norm=clip_norm)
    params, data = problem(200)
    expected, clipped = torch_run(params, data, config)
    assert 20 < clipped < 180 if clip_norm > 1 else clipped == 200
    got = our_run(params, data, config)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)
    moved = [
        np.abs(got["day"]["weight"][d] - params["day"]["weight"][d]).max() for d in range(DAYS)
    ]
    assert min(moved) > 0.01


def test_a_day_without_trials_stays_where_its_last_trial_left_it():
    params, data = problem(60)
    without_day_2 = [batch for batch in data[30:] if 2 not in batch[1]]
    assert len(without_day_2) > 10
    before = our_run(params, data[:30], TARGET)
    after = our_run(params, [*data[:30], *without_day_2], TARGET)
    assert np.abs(before["day"]["weight"][2] - params["day"]["weight"][2]).max() > 0.01
    np.testing.assert_array_equal(after["day"]["weight"][2], before["day"]["weight"][2])
    np.testing.assert_array_equal(after["day"]["bias"][2], before["day"]["bias"][2])
    assert np.abs(after["day"]["weight"][3] - before["day"]["weight"][3]).max() > 1e-3
