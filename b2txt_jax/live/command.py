"""Bins in, words out: decode a recording under way, or replay a recorded session.

A language model server with a Redis of its own is started for this call with --lm DIR, or one that
runs is used with --redis URL. A sentence begins and ends by messages of the source, by silence, or
by a key (Enter, and q with Enter ends the session). Ctrl-C ends the sentence in progress and the
session.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import queue
import shlex
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from b2txt_jax.calibration.calibrate import separated
from b2txt_jax.calibration.follow import Follower, FollowSettings, Kept, adapted_folder
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.trial import SPLITS, TrialRef
from b2txt_jax.errors import UserError
from b2txt_jax.evaluation.command import language_model
from b2txt_jax.evaluation.decoder_settings import settings_in_use
from b2txt_jax.inference.run import CHANGEABLE, Run, add_weights_argument, load_run
from b2txt_jax.live.events import Final, Happening, Output, Problem
from b2txt_jax.live.following import Following
from b2txt_jax.live.intake import Intake
from b2txt_jax.live.model import LiveModel
from b2txt_jax.live.outputs.log import SentenceLog
from b2txt_jax.live.outputs.lsl import LslOutlet
from b2txt_jax.live.outputs.page import Page
from b2txt_jax.live.outputs.publish import Publisher
from b2txt_jax.live.outputs.speech import DEFAULT_PROGRAM, Speech
from b2txt_jax.live.outputs.terminal import Terminal
from b2txt_jax.live.session import (
    RULES,
    Command,
    LiveSession,
    Stop,
    Toggle,
    stopped_by_signals,
)
from b2txt_jax.live.sources.choice import open_source
from b2txt_jax.live.sources.interface import Source
from b2txt_jax.live.sources.replay import Replay
from b2txt_jax.live.statistics import (
    STATISTICS_FILE,
    first_statistics,
    keep_statistics,
    replay_statistics,
    statistics_file,
)
from b2txt_jax.live.words import Words
from b2txt_jax.metrics import total, word_error_rates
from b2txt_jax.signal.rolling import Statistics
from lm_server.files.atomic_file import replacing, require_writable

LOG_FOLDER = "live"
VIEW_PORT = 8765


_OF: dict[str, dict[str, Any]] = {
    "replay": {"split": "val", "speed": "1", "limit": None},
    "adapt": {"adapt_confidence": FollowSettings.confidence, "adapt_bound": FollowSettings.bound},
    "view": {"view_host": "127.0.0.1", "view_token": None},
    "sentences": {"silence": 1.5},
}
"""Options, each with its default, that do something beside another one alone."""


class StreamError(UserError, ValueError):
    """Options of `b2txt stream` that cannot be used."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt stream`."""
    parser.add_argument("--workdir", required=True, type=Path, help="folder of a trained run")
    add_weights_argument(parser)
    parser.add_argument("--lm", type=Path, metavar="DIR", help="model folder of `lm-server build`")
    parser.add_argument("--redis", metavar="URL", help="Redis where an lm-server listens already")
    parser.add_argument(
        "--llm", metavar="DIR", help="with --lm: rescore final sentences with this language model"
    )
    source = parser.add_argument_group("source").add_mutually_exclusive_group()
    source.add_argument("--replay", metavar="SESSION", help="of the run's data, as if it were now")
    source.add_argument(
        "--source",
        metavar="URL",
        help="stream of features: redis://HOST:PORT/0/NAME, or lsl://NAME",
    )
    replay = parser.add_argument_group("replay")
    replay.add_argument("--split", choices=SPLITS, help="(default val)")
    replay.add_argument("--speed", help="1: as recorded (default); 4: four times faster; max")
    replay.add_argument("--limit", type=int, metavar="N", help="sentences (default: all)")
    sentences = parser.add_argument_group("sentences")
    sentences.add_argument(
        "--sentences",
        choices=RULES,
        default=RULES[0],
        help="what begins and ends one: messages of the source (default), silence, or a key",
    )
    sentences.add_argument("--silence", type=float, help="seconds of it that end one (default 1.5)")
    model = parser.add_argument_group("model")
    model.add_argument("--day", help="whose input layer is used (default: --replay's, or the last)")
    model.add_argument(
        "--chunk-frames", type=int, default=1, help="frames of 80 ms a call (default 1)"
    )
    model.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="with signal.rolling_seconds: read at the start and written at the end (default "
        f"WORKDIR/{STATISTICS_FILE}, with several participants statistics.DAY.npz; where it is not "
        "there, those of the last recorded session. A replay has no default, and without FILE "
        "those that its first trial was recorded with)",
    )
    following = parser.add_argument_group("self-calibration (docs/calibration.md)")
    following.add_argument(
        "--adapt",
        nargs="?",
        const="auto",
        choices=("auto", "day", "patch"),
        help="learn from certain and chosen sentences: move the day's layer or the patch "
        "embedding between sentences (default off; auto: day where the model can have such layers)",
    )
    following.add_argument(
        "--adapt-confidence",
        type=float,
        help=f"of a sentence that is certain, 0 to 1 (default {FollowSettings.confidence:g}); "
        "above 1: only chosen ones count",
    )
    following.add_argument(
        "--adapt-bound",
        type=float,
        help="largest change against the trained values, as a share of their norm (default "
        f"{FollowSettings.bound:g})",
    )
    following.add_argument(
        "--undo",
        nargs="?",
        const="1",
        metavar="N",
        help="take back the last N updates (default 1), or all, and end",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--view",
        nargs="?",
        const=VIEW_PORT,
        type=int,
        metavar="PORT",
        help=f"serve a page for a browser (default port {VIEW_PORT})",
    )
    output.add_argument("--view-host", help="(default 127.0.0.1)")
    output.add_argument("--view-token", help="that browsers need; required on another --view-host")
    record = output.add_mutually_exclusive_group()
    record.add_argument(
        "--record",
        type=Path,
        metavar="DIR",
        help=f"write sentences, choices and features there (default WORKDIR/{LOG_FOLDER})",
    )
    record.add_argument("--no-record", action="store_true", help="write none of them")
    output.add_argument(
        "--publish",
        metavar="URL",
        help="where final sentences are sent: redis://HOST:PORT/0/NAME, or lsl://NAME",
    )
    output.add_argument(
        "--speak",
        nargs="?",
        const=DEFAULT_PROGRAM,
        metavar="PROGRAM",
        help=f"read final sentences aloud (default {DEFAULT_PROGRAM})",
    )
    output.add_argument("--summary", type=Path, metavar="FILE", help="JSON with latency and health")
    keys = ", ".join(f"--config.{key}" for key in sorted(CHANGEABLE))
    parser.epilog = f"Keys of the run's configuration that can be changed: {keys} (=value)."


