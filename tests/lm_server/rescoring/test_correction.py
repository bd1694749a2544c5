"""Claims about corrections by a large language model: hand-worked limits, and tiny random ones."""

import json
import math

import pytest
import torch
from test_causal_lm import make

from lm_server.__main__ import main
from lm_server.rescoring import corrector
from lm_server.rescoring.consensus import together
from lm_server.rescoring.correction import (
    CORRECTED,
    OUTCOMES,
    SAME,
    Gate,
    candidates,
    is_confident,
    messages,
    outcome,
    with_outcome,
)
from lm_server.rescoring.finetune import Course, finetune, read_chats
from lm_server.rescoring.load import load_scorer
from lm_server.rescoring.scorer import RescoringError

OWN = "the bat sat on the mat"
LISTED = [OWN, "the cat sat on a mat", "the bat sad on the mat"]
SURE = [0.999, 0.5, 0.6, 0.999, 0.7, 0.999]
TEMPLATE = (
    "{% for one in messages %}<{{ one.role }}>{{ one.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def judged(reply, gate=Gate(), confidences=SURE, vocabulary=frozenset()):  # noqa: B008
    return outcome(reply, OWN, LISTED, confidences, gate, vocabulary)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("The bat sat on the mat.", SAME),  # as it is scored
        ("the cat sat on the mat", CORRECTED),  # one word, of the list, not a sure one
        ("the cat sat on a mat", CORRECTED),
        ("1. the cat sat on the mat", CORRECTED),  # figures are no words
        ("the dog sat on the mat", "new_word"),
        ("", "no_words"),
        ("42!", "no_words"),
        ("a cat sat on the mat", "sure_word"),  # the first `the`
        ("the cat sat on", "sure_word"),  # the last word is missing
        ("mat the mat sad cat on on a mat", "too_far"),
    ],
)
def test_a_reply_counts_within_the_limits_alone(reply, expected):
    assert judged(reply) == expected


def test_each_limit_can_be_moved():
    assert judged("the dog sat on the mat", vocabulary={"dog"}) == CORRECTED
    assert judged("a cat sat on the mat", Gate(word_confidence=1.0)) == CORRECTED
    assert judged("the cat sat on the mat", Gate(edits=0)) == "too_far"
    assert judged("the cat sat on a mat", Gate(edits=0)) == CORRECTED  # it is in the list
    # Word confidences of other words than those of the sentence say nothing.
    assert judged("a cat sat on the mat", confidences=[1.0] * 5) == CORRECTED
    assert is_confident(0.9, Gate(0.9))
    assert not is_confident(0.8999, Gate(0.9))
    assert not is_confident(None, Gate(0.9))


def test_the_firsts_of_systems_are_votes_and_other_sentences_are_listed_once():
    lists = [["a", "b", "c"], [], ["a", "d", "b"], ["d", "b", "e"]]
    assert candidates(lists, 1) == ["a", "a", "d"]
    assert candidates(lists, 2) == ["a", "a", "d", "b"]
    assert candidates(lists, 9) == ["a", "a", "d", "b", "c", "e"]


def test_several_systems_are_one_answer_with_the_confidence_of_their_agreement():
    def answer(*texts):
        return {"trial": "t", "nbest": [{"sentence": text, "total": 0.0} for text in texts]}

    found = together([answer("the cat"), answer("the cat"), answer("the bat"), answer()])
    assert (found["trial"], found["sentence"]) == ("t", "the cat")
    assert found["confidence"] == pytest.approx(2 / 3)
    assert found["word_confidences"] == pytest.approx([1.0, 2 / 3])
    alone = answer("the cat")
    assert together([alone]) == alone


def test_a_used_reply_is_the_first_sentence_and_has_no_scores():
    nbest = [{"sentence": text, "total": -n} for n, text in enumerate(["the bat", "the cat"])]
    answer = {"sentence": "the bat", "confidence": 0.4, "word_confidences": [1, 0.4]}
    found = with_outcome({**answer, "nbest": nbest}, CORRECTED, "The cat.")
    assert [one["sentence"] for one in found["nbest"]] == ["the cat", "the bat"]
    assert found["sentence"] == "the cat"
    assert (found["confidence"], found["word_confidences"]) == (None, [])
    assert found["nbest"][0]["total"] is None
    refused = with_outcome({**answer, "nbest": nbest}, "too_far", "a dog ran")
    assert refused["sentence"] == "the bat"
    assert refused["nbest"] == nbest
    assert refused["correction"] == {"outcome": "too_far", "reply": "a dog ran"}


