"""How much of the gap to a fully trained day does calibration close? Does self-calibration hold?

    python benchmarks/calibration.py --workdir runs/demo/run --data runs/demo/data [--lm LM]

Continues the simulation that a run was trained on (`--data`, a folder of `b2txt simulate`) with
days that drift on from its last one, for each seed:

- one day further away (--step-drift, 1 is the distance between the training days). The PER of its
  held-out sentences with the nearest old layer, after `calibrate` with --sentences sentences, and
  with a layer trained long on all of its --train sentences, which stands for a fully trained day.
  Old days' PER before and after.
- --days days, each --daily-drift further. The PER, and with --lm the WER, of each decoded with the
  last layer: without change, and with self-calibration that is certain of what it learns from.
- the last trained day without drift, decoded both ways.
- with --parts within, one day of --within-sentences that begins as the last trained one and is
  --within-drift away at its end, decoded both ways. Its PER is that of its quarters.

Self-calibration needs the language model's confidence. Without --lm its text and its confidence
come from the truth: a sentence counts where its PER is below --known, with the greedy phonemes as
label. That is an optimistic stand-in, and the output says so. With --confirmed every sentence
counts with its true phonemes, as where a user confirms or corrects each.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from b2txt_jax.calibration.calibrate import (
    Material,
    Settings,
    calibrate,
    evenly,
    separated,
    spoken,
)
from b2txt_jax.calibration.follow import Follower, FollowSettings
from b2txt_jax.calibration.moving import ADAPTS
from b2txt_jax.calibration.trials import Spoken, batch_of, shape_for
from b2txt_jax.data.reader import open_folder
from b2txt_jax.evaluation.command import language_model
from b2txt_jax.inference.run import Run, load_run
from b2txt_jax.live.words import Words
from b2txt_jax.metrics import error_rate, greedy_decode, total, word_error_rates
from b2txt_jax.phonemes import sentence_to_ids
from b2txt_jax.simulation import neural, recordings, speech
from b2txt_jax.simulation.corpus import load_pool
from b2txt_jax.simulation.plan import RECORDINGS, SESSIONS, SimulationSettings, named_rng
from b2txt_jax.simulation.write import SETTINGS_FILE, modulation
from b2txt_jax.training.step import make_eval_step
from lm_server.lexicon.text_rules import normalise


@dataclass(frozen=True)
class Sentence:
    """A simulated sentence of a further day."""

    text: str
    features: np.ndarray
    labels: np.ndarray


PARTS = ("gap", "days", "within")
Electrodes = neural.Tuning | recordings.Day


class Simulation:
    """The simulated participant of a run, on further days."""

    def __init__(self, data: Path, days: int) -> None:
        """`days`: of the run, the last of which further days drift from."""
        found = json.loads((data / SETTINGS_FILE).read_text())
        found.pop("format", None)
        self.settings = SimulationSettings(**found)
        self._rng_of = functools.partial(named_rng, self.settings)
        self.last: Electrodes
        if self.settings.preset == RECORDINGS:
            self.last = recordings.days(SESSIONS[:days], self.settings.drift, self._rng_of)[-1]
        else:
            drift = _scaled(self.settings.drift)
            self.last = neural.first_tuning(self._rng_of("tuning"))
            for day in range(1, days):
                self.last = neural.next_tuning(self.last, drift, self._rng_of("drift", day))
        fits = range(self.settings.min_words, self.settings.max_words + 1)
        self.sentences = []
        for text, _ in load_pool("val"):  # of which the language model has seen none
            words = normalise(text).split()
            with contextlib.suppress(ValueError):
                if len(words) in fits:
                    self.sentences.append((" ".join(words), sentence_to_ids(words)))

    def later(self, day: Electrodes, distance: float, seed: int) -> Electrodes:
        """Return the electrodes of a day at a distance from another."""
        rng = np.random.default_rng([7, seed])
        if isinstance(day, recordings.Day):
            return recordings.next_day(day, distance, rng)
        return neural.next_tuning(day, _scaled(distance), rng)

    def said(self, days: Sequence[Electrodes], seed: int) -> list[Sentence]:
        """Return a sentence for each of the electrodes, all in one block."""
        rng = np.random.default_rng([8, seed])
        chosen = [self.sentences[i] for i in rng.integers(len(self.sentences), size=len(days))]
        labels = iter([one for _, one in chosen])
        trials: list[np.ndarray] = []
        for number, (_, same) in enumerate(itertools.groupby(days, key=id)):
            of_day = list(same)
            some = [next(labels) for _ in of_day]
            trials += self._recorded(some, of_day[0], (1000 + seed, number), rng)
        features = neural.written(np.concatenate(trials), self.settings.electrodes)
        neural.z_score(features)
        parts = np.split(features, np.cumsum([len(one) for one in trials])[:-1])
        return [Sentence(t, x, labels) for (t, labels), x in zip(chosen, parts, strict=True)]

    def _recorded(
        self,
        labels: Sequence[np.ndarray],
        day: Electrodes,
        place: tuple[int, int],
        rng: np.random.Generator,
    ) -> list[np.ndarray]:
        """Return the raw features of sentences on one day, [T, 512] each."""
        rate, strength = self.settings.speaking_rate, modulation(self.settings.difficulty)
        if isinstance(day, recordings.Day):
            bursts = self.settings.bursts
            return recordings.record_block(labels, day, strength, rate, bursts, place, self._rng_of)
        table = speech.articulation()
        moves = [speech.attempt(one, table, rate, rng) for one in labels]
        features = neural.record(moves, day, strength, rng)
        return np.split(features, np.cumsum([len(one) for one in moves])[:-1])


def _scaled(distance: float) -> neural.Drift:
    whole = neural.Drift()
    return neural.Drift(*(distance * value for value in dataclasses.astuple(whole)))


def of_day(sentences: Sequence[Sentence], day: int) -> list[Spoken]:
    return [Spoken(day, one.features, one.labels) for one in sentences]


def gap(run: Run, simulation: Simulation, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return what calibration with few sentences closes of the gap to all of them."""
    tuning = simulation.later(simulation.last, args.step_drift, seed)
    said = simulation.said([tuning] * (args.train + args.val), 100 + seed)
    day = len(run.sessions)
    new, val = of_day(said[: args.train], day), of_day(said[args.train :], day)
    data = run.config.data
    reader = open_folder(data.root, data.feature_count, run.config.signal)
    old = [(reader, reader.find_trials([name], "train")) for name in run.sessions]
    refs = evenly([reader.find_trials([name], "val") for name in run.sessions], args.old_val)
    old_val = [one for at, some in enumerate(refs) for one in spoken(reader, some, at)]
    settings = Settings(
        adapt=args.adapt,
        rank=args.rank,
        steps=args.steps,
        rows=args.rows,
        replay=args.replay,
        shared_rate=args.shared_rate,
        adapter_rate=args.adapter_rate,
        old_rise=args.old_rise,
        seed=seed,
    )
    few = calibrate(run, "new", Material(new[: args.sentences], val, old, old_val), settings).report
    # What stands for a fully trained day has nothing to spare.
    long = dataclasses.replace(settings, steps=args.long_steps, old_rise=np.inf)
    full = calibrate(run, "new", Material(new, val, old, old_val), long).report
    before, after, best = few["per"]["before"], few["per"]["after"], full["per"]["after"]
    return {
        "before": before,
        "after": after,
        "fully_trained": best,
        "closed": (before - after) / (before - best),
        "old_before": few["old_days"]["before"],
        "old_after": few["old_days"]["after"],
        "kept_share": few["old_days"]["kept_share"],
        "seconds": few["seconds"],
    }


