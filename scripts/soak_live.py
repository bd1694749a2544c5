"""Does live decoding lose or double a sentence when its source, servers or bins misbehave?

    python scripts/soak_live.py --workdir runs/demo/run --lm runs/demo/lm_3gram [--hours 8]

Starts `b2txt stream` and feeds it the run's validation trials through a Redis, as fast as they are
decoded, for so many hours of stream. Meanwhile faults happen, in turns:

    dropped bins, doubled bins, late bins, dead array, NaN channels, narrow bins, source restarted,
    Redis restarted, server killed, no end mark

"Killed" and "restarted" mean SIGKILL. The Redis of the source comes back empty. Each sentence has a
name, by which its answer is found in the stream that `--publish` writes, on another Redis. A
sentence without a fault must also have the words that it has when all is well.

Prints and writes (--out FILE) the faults, sentences lost, doubled and changed, and memory and delay
in the first and the last tenth. Exit code 1 if anything was lost, doubled or changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
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
)
BIN_SECONDS = 0.02
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
                    self.source.restart()
                if fault == "server killed":
                    self._kill_server()
            self._bins(rows, first)
            if fault == "late bins" and place // 4 == middle // 4 + 2:
                self._bins(*late)
        if fault != "no end mark":
            self._add(mark="end")

    def _kill_server(self) -> None:
        for child in psutil.Process(self.stream.pid).children(recursive=True):
            if "lm_server" in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)
                return

    def _bins(self, rows: np.ndarray, first: int) -> None:
        self._add(features=np.ascontiguousarray(rows, "<f4").tobytes(), i=first)

    def _add(self, **fields: Any) -> None:
        self.source.client.xadd("bins", fields)


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
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    run = load_run(args.workdir)
    with open_folder(run.config.data.root, run.config.data.feature_count) as reader:
        session = run.sessions[-1]
        trials = [reader.read(ref).features for ref in reader.trials([session], "val")]
    mean = BIN_SECONDS * np.mean([len(one) for one in trials])
    total = max(args.faults, round(3600 * args.hours / mean))
    faulty = dict(
        zip(
            sorted(rng.sample(range(len(trials), total - 1), args.faults)),
            itertools.cycle(FAULTS),
            strict=False,
        )
    )
    counts: Counter[str] = Counter()
    expected: dict[int, str] = {}
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder, embedded_redis() as said:
        source = SourceRedis(Path(folder))
        answers: Any = redis.Redis.from_url(said.url, protocol=2)
        summary = Path(folder) / "summary.json"
        command = [sys.executable, "-m", "b2txt_jax.cli", "stream", "--workdir", str(args.workdir)]
        command += [
            "--lm",
            str(args.lm),
            "--source",
            f"unix://{source.path}/bins",
            "--day",
            session,
        ]
        command += ["--no-record", "--publish", f"{said.url}/said", "--summary", str(summary)]
        with (Path(folder) / "log.txt").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            while "decoding with" not in (Path(folder) / "log.txt").read_text():
                if process.poll() is not None:
                    sys.exit((Path(folder) / "log.txt").read_text())
                time.sleep(0.2)
            rig, seen = Rig(source, process), "0-0"
            with Progress(console=Console(stderr=True)) as progress:
                task = progress.add_task("sentences", total=total)
                waiting: list[int] = []
                for number in range(total):
                    fault = faulty.get(number)
                    rig.say(str(number), trials[number % len(trials)], fault, rng)
                    waiting.append(number)
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
                    if number % 20 == 0:
                        memory.append(psutil.Process(process.pid).memory_info().rss / 1e6)
                    progress.update(task, completed=number + 1)
            process.send_signal(signal.SIGINT)
            process.wait(60)
            source.process.kill()
            if not summary.exists():
                sys.exit((Path(folder) / "log.txt").read_text()[-3000:])
            figures = json.loads(summary.read_text())
    tenth = max(1, len(memory) // 10)
    figures |= {
        "hours": round(mean * total / 3600, 2),
        "sentences_sent": total,
        "faults": dict(Counter(faulty.values())),
        **{name: counts[name] for name in ("answered", "lost", "doubled", "changed")},
        "memory_mb_first_tenth": round(float(np.median(memory[:tenth])), 1),
        "memory_mb_last_tenth": round(float(np.median(memory[-tenth:])), 1),
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
