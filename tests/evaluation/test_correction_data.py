"""Claims about the chats that teach a model to correct lists, from results to files."""

import json

import pytest

from b2txt_jax.cli import main
from b2txt_jax.evaluation.correction_data import fold_of

VAL = {
    "d/0": ("how are you", [("how far you", -1.0), ("how are you", -1.5), ("how", -9.0)]),
    "d/1": ("yes", [("yes", -1.0)]),
    "d/2": ("the cat sat", []),
}
TRAIN = {"d/9": ("yes", [("yes", -1.0)])}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(line):
    return [one["content"] for one in line["messages"]][1:]


def test_a_list_and_what_was_said_as_it_is_scored_become_a_chat(make_result, tmp_path, capsys):
    result = make_result("a", VAL)
    out = tmp_path / "chats.jsonl"
    assert main(["correction-data", str(result), "--out", str(out), "--nbest", "2"]) == 0
    first, second = lines(out)
    assert contents(first) == ["1. how far you\n2. how are you", "how are you"]
    assert contents(second) == ["1. yes", "yes"]
    assert [one["role"] for one in first["messages"]] == ["system", "user", "assistant"]
    assert (first["trial"], first["split"]) == ("d/0", "val")
    shown = capsys.readouterr().out
    assert "val: 2 lists, WER of their first sentences 25.00 % (1/4); 1 trials without" in shown
    assert "leak: a model that learned from val has its honest WER on test alone" in shown


def test_of_several_systems_each_first_sentence_is_listed_though_they_are_equal(
    make_result, tmp_path
):
    folders = [str(make_result(name, VAL)) for name in "abc"]
    out = tmp_path / "chats.jsonl"
    assert main(["correction-data", *folders, "--out", str(out)]) == 0
    assert contents(lines(out)[0])[0] == "\n".join(f"{n}. how far you" for n in (1, 2, 3))


def test_splits_are_mixed_in_their_order_and_what_leaks_is_named(make_result, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    for split, said in (("val", VAL), ("train", TRAIN)):
        make_result(f"run/{split}/lm", said, split, train_sentences={"yes"})
    out = tmp_path / "chats.jsonl"
    command = ["correction-data", str(run), "--out", str(out), "--mix", "val", "train", "val"]
    assert main(command) == 0
    assert [one["split"] for one in lines(out)] == ["val"] * 2 + ["train"] + ["val"] * 2
    leaks = json.loads((tmp_path / "chats.about.json").read_text())["leaks"]
    assert "have a WER of 0.00 % (0/1) instead of 25.00 % (1/4) of val" in leaks[0]
    assert any("1 of 3 val sentences occur in the train split" in one for one in leaks)
    shown = capsys.readouterr().out.replace("\n", " ")
    assert all(f"leak: {one}" in shown for one in leaks)


def test_a_fold_is_left_out_with_every_repetition_of_its_sentences(make_result, tmp_path):
    words = ["yes", "no", "how are you", "the cat sat", "see", "way"]
    said = {f"d/{n}": (words[n % 6], [(words[n % 6], -1.0)]) for n in range(12)}
    result = str(make_result("a", said))
    found = []
    for fold in range(3):
        out = tmp_path / f"{fold}.jsonl"
        command = ["correction-data", result, "--out", str(out), "--folds", "3"]
        assert main([*command, "--fold", str(fold)]) == 0
        kept = {contents(one)[1] for one in lines(out)}
        held_out = (tmp_path / f"{fold}.held_out.tsv").read_text().splitlines()
        left_out = {line.split("\t")[1] for line in held_out}
        assert not kept & left_out
        assert len(lines(out)) + len(held_out) == 12
        assert all(fold_of(one, 3) == fold for one in left_out)
        found += held_out
    assert len(set(found)) == 12


def test_what_an_earlier_call_left_out_is_not_left_beside_chats_of_all_sentences(
    make_result, tmp_path
):
    out, held_out = tmp_path / "chats.jsonl", tmp_path / "chats.held_out.tsv"
    command = ["correction-data", str(make_result("a", VAL)), "--out", str(out)]
    for fold in range(2):
        assert main([*command, "--folds", "2", "--fold", str(fold)]) in (0, 2)
    assert held_out.exists()
    assert main(command) == 0
    assert not held_out.exists()


def test_what_is_left_out_for_measuring_is_of_val_though_train_has_trials_of_that_name(
    make_result, tmp_path
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    words = ["yes", "no", "how are you", "the cat sat", "see", "way"]
    said = {
        split: {f"d/{n}": (words[n - shift], [(words[n - shift], -1.0)]) for n in range(6)}
        for split, shift in (("val", 0), ("train", 1))
    }
    for split in said:
        make_result(f"run/{split}/lm", said[split], split)
    out = tmp_path / "chats.jsonl"
    command = ["correction-data", str(run), "--out", str(out), "--mix", "val", "train"]
    assert main([*command, "--folds", "2", "--fold", "0"]) == 0
    left_out = [one for one in words if fold_of(one, 2) == 0]
    assert 0 < len(left_out) < 6
    held_out = (tmp_path / "chats.held_out.tsv").read_text().splitlines()
    assert held_out == [f"d/{n}\t{one}" for n, one in enumerate(words) if one in left_out]
    assert len(lines(out)) == 2 * (6 - len(left_out))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--nbest", "0"], "--nbest is 0"),
        (["again"], "is given more than once, and would count twice"),
        (["--folds", "2", "--fold", "2"], "a fold from 0 to K - 1"),
        (["--mix", "train"], "is of the val split; needed train"),
    ],
)
def test_what_cannot_be_written_is_an_error_in_one_line(
    make_result, tmp_path, capsys, options, error
):
    result = str(make_result("a", VAL))
    command = ["correction-data", "--out", str(tmp_path / "x.jsonl"), result]
    assert main([*command, *(result if one == "again" else one for one in options)]) == 2
    shown = capsys.readouterr().err
    assert error in shown
    assert shown.count("\n") == 1


def test_sentences_without_the_truth_are_refused(make_result, tmp_path, capsys):
    answers = make_result("a", VAL) / "answers.jsonl"
    assert main(["correction-data", str(answers), "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "does not have what was said" in capsys.readouterr().err
