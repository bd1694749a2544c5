"""Sentence log-probabilities under any causal language model that transformers can load.

A score is defined as in the published server: the sum of the tokens' log-probabilities from the
second token on. OPT's first token is `</s>`. Where a tokenizer puts no such token first, one is
added, so that the first word counts with every model.

Candidates of one sentence are near-copies of each other. Their tokens are laid out as a tree in
one sequence, in which a token sees its own ancestors alone, so that what candidates begin with
alike is computed once. What all of them begin with (the context above all) is computed first and
kept as keys and values. Models that cannot do that score batches of whole sentences.

Sentences that a search has asked about while they grew (`lm_server.rescoring.growing`) are scored
from what was read then.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

# Nothing may be downloaded, and a wrong folder name must not be looked for on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_server.rescoring.packing import pack
from lm_server.rescoring.scorer import RescoringError, find_model
from lm_server.rescoring.token_tree import Tree, batches, shared_length, trees

_LOG = logging.getLogger(__name__)
TOKENS_PER_BATCH = 512
"""Tokens that go through the model at once. Bounds its memory (50,000 logits per token)."""
_LEAST_BATCH = 32
DESCRIPTION = "rescoring.json"
"""File in a model folder with how to use it: {"text_form": "plain" | "sentence"}."""
ENDINGS = {"plain": ("",), "sentence": (".", "?", "!")}
"""By text form, the endings of which the likeliest counts. They cost next to nothing: the model
runs as far as the last word for one as for three."""
_BITS = ("int8", "int4")
"""Numbers that are quantised, of 8 and 4 bits."""
_PROBE = ("the cat sat on the mat", "the cat sat on a mat", "a dog")
_PROBE_CONTEXT = "we talk of animals"
_DISTINCT = (*"abcdefghijklmnopqrstuvwxyz", "its", "it's", "the dog bit", "the bit dog", *_PROBE)
"""Sentences of all signs that a search writes, each of which must have tokens of its own."""
_TOLERANCE = 0.02
"""Relative difference between both ways of scoring the probe, which rounding in half precision
may cause. A model that cannot do trees is off by far more."""
_REMEMBERED = 4
"""Searches whose sentences may wait for their rescoring while what was read of them is kept."""
_LEAST_KNOWN = 0.5
"""Share of a sentence's tokens that must have been read during a search to make use of it."""
_LEAST_SHARED = 1
"""First tokens that must have been read for the other sentences of a batch."""


