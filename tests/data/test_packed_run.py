"""A packed folder stands in for HDF5 sessions from training to the logits."""

import dataclasses
import json

import numpy as np
import pytest

from b2txt_jax.inference.run import load_run
from b2txt_jax.training.loop import train
from tests.conftest import FEATURES
from tests.data.packing import packed


def on(config, root):
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, root=str(root)),
        train=dataclasses.replace(
            config.train, steps=2, log_every=1, validate_every=2, save_every=2
        ),
    )


def losses(workdir):
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(entry["kind"], entry["step"], entry["loss"]) for entry in entries]


@pytest.fixture(scope="module")
def from_hdf5(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("hdf5 run")
    train(on(tiny_config, tiny_config.data.root), workdir)
    return workdir


@pytest.mark.slow
def test_packed_float32_trains_and_infers_as_hdf5_bit_for_bit(tiny_config, from_hdf5, tmp_path):
    root = packed(tiny_config.data.root, tmp_path / "packed", features=FEATURES)
    train(on(tiny_config, root), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(from_hdf5)
    for split in ("val", "test"):
        expected = load_run(from_hdf5).logits(split)
        got = load_run(tmp_path / "run").logits(split)
        assert [trial.ref.name for trial in got] == [trial.ref.name for trial in expected]
        assert [trial.sentence for trial in got] == [trial.sentence for trial in expected]
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.logits.tobytes() == theirs.logits.tobytes()


@pytest.mark.slow
def test_packed_bfloat16_trains_and_infers_nearly_the_same(tiny_config, from_hdf5, tmp_path):
    root = packed(tiny_config.data.root, tmp_path / "packed", "bfloat16", features=FEATURES)
    train(on(tiny_config, root), tmp_path / "run")
    got, expected = losses(tmp_path / "run"), losses(from_hdf5)
    assert [entry[:2] for entry in got] == [entry[:2] for entry in expected]
    np.testing.assert_allclose([e[2] for e in got], [e[2] for e in expected], rtol=0.02)
    model = load_run(from_hdf5, [f"--config.data.root={root}"])
    for mine, theirs in zip(model.logits("val"), load_run(from_hdf5).logits("val"), strict=True):
        np.testing.assert_allclose(mine.logits, theirs.logits, atol=0.05)
