"""Decodes live as a node of BRAND: features from a stream of the graph, logits and words into it.

Parameters of the node, from the graph's YAML (docs/realtime.md has an example): workdir (a trained
run), input_stream, input_field, input_dtype, n_features, bin_ms (20 or 10), mark_stream, sentences
(message or silence), silence, day, chunk_frames, lm (a model folder, of which a server is started;
without it the node `lm` of the graph is used), output_stream (logits), text_stream, record (a
folder), log. When a new supergraph has other parameters the node starts anew with them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import queue
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from b2txt_jax.evaluation.command import language_model
from b2txt_jax.evaluation.decoder_settings import settings_in_use
from b2txt_jax.inference.run import load_run
from b2txt_jax.live.events import Output
from b2txt_jax.live.intake import Intake
from b2txt_jax.live.model import LiveModel
from b2txt_jax.live.outputs.brand import BrandOutput
from b2txt_jax.live.outputs.log import SentenceLog
from b2txt_jax.live.session import RULES, Command, LiveSession, Stop, stopped_by_signals
from b2txt_jax.live.sources.brand import BrandInput, BrandStream
from b2txt_jax.live.sources.interface import Event, SourceError
from b2txt_jax.live.statistics import first_statistics, keep_statistics, statistics_file
from b2txt_jax.live.words import Words
from lm_server.client import brand
from lm_server.client.connection import LOST

_LOOK_SECONDS = 1.0
"""Between two looks for other parameters."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parameters:
    """What a graph's YAML says of the node."""

    workdir: str
    input_stream: str
    input_field: str = "samples"
    input_dtype: str = "float32"
    n_features: int = 512
    bin_ms: int = 20
    mark_stream: str | None = None
    sentences: str = "message"
    silence: float = 1.5
    day: str | None = None
    chunk_frames: int = 1
    lm: str | None = None
    output_stream: str = ""
    text_stream: str = ""
    record: str | None = None
    log: str = "INFO"


def parameters_of(found: Mapping[str, Any], nickname: str) -> Parameters:
    """Return the checked parameters.

    Raises:
      BrandError: one is missing, unknown or of another type.
    """
    known = {one.name: one for one in fields(Parameters)}
    wrong = [f"unknown: {name}" for name in sorted(set(found) - set(known))]
    wrong += [f"missing: {name}" for name in sorted({"workdir", "input_stream"} - set(found))]
    if wrong:
        raise brand.BrandError(
            f"the parameters of {nickname!r} do not fit ({', '.join(wrong)}); needed workdir and "
            f"input_stream, and where wanted others of {', '.join(known)}"
        )
    names = {"output_stream": f"{nickname}_logits", "text_stream": f"{nickname}_text"}
    chosen = Parameters(**{**names, **found})
    for name, kind in (("n_features", int), ("bin_ms", int), ("chunk_frames", int)):
        value = getattr(chosen, name)
        if not isinstance(value, kind) or isinstance(value, bool) or value < 1:
            raise brand.BrandError(f"parameter {name} is {value!r}; needed a whole number above 0")
    if chosen.sentences not in RULES[:2]:
        raise brand.BrandError(
            f"parameter sentences is {chosen.sentences!r}; needed {' or '.join(RULES[:2])}"
        )
    if chosen.sentences == "message" and chosen.mark_stream is None:
        raise brand.BrandError(
            "sentences begin and end by message, and parameter mark_stream is not there; needed a "
            "stream with a field mark (begin, end), or sentences: silence"
        )
    return chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that BRAND's supervisor gives to every node."""
    brand.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `b2txt brand-node` until SIGINT."""
    node = brand.Node.from_arguments(args)
    with node.running():
        found: dict[str, Any] | None = node.first_parameters()
        while found is not None:
            found = _decode(node, parameters_of(found, node.nickname))
    return 0


class _Watched:
    """A source that stops the session when the graph has other parameters for the node."""

    def __init__(
        self,
        source: BrandStream,
        node: brand.Node,
        now: Parameters,
        commands: queue.SimpleQueue[Command],
    ) -> None:
        self._source, self._node, self._now, self._commands = source, node, now, commands
        self._looked = time.monotonic()
        self.changed: dict[str, Any] | None = None

    def read(self, timeout: float) -> list[Event] | None:
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            # Where Redis has gone, the source waits for it.
            with contextlib.suppress(*LOST):
                self._look()
        return self._source.read(timeout)

    def _look(self) -> None:
        """Stop the session for other parameters. Those that do not fit are named, and it goes on
        with its own."""
        try:
            found = self._node.parameters()
            if found is not None and parameters_of(found, self._node.nickname) != self._now:
                self.changed = found
                self._commands.put(Stop())
        except brand.BrandError as error:
            _log.warning("%s", error)
            self._node.state("NODE_WARNING", message=str(error))

    def close(self) -> None:
        self._source.close()


def _decode(node: brand.Node, chosen: Parameters) -> dict[str, Any] | None:
    """Decode until SIGINT. Return other parameters where the graph has them."""
    trained = load_run(Path(chosen.workdir))
    day = chosen.day or trained.sessions[-1]
    features = trained.width(day)
    if features != chosen.n_features:
        raise SourceError(
            f"n_features is {chosen.n_features}, the run {chosen.workdir} was trained with "
            f"{features} of {day}; needed the same"
        )
    where = BrandInput(
        chosen.input_stream,
        chosen.input_field,
        chosen.input_dtype,
        chosen.n_features,
        chosen.bin_ms,
        chosen.mark_stream,
    )
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    with ExitStack() as stack:
        source = BrandStream(node, where)
        stack.callback(source.close)
        model = LiveModel(trained, day, chosen.chunk_frames)
        lm = Path(chosen.lm) if chosen.lm else None
        options = settings_in_use(trained, lm, []).options([])
        server = functools.partial(language_model, None if lm else node.url, lm, options=options)
        words = stack.enter_context(Words(server, _log.warning))
        streams = chosen.output_stream, chosen.text_stream
        outputs: list[Output] = [BrandOutput(node, *streams, origin=lambda: source.origin)]
        if chosen.record:
            outputs.append(SentenceLog(Path(chosen.record)))
            stack.callback(outputs[-1].close)
        model.warm_up()
        watched = _Watched(source, node, chosen, commands)
        statistics = statistics_file(trained, Path(chosen.workdir), day)
        intake = Intake(features, trained.config.signal, first_statistics(trained, statistics, day))
        session = LiveSession(
            watched,
            intake,
            model,
            words,
            outputs,
            "silence" if chosen.sentences == "silence" else "message",
            chosen.silence,
            commands,
        )
        node.state("NODE_READY")
        with stopped_by_signals(commands):
            session.run()
        keep_statistics(trained, statistics, intake.statistics)
    return watched.changed
