"""How good, fast and small are the searches with the whole CMU dictionary and a 3-gram model?

    python benchmarks/decoder.py [--backends flashlight pyctcdecode] [--graph DIR] [--quick]

Builds the model once (kept in the work folder), simulates logits (`simulated_logits`) at stated
phoneme error rates of greedy decoding and shares of left-out silences, tunes acoustic_scale and
blank_penalty of every search alike on development sentences (all tasks together), and decodes other
sentences in a fresh process on one core. Printed per search and task: WER, WER of the best
candidate in the n-best list (oracle), share of sentences right, seconds of CPU time per sentence
(and of wall time, worst), peak memory and loading time; and the ratio to what was measured of the
published decoder, built and tuned, on such a task: same dictionary, other text (perplexity 329), so
that its WER is no strict comparison.

The search wfst runs where --graph names a folder with TLG.fst and words.txt. Searches that need
more than 0.2 s per sentence are given the first --slow sentences only.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein
from simulated_logits import CORPUS, held_out, label, simulate_at

from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.lm import build as build_lm
from lm_server.search.load import BACKENDS, default_settings
from lm_server.settings import Settings

__all__ = ["held_out", "label", "simulate_at"]

PUBLISHED = {0.14: (0.067, 0.046), 0.19: (0.083, 0.084)}
"""WER and seconds per sentence of the published decoder, tuned, at greedy PER 14 and 19 %."""
PUBLISHED_MEGABYTES = 851
_GRID = {"acoustic_scale": (0.8, 1.0, 1.2, 1.5, 1.8), "blank_penalty": (2.0, 4.0, 8.0, 16.0)}
"""What every search is tuned over."""
_DEMANDING = {"silence_penalty": 1000.0, "max_classes": 41}
"""Settings under which every silence must be in the logits."""


@dataclass(frozen=True)
class Task:
    """Sentences and their logits [frames, 41], at one error rate and share of left-out silences."""

    per: float
    dropped: float
    truth: tuple[tuple[str, ...], ...]
    logits: tuple[np.ndarray, ...]
    reached: float

    def first(self, count: int) -> Task:
        """The same with fewer sentences."""
        return dataclasses.replace(self, truth=self.truth[:count], logits=self.logits[:count])


@dataclass(frozen=True)
class Row:
    """What a search did on a task; times in seconds."""

    search: str
    per: float
    dropped: float
    sentences: int
    wer: float
    oracle: float
    right: float
    seconds: float
    worst: float
    megabytes: float
    loading: float
    settings: dict[str, float]


def wer(
    truth: Sequence[tuple[str, ...]], found: Sequence[Sequence[tuple[str, ...]]], oracle: bool
) -> float:
    """Word errors over words; of the best candidate, or of the one nearest to the truth."""
    errors = 0
    for words, candidates in zip(truth, found, strict=True):
        chosen = (candidates if oracle else candidates[:1]) or [()]
        errors += min(Levenshtein.distance(words, candidate) for candidate in chosen)
    return errors / sum(map(len, truth))


def make_tasks(
    pool: str, count: int, pers: Sequence[float], drops: Sequence[float], seed: int
) -> list[Task]:
    """The tasks of one pool of sentences (`val`, `test`: they share none)."""
    known = read_lexicon("cmudict").entries
    truth = held_out(count, seed, pool)
    tasks = []
    for per, dropped in itertools.product(pers, drops):
        rng = np.random.default_rng(seed)
        labels = [label(words, known, dropped, rng) for words in truth]
        logits, reached = simulate_at(labels, per, seed)
        tasks.append(Task(per, dropped, tuple(truth), tuple(logits), reached))
    return tasks


def measure(
    name: str,
    folder: Path,
    dev: list[Task],
    tests: list[Task],
    slow: int,
    answers: Queue[Row | None],
) -> None:
    """Runs in a fresh process: tunes one search, decodes every task, sends a row for each."""
    backend = name.split(" ")[0]
    started = time.process_time()
    from lm_server.search.load import load_model

    model = load_model(folder, backend)
    loading = time.process_time() - started
    base = default_settings(backend)
    if "demanding" in name:
        base = dataclasses.replace(base, **_DEMANDING)  # type: ignore[arg-type]

    def run(task: Task, settings: Settings) -> tuple[list[list[tuple[str, ...]]], float, float]:
        search = model.search(settings)
        found, worst, began = [], 0.0, time.process_time()
        for logits in task.logits:
            at = time.perf_counter()
            search.begin()
            search.step(logits)
            found.append([one.words for one in search.finish()])
            worst = max(worst, time.perf_counter() - at)
        return found, (time.process_time() - began) / len(task.logits), worst

    *_, seconds, _ = run(dev[0].first(3), base)
    if seconds > 0.2:
        dev, tests = [one.first(max(slow // 4, 1)) for one in dev], [t.first(slow) for t in tests]
    best, tuned = float("inf"), base
    for values in itertools.product(*_GRID.values()):
        change = dict(zip(_GRID, values, strict=True))
        settings = dataclasses.replace(base, **change)  # type: ignore[arg-type]
        reached = sum(wer(task.truth, run(task, settings)[0], False) for task in dev)
        if reached < best:
            best, tuned = reached, settings
    chosen = {key: getattr(tuned, key) for key in _GRID}
    for task in tests:
        found, seconds, worst = run(task, tuned)
        right = [c[:1] == [w] for w, c in zip(task.truth, found, strict=True)]
        # Not getrusage's ru_maxrss: a child inherits there what its parent had used.
        status = Path("/proc/self/status").read_text()
        row = Row(
            *(name, task.per, task.dropped, len(task.truth)),
            *(wer(task.truth, found, False), wer(task.truth, found, True)),
            *(sum(right) / len(right), seconds, worst),
            int(status.split("VmHWM:")[1].split()[0]) / 1024,
            *(loading, chosen),
        )
        answers.put(row)
    answers.put(None)


def next_row(child: BaseProcess, answers: Queue[Row | None]) -> Row | None:
    """The next row of a process, or None at its end; ends the program where it has failed."""
    while True:
        try:
            return answers.get(timeout=1.0)
        except queue.Empty:
            if child.exitcode is not None and answers.empty():
                raise SystemExit(f"the measuring process ended with {child.exitcode}") from None


def show(row: Row) -> str:
    """A row as a line, with the ratios to the published decoder where it was measured alike."""
    line = (
        f"  greedy PER {row.per:.0%}, {row.dropped:.0%} of silences left out: "
        f"WER {row.wer:.1%}, oracle {row.oracle:.1%}, right {row.right:.0%}, "
        f"{row.seconds:.3f} s (worst {row.worst:.3f}), {row.megabytes:.0f} MB"
    )
    if row.dropped == 0 and row.per in PUBLISHED:
        published, seconds = PUBLISHED[row.per]
        line += (
            f"; published / ours: WER {published / max(row.wer, 1e-9):.1f}, "
            f"time {seconds / row.seconds:.1f}, memory {PUBLISHED_MEGABYTES / row.megabytes:.1f}"
        )
    return line


def main() -> None:
    """Builds, simulates, tunes, decodes, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="which searches")
    option("--quick", action="store_true", help="few sentences, one error rate")
    option("--sentences", type=int, default=120, help="test sentences per task (default 120)")
    option("--dev", type=int, default=60, help="development sentences per task (default 60)")
    option("--slow", type=int, default=24, help="test sentences of slow searches (default 24)")
    option("--per", type=float, nargs="+", default=[0.14, 0.19], help="greedy error rates")
    option("--dropped", type=float, nargs="+", default=[0.0, 0.08, 0.2], help="silences left out")
    option("--lm", type=Path, help="a model folder instead of the one built here")
    option("--graph", type=Path, help="folder with TLG.fst and words.txt, for the search wfst")
    option("--order", type=int, default=3, help="order of the n-gram model (default 3)")
    option("--workdir", type=Path, default=Path("runs/benchmarks"), help="where the model is kept")
    option("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.quick:
        args.sentences, args.dev, args.slow, args.per = 24, 12, 4, args.per[:1]
    folder = args.lm or args.workdir / f"lm{args.order}"
    if not (folder / build_lm.DESCRIPTION).is_file():
        build_lm.build([CORPUS / "language_model.txt.xz"], args.order, "cmudict", folder)
    about = json.loads((folder / build_lm.DESCRIPTION).read_text())
    print(f"{about['words']} words, order {about['order']}, perplexity {about['perplexity']:.0f}")
    dev = make_tasks("val", args.dev, args.per, args.dropped, args.seed)
    tests = make_tasks("test", args.sentences, args.per, args.dropped, args.seed)
    frames = sum(map(len, tests[0].logits)) / len(tests[0].logits)
    print(f"{args.sentences} sentences, {frames:.0f} frames each; tuned on {args.dev} others")
    rows: list[Row] = []
    names = [name for name in args.backends if name != "wfst" or args.graph]
    if "wfst" in args.backends and not args.graph:
        print("wfst: left out, because --graph names no folder with TLG.fst and words.txt")
    if "flashlight" in names:
        names.insert(names.index("flashlight") + 1, "flashlight demanding every silence")
    for name in names:
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        place = args.graph if name == "wfst" else folder
        child = context.Process(target=measure, args=(name, place, dev, tests, args.slow, answers))
        child.start()
        mine: list[Row] = []
        while (row := next_row(child, answers)) is not None:
            if not mine:
                print(
                    f"{name}: tuned to {row.settings}, {row.sentences} sentences, "
                    f"loaded in {row.loading:.1f} s"
                )
            mine.append(row)
            print(show(row), flush=True)
        child.join()
        rows += mine
    out = args.workdir / "decoder.json"
    out.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
