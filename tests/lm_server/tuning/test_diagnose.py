"""Claims about `lm-server diagnose`: each wrong sentence has the cause that was built into it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from small_model import say

from lm_server.__main__ import main
from lm_server.hypothesis import Hypothesis
from lm_server.lm.reader import find_words
from lm_server.protocol import LM_CLASSES, to_rnn_order
from lm_server.tuning.diagnose import Diagnosis, as_text, cause_of, summary

OPTIONS = ("--workers", "1", "--acoustic-scale", "1")


def file_of(path: Path, trials: Sequence[tuple[str, np.ndarray]]) -> Path:
    """A logits file with the true sentences."""
    np.savez(
        path,
        logits=to_rnn_order(np.concatenate([logits for _, logits in trials])),
        frames=[len(logits) for _, logits in trials],
        trial=[f"day/{index}" for index in range(len(trials))],
        sentence=[sentence for sentence, _ in trials],
    )
    return path


def heard(sentence: str) -> np.ndarray:
    """Logits of a sentence that leave the language model a say."""
    return say(sentence.split(), strength=6.0)


def test_each_wrong_sentence_has_the_cause_that_it_was_made_with(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of the two spellings of the same sounds the n-gram model prefers "to".
    logits = file_of(
        tmp_path / "val.npz",
        [
            ("The cat sat.", say(["the", "cat", "sat"])),
            ("The dog ran two the cat.", say(["the", "dog", "ran", "to", "the", "cat"])),
            ("The yak sat.", say(["the", "cat", "sat"])),
            ("The cat sat on the mat.", say(["the", "cat"], frames=1, gap=0)[:3]),
            # A tenth of the evidence is for the hat.
            ("A dog had a hat.", 0.1 * heard("a dog had a hat") + 0.9 * heard("a dog had a cat")),
        ],
    )
    for suffix in ("json", "csv"):
        out = tmp_path / f"found.{suffix}"
        argv = ["diagnose", "--lm", str(model_folder), "--logits", str(logits), *OPTIONS]
        assert main([*argv, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    causes = [one["cause"] for one in found["trials"]]
    assert causes == [None, "homophone", "vocabulary", "frames", "acoustics"]
    assert (found["wrong"], found["causes"]["homophone"]["truth_in_list"]) == (4, 1)
    assert found["trials"][4]["answer"].split()[-1] == "cat"
    assert "4 of 5 sentences are wrong" in text
    with (tmp_path / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["cause"] for row in rows] == [one or "" for one in causes]
    assert float(rows[1]["truth_total"]) == pytest.approx(found["trials"][1]["truth_total"])


def test_a_narrow_search_that_loses_the_truth_is_a_search_error_and_a_wider_one_mends_it(
    model_folder: Path, tmp_path: Path
) -> None:
    # The second phoneme of "dog" is the second likeliest class, which one class leaves out.
    logits = say(["the", "dog", "ran"], strength=6.0)
    logits[:, LM_CLASSES.index("AO")] *= 0.95
    where = logits.argmax(1) == LM_CLASSES.index("AO")
    logits[where, LM_CLASSES.index("AE")] = 6.0
    path, out = file_of(tmp_path / "val.npz", [("The dog ran.", logits)]), tmp_path / "x.json"
    argv = ["diagnose", "--lm", str(model_folder), "--logits", str(path), *OPTIONS]
    assert main([*argv, "--out", str(out), "--max-classes", "1"]) == 0
    found = json.loads(out.read_text())
    assert found["trials"][0]["cause"] == "search"
    assert found["trials"][0]["truth_total"] > found["trials"][0]["answer_total"]
    assert found["search_errors_mended_by"] == {"max_classes": 1}
    assert main([*argv, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["trials"][0]["cause"] is None


@pytest.mark.parametrize(
    ("truth", "answer", "cause"),
    [
        # (words, acoustic, ngram) by hand, with an acoustic scale of 1.
        (("the yak", -9.0, -9.0), ("the cat", -9.0, -9.0), "vocabulary"),
        (("the two", -5.0, -8.0), ("the to", -5.0, -6.0), "homophone"),
        (("the two", -5.0, -5.0), ("the to", -5.0, -6.0), "search"),
        (("the cat", -5.0, -9.0), ("the bat", -7.0, -4.0), "language model"),
        (("the cat", -7.0, -4.0), ("the bat", -5.0, -4.0), "acoustics"),
        (("the cat", -7.0, -4.0), ("the cat a", -5.0, -4.0), "acoustics"),
        (("the cat", -7.0, -1.0), ("the cat a", -5.0, -4.0), "search"),
    ],
)
def test_the_cause_follows_from_the_scores(
    model_folder: Path,
    truth: tuple[str, float, float],
    answer: tuple[str, float, float],
    cause: str,
) -> None:
    one, other = (
        Hypothesis(tuple(words.split()), acoustic, ngram, total=acoustic + ngram)
        for words, acoustic, ngram in (truth, answer)
    )
    known = find_words(model_folder, {*one.words, *other.words})
    assert cause_of(one.words, other, one, known) == cause
    assert cause_of(one.words, other, None, known) in ("frames", "vocabulary")


def test_the_table_counts_sentences_words_and_what_the_list_holds() -> None:
    def one(cause: str | None, errors: int, oracle: int, prefers: bool | None) -> Diagnosis:
        return Diagnosis("t", cause, None, "a b", "a", 2, errors, oracle, prefers, *[None] * 6)

    found = [
        one(None, 0, 0, None),
        one("acoustics", 2, 0, True),
        one("acoustics", 1, 1, False),
        one("search", 1, 1, True),
    ]
    total = summary(found)
    assert total["causes"]["acoustics"]["share"] == pytest.approx(2 / 3, abs=1e-6)
    assert (total["wer"], total["oracle_wer"]) == (0.5, 0.25)
    rows = {line[:15].strip(): line[15:].split() for line in as_text(found).splitlines()}
    assert rows["acoustics"] == ["2", "66.7%", "3", "1", "1"]
    assert rows["search"] == ["1", "33.3%", "1", "0", "1"]
    assert summary([])["wer"] is None


def test_only_the_search_whose_scores_are_of_one_path_is_diagnosed(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["diagnose", "--lm", str(model_folder), "--logits", "x.npz"]
    assert main([*argv, "--backend", "wfst"]) == 2
    assert "only the scores of the search flashlight are diagnosed" in capsys.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "x.txt")]) == 2
    assert "ends in .json or .csv" in capsys.readouterr().err
