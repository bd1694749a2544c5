"""Claims about large language models' scores, on tiny random ones, against one token at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from answers import answer_of
from small_model import say
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lm_server import offline
from lm_server.__main__ import main
from lm_server.hypothesis import Hypothesis
from lm_server.protocol import to_rnn_order
from lm_server.rescoring import causal_lm, packing
from lm_server.rescoring.causal_lm import CausalLM, in_form
from lm_server.rescoring.load import add_llm_options, llm_from_options, load_scorer
from lm_server.rescoring.scorer import RescoringError
from lm_server.settings import Settings

# The newest transformers warns of what its next releases drop.
pytestmark = pytest.mark.filterwarnings("error:.*past_key_values:FutureWarning")

SENTENCES = [
    "the cat sat on the mat",
    "the cat sat on a mat",
    "the cat sat",
    "a dog",
    "the",
    "the cat ran to the dog and the bat",
    "the cat sat on the mat",
]
CONTEXT = "we talk of  animals. "


def tokenizer(start: str | None) -> transformers.PreTrainedTokenizerFast:
    """Byte-level pairs as OPT's and GPT-2's; with `start` before every text, if given."""
    one = Tokenizer(models.BPE())
    one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    one.train_from_iterator([*SENTENCES, CONTEXT], trainer)
    if start:
        one.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, 0)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=one, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )


def make(folder: Path, kind: str) -> Path:
    """A model folder of random weights, large enough to tell sentences apart."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 330, "max_position_embeddings": 128, "bos_token_id": 0}
    if kind == "opt":
        config = transformers.OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            init_std=0.5,
            **sizes,
        )
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=330,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.5,
        )
    else:
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.5,
            **sizes,
        )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer("</s>" if kind == "opt" else None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["opt", "gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("llm") / request.param, request.param)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("llm") / "opt", "opt")


@pytest.fixture
def copy(opt: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(opt, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def naive(folder: Path, text: str) -> float:
    """ln P(text): `</s>` first, then every token from the whole of what stands before it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    ids = ids if ids[0] == 0 else [0, *ids]
    total = 0.0
    for place in range(1, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:place]])).logits[0, -1]
        total += float(torch.log_softmax(logits, dim=-1)[ids[place]])
    return total


@pytest.mark.parametrize("context", ["", CONTEXT])
def test_scores_are_those_of_one_token_at_a_time(folder: Path, context: str) -> None:
    scorer = CausalLM(folder, "cpu")
    assert scorer.trees
    before = "we talk of animals. " if context else ""
    expected = [naive(folder, before + sentence) for sentence in SENTENCES]
    assert len({round(one, 3) for one in expected}) == 6, "the model tells the sentences apart"
    np.testing.assert_allclose(scorer.score(SENTENCES, context), expected, atol=1e-4)


@pytest.mark.parametrize("most", [1, 3, 7, 512])
def test_trees_and_whole_sentences_agree_in_batches_of_any_size(folder: Path, most: int) -> None:
    scorer = CausalLM(folder, "cpu")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "dog", "sat", "on", "a", "zebra"]
    sentences = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(40)]
    for context in ("", CONTEXT):
        scorer.tokens_per_batch = most
        trees = scorer.score(sentences, context)
        scorer.trees, scorer.tokens_per_batch = False, 512
        np.testing.assert_allclose(trees, scorer.score(sentences, context), atol=1e-4)
        scorer.trees = True


def test_the_length_penalty_counts_every_token_with_the_first(opt: Path) -> None:
    scorer = CausalLM(opt, "cpu")
    plain, penalised = scorer.score(["a dog"]), scorer.score(["a dog"], length_penalty=0.5)
    count = len(transformers.AutoTokenizer.from_pretrained(opt)("a dog")["input_ids"])
    assert plain[0] - penalised[0] == pytest.approx(0.5 * count)


def test_what_begins_alike_is_computed_once(opt: Path) -> None:
    scorer = CausalLM(opt, "cpu")
    seen = []
    scorer.network.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    sentences = [f"the cat sat on the mat and the {last}" for last in ("cat", "dog", "bat")]
    scorer.score(sentences, CONTEXT * 5)
    whole = sum(map(len, scorer.tokens(sentences, CONTEXT * 5)))
    assert sum(seen) < whole / 2.5


def test_no_sentences_have_no_scores(opt: Path) -> None:
    assert CausalLM(opt, "cpu").score([]).shape == (0,)


def test_a_model_that_cannot_do_trees_scores_whole_sentences(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = CausalLM(folder, "cpu").score(SENTENCES, CONTEXT)
    true = CausalLM._run_tree

    def blind(self: CausalLM, tree, shared, cache):  # type: ignore[no-untyped-def]
        return true(self, tree, shared, cache).roll(1, dims=0)

    monkeypatch.setattr(CausalLM, "_run_tree", blind)
    scorer = CausalLM(folder, "cpu")
    assert not scorer.trees
    np.testing.assert_allclose(scorer.score(SENTENCES, CONTEXT), expected, atol=1e-4)


def test_a_sentence_has_the_score_of_its_likeliest_ending(opt: Path) -> None:
    scorer = CausalLM(opt, "cpu", "sentence")
    for context in ("", "We talk."):
        expected = [
            max(naive(opt, f"{context} {one}{end}".strip()) for end in ".?!")
            for one in ("The cat sat", "A dog")
        ]
        found = scorer.score(["the cat sat", "a dog"], context)
        assert found == pytest.approx(expected, abs=1e-3)


def test_the_text_form_is_plain_unless_the_folder_or_the_user_says_so(copy: Path) -> None:
    assert in_form("i think i'm in italy", "plain") == "i think i'm in italy"
    assert in_form("i think i'm in italy", "sentence") == "I think I'm in italy."
    plain = CausalLM(copy, "cpu")
    asked = CausalLM(copy, "cpu", "sentence")
    (copy / "rescoring.json").write_text(json.dumps({"text_form": "sentence"}))
    told = CausalLM(copy, "cpu")
    assert (plain.text_form, asked.text_form, told.text_form) == ("plain", "sentence", "sentence")
    assert plain.score(["A dog."]) == asked.score(["a dog"]) == told.score(["a dog"])
    (copy / "rescoring.json").write_text("{")
    with pytest.raises(RescoringError, match=r"rescoring\.json"):
        CausalLM(copy, "cpu")


def test_too_many_tokens_are_refused_and_the_answer_says_so(opt: Path) -> None:
    scorer = CausalLM(opt, "cpu")
    with pytest.raises(RescoringError, match="at most 128"):
        scorer.score(["the cat"], "cat " * 200)
    answer = answer_of([Hypothesis(("a",), -1.0, -1.0)], Settings(), scorer, "cat " * 200)
    assert not answer.rescored
    assert "shorter context" in str(answer.problem)


def test_little_memory_means_smaller_batches_then_an_error(
    opt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = CausalLM(opt, "cpu")
    expected = scorer.score(SENTENCES)
    true, least = CausalLM._score_trees, 100

    def limited(self: CausalLM, sequences):  # type: ignore[no-untyped-def]
        if self.tokens_per_batch > least:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(self, sequences)

    monkeypatch.setattr(CausalLM, "_score_trees", limited)
    np.testing.assert_allclose(scorer.score(SENTENCES), expected, atol=1e-4)
    assert scorer.tokens_per_batch == 64
    least = 0
    with pytest.raises(RescoringError, match="ran out of memory"):
        scorer.score(SENTENCES)


def test_quantised_numbers_are_asked_for_on_a_gpu_alone(
    opt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RescoringError, match="int4 needs a GPU"):
        CausalLM(opt, "cpu", dtype="int4")
    gpu = torch.device("cuda")
    monkeypatch.setattr(causal_lm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RescoringError, match="bitsandbytes: install"):
        causal_lm._numbers("int8", gpu)
    monkeypatch.setattr(causal_lm.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", dict)
    asked = causal_lm._numbers("int8", gpu)
    assert asked["device_map"] == {"": gpu}
    kind = asked["quantization_config"]
    assert (kind["load_in_8bit"], kind["load_in_4bit"]) == (True, False)
    assert causal_lm._numbers("bfloat16", gpu) == {"dtype": torch.bfloat16}


def test_weights_that_are_not_numbers_give_the_ngram_answer(copy: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.get_input_embeddings().weight[5:] = float("nan")
    model.save_pretrained(copy)
    answer = answer_of([Hypothesis(("cat",), -1.0, -1.0)], Settings(), CausalLM(copy, "cpu"))
    assert not answer.rescored
    assert "no finite score" in str(answer.problem)


def test_a_missing_model_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(RescoringError, match=r"hf download facebook/opt-6\.7b --local-dir"):
        load_scorer("facebook/opt-6.7b")
    with pytest.raises(RescoringError, match="prepare-llm"):
        load_scorer(tmp_path / "nowhere")
    with pytest.raises(RescoringError, match=r"no config\.json"):
        load_scorer(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 64),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "none_such"}'),
        lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | {"hidden_size": 64})
        ),
    ],
)
def test_a_damaged_folder_is_named(copy: Path, damage) -> None:  # type: ignore[no-untyped-def]
    damage(copy)
    with pytest.raises(RescoringError, match="cannot be loaded"):
        CausalLM(copy, "cpu")


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
def test_a_folder_without_its_tokenizer_is_refused(kind: str, tmp_path: Path) -> None:
    for path in (whole := make(tmp_path / "llm", kind)).glob("*token*"):
        path.unlink()
    with pytest.raises(RescoringError, match="tokenizer"):
        CausalLM(whole, "cpu")


@pytest.mark.parametrize("alike", ["letters", "apostrophes", "order"])
def test_a_tokenizer_that_gives_different_sentences_the_same_tokens_is_refused(
    copy: Path, alike: str
) -> None:
    file = copy / "tokenizer.json"
    one = Tokenizer.from_file(str(file))
    pattern, instead = {
        "letters": ("[q-z]", "q"),
        "apostrophes": ("'", ""),
        "order": ("dog bit|bit dog", "dog bit"),
    }[alike]
    one.normalizer = normalizers.Replace(Regex(pattern), instead)
    one.save(str(file))
    with pytest.raises(RescoringError, match=r"the same tokens; needed the tokenizer of this"):
        CausalLM(copy, "cpu")


def test_a_tokenizer_of_a_larger_model_is_refused(copy: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(copy)
    config.vocab_size = 200
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(copy)
    with pytest.raises(RescoringError, match=r"has 292 tokens, its model 200: they are of diff"):
        CausalLM(copy, "cpu")


def test_missing_weights_are_an_error_not_random_numbers(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.decoder.layers.0.fc1.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(RescoringError, match="lacks 1 of its weights"):
        CausalLM(copy, "cpu")


def test_a_pickle_is_not_unpickled(copy: Path, tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "executed",))

    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(RescoringError, match="cannot be loaded"):
        CausalLM(copy, "cpu")
    torch.save({"model": Evil()}, copy / "pytorch_model.bin")
    with pytest.raises(RescoringError, match="cannot be loaded"):
        CausalLM(copy, "cpu")
    assert not (tmp_path / "executed").exists()


def test_a_folder_of_published_form_without_safetensors_loads(copy: Path) -> None:
    expected = CausalLM(copy, "cpu").score(SENTENCES)
    model = transformers.AutoModelForCausalLM.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    np.testing.assert_allclose(CausalLM(copy, "cpu").score(SENTENCES), expected, atol=1e-5)


def test_half_precision_is_near(opt: Path) -> None:
    whole = CausalLM(opt, "cpu").score(SENTENCES)
    half = CausalLM(opt, "cpu", dtype="bfloat16")
    assert half.trees
    np.testing.assert_allclose(half.score(SENTENCES), whole, rtol=0.03)


def test_the_command_line_names_the_model(opt: Path) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_llm_options(parser)
    assert llm_from_options(parser.parse_args([])) is None
    assert parser.parse_args(["--llm"]).llm == "facebook/opt-6.7b"
    scorer = llm_from_options(parser.parse_args(["--llm", str(opt), "--llm-device", "cpu"]))
    assert scorer is not None
    assert scorer.name == opt.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="claims what happens without a GPU")
def test_a_gpu_that_is_not_there_is_an_error(opt: Path) -> None:
    with pytest.raises(RescoringError, match="no GPU"):
        load_scorer(opt, "cuda")


def test_decode_rescores_a_file_and_resumes_with_the_same_model_only(
    opt: Path,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = [say(one.split(), strength=3.0) for one in ("the cat sat", "the dog ran")]
    file, out = tmp_path / "logits.npz", tmp_path / "out.jsonl"
    np.savez(
        file,
        logits=to_rnn_order(np.concatenate(logits)),
        frames=[len(one) for one in logits],
        trial=["a", "b"],
    )
    command = ["decode", "--lm", str(model_folder), "--logits", str(file), "--out", str(out)]
    command += ["--workers", "1", "--llm-device", "cpu", "--alpha", "0.75", "--nbest", "5"]
    assert main([*command, "--llm", str(opt)]) == 0
    for line in map(json.loads, out.read_text().splitlines()):
        assert line["rescored"]
        assert len(line["nbest"]) > 1
        for one in line["nbest"]:
            assert one["llm"] == pytest.approx(naive(opt, one["sentence"]), abs=1e-3)
            language = 0.25 * one["ngram"] + 0.75 * one["llm"]
            assert one["total"] == pytest.approx(
                Settings().acoustic_scale * one["acoustic"] + language, abs=1e-6
            )
    assert main([*command, "--llm", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err

    whole, search = out.read_text(), offline.decode_trial

    def interrupted_at_the_second(*arguments: Any) -> offline.Outcome:
        if arguments[1] == "b":
            raise KeyboardInterrupt
        return search(*arguments)

    monkeypatch.setattr(offline, "_AHEAD", 0)  # each is rescored before the next is searched
    monkeypatch.setattr(offline, "decode_trial", interrupted_at_the_second)
    assert main([*command, "--llm", str(opt)]) == 130
    monkeypatch.setattr(offline, "decode_trial", search)
    assert main(command) == 2
    assert "1 answers of an interrupted run with another --llm" in capsys.readouterr().err
    assert main([*command, "--llm", str(opt)]) == 0
    assert "resuming: 1 of 2 trials" in capsys.readouterr().err
    found, before = (
        [json.loads(line) for line in text.splitlines()] for text in (out.read_text(), whole)
    )
    assert [one["sentence"] for one in found] == [one["sentence"] for one in before]
    assert [one["rescored"] for one in found] == [True, True]


def test_packed_weights_score_alike_and_are_what_decoding_uses(folder: Path) -> None:
    plain, packed = CausalLM(folder, "cpu"), load_scorer(folder, "cpu")
    kinds = {type(one).__name__ for one in packed.network.modules()}
    assert "_Packed" in kinds, "this PyTorch cannot pack: how it is asked must have changed"
    assert not any(type(one) is torch.nn.Linear for one in packed.network.modules())
    assert packed.trees
    for context in ("", CONTEXT):
        np.testing.assert_allclose(
            packed.score(SENTENCES, context), plain.score(SENTENCES, context), atol=1e-4
        )
    assert not CausalLM(folder, "cpu", dtype="bfloat16").pack(), "only float32 is packed"


@pytest.mark.parametrize("fault", ["wrong", "missing"])
def test_a_network_that_packing_would_change_stays_as_it_was(
    folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        if fault == "missing":
            raise AttributeError("no such operation")
        return true(self, inputs) * 1.1

    true = packing._Packed.forward
    monkeypatch.setattr(packing._Packed, "forward", broken)
    scorer = CausalLM(folder, "cpu")
    expected = scorer.score(SENTENCES)
    assert not scorer.pack()
    assert not any(isinstance(one, packing._Packed) for one in scorer.network.modules())
    np.testing.assert_array_equal(scorer.score(SENTENCES), expected)
