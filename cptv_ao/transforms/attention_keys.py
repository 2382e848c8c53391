"""Keys of attention moved to the middle of their ranges: an equivalent form of a lowered graph.

    softmax(q k^T) = softmax(q (k - c)^T), for q c is the same for all keys

Channels of keys lie apart (a large bias, or what all tokens have in common). They share a scale with each other, and
with queries and values where one layer gives all three; without what they have in common its steps are finer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.formatting import counted
from cptv_ao.simulation.twin import Twin
from cptv_ao.transforms.attention_patterns import Keys
from cptv_ao.transforms.channel_paths import WHOLE, arriving
from cptv_ao.transforms.channel_ranges import (
    NARROWER,
    ChannelRange,
    channel_ends,
    hold_ranges,
    moving_with,
    whole_values,
)
from cptv_ao.transforms.equivalence import Equivalence
from cptv_ao.transforms.replaced_weights import add_to_bias


@dataclass(frozen=True)
class _Form:
    """What is subtracted from the channels of the layer that gives keys, (C,)."""

    keys: Keys
    middle: Tensor


def centre_keys(
    backend: Backend,
    keys: Sequence[Keys],
    ends: Mapping[str, ChannelRange],
    batches: Sequence[Batch],
    check: Equivalence,
    world: World,
    codes: int,
) -> list[str]:
    """Move keys to the middle of their ranges, as far as it is worth it, and tell of it.

    Args:
        backend: of a lowered model, which is written: the biases of the layers that give keys, and scales behind them.
        keys: of it.
        ends: of what their sources give.
        batches: calibration images.
        check: of it.
        world: the ranks that all do so.
        codes: steps between the ends of a range, which is to hold all that was seen.

    Returns:
        What was done, one line; nothing where the float twin does not know an op.
    """
    if not keys or check.twin is None:
        return []
    channels = _channels(check.twin, keys, check.few.few(1))
    forms = [
        _Form(one, middle)
        for one, own in zip(keys, channels, strict=True)
        if own is not None and one.source in ends and (middle := _middle(ends[one.source], own)) is not None
    ]
    done = check.used(forms, lambda form: _write(backend, form))
    if not done:
        return []
    moving = moving_with(backend, (name for form in done for name in form.keys.sites.values()))
    hold_ranges(backend, moving, channel_ends(check.twin, whole_values(moving), batches, world), codes)
    return [f"keys of {counted(len(done), 'attention')} moved to the middle of their ranges, which no softmax sees"]


def _channels(twin: Twin, keys: Sequence[Keys], few: Batch) -> list[Tensor | None]:
    """Which channels of their source keys are; None where this is something else."""
    arrived = partial(arriving, twin, few, {one.source for one in keys}, {one.node for one in keys})
    # The first channel is 1: what multiplies the numbers on the way is seen on ones.
    found, ones = arrived(lambda count: torch.arange(1, count + 1)), arrived(torch.ones)
    return [_arrived(found[one.node] / ones[one.node], one.dim) if one.node in found else None for one in keys]


def _arrived(numbers: Tensor, dim: int) -> Tensor | None:
    """The channels (K,) of numbers that all rows have alike, each once in a row."""
    if numbers.dim() < 2:
        return None
    rows = numbers.movedim(dim, -1)
    whole = rows[..., :1, :].round()
    if not bool(((rows - whole).abs() < WHOLE).all()):
        return None
    return torch.tensor(sorted(set(whole.flatten().long().tolist()))) - 1


def _middle(ends: ChannelRange, channels: Tensor) -> Tensor | None:
    """Of these channels, 0 of the others (C,); None where the range of all does not get narrower by it."""
    middle = torch.zeros_like(ends.low)
    if not 0 <= int(channels.min()) <= int(channels.max()) < len(middle):
        return None
    middle[channels] = ((ends.low + ends.high) / 2)[channels]
    span = float((ends.high - middle).max().clamp_min(0.0) - (ends.low - middle).min().clamp_max(0.0))
    return middle if span < NARROWER * ends.span else None


def _write(backend: Backend, form: _Form) -> _Form:
    """Give the layer its other bias."""
    add_to_bias(backend, form.keys.weight, -form.middle)
    return form
