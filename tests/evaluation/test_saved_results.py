"""What `b2txt evaluate` writes is read again as it was, and anything else is refused by name."""

import json
import os
from pathlib import Path

import pytest

from b2txt_jax.evaluation.results import ResultsError, read_result, result_of
from b2txt_jax.metrics import ErrorRate

SAID = {
    "t15.2023.08.13/trial_0000": ("the cat sat", [("the cat sat", -1.0), ("a cat sat", -3.0)]),
    "t15.2023.08.18/trial_0001": ("how are you", []),
}


def test_a_result_is_read_with_its_errors_its_corpus_and_its_hypotheses(make_result) -> None:
    folder = make_result("lm", SAID, corpora=["Harvard", None], train_sentences=["the cat sat"])
    result = read_result(folder)
    first, failed = result.trials
    assert (result.name, result.parameters) == ("lm", "0123abcd")
    assert result.rate("wer") == ErrorRate(3, 6)
    assert (first.wer, first.per) == (ErrorRate(0, 3), ErrorRate(0, 11))
    assert (first.session, first.corpus, first.seen) == ("t15.2023.08.13", "Harvard", True)
    assert [one["sentence"] for one in first.answer["nbest"]] == ["the cat sat", "a cat sat"]
    assert (failed.decoded, failed.answer, failed.wer) == (None, {}, ErrorRate(3, 3))
    assert read_result(folder / "evaluation.json") == result


def test_scores_that_a_server_did_not_send_are_null_and_not_nan(make_result) -> None:
    folder = make_result("lm", {"t/a": ("yes", [("yes", float("nan"))])})
    (line,) = (folder / "answers.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["nbest"][0]["total"] is None


def test_of_a_run_the_newest_result_is_taken(make_result, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ResultsError, match="has no result of its val split: make one with"):
        result_of(tmp_path)
    old, new = make_result("val/old", SAID), make_result("val/new", SAID)
    os.utime(old / "evaluation.json", (1, 1))
    assert result_of(tmp_path).name == new.name
    # Which file is younger says nothing once a run has been copied. The date in it does.
    content = json.loads((old / "evaluation.json").read_bytes())
    content["made"]["date"] = "2031-01-02T03:04:05+00:00"
    (old / "evaluation.json").write_text(json.dumps(content))
    os.utime(old / "evaluation.json", (1, 1))
    assert result_of(tmp_path).name == old.name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"sentences": [], "checkpoint": {}, "made": {}, "settings": []}',
        '{"sentences": [{"trial": "a"}, {"trial": "a"}], "checkpoint": {}}',
        '{"sentences": [{"trial": 3}]}',
        '{"sentences": [{"trial": "a", "decoded": 3}]}',
        '{"sentences": [{"trial": "a", "errors": -1, "words": 3}]}',
        '{"sentences": [], "wer": {"all": {"errors": "x"}}, "checkpoint": {}}',
    ],
)
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ResultsError, match=r"evaluation\.json is not a result of `b2txt evaluate`"):
        read_result(tmp_path)


@pytest.mark.parametrize("line", ["{", "3", '{"trial": "a"}', '{"trial": 3, "nbest": []}'])
def test_a_damaged_line_of_answers_is_named(make_result, line: str) -> None:
    folder = make_result("lm", SAID)
    with (folder / "answers.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ResultsError, match=r"answers\.jsonl line 2 is no answer"):
        read_result(folder)
