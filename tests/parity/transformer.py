"""A causal Transformer in PyTorch, written for these tests from the description of the model."""

from __future__ import annotations

import jax
import numpy as np
import torch
from torch import nn

from b2txt_jax.model.transformer import TransformerSettings


class Attention(nn.Module):
    def __init__(self, s: TransformerSettings):
        super().__init__()
        self.heads, inner = s.heads, s.heads * s.head_width
        self.norm = nn.LayerNorm(s.width)
        self.qkv = nn.Linear(s.width, 3 * inner, bias=False)
        self.relative = nn.Parameter(torch.randn(s.distances))
        self.out = nn.Linear(inner, s.width)

    def forward(self, x, context):
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        query, key, value = (
            one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (query, key, value)
        )
        frame = torch.arange(x.shape[1])
        distance = frame[:, None] - frame[None]
        bias = self.relative[distance.clamp(0, len(self.relative) - 1)]
        hidden = (distance < 0) | (distance > context)
        bias = bias.masked_fill(hidden, -torch.inf)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, s: TransformerSettings):
        super().__init__()
        self.norm = nn.LayerNorm(s.width)
        self.up = nn.Linear(s.width, s.feedforward)
        self.down = nn.Linear(s.feedforward, s.width)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


class Layer(nn.Module):
    def __init__(self, s: TransformerSettings):
        super().__init__()
        self.attention, self.feedforward = Attention(s), FeedForward(s)


class TorchTransformer(nn.Module):
    """One trial at a time, so that there is no padding. Without dropout."""

    def __init__(self, s: TransformerSettings, features: int, days: int):
        super().__init__()
        self.size, self.day_layer = s.patch_size, s.day_layer
        if s.day_layer:
            self.day_weight = nn.Parameter(torch.eye(features).repeat(days, 1, 1))
            self.day_bias = nn.Parameter(torch.zeros(days, features))
        inputs = s.patch_size * features
        self.patch_norm, self.embed = nn.LayerNorm(inputs), nn.Linear(inputs, s.width)
        self.embed_norm, self.norm = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.head = nn.Linear(s.width, s.classes)

    def forward(self, x, day, context):
        """x [T, D] -> [P, C]; context in frames."""
        x = nn.functional.pad(x, (0, 0, 0, -len(x) % self.size))
        if self.day_layer:
            x = nn.functional.softsign(x @ self.day_weight[day] + self.day_bias[day])
        x = x.unflatten(0, (-1, self.size)).flatten(1)[None]
        x = self.embed_norm(self.embed(self.patch_norm(x)))
        for layer in self.layers:
            x = x + layer.attention(x, context)
            x = x + layer.feedforward(x)
        return self.head(self.norm(x))[0]

    def ours(self, gradients: bool = False) -> dict:
        """The parameters, or their gradients, as our tree."""

        def value(parameter):
            found = parameter.grad if gradients else parameter
            return found.detach().numpy().astype(np.float32)

        def both(module):
            return {name: value(found) for name, found in module.named_parameters()}

        tree = {
            "embed": {
                "patch_norm": both(self.patch_norm),
                "linear": both(self.embed),
                "norm": both(self.embed_norm),
            },
            "norm": both(self.norm),
            "head": both(self.head),
        }
        for number, layer in enumerate(self.layers):
            tree[f"layer{number}"] = {
                name: {child: both(found) for child, found in part.named_children()}
                for name, part in layer.named_children()
            }
            tree[f"layer{number}"]["attention"]["relative"] = value(layer.attention.relative)
        if self.day_layer:
            tree["day"] = {"weight": value(self.day_weight), "bias": value(self.day_bias)}
        return tree


def largest_difference(ours, theirs) -> float:
    """Of two trees of the same structure."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), ours, theirs)))
