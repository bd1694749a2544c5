"""How much faster do two workers decode a batch of sentences than one?

    python benchmarks/workers.py [--sentences 200] [--rounds 3] [--workers 1 2]

The whole CMU dictionary, a 3-gram model, simulated logits at 14 % greedy phoneme error rate. Real
`lm-server worker` processes on a Redis of their own get their jobs from the client that
`b2txt evaluate --workers` uses. The numbers of workers alternate, round by round. Prints sentences
per second (from the first job to the last result) and the ratios to the first number. Redis and the
client share the cores with the workers. On a busy machine the ratio depends on the other work. CPU
seconds per sentence do not.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
from decoding import lm_server, model_folder, parser_of, save, simulated

from lm_server.client.jobs import JobClient
from lm_server.protocol import to_rnn_order


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of its children, including running ones."""
    import psutil

    parent = psutil.Process(pid)
    return sum(sum(one.cpu_times()[:2]) for one in [parent, *parent.children(recursive=True)])


def measure(folder: Path, logits: list[np.ndarray], workers: int) -> tuple[float, float, float]:
    """Return sentences/s, and CPU seconds per sentence of workers with Redis, and of the client."""
    names = [str(index) for index in range(len(logits))]
    with lm_server("worker", folder, "--workers", str(workers)) as (url, pid):
        # A few jobs first, so that every worker has started.
        with JobClient(url) as client:
            client.decode_all(logits[: 2 * workers], names[: 2 * workers])
        spent, own = cpu_seconds(pid), time.process_time()
        started = time.perf_counter()
        with JobClient(url) as client:
            found = client.decode_all(logits, names)
        took = time.perf_counter() - started
        spent, own = cpu_seconds(pid) - spent, time.process_time() - own
    failed = [one for one in found if one.error]
    if failed:
        raise SystemExit(f"{len(failed)} sentences failed, the first: {failed[0].error}")
    return len(logits) / took, spent / len(logits), own / len(logits)


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--sentences", type=int, default=200, help="(default 200)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default 1 2)")
    args = parser.parse_args()
    folder = model_folder(args)
    _, simulated_logits, _ = simulated("test", args.sentences, 0.14, args.seed)
    logits = [to_rnn_order(one) for one in simulated_logits]
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
    results = {}
    for count in args.workers:
        speed = statistics.median(speeds[count])
        results[count] = {
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
    save(args, "workers.json", results)


if __name__ == "__main__":
    main()
