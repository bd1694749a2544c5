"""Adapt a large language model to a person's sentences by LoRA.

It learns what rescoring scores: the same tokens, in the same text form, without dropout. A sentence
is held out or learned from by its own words, so that no sentence is on both sides, however often it
is said. The weights are merged, so that the result is a folder like any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from transformers import AutoConfig

from lm_server.files.atomic_file import replacing, require_writable
from lm_server.lexicon.text import find_texts, read_words
from lm_server.rescoring.causal_lm import DESCRIPTION, CausalLM, find_model
from lm_server.rescoring.scorer import RescoringError

_WARM_UP = 10
"""Steps in which the learning rate rises."""


@dataclass(frozen=True)
class Course:
    """How to learn.

    Attributes:
      epochs: times that every sentence is learned from.
      rank: of the adapters. They are scaled by 2.
      learning_rate: greatest. It falls to 0 over all steps.
      batch: sentences of one step.
      held_out: share of the sentences that measure.
      seed: of the adapters' start and the order of sentences.
    """

    epochs: int = 3
    rank: int = 16
    learning_rate: float = 2e-4
    batch: int = 16
    held_out: float = 0.1
    seed: int = 0


def finetune(
    folder: Path | str,
    texts: Sequence[Path],
    out: Path,
    course: Course,
    device: str = "auto",
    text_form: str = "auto",
    dtype: str = "auto",
    inputs: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> list[float]:
    """Write the model of the epoch with the least perplexity of held-out words.

    After every epoch the state is kept in OUT.unfinished, from which the same call resumes.

    Args:
      folder: the model to adapt.
      texts: files or folders of sentences.
      out: folder to write, new or made by this function.
      course: how to learn.
      device: auto, cpu or cuda.
      text_form: auto (as the folder states), plain or sentence.
      dtype: auto (bfloat16 on a GPU, float32 on a CPU), or as for `load.load_scorer`.
      inputs: fingerprints of all that the result depends on. Only a run with the same is resumed.
      console: shows the perplexities.

    Returns:
      Perplexity per held-out word before, and after every epoch.

    Raises:
      RescoringError: the model cannot be adapted, the sentences are too few, no epoch is better
        than the model was, or `out` cannot be written.
      TextError: a text cannot be read.
    """
    if out.exists() and not (out / DESCRIPTION).is_file():
        raise RescoringError(f"{out} is there and was not made by this command: choose another")
    require_writable(out.parent / DESCRIPTION)
    console = console or Console(stderr=True)
    learned, held_out = split(read_sentences(texts), course.held_out)
    path = find_model(folder)
    gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if dtype == "auto":
        dtype = "bfloat16" if gpu else "float32"
    model = CausalLM(path, device, text_form, dtype)
    unfinished = out.with_name(f"{out.name}.unfinished")
    kept = _kept(unfinished, dict(inputs or {}))
    perplexities: list[float] = kept.get("perplexities") or [_perplexity(model, held_out)]
    torch.manual_seed(course.seed)
    adapted = peft.get_peft_model(
        model.network,
        peft.LoraConfig(
            r=course.rank,
            lora_alpha=2 * course.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    ).eval()
    weights = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
    optimiser = torch.optim.AdamW(weights.values(), lr=course.learning_rate)
    best = kept.get("best") or {}
    if kept:
        _load(weights, kept["weights"])
        optimiser.load_state_dict(kept["optimiser"])
    else:
        console.print(
            f"{len(learned)} sentences, and {len(held_out)} held out with perplexity "
            f"{perplexities[0]:.2f} per word"
        )
    for epoch in range(len(perplexities) - 1, course.epochs):
        _learn(model, optimiser, learned, course, epoch)
        perplexities.append(_perplexity(model, held_out))
        console.print(f"epoch {epoch + 1}: perplexity {perplexities[-1]:.2f}")
        now = {name: one.detach().cpu().clone() for name, one in weights.items()}
        if perplexities[-1] < min(perplexities[:-1]):
            best = now
        state = {"inputs": dict(inputs or {}), "perplexities": perplexities, "best": best}
        with replacing(unfinished) as temporary:
            torch.save({**state, "weights": now, "optimiser": optimiser.state_dict()}, temporary)
    if not best:
        unfinished.unlink(missing_ok=True)
        raise RescoringError(
            f"no epoch has a lower perplexity of held-out words than the model itself "
            f"({perplexities[0]:.2f}, then {min(perplexities[1:]):.2f} at best), and nothing is "
            "written: give more text, or lower --learning-rate or --epochs"
        )
    _load(weights, best)
    merged: Any = adapted.merge_and_unload()
    merged.to(AutoConfig.from_pretrained(path, local_files_only=True).dtype or torch.float32)
    description = {
        "text_form": model.text_form,
        "from": path.name,
        "perplexities": [round(one, 3) for one in perplexities],
    }
    _write(out, merged, model.tokenizer, description)
    unfinished.unlink(missing_ok=True)
    return perplexities


def read_sentences(texts: Sequence[Path]) -> list[str]:
    """Return the sentences of texts as a search writes them. What is said twice is there twice.

    Raises:
      TextError: a text cannot be read.
    """
    return [" ".join(words) for words, _ in read_words(find_texts(texts)) if words]


def split(sentences: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Return the sentences to learn from, and about a `share` of the different ones, held out.

    Raises:
      RescoringError: one of both is empty.
    """

    def is_held_out(sentence: str) -> bool:
        return int(hashlib.sha256(sentence.encode()).hexdigest()[:8], 16) < share * 16**8

    learned = [one for one in sentences if not is_held_out(one)]
    held_out = [one for one in dict.fromkeys(sentences) if is_held_out(one)]
    if not learned or not held_out:
        raise RescoringError(
            f"of {len(sentences)} sentences {len(learned)} are to learn from and {len(held_out)} "
            "held out; needed some of both: give more text, or another --held-out"
        )
    return learned, held_out


