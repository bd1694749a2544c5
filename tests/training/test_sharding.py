"""The same run on other numbers of devices and hosts; where every parameter lives."""

import dataclasses
import json
import shutil
import subprocess
import sys

import h5py
import jax
import numpy as np
import pytest
from devices import environment, finish, losses, start, train_here, validations
from jax.sharding import AbstractMesh, PartitionSpec

from b2txt_jax.config import ConfigError, load_config, with_overrides
from b2txt_jax.data.loader import EvaluationData, configured_sessions
from b2txt_jax.training.checkpoint import Checkpoints
from b2txt_jax.training.sharding import (
    abstract_state,
    check_rows,
    make_mesh,
    sharded_state,
    state_shardings,
)
from b2txt_jax.training.step import model_of

STEPS = 4


@pytest.fixture(scope="module")
def overrides(tiny_overrides):
    """Rows for up to eight devices; every step logged; with dropout and augmentation."""
    return [
        *tiny_overrides,
        "--config.model.layers=1",
        "--config.data.trials_per_day=2",
        "--config.data.eval_batch_size=8",
        f"--config.train.steps={STEPS}",
        "--config.train.log_every=1",
        f"--config.train.validate_every={STEPS // 2}",
        f"--config.train.save_every={STEPS // 2}",
        "--config.optimizer.warmup_steps=2",
    ]


@pytest.fixture(scope="module")
def alone_in(overrides, tmp_path_factory):
    """Folder of the run on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    train_here(workdir, overrides)
    return workdir


@pytest.fixture(scope="module")
def alone(alone_in):
    """Losses of the run on one device."""
    found = losses(alone_in)
    assert len(found) == STEPS
    assert found[-1] < found[0]
    return found


def assert_same_validations(workdir, expected):
    """Everything that is counted is equal; the loss is, to rounding."""
    found, wanted = validations(workdir), validations(expected)
    assert [entry["step"] for entry in wanted] == [STEPS // 2, STEPS]
    np.testing.assert_allclose(
        [entry.pop("loss") for entry in found], [entry.pop("loss") for entry in wanted], rtol=1e-5
    )
    assert found == wanted


@pytest.fixture(scope="module")
def shared(overrides, tmp_path_factory):
    """Folder and outputs of the run on a number of devices."""
    runs = {}

    def run(devices, processes, model_axis):
        key = (devices, processes, model_axis)
        if key not in runs:
            workdir = tmp_path_factory.mktemp("shared")
            more = [*overrides, f"--config.parallel.model_axis={model_axis}"]
            runs[key] = workdir, finish(start(workdir, more, devices, processes))
        return runs[key]

    return run


@pytest.mark.parametrize(
    ("devices", "processes", "model_axis"),
    [
        pytest.param(8, 1, 1, id="8 devices", marks=pytest.mark.slow),
        pytest.param(8, 1, 2, id="4 x 2 devices", marks=pytest.mark.slow),
        pytest.param(4, 2, 1, id="2 processes of 4 devices", marks=pytest.mark.slow),
        pytest.param(2, 2, 2, id="2 processes of 2 devices"),
    ],
)
def test_the_losses_are_those_of_one_device(
    devices, processes, model_axis, shared, alone, alone_in
):
    workdir, outputs = shared(devices, processes, model_axis)
    assert f"on {devices * processes} cpu" in " ".join(outputs[0].split())
    np.testing.assert_allclose(losses(workdir), alone, rtol=1e-5)
    assert_same_validations(workdir, alone_in)
    for silent in outputs[1:]:
        assert "sessions" not in silent  # one process speaks for all


TWENTY_STEPS = """
import json
import jax, numpy as np
from b2txt_jax.config import load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.training.sharding import jit_train_step, make_mesh, place, sharded_state

values = {"model.units": 16, "model.layers": 2, "data.feature_count": 8, "train.steps": 20}
values["optimizer.warmup_steps"] = 2
config = load_config("configs/demo.py", [f"--config.{k}={v}" for k, v in values.items()])
rng = np.random.default_rng(0)
batches = [
    Batch(
        rng.normal(size=(8, 60, 8)).astype(np.float32),
        rng.integers(40, 61, 8).astype(np.int32),
        rng.integers(0, 3, 8).astype(np.int32),
        rng.integers(1, 41, (8, 6)).astype(np.int32),
        rng.integers(1, 7, 8).astype(np.int32),
    )
    for _ in range(20)
]
for devices in (1, 8):
    mesh = make_mesh(devices=jax.devices()[:devices])
    state, step, losses = sharded_state(config, 3, mesh), jit_train_step(config, 3, mesh), []
    for batch in batches:
        state, metrics = step(state, place(batch, mesh))
        losses.append(float(metrics.loss))
    moments = jax.tree.leaves(state.optimizer)
    held = sum(leaf.addressable_shards[0].data.size for leaf in moments)
    print(json.dumps([losses, held / sum(leaf.size for leaf in moments)]))
