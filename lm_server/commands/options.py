"""Options that several commands share: search, settings, hot words, the form of a model folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_server import settings
from lm_server.files.atomic_file import regular
from lm_server.process import default_workers
from lm_server.protocol import ProtocolError
from lm_server.rescoring.load import add_llm_options
from lm_server.search.hot_words import HotWord, HotWordError, parse_hot_words
from lm_server.search.load import BACKENDS, default_settings, without_effect
from lm_server.settings import Settings, SettingsError

if TYPE_CHECKING:
    from lm_server.lm.trie.kenlm_binary import TrieForm
    from lm_server.rescoring.causal_lm import CausalLM
    from lm_server.search.interface import SearchModel

_OF_RESCORING = ("llm_device", "llm_dtype", "llm_text")


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Add --lm."""
    parser.add_argument("--lm", type=Path, required=True, metavar="DIR", help="model folder")


def add_truth_options(parser: argparse.ArgumentParser) -> None:
    """Add --logits and --refs."""
    parser.add_argument(
        "--logits",
        type=Path,
        required=True,
        metavar="FILE",
        help=".npz of `b2txt infer --split val`",
    )
    parser.add_argument(
        "--refs",
        type=Path,
        default=None,
        metavar="FILE",
        help="true sentences: lines trial<TAB>sentence, JSON lines or CSV with trial and sentence "
        "(default: those in the logits file)",
    )


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """Add --workers."""
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="processes (default: all cores)"
    )


def add_search_options(parser: argparse.ArgumentParser, hot_words: bool = True) -> None:
    """Add --backend, --hot-words, and the options of rescoring and of every setting."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help=f"which search (default {BACKENDS[0]}; see docs/search.md)",
    )
    if hot_words:
        parser.add_argument(
            "--hot-words",
            type=Path,
            metavar="FILE",
            help='words to favour, such as names, as JSON: {"WORD": WEIGHT} or {"WORD": {"weight": '
            'W, "pronunciations": [["K", "AE", "T"]]}}; weights are added to a sentence\'s total '
            "(ln)",
        )
    add_llm_options(parser)
    settings.add_options(parser)


def add_fuse_option(parser: argparse.ArgumentParser) -> None:
    """Add --fuse."""
    parser.add_argument(
        "--fuse",
        action="store_true",
        help="ask the model of --llm during the search too, so that the list holds what it prefers "
        "(docs/rescoring.md)",
    )


@contextlib.contextmanager
def fused(
    args: argparse.Namespace, model: SearchModel, scorer: CausalLM | None, aside: bool = False
) -> Iterator[SearchModel]:
    """Yield a model whose searches ask the scorer with --fuse, else the model itself.

    Args:
      args: with --fuse and --llm.
      model: the model folder.
      scorer: the model of --llm.
      aside: ask in a thread beside the searches.

    Raises:
      BackendError: the search cannot ask.
      RescoringError: the scorer cannot be asked.
    """
    if not args.fuse or scorer is None:
        yield model
        return
    from lm_server.rescoring.growing import growing
    from lm_server.search.fused import FusedModel

    with contextlib.closing(FusedModel(model, lambda: growing(scorer), aside)) as found:
        yield found


def add_build_options(parser: argparse.ArgumentParser, held_out: str) -> None:
    """Add the options of the form of a model folder, of what measures it, and --out."""
    parser.add_argument(
        "--quantise", type=int, metavar="BITS", help="bits of each probability (2-25; 8 is usual)"
    )
    parser.add_argument(
        "--compress", action="store_true", help="compress pointers: smaller, a little slower"
    )
    add_held_out_option(parser, held_out)
    add_out_option(parser)


def add_held_out_option(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Add --held-out, text."""
    parser.add_argument(
        "--held-out", type=Path, nargs="+", default=(), metavar="PATH", help=meaning
    )