@pytest.fixture(scope="module", params=["plain", "chat"])
def model(request, tmp_path_factory):
    """A tiny random model that reads 512 tokens, with a chat template or without."""
    folder = make(tmp_path_factory.mktemp("llm") / request.param, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    if request.param == "chat":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_reply_is_the_likeliest_token_after_the_other_and_ends(model):
    """Against one whole pass of the model for each token."""
    llm = load_scorer(model, "cpu")
    ids = corrector.prompt_tokens(llm, messages(LISTED[:2]))
    shown = llm.tokenizer.decode(ids)
    assert "1. the bat sat on the mat\n2. the cat sat on a mat" in shown
    assert shown.endswith("<assistant>" if llm.tokenizer.chat_template else "Sentence:")
    most, said = 8 + 2 * max(len(corrector.reply_tokens(llm, one)) for one in LISTED[:2]), []
    while len(said) < most and 0 not in said:
        with torch.no_grad():
            logits = llm.network(torch.tensor([[*ids, *said]])).logits
        said.append(int(logits[0, -1].argmax()))
    text = llm.tokenizer.decode(said, skip_special_tokens=True).strip()
    line, problem = corrector.reply(llm, LISTED[:2])
    assert line == text.partition("\n")[0]
    assert problem == (None if 0 in said or "\n" in text else "unfinished")
    assert corrector.reply(llm, LISTED * 40) == ("", "too_long")


def test_it_learns_the_replies_of_chats_of_which_none_is_held_out_too(model, tmp_path):
    replies = [f"the cat {verb}" for verb in ("sat", "ran", "saw", "ate", "had")]
    lines = [json.dumps({"messages": messages([one, "a cat"], one)}) for one in replies * 4]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(lines))
    material = read_chats(chats)
    learned, held_out = material.split(0.3)
    said = [{chat[-1]["content"] for chat in one.chats} for one in (learned, held_out)]
    assert not said[0] & said[1]
    assert len(learned) + len(held_out) == len(material) == 20
    course = Course(epochs=1, rank=8, learning_rate=0.02, batch=4, held_out=0.3)
    before, after = finetune(model, material, tmp_path / "out", course, "cpu")
    assert after < 0.2 * before
    # The perplexity is of the reply and its end, whatever stands before it.
    llm = load_scorer(model, "cpu")
    total = 0.0
    for chat in held_out.chats:
        prompt = corrector.prompt_tokens(llm, chat[:-1])
        whole = [*prompt, *corrector.reply_tokens(llm, chat[-1]["content"])]
        with torch.no_grad():
            logs = llm.network(torch.tensor([whole])).logits[0].log_softmax(-1)
        total += sum(float(logs[n - 1, whole[n]]) for n in range(len(prompt), len(whole)))
    words = 3 * len(held_out)
    assert before == pytest.approx(math.exp(-total / words), rel=1e-3)


@pytest.fixture
def decoded(tmp_path):
    """The options of `correct` for two sentences, of which one is sure."""
    nbest = [{"sentence": text, "total": -n} for n, text in enumerate(["the bat sat", "the hat"])]
    own = {"sentence": nbest[0]["sentence"], "nbest": nbest, "word_confidences": [0.99, 0.5, 0.9]}
    lines = [
        json.dumps({"trial": name, **own, "confidence": confidence, "problem": None}) + "\n"
        for name, confidence in (("unsure", 0.5), ("sure", 0.95))
    ]
    (tmp_path / "answers").write_text("".join(lines))
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm/lexicon.txt").write_text("cat K AE T\nsat S AE T\n")
    (tmp_path / "refs").write_text("unsure\tthe cat sat\nsure\tthe bat sat\n")
    options = {"answers": "answers", "lm": "lm", "refs": "refs", "out": "corrected"}
    given = [part for name, file in options.items() for part in (f"--{name}", str(tmp_path / file))]
    return ["correct", *given, "--llm-device", "cpu"]


def corrected(tmp_path):
    lines = (tmp_path / "corrected").read_text().splitlines()
    return {one["trial"]: one for one in map(json.loads, lines)}


def test_a_model_that_knows_nothing_changes_nothing(model, decoded, tmp_path, capsys):
    assert main([*decoded, "--llm", str(model)]) == 0
    found = corrected(tmp_path)
    assert {one["sentence"] for one in found.values()} == {"the bat sat"}
    assert found["sure"]["correction"] == {"outcome": "confident", "reply": None}
    refused = found["unsure"]["correction"]["outcome"]
    assert OUTCOMES[refused].startswith("refused: ")
    shown = capsys.readouterr().out
    assert f"1 {refused}: {OUTCOMES[refused]}" in shown
    assert "WER of 2 sentences: before 16.67 % (1/6), after 16.67 % (1/6)" in shown


def test_a_reply_within_the_limits_is_written_and_counted(
    model, decoded, tmp_path, capsys, monkeypatch
):
    asked = []

    def reply(_, listed):
        asked.append(listed)
        return "The cat sat.", None

    monkeypatch.setattr(corrector, "reply", reply)
    assert main([*decoded, "--llm", str(model)]) == 0
    assert asked == [["the bat sat", "the hat"]]
    assert {name: one["sentence"] for name, one in corrected(tmp_path).items()} == {
        "unsure": "the cat sat",
        "sure": "the bat sat",
    }
    shown = capsys.readouterr().out
    assert "1 corrected: the reply is used" in shown
    assert "WER of 2 sentences: before 16.67 % (1/6), after 0.00 % (0/6)" in shown


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ([], "there is no model to ask: add --llm DIR"),
        (["--llm", "none", "--max-edits", "-1"], "--max-edits -1"),
        (["--llm", "none"], "the large language model none is not there"),
        (["--llm", "none", "--answers", "{a}", "{b}"], "has the trial u, which"),
        (["--llm", "none", "--answers", "{a}", "{a}"], "twice; needed each system once"),
    ],
)
def test_what_cannot_be_corrected_is_an_error_in_one_line(tmp_path, capsys, options, error):
    for name, trial in (("a", "t"), ("b", "u")):
        line = {"trial": trial, "sentence": "yes", "nbest": [{"sentence": "yes", "total": 0.0}]}
        (tmp_path / name).write_text(json.dumps(line) + "\n")
    files = {name: tmp_path / name for name in "ab"}
    command = ["correct", "--answers", str(files["a"]), "--out", str(tmp_path / "out")]
    assert main([*command, *(one.format(**files) for one in options)]) == 2
    shown = capsys.readouterr().err
    assert error in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_line_that_is_no_chat_with_a_reply_is_named(tmp_path):
    for line in ("{}", "no", '{"messages": [{"role": "user", "content": "a"}]}', "[1]"):
        (tmp_path / "chats").write_text(f"\n{line}\n")
        with pytest.raises(RescoringError, match=r"chats line 2 is .*: needed lines"):
            read_chats(tmp_path / "chats")