def run(args: argparse.Namespace) -> int:
    """Run `b2txt stream`."""
    console = Console()
    if args.undo is not None:
        return _undo(args, console)
    speed = _checked(args)
    trained = load_run(args.workdir, args.overrides, args.weights)
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    scores = _Scores()
    with ExitStack() as stack:
        # Settings and what was learned belong to the run as it was trained.
        decoding = _separated(args, trained)
        model = LiveModel(decoding, _day(args, trained), args.chunk_frames)
        kept = args.statistics or statistics_file(trained, args.workdir, model.day)
        source, statistics = _source(args, trained, model.day, kept, speed, stack)
        outputs = _outputs(args, console, commands, stack)
        following = _following(args, trained, decoding, model, math.isfinite(speed), stack)
        options = ["--llm", args.llm] if args.llm else []
        options = settings_in_use(trained, args.lm, options).options(options)
        server = functools.partial(language_model, args.redis, args.lm, options=options)
        words = stack.enter_context(Words(server, lambda text: outputs[-1].show(Problem(text))))
        model.warm_up()
        for one in outputs:
            if isinstance(one, Page):
                console.print(f"the page is at {one.url}", soft_wrap=True)
        if not args.no_record:
            console.print(f"recorded in {_log_folder(args)}", soft_wrap=True)
        console.print(
            f"decoding with {model.day} and {words.name}; the model looks ahead "
            f"{1000 * model.lookahead_seconds:.0f} ms, a call takes "
            f"{1000 * model.chunk_seconds:.0f} ms of bins",
            soft_wrap=True,
        )
        intake = Intake(statistics.first.size, trained.config.signal, statistics)
        session = LiveSession(
            source,
            intake,
            model,
            words,
            [*outputs, scores, *([following] if following else [])],
            args.sentences,
            args.silence,
            commands,
        )
        if args.sentences == "key" or sys.stdin.isatty():
            threading.Thread(target=_keys, args=(commands,), name="keys", daemon=True).start()
        with stopped_by_signals(commands):
            session.run()
        if following is not None:
            following.close()
            if following.failed is not None:
                console.print(f"warning: an update failed: {following.failed}", soft_wrap=True)
            console.print(
                f"self-calibration: {following.kept} updates kept of {following.seen} sentences "
                f"used; `b2txt stream --workdir {shlex.quote(str(args.workdir))} --day {model.day} "
                "--undo` takes the last one back",
                soft_wrap=True,
            )
        if args.source is not None or args.statistics is not None:
            keep_statistics(trained, kept, intake.statistics)
    _report(args, console, session, intake, scores)
    return 0


