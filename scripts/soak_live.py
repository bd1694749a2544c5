"""Does live decoding lose or double a sentence when its source, servers or bins misbehave?

    python scripts/soak_live.py --workdir runs/demo/run --lm runs/demo/lm_3gram [--hours 8]

Starts `b2txt stream` and feeds it the run's validation trials through a Redis, as fast as they are
decoded, for so many hours of stream. Meanwhile faults happen, in turns:

    dropped bins, doubled bins, late bins, dead array, NaN channels, narrow bins, source restarted,
    Redis restarted, server killed, no end mark, clock jump, parameters updated

"Killed" and "restarted" mean SIGKILL. The Redis of the source comes back empty. A clock jump is one
of the source's Redis: by an hour ahead in a sentence, and back after it, with the stream deleted.
Parameters are those of the language model, changed in a sentence. Each sentence has a name, by
which its answer is found in the stream that `--publish` writes, on another Redis. A sentence
without a fault must also have the words that it has when all is well.

Prints and writes (--out FILE) the faults, sentences lost, doubled and changed, and in the first and
the last tenth the memory of both processes, their processor time for each bin, and the wall time
from a sentence's first bin to its answer. Ctrl-C or SIGTERM ends it early, with a report. Exit code
1 if anything was lost, doubled or changed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import redis
from rich.console import Console
from rich.progress import Progress

from b2txt_jax import load_run
from b2txt_jax.data.reader import open_folder
from lm_server.serving.embedded_redis import embedded_redis, find_program

FAULTS = (
    *("dropped bins", "server killed", "doubled bins", "Redis restarted", "late bins"),
    *("dead array", "source restarted", "NaN channels", "narrow bins", "no end mark"),
    *("clock jump", "parameters updated"),
)
BIN_SECONDS = 0.02
_STREAM = "bins"
_KEPT_ENTRIES = 5_000
"""Of the source's stream: more than two sentences, of which the next is sent after an answer."""
_JUMP_MS = 3_600_000
_LOOK_EVERY = 20
"""Sentences between two looks at memory and processor time."""
_PATIENCE = 120.0


