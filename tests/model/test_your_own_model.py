"""The model of docs/your_own_model.md: outside the package, through every command."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from b2txt_jax.cli import main
from b2txt_jax.config import ConfigError, load_config, with_overrides
from b2txt_jax.data.batches.layout import Shape
from b2txt_jax.training.compiled import abstract_batch
from b2txt_jax.training.sharding import abstract_state, jit_train_step, make_mesh
from b2txt_jax.training.step import model_of
from tests.conftest import FEATURES

REPOSITORY = Path(__file__).parents[2]
DEMO = str(REPOSITORY / "configs/demo.py")
NAME = "--config.model.name=my_models.convolutions:Convolutions"
SMALL = [NAME, "--config.model.width=8", "--config.model.layers=2"]
NOISE = """
import jax
import jax.numpy as jnp

def drop_channels(key, x, bins, rate):
    return jnp.where(jax.random.bernoulli(key, rate, x.shape[-1:]), 0, x), bins
"""


@pytest.fixture
def my_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The documented file in a folder on Python's path."""
    document = (REPOSITORY / "docs/your_own_model.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    folder = tmp_path / "path" / "my_models"
    folder.mkdir(parents=True)
    (folder / "convolutions.py").write_text(code)
    (folder / "noise.py").write_text(NOISE)
    (folder / "half.py").write_text(
        "from b2txt_jax.model.interface import Model\n"
        "class Half(Model):\n    def init(self, key): ...\n"
        "class Other: ...\n"
    )
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def overrides_of(narrow: Path) -> list[str]:
    values = {
        "data.root": narrow,
        "data.feature_count": FEATURES,
        "data.trials_per_day": 1,
        "data.eval_batch_size": 4,
        "data.buckets": ((180, 40),),
        "train.steps": 4,
        "train.validate_every": 2,
        "train.log_every": 1,
        "train.save_every": 2,
        "signal.augment": ("white_noise", "my_models.noise:drop_channels(rate=0.1)", "random_cut"),
    }
    return [f"--config.{key}={value}" for key, value in values.items()]


def test_train_infer_and_evaluate_use_it(
    my_models: Path, narrow: Path, build_lm, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train = ["train", "--config", DEMO, "--workdir", str(run)]
    assert main([*train, *SMALL, *overrides_of(narrow)]) == 0
    assert json.loads((run / "finished.json").read_text())["step"] == 4
    assert set(json.loads((run / "config.json").read_text())["model"]) == {
        *("name", "classes", "dtype", "stride", "width", "layers", "taps", "dropout")
    }
    assert main(["train", "--workdir", str(run), "--config.train.steps=5"]) == 0
    out = tmp_path / "logits.npz"
    assert main(["infer", "--workdir", str(run), "--out", str(out)]) == 0
    logits = np.load(out)
    assert logits["logits"].shape == (logits["frames"].sum(), 41)
    assert main(["evaluate", "--workdir", str(run), "--lm", str(build_lm(["the cat"]))]) == 0
    assert json.loads((run / "val/lm/evaluation.json").read_text())["per"]


def test_its_step_is_lowered_and_compiled_for_a_slice(my_models: Path) -> None:
    config = load_config(DEMO, [*SMALL, "--config.data.feature_count=16"])
    mesh = make_mesh(1, jax.devices()[:1])
    batch = abstract_batch(Shape(16, 40, 8), 16, np.float32, mesh)
    lowered = jit_train_step(config, 3, mesh).lower(abstract_state(config, 3, mesh), batch)
    assert "convolution" in lowered.as_text()
    if importlib.util.find_spec("libtpu") is None:
        return
    compiled = ["compile", "--topology", "v5e:1x1", "--config", DEMO, "--days", "3"]
    assert main([*compiled, "--bucket", "40x8", *SMALL, "--config.data.feature_count=16"]) == 0


def test_padding_changes_no_logits(my_models: Path) -> None:
    model = model_of(load_config(DEMO, [*SMALL, "--config.data.feature_count=6"]), 2)
    params, rng = model.init(jax.random.key(0)), np.random.default_rng(0)
    trial = rng.normal(size=(1, 43, 6)).astype(np.float32)
    padded = np.concatenate([trial, rng.normal(size=(1, 30, 6)).astype(np.float32)], axis=1)
    apply, bins, day = jax.jit(model.apply), np.array([43]), np.array([0])
    alone = apply(params, trial, bins, day)
    assert int(alone.frames[0]) == 10
    logits = apply(params, padded, bins, day).logits[:, :10]
    np.testing.assert_allclose(logits, alone.logits, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.name", "conformer", "needed one of gru, .*triple_transformer, or my_package"),
        ("model.name", "no_such_package.x:Y", "cannot be imported .*PYTHONPATH"),
        ("model.name", "my_models.convolutions:Nothing", "has no 'Nothing'"),
        ("model.name", "my_models.half:Half", "lacks apply, frames; needed a subclass of"),
        ("model.name", "my_models.half:Other", "lacks init, apply, frames, Settings"),
    ],
)
def test_a_name_that_is_no_model_is_an_error(
    my_models: Path, key: str, value: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DEMO, [f"--config.{key}={value}"])


def test_another_model_keeps_the_settings_that_both_inherit(my_models: Path) -> None:
    demo = load_config(DEMO)
    triple = with_overrides(demo, ["--config.model.name=triple_gru"])
    assert (triple.model.units, triple.model.noise_layers) == (demo.model.units, 2)
    mine = with_overrides(demo, SMALL)
    assert (mine.model.width, mine.model.layers) == (8, 2)
    assert (mine.model.dtype, mine.model.taps) == ("float32", 9)
    assert with_overrides(mine, ["--config.model.name=gru"]).model.layers == 5
    with pytest.raises(ConfigError, match=r"unknown configuration key 'model\.units'"):
        with_overrides(mine, ["--config.model.units=3"])
