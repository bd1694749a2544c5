"""Weights of a large language model in the order in which a CPU multiplies by them.

A search asks about a few tokens at a time. Most of that time is spent on reading weights and
putting them in the order of the processor's registers, again for every batch. oneDNN, which PyTorch
has for CPUs, can do that once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

_LOG = logging.getLogger(__name__)
_ROWS = 16
"""Tokens for which the order is chosen: a usual batch of a search. Others are only slower."""


class _Packed(torch.nn.Module):
    """A linear layer with packed weights. It has no `weight`, so that nobody takes it for one."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        # Compiled models use the same two operations (`torch._inductor`). They have no other name.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
        self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._packed, self._bias, "none", [], ""
        )
        return found


def pack(network: torch.nn.Module, same: Callable[[], bool]) -> bool:
    """Pack the float32 weights of a network's linear layers on a CPU.

    Args:
      network: is changed, and cannot learn any more.
      same: returns whether the network still does what it did. Where it does not, or where this
        PyTorch cannot pack, everything stays as it was.

    Returns:
      Whether the weights are packed.
    """
    layers = [
        (parent, name, layer)
        for parent in network.modules()
        for name, layer in parent.named_children()
        # Quantised layers are linear ones too, of classes of their own.
        if type(layer) is torch.nn.Linear
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
    ]
    try:
        with torch.inference_mode():
            for parent, name, layer in layers:
                setattr(parent, name, _Packed(layer))
            packed = bool(layers) and same()
    # Another PyTorch may lack the operations, or a model's code may look at a layer's weights.
    except Exception as error:
        _LOG.info("the weights are not packed: %s", error)
        packed = False
    if not packed:
        for parent, name, layer in layers:
            setattr(parent, name, layer)
    return packed
