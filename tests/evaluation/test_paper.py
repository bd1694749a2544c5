"""The published figures: drawn from the files' own numbers, which are read without running any."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from b2txt_jax.cli import main
from b2txt_jax.evaluation.paper import personal_use, session_rates
from b2txt_jax.evaluation.published import (
    PublishedDataError,
    read_copy_task,
    read_personal_use,
)


def copy_task(**changes: Any) -> dict[str, Any]:
    """Four sentences of two days in the published layout."""
    cue, decoded = ["Y", "EH", "S", "SIL"], ["Y", "EH", "Z", "SIL"]
    found = {
        "decoded_logits": [np.eye(41)[[38, 11, 30, 40]].astype(np.float32) * 9] * 4,
        "cue_sentence": ["yes", "yes", "no way", "yes"],
        "cue_sentence_phonemes": [cue] * 4,
        "decoded_phonemes_raw": [cue, decoded, cue, cue],
        "decoded_sentence": ["yes", "says", "no way", "no"],
        "decoded_sentence_phonemes": [cue] * 4,
        "post_implant_day": np.array([25, 25, 27, 27]),
        "vocab_size": [50, 50, 125000, 50],
    }
    return {**found, **changes}


def use(**changes: Any) -> dict[str, Any]:
    trials = {
        "post_implant_day": [30, 30, 31],
        "correctness_rating": ["correct", "one word wrong", "incorrect"],
        "wpm": [30.0, np.nan, np.float64(20.0)],
    }
    found = {
        "trialized_info": trials,
        "total_use_time": {30: 7200.0, 31: np.float64(1800), 32: 0},
        "total_trial_count": {30: 100, 31: 5, 32: 0},
    }
    return {**found, **changes}


def written(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 4])
def test_rates_are_of_each_day_and_vocabulary(tmp_path: Path, protocol: int) -> None:
    task = read_copy_task(written(tmp_path / "c.pkl", copy_task(), protocol))
    per, wer = session_rates(task).axes
    assert [text.get_text() for text in per.figure.legends[0].get_texts()] == [
        "50 words",
        "125,000 words",
    ]
    points = {
        name: [line.get_xydata().tolist()[0] for line in axes.lines if len(line.get_xdata()) == 1]
        for name, axes in (("per", per), ("wer", wer))
    }
    assert [label.get_text() for label in per.get_yticklabels()] == ["day 25", "day 27"]
    assert sorted(x for x, _ in points["per"]) == [0, 0, 12.5]
    assert sorted(x for x, _ in points["wer"]) == [0, 50, 100]


def test_use_adds_up_in_hours_and_ratings_are_shares_of_a_day(tmp_path: Path) -> None:
    hours, sentences, right, speed = personal_use(
        read_personal_use(written(tmp_path / "p.pkl", use()))
    ).axes
    assert np.asarray(hours.lines[0].get_xydata()).tolist() == [[30, 2], [31, 2.5]]
    assert np.asarray(sentences.lines[0].get_ydata()).tolist() == [100, 105]
    shares = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in right.lines}
    assert shares["correct"] == [50, 0]
    assert shares["mostly correct"] == [50, 0]
    assert shares["incorrect"] == [0, 100]
    assert np.asarray(speed.lines[0].get_ydata()).tolist() == [30, 20]


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/should_not_be_there",)


@pytest.mark.parametrize(
    "content",
    [
        Evil(),
        copy_task(cue_sentence=[Evil()] * 4),
        {"wpm": np.load},
        {"x": np.lib.format.open_memmap},
        {"x": Path("a")},
        {"x": eval},
    ],
)
def test_what_may_run_code_is_refused_by_its_name(tmp_path: Path, content: Any) -> None:
    path = written(tmp_path / "c.pkl", content)
    with pytest.raises(PublishedDataError, match=r"it holds [\w.]+, which may run code"):
        read_copy_task(path)
    assert not Path("/tmp/should_not_be_there").exists()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (copy_task(vocab_size=[50]), "has columns of lengths"),
        ({"cue_sentence": ["a"]}, "has no decoded_logits"),
        (copy_task(cue_sentence="abcd"), "cue_sentence is str; needed a list"),
        (copy_task(post_implant_day=[1.5, 2, 3, 4]), "needed whole numbers"),
        (copy_task(decoded_logits=[np.zeros(41)] * 4), "needed .frames, 41."),
        ([1, 2], "only list"),
    ],
)
def test_other_contents_are_errors_that_name_the_field(tmp_path, content, error) -> None:
    with pytest.raises(PublishedDataError, match=error):
        read_copy_task(written(tmp_path / "c.pkl", content))


@pytest.mark.parametrize(
    "content", [use(total_use_time=[1, 2]), use(total_trial_count={30: 1}), {"trialized_info": {}}]
)
def test_other_contents_of_personal_use_are_errors(tmp_path: Path, content: Any) -> None:
    with pytest.raises(PublishedDataError, match="needed"):
        read_personal_use(written(tmp_path / "p.pkl", content))


@pytest.mark.slow
def test_the_command_writes_each_figure_in_each_format(make_result, tmp_path, capsys) -> None:
    copy, personal = written(tmp_path / "c.pkl", copy_task()), written(tmp_path / "p.pkl", use())
    said = {f"t15.2023.08.1{n}/trial_0000": ("yes", [("yes", -1.0)]) for n in (1, 3)}
    result, out = make_result("lm", said), tmp_path / "figures"
    command = ["figures", str(result), "--copy-task", str(copy), "--personal-use", str(personal)]
    assert main([*command, "--out", str(out), "--format", "svg", "pdf", "--trial", "3"]) == 0
    names = ("figure_2_rates", "figure_2_logits", "figure_4", "runs_rates")
    expected = sorted(f"{name}.{kind}" for name in names for kind in ("svg", "pdf"))
    assert sorted(path.name for path in out.iterdir()) == expected
    assert main([*command, "--out", str(out)]) == 2
    assert "--trial is 500; needed one of 0 to 3" in capsys.readouterr().err
    assert main(["figures", "--out", str(out)]) == 2
    assert main(["figures", "--out", str(out), "--copy-task", str(tmp_path / "none.pkl")]) == 2


def test_a_sentence_of_no_copy_task_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    personal = written(tmp_path / "p.pkl", use())
    command = ["figures", "--personal-use", str(personal), "--out", str(tmp_path / "figures")]
    assert main([*command, "--trial", "3"]) == 2
    assert "--trial 3 is a sentence of --copy-task" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()