"""


@pytest.mark.slow
def test_twenty_steps_on_eight_devices_that_share_the_moments_have_the_losses_of_one():
    command = [sys.executable, "-c", TWENTY_STEPS]
    found = subprocess.run(command, env=environment(8), capture_output=True, text=True, check=True)
    (alone, whole), (shared, share) = map(json.loads, found.stdout.splitlines())
    assert len(alone) == 20
    np.testing.assert_allclose(shared, alone, rtol=1e-5)
    assert whole == 1
    assert share < 0.25


ADDED_IN_BFLOAT16 = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec
from b2txt_jax.config import load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.model.product import gradients_added_in, linear
from b2txt_jax.training.sharding import jit_train_step, make_mesh, place, sharded_state

mesh = make_mesh()
rng = np.random.default_rng(0)
x, weight = rng.normal(size=(3, 8, 64)), rng.normal(size=(16, 64))
x, weight = (a.astype(jnp.bfloat16).astype(np.float32) for a in (x, weight))

def loss(weight, x):
    return linear(x, weight, jnp.dtype("bfloat16")).sum()

whole, rows = (jax.NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "data")))
with gradients_added_in(jnp.bfloat16):
    gradient = jax.jit(jax.grad(loss), in_shardings=(whole, rows), out_shardings=whole)(weight, x)
parts = x.sum(0).astype(jnp.bfloat16).astype(np.float32)
print(json.dumps([np.asarray(gradient[0]).tolist(), parts.sum(0).tolist(), x.sum((0, 1)).tolist()]))

values = {"model.units": 32, "model.layers": 2, "data.feature_count": 8, "train.steps": 120}
values |= {"optimizer.warmup_steps": 2, "model.dtype": "bfloat16"}
batches = [
    Batch(
        rng.normal(size=(8, 60, 8)).astype(np.float32),
        rng.integers(40, 61, 8).astype(np.int32),
        rng.integers(0, 3, 8).astype(np.int32),
        rng.integers(1, 41, (8, 6)).astype(np.int32),
        rng.integers(1, 7, 8).astype(np.int32),
    )
    for _ in range(4)
]
for dtype in ("float32", "bfloat16"):
    values["parallel.reduce_dtype"] = dtype
    config = load_config("configs/demo.py", [f"--config.{k}={v}" for k, v in values.items()])
    state, step, losses = sharded_state(config, 3, mesh), jit_train_step(config, 3, mesh), []
    for number in range(120):
        state, metrics = step(state, place(batches[number % 4], mesh))
        losses.append(float(metrics.loss))
    print(json.dumps(losses))
"""


@pytest.mark.slow
def test_training_on_eight_devices_that_add_gradients_in_bfloat16_converges_as_in_float32():
    command = [sys.executable, "-c", ADDED_IN_BFLOAT16]
    found = subprocess.run(command, env=environment(8), capture_output=True, text=True, check=True)
    (gradient, parts, exact), plain, rounded = map(json.loads, found.stdout.splitlines())
    # Each device's part is rounded to 8 bits, and so are their sums.
    np.testing.assert_allclose(gradient, parts, rtol=0.02, atol=0.06)
    assert not np.array_equal(gradient, np.float32(exact))
    ends = [np.mean(losses[-20:]) for losses in (plain, rounded)]
    assert ends[0] < 0.8 * plain[0]
    assert ends[1] == pytest.approx(ends[0], rel=0.03)
    np.testing.assert_allclose(rounded[:20], plain[:20], rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise_units", "patch"), [(0, 0), (16, 4)], ids=["as wide as a patch", "bottleneck"]
)
def test_the_triple_gru_has_the_losses_of_one_device_when_devices_share_its_units(
    noise_units, patch, overrides, tmp_path
):
    model = {
        "name": "triple_gru",
        **{"noise_units": noise_units, "noise_layers": 2, "noisy_layers": 1},
        **{"patch_size": patch, "patch_stride": patch or 1, "recompute_frames": 32},
    }
    more = [*overrides, *(f"--config.model.{key}={value}" for key, value in model.items())]
    # Shorter than the other runs: 320 frames of bins are slow on a CPU. One process:
    # between two, every frame would wait for a socket, for more than five minutes in all.
    more += ["--config.train.steps=5", "--config.train.validate_every=5"]
    more += ["--config.data.buckets=((320, 80),)"]
    finish(start(tmp_path / "alone", more))
    shared = [*more, "--config.parallel.model_axis=4"]
    finish(start(tmp_path / "shared", shared, devices=8))
    np.testing.assert_allclose(losses(tmp_path / "shared"), losses(tmp_path / "alone"), rtol=1e-5)


