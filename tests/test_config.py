import contextlib
import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from b2txt_jax.config import (
    ConfigError,
    differences,
    freeze,
    load_config,
    read_written_config,
    resumable_keys,
    with_overrides,
    write_config,
)

BASELINE = "configs/nejm_baseline.py"


def test_the_baseline_holds_the_published_recipe():
    """Every value of the published rnn_args.yaml that has a meaning here."""
    config = load_config(BASELINE)
    assert len(config.data.sessions) == 45
    assert (config.data.sessions[0], config.data.sessions[-1]) == (
        "t15.2023.08.11",
        "t15.2025.04.13",
    )
    assert config.data.days_per_batch * config.data.trials_per_day == 64
    assert (config.data.days_per_batch, config.data.feature_count) == (4, 512)
    signal, model = config.signal, config.model
    assert (signal.white_noise_std, signal.constant_offset_std) == (1.0, 0.2)
    assert (signal.random_walk_std, signal.static_gain_std, signal.random_cut) == (0.0, 0.0, 3)
    assert (signal.smooth_std, signal.smooth_size) == (2.0, 100)
    assert (model.layers, model.units, model.classes) == (5, 768, 41)
    assert (model.patch_size, model.patch_stride) == (14, 4)
    assert (model.input_dropout, model.rnn_dropout, model.day_layer) == (0.2, 0.4, True)
    for prefix in ("", "day_"):
        rates = [
            getattr(config.optimizer, prefix + name)
            for name in ("learning_rate", "learning_rate_min", "warmup_steps", "decay_steps")
        ]
        assert rates == [0.005, 0.0001, 1000, 120_000]
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.999, 0.1)
    assert (optimizer.weight_decay, optimizer.day_weight_decay) == (0.001, 0.0)
    assert optimizer.clip_norm == 10.0
    assert (config.train.steps, config.train.validate_every, config.train.seed) == (
        120_000,
        2000,
        10,
    )


def test_the_baseline_names_every_key():
    named = runpy.run_path(BASELINE)["get_config"]().to_dict()
    known = dataclasses.asdict(load_config(BASELINE))
    assert {section: set(keys) for section, keys in named.items()} == {
        section: set(keys) for section, keys in known.items()
    } | {"model": {"name", *known["model"]}}


def test_overrides_keep_each_keys_type():
    config = load_config(
        BASELINE,
        [
            "--config.data.root=/some where",
            "--config.data.sessions=('a', 'b')",
            "--config.data.buckets=((3, 4), (5, 6))",
            "--config.model.day_layer=False",
            "--config.optimizer.learning_rate=1",
        ],
    )
    assert config.data.root == "/some where"
    assert config.data.sessions == ("a", "b")
    assert config.data.buckets == ((3, 4), (5, 6))
    assert config.model.day_layer is False
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.model.unit=3", "did you mean model.units"),
        ("--config.nowhere=3", "unknown configuration key 'nowhere'"),
        ("--config.model.units=wide", "invalid literal"),
        ("--config.model.units", "needed --config.section.key=value"),
        ("--config.model.units=0", "needed at least 1"),
        ("--config.model.rnn_dropout=1.0", "needed 0 <= value < 1"),
        ("--config.model.patch_size=-3", "needed at least 0"),
        ("--config.model.classes=20", "needed one of 41"),
        ("--config.optimizer.learning_rate=-0.1", "needed at least 0"),
        ("--config.optimizer.epsilon=0.0", "needed at least 1e-12"),
        ("--config.optimizer.learning_rate=inf", "learning_rate is inf; needed a finite number"),
        ("--config.optimizer.clip_norm=nan", "clip_norm is nan; needed a finite number"),
        ("--config.optimizer.day_weight_decay=1e999", "is inf; needed a finite number"),
        ("--config.signal.smooth_std=-inf", "smooth_std is -inf; needed a finite number"),
        ("--config.signal.white_noise_std=-1.0", "needed at least 0"),
        ("--config.train.seed=-1", "needed at least 0"),
        ("--config.data.sessions=('a', 'a')", "needed different names"),
        ("--config.data.buckets=(('a', 'b'),)", "needed ascending"),
        ("--config.model.dtype=float16", "needed one of auto, float32, bfloat16"),
        ("--config.data.buckets=((9, 9), (5, 5))", "needed ascending"),
        # A batch of (5, 9) and (9, 5) would fit none.
        ("--config.data.buckets=((5, 9), (9, 5))", "with at least the labels of a shorter one"),
        ("--config.signal.speckle_rate=0.3", "signal.augment does not list 'speckle'"),
        ("--config.signal.channel_mask_rate=0.3", "does not list 'channel_mask'"),
        ("--config.train.on_nonfinite=ignore", "needed one of stop, skip"),
        ("--config.model.recurrence=lstm", "needed one of auto, scan, pallas"),
        ("--config.parallel.model_axis=0", "needed at least 1"),
    ],
)
def test_a_wrong_override_says_what_is_needed(override, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        load_config(BASELINE, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("x = 1", "no get_config"),
        ("def get_config(:", "not valid Python"),
        (
            "def get_config():\n  import ml_collections as m\n  return m.ConfigDict()",
            "missing keys",
        ),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, message):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_the_strength_of_a_listed_augmentation_and_none_of_another_one_are_taken():
    masks = "--config.signal.augment=('white_noise','speckle')"
    config = load_config(
        BASELINE, [masks, "--config.signal.speckle_rate=0.3", "--config.signal.random_cut=1"]
    )
    assert (config.signal.speckle_rate, config.signal.random_cut) == (0.3, 1)


def test_missing_and_unknown_keys_of_a_file_are_named():
    values = dataclasses.asdict(load_config(BASELINE))
    values["train"]["length"] = values["train"].pop("steps")
    with pytest.raises(ConfigError, match=r"missing keys \['steps'\], unknown keys \['length'\]"):
        freeze(values)


def test_a_written_configuration_reads_back_equal(tmp_path):
    config = load_config(BASELINE)
    write_config(config, tmp_path / "config.json")
    assert read_written_config(tmp_path / "config.json") == config


def test_a_damaged_written_configuration_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="not a run's folder"):
        read_written_config(path)
    for text in (json.dumps({"data": {}})[:-2], "[" * 100_000, "7" * 5_000):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not valid JSON"):
            read_written_config(path)