def _perplexity(model: CausalLM, sentences: Sequence[str]) -> float:
    """Return the perplexity per word."""
    total = float(model.score(sentences).sum())
    return math.exp(-total / sum(len(one.split()) for one in sentences))


def _learn(
    model: CausalLM,
    optimiser: torch.optim.Optimizer,
    sentences: Sequence[str],
    course: Course,
    epoch: int,
) -> None:
    """Learn from every sentence once."""
    tokens = model.tokens(sentences, ending=model.endings[0])
    order = torch.randperm(
        len(tokens), generator=torch.Generator().manual_seed(course.seed * 1000 + epoch)
    ).tolist()
    steps = math.ceil(len(tokens) / course.batch)
    for number, start in enumerate(range(0, len(order), course.batch), epoch * steps):
        left = 1 - number / (course.epochs * steps)
        for group in optimiser.param_groups:
            group["lr"] = course.learning_rate * min(left, (number + 1) / _WARM_UP)
        batch = [tokens[index] for index in order[start : start + course.batch]]
        optimiser.zero_grad()
        loss = -model.sums(batch).sum() / sum(len(one) - 1 for one in batch)
        if not torch.isfinite(loss):
            raise RescoringError(
                f"{model.name} diverges in epoch {epoch + 1}: lower --learning-rate"
            )
        loss.backward()
        optimiser.step()


def _load(weights: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, one in weights.items():
            one.copy_(values[name])


def _kept(path: Path, inputs: dict[str, str]) -> dict[str, Any]:
    """Return the state of an interrupted run. Empty: there is none.

    Raises:
      RescoringError: it cannot be read, or had other inputs.
    """
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = torch.load(path, weights_only=True)
        before: dict[str, str] = found["inputs"]
    # A damaged file makes torch fail in any way.
    except Exception as error:
        raise RescoringError(f"{path} cannot be read ({error}): delete it") from error
    other = [name for name in {*inputs, *before} if inputs.get(name) != before.get(name)]
    if other:
        raise RescoringError(
            f"{path} is of an interrupted run with another {', '.join(sorted(other))}: repeat the "
            "command of that run to finish it, or delete the file"
        )
    return found


def _write(out: Path, network: Any, tokenizer: Any, description: Mapping[str, Any]) -> None:
    temporary = out.with_name(f".{out.name}.partial")
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            shutil.rmtree(temporary, ignore_errors=True)
            network.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / DESCRIPTION).write_text(json.dumps(description) + "\n", encoding="utf-8")
            shutil.rmtree(out, ignore_errors=True)
            temporary.rename(out)
    except OSError as error:
        raise RescoringError(
            f"cannot write {out} ({error}): choose a place that you may write to"
        ) from error
