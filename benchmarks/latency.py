"""How long does a client wait: for a partial answer per 80 ms frame, and for the final one?

    python benchmarks/latency.py [--sentences 30] [--lm DIR]

The whole CMU dictionary, a 3-gram model, simulated logits at 14 % greedy phoneme error rate, sent
one frame at a time as a brain-computer interface does. Measured directly (the search in this
process) and through Redis (a real `lm-server serve` bound to one core; from before the client's
XADD to after its XREAD). Printed: median, 99th percentile and longest, and the share of frames
within 20 ms. On a machine that does other work besides, the longest times are that work's: CPU time
of the direct search is printed beside its wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import redis
from simulated_logits import CORPUS, held_out, label, simulate_at

from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.lm import build as build_lm
from lm_server.protocol import encode_logits, session_streams
from lm_server.rescoring.ranking import ngram_answer
from lm_server.search.interface import SearchModel
from lm_server.search.load import default_settings, load_model
from lm_server.serving.status import percentile

PARTIAL_TARGET = 0.020


def figures(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the longest, in milliseconds."""
    ordered = sorted(seconds)
    shares = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    return {name: round(1000 * percentile(ordered, share), 2) for name, share in shares}


def direct(
    model: SearchModel, sentences: Sequence[np.ndarray], clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Seconds of every partial and every final answer, on the given clock."""
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
    """The same as a client sees it, with the server on one core."""
    command = [sys.executable, "-m", "lm_server", "serve", "--lm", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [*command, "--embedded-redis", "--exit-with-parent"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdout is not None
    try:
        url = server.stdout.readline().split("redis=")[1].split()[0]
        cores = sorted(os.sched_getaffinity(0))
        # Its Redis goes with the client, as on another machine.
        os.sched_setaffinity(server.pid, cores[:1])
        names = session_streams("")
        partials, finals = [], []
        with redis.Redis.from_url(url, protocol=2) as client:
            seen: dict[str, Any] = {names.partial: "0-0", names.final: "0-0"}

            def ask(stream: str, fields: dict[str, Any], answer: str) -> float:
                started = time.perf_counter()
                client.xadd(stream, fields)
                while not (found := client.xread({answer: seen[answer]}, count=1, block=4000)):
                    pass
                took = time.perf_counter() - started
                seen[answer] = found[0][1][-1][0]  # type: ignore[index]
                return took

            for logits in sentences:
                for frame in logits:
                    payload = {"logits": encode_logits(frame[None])}
                    partials.append(ask(names.input, payload, names.partial))
                finals.append(ask(names.finalize, {"done": 0}, names.final))
        return partials, finals
    finally:
        server.terminate()
        server.wait(timeout=30)


def main() -> None:
    """Measures and prints; exit code 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", type=int, default=30, help="(default 30)")
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
    sentences, _ = simulate_at(labels, 0.14, args.seed)
    model = load_model(folder)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    rows = {
        "direct, CPU time": direct(model, sentences, time.process_time),
        "direct, wall time": direct(model, sentences, time.perf_counter),
        "through Redis": through_redis(folder, sentences),
    }
    frames = sum(map(len, sentences))
    print(f"{len(model.words)} words; {len(sentences)} sentences, {frames} frames of 80 ms")
    told: dict[str, Any] = {"words": len(model.words), "frames": frames}
    for name, (partials, finals) in rows.items():
        partial, final = figures(partials), figures(finals)
        within = sum(one < PARTIAL_TARGET for one in partials) / len(partials)
        told[name] = {"partial_ms": partial, "final_ms": final, "within_20_ms": round(within, 5)}
        print(
            f"{name:18s} partial p50 {partial['p50']:6.2f}  p99 {partial['p99']:6.2f}  "
            f"longest {partial['max']:7.2f} ms ({within:.2%} within 20 ms);  "
            f"final p50 {final['p50']:6.1f}  p99 {final['p99']:6.1f}  "
            f"longest {final['max']:6.1f} ms"
        )
    args.workdir.mkdir(parents=True, exist_ok=True)
    (args.workdir / "latency.json").write_text(json.dumps(told, indent=1) + "\n")
    seen = told["through Redis"]
    met = seen["partial_ms"]["p99"] < 20 and seen["final_ms"]["p99"] < 150
    verdict = "met" if met else "MISSED"
    print(f"targets through Redis (partial p99 < 20 ms, final < 150 ms): {verdict}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