def test_every_number_of_a_written_configuration_must_be_finite(tmp_path):
    values = dataclasses.asdict(load_config(BASELINE))
    numbers = [
        (section, name)
        for section, keys in values.items()
        for name, value in keys.items()
        if isinstance(value, float)
    ]
    assert len(numbers) > 15
    for section, name in numbers:
        for wrong in (float("nan"), float("inf"), 10**400):
            changed = {**values, section: {**values[section], name: wrong}}
            path = tmp_path / "config.json"
            path.write_text(json.dumps(changed))
            with pytest.raises(ConfigError, match=rf"{section}\.{name} is .*needed a finite"):
                read_written_config(path)


def test_differences_name_key_and_both_values():
    config = load_config(BASELINE)
    changed = with_overrides(config, ["--config.model.units=512"])
    assert differences(config, changed) == {"model.units": (768, 512)}
    assert differences(config, config) == {}


def test_keys_that_made_a_model_cannot_be_changed_when_it_is_used():
    config = load_config(BASELINE)
    allowed = {"data.root"}
    assert with_overrides(config, ["--config.data.root=/x"], allowed).data.root == "/x"
    with pytest.raises(ConfigError, match=r"data\.sessions belongs to the trained model"):
        with_overrides(config, ["--config.data.sessions=('b', 'a')"], allowed)


def as_an_older_version_wrote_it(kind, **adversary):
    """A config.json from before models had settings of their own."""
    values = dataclasses.asdict(load_config(BASELINE))
    del values["model"]["name"], values["signal"]["augment"]
    values["model"] |= {"kind": kind, "noise_units": 8, "noise_layers": 1, "noisy_layers": 1}
    values["model"]["recompute_frames"] = 0
    values["adversary"] = {"noisy_weight": 1.0, "reversal": 1.0, "reversal_rate": 10.0} | adversary
    return json.loads(json.dumps(values))


def test_a_configuration_that_an_older_version_wrote_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(as_an_older_version_wrote_it("baseline")))
    assert read_written_config(path) == load_config(BASELINE)
    path.write_text(json.dumps(as_an_older_version_wrote_it("triple_gru", reversal=0.5)))
    model = read_written_config(path).model
    assert (model.name, model.noise_units, model.reversal, model.units) == (
        *("triple_gru", 8, 0.5),
        768,
    )


def test_a_file_and_overrides_with_older_keys_are_read(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from b2txt_jax.config import read_config_file\n"
        "def get_config():\n"
        f"    config = read_config_file({str(Path(BASELINE).absolute())!r})\n"
        "    config.model.kind = 'triple_gru'\n"
        "    config.model.noise_units = 64\n"
        "    config.adversary.reversal_rate = 5.0\n"
        "    return config\n"
    )
    model = load_config(path, ["--config.adversary.noisy_weight=0.5"]).model
    assert (model.name, model.noise_units) == ("triple_gru", 64)
    assert (model.reversal_rate, model.noisy_weight) == (5.0, 0.5)
    assert load_config(path, ["--config.model.kind=baseline"]).model == load_config(BASELINE).model


