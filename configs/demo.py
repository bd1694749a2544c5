"""Small enough for two CPU cores: a 2-layer GRU on six simulated sessions, in a few minutes.

Run:       b2txt demo --out runs/demo          (simulates the sessions first)
      or   b2txt train --config demo --workdir runs/mine --config.data.root=DIR/hdf5_data_final
Hardware:  2 CPU cores, 2 GB of memory.
Result:    docs/results.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from b2txt_jax.config import read_config_file


def get_config() -> ConfigDict:
    """The baseline recipe with a smaller model, fewer trials per batch and a short schedule."""
    config = read_config_file(Path(__file__).with_name("nejm_baseline.py"))
    steps = 400

    config.data.root = "runs/demo/data/hdf5_data_final"
    config.data.sessions = ()
    config.data.trials_per_day = 4
    config.data.buckets = ()  # chosen from the lengths of the data
    config.data.eval_batch_size = 16

    config.signal.white_noise_std = 0.5

    config.model.units = 128
    config.model.layers = 2
    config.model.input_dropout = 0.1
    config.model.rnn_dropout = 0.2
    config.model.dtype = "float32"

    config.optimizer.learning_rate = 0.01
    config.optimizer.day_learning_rate = 0.01
    config.optimizer.warmup_steps = 50
    config.optimizer.day_warmup_steps = 50
    config.optimizer.decay_steps = steps
    config.optimizer.day_decay_steps = steps

    config.train.steps = steps
    config.train.log_every = 10
    config.train.validate_every = 100
    config.train.save_every = 100
    config.train.save_seconds = 0.0
    return config
