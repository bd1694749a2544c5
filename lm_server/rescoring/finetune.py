"""Adapt a large language model to a person's sentences, or to correcting them, by LoRA.

It learns what rescoring scores: the same tokens, in the same text form, without dropout. Of a chat
it learns the reply alone. A sentence, or a reply, is held out or learned from by its own words, so
that none is on both sides, however often it is said. The weights are merged, so that the result is
a folder like any other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig

from lm_server.files.atomic_file import regular, replacing
from lm_server.lexicon.text import find_texts, read_words
from lm_server.rescoring.causal_lm import CausalLM
from lm_server.rescoring.corrector import Chat, prompt_tokens, reply_tokens
from lm_server.rescoring.llm_folder import replacing_llm, require_llm_folder
from lm_server.rescoring.scorer import RescoringError, find_model

_WARM_UP = 10
"""Steps in which the learning rate rises."""


@dataclass(frozen=True)
class Sentences:
    """Sentences as a search writes them. What is said twice is there twice."""

    texts: tuple[str, ...]

    def split(self, share: float) -> tuple[Sentences, Sentences]:
        """Return what to learn from, and about a `share` of the different ones, held out."""
        learned, held_out = split(self.texts, share)
        return Sentences(tuple(learned)), Sentences(tuple(held_out))

    def sequences(self, model: CausalLM) -> list[tuple[Sequence[int], int]]:
        """Return the token ids of each, and the first token that is learned."""
        return [(one, 1) for one in model.tokens(self.texts, ending=model.endings[0])]

    def perplexity(self, model: CausalLM) -> float:
        """Return the perplexity per word."""
        total = float(model.score(self.texts).sum())
        return math.exp(-total / sum(len(one.split()) for one in self.texts))

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Chats:
    """Messages {role, content}, of which the last is the reply to learn."""

    chats: tuple[Chat, ...]

    def split(self, share: float) -> tuple[Chats, Chats]:
        """Return what to learn from, and the chats of about a `share` of the replies, held out."""
        replies = [one[-1]["content"] for one in self.chats]
        held_out = set(split(replies, share)[1])
        sides: tuple[list[Chat], list[Chat]] = ([], [])
        for chat, one in zip(self.chats, replies, strict=True):
            sides[one in held_out].append(chat)
        return Chats(tuple(sides[0])), Chats(tuple(sides[1]))

    def sequences(self, model: CausalLM) -> list[tuple[Sequence[int], int]]:
        """Return the token ids of each, and the first token of its reply.

        Raises:
          RescoringError: a chat is longer than the model can read.
        """
        found: list[tuple[Sequence[int], int]] = []
        for chat in self.chats:
            prompt = prompt_tokens(model, chat[:-1])
            whole = [*prompt, *reply_tokens(model, chat[-1]["content"])]
            if model.longest is not None and len(whole) > model.longest:
                raise RescoringError(
                    f"a chat has {len(whole)} tokens; {model.name} reads at most {model.longest}: "
                    "make shorter lists with `b2txt correction-data --nbest`"
                )
            found.append((whole, len(prompt)))
        return found

    def perplexity(self, model: CausalLM) -> float:
        """Return the perplexity per word of the replies."""
        total = 0.0
        with torch.inference_mode():
            for tokens, first in self.sequences(model):
                total += float(model.sums([tokens], [first]))
        return math.exp(-total / sum(len(one[-1]["content"].split()) or 1 for one in self.chats))

    def __len__(self) -> int:
        return len(self.chats)


@dataclass(frozen=True)
class Course:
    """How to learn.

    Attributes:
      epochs: times that every sentence or chat is learned from.
      rank: of the adapters. They are scaled by 2.
      learning_rate: greatest. It falls to 0 over all steps.
      batch: sentences or chats of one step.
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
    material: Sentences | Chats,
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
      material: what to learn from, and what is held out of it.
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
    """
    import peft  # seconds: whoever only reads sentences does not wait for it

    require_llm_folder(out)
    console = console or Console(stderr=True)
    learned, held_out = material.split(course.held_out)
    path = find_model(folder)
    gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if dtype == "auto":
        dtype = "bfloat16" if gpu else "float32"
    model = CausalLM(path, device, text_form, dtype)
    unfinished = out.with_name(f"{out.name}.unfinished")
    kept = _kept(unfinished, dict(inputs or {}))
    perplexities: list[float] = kept.get("perplexities") or [held_out.perplexity(model)]
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
            f"{len(learned)} to learn from, and {len(held_out)} held out with perplexity "
            f"{perplexities[0]:.2f} per word"
        )
    for epoch in range(len(perplexities) - 1, course.epochs):
        _learn(model, optimiser, learned, course, epoch)
        perplexities.append(held_out.perplexity(model))
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
            "written: give more to learn from, or lower --learning-rate or --epochs"
        )
    _load(weights, best)
    merged: Any = adapted.merge_and_unload()
    merged.to(AutoConfig.from_pretrained(path, local_files_only=True).dtype or torch.float32)
    description = {
        "text_form": model.text_form,
        "from": path.name,
        "perplexities": [round(one, 3) for one in perplexities],
    }
    with replacing_llm(out, description) as written:
        merged.save_pretrained(written)
        model.tokenizer.save_pretrained(written)
    unfinished.unlink(missing_ok=True)
    return perplexities


def read_sentences(texts: Sequence[Path]) -> Sentences:
    """Read the sentences of files or folders of text.

    Raises:
      TextError: a text cannot be read.
    """
    return Sentences(tuple(" ".join(words) for words, _ in read_words(find_texts(texts)) if words))


def read_chats(path: Path) -> Chats:
    """Read JSON lines {"messages": [{"role", "content"}, ...]} that end with a reply.

    Raises:
      RescoringError: the file cannot be read, or a line is none.
    """
    needed = (
        'needed lines {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", '
        '"content": TEXT}]}, as `b2txt correction-data` writes them'
    )
    try:
        lines = regular(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RescoringError(f"{path} cannot be read ({error}): {needed}") from error
    found: list[Chat] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            chat = json.loads(line)["messages"]
            if len(chat) < 2 or chat[-1]["role"] != "assistant":
                raise ValueError("no reply")
            found.append([{key: str(one[key]) for key in ("role", "content")} for one in chat])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RescoringError(f"{path} line {number} is {line[:60]!r}: {needed}") from error
    return Chats(tuple(found))


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
            "held out; needed some of both: give more, or another --held-out"
        )
    return learned, held_out


def _learn(
    model: CausalLM,
    optimiser: torch.optim.Optimizer,
    material: Sentences | Chats,
    course: Course,
    epoch: int,
) -> None:
    """Learn from everything once."""
    tokens = material.sequences(model)
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
        sums = model.sums([one for one, _ in batch], [first for _, first in batch])
        loss = -sums.sum() / sum(len(one) - first for one, first in batch)
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
