"""Sessions of participants with other numbers of features, and a small model of them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from b2txt_jax.config import Config, load_config
from b2txt_jax.data.write_hdf5 import write_trial


def session(root: Path, name: str, width: int, trials: int = 4) -> Path:
    rng = np.random.default_rng(width)
    (root / name).mkdir(parents=True)
    for split in ("train", "val"):
        with h5py.File(root / name / f"data_{split}.hdf5", "w") as file:
            for index in range(trials):
                values = rng.normal(size=(40, width)).astype(np.float32)
                labels = np.array([16, 6, 40])
                group = file.create_group(f"trial_{index:04d}")
                write_trial(group, name, 1, index, values, labels, "hi")
    return root


def config_of(root: str) -> Config:
    keys = {
        "data.root": root,
        "data.feature_count": 5,
        "data.days_per_batch": 2,
        "model.units": 8,
        "model.layers": 1,
        "model.recurrence": "scan",
        "signal.white_noise_std": 1.0,
    }
    return load_config("demo", [f"--config.{key}={value}" for key, value in keys.items()])
