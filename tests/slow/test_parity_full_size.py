"""The published size, 5 x 768 units and 512 features: logits on simulated sessions against PyTorch,
and bfloat16 against float32."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))

from published import PublishedDecoder, fill, smoothed

from b2txt_jax.config import load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.data.reader import open_folder
from b2txt_jax.model.interface import make_model
from b2txt_jax.training.step import make_eval_step

CONFIG = load_config("configs/nejm_baseline.py", ["--config.model.dtype=float32"])


@pytest.fixture(scope="module")
def params():
    torch.set_num_threads(1)
    fresh = jax.jit(lambda: make_model(CONFIG.model, 512, 4).init(jax.random.key(0)))()
    noise = np.random.default_rng(0)
    # Day layers away from the identity, as training leaves them.
    weight = fresh["day"]["weight"] + 0.02 * noise.normal(size=(4, 512, 512)).astype(np.float32)
    bias = 0.1 * noise.normal(size=(4, 512)).astype(np.float32)
    return fresh | {"day": {"weight": weight, "bias": bias}}


@pytest.fixture(scope="module")
def trials(simulated):
    """Simulated trials of several days, cut or repeated to lengths from 100 to 2,000 bins."""
    reader = open_folder(simulated / "hdf5_data_final")
    found = []
    for day, session in enumerate(reader.sessions):
        for ref in reader.trials([session], "train")[:2]:
            found.append((day, reader.read(ref).features))
    lengths = (100, 101, 333, 700, 1024, 2000)
    return [
        (day, np.tile(features, (length // len(features) + 1, 1))[:length])
        for length, (day, features) in zip(lengths, found[: len(lengths)], strict=True)
    ]


def batch_of(trials) -> Batch:
    bins = np.array([len(features) for _, features in trials], np.int32)
    padded = [np.pad(features, ((0, bins.max() - len(features)), (0, 0))) for _, features in trials]
    count = len(trials)
    day = np.array([day for day, _ in trials], np.int32)
    no_labels = np.zeros((count, 1), np.int32)
    return Batch(np.stack(padded), bins, day, no_labels, np.zeros(count, np.int32))


def eval_step(padding: str, dtype: str):
    config = dataclasses.replace(
        CONFIG,
        signal=dataclasses.replace(CONFIG.signal, eval_padding=padding),
        model=dataclasses.replace(CONFIG.model, dtype=dtype),
    )
    return jax.jit(make_eval_step(config, 4))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_float32_logits_are_within_1e_4_of_pytorch_from_100_to_2000_bins(params, trials, padding):
    decoder = fill(PublishedDecoder(CONFIG.model, 512, 4, torch.float32), params).eval()
    output = eval_step(padding, "float32")(params, batch_of(trials))
    for row, (day, features) in enumerate(trials):
        with torch.no_grad():
            x = smoothed(torch.tensor(features)[None], 2.0, 100, padding)
            expected = decoder(x, [day])[0].numpy()
        got = np.asarray(output.logits[row, : int(output.frames[row])])
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=1e-4)
        print(f"{padding} {len(features)} bins: {np.abs(got - expected).max():.1e}")


def test_bfloat16_logits_are_close_to_float32(params, trials):
    few = batch_of([trials[0], trials[2]])
    exact = eval_step("same", "float32")(params, few)
    half = eval_step("same", "bfloat16")(params, few)
    for row, frames in enumerate(np.asarray(exact.frames)):
        wanted = np.asarray(exact.logits[row, :frames])
        difference = np.asarray(half.logits[row, :frames]) - wanted
        spread = wanted.std()
        print(
            f"spread {spread:.3f}, largest {np.abs(difference).max() / spread:.4f}, rms "
            f"{difference.std() / spread:.4f} of it"
        )
        assert 0 < np.abs(difference).max() < 0.05 * spread
        assert difference.std() < 0.01 * spread
