"""The optimizer against torch's AdamW, LambdaLR and clip_grad_norm_, written as the recipe says."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from b2txt_jax.config import load_config
from b2txt_jax.model.decoder import init_params
from b2txt_jax.training.optimizer import (
    GROUPS,
    make_optimizer,
    parameter_groups,
    warmup_cosine,
)

CONFIG = load_config("configs/nejm_baseline.py")
RECIPE = dataclasses.replace(
    CONFIG.optimizer,
    warmup_steps=5,
    decay_steps=30,
    day_warmup_steps=8,
    day_decay_steps=20,
    day_learning_rate=0.002,
    clip_norm=1.0,
)


def published_rate(step, peak, floor, warmup, decay):
    if step < warmup:
        return peak * step / max(1, warmup)
    if step < decay:
        progress = (step - warmup) / max(1, decay - warmup)
        ratio = floor / peak
        return peak * max(ratio, ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
    return floor


@pytest.mark.parametrize("step", [0, 1, 999, 1000, 1001, 60_000, 119_999, 120_000, 200_000])
def test_the_learning_rate_is_the_published_one(step):
    rate = warmup_cosine(0.005, 0.0001, 1000, 120_000)(jnp.asarray(step))
    assert float(rate) == pytest.approx(published_rate(step, 0.005, 0.0001, 1000, 120_000), 1e-4)


def test_every_parameter_has_exactly_one_group():
    params = jax.eval_shape(lambda: init_params(CONFIG.model, 512, 45, jax.random.key(0)))
    groups = parameter_groups(params)
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="."): group
        for path, group in jax.tree_util.tree_leaves_with_path(groups)
    }
    assert len(by_path) == len(jax.tree.leaves(params)) == 2 + 20 + 2 + 1
    assert set(by_path.values()) == set(GROUPS)
    assert {name for name, group in by_path.items() if group == "day"} == {
        "day.weight",
        "day.bias",
    }
    expected = {f"gru.bias_{kind}_l{k}" for kind in ("ih", "hh") for k in range(5)}
    assert {n for n, group in by_path.items() if group == "biases"} == {*expected, "head.bias"}
    assert by_path["h0"] == "weights"


def test_thirty_steps_equal_torch_adamw_with_three_groups_and_clipping():
    rng = np.random.default_rng(0)
    shapes = {"day": {"weight": (2, 3, 3)}, "head": {"weight": (4, 3), "bias": (4,)}}
    params = jax.tree.map(
        lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )
    leaves = [params["head"]["bias"], params["day"]["weight"], params["head"]["weight"]]
    mirror = [torch.tensor(leaf, requires_grad=True) for leaf in leaves]
    adamw = torch.optim.AdamW(
        [
            {"params": [mirror[0]], "weight_decay": 0.0},
            {"params": [mirror[1]], "weight_decay": RECIPE.day_weight_decay},
            {"params": [mirror[2]], "weight_decay": RECIPE.weight_decay},
        ],
        lr=1.0,
        betas=(RECIPE.beta1, RECIPE.beta2),
        eps=RECIPE.epsilon,
    )
    optimizer = make_optimizer(RECIPE)
    state = optimizer.init(params)
    for step in range(30):
        gradient = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for leaf, value in zip(
            mirror,
            (gradient["head"]["bias"], gradient["day"]["weight"], gradient["head"]["weight"]),
            strict=True,
        ):
            leaf.grad = torch.tensor(value)
        torch.nn.utils.clip_grad_norm_(mirror, RECIPE.clip_norm)
        main = published_rate(step, 0.005, 0.0001, 5, 30)
        day = published_rate(step, 0.002, 0.0001, 8, 20)
        for group, rate in zip(adamw.param_groups, (main, day, main), strict=True):
            group["lr"] = rate
        adamw.step()
    ours = (params["head"]["bias"], params["day"]["weight"], params["head"]["weight"])
    for got, expected in zip(ours, mirror, strict=True):
        np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
