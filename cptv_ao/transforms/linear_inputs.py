"""Channels of what linear layers read on one scale, evened out and moved to the middle of their ranges: an equivalent
form of a PT2E graph.

    Before: layer_norm(x, w, b)                -> quantize -> dequantize -> linear(., W, c)
    After:  layer_norm(x, f w, f b - d)        -> quantize -> dequantize -> linear(., W / f, c + W d / f)

Channels that lie apart need a wide range and coarse steps; around 0 they need less (shifting and scaling, Outlier
Suppression+, Wei et al., arXiv 2304.09145). What attention makes of its values is moved by their bias, and multiplied
by their rows. Factors f are powers of two, see `cptv_ao.transforms.input_factors`; without float weights they are 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.qparams import qparams_for_range
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.fx.paths import fetch
from cptv_ao.simulation.qtensor import real
from cptv_ao.simulation.twin import Twin
from cptv_ao.transforms.bn_folding import scale_channels
from cptv_ao.transforms.channel_ranges import ChannelRange, channel_ends, last_dimension
from cptv_ao.transforms.equivalence import Equivalence
from cptv_ao.transforms.input_factors import ReadWeights, input_exponents
from cptv_ao.transforms.pt2e_patterns import SharedInput
from cptv_ao.transforms.smooth_quant import replace_weight

# A range that gets less narrow is left as it is.
_NARROWER = 0.95
# One whose channels move by a smaller share of it, too.
_STILL = 1e-3
# How near to whole numbers the numbers of channels must arrive.
_WHOLE = 0.1


@dataclass(frozen=True)
class _Form:
    """What is done to an input: factors of its channels, and what is subtracted from them then (C,) each; None: nothing
    of the kind."""

    shared: SharedInput
    ends: ChannelRange
    factors: Tensor | None
    middle: Tensor | None

    @property
    def scaled(self) -> int:
        """How many channels get another factor than 1."""
        return 0 if self.factors is None else int((self.factors != 1).sum())


def even_out(
    backend: Backend, shared: Sequence[SharedInput], batches: Sequence[Batch], check: Equivalence, world: World
) -> list[str]:
    """Even out and centre the channels of these inputs, as far as it is worth it and nothing else reads them, and tell
    of it.

    Args:
        backend: of a PT2E graph, which is written: what these inputs come from, the layers that read them, and their
            scales.
        shared: of it.
        batches: calibration images.
        check: of it.
        world: the ranks that all do so.
    """
    shared = [part for part in shared if _centrable(part) or _scalable(backend, part)]
    if not shared or check.twin is None:
        return []
    ends = channel_ends(check.twin, {part.value: last_dimension for part in shared}, batches, world)
    forms = [_form(backend, part, ends[part.value]) for part in shared if part.value in ends]
    forms = [form for form in forms if form.factors is not None or form.middle is not None]
    entries = _entries(check.twin, [form.shared for form in forms], check.few) if forms else {}
    found = [form for form in forms if form.shared.value in entries]
    done = check.used(found, lambda form: _use(backend, form, entries[form.shared.value]))
    counts = [form.scaled for form in done]
    centred = sum(form.middle is not None for form in done)
    notes = []
    if any(counts):
        inputs = sum(map(bool, counts))
        notes.append(f"{sum(counts)} channels of {inputs} inputs of linear layers evened out with the weights there")
    if centred:
        notes.append(f"the channels of {centred} inputs of linear layers moved to the middle of their ranges")
    return notes


def _centrable(shared: SharedInput) -> bool:
    """Whether what is subtracted can be given back."""
    return all(reader.bias for reader in shared.readers)


def scalable(backend: Backend, shared: SharedInput) -> bool:
    """Whether the weights around an input can be multiplied by channel, and rounded anew."""
    owner = backend.sites[shared.owner]
    multiplied = shared.weight is not None or (owner.axis == 0 and backend.weights.shiftable(owner.name))
    return multiplied and all(backend.weights.shiftable(reader.weight) for reader in shared.readers)


def _scalable(backend: Backend, shared: SharedInput) -> bool:
    """Whether they are known, too."""
    return scalable(backend, shared) and backend.float_weights.keys() >= {one.weight for one in shared.readers}


def _form(backend: Backend, shared: SharedInput, ends: ChannelRange) -> _Form:
    """What is worth it."""
    middle = (ends.low + ends.high) / 2 if _centrable(shared) else torch.zeros_like(ends.low)
    exponents = None
    if _scalable(backend, shared) and bool((ends.high > ends.low).any()):
        site, weights = backend.sites[shared.sites[0]], [reader.weight for reader in shared.readers]
        values = ends.some.T - middle
        exponents = input_exponents(values, middle, ReadWeights.read(backend, weights), site.qmax - site.qmin)
    factors = None if exponents is None else torch.exp2(exponents)
    scaled = ends if factors is None else ends.times(factors)
    moves = _centrable(shared) and _narrower(scaled)
    return _Form(shared, ends, factors, (scaled.low + scaled.high) / 2 if moves else None)


def _half(ends: ChannelRange) -> float:
    """Largest distance of a value from the middle of its channel."""
    return float((ends.high - ends.low).max()) / 2


def _narrower(ends: ChannelRange) -> bool:
    """Channels that hardly vary (images that are all alike, or a single one) say nothing of their ranges."""
    return _STILL * ends.span < 2 * _half(ends) < _NARROWER * ends.span


def _entries(twin: Twin, shared: Sequence[SharedInput], few: Batch) -> dict[str, Tensor]:
    """By value, which entry of its source each channel (C,) comes from: sources give numbers of entries in the place
    of what they compute, and these arrive as they are, since the weights of attention add up to one."""
    sources, found = {part.source for part in shared}, dict[str, Tensor]()
    values = {part.value for part in shared}

    def see(node: Node, value: Any) -> Any:
        if node.name in sources and isinstance(value, Tensor):
            value = torch.arange(value.shape[-1], dtype=value.dtype, device=value.device).expand(value.shape)
        if node.name in values and (numbers := real(value)) is not None:
            rows = numbers.reshape(-1, numbers.shape[-1])
            entries = rows[0].round().long()
            if bool(((rows - entries).abs() < _WHOLE).all()) and len(set(entries.tolist())) == len(entries):
                found[node.name] = entries
        return value

    Watcher(twin.module).watch(few, see)
    return found


def _use(backend: Backend, form: _Form, entries: Tensor) -> _Form:
    """Write a form. Scales of the input become smaller by as much as its range: they leave as much room, or clip as
    much, as before."""
    shared, ends, span = form.shared, form.ends, form.ends.span
    if form.factors is not None:
        _multiply(backend, shared, form.factors, entries)
        ends = ends.times(form.factors)
    low, high = min(0.0, float(ends.low.min())), max(0.0, float(ends.high.max()))
    if form.middle is not None:
        _subtract(backend, shared, form.middle, entries)
        low, high = -_half(ends), _half(ends)
    for name in shared.sites:
        site = backend.sites[name]
        share = float(backend.read(name).scale) * (site.qmax - site.qmin) / span
        backend.write(name, qparams_for_range(low * share, high * share, site))
    return form


def _multiply(backend: Backend, shared: SharedInput, factors: Tensor, entries: Tensor) -> None:
    """Multiply the channels of the source, and divide the columns of the readers."""
    bias = fetch(backend.model, shared.bias).detach()
    rows = torch.ones_like(bias)
    rows[entries] = factors.to(rows)
    if shared.weight is None:
        scale_channels(backend, shared.owner, rows, None)
    else:
        weight = fetch(backend.model, shared.weight).detach()
        backend.rewrites.put(shared.owner, shared.weight, weight * rows)
    backend.rewrites.put(shared.owner, shared.bias, bias * rows)
    for reader in shared.readers:
        replace_weight(backend, reader.weight, backend.float_weights[reader.weight] / factors)


def _subtract(backend: Backend, shared: SharedInput, middle: Tensor, entries: Tensor) -> None:
    """Subtract the middles from the source's bias, and give them back in those of the readers."""
    bias = fetch(backend.model, shared.bias).detach().clone()
    bias[entries] -= middle.to(bias)
    backend.rewrites.put(shared.owner, shared.bias, bias)
    for reader in shared.readers:
        assert reader.bias is not None
        weight, given = backend.float_weights.get(reader.weight), fetch(backend.model, reader.bias).detach()
        weight = backend.weight(reader.weight).dequantize() if weight is None else weight
        backend.rewrites.put(reader.weight, reader.bias, given + (weight @ middle).to(given))
