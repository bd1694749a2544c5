"""Claims about `b2txt consensus`, from files to files."""

import json

import pytest

from b2txt_jax.cli import main
from b2txt_jax.evaluation.results import read_result
from b2txt_jax.metrics import ErrorRate

TRIALS = ["t15.2023.08.13/trial_0000", "t15.2023.08.13/trial_0001", "t15.2023.08.18/trial_0000"]
TRUE = ["how are you", "the cat sat", "yes"]


def said(*texts):
    """Trial -> (true, hypotheses). An empty text: the trial failed."""
    found = ([(text, -1.0)] if text else [] for text in texts)
    return dict(zip(TRIALS, zip(TRUE, found, strict=True), strict=True))


@pytest.mark.parametrize("method", ["mbr", "rover"])
def test_what_most_systems_say_is_chosen_scored_and_written_as_a_result(
    make_result, tmp_path, capsys, method
):
    a = make_result("a", said("how are you", "the cat sad", ""))
    b = make_result("b", said("how far you", "the cat sat", "yes"))
    c = make_result("c", said("how are you", "the cat sat", "yes"))
    out = tmp_path / "all"
    command = ["consensus", str(a), str(b), str(c), "--out", str(out), "--method", method]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "has no sentence for 1 of 3 trials; the others vote" in shown
    assert f"{a}: WER 28.57 % (2/7)" in shown
    result = read_result(out)
    assert [one.decoded for one in result.trials] == TRUE
    assert (result.rate("wer"), result.rate("per")) == (ErrorRate(0, 7), None)
    assert (out / "submission.csv").read_text().splitlines()[1] == "0,how are you"
    assert main(command) == 0  # the same settings replace it
    assert main([*command, "--split", "val", "--nbest", "7", "--method", "mbr"]) == 2
    assert main(["compare", str(a), str(out)]) == 0


def test_one_system_is_taken_by_minimum_bayes_risk_over_its_own_list(make_result, tmp_path):
    """None of the two halves of the list agrees with the best, and they agree with one another."""
    trial = {"t/a": ("a b c", [("x y z", -1.0), ("a b c", -1.1), ("a b d", -1.2)])}
    answers = make_result("a", trial_words(trial)) / "answers.jsonl"
    assert main(["consensus", str(answers), "--out", str(tmp_path / "out")]) == 0
    (line,) = (tmp_path / "out/answers.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["sentence"] == "see be the"
    assert [one["acoustic"] for one in found["nbest"]] == [None] * 3


def trial_words(said):
    """The letters of a test as words of the dictionary."""
    word = {"a": "see", "b": "be", "c": "the", "d": "tea", "x": "no", "y": "way", "z": "out"}

    def spoken(text):
        return " ".join(word[letter] for letter in text.split())

    return {
        trial: (spoken(true), [(spoken(text), total) for text, total in found])
        for trial, (true, found) in said.items()
    }


def test_a_submission_votes_with_results_by_the_numbers_of_its_lines(make_result, tmp_path, capsys):
    a = make_result("a", said("how are you", "the cat sat", "yes"))
    for name in ("one", "two"):
        (tmp_path / f"{name}.csv").write_text("id,text\n0,how far you\n1,the cat sat\n2,yes\n")
    systems = [str(tmp_path / "one.csv"), str(a), str(tmp_path / "two.csv")]
    assert main(["consensus", *systems, "--out", str(tmp_path / "all")]) == 0
    assert read_result(tmp_path / "all").trials[0].decoded == "how far you"


@pytest.mark.parametrize(
    ("files", "error"),
    [
        (["a", "short.csv"], "has 1 trials"),
        (["a", "none.jsonl"], "there is no"),
        (["a", "b"], "only the former has u/1"),
        (["a", "bad.csv"], "needed the id 0 and a text"),
        (["a", "--split", "test"], "is of the val split; needed test"),
        (["a", "--temperature", "0"], "a number above 0"),
        (["a", "short.csv", "a"], "is given more than once, and would count twice"),
        (["nothing.txt"], "has no trial; needed at least one"),
    ],
)
def test_systems_that_do_not_fit_are_an_error_in_one_line(
    make_result, tmp_path, capsys, files, error
):
    make_result("a", said("how are you", "the cat sat", "yes"))
    make_result("b", {"u/1": ("yes", [("yes", -1.0)])})
    (tmp_path / "short.csv").write_text("id,text\n0,yes\n")
    (tmp_path / "nothing.txt").write_text("")
    (tmp_path / "bad.csv").write_text("id,text\n1,yes\n")
    systems = [
        str(tmp_path / one) if (tmp_path / one.partition(".")[0]).exists() or "." in one else one
        for one in files
    ]
    assert main(["consensus", *systems, "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert error in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out" / "evaluation.json").exists()
