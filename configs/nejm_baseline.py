"""The published NEJM 2024 baseline: 5 x 768 GRU, 45 sessions, 120,000 batches of 64 trials.

Run:       b2txt train --config configs/nejm_baseline.py --workdir runs/baseline
             --config.data.root=PATH/hdf5_data_final
Hardware:  made for one TPU chip or GPU. The published PyTorch run took about 3.5 hours on one RTX
  4090.
Result:    published validation PER 10.1 % (PyTorch, T15 data). Not yet run by us on the published
  data.

Every key of a configuration stands here, with its unit and, where it has another name there, its
NEJM name.
"""

from ml_collections import ConfigDict

SESSIONS = tuple(
    "t15." + date
    for date in [
        "2023.08.11",
        "2023.08.13",
        "2023.08.18",
        "2023.08.20",
        "2023.08.25",
        "2023.08.27",
        "2023.09.01",
        "2023.09.03",
        "2023.09.24",
        "2023.09.29",
        "2023.10.01",
        "2023.10.06",
        "2023.10.08",
        "2023.10.13",
        "2023.10.15",
        "2023.10.20",
        "2023.10.22",
        "2023.11.03",
        "2023.11.04",
        "2023.11.17",
        "2023.11.19",
        "2023.11.26",
        "2023.12.03",
        "2023.12.08",
        "2023.12.10",
        "2023.12.17",
        "2023.12.29",
        "2024.02.25",
        "2024.03.03",
        "2024.03.08",
        "2024.03.15",
        "2024.03.17",
        "2024.04.25",
        "2024.04.28",
        "2024.05.10",
        "2024.06.14",
        "2024.07.19",
        "2024.07.21",
        "2024.07.28",
        "2025.01.10",
        "2025.01.12",
        "2025.03.14",
        "2025.03.16",
        "2025.03.30",
        "2025.04.13",
    ]
)


