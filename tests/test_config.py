import dataclasses
import json

import pytest

from b2txt_jax.config import (
    ConfigError,
    differences,
    freeze,
    load_config,
    read_written_config,
    with_overrides,
    write_config,
)

BASELINE = "configs/nejm_baseline.py"


def test_the_baseline_holds_the_published_recipe():
    config = load_config(BASELINE)
    assert len(config.data.sessions) == 45
    assert config.data.days_per_batch * config.data.trials_per_day == 64
    assert (config.model.layers, config.model.units) == (5, 768)
    assert (config.model.patch_size, config.model.patch_stride) == (14, 4)
    assert config.train.steps == config.optimizer.decay_steps == 120_000
    assert config.optimizer.epsilon == 0.1


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
        ("--config.model.rnn_dropout=1.0", "needed 0 <= rate < 1"),
        ("--config.model.dtype=float16", "needed one of auto, float32, bfloat16"),
        ("--config.data.buckets=((9, 9), (5, 5))", "needed ascending"),
        ("--config.data.buckets=()", "needed ascending"),
    ],
)
def test_a_wrong_override_says_what_is_needed(override, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        load_config(BASELINE, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("x = 1", "no get_config")],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, message):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_and_unknown_keys_of_a_file_are_named():
    values = dataclasses.asdict(load_config(BASELINE))
    values["model"]["depth"] = values["model"].pop("layers")
    with pytest.raises(ConfigError, match=r"missing keys \['layers'\], unknown keys \['depth'\]"):
        freeze(values)


def test_a_written_configuration_reads_back_equal(tmp_path):
    config = load_config(BASELINE)
    write_config(config, tmp_path / "config.json")
    assert read_written_config(tmp_path / "config.json") == config


def test_a_damaged_written_configuration_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="not a run's folder"):
        read_written_config(path)
    path.write_text(json.dumps({"data": {}})[:-2])
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_written_config(path)


def test_differences_name_key_and_both_values():
    config = load_config(BASELINE)
    changed = with_overrides(config, ["--config.model.units=512"])
    assert differences(config, changed) == {"model.units": (768, 512)}
    assert differences(config, config) == {}
