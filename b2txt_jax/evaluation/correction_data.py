"""Write chats from which a large language model learns to correct n-best lists.

Each line of the file is one trial: {"messages": [system, user, assistant], "trial", "split"}. The
user's message lists what the systems decoded, and the reply is what was said. A system is a run
(its newest result of each split) or a result of `b2txt evaluate`. `lm-server finetune-llm --chats`
learns from the file, `lm-server correct` uses the model.

--mix names the splits in their order. One that is named twice counts twice. What leaks is printed
and written to NAME.about.json. With --folds K --fold I, the sentences of fold I are left out, and
their trials written to NAME.held_out.tsv, for `lm-server correct --refs`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from b2txt_jax.evaluation.consensus import System, read_systems, trial_names
from b2txt_jax.evaluation.results import ResultsError
from b2txt_jax.metrics import ErrorRate, total, word_error_rates
from b2txt_jax.provenance import provenance
from lm_server.files.atomic_file import replacing, require_writable
from lm_server.lexicon.text_rules import normalise
from lm_server.rescoring.correction import candidates, messages

_SPLITS = ("val", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt correction-data`."""
    parser.add_argument(
        "systems", nargs="+", type=Path, metavar="SYSTEM", help="run, or result of `b2txt evaluate`"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=".jsonl to write")
    parser.add_argument(
        "--mix",
        nargs="+",
        choices=_SPLITS,
        default=["val"],
        metavar="SPLIT",
        help="val, train: in their order, such as val train val (default val)",
    )
    parser.add_argument(
        "--nbest",
        type=int,
        metavar="N",
        help="sentences of each system in a list (default: 10 of one system, 1 of several)",
    )
    parser.add_argument(
        "--folds", type=int, default=1, metavar="K", help="parts of the sentences (default 1)"
    )
    parser.add_argument(
        "--fold", type=int, default=0, metavar="I", help="with --folds: left out, 0 to K - 1"
    )


def run(args: argparse.Namespace) -> int:
    """Run `b2txt correction-data`."""
    nbest = (1 if len(args.systems) > 1 else 10) if args.nbest is None else args.nbest
    if nbest < 1 or args.folds < 1 or not 0 <= args.fold < args.folds:
        raise ResultsError(
            f"--nbest is {nbest}, --folds {args.folds}, --fold {args.fold}; needed 1 or more, and "
            "a fold from 0 to K - 1"
        )
    about_file = args.out.with_name(f"{args.out.stem}.about.json")
    held_out_file = args.out.with_name(f"{args.out.stem}.held_out.tsv")
    for path in (args.out, about_file, held_out_file):
        require_writable(path)
    parts = {
        split: read_part(read_systems(args.systems, split), split, nbest)
        for split in dict.fromkeys(args.mix)
    }
    kept, left_out = [], {}
    for split in args.mix:
        for one in parts[split].lists:
            if args.folds > 1 and fold_of(one.said, args.folds) == args.fold:
                left_out[split, one.trial] = one.said
            else:
                kept.append(one)
    # Trials of two splits may have the same name. Those of val are what is measured on.
    measured = "val" if "val" in parts else args.mix[0]
    held_out = {trial: said for (split, trial), said in left_out.items() if split == measured}
    if not kept:
        raise ResultsError("no list is left to learn from; needed more trials, or more --folds")
    with replacing(args.out) as unfinished:
        unfinished.write_text("".join(f"{one.line()}\n" for one in kept), encoding="utf-8")
    if args.folds > 1:
        with replacing(held_out_file) as unfinished:
            lines = "".join(f"{trial}\t{said}\n" for trial, said in held_out.items())
            unfinished.write_text(lines, encoding="utf-8")
    else:  # One of an earlier call names trials that are learned from now.
        held_out_file.unlink(missing_ok=True)
    leaks = leaks_of(parts, args.folds)
    about = {
        "made": provenance(),
        "systems": [str(path.absolute()) for path in args.systems],
        "mix": args.mix,
        "nbest": nbest,
        "folds": args.folds,
        "fold": args.fold,
        "lists": len(kept),
        "held_out": len(held_out),
        "leaks": leaks,
    }
    with replacing(about_file) as unfinished:
        unfinished.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    console = Console()
    for split, part in parts.items():
        without = f"; {part.left_out} trials without" if part.left_out else ""
        console.print(
            f"{split}: {len(part.lists)} lists, WER of their first sentences {part.wer}{without}",
            soft_wrap=True,
        )
    for leak in leaks:
        console.print(f"leak: {leak}", soft_wrap=True, markup=False)
    console.print(f"written: {args.out}, {len(kept)} lists", soft_wrap=True, markup=False)
    return 0