def _checked(args: argparse.Namespace) -> float:
    """Return the speed of a replay.

    Raises:
      StreamError: an option is out of range, or does not go with another.
    """
    for needed, options in _OF.items():
        there = args.sentences == "silence" if needed == "sentences" else getattr(args, needed)
        for name, default in options.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif there is None or there is False:
                beside = "sentences silence" if needed == "sentences" else needed
                raise StreamError(f"{_option(name)} does nothing without --{beside}; needed both")
    try:
        speed = math.inf if args.speed == "max" else float(args.speed)
    except ValueError:
        speed = 0.0
    if not speed > 0:
        raise StreamError(f"--speed is {args.speed!r}; needed a number above 0, or max")
    for name, least in (("chunk_frames", 1), ("silence", 0.1), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise StreamError(f"{_option(name)} is {value:g}; needed at least {least:g}")
    if args.replay is None and args.source is None:
        raise StreamError("needed --replay SESSION, or --source URL")
    if args.adapt and not (args.adapt_confidence >= 0 and args.adapt_bound > 0):
        raise StreamError(
            f"--adapt-confidence is {args.adapt_confidence:g} and --adapt-bound is "
            f"{args.adapt_bound:g}; needed at least 0, and more than 0"
        )
    if (args.redis is None) == (args.lm is None):
        raise StreamError(
            "needed --lm DIR, of which a server is started, or --redis URL, where one listens "
            "already, and not both"
        )
    if args.llm and args.lm is None:
        raise StreamError("--llm is for a server that is started here; needed --lm DIR")
    for path, option in ((args.summary, "--summary"), (args.statistics, "--statistics")):
        if path is not None:
            require_writable(path, option)
    return speed


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _day(args: argparse.Namespace, trained: Run) -> str:
    """Return the recording day whose input layer is used."""
    replayed = args.replay if args.replay in trained.sessions else None
    return args.day or replayed or trained.sessions[-1]


def _separated(args: argparse.Namespace, trained: Run) -> Run:
    """Return the run with a layer of the day's own, if a layer is to follow and days share all."""
    if args.adapt is None:
        return trained
    return separated(trained, None if args.adapt == "auto" else args.adapt)


def _undo(args: argparse.Namespace, console: Console) -> int:
    """Take back what was learned while decoding."""
    if args.undo != "all" and not (args.undo.isdigit() and int(args.undo) > 0):
        raise StreamError(f"--undo is {args.undo!r}; needed a number of updates, or all")
    trained = load_run(args.workdir, args.overrides, args.weights)
    day = trained.sessions[trained.day_index(_day(args, trained))]
    kept = Kept(adapted_folder(args.workdir, day), trained)
    left = kept.undo(None if args.undo == "all" else int(args.undo))
    console.print(f"{day}: {left} updates are left", soft_wrap=True)
    return 0


def _following(
    args: argparse.Namespace,
    trained: Run,
    decoding: Run,
    model: LiveModel,
    background: bool,
    stack: ExitStack,
) -> Following | None:
    """Return the output that moves the model, if it is asked for."""
    if args.adapt is None:
        return None
    settings = FollowSettings(
        adapt=None if args.adapt == "auto" else args.adapt,
        confidence=args.adapt_confidence,
        bound=args.adapt_bound,
    )
    follower = Follower(decoding, trained.day_index(model.day), settings)
    kept = Kept(adapted_folder(args.workdir, model.day), trained)
    found = Following(model, follower, kept, settings.confidence, background)
    stack.callback(found.close)
    return found


def _log_folder(args: argparse.Namespace) -> Path:
    folder: Path = args.record or args.workdir / LOG_FOLDER
    return folder


def _source(
    args: argparse.Namespace, trained: Run, day: str, kept: Path, speed: float, stack: ExitStack
) -> tuple[Source, Statistics]:
    """Return the source, and the statistics that its first bin is normalised with."""
    data = trained.config.data
    if args.replay is None:
        source = open_source(args.source, trained.width(day))
        stack.callback(source.close)
        return source, first_statistics(trained, kept, day)
    reader = stack.enter_context(open_folder(data.root, data.feature_count))
    refs: list[TrialRef] = reader.trials(
        [args.replay], args.split, min_bins=trained.config.model.least_bins, labels_needed=False
    )[: args.limit]
    statistics = replay_statistics(trained, reader, refs[0], args.statistics)
    return Replay(reader, refs, speed), statistics


def _outputs(
    args: argparse.Namespace,
    console: Console,
    commands: queue.SimpleQueue[Command],
    stack: ExitStack,
) -> list[Output]:
    made: list[Output] = []

    def add(output: Output) -> None:
        made.append(output)
        stack.callback(output.close)

    if args.speak is not None:
        add(Speech(args.speak))
    if args.publish is not None:
        kind = LslOutlet if args.publish.startswith("lsl://") else Publisher
        add(kind(args.publish))
    if not args.no_record:
        add(SentenceLog(_log_folder(args)))
    if args.view is not None:
        add(
            Page(
                *(args.view_host, args.view, args.view_token),
                on_choice=commands.put,
                on_toggle=lambda: commands.put(Toggle()),
            )
        )
    add(Terminal(console))
    return made


def _keys(commands: queue.SimpleQueue[Command]) -> None:
    for line in sys.stdin:
        commands.put(Stop() if line.strip().lower() == "q" else Toggle())


class _Scores:
    """An output that keeps what was said and what was decoded, where it is known."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    def show(self, event: Happening) -> None:
        """Keep final sentences whose truth is known."""
        if isinstance(event, Final) and event.truth is not None:
            self.pairs.append((event.truth, event.answer.sentence))

    def close(self) -> None:
        """Do nothing."""


def _report(
    args: argparse.Namespace,
    console: Console,
    session: LiveSession,
    intake: Intake,
    scores: _Scores,
) -> None:
    """Print and write the figures of the session."""
    figures: dict[str, Any] = {"sentences": session.sentences, "bins": intake.health.bins}
    # All words of a sentence without an answer are errors, as in `b2txt evaluate`.
    pairs = [*scores.pairs, *((truth, "") for truth in session.unanswered)]
    if pairs:
        rates = word_error_rates([truth for truth, _ in pairs], [decoded for _, decoded in pairs])
        figures |= {"wer": total(rates).rate, "unanswered": len(session.unanswered)}
    figures |= session.latency.figures() | {"problems": intake.health.problems}
    shown = [f"{figures['sentences']} sentences"]
    if figures.get("unanswered"):
        shown.append(f"{figures['unanswered']} more without an answer")
    if figures.get("wer") is not None:
        shown.append(f"WER {100 * figures['wer']:.1f} %")
    if "partial_ms_p50" in figures:
        shown.append(
            f"bin to text p50 {figures['partial_ms_p50']} ms, p99 {figures['partial_ms_p99']} ms"
        )
        shown.append(f"{figures['deadline_misses']} of {figures['chunks']} chunks late")
        shown.append(f"{figures['revisions_per_word']} revisions per word")
    shown += [f"{count} {name}" for name, count in figures["problems"].items()]
    console.print("; ".join(shown), soft_wrap=True, highlight=False)
    if args.summary is not None:
        figures["made"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with replacing(args.summary) as path:
            path.write_text(json.dumps(figures, indent=1) + "\n")
