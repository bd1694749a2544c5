"""The train step's program under bfloat16: which dtypes are where; and any mix of input dtypes.

The program is the one that the compiler is given (the jaxpr), which is the same on every machine.
What is made of it is not: backends rewrite dtypes, and a CPU, which has no bfloat16 products,
computes them in float32.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from published import random_params

import b2txt_jax.model.gru.baseline
from b2txt_jax.config import ConfigError, ParallelConfig, load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.model.transformer import TransformerSettings
from b2txt_jax.training.ctc import ctc_loss
from b2txt_jax.training.step import init_state, make_eval_step, make_train_step

DAYS, FEATURES, LAYERS = 3, 8, 3
BASELINE = load_config("configs/nejm_baseline.py")
CONFIG = dataclasses.replace(
    BASELINE,
    data=dataclasses.replace(BASELINE.data, feature_count=FEATURES),
    signal=dataclasses.replace(BASELINE.signal, static_gain_std=0.01),
    model=dataclasses.replace(
        BASELINE.model, units=16, layers=LAYERS, dtype="bfloat16", recurrence="scan"
    ),
)
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")


def batch_of() -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        rng.normal(size=(4, 60, FEATURES)).astype(np.float32),
        np.array([60, 50, 40, 60], np.int32),
        np.array([0, 2, 2, 1], np.int32),
        rng.integers(1, 41, (4, 9)).astype(np.int32),
        np.array([5, 3, 0, 2], np.int32),
    )


def equations(jaxpr, scope: str = "") -> Iterator[tuple[str, object]]:
    """Every equation of a program and of the programs in it (loops, branches), with its scope."""
    for equation in jaxpr.eqns:
        name = f"{scope}/{equation.source_info.name_stack}"
        yield name, equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, name)


@functools.cache
def step_equations(config) -> list[tuple[str, object]]:
    state = jax.eval_shape(lambda: init_state(config, DAYS))
    return list(equations(jax.make_jaxpr(make_train_step(config, DAYS))(state, batch_of()).jaxpr))


def dtypes(equation) -> set[str]:
    values = [*equation.invars, *equation.outvars]
    return {str(v.aval.dtype) for v in values if hasattr(v.aval, "dtype")}


def products(found, backward: bool) -> list[set[str]]:
    """Operand dtypes of each matrix product and convolution in one pass of the model."""
    return [
        {str(value.aval.dtype) for value in equation.invars}
        for name, equation in found
        if equation.primitive.name in PRODUCTS
        and "model" in name
        and ("transpose(" in name) == backward
    ]


def bfloat16_in(found, scope: str) -> list[str]:
    """Equations of a scope, forward or backward, that touch a bfloat16 value."""
    inside = [equation for name, equation in found if scope in name]
    assert inside, f"the program has no scope {scope}"
    return [e.primitive.name for e in inside if "bfloat16" in dtypes(e)]


# The day layer, an input product and a recurrent one (in two forms, one per platform) per layer,
# the head. The first input product, that of the patches, has two forms, too. Backward, each has two
# gradients, of which a loop holds the recurrent products' first.
FORWARD = 1 + 3 * LAYERS + 1 + 1
BACKWARD = 2 * 1 + (2 + 2 + 1) * LAYERS + 2 * 1 + 2 * 1


@pytest.mark.parametrize(("backward", "count"), [(False, FORWARD), (True, BACKWARD)])
def test_every_product_of_the_model_has_bfloat16_operands(backward, count):
    found = products(step_equations(CONFIG), backward)
    assert len(found) == count
    assert all(operands == {"bfloat16"} for operands in found), found


TRANSFORMER = dataclasses.replace(
    CONFIG,
    model=TransformerSettings(
        name="transformer",
        dtype="bfloat16",
        day_layer=True,
        width=16,
        layers=LAYERS,
        heads=2,
        head_width=8,
        feedforward=24,
    ),
)


@pytest.mark.parametrize("backward", [False, True])
def test_every_product_of_the_transformer_has_bfloat16_operands(backward):
    found = products(step_equations(TRANSFORMER), backward)
    # The day layer, the patches, six in each layer and the head. Backward, each has two.
    assert len(found) == (1 + 1 + 6 * LAYERS + 1) * (2 if backward else 1)
    assert all(operands == {"bfloat16"} for operands in found), found


def test_the_transformer_s_exponentials_and_residuals_are_float32():
    for name, equation in step_equations(TRANSFORMER):
        if equation.primitive.name in ("exp", "rsqrt", "erf", "add_any"):
            assert dtypes(equation) == {"float32"}, (name, equation)


def reduced(config):
    return dataclasses.replace(config, parallel=ParallelConfig(reduce_dtype="bfloat16"))


# Weights: input (the first in two forms) and recurrent ones of each layer, and the head. In the
# Transformer the patches, four in each layer, and the head. Of both, the days' are picked for each
# row and added there.
@pytest.mark.parametrize(
    ("config", "weights"), [(CONFIG, 2 * LAYERS + 1 + 1), (TRANSFORMER, 4 * LAYERS + 2)]
)
def test_the_gradients_of_weights_and_no_others_are_added_in_the_dtype_of_the_reduction(
    config, weights
):
    for one, count, days in ((config, 0, "float32"), (reduced(config), weights, "bfloat16")):
        found = [e for name, e in step_equations(one) if "transpose(" in name and "model" in name]
        results = [e.outvars[0].aval for e in found if e.primitive.name in PRODUCTS]
        assert [str(aval.dtype) for aval in results].count("bfloat16") == count
        added = [e.outvars[0].aval for e in found if e.primitive.name == "scatter-add"]
        assert days in {
            str(aval.dtype) for aval in added if aval.shape == (DAYS, FEATURES, FEATURES)
        }


def test_gradients_cannot_be_added_in_fewer_digits_than_products_have():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dtype="float32"))
    with pytest.raises(
        ConfigError, match="reduce_dtype is 'bfloat16', but products are in float32"
    ):
        make_train_step(reduced(config), DAYS)


@pytest.mark.slow
def test_losses_with_gradients_added_in_bfloat16_stay_near_those_in_float32():
    model = dataclasses.replace(CONFIG.model, layers=1)
    optimizer = dataclasses.replace(CONFIG.optimizer, warmup_steps=1, day_warmup_steps=1)
    config = dataclasses.replace(CONFIG, model=model, optimizer=optimizer)
    losses = []
    for one in (config, reduced(config)):
        state, step = init_state(one, DAYS), jax.jit(make_train_step(one, DAYS))
        found = []
        for _ in range(8):
            state, metrics = step(state, batch_of())
            found.append(float(metrics.loss))
        losses.append(found)
    plain, rounded = map(np.array, losses)
    assert plain[-1] < 0.95 * plain[0]
    assert (plain[2:] != rounded[2:]).any()
    np.testing.assert_allclose(rounded, plain, rtol=0.01)


def test_a_float32_product_in_the_forward_pass_is_found(monkeypatch):
    original = b2txt_jax.model.gru.baseline.day_layer

    def without_cast(x, day, weight, bias, dtype):
        return original(x, day, weight, bias, jnp.dtype("float32")).astype(dtype)

    monkeypatch.setattr(b2txt_jax.model.gru.baseline, "day_layer", without_cast)
    changed = step_equations.__wrapped__(CONFIG)  # what is kept is of the original
    found = products(changed, backward=False)
    assert found.count({"float32"}) == 1
    assert len(found) == FORWARD


def test_the_float32_configuration_has_no_bfloat16_anywhere():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dtype="float32"))
    found = step_equations(config)
    assert products(found, backward=False) == [{"float32"}] * FORWARD
    assert products(found, backward=True) == [{"float32"}] * BACKWARD
    assert not [name for name, equation in found if "bfloat16" in dtypes(equation)]


@pytest.mark.parametrize("scope", ["ctc", "optimizer"])
def test_the_loss_and_the_optimizer_never_see_bfloat16(scope):
    assert bfloat16_in(step_equations(CONFIG), scope) == []


def test_bfloat16_in_the_loss_is_found():
    batch = batch_of()

    def careless(logits):
        with jax.named_scope("ctc"):
            halves = logits.astype(jnp.bfloat16)
            return ctc_loss(halves, jnp.full(4, 12), batch.labels, batch.label_length).sum()

    program = jax.make_jaxpr(jax.grad(careless))(jnp.zeros((4, 12, 41)))
    assert bfloat16_in(list(equations(program.jaxpr)), "ctc")


def test_noise_and_smoothing_are_float32():
    found = step_equations(CONFIG)
    outside = [e for name, e in found if "model" not in name and "ctc" not in name]
    # Outside the model only its float32 parameters and logits are left.
    assert not [e.primitive.name for e in outside if "bfloat16" in dtypes(e)]


def test_parameters_gradients_and_moments_are_float32():
    state = jax.eval_shape(lambda: init_state(CONFIG, DAYS))
    after, metrics = jax.eval_shape(make_train_step(CONFIG, DAYS), state, batch_of())
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves((state, after))}
    assert kinds == {"float32", "int32"}
    assert metrics.loss.dtype == metrics.gradient_norm.dtype == jnp.float32


# Each of the float types, of the integer types and of the places; `slow` are all combinations.
FEW = [
    (np.float16, np.int16, jnp.asarray),
    (ml_dtypes.bfloat16, np.int64, np.asarray),
    (np.float32, np.int32, jnp.asarray),
    (np.float64, np.int16, np.asarray),
]
MIXES = pytest.mark.parametrize(
    ("floats", "integers", "place"),
    [
        pytest.param(*mix, marks=[] if mix in FEW else pytest.mark.slow)
        for mix in itertools.product(
            (np.float16, ml_dtypes.bfloat16, np.float32, np.float64),
            (np.int16, np.int32, np.int64),
            (np.asarray, jnp.asarray),
        )
    ],
)


def mixed(floats, integers, place) -> tuple[Batch, Batch]:
    """A batch of these dtypes, and the float32 and int32 batch of the same values."""
    batch = batch_of()
    features = batch.features.astype(floats)
    integer = [place(value.astype(integers)) for value in batch[1:5]]
    return Batch(place(features), *integer), batch._replace(features=features.astype(np.float32))


@functools.cache
def shapes_of_plain():
    """Shapes and dtypes that the two steps return for a float32 and int32 batch."""
    state = jax.eval_shape(lambda: init_state(CONFIG, DAYS))
    train_step, eval_step = make_train_step(CONFIG, DAYS), make_eval_step(CONFIG, DAYS)
    after = jax.eval_shape(train_step, state, batch_of())
    return after, jax.eval_shape(eval_step, state.params, batch_of())


@MIXES
def test_any_mix_of_input_dtypes_is_taken_and_gives_the_same_output_dtypes(floats, integers, place):
    batch, _ = mixed(floats, integers, place)
    state = jax.eval_shape(lambda: init_state(CONFIG, DAYS))
    train_step, eval_step = make_train_step(CONFIG, DAYS), make_eval_step(CONFIG, DAYS)
    after, wanted = shapes_of_plain()
    assert jax.eval_shape(train_step, state, batch) == after
    got = jax.eval_shape(eval_step, state.params, batch)
    assert (got.logits, got.loss) == (wanted.logits, wanted.loss)


@pytest.mark.parametrize(
    ("floats", "integers", "place"),
    [(np.float16, np.int16, jnp.asarray), (np.float64, np.int64, np.asarray)],
)
def test_other_input_dtypes_give_the_result_of_the_same_values_in_float32(floats, integers, place):
    params = random_params(CONFIG.model, FEATURES, DAYS)
    step = jax.jit(make_eval_step(CONFIG, DAYS))
    batch, plain = mixed(floats, integers, place)
    leaves = (jax.tree.leaves(step(params, one)) for one in (batch, plain))
    for got, wanted in zip(*leaves, strict=True):
        np.testing.assert_array_equal(got, wanted)
