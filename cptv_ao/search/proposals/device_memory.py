"""How much of a device the descent may fill: the graph of a part of a batch, and layer inputs of the float network."""

from __future__ import annotations

import torch

# What the graph of a part may hold on a CPU, in bytes: of a ViT-S at 224 x 224 that is 2 images, which is what the
# float network holds for 8.
_GRAPH_BYTES = 5 * 2**27
# Shares of a card that graphs and layer inputs may have.
_GRAPH_SHARE, _CACHE_SHARE = 0.4, 0.25


def graph_bytes(device: torch.device) -> float:
    """What the graph of a part of a batch may hold. What the parts are depends on the batch, the network and the kind
    of device, never on how many ranks there are."""
    return _GRAPH_SHARE * _card(device) if device.type == "cuda" else _GRAPH_BYTES


def cache_bytes(device: torch.device, asked: int) -> int:
    """What may be kept of layer inputs: as much as was asked for, or on a card a share of its memory."""
    return max(asked, int(_CACHE_SHARE * _card(device))) if device.type == "cuda" else asked


def _card(device: torch.device) -> float:
    """Memory that this process may use of a card, see `torch.cuda.set_per_process_memory_fraction`."""
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)
    return float(torch.cuda.get_device_properties(device).total_memory) * float(fraction(device))
