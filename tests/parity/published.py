"""The published recipe in plain PyTorch, written for these tests to compare with (NEJM reference,
sections 3 and 4): no line is shared with what is tested, but for the shapes of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import nn

from b2txt_jax.config import Config, OptimizerConfig
from b2txt_jax.model.gru.baseline import GRUSettings
from b2txt_jax.model.interface import make_model


class PublishedDecoder(nn.Module):
    """One Parameter per day, unfold, torch's GRU, a linear head; the checkpoint's names."""

    def __init__(self, model: GRUSettings, features: int, days: int, dtype=torch.float64):
        super().__init__()
        self.model = model
        days = days if model.day_layer else 1
        self.day_weights = nn.ParameterList(torch.eye(features) for _ in range(days))
        self.day_biases = nn.ParameterList(torch.zeros(1, features) for _ in range(days))
        width = features * max(model.patch_size, 1)
        dropout = model.rnn_dropout if model.layers > 1 else 0.0
        self.gru = nn.GRU(width, model.units, model.layers, batch_first=True, dropout=dropout)
        for name, parameter in self.gru.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(parameter)
            elif "weight_ih" in name:
                nn.init.xavier_uniform_(parameter)
        self.out = nn.Linear(model.units, model.classes)
        nn.init.xavier_uniform_(self.out.weight)
        self.h0 = nn.Parameter(nn.init.xavier_uniform_(torch.zeros(1, 1, model.units)))
        self.to(dtype)

    def forward(self, x: torch.Tensor, days: Sequence[int]) -> torch.Tensor:
        """Smoothed features [B, T, D] -> logits [B, P, 41]; each trial by itself up to the GRU."""
        rows = []
        for trial, day in zip(x, days, strict=True):
            day = day if self.model.day_layer else 0
            mixed = trial @ self.day_weights[day] + self.day_biases[day]
            rows.append(mixed / (1 + mixed.abs()))
        x = torch.nn.functional.dropout(torch.stack(rows), self.model.input_dropout, self.training)
        size, stride = self.model.patch_size, self.model.patch_stride
        if size:
            # [B, P, D, size] -> the bins of a patch one after another
            x = x.unfold(1, size, stride).transpose(2, 3).flatten(2)
        h0 = self.h0.expand(self.model.layers, len(x), -1).contiguous()
        return self.out(self.gru(x, h0)[0])


def random_params(model: GRUSettings, features: int, days: int):
    """Parameters of our tree, drawn by numpy: compiling the initialisers would take longer than
    most tests."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: make_model(model, features, days).init(jax.random.key(0)))
    params = jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / math.sqrt(leaf.shape[-1])).astype(np.float32),
        shapes,
    )
    params["day"]["weight"] += np.eye(features, dtype=np.float32)
    return params


def fill(decoder: PublishedDecoder, params) -> PublishedDecoder:
    """Copies our parameters into the PyTorch model and returns it."""
    for theirs, ours in _pairs(decoder, params):
        theirs.data.copy_(torch.tensor(np.asarray(ours)).view_as(theirs))
    return decoder


def read(decoder: PublishedDecoder, features: int, days: int):
    """The PyTorch model's parameters as our tree."""
    params = random_params(decoder.model, features, days)
    for theirs, ours in _pairs(decoder, params):
        ours[...] = theirs.detach().numpy().reshape(ours.shape)
    return params


def differences(decoder: PublishedDecoder, tree, gradients: bool) -> dict[str, float]:
    """Largest difference of each parameter (or gradient), over the largest value in it."""
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    found = {}
    for theirs, ours in _pairs(decoder, tree):
        value = theirs.detach()
        if gradients:
            # a day that no trial of the batch has gets no gradient at all
            value = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        expected = value.numpy()
        difference = np.abs(np.asarray(ours).reshape(expected.shape) - expected).max()
        found[names[id(theirs)]] = float(difference / max(np.abs(expected).max(), 1e-3))
    return found


def _pairs(decoder: PublishedDecoder, tree):
    for k in range(len(decoder.day_weights)):
        yield decoder.day_weights[k], tree["day"]["weight"][k]
        yield decoder.day_biases[k], tree["day"]["bias"][k]
    for name, parameter in decoder.gru.named_parameters():
        yield parameter, tree["gru"][name]
    yield decoder.out.weight, tree["head"]["weight"]
    yield decoder.out.bias, tree["head"]["bias"]
    yield decoder.h0, tree["h0"]