def write_derived(path, lines):
    path.write_text(
        "from b2txt_jax.config import read_config_file\n"
        "def get_config():\n"
        f"    config = read_config_file({str(Path(BASELINE).absolute())!r})\n"
        + "".join(f"    {line}\n" for line in lines)
        + "    return config\n"
    )
    return path


def test_a_derived_file_may_lock_and_may_read_the_older_section(tmp_path):
    locked = write_derived(tmp_path / "a.py", ["del config.adversary", "config.lock()"])
    assert load_config(locked) == load_config(BASELINE)
    lines = [
        "config.model.name = 'triple_gru'",
        "config.adversary.reversal = config.adversary.reversal / 2",
    ]
    assert load_config(write_derived(tmp_path / "b.py", lines)).model.reversal == 0.5


def test_a_wrong_key_of_the_older_section_is_named_for_every_model(tmp_path):
    path = write_derived(tmp_path / "a.py", ["config.adversary.reversl = 0.5"])
    with pytest.raises(ConfigError, match=r"'adversary': unknown keys \['reversl'\]"):
        load_config(path)


def test_the_older_name_of_the_baseline_becomes_todays(tmp_path):
    path = write_derived(tmp_path / "a.py", ["config.model.name = 'baseline'"])
    assert load_config(path) == load_config(BASELINE)


def test_every_limit_is_declared_with_its_field_and_named_with_its_meaning():
    with pytest.raises(ConfigError, match=r"noise_units is -1; needed at least 0 \(of the noise"):
        load_config("configs/triple_gru.py", ["--config.model.noise_units=-1"])
    config = load_config("configs/triple_gru.py")
    assert {"model.recurrence", "model.recompute_frames", "train.steps"} <= resumable_keys(config)
    assert "model.units" not in resumable_keys(config)


def test_differences_of_two_models_name_the_keys_that_one_has_not():
    baseline = load_config(BASELINE)
    found = differences(baseline, with_overrides(baseline, ["--config.model.name=triple_gru"]))
    assert found["model.name"] == ("gru", "triple_gru")
    assert found["model.noise_layers"] == (None, 2)
    assert "model.units" not in found


JUNK = [None, 5, -1, "x", "", [], {}, [[1]], [{}], [None], [1, "a"], True, 10**400, float("nan")]


def test_a_value_of_any_wrong_type_anywhere_is_an_error_of_the_configuration():
    base = dataclasses.asdict(load_config(BASELINE))
    changed = [
        *JUNK,
        *({**base, section: junk} for section in [*base, "adversary"] for junk in JUNK),
    ]
    for section, values in base.items():
        for key in [*values, "kind"]:
            changed += [{**base, section: {**values, key: junk}} for junk in JUNK]
    assert len(changed) > 500
    for values in changed:
        with contextlib.suppress(ConfigError):  # and nothing else
            freeze(values)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.model.units = 'many'", "line 4 fails with TypeError: .*correct it"),
        ("import no_such_module", "line 4 fails with ModuleNotFoundError"),
        ("config.data.rot", "line 4 fails with AttributeError"),
        ("return 5", r"no get_config\(\) that returns a ConfigDict"),
        ("return return", "not valid Python"),
    ],
)
def test_a_file_that_fails_is_named_with_its_line(tmp_path, line, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write_derived(tmp_path / "a.py", [line]))


@pytest.mark.parametrize("text", [b"[]", b"5", b"\xff", b"{", b"[" * 100_000])
def test_a_written_configuration_that_is_none_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_written_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("schedule", "decay_at", "message"),
    [
        ("steps", (20, 10), "needed ascending steps above 0"),
        ("steps", (0, 10), "needed ascending steps above 0"),
        ("steps", (10, 10), "needed ascending steps above 0"),
        ("cosine", (10,), "which schedule 'cosine' does not use"),
    ],
)
def test_steps_of_a_decay_ascend_and_belong_to_its_schedule(schedule, decay_at, message):
    keys = {"schedule": schedule, "decay_at": decay_at}
    with pytest.raises(ConfigError, match=message):
        load_config(BASELINE, [f"--config.optimizer.{k}={v}" for k, v in keys.items()])


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_configuration_that_is_installed_loads(path):
    load_config(path)
