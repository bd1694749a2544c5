"""How do our search and the laboratory's, of phoneme-to-words-lm, do on the same sentences?

    python benchmarks/peers.py --run runs/demo/run --package ENVIRONMENT/bin/python

Prints WER, n-best oracle, seconds of CPU time per sentence, peak memory and what loading takes, of
both packages with the same n-gram model, lexicon and logits, before any large language model. The
logits are those of benchmarks/spliced_logits.py. Every sentence ends in a silence, as real ones do.

--package names the Python of an environment in which phoneme-to-words-lm is installed as its README
says, with its own flashlight-text. That Python runs benchmarks/peer_driver.py, ours runs it too.

Every row is tuned by as many searches of the same development sentences: acoustic scales and blank
penalties, where lm_weight = ln(10) / acoustic_scale. Where several have equally few errors, those
with the fewest around them are chosen, for either package alike. All else is as the preset or the
package sets it. Sentences are compared as phoneme-to-words-lm writes them (okay for ok, doctor for
dr).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from decoding import best_of, model_folder, parser_of, save
from rapidfuzz.distance import Levenshtein
from simulated_logits import held_out, label
from spliced_logits import TASKS, pieces_of, splice_at

from b2txt_jax.evaluation.intervals import paired_bootstrap
from b2txt_jax.metrics import ErrorRate
from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.lm.reader import LEXICON
from lm_server.protocol import LM_CLASSES, SILENCE
from lm_server.settings import PRESETS

ROWS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    **{f"ours, {name}": ("ours", preset) for name, preset in PRESETS.items()},
    "theirs, its defaults": ("theirs", {}),
    "theirs, beam 100 within 25": ("theirs", {"beam_size": 100, "beam_threshold": 25.0}),
    "theirs, its example of a good point": (
        "theirs",
        {
            "beam_size": 7000,
            "token_beam_size": 21,
            "beam_threshold": 40.0,
            "blank_skip_threshold": 0.999,
        },
    ),
}
"""Package and width of each row."""
COMPARED = ("theirs, its defaults", "ours, accurate")
SCALES, PENALTIES = (0.6, 0.8, 1.2, 1.6), (2.0, 9.0)
"""Acoustic scales, divided by the sharpness of the logits, and blank penalties to choose from, in
ascending order."""
QUICK_SCALES = (0.8, 1.2)


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of a row on a task. Times are CPU seconds, memory is in bytes."""

    row: str
    sharpness: float
    left_out: float
    sentences: int
    wer: float
    oracle: float
    seconds: float
    slowest: float
    peak: int
    libraries: int
    imported: float
    loading: float
    settings: Mapping[str, float]
    errors: Sequence[int]
    lengths: Sequence[int]


