"""Settings keep the types of their declarations, whatever JSON made of the numbers."""

import json

import pytest

from lm_server.settings import Settings, SettingsError, changed, expected_wer, read_settings


def test_numbers_get_the_type_of_their_setting():
    found = changed(Settings(), {"beam": 14, "nbest": 5.0})
    assert (found.beam, type(found.beam)) == (14.0, float)
    assert (found.nbest, type(found.nbest)) == (5, int)


@pytest.mark.parametrize("value", ["5", None, True, [5]])
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(SettingsError, match=r"nbest is .*; needed a number"):
        changed(Settings(), {"nbest": value})


def test_a_part_of_a_whole_number_is_refused():
    with pytest.raises(SettingsError, match="nbest"):
        changed(Settings(), {"nbest": 5.5})


@pytest.mark.parametrize(
    ("values", "penalty"),
    [
        ({"silence_penalty": 2.5, "acoustic_scale": 0.4}, 1.0),
        ({"silence_penalty": 2.5}, 3.75),  # at the scale that is the default of both formats
        ({"silence_penalty": 1000, "acoustic_scale": 0.4}, 1000.0),  # never
        ({"acoustic_scale": 0.4}, 3.75),
    ],
)
def test_a_silence_penalty_of_format_1_keeps_its_meaning(tmp_path, values, penalty):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"format": 1, "settings": values}))
    assert read_settings(path).silence_penalty == pytest.approx(penalty)
    path.write_text(json.dumps({"format": 2, "settings": values}))
    assert read_settings(path).silence_penalty == values.get("silence_penalty", 3.75)


def test_an_expected_rate_that_is_no_number_is_none(tmp_path):
    path = tmp_path / "settings.json"
    for rate, expected in ((0.25, 0.25), ("low", 0.0), (None, 0.0)):
        about = {"logits_sha256": "x", "expected_wer": rate}
        path.write_text(json.dumps({"format": 2, "settings": {}, "about": about}))
        assert expected_wer(path, "x") == expected
        assert expected_wer(path, "y") == 0.0