class Decoder:
    """Logits with changing parameters, and text where there is a language model."""

    def __init__(self, run: Run, words: Words | None, known: float) -> None:
        self._day, self._words, self._known = len(run.sessions) - 1, words, known
        self._step = jax.jit(make_eval_step(run.config, len(run.sessions)))

    def shape(self, sentences: Sequence[Sentence]) -> None:
        """Fix the shape of all calls."""
        self._shape = shape_for(of_day(sentences, self._day), 1)

    def decode(
        self, params: Any, one: Sentence
    ) -> tuple[Any, str | None, np.ndarray | None, float]:
        """Return the phoneme errors, the text, the label that is taken as known, and how certain it
        is."""
        batch = batch_of(of_day([one], self._day), self._shape)
        output = self._step(params, batch)
        logits = np.asarray(output.logits)[0, : int(output.frames[0])]
        found = greedy_decode(logits)
        rate = error_rate(one.labels.tolist(), found.tolist())
        if self._words is None:
            certain = 1.0 if (rate.rate or 0.0) <= self._known else 0.0
            return rate, None, found, certain
        self._words.begin()
        self._words.send(logits)
        answer = self._words.finalize()
        try:
            label = sentence_to_ids(normalise(answer.sentence).split())
        except ValueError:
            label = None
        return rate, answer.sentence, label, answer.confidence or 0.0


def over_days(
    run: Run,
    decoder: Decoder,
    days: Sequence[Sequence[Sentence]],
    settings: FollowSettings | None,
    confirmed: bool,
) -> dict[str, Any]:
    """Decode days one after the other, with self-calibration or without."""
    day = len(run.sessions) - 1
    follower = Follower(run, day, settings) if settings else None
    pers, pairs, used, kept = [], [], 0, 0
    by_day = []
    for sentences in days:
        rates = []
        for one in sentences:
            params = follower.params if follower else run.params
            rate, text, label, certain = decoder.decode(params, one)
            rates.append(rate)
            if confirmed:
                label, certain = one.labels, 1.0
            if text is not None:
                pairs.append((one.text, text))
            usable = label is not None and len(label) > 0
            if follower and settings and usable and certain >= settings.confidence:
                used += 1
                kept += follower.update(one.features, label).kept
        pers += rates
        by_day.append(total(rates).rate)
    found = {"per": total(pers).rate, "per_by_day": by_day, "used": used, "kept": kept}
    if pairs:
        found["wer"] = total(word_error_rates(*map(list, zip(*pairs, strict=True)))).rate
    return found


