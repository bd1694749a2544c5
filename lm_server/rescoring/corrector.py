"""Chats with a causal language model that corrects sentences.

A model with a chat template is asked by it. Another one reads the instruction, the list and
"Sentence:", and goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from lm_server.rescoring.causal_lm import CausalLM
from lm_server.rescoring.correction import messages
from lm_server.rescoring.scorer import RescoringError

Chat = Sequence[Mapping[str, str]]
"""Messages {role, content}."""


def prompt_tokens(model: CausalLM, chat: Chat) -> list[int]:
    """Return the token ids that come before a reply."""
    tokenizer = model.tokenizer
    if not tokenizer.chat_template:
        text = "\n\n".join(one["content"] for one in chat)
        return [*model.start, *tokenizer(f"{text}\n\nSentence:")["input_ids"]]
    try:
        return _templated(tokenizer, chat)
    # Some templates have no system message. Each raises an error of its own.
    except Exception:
        merged = {"role": "user", "content": "\n\n".join(one["content"] for one in chat)}
        try:
            return _templated(tokenizer, [merged])
        except Exception as error:
            raise RescoringError(
                f"the chat template of {model.name} does not take a message of a user ({error}): "
                "use another model"
            ) from error


def _templated(tokenizer: Any, chat: Chat) -> list[int]:
    found: list[int] = tokenizer.apply_chat_template(
        list(chat),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        # Models that think first by default must not. Other templates ignore it.
        enable_thinking=False,
    )
    return found


def reply_tokens(model: CausalLM, reply: str) -> list[int]:
    """Return the token ids of a reply with its end."""
    tokenizer = model.tokenizer
    text = reply if tokenizer.chat_template else f" {reply}"
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, _end(model)]


def reply(model: CausalLM, listed: Sequence[str]) -> tuple[str, str | None]:
    """Return the likeliest reply to a list of sentences, token by token, without chance.

    Returns:
      The reply's first line, and why it cannot be used, as of `correction.OUTCOMES`, or None.
    """
    prompt = prompt_tokens(model, messages(listed))
    # A reply is about as long as a sentence of the list.
    most = 8 + 2 * max(len(reply_tokens(model, one)) for one in listed)
    if model.longest is not None and len(prompt) + most > model.longest:
        return "", "too_long"
    ends = {_end(model)}
    configured = model.network.generation_config.eos_token_id
    ends |= {configured} if isinstance(configured, int) else set(configured or ())
    ids = torch.tensor([prompt], device=model.device)
    with model.lock, torch.inference_mode():
        found = model.network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=most,
                do_sample=False,
                num_beams=1,
                eos_token_id=sorted(ends),
                pad_token_id=_end(model),
            ),
        )[0, len(prompt) :].tolist()
    text = model.tokenizer.decode(found, skip_special_tokens=True).strip()
    if text.startswith("<think>"):
        return "", "unfinished"
    # A plain model may go on with another list after its line.
    line, more, _ = text.partition("\n")
    return line, None if more or (found and found[-1] in ends) else "unfinished"


def _end(model: CausalLM) -> int:
    end = model.tokenizer.eos_token_id
    if end is None:
        raise RescoringError(
            f"the tokenizer of {model.name} has no token that ends a text, so that a reply would "
            "not end: use another model"
        )
    return int(end)
