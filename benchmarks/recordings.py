"""How much does the preset `recordings` resemble the published recordings? Prints the table.

Usage: python benchmarks/recordings.py                    statistics of the whole set, in seconds
       python benchmarks/recordings.py --run runs/preset  also of a run trained on the preset

Without `--run` nothing is written: sentences are planned and attempted, but no electrode is
simulated. Figures of a run are those of its validation trials.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from pathlib import Path

import numpy as np

from b2txt_jax.inference.run import load_run
from b2txt_jax.metrics import ErrorRate, error_rate, greedy_decode, total
from b2txt_jax.simulation import recordings
from b2txt_jax.simulation.plan import (
    LATE,
    RECORDINGS,
    SESSIONS,
    SimulationSettings,
    named_rng,
    plan_sessions,
)
from lm_server.lexicon.text_rules import normalise

Row = tuple[str, str, str]


def of_the_plan(settings: SimulationSettings) -> list[Row]:
    """Return rows of name, published value, simulated value, for what needs no electrodes."""
    plans = plan_sessions(settings)
    rng_of = functools.partial(named_rng, settings)
    person = recordings.participant(rng_of("participant"))
    bins, first, labels, words = [], [], [], []
    texts: dict[tuple[str, bool], list[str]] = {}
    for index, plan in enumerate(plans.values()):
        for block in plan:
            for trial, sentence in enumerate(block.sentences):
                attempt = rng_of("attempt", index, block.number, trial)
                trajectory = recordings.attempt(sentence.labels, person, 1.0, attempt)
                active = np.flatnonzero(trajectory[:, recordings.LATENT_COUNT - 2] > 0.4)
                bins.append(len(trajectory))
                first.append((active[0], len(trajectory) - active[-1]))
                labels.append(len(sentence.labels))
                words.append(len(normalise(sentence.text).split()))
                texts.setdefault((sentence.split, index >= LATE), []).append(sentence.text)
    length = np.array(bins)
    lead, tail = 0.02 * np.median(np.array(first), axis=0)
    train = {*texts["train", False], *texts["train", True]}
    repeated = [100 * np.mean([t in train for t in texts["val", late]]) for late in (False, True)]
    counts = [sum(len(texts[split, late]) for late in (False, True))
              for split in ("train", "val", "test")]  # fmt: skip
    typical = 100 * np.mean((length >= 500) & (length <= 1200))
    return [
        ("sessions", "45", str(len(plans))),
        ("sentences", "8,072 / 1,426 / 1,450", " / ".join(f"{n:,}" for n in counts)),
        ("bins per trial, mean", "875", f"{length.mean():.0f}"),
        ("bins per trial, range", "about 100 to 2,500", f"{length.min()} to {length.max()}"),
        ("trials of 500 to 1,200 bins", "typical", f"{typical:.0f} %"),
        ("labels per sentence", "29.0", f"{np.mean(labels):.1f}"),
        ("words per sentence", "6.62", f"{np.mean(words):.2f}"),
        ("silence before speech, median", "first token at 3.4 s", f"{lead:.1f} s"),
        ("silence after speech, median", "1.7 s", f"{tail:.1f} s"),
        ("val sentences in train, sessions 1-39", "6.9 %", f"{repeated[0]:.1f} %"),
        ("val sentences in train, last six", "43 %", f"{repeated[1]:.1f} %"),
    ]


def of_the_electrodes(settings: SimulationSettings) -> list[Row]:
    """Return rows about how far days are apart: cosines between their tuning."""
    days = recordings.days(SESSIONS, settings.drift, functools.partial(named_rng, settings))

    def cosine(pairs: list[tuple[int, int]]) -> str:
        values = [
            np.vdot(days[a].mixing, days[b].mixing)
            / np.linalg.norm(days[a].mixing)
            / np.linalg.norm(days[b].mixing)
            for a, b in pairs
        ]
        return f"{np.mean(values):.2f}"

    neighbours = list(itertools.pairwise(range(LATE)))
    return [
        ("tuning of neighbouring sessions, cosine", "not published", cosine(neighbours)),
        ("tuning before and after the longest break", "not published", cosine([(38, 39)])),
        ("tuning of the first and last session", "not published", cosine([(0, 44)])),
    ]


def of_a_run(folder: Path) -> list[Row]:
    """Return rows about a trained run: PER by day, and how peaky its posteriors are."""
    blank, sure = [], []
    days: dict[str, list[ErrorRate]] = {}
    for trial in load_run(folder).logits("val"):
        assert trial.labels is not None
        rate = error_rate(trial.labels.tolist(), greedy_decode(trial.logits).tolist())
        days.setdefault(trial.ref.session, []).append(rate)
        odds = np.exp(trial.logits - trial.logits.max(axis=1, keepdims=True))
        blank.append(odds[:, 0] == 1)
        sure.append(odds[:, 0] / odds.sum(axis=1) > 0.999)
    whole = 100 * (total(itertools.chain.from_iterable(days.values())).rate or 0.0)
    by_day = [100 * (total(rates).rate or 0.0) for rates in days.values()]
    return [
        ("val PER of the run", "10.1 % (5 x 768, all sessions)", f"{whole:.1f} %"),
        ("PER by day", "1.4 to 29 %", f"{min(by_day):.1f} to {max(by_day):.1f} %"),
        (
            "frames whose best class is blank",
            "75 %",
            f"{100 * np.mean(np.concatenate(blank)):.0f} %",
        ),
        ("frames with blank above 0.999", "72 %", f"{100 * np.mean(np.concatenate(sure)):.0f} %"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder of a run trained on the preset")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation")
    args = parser.parse_args()
    settings = SimulationSettings(preset=RECORDINGS, seed=args.seed)
    rows = of_the_plan(settings) + of_the_electrodes(settings)
    if args.run is not None:
        rows += of_a_run(args.run)
    print("| | published | simulated |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
