"""Find settings for a model's logits on sentences whose transcripts are known, and write a file
that `serve`, `worker` and `decode` (--settings) and `b2txt evaluate` read.

acoustic_scale, blank_penalty, silence_penalty, word_bonus, a class confusion, with --budget the
width of the search, with --llm alpha, with --fuse fuse_weight, and the temperature of the
confidences are tuned. Every other setting is as the options set it. Settings that are expected to
be worse than those of the options, or of a file that --out has already, are not written: the better
ones stay. Results are cached in a folder beside the file, so an interrupted tuning resumes. The
file names the checkpoint that made the logits. With --out WORKDIR/lm_settings/NAME.json,
`b2txt evaluate` finds the settings of its checkpoint there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import zlib
from pathlib import Path
from shlex import quote
from typing import Any

from lm_server.commands import options
from lm_server.files.atomic_file import require_writable
from lm_server.process import cleaning_up_when_terminated
from lm_server.rescoring.load import llm_from_options
from lm_server.rescoring.scorer import find_model
from lm_server.search.interface import SearchModel
from lm_server.search.load import load_model, without_effect
from lm_server.settings import (
    PRESET,
    Settings,
    SettingsError,
    expected_wer,
    read_settings,
    write_settings,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    options.add_model_option(parser)
    options.add_truth_options(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="settings file (JSON) to write"
    )
    parser.add_argument(
        "--searches", type=int, default=12, metavar="N", help="number of searches (default 12)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="of CPU per sentence: choose the widest search within, such as 0.25 (default: the "
        "preset's width)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where results are kept (default OUT.cache)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default 0)")
    options.add_workers_option(parser)
    options.add_search_options(parser, hot_words=False)
    options.add_fuse_option(parser)


def run(args: argparse.Namespace) -> int:
    """Tune."""
    from lm_server.files.logits_file import read_logits
    from lm_server.rescoring.scorer import SentenceScorer
    from lm_server.tuning.cache import digest
    from lm_server.tuning.references import read_references
    from lm_server.tuning.report import about, as_text, write_picture
    from lm_server.tuning.tuner import Tuner

    workers = options.workers_from(args)
    if args.searches < 1:
        raise SettingsError(f"--searches is {args.searches}; needed at least 1")
    if args.budget is not None and not args.budget > 0:
        raise SettingsError(f"--budget is {args.budget:g}; needed more than 0 seconds")
    if args.budget is not None and (reason := without_effect(PRESET, args.backend)):
        raise SettingsError(f"--budget has no widths to choose from: {reason}")
    base = options.settings_from(args)
    logits = read_logits(args.logits)
    references = read_references(args.refs or args.logits)
    picture = args.out.with_suffix(".png")
    cache = args.cache or args.out.with_name(args.out.name + ".cache")
    if picture == args.out:
        raise SettingsError(f"--out {args.out} is where the picture goes; needed a name as x.json")
    for path in (args.out, picture):
        require_writable(path, inputs=[args.lm, args.logits])
    require_writable(cache / "x", "--cache")
    in_use: dict[Settings, float] = {}
    # What is no settings file of this search yet is replaced.
    for path in (args.settings, args.out):
        with contextlib.suppress(SettingsError):
            if path is not None:
                there = read_settings(path, base, args.backend)
                in_use[there] = expected_wer(path, logits.digest())
    if args.llm is not None:
        # Before the searches: a wrong folder is reported at once.
        find_model(args.llm)

    llm = functools.cache(lambda: llm_from_options(args))

    def load() -> tuple[SentenceScorer, list[object]] | None:
        scorer = llm()
        if scorer is None:
            return None
        form = str([getattr(scorer, "text_form", ""), *getattr(scorer, "endings", ())])
        return scorer, [digest(find_model(args.llm)), form, args.llm_dtype, args.llm_device]

    with cleaning_up_when_terminated(), contextlib.ExitStack() as stack:
        model = load_model(args.lm, args.backend)
        tuner = Tuner(model, logits, references, cache, workers, args.seed)

        def fused() -> SearchModel:
            return stack.enter_context(options.fused(args, model, llm()))

        result = tuner.run(
            base, args.searches, load, in_use, args.budget, fused if args.fuse else None
        )
        facts: dict[str, Any] = {"lm": str(args.lm), "llm": args.llm, "logits": str(args.logits)}
        facts["backend"] = args.backend
        described = args.lm / "lm.json"
        facts["lm_crc32"] = zlib.crc32(described.read_bytes()) if described.is_file() else None
        facts["checkpoint"] = dict(logits.checkpoint)
        facts["logits_sha256"] = logits.digest()
        write_settings(args.out, result.settings, {**facts, **about(result)})
        write_picture(result, picture)
    print(as_text(result))
    print(f"written: {args.out}, {picture}; use them with --settings {quote(str(args.out))}")
    return 0