def without_features_of_others(narrow, config, rows, to):
    """Copies the sessions; of the validation trials only those in these rows of their batches can
    be read, and of the others the bins of the data's fingerprint. Returns how many."""
    shutil.copytree(narrow, to)
    data = EvaluationData(config.data, configured_sessions(config.data), "val", 14, labels=True)
    mine = {index for indices, _, _ in data.batches(rows) for index in indices}
    for index, ref in enumerate(data.refs):
        if index not in mine:
            with h5py.File(to / ref.session / "data_val.hdf5", "r+") as file:
                features = file[ref.name.split("/")[1]]["input_features"]
                read = [0, len(features) // 2, len(features) - 1]
                broken = np.full(features.shape, np.nan, np.float32)
                broken[read] = features[read]
                features[...] = broken
    return len(mine)


@pytest.mark.slow
def test_each_of_two_processes_reads_only_its_rows_in_validation_and_gets_the_result_of_one(
    overrides, alone_in, tiny_config, narrow, tmp_path
):
    """Each process has sessions of its own, in which the other's validation trials are broken."""
    config = with_overrides(tiny_config, ["--config.data.eval_batch_size=8"])
    roots = [tmp_path / "first", tmp_path / "second"]
    counts = [
        without_features_of_others(narrow, config, slice(4 * host, 4 * host + 4), root)
        for host, root in enumerate(roots)
    ]
    assert sum(counts) == 12
    assert min(counts) >= 4
    own = [[f"--config.data.root={root}"] for root in roots]
    finish(start(tmp_path / "run", overrides, devices=4, processes=2, own=own))
    assert_same_validations(tmp_path / "run", alone_in)


def test_a_run_saved_on_four_devices_goes_on_with_one(overrides, shared, alone, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(shared(2, 2, 2)[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "latest" / str(STEPS))
    assert f"going on from step {STEPS // 2}" in train_here(workdir, overrides)
    np.testing.assert_allclose(losses(workdir), alone, rtol=1e-5)


def test_the_day_layers_are_split_and_everything_else_is_on_every_device():
    config = load_config("configs/nejm_baseline.py")
    state = abstract_state(config, 45)
    shardings = state_shardings(state, make_mesh(1), model_of(config, 45))
    by_name = {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
    }
    assert len(by_name) == len(jax.tree.leaves(state))
    split = {name for name, spec in by_name.items() if spec != PartitionSpec()}
    # The day layers and their two moments; everything else is on every device.
    assert split == {name for name in by_name if "day/weight" in name or "day/bias" in name}
    assert len(split) == 6


@pytest.mark.parametrize(("devices", "model_axis"), [(16, 1), (4, 2)])
def test_each_device_holds_its_share_of_the_moments_and_all_parameters(devices, model_axis):
    config = load_config("configs/nejm_baseline.py")
    state = abstract_state(config, 45)
    mesh = AbstractMesh((devices, model_axis), ("data", "model"))
    shardings = state_shardings(state, mesh, model_of(config, 45))

    def held(leaves, placed):
        """Scalars on one device."""
        pairs = zip(jax.tree.leaves(leaves), jax.tree.leaves(placed), strict=True)
        return sum(int(np.prod(where.shard_shape(leaf.shape))) for leaf, where in pairs)

    assert "data" not in {axis for one in jax.tree.leaves(shardings.params) for axis in one.spec}
    parameters = held(state.params, shardings.params)
    moments = held(state.optimizer, shardings.optimizer)
    assert moments == pytest.approx(2 * parameters / devices, rel=0.05)  # vectors are whole


def test_rows_that_the_devices_cannot_share_are_refused():
    mesh = make_mesh(1)
    check_rows(mesh.shape["data"] * 3, "data.eval_batch_size", mesh)

    class Eight:  # the shape is all that is asked for
        shape = {"data": 8, "model": 1}  # noqa: RUF012

    with pytest.raises(ConfigError, match=r"10 rows \(data.eval_batch_size\), which 8 devices"):
        check_rows(10, "data.eval_batch_size", Eight())


def test_a_model_axis_that_does_not_divide_the_devices_is_refused():
    with pytest.raises(ConfigError, match=r"parallel.model_axis is 3; needed a divisor of the 1"):
        make_mesh(3, jax.devices()[:1])


def test_restoring_keeps_values_and_takes_the_new_placement(tiny_config, tmp_path):
    config = dataclasses.replace(
        tiny_config, data=dataclasses.replace(tiny_config.data, sessions=("a", "b"))
    )
    state = sharded_state(config, 2, make_mesh(1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_latest(0, state, None)
        checkpoints.wait()
        like = sharded_state(config, 2, make_mesh(1))
        restored, _ = checkpoints.restore_latest(like)
    for ours, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, wanted)
        assert ours.sharding == wanted.sharding