def streams(
    simulation: Simulation, args: argparse.Namespace, seed: int
) -> dict[str, list[list[Sentence]]]:
    """Return what is decoded with and without self-calibration: a list of days each."""
    found = {}
    if "days" in args.parts:
        tuning, days = simulation.last, []
        for day in range(args.days):
            tuning = simulation.later(tuning, args.daily_drift, 1000 * seed + day)
            days.append(simulation.said([tuning] * args.per_day, 1000 * seed + 500 + day))
        found["drift"] = days
        same = [simulation.last] * args.per_day
        found["no drift"] = [simulation.said(same, 1000 * seed + 900)]
    if "within" in args.parts:
        # One seed, so that distances lie on one path.
        way = np.linspace(0, args.within_drift, args.within_sentences)
        course = [simulation.later(simulation.last, at, 1000 * seed + 700) for at in way]
        said = simulation.said(course, 1000 * seed + 700)
        edges = np.linspace(0, len(said), 5).astype(int)
        found["within a day"] = [said[a:b] for a, b in itertools.pairwise(edges)]
    return found


@contextlib.contextmanager
def words_of(lm: Path | None) -> Iterator[Words | None]:
    if lm is None:
        yield None
        return
    with Words(functools.partial(language_model, None, lm, options=[])) as words:
        yield words


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--workdir", type=Path, required=True, help="a run trained on --data")
    option("--data", type=Path, required=True, help="folder of `b2txt simulate`")
    option("--lm", type=Path, help="model folder: text and confidence of self-calibration, WER")
    option("--seeds", type=int, nargs="+", default=[0, 1, 2])
    option("--parts", nargs="+", default=["gap", "days"], choices=PARTS)
    option("--step-drift", type=float, default=1.0)
    option("--daily-drift", type=float, default=0.3)
    option("--sentences", type=int, default=20)
    option("--train", type=int, default=120)
    option("--val", type=int, default=30)
    option("--old-val", type=int, default=50)
    option("--days", type=int, default=10)
    option("--per-day", type=int, default=30, help="sentences of each drifting day")
    option("--within-drift", type=float, default=1.0)
    option("--within-sentences", type=int, default=60)
    option("--adapt", choices=ADAPTS, help="of calibrate, as the next ones")
    option("--rank", type=int, default=Settings.rank)
    option("--replay", type=float, default=Settings.replay)
    option("--shared-rate", type=float, default=Settings.shared_rate)
    option("--adapter-rate", type=float, default=Settings.adapter_rate)
    option("--old-rise", type=float, default=Settings.old_rise)
    option("--steps", type=int, default=Settings.steps)
    option("--long-steps", type=int, default=400)
    option("--rows", type=int, default=Settings.rows)
    option("--confidence", type=float, default=FollowSettings.confidence)
    option("--day-rate", type=float, default=FollowSettings.day_rate)
    option("--follow-steps", type=int, default=FollowSettings.steps)
    option("--follow-shared-rate", type=float, default=FollowSettings.shared_rate)
    option("--follow-adapt", help="of self-calibration: day or patch (default: as b2txt stream)")
    option("--known", type=float, default=0.3, help="PER of a sentence that counts without --lm")
    option("--confirmed", action="store_true", help="every sentence counts, with its true label")
    option("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    run = load_run(args.workdir)
    # As in `b2txt stream`, days that share everything get a layer each, but with patch.
    followed = separated(run, args.follow_adapt)
    simulation = Simulation(args.data, len(run.sessions))
    result: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(args).items()}, "seeds": {}}
    with words_of(args.lm) as words:
        for seed in args.seeds:
            found: dict[str, Any] = {}
            if "gap" in args.parts:
                found["gap"] = one = gap(run, simulation, args, seed)
                print(f"seed {seed}: {json.dumps(one)}", flush=True)
            decoded = streams(simulation, args, seed)
            if decoded:
                decoder = Decoder(followed, words, args.known)
                decoder.shape([one for days in decoded.values() for some in days for one in some])
                follow = FollowSettings(
                    adapt=args.follow_adapt,
                    confidence=args.confidence,
                    day_rate=args.day_rate,
                    shared_rate=args.follow_shared_rate,
                    steps=args.follow_steps,
                )
                for name, days in decoded.items():
                    for kind, settings in (("fixed", None), ("following", follow)):
                        one = over_days(followed, decoder, days, settings, args.confirmed)
                        found[f"{name}, {kind}"] = one
                        print(f"seed {seed}, {name}, {kind}: {json.dumps(one)}", flush=True)
            result["seeds"][seed] = found
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.lm is None and not args.confirmed and {"days", "within"} & {*args.parts}:
        print("without --lm: sentences were taken as known by their true PER, an optimistic choice")


if __name__ == "__main__":
    main()