class SourceRedis:
    """A Redis that can be killed, and comes back empty on the same socket."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "source.sock"
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        self.path.unlink(missing_ok=True)
        options = ["--port", "0", "--unixsocket", str(self.path), "--save", ""]
        self.process = subprocess.Popen(
            [find_program(), *options, "--loglevel", "warning"], stdout=subprocess.DEVNULL
        )
        self.client: Any = redis.Redis(unix_socket_path=str(self.path), protocol=2)
        while True:
            try:
                self.client.ping()
                return
            except redis.ConnectionError:
                time.sleep(0.02)

    def restart(self) -> None:
        """Kill it and start an empty one."""
        self.process.kill()
        self.process.wait()
        self.start()


class Rig:
    """What sends bins, and misbehaves."""

    def __init__(self, source: SourceRedis, stream: subprocess.Popen[bytes]) -> None:
        self.source, self.stream, self.number = source, stream, 0
        self._updates = 0
        self._queued: list[tuple[dict[str, Any], str]] = []
        self._id = "*"

    def say(self, name: str, features: np.ndarray, fault: str | None, rng: random.Random) -> None:
        """Send a trial, with a fault in its middle."""
        x, middle = features.copy(), len(features) // 2
        if fault == "NaN channels":
            x[middle : middle + 50, ::7] = np.nan
        if fault == "dead array":
            quarter = x.shape[1] // 8
            x[middle:, :quarter] = x[middle, :quarter]
            x[middle:, 4 * quarter : 5 * quarter] = x[middle, 4 * quarter : 5 * quarter]
        self._add(mark="begin", name=name)
        for place in range(0, len(x), 4):
            rows, first = x[place : place + 4], self.number
            self.number += len(rows)
            if place // 4 == middle // 4:
                if fault == "dropped bins":
                    continue
                if fault == "doubled bins":
                    self._bins(rows, first)
                if fault == "late bins":
                    late = (rows, first)
                    continue
                if fault == "narrow bins":
                    rows = rows[:, :-1]
                if fault == "source restarted":
                    self.number = first = 0
                if fault == "Redis restarted":
                    self._send()
                    self._wait_until_read()
                    self.source.restart()
                if fault == "clock jump":
                    self._id = f"{round(1000 * time.time()) + _JUMP_MS}-0"
                if fault == "server killed":
                    self._send()
                    self._wait_until_read()
                    os.kill(self.server().pid, signal.SIGKILL)
                if fault == "parameters updated":
                    self._send()
                    self._wait_until_read()
                    self._update_parameters()
            self._bins(rows, first)
            if fault == "late bins" and place // 4 == middle // 4 + 2:
                self._bins(*late)
        if fault != "no end mark":
            self._add(mark="end")
        self._send()

    def answered(self, fault: str | None) -> None:
        """End a fault that outlasts its sentence."""
        if fault == "clock jump":
            self.source.client.delete(_STREAM)

    def server(self) -> psutil.Process:
        """Return the language model server."""
        for child in psutil.Process(self.stream.pid).children(recursive=True):
            if "lm_server" in child.cmdline():
                return child
        raise RuntimeError("the language model server does not run")

    def _wait_until_read(self) -> None:
        """Wait until the stream waits for more: a Redis that is killed takes what nobody has read,
        and without its beginning a sentence has no name."""
        deadline = time.monotonic() + _PATIENCE
        while not self.source.client.info("clients")["blocked_clients"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the stream has not read its bins in {_PATIENCE:g} s")
            time.sleep(0.005)

    def _update_parameters(self) -> None:
        """Ask for more hypotheses, which leaves the best one as it is."""
        self._updates += 1
        for child in self.server().children(recursive=True):
            # A Redis writes where it listens into its command line.
            found = re.search(r"unixsocket:(\S+)", " ".join(child.cmdline()))
            if found:
                with redis.Redis(unix_socket_path=found[1], protocol=2) as client:
                    self._ask_for_more(client)
                return
        raise RuntimeError("the language model server has no Redis of its own")

    def _ask_for_more(self, client: Any) -> None:
        # In the stream's own name: the server lets no other client change its session.
        ((_, newest),) = client.xrevrange("remote_lm_done_resetting", count=1)
        done = "remote_lm_done_updating_params"
        last = client.xrevrange(done, count=1)
        fields = {"nbest": 100 + self._updates, "client": newest[b"client"]}
        client.xadd("remote_lm_update_params", fields)
        seen = last[0][0] if last else "0-0"
        if not client.xread({done: seen}, block=round(1000 * _PATIENCE)):
            raise RuntimeError(f"the server did not accept {fields}")

    def _bins(self, rows: np.ndarray, first: int) -> None:
        self._add(features=np.ascontiguousarray(rows, "<f4").tobytes(), i=first)

    def _add(self, **fields: Any) -> None:
        self._queued.append((fields, self._id))
        self._id = "*"  # Redis goes on from the last id, whatever its clock says

    def _send(self) -> None:
        """Send the entries that are queued, in one go."""
        pipeline = self.source.client.pipeline(transaction=False)
        for fields, id_ in self._queued:
            pipeline.xadd(_STREAM, fields, id_, _KEPT_ENTRIES)
        self._queued = []
        pipeline.execute()


class Meter:
    """Memory and processor time of `b2txt stream` and its language model server."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._stream = psutil.Process(rig.stream.pid)
        self._server, self._before = rig.server(), (0.0, 0.0)
        self._bins = 0
        self.looks: list[dict[str, float]] = []
        self._before = self._times()

    def _times(self) -> tuple[float, float]:
        own, server = self._stream.cpu_times(), self._server.cpu_times()
        return own.user + own.system, server.user + server.system

    def look(self, bins: int, waited: list[float]) -> None:
        """Note what was used since the last look. `bins`: that were sent so far."""
        server = self._rig.server()
        if server.pid != self._server.pid:
            self._server, self._before = server, (self._before[0], 0.0)
        now, count = self._times(), max(1, bins - self._bins)
        self.looks.append(
            {
                "stream_mb": self._stream.memory_info().rss / 1e6,
                "server_mb": server.memory_info().rss / 1e6,
                "stream_cpu_ms_per_bin": 1000 * (now[0] - self._before[0]) / count,
                "server_cpu_ms_per_bin": 1000 * (now[1] - self._before[1]) / count,
                "sentence_s": float(np.median(waited)),
            }
        )
        self._before, self._bins = now, bins

    def figures(self) -> dict[str, dict[str, float]]:
        """Return the medians of the first and the last tenth."""
        tenth = max(1, len(self.looks) // 10)
        parts = {"first_tenth": self.looks[:tenth], "last_tenth": self.looks[-tenth:]}
        return {
            name: {
                key: round(float(np.median([look[key] for look in looks])), 3) for key in looks[0]
            }
            for name, looks in parts.items()
        }


def main() -> None:
    """Feed, count and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--lm", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=8.0, help="of stream (default 8)")
    parser.add_argument("--faults", type=int, default=30, help="(default 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--chunk-frames", type=int, default=1, help="of `b2txt stream`; 8 is faster (default 1)"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rng = random.Random(args.seed)
    run = load_run(args.workdir)
    with open_folder(run.config.data.root, run.config.data.feature_count) as reader:
        session = run.sessions[-1]
        trials = [reader.read(ref).features for ref in reader.trials([session], "val")]
    mean = BIN_SECONDS * np.mean([len(one) for one in trials])
    # Before the first fault each trial is decoded once, and after the last one comes another.
    total = max(len(trials) + args.faults + 1, round(3600 * args.hours / mean))
    faulty = dict(
        zip(
            sorted(rng.sample(range(len(trials), total - 1), args.faults)),
            itertools.cycle(FAULTS),
            strict=False,
        )
    )
    counts: Counter[str] = Counter()
    expected: dict[int, str] = {}
    waited: list[float] = []
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        said = stack.enter_context(embedded_redis())
        source = SourceRedis(Path(folder))
        stack.callback(lambda: source.process.kill())
        answers: Any = redis.Redis.from_url(said.url, protocol=2)
        summary = Path(folder) / "summary.json"
        command = [sys.executable, "-m", "b2txt_jax.cli", "stream", "--workdir", str(args.workdir)]
        command += [
            "--lm",
            str(args.lm),
            "--source",
            f"unix://{source.path}/{_STREAM}",
            "--day",
            session,
        ]
        command += ["--no-record", "--publish", f"{said.url}/said", "--summary", str(summary)]
        command += ["--chunk-frames", str(args.chunk_frames)]
        with (Path(folder) / "log.txt").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(process.kill)  # where this script fails
            while "decoding with" not in (Path(folder) / "log.txt").read_text():
                if process.poll() is not None:
                    sys.exit((Path(folder) / "log.txt").read_text())
                time.sleep(0.2)
            rig, seen, bins = Rig(source, process), "0-0", 0
            meter = Meter(rig)
            waiting: list[int] = []
            sent = 0
            bar = Progress(console=Console(stderr=True))
            with bar, contextlib.suppress(KeyboardInterrupt):
                for number in bar.track(range(total), description="sentences"):
                    fault, started = faulty.get(number), time.monotonic()
                    if fault:
                        print(f"sentence {number} of {total}: {fault}", flush=True)
                    features = trials[number % len(trials)]
                    rig.say(str(number), features, fault, rng)
                    waiting.append(number)
                    sent, bins = number + 1, bins + len(features)
                    if fault == "no end mark":
                        continue  # the next sentence ends it
                    deadline = time.monotonic() + _PATIENCE
                    while waiting and time.monotonic() < deadline:
                        for _, entries in answers.xread({"said": seen}, block=100) or []:
                            for entry, fields in entries:
                                seen = entry
                                _check(fields, waiting, faulty, expected, len(trials), counts)
                    for lost in waiting:
                        counts["lost"] += 1
                        print(f"lost: sentence {lost}, fault {faulty.get(lost)}", flush=True)
                    waiting = []
                    rig.answered(fault)
                    waited.append(time.monotonic() - started)
                    if len(waited) == _LOOK_EVERY:
                        meter.look(bins, waited)
                        waited = []
            if waited:
                meter.look(bins, waited)
            process.send_signal(signal.SIGINT)
            process.wait(60)
            if not summary.exists():
                sys.exit((Path(folder) / "log.txt").read_text()[-3000:])
            figures = json.loads(summary.read_text())
    figures |= {
        "hours": round(BIN_SECONDS * bins / 3600, 2),
        "took_hours": round((time.monotonic() - began) / 3600, 2),
        "sentences_sent": sent,
        "faults": dict(Counter(fault for number, fault in faulty.items() if number < sent)),
        **{name: counts[name] for name in ("answered", "lost", "doubled", "changed")},
        **meter.figures(),
    }
    print(json.dumps(figures, indent=1))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(1 if counts["lost"] or counts["doubled"] or counts["changed"] else 0)


def _check(
    fields: dict[bytes, bytes],
    waiting: list[int],
    faulty: dict[int, str],
    expected: dict[int, str],
    trials: int,
    counts: Counter[str],
) -> None:
    """Count an answer."""
    number, text = int(fields[b"name"]), fields[b"text"].decode()
    if number not in waiting:
        counts["doubled"] += 1
        print(f"doubled: sentence {number}", flush=True)
        return
    waiting.remove(number)
    counts["answered"] += 1
    wanted = expected.setdefault(number % trials, text)
    # A sentence after a fault begins anew: nothing of the fault may be left.
    if number not in faulty and text != wanted:
        counts["changed"] += 1
        print(f"changed: sentence {number} is {text!r}; needed {wanted!r}", flush=True)


if __name__ == "__main__":
    main()