class Read(Protocol):
    """What the model has read during one search."""

    def known(self, sequence: Sequence[int]) -> int:
        """Return how many of the first tokens have been read."""

    def of_tokens(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Return the log-probability (ln) of every sequence."""


class CausalLM:
    """A model in memory with its tokenizer, a `SentenceScorer`.

    Attributes:
      name: its folder's name.
      network, tokenizer: as transformers loads them.
      start: the token to put before every text, if the tokenizer does not.
      longest: tokens that it can read. None: not known.
      trees: whether it accepts positions and masks of ours.
      lock: held while it works, since it works for one thread at a time.
      tokens_per_batch: tokens that go through it at once.
    """

    def __init__(
        self,
        folder: Path | str,
        device: str = "auto",
        text_form: str = "auto",
        dtype: str = "auto",
    ) -> None:
        """Load the model. See `load.load_scorer`."""
        path = find_model(folder)
        self.name = path.name
        self.device = _device(device)
        self.text_form = _text_form(path) if text_form == "auto" else text_form
        self.endings = ENDINGS[self.text_form]
        if dtype == "auto":
            dtype = "float16" if self.device.type == "cuda" else "float32"
        self.network, self.tokenizer = _load(path, self.device, dtype)
        self._cache_name = _cache_name(self.network)
        start = _start_token(self.tokenizer)
        self.start = () if start is None else (start,)
        self.longest = getattr(self.network.config, "max_position_embeddings", None)
        self.tokens_per_batch = TOKENS_PER_BATCH
        self.lock = threading.Lock()
        self._read: deque[Read] = deque(maxlen=_REMEMBERED)
        self._check_tokenizer(path)
        self.trees = self._can_do_trees()

    def score(
        self, sentences: Sequence[str], context: str = "", length_penalty: float = 0.0
    ) -> np.ndarray:
        """Return log-probabilities (ln) of `context + " " + sentence`, float64 [sentences].

        In the text form `sentence`, it is that of the likeliest ending.

        Raises:
          RescoringError: a sentence with its context has too many tokens, or the memory is too
            small for a batch.
        """
        if not len(sentences):
            return np.zeros(0)
        tokens = [self.tokens(sentences, context, ending) for ending in self.endings]
        of = self._score_read({one for some in tokens for one in some})
        distinct = sorted({one for some in tokens for one in some} - of.keys())
        while distinct:
            try:
                with self.lock, torch.inference_mode():
                    scores = self._score_trees(distinct) if self.trees else self._score(distinct)
                of |= zip(distinct, scores, strict=True)
                break
            except (MemoryError, RuntimeError) as error:
                self.shrink_batches(error)
        each = [[of[one] - length_penalty * len(one) for one in some] for some in tokens]
        return np.array(each, np.float64).max(axis=0)

    def pack(self) -> bool:
        """Make it faster on a CPU, for scoring alone. It cannot learn any more.

        Returns whether anything has changed. Scores stay the same to the rounding of float32.
        """
        probe = sorted(set(self.tokens(_PROBE, _PROBE_CONTEXT)))
        with self.lock, torch.inference_mode():
            expected = self._score(probe)
            return pack(
                self.network,
                lambda: bool(np.allclose(self._score(probe), expected, rtol=1e-4, atol=1e-3)),
            )

    def remember(self, read: Read) -> None:
        """Keep what was read during a search until the sentence is rescored."""
        if not any(one is read for one in self._read):
            self._read.append(read)

    def _score_read(self, sequences: set[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """Score the sequences of which a search has read enough, and forget what it has read."""
        found: dict[tuple[int, ...], float] = {}
        of: dict[int, set[tuple[int, ...]]] = {}
        kept = tuple(reversed(self._read))
        for one in sequences if kept else ():
            known = [read.known(one) for read in kept]
            most = int(np.argmax(known))
            if known[most] >= max(_LEAST_KNOWN * len(one), 2):
                of.setdefault(most, set()).add(one)
        if len(of) == 1:
            # The others may begin in another way. One batch costs less than two.
            ((only, some),) = of.items()
            some |= {one for one in sequences if kept[only].known(one) >= _LEAST_SHARED}
        for index, some in of.items():
            found |= zip(some, kept[index].of_tokens([*some]), strict=True)
            # Another thread may have forgotten it for a newer one.
            with contextlib.suppress(ValueError):
                self._read.remove(kept[index])
        return found

    def shrink_batches(self, error: Exception) -> None:
        """Halve the batches after the memory ran out.

        Raises:
          RescoringError: they are as small as they may be.
          Exception: the error, if it is another.
        """
        if not _out_of_memory(error):
            raise error
        self.tokens_per_batch //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.tokens_per_batch < _LEAST_BATCH:
            self.tokens_per_batch = TOKENS_PER_BATCH
            raise RescoringError(
                f"{self.name} ran out of memory on {self.device} even with {_LEAST_BATCH} tokens "
                "at once: free memory or use a smaller model"
            ) from error
        _LOG.warning(
            "%s ran out of memory: going on with %d tokens at once",
            self.name,
            self.tokens_per_batch,
        )

    def tokens(
        self, sentences: Sequence[str], context: str = "", ending: str = "."
    ) -> list[tuple[int, ...]]:
        """Return the token ids that the model reads for each sentence.

        Raises:
          RescoringError: it is more than the model can read.
        """
        before = " ".join(context.split())
        texts = [in_form(sentence, self.text_form, ending) for sentence in sentences]
        if before:
            texts = [f"{before} {text}" for text in texts]
        encoded = self.tokenizer(texts)["input_ids"]
        tokens = [(*self.start, *ids) for ids in encoded]
        longest = max(map(len, tokens))
        if self.longest is not None and longest > self.longest:
            raise RescoringError(
                f"a sentence with its context has {longest} tokens; {self.name} reads at most "
                f"{self.longest}: send a shorter context"
            )
        return tokens

    def _score(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        """Score whole sequences in padded batches of similar lengths."""
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        scores = [0.0] * len(sequences)
        for batch in batches(order, sequences, self.tokens_per_batch):
            sums = self.sums([sequences[index] for index in batch]).tolist()
            for index, value in zip(batch, sums, strict=True):
                scores[index] = value
        return scores

    def sums(
        self, sequences: Sequence[Sequence[int]], firsts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return the score (ln) of every sequence of one padded batch, [sequences].

        Args:
          sequences: token ids.
          firsts: of each, the first token that counts, 1 or more. None: 1.
        """
        shape = (len(sequences), max(map(len, sequences)))
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        counts = torch.zeros(shape, dtype=torch.long)
        for row, (one, first) in enumerate(
            zip(sequences, firsts or [1] * len(sequences), strict=True)
        ):
            ids[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
            counts[row, first : len(one)] = 1
        ids, mask, counts = ids.to(self.device), mask.to(self.device), counts.to(self.device)
        logits = self.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return (_log_probabilities(logits[:, :-1], ids[:, 1:]) * counts[:, 1:]).sum(dim=1)

    def _score_trees(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        """Score sorted distinct sequences in trees, behind the beginning that all share."""
        shared = shared_length(sequences)
        cache = self.new_cache()
        base, last = self._run_shared(sequences[0][:shared], cache)
        scores: list[float] = []
        for tree in trees(sequences, shared, self.tokens_per_batch):
            logs = np.zeros(len(tree.tokens))
            inner = tree.inner
            if len(inner):
                logits = self._run_tree(tree, shared, cache)
                cache.crop(-len(inner))
                children = np.flatnonzero(tree.parents >= 0)
                parents = np.searchsorted(inner, tree.parents[children])
                logs[children] = self._gather(logits, parents, tree.tokens[children])
            if last is not None:
                roots = np.flatnonzero(tree.parents < 0)
                logs[roots] = self._gather(last, np.zeros(len(roots), int), tree.tokens[roots])
            scores += [base + float(logs[list(path)].sum()) for path in tree.paths]
        return scores

    def _gather(self, logits: torch.Tensor, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return log-probabilities (ln) of tokens [n], each by its row of logits [rows, vocab]."""
        normaliser = torch.logsumexp(logits.float(), dim=-1)
        index = torch.tensor(rows, device=self.device)
        chosen = logits[index, torch.tensor(tokens, device=self.device)].float()
        found: np.ndarray = (chosen - normaliser[index]).double().cpu().numpy()
        return found

    def _run_shared(self, ids: Sequence[int], cache: Any) -> tuple[float, torch.Tensor | None]:
        """Fill the cache with the tokens that all share.

        Returns their score, and the logits [1, vocab] behind the last.
        """
        if not len(ids):
            return 0.0, None
        score = 0.0
        for start in range(0, len(ids), self.tokens_per_batch):
            part = torch.tensor([ids[start : start + self.tokens_per_batch]], device=self.device)
            logits = self.network(
                input_ids=part,
                attention_mask=torch.ones((1, start + part.shape[1]), device=self.device).long(),
                **{self._cache_name: cache},
                use_cache=True,
            ).logits[0]
            following = torch.tensor(ids[start + 1 : start + 1 + len(logits)], device=self.device)
            if len(following):
                score += float(_log_probabilities(logits[: len(following)], following).sum())
        return score, logits[-1:]

    def _run_tree(self, tree: Tree, shared: int, cache: Any) -> torch.Tensor:
        """Return logits [inner nodes, vocab] of the tree behind `shared` cached tokens."""
        inner = tree.inner
        sees = np.concatenate([np.ones((len(inner), shared), bool), tree.ancestry()], axis=1)
        return self.read(tree.tokens[inner], shared + tree.depths[inner], sees, cache)

    @property
    def vocabulary(self) -> int:
        """Number of its tokens."""
        return int(self.network.get_input_embeddings().num_embeddings)

    def new_cache(self) -> transformers.DynamicCache:
        """Return an empty cache of keys and values."""
        return transformers.DynamicCache(config=self.network.config)

    def read(
        self, tokens: np.ndarray, positions: np.ndarray, sees: np.ndarray, cache: Any
    ) -> torch.Tensor:
        """Append tokens [new] to the cache. Return logits [new, vocab] of what follows each.

        `sees` [new, cached + new] is whether a new token sees another. Hold `lock`.
        """
        mask = torch.zeros(sees.shape, dtype=self.network.dtype)
        mask.masked_fill_(torch.from_numpy(~sees), torch.finfo(self.network.dtype).min)
        logits: torch.Tensor = self.network(
            input_ids=torch.tensor(tokens, device=self.device)[None],
            position_ids=torch.tensor(positions, device=self.device)[None],
            attention_mask=mask[None, None].to(self.device),
            **{self._cache_name: cache},
            use_cache=True,
        ).logits[0]
        return logits

    def _check_tokenizer(self, path: Path) -> None:
        """Refuse a tokenizer that is not the model's.

        Without its files transformers makes one that has no words. It gives all sentences the same
        tokens, and so the same score.

        Raises:
          RescoringError: different sentences have the same tokens, or the model lacks a token.
        """
        first: dict[tuple[int, ...], str] = {}
        for sentence, tokens in zip(_DISTINCT, self.tokens(_DISTINCT), strict=True):
            other = first.setdefault(tokens, sentence)
            if other != sentence:
                raise RescoringError(
                    f"the tokenizer in {path} gives {other!r} and {sentence!r} the same tokens; "
                    "needed the tokenizer of this model (tokenizer.json, or vocab.json with "
                    "merges.txt, or tokenizer.model): fetch the whole folder again"
                )
        known = self.network.get_input_embeddings().num_embeddings
        if self.tokenizer.vocab_size > known:
            raise RescoringError(
                f"the tokenizer in {path} has {self.tokenizer.vocab_size} tokens, its model "
                f"{known}: they are of different models, fetch the whole folder again"
            )

    def _can_do_trees(self) -> bool:
        """Return whether the model accepts our positions and masks: a probe scored in both ways."""
        probe = sorted(set(self.tokens(_PROBE, _PROBE_CONTEXT)))
        with torch.inference_mode():
            expected = np.array(self._score(probe))
            try:
                found = np.array(self._score_trees(probe))
            # A model's code may fail in any way on a mask that it does not know.
            except Exception as error:
                _LOG.info("%s scores whole sentences: %s", self.name, error)
                return False
        return bool(np.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE))


def _cache_name(network: torch.nn.Module) -> str:
    """Return what a model calls its cache of keys and values.

    transformers 5.24 renamed it for its own models, and will drop the old name. A model with code
    of its own may keep that.
    """
    names = inspect.signature(network.forward).parameters
    return "cache" if "cache" in names and "past_key_values" not in names else "past_key_values"


def _log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities (ln) [...] of tokens [...] by logits [..., vocab], float32."""
    chosen = logits.gather(-1, tokens[..., None])[..., 0].float()
    return chosen - torch.logsumexp(logits.float(), dim=-1)


def in_form(sentence: str, form: str, ending: str = ".") -> str:
    """Return a sentence in a text form. `sentence`: capitalised and with an ending."""
    if form != "sentence":
        return sentence
    words = [
        "I" + word[1:] if word == "i" or word.startswith("i'") else word
        for word in sentence.split()
    ]
    text = " ".join(words)
    return text[:1].upper() + text[1:] + ending


def _text_form(path: Path) -> str:
    file = path / DESCRIPTION
    if not file.is_file():
        return "plain"
    try:
        form = json.loads(file.read_text(encoding="utf-8"))["text_form"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RescoringError(
            f"{file} cannot be read ({error}): delete it or use --llm-text"
        ) from error
    if form not in ("plain", "sentence"):
        raise RescoringError(f"{file} has the text_form {form!r}; needed plain or sentence")
    return str(form)


def _device(name: str) -> torch.device:
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise RescoringError(
            "the device cuda was chosen, but torch finds no GPU: use --llm-device cpu"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and found) else "cpu")


def _numbers(dtype: str, device: torch.device) -> dict[str, Any]:
    """Return how transformers is asked for numbers of this kind.

    Raises:
      RescoringError: they are quantised, and there is no GPU or no bitsandbytes.
    """
    if dtype not in _BITS:
        return {"dtype": getattr(torch, dtype)}
    if device.type != "cuda":
        raise RescoringError(
            f"--llm-dtype {dtype} needs a GPU, and the model is to run on {device}: use bfloat16 "
            "or float32"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RescoringError(
            f"--llm-dtype {dtype} needs the package bitsandbytes: install the extra `quantised`"
        )
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=dtype == "int8",
        load_in_4bit=dtype == "int4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float16,
    )
    # Quantised while they are read, so that the GPU never holds them whole.
    return {"dtype": torch.float16, "quantization_config": config, "device_map": {"": device}}


def _load(path: Path, device: torch.device, dtype: str) -> tuple[Any, Any]:
    numbers = _numbers(dtype, device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        # Weights come from safetensors, or by torch.load(weights_only=True). No code of the
        # folder is run.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            **numbers,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = loaded
        model = (model if dtype in _BITS else model.to(device)).eval()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RescoringError(
            f"{path} does not fit into the memory of {device}: use a smaller model"
        ) from error
    # A damaged folder makes transformers, tokenizers, safetensors and torch fail in any way.
    except Exception as error:
        text = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise RescoringError(
            f"the large language model in {path} cannot be loaded ({type(error).__name__}: "
            f"{text}): fetch it again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise RescoringError(
            f"the large language model in {path} lacks {len(missing)} of its weights, first "
            f"{missing[0]}: fetch it again"
        )
    return model, tokenizer


def _start_token(tokenizer: Any) -> int | None:
    """Return the token to put before every text. None: the tokenizer does so, or knows none."""
    first = tokenizer("a")["input_ids"][:1]
    if first and first[0] in tokenizer.all_special_ids:
        return None
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return None


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error) or "out of memory" in str(error)
    )
