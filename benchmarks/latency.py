"""How long does a client wait for a partial answer per 80 ms frame, and for the final answer?

    python benchmarks/latency.py [--sentences 30] [--lm DIR] [--from bins]

The whole CMU dictionary, a 3-gram model, simulated logits at 14 % greedy phoneme error rate, sent
one frame at a time as by a brain-computer interface. Measured directly (the search in this process)
and through Redis (a real `lm-server serve` bound to one core, from before the client's XADD to
after its XREAD). Prints the median, the 99th percentile and the maximum, and the share of frames
within 20 ms. On a busy machine other work determines the maximum, so the CPU time of the direct
search is printed too.

With --from bins it measures what a live system waits for (`b2txt stream`): from the arrival of a
frame's last bin to the partial text, through the GRU and the Transformer at full size and the
server. Frames come every 80 ms as from a rig, so that one that takes longer delays the next. The
weights are constant, since their values do not change the time, and the server searches the
simulated logits instead of theirs. The target is a p99 below 60 ms.
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
from decoding import Words, lm_server, model_folder, parser_of, save, simulated

from lm_server.protocol import encode_logits, session_streams
from lm_server.rescoring.ranking import ngram_answer
from lm_server.search.interface import SearchModel
from lm_server.search.load import default_settings, load_model
from lm_server.serving.status import percentile

PARTIAL_TARGET = 0.020
LIVE_TARGET_MS = 60


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


def from_bins(
    config: str, folder: Path, sentences: Sequence[np.ndarray], truth: Sequence[Words]
) -> dict[str, Any]:
    """Return the figures of a live session with a model of this configuration."""
    # Only here: JAX counts the cores when it is imported.
    import jax

    from b2txt_jax.config import load_config
    from b2txt_jax.inference.run import Run
    from b2txt_jax.live.model import LiveModel
    from b2txt_jax.live.session import Latency, replaced
    from b2txt_jax.model.interface import make_model
    from lm_server.client.client import Client

    made = load_config(config)
    width, days = made.data.feature_count, len(made.data.sessions)
    shapes = jax.eval_shape(make_model(made.model, width, days).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda one: np.full(one.shape, 0.01, np.float32), shapes)
    live, found, cpu = LiveModel(Run(made, params, 0)), Latency(), []
    live.warm_up()
    bins = rng.standard_normal((4, width), dtype=np.float32)
    with lm_server("serve", folder) as (url, _), Client(url) as client:
        for logits, words in zip(sentences, truth, strict=True):
            live.begin()
            client.reset()
            live.push(np.repeat(bins, 4, axis=0))  # of before the first frame
            due, shown = time.perf_counter(), ""
            for frame in logits:
                due += live.chunk_seconds
                time.sleep(max(0.0, due - time.perf_counter()))
                started = time.process_time()
                live.push(bins)
                cpu.append(time.process_time() - started)
                # The client sends in the RNN's order, where silence is last.
                text = client.send(np.concatenate([frame[:1], frame[2:], frame[1:2]])[None])
                found.decoded(time.perf_counter() - due, live.chunk_seconds)
                found.revised += replaced(shown.split(), text.split())
                shown = text
            started = time.perf_counter()
            client.finalize()
            found.final.append(time.perf_counter() - started)
            found.words += len(words)
    assert live.programs == 1
    return found.figures() | {"model_cpu_ms_p50": round(1000 * float(np.median(cpu)), 1)}


def main() -> None:
    """Measure and print. Exit with 1 if a target is missed."""
    parser = parser_of(__doc__)
    parser.add_argument("--sentences", type=int, default=30, help="(default 30)")
    parser.add_argument("--from", choices=("frames", "bins"), default="frames", dest="source")
    args = parser.parse_args()
    folder = model_folder(args)
    truth, sentences, _ = simulated("test", args.sentences, 0.14, args.seed)
    if args.source == "bins":
        live = {}
        for config in ("nejm_baseline", "transformer"):
            live[config] = from_bins(config, folder, sentences, truth)
            print(config, live[config], flush=True)
        save(args, "latency_from_bins.json", live)
        met = all(one["partial_ms_p99"] < LIVE_TARGET_MS for one in live.values())
        print(f"target (bin to text, p99 < {LIVE_TARGET_MS} ms): {'met' if met else 'MISSED'}")
        sys.exit(0 if met else 1)
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
