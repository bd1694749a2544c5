"""Adapt a large language model for rescoring to a person's sentences, or with --chats to correcting
n-best lists (LoRA).

Every tenth sentence or so is held out, by its words, so that it is in no other part. The epoch with
the least perplexity of these is written, merged, as a folder for --llm. Nothing is written if none
is better than the model was. After an interruption the same command goes on with the next epoch.
Needs the extra `finetune`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from shlex import quote

from lm_server.commands import options
from lm_server.commands.serve import Number, add_numbers, check_numbers
from lm_server.process import cleaning_up_when_terminated
from lm_server.rescoring.load import add_llm_options
from lm_server.rescoring.scorer import find_model
from lm_server.settings import SettingsError

_NUMBERS = (
    Number("--epochs", 3, 1, "times that every sentence or chat is learned from"),
    Number("--rank", 16, 1, "of the adapters", 1024),
    Number("--learning-rate", 2e-4, 1e-9, "greatest", 1.0),
    Number("--batch", 16, 1, "sentences or chats of one step"),
    Number("--held-out", 0.1, 0.001, "share of the sentences or replies that measure", 0.9),
    Number("--seed", 0, 0, "of the adapters' start and the order of sentences"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_llm_options(parser)
    material = parser.add_mutually_exclusive_group(required=True)
    material.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="the person's sentences: .txt, .gz or .xz files, or folders",
    )
    material.add_argument(
        "--chats",
        type=Path,
        metavar="FILE",
        help="JSON lines of `b2txt correction-data`: learn their replies, for `lm-server correct`",
    )
    add_numbers(parser, _NUMBERS)
    options.add_out_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write the adapted model."""
    if args.llm is None:
        raise SettingsError("there is no model to adapt: add --llm DIR")
    if args.llm_dtype in ("int8", "int4"):
        raise SettingsError(
            f"--llm-dtype {args.llm_dtype} has no weights that the adapted ones could be added to: "
            "take bfloat16, and load the result in fewer bits"
        )
    check_numbers(args, _NUMBERS)
    from lm_server.lexicon.text import find_texts
    from lm_server.rescoring.finetune import Course, finetune, read_chats, read_sentences
    from lm_server.tuning.cache import digest

    # Read first, so that a wrong file is reported as one.
    material = read_chats(args.chats) if args.chats else read_sentences(args.text)
    course = Course(
        args.epochs, args.rank, args.learning_rate, args.batch, args.held_out, args.seed
    )
    inputs = {
        "--llm": f"{digest(find_model(args.llm))} {args.llm_text} {args.llm_dtype}",
        "--text": " ".join(map(digest, find_texts(args.text or ()))),
        "--chats": digest(args.chats) if args.chats else "",
        **{f"--{name.replace('_', '-')}": str(value) for name, value in vars(course).items()},
    }
    with cleaning_up_when_terminated():
        of = (args.llm_device, args.llm_text, args.llm_dtype)
        finetune(args.llm, material, args.out, course, *of, inputs)
    command = "lm-server correct " if args.chats else ""
    print(f"{args.out} is ready: use it with {command}--llm {quote(str(args.out))}")
    return 0