def add_out_option(parser: argparse.ArgumentParser) -> None:
    """Add --out, a model folder."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="model folder to write or replace"
    )


def trie_form(args: argparse.Namespace) -> TrieForm:
    """Return the form that --quantise and --compress name.

    Raises:
      ModelError: it is impossible.
    """
    from lm_server.lm.arpa import ModelError
    from lm_server.lm.trie.kenlm_binary import TrieForm

    try:
        return TrieForm(args.quantise, args.compress)
    except ValueError as error:
        raise ModelError(str(error)) from error


def workers_from(args: argparse.Namespace) -> int:
    """Return the number of processes of --workers.

    Raises:
      SettingsError: it is below 1.
    """
    workers: int = default_workers() if args.workers is None else args.workers
    if workers < 1:
        raise SettingsError(f"--workers is {workers}; needed at least 1")
    return workers


def settings_from(args: argparse.Namespace) -> Settings:
    """Return the settings: the search's defaults, the file's values, the preset, the options.

    Every option that changes nothing is named on a line of the error output.

    Raises:
      SettingsError: a value is outside its range, or the file cannot be used.
    """
    fuse: bool = getattr(args, "fuse", False)
    if fuse and args.llm is None:
        raise SettingsError("--fuse needs a large language model to ask: add --llm DIR")
    base = default_settings(args.backend)
    if args.settings is not None:
        base = settings.read_settings(args.settings, base, args.backend)
    if args.preset is not None and without_effect(settings.PRESET, args.backend) is None:
        base = settings.changed(base, settings.preset(args.preset))
    given = {
        name: getattr(args, name) for name in settings.NAMES if getattr(args, name) is not None
    }
    chosen = dataclasses.replace(base, **given)
    of_rescoring = (*settings.names_of("rescoring"), *_OF_RESCORING)
    # "auto" is the default of the options of rescoring that are no settings.
    given |= {name: value for name in _OF_RESCORING if (value := getattr(args, name)) != "auto"}
    for name in (*given, *([settings.PRESET] if args.preset is not None else [])):
        reason = without_effect(name, args.backend)
        if reason is None and name in of_rescoring and args.llm is None:
            reason = f"{name} has no effect without --llm: no large language model rescores"
        if reason is None and name in settings.names_of("fusion") and not fuse:
            reason = f"{name} has no effect without --fuse: the search asks no large language model"
        if reason is not None:
            print(f"warning: --{name.replace('_', '-')} is given, but {reason}", file=sys.stderr)
    return chosen


def warn_of_no_question(args: argparse.Namespace, chosen: Settings) -> None:
    """Name the settings with which --fuse changes nothing.

    `tune` writes a fuse_weight of 0 where asking is expected to bring nothing.
    """
    for name in ("fuse_weight", "alpha", "do_opt") if args.fuse else ():
        if not getattr(chosen, name):
            print(
                f"warning: --fuse is given, but {name} is 0, with which no search asks the large "
                "language model",
                file=sys.stderr,
            )


def warn_of_another_checkpoint(args: argparse.Namespace, *made_by: Mapping[str, Any]) -> None:
    """Name the steps where --settings was tuned for none of the checkpoints of the logits."""
    if args.settings is None or not all(made_by):
        return
    tuned = settings.tuned_for(args.settings)
    if all(tuned.get("parameters") != one.get("parameters") for one in made_by):
        of = f"step {tuned['step']} ({tuned.get('weights')})" if "step" in tuned else "no step"
        print(
            f"warning: {args.settings} was tuned for {of}, and the logits are of step "
            f"{made_by[0].get('step')} ({made_by[0].get('weights')}): errors may be more for that "
            "reason alone. Tune again",
            file=sys.stderr,
        )


def add_ceiling_option(parser: argparse._ActionsContainer) -> None:
    """Add --ceiling."""
    parser.add_argument(
        "--ceiling",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="the greatest value of a setting that clients may choose, such as max_active=1000; "
        "may be given for several settings (default: the setting's range)",
    )


def ceilings_from(args: argparse.Namespace, chosen: Settings) -> dict[str, float]:
    """Return the ceilings of --ceiling.

    Raises:
      SettingsError: one cannot be read, is outside the setting's range, or below what is chosen.
    """
    found = {}
    for given in args.ceiling:
        name, _, value = given.partition("=")
        name = name.replace("-", "_")
        try:
            least, greatest = settings.LIMITS[name]
            found[name] = float(value)
        except (KeyError, ValueError) as error:
            raise SettingsError(
                f"--ceiling is {given!r}; needed SETTING=VALUE with one of "
                f"{', '.join(settings.NAMES)} and a number"
            ) from error
        least = max(least, getattr(chosen, name))
        if not least <= found[name] <= greatest:
            raise SettingsError(
                f"--ceiling is {given!r}; needed a number from {least:g} (which is in use without "
                f"a client's choice) to {greatest:g}"
            )
    return found


def hot_words_from(args: argparse.Namespace) -> dict[str, HotWord]:
    """Return the hot words of --hot-words, none without it. The search checks them.

    Raises:
      HotWordError: the file cannot be read or parsed.
    """
    if args.hot_words is None:
        return {}
    try:
        return parse_hot_words(regular(args.hot_words).read_bytes())
    except (OSError, ProtocolError) as error:
        raise HotWordError(f"--hot-words {args.hot_words}: {error}") from error
