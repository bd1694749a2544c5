"""How much faster do two workers decode a batch of sentences than one?

    python benchmarks/workers.py [--sentences 200] [--rounds 3] [--workers 1 2]

The whole CMU dictionary, a 3-gram model, simulated logits at 14 % greedy phoneme error rate; real
`lm-server worker` processes on a Redis of their own, jobs handed in by the client that
`b2txt evaluate --workers` uses. The numbers of workers take turns, round by round; printed are
sentences per second (from the first job handed in to the last result) and the ratios to the first.
Redis and the client share the cores with the workers. On a machine that does other work besides,
the ratio is that of the shares that it gives; CPU seconds per sentence tell what the work took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from simulated_logits import CORPUS, held_out, label, simulate_at

from lm_server.client.jobs import JobClient
from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.lm import build as build_lm
from lm_server.protocol import to_rnn_order


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its children, living ones too."""
    import psutil

    parent = psutil.Process(pid)
    return sum(sum(one.cpu_times()[:2]) for one in [parent, *parent.children(recursive=True)])


def measure(folder: Path, logits: list[np.ndarray], workers: int) -> tuple[float, float, float]:
    """Sentences per second; CPU seconds per sentence of workers and Redis, and of the client."""
    command = [sys.executable, "-m", "lm_server", "worker", "--lm", str(folder)]
    process = subprocess.Popen(
        [*command, "--embedded-redis", "--exit-with-parent", "--workers", str(workers)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().split("redis=")[1].split()[0]
        names = [str(index) for index in range(len(logits))]
        # One each, so that every worker has begun.
        with JobClient(url) as client:
            client.decode_all(logits[: 2 * workers], names[: 2 * workers])
        spent, own = cpu_seconds(process.pid), time.process_time()
        started = time.perf_counter()
        with JobClient(url) as client:
            found = client.decode_all(logits, names)
        took = time.perf_counter() - started
        spent, own = cpu_seconds(process.pid) - spent, time.process_time() - own
        failed = [one for one in found if one.error]
        if failed:
            raise SystemExit(f"{len(failed)} sentences failed, the first: {failed[0].error}")
        return len(logits) / took, spent / len(logits), own / len(logits)
    finally:
        process.terminate()
        process.wait(timeout=30)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", type=int, default=200, help="(default 200)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default 1 2)")
    parser.add_argument("--lm", type=Path, help="a model folder instead of the one built here")
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.lm or args.workdir / "lm3"
    if not (folder / build_lm.DESCRIPTION).is_file():
        build_lm.build([CORPUS / "language_model.txt.xz"], 3, "cmudict", folder)
    known = read_lexicon("cmudict").entries
    rng = np.random.default_rng(args.seed)
    labels = [label(s, known, 0.0, rng) for s in held_out(args.sentences, args.seed, "test")]
    logits = [to_rnn_order(one) for one in simulate_at(labels, 0.14, args.seed)[0]]
    speeds: dict[int, list[float]] = {count: [] for count in args.workers}
    costs: dict[int, list[float]] = {count: [] for count in args.workers}
    clients: list[float] = []
    for _ in range(args.rounds):
        for count in args.workers:
            speed, cost, client = measure(folder, logits, count)
            clients.append(client)
            speeds[count].append(speed)
            costs[count].append(cost)
    first = statistics.median(speeds[args.workers[0]])
    told = {}
    for count in args.workers:
        speed = statistics.median(speeds[count])
        told[count] = {
            "sentences_per_second": round(speed, 2),
            "rounds": [round(one, 2) for one in speeds[count]],
            "ratio": round(speed / first, 2),
            "cpu_seconds_per_sentence": round(statistics.median(costs[count]), 4),
        }
        print(
            f"{count} workers: {speed:.1f} sentences/s "
            f"(rounds: {', '.join(f'{one:.1f}' for one in speeds[count])}), "
            f"{speed / first:.2f} times the first; "
            f"{1000 * statistics.median(costs[count]):.1f} ms of CPU per sentence, the client's "
            f"{1000 * statistics.median(clients):.1f} ms besides"
        )
    args.workdir.mkdir(parents=True, exist_ok=True)
    (args.workdir / "workers.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
