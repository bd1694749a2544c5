"""The triple GRU in full: a noise model as wide as a patch (7168), 687,568,466 parameters.

Run:       b2txt train --config configs/triple_gru.py --workdir runs/triple --distributed
             --config.data.root=PATH/hdf5_data_final
           (on a slice, launch/tpu.sh does it for you with CONFIG=configs/triple_gru.py)
Before:    b2txt compile --topology v5e:2x2 --config configs/triple_gru.py    (memory, step time)
Hardware:  see docs/triple_gru.md for the smallest slices. `parallel.model_axis` devices share the
  noise model.
Result:    not yet trained on the published data. In docs/triple_gru.md a small one does not help on
  simulated sessions.

Watch:     `clean_loss` falls as the baseline's does. `noisy_loss` falls at first, while lambda is
  small, and should rise again as lambda grows. The validation's `noisy_per` should stay near chance
  (100 %): then the noise holds no speech. If the clean loss stalls, lower model.reversal or
  model.noisy_weight. If noisy_per falls well below chance, raise them. A `noise_rms` that goes
  to 0 means that the noise model has found nothing worth taking away.
"""

from pathlib import Path

from ml_collections import ConfigDict

from b2txt_jax.config import read_config_file


def get_config() -> ConfigDict:
    """The baseline recipe with the triple GRU."""
    config = read_config_file(Path(__file__).with_name("nejm_baseline.py"))
    config.model.name = "triple_gru"
    config.model.layers = 3  # of the clean decoder
    config.model.noise_units = 0  # as wide as a patch; a number makes a bottleneck
    config.model.noise_layers = 2
    config.model.noisy_layers = 2  # of the adversary
    config.model.recompute_frames = 0  # e.g. 32 where memory is short
    config.model.noisy_weight = 1.0  # of the adversary's CTC loss; the clean decoder's has 1
    config.model.reversal = 1.0  # largest lambda of the reversed gradient
    config.model.reversal_rate = 10.0  # how fast lambda grows over train.steps

    config.parallel.model_axis = 4  # devices that share the 7168 units
    return config