class Driver:
    """A process that runs benchmarks/peer_driver.py."""

    def __init__(self, python: str, *arguments: object) -> None:
        script = Path(__file__).with_name("peer_driver.py")
        self.process = subprocess.Popen(
            [python, str(script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.loaded = self._answer()

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Return the answer to a request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self.process.args[0]} ended with exit code {self.process.wait()}"  # type: ignore[index]
            )
        return json.loads(line)


def write_package_files(folder: Path, out: Path) -> None:
    """Write lexicon.txt and tokens.txt for phoneme-to-words-lm from a model folder."""
    lines = (folder / LEXICON).read_text(encoding="utf-8").splitlines()
    with (out / "lexicon.txt").open("w", encoding="utf-8") as file:
        for word, phones in (line.split(" ", 1) for line in lines):
            file.write(f"{word}\t{phones} SIL\n")
    names = ("BLANK", "SIL", *LM_CLASSES[2:])
    (out / "tokens.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def tuned_settings(side: str, scale: float, penalty: float) -> dict[str, float]:
    """Return a scale and a blank penalty in a package's own parameters."""
    if side == "ours":
        return {"acoustic_scale": scale, "blank_penalty": penalty}
    return {"lm_weight": math.log(10) / scale, "blank_penalty": penalty}


def spliced(args: Any, pool: str, count: int, pieces: Any) -> dict[str, tuple[str, np.ndarray]]:
    """Return sentence and logits by a name of pool, sharpness, silences left out, and number."""
    known, found = read_lexicon("cmudict").entries, {}
    truth = held_out(count, args.seed, pool)
    silence = LM_CLASSES.index(SILENCE)
    for sharpness, left_out in TASKS:
        rng = np.random.default_rng(args.seed)
        labels = [label(one, known, left_out, rng) for one in truth]
        labels = [one if one[-1] == silence else [*one, silence] for one in labels]
        logits, _ = splice_at(labels, pieces, args.per, sharpness, args.seed)
        for number, (words, one) in enumerate(zip(truth, logits, strict=True)):
            found[f"{pool} {sharpness} {left_out} {number}"] = (" ".join(words), one)
    return found


def errors_of(truth: Sequence[str], found: Sequence[Sequence[str]], oracle: bool) -> list[int]:
    """Return the word errors of each best hypothesis, or of the one nearest to the truth."""
    return [
        min(
            Levenshtein.distance(words.split(), one.split())
            for one in ((some if oracle else some[:1]) or [""])
        )
        for words, some in zip(truth, found, strict=True)
    ]


def main() -> None:
    """Splice, tune, decode and print."""
    parser = parser_of(__doc__)
    option = parser.add_argument
    option("--run", type=Path, required=True, help="a trained run")
    option("--package", required=True, help="Python that has phoneme-to-words-lm")
    option("--sentences", type=int, default=100, help="test sentences (default 100)")
    option("--dev", type=int, default=40, help="development sentences (default 40)")
    option("--per", type=float, default=0.104, help="greedy PER (default 0.104)")
    option("--quick", action="store_true", help="four searches, without the second kind of logits")
    option("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="(default all)")
    args = parser.parse_args()
    every = 2 if args.quick else 1
    scales = QUICK_SCALES if args.quick else SCALES
    grid = list(itertools.product(scales, PENALTIES))
    folder, pieces = model_folder(args), pieces_of(args.run)
    dev, test = (
        spliced(args, pool, count, pieces)
        for pool, count in (("val", args.dev), ("test", args.sentences))
    )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        write_package_files(folder, Path(work))
        arrays: dict[str, Any] = {name: one for name, (_, one) in (dev | test).items()}
        np.savez(Path(work) / "logits.npz", **arrays)
        model, logits = folder / "lm.bin", Path(work) / "logits.npz"

        def driver(side: str) -> Driver:
            if side == "ours":
                return Driver(sys.executable, side, folder, model, logits)
            return Driver(args.package, side, work, model, logits)

        writer = driver("theirs")

        def written(found: Sequence[Sequence[str]]) -> list[list[str]]:
            """Return lists of sentences as phoneme-to-words-lm writes them."""
            flat: list[str] = writer.ask({"normalise": [one for some in found for one in some]})
            ready = iter(flat)
            return [[next(ready) for _ in some] for some in found]

        for sharpness, left_out in TASKS[::every]:
            task = f" {sharpness} {left_out} "
            print(f"\nlogits x {sharpness:g}, {left_out:.0%} of silences left out")
            print("| search | WER | n-best oracle | s per sentence | peak, of that libraries, MB |")
            print("|---|---|---|---|---|")
            for name in args.rows:
                side, width = ROWS[name]
                one = driver(side)

                def decoded(
                    of: Mapping[str, tuple[str, np.ndarray]],
                    settings: Mapping[str, float],
                    task: str = task,
                    one: Driver = one,
                ) -> tuple[list[str], list[list[str]], dict[str, Any]]:
                    names = [name for name in of if task in name]
                    answer = one.ask({"settings": settings, "sentences": names})
                    truth = [some[0] for some in written([[of[name][0]] for name in names])]
                    return truth, written(answer["found"]), answer

                tried = [
                    {**width, **tuned_settings(side, scale / sharpness, penalty)}
                    for scale, penalty in grid
                ]
                sums = [sum(errors_of(*decoded(dev, settings)[:2], False)) for settings in tried]
                at = best_of(np.array(sums).reshape(len(scales), len(PENALTIES)))
                best = tried[at[0] * len(PENALTIES) + at[1]]
                truth, found, answer = decoded(test, best)
                lengths = [len(words.split()) for words in truth]
                wrong = errors_of(truth, found, False)
                rows.append(
                    Row(
                        *(name, sharpness, left_out, len(truth)),
                        sum(wrong) / sum(lengths),
                        sum(errors_of(truth, found, True)) / sum(lengths),
                        float(np.mean(answer["seconds"])),
                        max(answer["seconds"]),
                        answer["peak"],
                        *(one.loaded[key] for key in ("libraries", "imported", "loading")),
                        best,
                        wrong,
                        lengths,
                    )
                )
                one.close()
                print(show(rows[-1]), flush=True)
            print(difference(rows[-len(args.rows) :]), flush=True)
        writer.close()
    print(f"\nwritten to {save(args, 'peers.json', [dataclasses.asdict(row) for row in rows])}")


def show(row: Row) -> str:
    """Return a row of the table."""
    tuned = ", ".join(
        f"{name} {row.settings[name]:.3g}"
        for name in ("acoustic_scale", "lm_weight", "blank_penalty")
        if name in row.settings
    )
    return (
        f"| {row.row} ({tuned}) | {row.wer:.1%} | {row.oracle:.1%} "
        f"| {row.seconds:.3f}, at most {row.slowest:.2f} "
        f"| {row.peak >> 20}, {row.libraries >> 20}; "
        f"imported in {row.imported:.1f} s, loaded in {row.loading:.1f} s |"
    )


def difference(rows: Sequence[Row]) -> str:
    """Return the difference of the compared rows' WER, paired by sentence."""
    by_name = {row.row: row for row in rows}
    if not all(name in by_name for name in COMPARED):
        return ""
    first, second = (
        [ErrorRate(*one) for one in zip(by_name[name].errors, by_name[name].lengths, strict=True)]
        for name in COMPARED
    )
    found = paired_bootstrap([""] * len(first), first, second)
    return f"{COMPARED[1]} minus {COMPARED[0]}: {found.interval if found else 'unknown'}"


if __name__ == "__main__":
    main()