def taps(std: float, size: int) -> np.ndarray:
    """An impulse through scipy's filter, taps above 0.01 kept, renormalised."""
    impulse = np.zeros(size)
    impulse[size // 2] = 1
    response = gaussian_filter1d(impulse, std)
    kept = response[response > 0.01]
    return kept / kept.sum()


def smoothed(x: torch.Tensor, std: float, size: int, padding: str = "same") -> torch.Tensor:
    """Depthwise convolution over time: [B, T, D] -> [B, T or less, D]."""
    channels = x.shape[2]
    kernel = torch.tensor(taps(std, size), dtype=x.dtype).expand(channels, 1, -1)
    by_channel = x.transpose(1, 2)
    return nn.functional.conv1d(by_channel, kernel, padding=padding, groups=channels).transpose(
        1, 2
    )


def noise(
    std: dict[str, float], shape: tuple[int, int, int], generator: torch.Generator
) -> torch.Tensor:
    """What the published augmentation adds to zeros; `std` by the kind of noise."""
    batch, _, channels = shape
    white = torch.randn(shape, generator=generator) * std.get("white", 0)
    offset = torch.randn((batch, 1, channels), generator=generator) * std.get("offset", 0)
    walk = torch.randn(shape, generator=generator) * std.get("walk", 0)
    return white + offset + walk.cumsum(-1)


def rate_factor(step: int, floor: float, warmup: int, decay: int) -> float:
    """Learning rate over its peak at an optimizer step; `floor` is the lowest such ratio."""
    if step < warmup:
        return step / max(1, warmup)
    if step < decay:
        progress = (step - warmup) / max(1, decay - warmup)
        return max(floor, floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    return floor


def optimizer_and_schedule(
    config: OptimizerConfig,
    biases: Sequence[torch.Tensor],
    days: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with the three published groups and their LambdaLR."""
    adamw = torch.optim.AdamW(
        [
            {"params": list(biases), "weight_decay": 0.0},
            {
                "params": list(days),
                "lr": config.day_learning_rate,
                "weight_decay": config.day_weight_decay,
            },
            {"params": list(weights)},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )

    def main(step: int) -> float:
        floor = config.learning_rate_min / config.learning_rate
        return rate_factor(step, floor, config.warmup_steps, config.decay_steps)

    def day(step: int) -> float:
        floor = config.day_learning_rate_min / config.day_learning_rate
        return rate_factor(step, floor, config.day_warmup_steps, config.day_decay_steps)

    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, [main, day, main])


def decoder_optimizer(
    decoder: PublishedDecoder, config: OptimizerConfig
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The three groups of a decoder."""
    named = dict(decoder.named_parameters())
    days = [value for name, value in named.items() if name.startswith("day_")]
    biases = [value for name, value in named.items() if "gru.bias" in name or name == "out.bias"]
    rest = {id(value) for value in (*days, *biases)}
    return optimizer_and_schedule(
        config, biases, days, [value for value in named.values() if id(value) not in rest]
    )


def frames_of(bins: np.ndarray, model: GRUSettings) -> torch.Tensor:
    """The published int((bins - size) / stride + 1)."""
    if not model.patch_size:
        return torch.tensor(bins)
    return ((torch.tensor(bins) - model.patch_size) / model.patch_stride + 1).to(torch.int32)


def losses_of(decoder: PublishedDecoder, batch, config: Config) -> tuple[torch.Tensor, ...]:
    """CTC loss per trial and logits of a batch, without augmentation."""
    dtype = decoder.h0.dtype
    x = torch.tensor(np.asarray(batch.features), dtype=dtype)
    x = smoothed(x, config.signal.smooth_std, config.signal.smooth_size)
    logits = decoder(x, np.asarray(batch.day).tolist())
    frames = frames_of(np.asarray(batch.bins), config.model)
    losses = nn.CTCLoss(blank=0, reduction="none")(
        logits.log_softmax(2).transpose(0, 1),
        torch.tensor(np.asarray(batch.labels)),
        frames,
        torch.tensor(np.asarray(batch.label_length)),
    )
    return losses, logits, frames


def train(decoder: PublishedDecoder, batches, config: Config) -> list[float]:
    """Trains on the batches, one step each; returns the losses."""
    adamw, schedule = decoder_optimizer(decoder, config.optimizer)
    decoder.train()
    history = []
    for batch in batches:
        adamw.zero_grad()
        loss = losses_of(decoder, batch, config)[0].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(
            decoder.parameters(), config.optimizer.clip_norm, error_if_nonfinite=True
        )
        adamw.step()
        schedule.step()
        history.append(loss.item())
    return history


def greedy(logits: torch.Tensor) -> list[int]:
    """Argmax, repeats collapsed, blanks dropped: [P, C] -> class ids."""
    return [int(k) for k in torch.unique_consecutive(logits.argmax(-1)) if k != 0]


def distance(first: Sequence, second: Sequence) -> int:
    """Levenshtein's distance by its recursive definition, memoised over suffixes."""
    known: dict[tuple[int, int], int] = {}

    def rest(i: int, j: int) -> int:
        if i == len(first) or j == len(second):
            return len(first) - i + len(second) - j
        if (i, j) not in known:
            if first[i] == second[j]:
                known[i, j] = rest(i + 1, j + 1)
            else:
                known[i, j] = 1 + min(rest(i + 1, j), rest(i, j + 1), rest(i + 1, j + 1))
        return known[i, j]

    return rest(0, 0)
