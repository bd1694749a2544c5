"""What `train` compiles, as JAX itself logs it: a program per used bucket, and nothing later."""

import logging
import re
from collections import Counter

import h5py
import jax
import pytest
from rich.console import Console

from b2txt_jax.config import with_overrides
from b2txt_jax.training.loop import train
from tests.conftest import FEATURES

BUCKETS = ((140, 40), (180, 80), (640, 160))
SAID, LOGGED = "said", "logged"


class Events(logging.Handler):
    """What the run says and what JAX logs of compiling, in one order."""

    def __init__(self):
        super().__init__()
        self.events = []

    def emit(self, record):
        self.events.append((LOGGED, record.getMessage()))

    def write(self, text):
        self.events.append((SAID, text))

    def flush(self):
        pass

    def split_at_end_of_warm_up(self):
        """JAX's messages until the run says that its last program is there, and those after."""
        ends = [
            index
            for index, (kind, text) in enumerate(self.events)
            if kind == SAID and re.search(r"\b(\d+) of \1 after", text)
        ]
        assert len(ends) == 1, self.events
        return [
            [text for kind, text in part if kind == LOGGED]
            for part in (self.events[: ends[0]], self.events[ends[0] :])
        ]


@pytest.fixture
def events():
    handler, logger = Events(), logging.getLogger("jax")
    logger.addHandler(handler)
    jax.config.update("jax_log_compiles", True)  # in all threads, unlike jax.log_compiles
    yield handler
    jax.config.update("jax_log_compiles", False)
    logger.removeHandler(handler)


def bins_of_used_buckets(root, split):
    """By the files alone: each trial's first bucket of enough bins and labels."""
    used = set()
    for path in root.rglob(f"data_{split}.hdf5"):
        with h5py.File(path) as file:
            for group in file.values():
                bins, labels = group.attrs["n_time_steps"], group.attrs["seq_len"]
                used.add(next(b for b, most in BUCKETS if bins <= b and labels <= most))
    return used


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param((6,), id="from the start"),
        pytest.param((3, 6), id="from a checkpoint", marks=pytest.mark.slow),
    ],
)
def test_each_used_bucket_has_one_program_and_nothing_compiles_after_the_warm_up(
    tiny_config, narrow, events, tmp_path, ends
):
    wanted = {
        "train_step": bins_of_used_buckets(narrow, "train"),
        "eval_step": bins_of_used_buckets(narrow, "val"),
    }
    assert wanted == {"train_step": {140, 180}, "eval_step": {140}}
    keys = {
        "data.buckets": BUCKETS,
        "data.packing": "off",
        "data.plan": "epochs",
        "signal.augment": ("white_noise", "speckle", "channel_mask", "random_cut", "time_mask"),
        "optimizer.schedule": "steps",
        "optimizer.decay_at": (2, 5),
        "train.ctc_per_label": True,
        "train.ema": 0.9,
        "train.validate_every": 2,
    }
    more = [f"--config.{key}={value}" for key, value in keys.items()]
    for steps in ends:
        jax.clear_caches()
        events.events.clear()
        config = with_overrides(tiny_config, [*more, f"--config.train.steps={steps}"])
        result = train(config, tmp_path, Console(file=events, width=200))
        assert result.finished
        warm_up, later = events.split_at_end_of_warm_up()

        for step, buckets in wanted.items():
            made = [text for text in warm_up if f"XLA compilation of jit({step})" in text]
            assert len(made) == len(buckets), made
            shapes = Counter(
                int(re.findall(rf"float32\[\d+,(\d+),{FEATURES}\]", text)[-1])  # after day layers
                for text in warm_up
                if text.startswith(f"Compiling jit({step})")
            )
            assert shapes == Counter(buckets)
        assert [text for text in later if "ompil" in text] == []
