"""How many of the search's errors does a large language model correct, and in what time?

    lm-server prepare-llm --out runs/smollm2
    python benchmarks/rescoring.py --llm runs/smollm2 [--sentences 120] [--per 0.14 0.19]

The task is that of benchmarks/decoder.py: the whole CMU dictionary, a 3-gram model, simulated
logits of the first of its sentences. The 25 and 100 best hypotheses of each sentence are augmented
and scored by the model on one core. alpha and the acoustic scale are tuned on other sentences
(dev). Prints per error rate: WER without and with the model, the share of errors that the model
corrects, the WER of the best hypothesis in the list (oracle), seconds of CPU time per sentence.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from decoding import model_folder, parser_of, simulated
from rapidfuzz.distance import Levenshtein
from rich.progress import track

from lm_server.hypothesis import Hypothesis
from lm_server.rescoring.load import load_scorer
from lm_server.rescoring.ranking import augmented, ranked_answer, sentences_to_score
from lm_server.rescoring.scorer import SentenceScorer
from lm_server.search.load import load_model
from lm_server.settings import Settings

_ALPHAS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
_SCALES = (0.8, 1.0, 1.2, 1.5, 2.0)
_LISTS = (25, 100)


@dataclasses.dataclass
class Task:
    """Sentences, their candidates (augmented), the model's scores and the seconds that it took."""

    truth: list[tuple[str, ...]]
    lists: dict[int, list[tuple[Hypothesis, ...]]]
    scores: list[dict[str, float]]
    seconds: dict[int, float]


def search(folder: Path, logits: Sequence[np.ndarray]) -> list[tuple[Hypothesis, ...]]:
    """The candidates of every sentence."""
    one = load_model(folder).search(Settings())
    found = []
    for frames in track(logits, description="searching", transient=True):
        one.begin()
        one.step(frames)
        found.append(one.finish())
    return found


def prepare(
    truth: list[tuple[str, ...]],
    found: list[tuple[Hypothesis, ...]],
    scorer: SentenceScorer,
    timed: int,
) -> Task:
    """Augment and score. Take the time of each list length on the first `timed` sentences."""
    settings = Settings()
    lists = {count: [augmented(one[:count], settings) for one in found] for count in _LISTS}
    scores: list[dict[str, float]] = [{} for _ in truth]
    seconds = dict.fromkeys(_LISTS, 0.0)
    rows = list(enumerate(scores))
    for index, of in track(rows, description="scoring", transient=True):
        for count in _LISTS:
            sentences = sentences_to_score(lists[count][index], settings)
            if index >= timed:
                sentences = [one for one in sentences if one not in of]
            started = time.process_time()
            if sentences:
                of.update(zip(sentences, scorer.score(sentences).tolist(), strict=True))
            if index < timed:
                seconds[count] += (time.process_time() - started) / timed
    return Task(truth, lists, scores, seconds)


def errors(task: Task, count: int, settings: Settings, rescored: bool) -> int:
    """Word errors of the best candidates."""
    total = 0
    for words, candidates, scores in zip(task.truth, task.lists[count], task.scores, strict=True):
        answer = ranked_answer(candidates, settings, scores if rescored and scores else None)
        total += Levenshtein.distance(words, answer.sentence.split())
    return total


def oracle(task: Task, count: int) -> int:
    """Count the word errors of the candidates nearest to the truth."""
    return sum(
        min((Levenshtein.distance(words, one.words) for one in candidates), default=len(words))
        for words, candidates in zip(task.truth, task.lists[count], strict=True)
    )


def main() -> None:
    """Search, score, tune and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--llm", type=Path, default=Path("runs/smollm2"), help="the model's folder")
    parser.add_argument("--sentences", type=int, default=120, help="held-out sentences")
    parser.add_argument("--dev", type=int, default=60, help="sentences for the choice of settings")
    parser.add_argument("--timed", type=int, default=20, help="sentences whose time is taken")
    parser.add_argument("--per", type=float, nargs="+", default=[0.14, 0.19])
    args = parser.parse_args()
    folder = model_folder(args)
    import torch

    torch.set_num_threads(1)
    scorer = load_scorer(args.llm, "cpu")
    pools = {"dev": ("val", args.dev), "held-out": ("test", args.sentences)}
    for per in args.per:
        tasks = {}
        for name, (pool, count) in pools.items():
            truth, logits, reached = simulated(pool, count, per, args.seed)
            timed = min(args.timed, len(truth)) if name == "held-out" else 0
            tasks[name] = prepare(truth, search(folder, logits), scorer, timed)
            print(f"{name}: {len(truth)} sentences, greedy PER {reached:.1%}", flush=True)
        for count in _LISTS:
            report(tasks, count)


def report(tasks: dict[str, Task], count: int) -> None:
    """Tune on dev and print the held-out figures."""
    grid = [
        dataclasses.replace(Settings(), alpha=alpha, acoustic_scale=scale)
        for alpha, scale in itertools.product(_ALPHAS, _SCALES)
    ]
    # Ties go to the setting nearest to the middle of the grid.
    best = min(grid, key=lambda one: (errors(tasks["dev"], count, one, True), abs(one.alpha - 0.5)))
    plain = min(
        (one for one in grid if one.alpha == 0.0),
        key=lambda one: errors(tasks["dev"], count, one, False),
    )
    task = tasks["held-out"]
    words = sum(map(len, task.truth))
    before, after = errors(task, count, plain, False), errors(task, count, best, True)
    untuned, by_default = (errors(task, count, Settings(), rescored) for rescored in (False, True))
    candidates = np.mean([len(one) for one in task.lists[count]])
    print(
        f"  {count}-best ({candidates:.0f} candidates with the augmented): "
        f"WER {before / words:.1%} (acoustic scale {plain.acoustic_scale:g}) -> "
        f"{after / words:.1%} (alpha {best.alpha:g}, acoustic scale {best.acoustic_scale:g}), "
        f"{1 - after / max(before, 1):.0%} of the errors gone, "
        f"with the defaults {untuned / words:.1%} -> {by_default / words:.1%}, "
        f"{1 - by_default / max(untuned, 1):.0%}; "
        f"oracle {oracle(task, count) / words:.1%}, {task.seconds[count]:.2f} s per sentence",
        flush=True,
    )


if __name__ == "__main__":
    main()