@dataclass(frozen=True)
class TrialList:
    """What a model reads about a trial, and the reply to learn."""

    trial: str
    split: str
    listed: Sequence[str]
    said: str
    """What was said, as it is scored."""

    def line(self) -> str:
        """Return the line of the file."""
        chat = messages(self.listed, self.said)
        about = {"trial": self.trial, "split": self.split}
        return json.dumps({"messages": chat, **about}, ensure_ascii=False)


@dataclass(frozen=True)
class Part:
    """The lists of a split.

    Attributes:
      lists: of the trials for which a system has a sentence.
      left_out: trials for which none has one.
      wer: of the first sentences, over all systems.
      seen: trials whose sentence occurs in the train split. None: unknown.
      contents: evaluation.json of each system.
    """

    lists: tuple[TrialList, ...]
    left_out: int
    wer: ErrorRate
    seen: int | None
    contents: Sequence[Mapping[str, Any]]


def read_part(systems: Sequence[System], split: str, nbest: int) -> Part:
    """Return the lists of several systems' results of one split.

    Raises:
      ResultsError: a system is no result, or what was said is not known.
    """
    names = trial_names(systems)
    results = [one.result for one in systems if one.result is not None]
    without = [one.name for one in systems if one.result is None]
    if without:
        raise ResultsError(
            f"{without[0]} does not have what was said; needed runs, or results of `b2txt evaluate`"
        )
    trials = {one.trial: one for one in results[0].trials}
    unknown = [name for name in names if trials[name].true is None]
    if unknown:
        raise ResultsError(
            f"what was said in {len(unknown)} of {len(names)} trials is not known, first "
            f"{unknown[0]}; needed results of trials with sentences"
        )
    columns = [one.of(names) for one in systems]
    found, firsts = [], []
    for name in names:
        lists = [[text for text, _ in column[name]] for column in columns if name in column]
        said = normalise(trials[name].true or "")
        if lists:
            found.append(TrialList(name, split, candidates(lists, nbest), said))
            firsts += [(said, one[0]) for one in lists]
    true, texts = [said for said, _ in firsts], [text for _, text in firsts]
    seen = [trials[name].seen for name in names]
    return Part(
        tuple(found),
        len(names) - len(found),
        total(word_error_rates(true, texts)),
        None if None in seen else sum(map(bool, seen)),
        [one.content for one in results],
    )


def fold_of(said: str, folds: int) -> int:
    """Return the fold of a sentence, by its words, so that all who say it are in one."""
    return int(hashlib.sha256(said.encode()).hexdigest()[:8], 16) % folds


def leaks_of(parts: Mapping[str, Part], folds: int) -> list[str]:
    """Return what makes lists, or rates measured on them, too good."""
    found = []
    train, val = parts.get("train"), parts.get("val")
    if train:
        found.append(
            "the decoders were trained on the sentences of the train lists, whose first sentences "
            f"have a WER of {train.wer}"
            + (f" instead of {val.wer} of val" if val else "")
            + ". A model that learns from them alone learns to change too little"
        )
    if val:
        chosen = sum(one["checkpoint"].get("validations", 0) > 0 for one in val.contents)
        if chosen:
            found.append(
                f"{chosen} of {len(val.contents)} checkpoints were chosen for their PER of val, "
                "whose lists are a little too good"
            )
        tuned = [one["checkpoint"].get("decoder_settings") or {} for one in val.contents]
        on_val = sum((one.get("tuned_for") or {}).get("split") == "val" for one in tuned)
        if on_val:
            found.append(f"the decoder's settings of {on_val} systems were tuned on val")
        if train and val.seen:
            found.append(
                f"{val.seen} of {len(val.lists) + val.left_out} val sentences occur in the train "
                "split too: a model can learn them by heart"
            )
        alone = "test alone (for a rate on val, see --folds)"
        found.append(
            "a model that learned from val has its honest WER on "
            + ("the fold that is left out, and on test" if folds > 1 else alone)
        )
    return found
