"""Results of different settings have different names, and one does not replace another."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from b2txt_jax.evaluation.command import OptionsError, check_replaceable, result_name

SETTINGS = {
    "step": 100,
    "language_model": "/lms/3gram",
    "language_model_crc32": 1,
    "search": {"beam": "17", "server_version": "1"},
}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"lm": Path("runs/lm_3gram")}, "lm_3gram"),
        ({"lm": Path("lm"), "settings": Path("runs/tuned.json")}, "lm-tuned"),
        ({"lm": Path("lm"), "llm": "runs/smollm2/", "workers": 2}, "lm-smollm2"),
        ({"redis": "redis://:secret@host"}, "server"),
        ({"redis": "redis://:secret@host", "workers": 0}, "workers"),
        ({"lm": Path("lm"), "llm": "runs/smollm2/", "weights": "ema"}, "lm-smollm2_ema"),
        ({"lm": Path("lm"), "passes": 8}, "lm-passes_8"),
    ],
)
def test_a_result_has_the_name_of_what_decoded(given: dict[str, Any], name: str) -> None:
    usual = {**dict.fromkeys(("lm", "llm", "settings", "redis", "workers")), "passes": 0}
    assert result_name(argparse.Namespace(**{**usual, "weights": "raw", **given})) == name


def written(out: Path, text: str) -> Path:
    (out / "evaluation.json").write_text(text)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"language_model": "/lms/5gram"}, "language_model was '/lms/3gram', is '/lms/5gram'"),
        ({"language_model_crc32": 2}, "language_model_crc32 was 1, is 2"),
        ({"llm": "opt"}, "llm was None, is 'opt'"),
        ({"weights": "ema"}, "weights was 'raw', is 'ema'"),
        ({"search": {"beam": "9"}}, "search.beam was '17', is '9'"),
    ],
)
def test_the_result_of_other_settings_is_not_replaced_unasked(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = written(tmp_path, json.dumps({"settings": SETTINGS}))
    with pytest.raises(OptionsError, match=message):
        check_replaceable(out, {**SETTINGS, **change})
    check_replaceable(out, {**SETTINGS, **change}, force=True)


def test_a_later_result_of_the_same_settings_replaces_the_earlier_one(tmp_path: Path) -> None:
    newer = {
        "search": {"beam": "17", "server_version": "2"},
        "step": 200,
        "weights": "raw",
        "not_rescored": ["x"],
    }
    check_replaceable(tmp_path, SETTINGS)
    check_replaceable(written(tmp_path, json.dumps({"settings": SETTINGS})), SETTINGS | newer)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 3}'])
def test_a_file_that_is_no_result_is_not_replaced_unasked(tmp_path: Path, text: str) -> None:
    with pytest.raises(OptionsError, match="is not a result of `b2txt evaluate`"):
        check_replaceable(written(tmp_path, text), SETTINGS)
