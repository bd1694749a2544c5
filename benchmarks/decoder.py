"""How accurate, fast and small are the searches with the whole CMU dictionary and a 3-gram model?

    python benchmarks/decoder.py [--backends flashlight pyctcdecode] [--presets accurate fast]
        [--demanding] [--graph DIR] [--quick]
    python benchmarks/decoder.py --run runs/demo/run --sharpness 1 2.5 --backends flashlight

Builds the model once (kept in the work folder). Simulates logits (`simulated_logits`) at given
phoneme error rates of greedy decoding and shares of left-out silences. With --run the logits are
spliced from those of a trained model instead (`spliced_logits`), development and test sentences
from different halves of its trials, and made sharper by each --sharpness. Tunes acoustic_scale and
blank_penalty of every search alike on development sentences, over all tasks of one sharpness
together. Decodes other sentences in a fresh process on one core. Prints per search and task: WER,
WER of the best hypothesis in the n-best list (oracle), share of sentences right, seconds of CPU
time per sentence (and the worst wall time), peak memory and loading time. Also prints the ratios to
figures of the published decoder, built and tuned, on a similar task. That task has the same
dictionary but another text (perplexity 329), so its WER is no strict comparison. The errors of the
first two searches are compared, with an interval of the difference.

The search flashlight has a row for each of --presets, and with --demanding another that demands
every silence. The search wfst needs --graph, a folder with TLG.fst and words.txt. Of the other
searches, those slower than 0.2 s per sentence decode the first --slow sentences only.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from decoding import (
    Words,
    best_of,
    decode,
    in_fresh_process,
    memory,
    model_folder,
    parser_of,
    save,
    simulated,
)
from rapidfuzz.distance import Levenshtein
from simulated_logits import held_out, label

from b2txt_jax.evaluation.intervals import paired_bootstrap
from b2txt_jax.metrics import ErrorRate
from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.lm.reader import DESCRIPTION
from lm_server.search.load import BACKENDS, default_settings
from lm_server.settings import PRESETS, Settings, changed

PUBLISHED = {0.14: (0.067, 0.046), 0.19: (0.083, 0.084)}
"""WER and seconds per sentence of the published decoder, tuned, at greedy PER 14 and 19 %."""
PUBLISHED_MEGABYTES = 851
_GRID = {"acoustic_scale": (0.8, 1.0, 1.2, 1.5, 1.8), "blank_penalty": (2.0, 4.0, 8.0, 16.0)}
"""Grid over which every search is tuned."""
_DEMANDING = {"silence_penalty": 1000.0, "max_classes": 41}
"""Settings that require every silence in the logits."""


@dataclass(frozen=True)
class Task:
    """Sentences and their logits [frames, 41], at one error rate, share of left-out silences, and
    factor on the logits."""

    per: float
    dropped: float
    sharpness: float
    truth: Sequence[Words]
    logits: Sequence[np.ndarray]

    def first(self, count: int) -> Task:
        """Return the task with fewer sentences."""
        return dataclasses.replace(self, truth=self.truth[:count], logits=self.logits[:count])


@dataclass(frozen=True)
class Row:
    """Figures of a search on a task. Times are in seconds."""

    search: str
    per: float
    dropped: float
    sharpness: float
    sentences: int
    wer: float
    oracle: float
    right: float
    seconds: float
    worst: float
    megabytes: float
    loading: float
    settings: dict[str, float]
    errors: list[int]
    lengths: list[int]


def wer(truth: Sequence[Words], found: Sequence[Sequence[Words]], oracle: bool) -> float:
    """Return the word error rate of the best hypothesis, or of the one nearest to the truth."""
    return sum(word_errors(truth, found, oracle)) / sum(map(len, truth))


def word_errors(
    truth: Sequence[Words], found: Sequence[Sequence[Words]], oracle: bool
) -> list[int]:
    """Return the word errors of every sentence's best hypothesis, or of the one nearest to it."""
    return [
        min(
            Levenshtein.distance(words, one)
            for one in (hypotheses if oracle else hypotheses[:1]) or [()]
        )
        for words, hypotheses in zip(truth, found, strict=True)
    ]


