"""The training step lowered for an NVIDIA GPU, on a machine without one."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from b2txt_jax.config import load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.training.step import init_state, make_train_step


def test_it_has_one_kernel_for_ctc_one_loop_each_way_and_no_convolution():
    keys = ("model.units=4", "model.layers=3", "data.feature_count=2")
    config = load_config("nejm_baseline", [f"--config.{key}" for key in keys])
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    features, labels = jnp.zeros((8, 60, 2)), jnp.ones((8, 5), jnp.int32)
    batch = Batch(features, jnp.full(8, 60), jnp.zeros(8, jnp.int32), labels, jnp.full(8, 5))
    state = jax.eval_shape(lambda: init_state(config, 2))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(make_train_step(config, 2)).trace(state, batch)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"custom_call @(\S*?)\(", program) == ["__gpu$xla.gpu.triton"]
    assert program.count("stablehlo.while") == 2
    assert "stablehlo.convolution" not in program
