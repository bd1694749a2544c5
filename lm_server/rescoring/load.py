"""The command-line options of a large language model, and its loading.

Neither torch nor transformers is imported before a model is loaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lm_server.rescoring.scorer import DEFAULT_MODEL, find_model

if TYPE_CHECKING:
    from lm_server.rescoring.causal_lm import CausalLM

_TEXT_FORMS = ("auto", "plain", "sentence")
_DEVICES = ("auto", "cpu", "cuda")
_DTYPES = ("auto", "float32", "float16", "bfloat16", "int8", "int4")


def add_llm_options(
    parser: argparse.ArgumentParser, purpose: str = "rescore with", scores: bool = True
) -> None:
    """Add --llm and the options for how to run it. `scores`: with the text form of scoring."""
    parser.add_argument(
        "--llm",
        nargs="?",
        const=DEFAULT_MODEL,
        default=None,
        metavar="DIR",
        help=f"{purpose} the causal language model in this folder (transformers format), or one "
        f"of the Hugging Face cache by its name (without a value {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--llm-device", choices=_DEVICES, default="auto", help="where it runs (default: GPU if any)"
    )
    parser.add_argument(
        "--llm-dtype",
        choices=_DTYPES,
        default="auto",
        help="its numbers (default: float16 on a GPU, float32 on a CPU; bfloat16 is faster on CPUs "
        "made for it, and coarser; int8 and int4 quantise the weights while loading, on a GPU)",
    )
    if not scores:
        return
    parser.add_argument(
        "--llm-text",
        choices=_TEXT_FORMS,
        default="auto",
        help="what it reads: plain: the words as they are, as published for OPT; sentence: "
        "capitalised and with a full stop (default: as its folder states, else plain)",
    )


def llm_from_options(args: argparse.Namespace) -> CausalLM | None:
    """Load the scorer that the options of `add_llm_options` name. None without --llm.

    Raises:
      RescoringError: the model cannot be loaded.
    """
    if args.llm is None:
        return None
    return load_scorer(args.llm, args.llm_device, args.llm_text, args.llm_dtype)


def load_scorer(
    folder: Path | str, device: str = "auto", text_form: str = "auto", dtype: str = "auto"
) -> CausalLM:
    """Load a causal language model, which lasts seconds to minutes.

    Args:
      folder: a folder in the format of transformers, or the name (owner/model) of one in the
        Hugging Face cache. Nothing is downloaded.
      device: auto (a GPU if there is one), cpu or cuda.
      text_form: auto (as the folder states, else plain), plain or sentence.
      dtype: auto (float16 on a GPU, float32 on a CPU), float32, float16, bfloat16, or, on a GPU
        with the extra `quantised`, int8 or int4.

    Raises:
      RescoringError: there is no such model or it cannot be used. Says how to get one.
      ModuleNotFoundError: the extra `llm` is not installed.
    """
    path = find_model(folder)  # before torch, which takes seconds to import
    from lm_server.rescoring.causal_lm import CausalLM

    model = CausalLM(path, device, text_form, dtype)
    model.pack()
    return model