def make_tasks(args: argparse.Namespace, pool: str, count: int) -> list[Task]:
    """Make the tasks of one pool of sentences."""
    each = list(itertools.product(args.per, args.dropped))
    if args.run is None:
        return [
            Task(per, dropped, 1.0, *simulated(pool, count, per, args.seed, dropped)[:2])
            for per, dropped in each
        ]
    # It imports this module.
    from spliced_logits import halves_of, splice_at

    known, truth = read_lexicon("cmudict").entries, held_out(count, args.seed, pool)
    pieces = halves_of(args.run)[pool == "test"]
    tasks = []
    for per, dropped in each:
        rng = np.random.default_rng(args.seed)
        labels = [label(one, known, dropped, rng) for one in truth]
        logits, _ = splice_at(labels, pieces, per, 1.0, args.seed)
        tasks += [
            Task(per, dropped, sharpness, truth, [sharpness * one for one in logits])
            for sharpness in args.sharpness
        ]
    return tasks


def measure(
    name: str, folder: Path, dev: list[Task], tests: list[Task], slow: int
) -> Iterator[Row]:
    """Tune one search, decode every task and yield a row for each. Runs in a fresh process."""
    backend = name.split(" ")[0]
    started = time.process_time()
    from lm_server.search.load import load_model

    model = load_model(folder, backend)
    loading = time.process_time() - started
    base = default_settings(backend)
    for preset, width in PRESETS.items():
        if preset in name:
            base = changed(base, width)
    if "demanding" in name:
        base = dataclasses.replace(base, **_DEMANDING)  # type: ignore[arg-type]

    def run(task: Task, settings: Settings) -> tuple[list[list[Words]], float, float]:
        found, worst, began = [], 0.0, time.process_time()
        at = time.perf_counter()
        for hypotheses in decode(model, settings, task.logits):
            worst = max(worst, time.perf_counter() - at)
            found.append([one.words for one in hypotheses])
            at = time.perf_counter()
        return found, (time.process_time() - began) / len(task.logits), worst

    *_, seconds, _ = run(dev[0].first(3), base)
    if backend != "flashlight" and seconds > 0.2:
        dev, tests = [one.first(max(slow // 4, 1)) for one in dev], [t.first(slow) for t in tests]
    for sharpness in dict.fromkeys(task.sharpness for task in tests):
        scales = [scale / sharpness for scale in _GRID["acoustic_scale"]]
        grid = [
            [
                dataclasses.replace(base, acoustic_scale=scale, blank_penalty=penalty)
                for penalty in _GRID["blank_penalty"]
            ]
            for scale in scales
        ]
        of_sharpness = [task for task in dev if task.sharpness == sharpness]
        errors = [
            [
                sum(
                    sum(word_errors(task.truth, run(task, settings)[0], False))
                    for task in of_sharpness
                )
                for settings in row
            ]
            for row in grid
        ]
        at = best_of(np.array(errors))
        tuned = grid[at[0]][at[1]]
        chosen = {key: getattr(tuned, key) for key in _GRID}
        for task in tests:
            if task.sharpness != sharpness:
                continue
            found, seconds, worst = run(task, tuned)
            yield _row(name, task, found, seconds, worst, loading, chosen)


def _row(
    name: str,
    task: Task,
    found: Sequence[Sequence[Words]],
    seconds: float,
    worst: float,
    loading: float,
    chosen: dict[str, float],
) -> Row:
    right = [some[:1] == [words] for words, some in zip(task.truth, found, strict=True)]
    return Row(
        *(name, task.per, task.dropped, task.sharpness, len(task.truth)),
        *(wer(task.truth, found, False), wer(task.truth, found, True)),
        *(sum(right) / len(right), seconds, worst),
        *(memory("VmHWM") / (1 << 20), loading),
        chosen,
        word_errors(task.truth, found, False),
        [*map(len, task.truth)],
    )


def show(row: Row) -> str:
    """Format a row, with the ratios to the published decoder if it was measured alike."""
    line = (
        f"  greedy PER {row.per:.0%}, {row.dropped:.0%} of silences left out, "
        f"{row.sharpness:g} times as sharp: "
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


def _task(row: Row) -> tuple[float, float, float, int]:
    return row.per, row.dropped, row.sharpness, row.sentences


def compared(one: Row, other: Row) -> str:
    """Return the ratio of two searches' errors on one task, and the interval of the difference."""
    rates = (
        [ErrorRate(*pair) for pair in zip(row.errors, row.lengths, strict=True)]
        for row in (one, other)
    )
    found = paired_bootstrap([""] * one.sentences, *rates)
    return (
        f"{one.search}: {sum(one.errors)} errors, {other.search}: {sum(other.errors)} "
        f"({sum(one.errors) / max(sum(other.errors), 1):.0%}) in {sum(one.lengths)} words at "
        f"{one.per:.0%}, {one.dropped:.0%}, {one.sharpness:g}; difference "
        f"{found.interval if found else 'unknown'}"
    )


def main() -> None:
    """Build, simulate, tune, decode and print."""
    parser = parser_of(__doc__)
    option = parser.add_argument
    option("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="which searches")
    option("--quick", action="store_true", help="few sentences, one error rate")
    option("--sentences", type=int, default=120, help="test sentences per task (default 120)")
    option("--dev", type=int, default=60, help="development sentences per task (default 60)")
    option("--slow", type=int, default=24, help="test sentences of slow searches (default 24)")
    option("--per", type=float, nargs="+", default=[0.14, 0.19], help="greedy error rates")
    option("--dropped", type=float, nargs="+", default=[0.0, 0.08, 0.2], help="silences left out")
    option("--run", type=Path, help="a trained run whose logits are spliced (default: simulated)")
    option(
        "--sharpness",
        type=float,
        nargs="+",
        default=[1.0],
        help="factors on the logits of --run (default 1)",
    )
    option("--graph", type=Path, help="folder with TLG.fst and words.txt, for the search wfst")
    option(
        "--presets",
        nargs="+",
        choices=tuple(PRESETS),
        default=["accurate", "fast"],
        help="widths of the search flashlight (default accurate fast)",
    )
    option("--demanding", action="store_true", help="also demand every silence")
    option("--order", type=int, default=3, help="order of the n-gram model (default 3)")
    args = parser.parse_args()
    if args.quick:
        args.sentences, args.dev, args.slow, args.per = 24, 12, 4, args.per[:1]
    folder = model_folder(args, args.order)
    about = json.loads((folder / DESCRIPTION).read_text())
    print(f"{about['words']} words, order {about['order']}, perplexity {about['perplexity']:.0f}")
    dev, tests = (make_tasks(args, *of) for of in (("val", args.dev), ("test", args.sentences)))
    frames = sum(map(len, tests[0].logits)) / len(tests[0].logits)
    print(f"{args.sentences} sentences, {frames:.0f} frames each; tuned on {args.dev} others")
    rows: list[Row] = []
    names: list[str] = []
    for name in args.backends:
        if name == "flashlight":
            names += [f"{name} {preset}" for preset in args.presets]
            if args.demanding:
                names += [f"{one}, demanding every silence" for one in names]
        elif name != "wfst" or args.graph:
            names.append(name)
    if "wfst" in args.backends and not args.graph:
        print("wfst: left out, because --graph names no folder with TLG.fst and words.txt")
    for name in names:
        place = args.graph if name == "wfst" else folder
        for row in in_fresh_process(measure, name, place, dev, tests, args.slow):
            if not rows or (rows[-1].search, rows[-1].settings) != (name, row.settings):
                print(
                    f"{name}: tuned to {row.settings}, {row.sentences} sentences, "
                    f"loaded in {row.loading:.1f} s"
                )
            rows.append(row)
            print(show(row), flush=True)
    for first in (row for row in rows if row.search == names[0]):
        for other in rows:
            if [other.search] == names[1:2] and _task(first) == _task(other):
                print(compared(first, other))
    print(f"written to {save(args, 'decoder.json', [dataclasses.asdict(row) for row in rows])}")


if __name__ == "__main__":
    main()
