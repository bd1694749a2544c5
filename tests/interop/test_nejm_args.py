"""args.yaml becomes the configuration that trains and decodes the same way, or says why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from nejm_run import ARGS, GRUDecoder, args_with

from b2txt_jax.config import load_config, with_overrides
from b2txt_jax.interop.errors import ConversionError
from b2txt_jax.interop.nejm_args import args_from_config, load_args, read_args, recipe_notes

BASELINE = Path(__file__).parents[2] / "configs/nejm_baseline.py"
T = "dataset__data_transforms__"


def read(tmp_path: Path, args: dict | str, ignore=()):
    path = tmp_path / "args.yaml"
    path.write_text(args if isinstance(args, str) else yaml.safe_dump(args))
    return read_args(load_args(path), "args.yaml", ignore)


def test_every_setting_reaches_its_key(tmp_path):
    config = read(tmp_path, ARGS).config
    data, signal, model, optimizer = config.data, config.signal, config.model, config.optimizer
    assert data.sessions == ("t15.2023.08.11", "t15.2023.08.13", "t15.2023.08.18")
    assert (data.root, data.feature_count) == ("somewhere/hdf5_data_final", 6)
    assert (data.days_per_batch, data.trials_per_day, data.eval_batch_size) == (2, 2, 4)
    assert (signal.white_noise_std, signal.constant_offset_std) == (1.0, 0.2)
    assert (signal.smooth_std, signal.smooth_size, signal.random_cut) == (2.0, 100, 3)
    assert (model.units, model.layers, model.patch_size, model.patch_stride) == (5, 2, 3, 2)
    assert (model.input_dropout, model.rnn_dropout, model.classes) == (0.2, 0.4, 41)
    assert (model.day_layer, model.dtype) == (True, "float32")
    assert (optimizer.learning_rate, optimizer.learning_rate_min) == (0.005, 0.0001)
    assert (optimizer.day_learning_rate, optimizer.day_learning_rate_min) == (0.003, 0.0002)
    assert (optimizer.decay_steps, optimizer.warmup_steps) == (40, 4)
    assert (optimizer.day_decay_steps, optimizer.day_warmup_steps) == (30, 2)
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.999, 0.1)
    assert (optimizer.weight_decay, optimizer.day_weight_decay) == (0.001, 0.0)
    assert (optimizer.clip_norm, config.train.seed, config.train.steps) == (10.0, 10, 50)
    assert (config.train.log_every, config.train.validate_every) == (2, 5)


def test_the_baseline_configuration_survives_both_ways(tmp_path):
    config = load_config(BASELINE)
    args = args_from_config(config, validated=config.data.sessions[1:])
    assert args["dataset"]["dataset_probability_val"] == [0] + [1] * 44
    assert read(tmp_path, args).config == config
    # what an args.yaml leaves open is what the published recipe, and so the baseline, has
    needed = {
        "model": {k: v for k, v in args["model"].items() if "n_" in k or "patch" in k},
        "dataset": {k: args["dataset"][k] for k in ("sessions", "n_classes", "data_transforms")},
    }
    for name in ("input_network", "rnn_dropout", "rnn_trainable"):
        needed["model"].pop(name, None)
    found = read(tmp_path, needed)
    assert found.config == config
    assert "taken from the published recipe: model.rnn_dropout = 0.4" in found.notes[0]


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({"use_amp": True}, "model.dtype", "auto"),
        ({"use_amp": "false"}, "model.dtype", "float32"),
        ({T + "smooth_data": False}, "signal.smooth_std", 0.0),
        ({T + "random_cut": 0}, "signal.random_cut", 1),
        ({"grad_norm_clip_value": 0}, "optimizer.clip_norm", 0.0),
        ({"lr_max": "5e-3"}, "optimizer.learning_rate", 0.005),
        ({"num_training_batches": "120000"}, "train.steps", 120_000),
        ({"num_training_batches": 1.0e3}, "train.steps", 1000),
        ({"model__patch_size": 0, "model__patch_stride": 0}, "model.patch_stride", 1),
        ({"seed": None}, "train.seed", 10),
        ({"seed": "None"}, "train.seed", 10),
        ({"dataset__feature_subset": "None"}, "data.feature_count", 6),
        ({"early_stopping": "False"}, "train.steps", 50),
    ],
)
def test_oddities_of_published_files_are_understood(tmp_path, changes, key, expected):
    section, name = key.split(".")
    config = read(tmp_path, args_with(**changes)).config
    assert getattr(getattr(config, section), name) == expected


def test_numbers_that_yaml_leaves_as_text_are_numbers(tmp_path):
    # YAML 1.1 reads 1e-4, which has no point, as text
    text = re.sub(r"lr_min: .*", "lr_min: 1e-4", yaml.safe_dump(ARGS))
    assert read(tmp_path, text).config.optimizer.learning_rate_min == 0.0001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__n_units": ...}, r"lacks model\.n_units; needed, since logits depend on it"),
        ({"dataset__sessions": ...}, r"lacks dataset\.sessions"),
        ({"dataset__sessions": []}, "needed a list of session names"),
        ({"dataset__sessions": ["a", "b", "a"]}, "listed twice: a"),
        ({"dataset__sessions": ["../a"]}, "not the name of a folder"),
        ({"lr_max": "fast"}, "lr_max is 'fast'; could not convert"),
        ({"lr_max": float("nan")}, "needed a finite number"),
        ({"lr_max": 10**400}, "needed a finite number"),
        ({"seed": -2}, r"no usable configuration.*train\.seed is -2"),
        ({"dataset__dataset_probability_val": 1}, "needed a list of numbers"),
        ({"model__n_layers": 2.5}, "needed a whole number"),
        ({"model__n_layers": True}, "needed a number"),
        ({"use_amp": 3}, "use_amp is 3; needed true or false"),
        ({"model__rnn_dropout": 1.5}, "no usable configuration.*rnn_dropout is 1.5"),
        ({T + "smooth_kernel_size": 5}, "no usable configuration.*needs at least 17"),
        ({"dataset__days_per_batch": 0}, "needed at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path, changes, message):
    with pytest.raises(ConversionError, match=message):
        read(tmp_path, args_with(**changes))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type"),
        ({"model__rnn_trainable": False}, "model.rnn_trainable"),
        ({"model__input_network__input_trainable": "False"}, "model.input_network.input_trainable"),
        ({"early_stopping": True}, "early_stopping"),
        ({"dataset__batch_size": 5}, "dataset.batch_size"),
        (
            {T + "random_walk_std": 0.1, T + "random_walk_axis": 1},
            "dataset.data_transforms.random_walk_axis",
        ),
        ({"model__extra": 3}, "model.extra"),
    ],
)
def test_settings_without_an_equivalent_are_an_error_unless_ignored(tmp_path, changes, setting):
    args = args_with(**changes)
    with pytest.raises(ConversionError, match=rf"no equivalent.*--ignore {re.escape(setting)}`"):
        read(tmp_path, args)
    notes = read(tmp_path, args, ignore=[setting]).notes
    assert any(note.startswith(f"ignored: {setting} is") for note in notes)


def test_an_unseeded_recipe_gets_the_published_seed_and_a_note(tmp_path):
    found = read(tmp_path, args_with(seed=-1))
    assert found.config.train.seed == 10
    assert any(note.startswith("seed -1 means unseeded") for note in found.notes)


def test_sessions_that_were_not_validated_are_told_apart(tmp_path):
    assert read(tmp_path, ARGS).not_validated == ("t15.2023.08.11",)
    assert read(tmp_path, args_with(dataset__dataset_probability_val=...)).not_validated == ()
    assert read(tmp_path, args_with(dataset__dataset_probability_val=[1])).not_validated == ()


def test_settings_to_ignore_must_be_there(tmp_path):
    with pytest.raises(ConversionError, match=r"--ignore batch_size: args\.yaml has no such"):
        read(tmp_path, ARGS, ignore=["batch_size"])
    notes = read(tmp_path, ARGS, ignore=["dataset.batch_size"]).notes
    assert any(note.startswith("--ignore dataset.batch_size: had no effect") for note in notes)


def test_a_subset_of_features_can_never_be_ignored(tmp_path):
    args = args_with(dataset__feature_subset=[0, 1, 2])
    with pytest.raises(ConversionError, match="cannot be converted"):
        read(tmp_path, args, ignore=["dataset.feature_subset"])


def test_settings_that_change_nothing_are_listed(tmp_path):
    (note,) = read(tmp_path, ARGS).notes
    assert note.startswith("left out, without effect here: ")
    assert "gpu_number" in note
    assert "lr_max" not in note
    assert "init_checkpoint_path" not in note  # the text None is nothing


_DOUBLED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not plain YAML"),
        ("a: !!python/object/apply:os.system ['exit 1']", "not plain YAML.*python/object"),
        ("a: " + "[" * 5_000, "not plain YAML"),
        ("a: " + "7" * 5_000, "not plain YAML"),
        ("a: 2024-13-45", "not plain YAML"),
        ("a: &a {b: *a}", "not plain YAML"),
        (_DOUBLED, "not plain YAML .*more than 10000 settings"),
        ("", "holds no settings"),
        ("model: {n_units: '${size}'}", r"model\.n_units is '\$\{size\}', an OmegaConf reference"),
    ],
)
def test_files_that_are_not_plain_settings_are_refused(tmp_path, text, message):
    with pytest.raises(ConversionError, match=message):
        read(tmp_path, text)


def test_a_shared_day_layer_cannot_go_to_the_published_model():
    shared = with_overrides(load_config(BASELINE), ["--config.model.day_layer=False"])
    with pytest.raises(ConversionError, match="--to-safetensors"):
        args_from_config(shared, ())


def test_logging_settings_of_forks_are_left_out_and_listed(tmp_path):
    fork = {"use_wandb": False, "wandb_project": "brain", "wandb_run_name": None}
    found = read(tmp_path, {**ARGS, **fork})
    assert found.config == read(tmp_path, ARGS).config
    (note,) = [note for note in found.notes if note.startswith("left out, without effect here: ")]
    assert "use_wandb, wandb_project" in note


def test_all_settings_without_equivalent_are_in_one_message(tmp_path):
    args = {**ARGS, "mixup": 0.5, "spec_augment": True, "early_stopping": True}
    with pytest.raises(ConversionError) as refused:
        read(tmp_path, args)
    for text in ("mixup is 0.5", "spec_augment is True", "early_stopping is True"):
        assert text in str(refused.value)
    advice = "`--ignore early_stopping --ignore mixup --ignore spec_augment` converts nevertheless"
    assert advice in str(refused.value)
    assert read(tmp_path, args, ["early_stopping", "mixup", "spec_augment"])


def repeated(kind: str) -> str:
    """YAML whose aliases of aliases stand for 2^60 values."""
    lines = ["a0: &a0 [1]"] if kind == "list" else ["a0: &a0 {x: 1}"]
    made = "[*a{0}, *a{0}]" if kind == "list" else "{{x: *a{0}, y: *a{0}}}"
    return "\n".join(lines + [f"a{n + 1}: &a{n + 1} {made.format(n)}" for n in range(60)])


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (repeated("dict"), "more than 10000 settings"),
        (yaml.safe_dump(ARGS) + repeated("list"), r"a60 is \[\[\[...\]"),
        ("[" * 5000, "not plain YAML"),
    ],
    ids=["sections", "lists", "deep"],
)
def test_settings_of_endless_text_are_refused_at_once(tmp_path, text, message):
    with pytest.raises(ConversionError, match=message):
        read(tmp_path, text)


def test_what_is_exported_runs_in_the_published_evaluation(tmp_path):
    """It feeds bfloat16 to float32 weights, under an autocast that `use_amp` enables."""
    config = with_overrides(load_config(BASELINE), ["--config.model.dtype=float32"])
    amp = args_from_config(config, ())["use_amp"]
    features = torch.randn(1, 20, 6, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", enabled=amp, dtype=torch.bfloat16):
        assert GRUDecoder(ARGS)(features, 0).shape == (9, 41)


def test_a_recipe_that_the_published_trainer_lacks_is_noted():
    assert recipe_notes(load_config(BASELINE)) == ()
    keys = {"train.ema": 0.9, "data.plan": "epochs", "signal.augment": ("white_noise", "speckle")}
    config = load_config(BASELINE, [f"--config.{key}={value}" for key, value in keys.items()])
    (note,) = recipe_notes(config)
    assert "no data.plan, signal.augment, train.ema:" in note


def test_a_setting_given_twice_is_refused(tmp_path):
    path = tmp_path / "args.yaml"
    path.write_text("model:\n  n_units: 3\nlr_max: 1.0\nlr_max: 2.0\n")
    with pytest.raises(ConversionError, match="'lr_max' is given twice"):
        load_args(path)
