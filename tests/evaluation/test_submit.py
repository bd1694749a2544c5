"""Claims about submissions: what a benchmark would refuse is found before it is sent."""

import pytest

from b2txt_jax.cli import main

TRIALS = [f"t15.2023.08.13/trial_{n:04}" for n in range(3)]


def result_of_texts(make_result, *texts, split="test", trials=TRIALS):
    found = ([(text, -1.0)] if text else [] for text in texts)
    said = {trial: (None, some) for trial, some in zip(trials, found, strict=True)}
    return make_result("result", said, split=split)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.csv", "id,text\n0,yes i can\n1,don't\n2,no\n"),
        ("s.txt", "yes i can\ndon't\nno\n"),
    ],
)
def test_sentences_are_written_as_they_are_scored(make_result, tmp_path, capsys, name, content):
    result = result_of_texts(make_result, "Yes, I can.", "don't", "no")
    assert main(["submit", str(result), "--out", str(tmp_path / name), "--rows", "3"]) == 0
    assert (tmp_path / name).read_text() == content
    assert "3 sentences, 1 of them changed" in capsys.readouterr().out
    again = ["submit", str(tmp_path / name), "--out", str(tmp_path / f"again-{name}")]
    assert main([*again, "--rows", "3"]) == 0
    assert (tmp_path / f"again-{name}").read_text() == content


@pytest.mark.parametrize(
    ("texts", "options", "error"),
    [
        (["yes", "no", "yes"], [], "has 3 sentences of 1 sessions; needed 1450"),
        (["yes", "", "no"], ["--rows", "3"], "1 of 3 sentences are empty"),
        (
            ["yes", "no", "no"],
            ["--rows", "3", "--split", "val"],
            "is of the test split; needed val",
        ),
        (["yes", "no", "no"], ["--rows", "3", "--out", "x.json"], "ends in .csv or .txt"),
    ],
)
def test_what_a_benchmark_refuses_is_an_error(make_result, tmp_path, capsys, texts, options, error):
    result = result_of_texts(make_result, *texts)
    out = tmp_path / "s.csv"
    assert main(["submit", str(result), "--out", str(out), *options]) == 2
    assert error in capsys.readouterr().err
    assert not out.exists()


def test_empty_sentences_are_filled_when_asked(make_result, tmp_path):
    result, out = result_of_texts(make_result, "yes", "", "no"), tmp_path / "s.csv"
    assert main(["submit", str(result), "--out", str(out), "--rows", "3", "--fill", "The"]) == 0
    assert out.read_text() == "id,text\n0,yes\n1,the\n2,no\n"


def test_trials_in_another_order_than_the_published_one_are_refused(make_result, tmp_path, capsys):
    result = result_of_texts(make_result, "a", "b", "c", trials=TRIALS[::-1])
    assert main(["submit", str(result), "--out", str(tmp_path / "s.csv"), "--rows", "3"]) == 2
    assert "in another order than the published one" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["", "text,id\n", "id,text\n1,a\n", "id,text\n0,a\n0,b\n", "id,text\n0,a,b\n", 'id,text\n0,"a'],
)
def test_a_broken_submission_is_refused_with_its_line(tmp_path, capsys, text):
    (tmp_path / "old.csv").write_text(text)
    out = str(tmp_path / "new.csv")
    assert main(["submit", str(tmp_path / "old.csv"), "--out", out, "--rows", "1"]) == 2
    assert "needed" in capsys.readouterr().err