def get_config() -> ConfigDict:
    """The published recipe, every setting."""
    config = ConfigDict()

    config.data = ConfigDict()
    config.data.root = "data/hdf5_data_final"  # folder of session folders; NEJM: dataset_dir
    config.data.sessions = SESSIONS  # their order is the day index; () takes all found, sorted
    config.data.feature_count = 512  # features per 20 ms bin; NEJM: neural_dim
    config.data.days_per_batch = 4  # different days in a batch
    config.data.trials_per_day = 16  # drawn with replacement; NEJM: batch_size / days_per_batch
    # (bins of 20 ms, labels): a batch is padded to the first pair that holds it; one compilation
    # each; () has them chosen from the lengths of the data
    config.data.buckets = ((600, 64), (800, 80), (1000, 100), (1200, 120), (1600, 160), (2560, 500))
    config.data.eval_batch_size = 64  # trials
    # "epochs": every trial once per epoch, shuffled over all days, in batches of days_per_batch *
    # trials_per_day
    config.data.plan = "days"
    config.data.widths = ()  # features of each session, of several folders: taken from the data
    # Short trials share a row of a training batch ("on", "off"; auto: where the model can and it
    # saves work). Changes no result but for the order of sums.
    config.data.packing = "auto"

    config.signal = ConfigDict()
    # In this order; also "time_mask", "speckle", "channel_mask" (settings below), and
    # "my_package.my_module:function(setting=value)"
    config.signal.augment = (
        "static_gain",
        "white_noise",
        "constant_offset",
        "random_walk",
        "random_cut",
    )
    config.signal.static_gain_std = 0.0
    config.signal.white_noise_std = 1.0
    config.signal.constant_offset_std = 0.2
    config.signal.random_walk_std = 0.0
    config.signal.random_cut = 3  # cuts 0, 1 or 2 bins
    config.signal.time_mask_spans = 20  # per trial, each of 0 to fraction * trial
    config.signal.time_mask_fraction = 0.05
    config.signal.time_mask_patch = 4  # bins; spans begin and end at multiples of it
    config.signal.speckle_rate = 0.2  # share of a trial's features that are masked
    config.signal.channel_mask_rate = 0.1  # share of a trial's channels, both features of each
    config.signal.smooth_std = 2.0  # bins; NEJM: smooth_kernel_std
    config.signal.smooth_size = 100  # bins; NEJM: smooth_kernel_size
    config.signal.smooth_kernel = "symmetric"  # "one_sided" does not look ahead: docs/realtime.md
    # Of raw features, as a rig has them; the published ones are z-scored already
    config.signal.log = False  # sign(x) * log(1 + |x|), before the rolling z-score
    config.signal.rolling_seconds = 0.0  # window of the rolling mean and deviation; 0: none
    config.signal.rolling_clip = 5.0  # deviations; 0: no clipping
    config.signal.eval_padding = "same"  # the published evaluation script uses "valid"

    config.model = ConfigDict()
    config.model.name = "gru"  # or "triple_gru", or my_package.my_module:MyModel
    config.model.day_layer = True
    config.model.units = 768  # NEJM: n_units
    config.model.layers = 5  # NEJM: n_layers
    config.model.patch_size = 14  # bins
    config.model.patch_stride = 4  # bins: one frame per 80 ms
    config.model.input_dropout = 0.2  # NEJM: input_layer_dropout
    config.model.rnn_dropout = 0.4
    config.model.classes = 41  # NEJM: n_classes
    config.model.dtype = "auto"  # bfloat16 on a TPU or GPU, float32 on a CPU; NEJM: use_amp
    # "scan", "pallas", "wavefront"; auto: Pallas on a TPU when it fits, the wavefront on a GPU
    config.model.recurrence = "auto"

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 0.005  # NEJM: lr_max
    config.optimizer.learning_rate_min = 0.0001  # NEJM: lr_min
    config.optimizer.decay_steps = 120_000  # NEJM: lr_decay_steps
    config.optimizer.warmup_steps = 1_000  # NEJM: lr_warmup_steps
    config.optimizer.day_learning_rate = 0.005  # NEJM: lr_max_day
    config.optimizer.day_learning_rate_min = 0.0001  # NEJM: lr_min_day
    config.optimizer.day_decay_steps = 120_000  # NEJM: lr_decay_steps_day
    config.optimizer.day_warmup_steps = 1_000  # NEJM: lr_warmup_steps_day
    config.optimizer.beta1 = 0.9  # NEJM: beta0
    config.optimizer.beta2 = 0.999  # NEJM: beta1
    config.optimizer.epsilon = 0.1
    config.optimizer.weight_decay = 0.001  # weights and h0; biases have none
    config.optimizer.day_weight_decay = 0.0  # NEJM: weight_decay_day
    config.optimizer.clip_norm = 10.0  # NEJM: grad_norm_clip_value
    # "steps": after the warm-up constant, times decay_factor at each of the steps decay_at
    config.optimizer.schedule = "cosine"
    config.optimizer.decay_at = ()
    config.optimizer.decay_factor = 0.1

    config.train = ConfigDict()
    config.train.seed = 10
    config.train.steps = 120_000  # NEJM: num_training_batches
    config.train.log_every = 200  # NEJM: batches_per_train_log
    config.train.validate_every = 2_000  # NEJM: batches_per_val_step
    config.train.save_every = 1_000  # latest checkpoint
    config.train.save_seconds = 60.0  # between two of them at least: a fast slice saves less often
    config.train.patience = 0  # validations without a better PER that end the run early; 0: never
    config.train.on_nonfinite = "stop"  # or "skip"; a NaN or infinite step changes no parameter
    config.train.ctc_per_label = False  # True divides a trial's loss by its number of labels
    config.train.warm_start = ""  # folder of a run to start from: docs/pretraining.md
    # Decay of a moving average of the weights, which is validated and saved too; 0: none
    config.train.ema = 0.0
    # Model folder of `lm-server build`: validations have a WER too. "": none
    config.train.validate_lm = ""
    config.train.validate_lm_options = ""  # of `lm-server score`, such as "--settings tuned.json"

    config.parallel = ConfigDict()
    config.parallel.model_axis = 1  # devices that split large parameters; the others split rows
    config.parallel.reduce_dtype = "float32"  # in which devices add gradients; or "bfloat16"
    return config
