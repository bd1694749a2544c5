"""A triple GRU small enough for two CPU cores, beside configs/demo.py: same data, same steps.

Run:       b2txt train --config configs/triple_gru_small.py --workdir runs/triple_small
             --config.data.root=runs/demo/data/hdf5_data_final      (after `make demo`)
Hardware:  2 CPU cores, 3 GB of memory, about half as fast as configs/demo.py.
Result:    docs/triple_gru.md, with the baseline beside it.

See configs/triple_gru.py for what to watch.
"""

from pathlib import Path

from ml_collections import ConfigDict

from b2txt_jax.config import read_config_file


def get_config() -> ConfigDict:
    """The demo's recipe. The clean decoder is as large as the demo's whole decoder."""
    config = read_config_file(Path(__file__).with_name("demo.py"))
    config.model.name = "triple_gru"
    config.model.noise_units = 64  # a bottleneck; 0 would be 7168
    config.model.noise_layers = 2
    config.model.noisy_layers = 1
    config.model.recompute_frames = 0
    return config
