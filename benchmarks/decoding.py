"""Shared parts of the benchmarks of decoding: the model folder, simulated sentences, fresh
processes, and a running `lm-server`.

The task is the same in all of them: the whole CMU dictionary, an n-gram model of the package's
text, and simulated logits (`simulated_logits`) of sentences that the model has not seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from simulated_logits import CORPUS, held_out, label, simulate_at

from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.lm.build import build
from lm_server.lm.reader import DESCRIPTION
from lm_server.search.interface import SearchModel
from lm_server.settings import Settings

TEXT = CORPUS / "language_model.txt.xz"
Words = tuple[str, ...]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks of decoding have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--lm", type=Path, help="a model folder instead of the one built here")
    option("--workdir", type=Path, default=Path("runs/benchmarks"), help="where results are kept")
    option("--seed", type=int, default=0)
    return parser


def model_folder(args: argparse.Namespace, order: int = 3) -> Path:
    """Return --lm, or the model folder in --workdir, which is built once."""
    folder: Path = args.lm or args.workdir / f"lm{order}"
    if not (folder / DESCRIPTION).is_file():
        build([TEXT], order, "cmudict", folder)
    return folder


def simulated(
    pool: str, count: int, per: float, seed: int, dropped: float = 0.0
) -> tuple[list[Words], list[np.ndarray], float]:
    """Simulate logits of a pool's sentences (`val` and `test` share none).

    Args:
      pool: name of the pool.
      count: number of sentences.
      per: phoneme error rate of greedy decoding.
      seed: chooses sentences and noise.
      dropped: share of silences between words that are left out.

    Returns:
      Sentences, their logits [frames, 41] in the language model's order, and the error rate.
    """
    known = read_lexicon("cmudict").entries
    truth = held_out(count, seed, pool)
    rng = np.random.default_rng(seed)
    logits, reached = simulate_at([label(s, known, dropped, rng) for s in truth], per, seed)
    return truth, logits, reached


def best_of(errors: np.ndarray) -> tuple[int, ...]:
    """Return the place of the fewest errors in a grid of settings [n, ...].

    Of equals it is the one with the fewest errors in its neighbourhood, so that no order in which
    the settings are listed decides. Of settings that are equal there too, it is the one nearest to
    the middle of the equals.
    """
    places = np.argwhere(errors == errors.min())

    def around(place: np.ndarray) -> float:
        near = tuple(slice(max(at - 1, 0), at + 2) for at in place)
        return float(errors[near].mean())

    means = np.array([around(place) for place in places])
    equal = places[np.isclose(means, means.min())]
    middle = equal.mean(0)
    chosen = equal[int(np.argmin(np.abs(equal - middle).sum(1)))]
    return tuple(int(at) for at in chosen)


def decode(model: SearchModel, settings: Settings, logits: Iterable[np.ndarray]) -> Iterator[Any]:
    """Yield the n-best list of every sentence."""
    search = model.search(settings)
    for one in logits:
        search.begin()
        search.step(one)
        yield search.finish()


def in_fresh_process(task: Callable[..., Iterator[Any]], *args: object) -> Iterator[Any]:
    """Yield what `task(*args)` yields in a process of its own. Exit if that process fails."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    child = context.Process(target=_send, args=(answers, task, args))
    child.start()
    while True:
        try:
            done, answer = answers.get(timeout=1.0)
        except queue.Empty:
            if child.exitcode is not None and answers.empty():
                raise SystemExit(f"the process ended with exit code {child.exitcode}") from None
            continue
        if done:
            break
        yield answer
    child.join()


def _send(answers: Any, task: Callable[..., Iterator[Any]], args: Sequence[object]) -> None:
    for answer in task(*args):
        answers.put((False, answer))
    answers.put((True, None))


def memory(what: str) -> int:
    """Return bytes of this process: VmRSS (now) or VmHWM (peak).

    `getrusage` is no substitute: a child process inherits its parent's ru_maxrss.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024


@contextlib.contextmanager
def lm_server(command: str, folder: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Run `lm-server serve` or `worker` with a Redis of its own. Yield (Redis URL, process id)."""
    own_redis = ("--embedded-redis", "--exit-with-parent")
    process = subprocess.Popen(
        [sys.executable, "-m", "lm_server", command, "--lm", str(folder), *own_redis, *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split("redis=")[1].split()[0], process.pid
    finally:
        process.terminate()
        process.wait(timeout=30)


def save(args: argparse.Namespace, name: str, values: Any) -> Path:
    """Write values as JSON into --workdir."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    out: Path = args.workdir / name
    out.write_text(json.dumps(values, indent=1) + "\n")
    return out
