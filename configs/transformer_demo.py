"""A Transformer small enough for two CPU cores, beside configs/demo.py: the same data, minutes.

Run:       b2txt train --config transformer_demo --workdir runs/transformer
             --config.data.root=runs/demo/data/hdf5_data_final      (after `make demo`)
Hardware:  2 CPU cores, 2 GB of memory.
Result:    validation PER 9.4 % on the demo's sessions in about 8 minutes (docs/transformer.md).
Slow speech, as in the recordings and the preset `recordings`, learns far sooner with
             --config.model.patch_size=8 (docs/levers.md).
             The demo's speech has too few bins per phoneme for that.
"""

from pathlib import Path

from ml_collections import ConfigDict

from b2txt_jax.config import read_config_file


def get_config() -> ConfigDict:
    """The published recipe with a smaller model and a short schedule."""
    config = read_config_file(Path(__file__).with_name("transformer.py"))
    demo = read_config_file(Path(__file__).with_name("demo.py"))
    steps = 800

    config.data = demo.data
    config.train = demo.train
    config.train.steps = steps
    config.signal.white_noise_std = 0.5  # as in demo.py
    config.signal.augment = ("white_noise", "constant_offset")  # time masks pay in long runs only

    config.model.width = 128
    config.model.layers = 3
    config.model.heads = 4
    config.model.head_width = 32
    config.model.feedforward = 512
    config.model.input_dropout = 0.1
    config.model.dropout = 0.1
    config.model.dtype = "float32"

    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = steps
    config.optimizer.day_warmup_steps = 50
    config.optimizer.day_decay_steps = steps

    # ---- the training side, scaled to the short schedule
    config.data.plan = "epochs"
    config.train.ctc_per_label = True
    config.optimizer.schedule, config.optimizer.decay_at = "cosine", ()
    return config
