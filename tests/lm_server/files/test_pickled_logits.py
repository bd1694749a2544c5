"""Pickled logits are read without running what a pickle may hold."""

import collections
import contextlib
import io
import json
import os
import pickle
import random

import numpy as np
import pytest
from small_model import say

from lm_server.__main__ import main
from lm_server.files.logits_file import LogitsFileError, read_logits
from lm_server.files.pickled_logits import convert
from lm_server.protocol import CLASSES, to_lm_order, to_rnn_order
from lm_server.tuning.references import read_references

SENTENCES = ["the cat sat", "a dog ran", "the bat ate the hat"]


def trials(padded=False):
    logits = [to_rnn_order(say(text.split())) for text in SENTENCES]
    lengths = [len(one) for one in logits]
    if padded:
        most = max(lengths) + 3
        logits = np.stack([np.pad(one, ((0, most - len(one)), (0, 0))) for one in logits])
    return {"logits": logits, "adjusted_lens": lengths, "transcription": SENTENCES}


def codes(text):
    return np.array([*map(ord, text), *[0] * 20], np.int32)


LAYOUTS = {
    "lists": trials(),
    "padded": trials(padded=True),
    "numpy numbers": {**trials(), "adjusted_lens": np.array(trials()["adjusted_lens"])},
    "codes of characters": {**trials(), "transcription": list(map(codes, SENTENCES))},
    "array of texts": {**trials(), "transcription": np.array(SENTENCES)},
    "array of objects": {**trials(), "transcription": np.array(SENTENCES, object)},
    "one dictionary a trial": [
        dict(zip(trials(), row, strict=True)) for row in zip(*trials().values(), strict=True)
    ],
    "a batch of one": {**trials(), "logits": [one[None] for one in trials()["logits"]]},
    "the other spelling": {
        "adjusted_len" if name == "adjusted_lens" else name: value
        for name, value in trials(padded=True).items()
    },
    "half precision": {**trials(), "logits": [one.astype("f2") for one in trials()["logits"]]},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_layout_becomes_a_logits_file_with_its_true_sentences(tmp_path, layout, protocol):
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(layout, protocol))
    assert convert(tmp_path / "p.pkl", tmp_path / "l.npz") == (3, [])
    found = read_logits(tmp_path / "l.npz")
    for i, text in enumerate(SENTENCES):
        np.testing.assert_array_equal(to_lm_order(found.of(i)), say(text.split()))
    assert [" ".join(one) for one in read_references(tmp_path / "l.npz").values()] == SENTENCES


def test_it_is_decoded_and_what_is_left_out_is_named(model_folder, tmp_path, capsys):
    more = {**trials(), "context": [""] * 3, "day_index": [1, 2, 3]}
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(more))
    logits, out = str(tmp_path / "l.npz"), tmp_path / "out.jsonl"
    assert main(["import", "--logits", str(tmp_path / "p.pkl"), "--out", logits]) == 0
    assert "3 trials, without context, day_index" in capsys.readouterr().out
    decode = ["decode", "--lm", str(model_folder), "--logits", logits, "--out", str(out)]
    assert main(decode) == 0
    assert [json.loads(line)["sentence"] for line in out.read_text().splitlines()] == SENTENCES


def test_columns_are_in_the_order_of_the_tokens(tmp_path):
    order = np.random.default_rng(0).permutation(41)
    shuffled = {"logits": [one[:, order] for one in trials()["logits"]]}
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(shuffled))
    convert(tmp_path / "p.pkl", tmp_path / "l.npz", [CLASSES[i] for i in order])
    first = to_lm_order(read_logits(tmp_path / "l.npz").of(0))
    np.testing.assert_array_equal(first, say(SENTENCES[0].split()))


class Runs:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize(
    "hostile",
    [
        Runs(os.mkdir, "ran"),
        Runs(eval, "__import__('os').mkdir('ran')"),
        Runs(getattr, "", "join"),
        Runs(np.fromfile, "x"),
        Runs(np.load, "x"),
        Runs(io.open, "ran", "w"),
        collections.OrderedDict(a=1),
        random.Random(0),
    ],
    ids=["os", "eval", "getattr", "fromfile", "load", "open", "OrderedDict", "Random"],
)
def test_nothing_but_arrays_and_plain_values_is_unpickled(tmp_path, monkeypatch, hostile):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({**trials(), "x": hostile}))
    with pytest.raises(LogitsFileError, match="which may run code; needed arrays of numpy"):
        convert(tmp_path / "p.pkl", tmp_path / "l.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.pkl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds list; needed a pickle of"),
        ({"rnn_logits": []}, r"holds \['rnn_logits'\]; needed"),
        ({"logits": []}, "has no trial"),
        ({**trials(), "adjusted_lens": [3]}, "has 3 logits and 1 of adjusted_lens"),
        (
            {**trials(), "adjusted_lens": [3, 3, 999]},
            "trial 2: adjusted_lens is 999, but",
        ),
        ({**trials(), "transcription": [1.5, "", ""]}, "trial 0: the transcription is float"),
        ({"logits": [np.zeros((3, 40))]}, r"trial 0: logits have shape \(3, 40\); needed"),
        ({"logits": [np.full((3, 41), np.nan)]}, "trial 0: logits hold 123 NaN"),
        ({"logits": "abc"}, "has logits of type str"),
        ({"logits": ["abc"]}, "trial 0"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(LogitsFileError, match=message):
        convert(tmp_path / "p.pkl", tmp_path / "l.npz")
    assert not (tmp_path / "l.npz").exists()


def test_whatever_byte_is_damaged_the_pickle_is_read_or_refused(tmp_path):
    whole = pickle.dumps({"logits": [np.ones((2, 41), np.float32)]})
    generator = random.Random(0)
    for _ in range(600):
        damaged = bytearray(whole)
        damaged[generator.randrange(220 if generator.random() < 0.9 else len(damaged))] ^= (
            1 << generator.randrange(8)
        )
        (tmp_path / "p.pkl").write_bytes(damaged)
        with contextlib.suppress(LogitsFileError):
            convert(tmp_path / "p.pkl", tmp_path / "l.npz")
