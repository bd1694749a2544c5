"""Does anything get lost or answered twice when clients, workers, server and Redis misbehave?

    python scripts/soak.py [--sentences 10000] [--faults 50] [--seed 0] [--out DIR]

Starts, on this machine only, a Redis with an append-only file, one `lm-server serve`, and two
`lm-server worker`. Half of the sentences are spoken by real-time clients (one on the published
streams, the others in sessions), half are jobs. Meanwhile faults happen, in turns:

    missing field, wrong shape, NaN, worker killed, oversized, Redis killed, slow client,
    vanished client, clock, bad setting, server killed, server away, foreign keys, second client,
    poison word, huge name, poison job, expensive session

Entries that cannot be used are sent in the middle of a sentence, which must not be harmed by them.
"Killed" is SIGKILL: Redis is started again on its file, a worker by its supervisor, the server by
this script. Every answer is compared with the offline decoder's, scores included. A client whose
own command to Redis fails does not know whether it was carried out. It gives that attempt up and
says the sentence again under another request id. An accepted sentence (Redis took its finalize)
without an answer is lost. A second answer to one request id is a duplicate.

Writes soak.json and soak.md into --out, prints the latter. Exit code 1 if anything was lost,
doubled or wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from soak_clients import (
    VANISHED_IDLE,
    Speaker,
    Tally,
    be_expensive,
    do_jobs,
    poison_job,
    vanish,
    wrong_clock,
)
from soak_machines import Machines, Sentence, make_model, make_sentences
from soak_others import foreign_keys, second_client, server_away

from lm_server.protocol import REGISTRY

OTHERS = {
    "server away": server_away,
    "foreign keys": foreign_keys,
    "second client": second_client,
}
KINDS = (
    *("missing field", "wrong shape", "worker killed", "NaN", "Redis killed", "oversized"),
    *("slow client", "vanished client", "server killed", "clock", "bad setting"),
    *OTHERS,
    *("poison word", "huge name", "poison job", "expensive session"),
)
BY_CLIENT = ("missing field", "wrong shape", "NaN", "oversized", "slow client", "bad setting")
BY_CLIENT += ("poison word", "huge name")


def schedule(count: int, rng: random.Random) -> list[str]:
    """Return kinds of faults, all of them equally often as far as possible."""
    kinds: list[str] = []
    while len(kinds) < count:
        some = list(KINDS)
        # The first round in the listed order, so that a short run has the most telling ones.
        if kinds:
            rng.shuffle(some)
        kinds += some
    return kinds[:count]


def soak(
    machines: Machines,
    sentences: Sequence[Sentence],
    total: int,
    faults: int,
    speakers: int,
    seed: int,
    tally: Tally,
) -> None:
    """Run clients and faults until all sentences are sent."""
    rng = random.Random(seed)
    names = ["", *(f"speaker-{i}" for i in range(1, speakers))]
    voices = [Speaker(machines.url, name, tally, seed + i) for i, name in enumerate(names)]
    jobs = total // 2
    shares = [(total - jobs) // speakers] * speakers
    shares[0] += total - jobs - sum(shares)

    def speak(index: int) -> None:
        voices[index].open()
        for number in range(shares[index]):
            voices[index].say(sentences[(7 * number + index) % len(sentences)])
        voices[index].finish()

    failures: list[BaseException] = []

    def guarded(action: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                action()
            except BaseException as error:
                failures.append(error)
                raise

        return run

    actions: list[Callable[[], None]] = [lambda i=i: speak(i) for i in range(speakers)]  # type: ignore[misc]
    actions.append(lambda: do_jobs(machines.url, sentences, jobs, total - jobs, tally))
    threads = [threading.Thread(target=guarded(action), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    kinds = schedule(faults, rng)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("sentences", total=total)
        number = 0
        while any(thread.is_alive() for thread in threads):
            done = tally.counts["real-time sentences"] + tally.counts["jobs"]
            progress.update(task, completed=done, description=f"sentences, {number} faults")
            if number < len(kinds) and done >= (number + 0.5) * total / (faults + 1):
                _inject(kinds[number], number, machines, voices, sentences, tally, rng)
                number += 1
            else:
                time.sleep(0.02)
    if failures:
        raise failures[0]
    if number < len(kinds):
        tally.count("faults that did not take place", f"{kinds[number:]}")
    # Those whose client vanished must be closed by now or soon.
    deadline = time.monotonic() + VANISHED_IDLE + 20
    while machines.client.hlen(REGISTRY.sessions) and time.monotonic() < deadline:
        time.sleep(0.1)
    for name in machines.client.hkeys(REGISTRY.sessions):  # type: ignore[union-attr]
        tally.count("sessions left open", name.decode())


def _inject(
    kind: str,
    number: int,
    machines: Machines,
    voices: Sequence[Speaker],
    sentences: Sequence[Sentence],
    tally: Tally,
    rng: random.Random,
) -> None:
    if kind in BY_CLIENT:
        # The speaker notes it when it takes place.
        rng.choice([one for one in voices if one.speaking] or voices).faults.put(kind)
        return
    if kind == "Redis killed":
        machines.kill_redis()
    elif kind == "worker killed":
        machines.kill_worker()
    elif kind == "server killed":
        machines.kill_server()
    elif kind in OTHERS:
        OTHERS[kind](machines, number, sentences[number], tally)
    elif kind == "vanished client":
        vanish(machines.url, number, sentences[number])
    elif kind == "poison job":
        poison_job(machines.url, number, sentences[number], tally)
    elif kind == "expensive session":
        be_expensive(machines.url, number, tally)
    else:
        wrong_clock(machines.url, number, sentences[number], tally)
    tally.fault(kind)


def as_markdown(told: dict[str, Any]) -> str:
    """Return the summary as a table."""
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in told.items() if name != "faults"]
    lines += ["", "| Fault | Times |", "|---|---|"]
    lines += [f"| {kind} | {times} |" for kind, times in told["faults"].items()]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _running(folder: Path, model: Path) -> Iterator[Machines]:
    machines = Machines(folder, model)
    try:
        yield machines
    finally:
        machines.stop()


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", type=int, default=10_000, help="(default 10000)")
    parser.add_argument("--faults", type=int, default=50, help="(default 50)")
    parser.add_argument("--sessions", type=int, default=4, help="real-time clients (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="(default runs/soak)")
    args = parser.parse_args()
    tally = Tally()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lm-soak-") as temporary:
        folder = Path(temporary)
        model = make_model(folder)
        sentences = make_sentences(model, 211, np.random.default_rng(args.seed))
        with _running(folder, model) as machines:
            soak(
                machines,
                sentences,
                args.sentences,
                args.faults,
                args.sessions,
                args.seed,
                tally,
            )
            over = machines.taken_over()
    counts = tally.counts
    told = {
        "sentences": counts["real-time sentences"] + counts["jobs"],
        "real-time sentences": counts["real-time sentences"],
        "jobs": counts["jobs"],
        "injected faults": sum(tally.faults.values()),
        "lost answers": counts["lost"],
        "duplicated answers": counts["duplicated"],
        "wrong answers": counts["wrong"],
        "refusals of unusable entries": counts["refusals"],
        "refusals lost": counts["refusals lost"],
        "attempts given up by their client": counts["attempts given up by their client"],
        "jobs taken over from killed workers": over,
        "sessions left open": counts["sessions left open"],
        "seconds": round(time.monotonic() - started, 1),
        "faults": dict(sorted(tally.faults.items())),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "soak.json").write_text(json.dumps(told, indent=1) + "\n")
    (args.out / "soak.md").write_text(as_markdown(told))
    print(as_markdown(told))
    for line in tally.details:
        print(line, file=sys.stderr)
    bad = ("lost", "duplicated", "wrong", "refusals lost", "sessions left open")
    return 1 if any(counts[name] for name in (*bad, "faults that did not take place")) else 0


if __name__ == "__main__":
    sys.exit(main())
