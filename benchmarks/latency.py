"""How long does a client wait for a partial answer per 80 ms frame, and for the final answer?

    python benchmarks/latency.py [--sentences 30] [--lm DIR]

The whole CMU dictionary, a 3-gram model, simulated logits at 14 % greedy phoneme error rate, sent
one frame at a time as by a brain-computer interface. Measured directly (the search in this process)
and through Redis (a real `lm-server serve` bound to one core, from before the client's XADD to
after its XREAD). Prints the median, the 99th percentile and the maximum, and the share of frames
within 20 ms. On a busy machine other work determines the maximum, so the CPU time of the direct
search is printed too.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import redis
from decoding import lm_server, model_folder, parser_of, save, simulated

from lm_server.protocol import encode_logits, session_streams
from lm_server.rescoring.ranking import ngram_answer
from lm_server.search.interface import SearchModel
from lm_server.search.load import default_settings, load_model
from lm_server.serving.status import percentile

PARTIAL_TARGET = 0.020


def figures(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p99 and the maximum, in milliseconds."""
    ordered = sorted(seconds)
    shares = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    return {name: round(1000 * percentile(ordered, share), 2) for name, share in shares}


def direct(
    model: SearchModel, sentences: Sequence[np.ndarray], clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Return the seconds of every partial and every final answer, on the given clock."""
    settings = default_settings("flashlight")
    search = model.search(settings)
    partials, finals = [], []
    for logits in sentences:
        search.begin()
        for frame in logits:
            started = clock()
            search.step(frame[None])
            partials.append(clock() - started)
        started = clock()
        ngram_answer(search.finish(), settings)
        finals.append(clock() - started)
    return partials, finals


def through_redis(folder: Path, sentences: Sequence[np.ndarray]) -> tuple[list[float], list[float]]:
    """Return the same as measured by a client of a server on one core."""
    names = session_streams("")
    partials, finals = [], []
    with lm_server("serve", folder) as (url, pid), redis.Redis.from_url(url, protocol=2) as client:
        # The embedded Redis stays on the client's cores, like a Redis on another machine.
        os.sched_setaffinity(pid, sorted(os.sched_getaffinity(0))[:1])
        seen: dict[str, Any] = {names.partial: "0-0", names.final: "0-0"}

        def ask(stream: str, fields: dict[str, Any], answer: str) -> float:
            started = time.perf_counter()
            client.xadd(stream, fields)
            while not (found := client.xread({answer: seen[answer]}, count=1, block=4000)):
                pass
            took = time.perf_counter() - started
            seen[answer] = found[0][1][-1][0]
            return took

        for logits in sentences:
            for frame in logits:
                payload = {"logits": encode_logits(frame[None])}
                partials.append(ask(names.input, payload, names.partial))
            finals.append(ask(names.finalize, {"done": 0}, names.final))
    return partials, finals


def main() -> None:
    """Measure and print. Exit with 1 if a target is missed."""
    parser = parser_of(__doc__)
    parser.add_argument("--sentences", type=int, default=30, help="(default 30)")
    args = parser.parse_args()
    folder = model_folder(args)
    _, sentences, _ = simulated("test", args.sentences, 0.14, args.seed)
    model = load_model(folder)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    rows = {
        "direct, CPU time": direct(model, sentences, time.process_time),
        "direct, wall time": direct(model, sentences, time.perf_counter),
        "through Redis": through_redis(folder, sentences),
    }
    frames = sum(map(len, sentences))
    print(f"{len(model.words)} words; {len(sentences)} sentences, {frames} frames of 80 ms")
    results: dict[str, Any] = {"words": len(model.words), "frames": frames}
    for name, (partials, finals) in rows.items():
        partial, final = figures(partials), figures(finals)
        within = sum(one < PARTIAL_TARGET for one in partials) / len(partials)
        results[name] = {"partial_ms": partial, "final_ms": final, "within_20_ms": round(within, 5)}
        print(
            f"{name:18s} partial p50 {partial['p50']:6.2f}  p99 {partial['p99']:6.2f}  "
            f"longest {partial['max']:7.2f} ms ({within:.2%} within 20 ms);  "
            f"final p50 {final['p50']:6.1f}  p99 {final['p99']:6.1f}  "
            f"longest {final['max']:6.1f} ms"
        )
    save(args, "latency.json", results)
    seen = results["through Redis"]
    met = seen["partial_ms"]["p99"] < 20 and seen["final_ms"]["p99"] < 150
    verdict = "met" if met else "MISSED"
    print(f"targets through Redis (partial p99 < 20 ms, final < 150 ms): {verdict}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
