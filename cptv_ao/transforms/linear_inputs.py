"""Channels of what linear layers read on one scale, evened out and moved to the middle of their ranges: an equivalent
form of a lowered or a PT2E graph.

    Before: layer_norm(x, w, b)                -> on a scale -> linear(., W, c)
    After:  layer_norm(x, f w, f b - d)        -> on a scale -> linear(., W / f, c + W d / f)

Channels that lie apart need a wide range and coarse steps; around 0 they need less (shifting and scaling, Outlier
Suppression+, Wei et al., arXiv 2304.09145). In PT2E graphs what attention makes of its values is moved by their bias,
and multiplied by their rows. Factors f are powers of two, see `cptv_ao.transforms.input_factors`; without float weights
they are 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.core.formatting import counted
from cptv_ao.core.qparams import qparams_for_range
from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.bn_folding import scale_channels
from cptv_ao.transforms.channel_paths import WHOLE, arriving
from cptv_ao.transforms.channel_ranges import NARROWER, ChannelRange
from cptv_ao.transforms.equivalence import Equivalence
from cptv_ao.transforms.input_factors import ReadWeights, input_exponents
from cptv_ao.transforms.replaced_weights import add_to_bias, replace_weight
from cptv_ao.transforms.shared_inputs import SharedInput

# A range whose channels move by a smaller share of it is left as it is.
_STILL = 1e-3


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
    backend: Backend,
    shared: Sequence[SharedInput],
    ends: Mapping[str, ChannelRange],
    check: Equivalence,
    codes: int | None = None,
) -> list[str]:
    """Even out and centre the channels of these inputs, as far as it is worth it and nothing else reads them, and tell
    of it.

    Args:
        backend: of a graph, which is written: what these inputs come from, the layers that read them, and their scales.
        shared: of it, those that are `open_inputs`.
        ends: of their values, in float.
        check: of it.
        codes: steps between the ends of an input whose range is to hold all that was seen; None: as many as its site
            has, and the range leaves as much room, or clips as much, as before.

    Returns:
        What was done, one line each; nothing where the float twin does not know an op.
    """
    if not shared or not check.sees:
        return []
    shared = [part for part in shared if part.value in ends]
    done = list[_Form]()
    # What attention makes of its values first: their factors change weights that read a norm.
    for parts in ([part for part in shared if part.weight is None], [part for part in shared if part.weight]):
        done += _written(backend, [_form(backend, part, ends[part.value], codes) for part in parts], check, codes)
    counts = [form.scaled for form in done]
    centred = sum(form.middle is not None for form in done)
    notes = []
    if any(counts):
        told = f"{counted(sum(counts), 'channel')} of {counted(sum(map(bool, counts)), 'input')} of linear layers"
        notes.append(f"{told} evened out with the weights there")
    if centred:
        told = f"the channels of {counted(centred, 'input')} of linear layers"
        notes.append(f"{told} moved to the middle of their ranges")
    return notes


def open_inputs(backend: Backend, shared: Sequence[SharedInput]) -> list[SharedInput]:
    """Those of which something can be subtracted, or whose channels can be multiplied."""
    return [part for part in shared if part.centrable or _scalable(backend, part)]


def _scalable(backend: Backend, shared: SharedInput) -> bool:
    """Whether its channels can be multiplied, and the weights that make up for it are known."""
    return shared.scalable(backend) and backend.float_weights.keys() >= {one.weight for one in shared.readers}


def _form(backend: Backend, shared: SharedInput, ends: ChannelRange, codes: int | None) -> _Form:
    """What is worth it. Factors are those of the values around their middles, for what is subtracted is rounded
    neither by the scale nor with the weights."""
    factors = None
    if _scalable(backend, shared) and bool((ends.high > ends.low).any()):
        values = ends.some.T - ((ends.low + ends.high) / 2 if shared.centrable else 0.0)
        site, weights = backend.sites[shared.sites[0]], [reader.weight for reader in shared.readers]
        steps = site.qmax - site.qmin if codes is None else codes
        exponents = input_exponents(values, ReadWeights.read(backend, weights), steps)
        factors = None if exponents is None else torch.exp2(exponents)
    scaled = ends if factors is None else ends.times(factors)
    moves = shared.centrable and _narrower(scaled)
    return _Form(shared, ends, factors, (scaled.low + scaled.high) / 2 if moves else None)


def _half(ends: ChannelRange) -> float:
    """Largest distance of a value from the middle of its channel."""
    return float((ends.high - ends.low).max()) / 2


def _narrower(ends: ChannelRange) -> bool:
    """Channels that hardly vary (images that are all alike, or a single one) say nothing of their ranges."""
    return _STILL * ends.span < 2 * _half(ends) < NARROWER * ends.span


def _entries(check: Equivalence, forms: Sequence[_Form]) -> dict[str, Tensor]:
    """By value, which entry of its source each channel (C,) comes from: a norm is itself the source; layers give
    numbers of entries in the place of what they compute, and these arrive as they are, since the weights of attention
    add up to one."""
    found = {form.shared.value: torch.arange(len(form.ends.low)) for form in forms if form.shared.weight is not None}
    mixed = [form.shared for form in forms if form.shared.weight is None]
    sources, values = {part.source for part in mixed}, {part.value for part in mixed}
    arrived = arriving(check.twin, check.few, sources, values, torch.arange) if sources and check.twin else {}
    for name, numbers in arrived.items():
        rows = numbers.reshape(-1, numbers.shape[-1])
        entries = rows[0].round().long()
        if bool(((rows - entries).abs() < WHOLE).all()) and len(set(entries.tolist())) == len(entries):
            found[name] = entries
    return found


def _written(backend: Backend, forms: Sequence[_Form], check: Equivalence, codes: int | None) -> list[_Form]:
    """Those that change something and could be written."""
    forms = [form for form in forms if form.factors is not None or form.middle is not None]
    entries = _entries(check, forms)
    known = [form for form in forms if form.shared.value in entries]
    return check.used(known, lambda form: _use(backend, form, entries[form.shared.value], codes))


def _use(backend: Backend, form: _Form, entries: Tensor, codes: int | None) -> _Form:
    """Write a form, and the scales of its input."""
    shared, ends, span = form.shared, form.ends, form.ends.span
    if form.factors is not None:
        _multiply(backend, shared, form.factors, entries)
        ends = ends.times(form.factors)
    low, high = ends.bounds
    if form.middle is not None:
        _subtract(backend, shared, form.middle, entries)
        low, high = -_half(ends), _half(ends)
    for name in shared.sites:
        site, share = backend.sites[name], 1.0
        if codes is None:
            share = float(backend.read(name).scale) * (site.qmax - site.qmin) / span
        backend.write(name, qparams_for_range(low * share, high * share, site, codes))
    return form


def _multiply(backend: Backend, shared: SharedInput, factors: Tensor, entries: Tensor) -> None:
    """Multiply the channels of the source, and divide the columns of the readers."""
    given = {path: fetch(backend.model, path).detach() for path in (shared.weight, shared.bias) if path is not None}
    rows = torch.ones_like(next(iter(given.values())))
    rows[entries] = factors.to(rows)
    for path, value in given.items():
        backend.rewrites.put(shared.owner, path, value * rows)
    if shared.weight is None:
        scale_channels(backend, shared.owner, rows, None)
    for reader in shared.readers:
        replace_weight(backend, reader.weight, backend.float_weights[reader.weight] / factors)


def _subtract(backend: Backend, shared: SharedInput, middle: Tensor, entries: Tensor) -> None:
    """Subtract the middles from the source's bias, and give them back in those of the readers."""
    assert shared.bias is not None
    bias = fetch(backend.model, shared.bias).detach().clone()
    bias[entries] -= middle.to(bias)
    backend.rewrites.put(shared.owner, shared.bias, bias)
    for reader in shared.readers:
        weight = backend.float_weights.get(reader.weight)
        missing = (backend.weight(reader.weight).dequantize() if weight is None else weight) @ middle
        if reader.bias is not None:
            given = fetch(backend.model, reader.bias).detach()
            backend.rewrites.put(reader.weight, reader.bias, given + missing.to(given))
        else:
            add_to_bias(backend, reader.weight, missing)
