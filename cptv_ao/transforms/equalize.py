"""Equivalent forms of a converted model, from which a search of scales gets further: its function in float is the same.

Batch norms that FX did not fuse: all channels of a convolution's output share one scale before the norm makes them
alike. Scales of weights are per channel, so they take the norm's factors without another code, and the bias its
offsets (batch norm folding, Jacob et al., arXiv 1712.05877); the norm that is left is the identity.

    Before: quantized conv (scale for all channels) -> dequantize -> batch_norm -> quantize_per_tensor(s, z)
    After:  quantized conv (s, z)                   -> dequantize -> identity   -> quantize_per_tensor(s, z)

Ranges below 0, or above 6, of what a ReLU or ReLU6 reads: they take codes and say nothing.

Outlier channels behind a norm: divided there, multiplied in the weights that read it (SmoothQuant, arXiv 2211.10438).

In PT2E graphs also the middle of each channel of what linear layers read: see `cptv_ao.transforms.channel_shift`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import fold_factors
from cptv_ao.backends.pt2e import is_exported
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.sites import REDUCED_QMAX, QParams, ScaleSite, same
from cptv_ao.diagnosis.meters import Watcher
from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.channel_ranges import Ends, channel_ends, ranged
from cptv_ao.transforms.channel_shift import centre
from cptv_ao.transforms.equivalence import FEW, Equivalence, largest
from cptv_ao.transforms.float_model.smooth_quant import outlier_exponents
from cptv_ao.transforms.lowered_patterns import ClippedSite, Patterns, ReadNorm, UnfusedNorm
from cptv_ao.transforms.pt2e_patterns import SharedInput, SharedInputs

# Images on which codes are looked at.
_FEW = 16
# A range below 0 is left where it is a smaller share of the rest, as a search leaves it.
_WASTE = 0.1
# How far folded norms may move the outputs: -128 has no counterpart where a channel changes its sign, and a channel
# that hardly varies is given as if it did not.
_FOLDED = 1e-2
# Share of the codes of one activation beyond 7 bits that says that all 8 are used.
_BEYOND = 0.1


def equalize(
    backend: Backend, batches: Sequence[Batch], world: World = ALONE, confirmed: Callable[[], bool] | None = None
) -> list[str]:
    """Fold unfused batch norms, cut ranges that activation functions clip, and smooth outliers of layer norms; in a
    PT2E graph smooth outliers, and centre what linear layers read.

    Each is left where it makes the model compute something else in float (see `cptv_ao.transforms.equivalence`).

    Args:
        backend: of the model, which is written. Outliers are smoothed where the readers' float weights are known.
        batches: calibration images.
        world: the ranks that all do so.
        confirmed: says whether the model as it is now will do, where the float twin does not know an op of it; without
            it such a model stays as it is.

    Returns:
        What was done, one line each; nothing where the model is as it was.
    """
    if is_exported(backend.model):
        return _equalize_exported(backend, batches, world)
    patterns = Patterns(backend)
    norms, read = patterns.unfused_norms(), _smoothable(backend, patterns.read_norms())
    norms = _with_channels_first(backend, norms, batches[0])
    if not (norms or read or patterns.clipped_sites()):
        return []
    check = Equivalence(backend, batches, world, confirmed)
    folded = sum(check.used(norms, partial(_fold, backend), _FOLDED))
    clipped = [c for c in patterns.clipped_sites() if backend.read(c.site).zero_point > backend.sites[c.site].qmin]
    clipped = largest(clipped, lambda part: check.clipped(_ranges(backend, part)))
    codes = _codes(backend, batches[0], world) if clipped or read else 0
    cut = sum(check.used(clipped, partial(_cut, backend, codes=codes)))
    notes = []
    if folded:
        notes.append(f"{folded} batch norms folded into the scales and biases of the layers before them")
    if cut:
        notes.append(f"ranges of {cut} activations cut to what the functions behind them let through")
    return notes + _smoothed(backend, batches, read, codes, check, world)


def _equalize_exported(backend: Backend, batches: Sequence[Batch], world: World) -> list[str]:
    """The same for a PT2E graph, where norms are float, and what they give is put on a scale."""
    shared = SharedInputs(backend).find()
    if not shared:
        return []
    check = Equivalence(backend, batches, world)
    notes = _smoothed(backend, batches, _smoothable(backend, _norms(shared)), None, check, world)
    if centred := centre(backend, shared, batches, check, world):
        notes.append(f"the channels of {centred} inputs of linear layers moved to the middle of their ranges")
    return notes


def smoothable(backend: Backend) -> set[str]:
    """Names of the activation sites whose outlier channels `equalize` moves, where their readers' float weights are
    known."""
    exported = is_exported(backend.model)
    norms = _norms(SharedInputs(backend).find()) if exported else Patterns(backend).read_norms()
    return {name for norm in _shiftable(backend, norms) for name in norm.outputs}


def replaceable(backend: Backend) -> dict[str, str]:
    """Tensors that `equalize` may replace in a model, by path, with the site that each belongs to."""
    if is_exported(backend.model):
        return {path: name for part in SharedInputs(backend).find() for path, name in part.tensors.items()}
    patterns = Patterns(backend)
    tensors = {path: norm.weight for norm in patterns.unfused_norms() for path in norm.tensors.values()}
    return tensors | {path: norm.outputs[0] for norm in patterns.read_norms() for path in norm.tensors}


def _with_channels_first(backend: Backend, norms: Sequence[UnfusedNorm], batch: Batch) -> list[UnfusedNorm]:
    """Those that normalize the channels of their layer: a batch norm's are dimension 1, a linear layer's the last."""
    linear = {norm.node for norm in norms if backend.weight(norm.weight).dim() == 2}
    dims = dict[str, int]()

    def see(node: Node, value: Any) -> Any:
        if node.name in linear:
            dims[node.name] = value.dim()
        return value

    if linear:
        Watcher(backend.model).watch(batch.few(FEW), see)
    sizes = {norm.node: fetch(backend.model, norm.tensors["running_var"]).numel() for norm in norms}
    return [
        norm for norm in norms if dims.get(norm.node, 2) == 2 and sizes[norm.node] == len(backend.weight(norm.weight))
    ]


def _ranges(backend: Backend, clipped: Sequence[ClippedSite]) -> dict[str, tuple[float, float]]:
    """What is let through of each, by node."""
    return {backend.sites[part.site].nodes[0]: (0.0, part.high) for part in clipped}


def _fold(backend: Backend, norm: UnfusedNorm) -> bool:
    """Move a norm into its layer, and let the scales on both sides of it move as one; False where it was there."""
    found = {name: fetch(backend.model, path).detach().float() for name, path in norm.tensors.items()}
    mean, zero = found["running_mean"], torch.zeros_like(found["running_mean"])
    identity = {"running_mean": zero, "running_var": zero + (1 - norm.eps), "weight": zero + 1, "bias": zero}
    done = all(torch.equal(value, identity[name]) for name, value in found.items())
    if not done:
        factor = fold_factors(found["running_var"], found.get("weight"), found.get("bias"), norm.eps)
        bias = backend.bias(norm.weight)
        offset = (zero if bias is None else bias) - mean
        backend.scale_channels(norm.weight, factor, factor * offset + found.get("bias", zero))
        for name, path in norm.tensors.items():
            backend.put(norm.weight, path, identity[name])
        backend.write(norm.output, backend.read(norm.after))
    if same(backend.read(norm.output), backend.read(norm.after)):
        backend.tie(norm.output, norm.after)
    return not done


def _cut(backend: Backend, clipped: ClippedSite, codes: int) -> bool:
    """Take the range that nothing passes through away, where some is below 0; False where it is not worth it."""
    qparams, site = backend.read(clipped.site), backend.sites[clipped.site]
    below = int(qparams.zero_point) - site.qmin
    high = min(clipped.high, float(qparams.scale) * (codes - below))
    if float(qparams.scale) * below <= _WASTE * high or high <= 0:
        return False
    for name in {clipped.site, backend.passed.get(clipped.site, clipped.site)}:
        backend.write(name, ranged(0.0, high, site, codes))
    return True


def _smoothable(backend: Backend, norms: Sequence[ReadNorm]) -> list[ReadNorm]:
    """Those whose readers' float weights are known, and not rounded by the graph itself."""
    known = backend.float_weights.keys()
    return [norm for norm in _shiftable(backend, norms) if known >= set(norm.readers)]


def _shiftable(backend: Backend, norms: Sequence[ReadNorm]) -> list[ReadNorm]:
    return [norm for norm in norms if all(map(backend.shiftable, norm.readers))]


def _norms(shared: Sequence[SharedInput]) -> list[ReadNorm]:
    return [norm for part in shared if (norm := part.as_norm) is not None]


def _smoothed(
    backend: Backend,
    batches: Sequence[Batch],
    norms: Sequence[ReadNorm],
    codes: int | None,
    check: Equivalence,
    world: World,
) -> list[str]:
    """Move the outlier channels of norms into the weights that read them, and tell of it; nothing where the float twin
    does not know an op."""
    if not norms or check.twin is None:
        return []
    ends = channel_ends(check.twin, [norm.node for norm in norms], batches, world)
    seen = [norm for norm in norms if norm.node in ends]
    counts = check.used(seen, lambda norm: _smooth(backend, norm, ends[norm.node], codes))
    moved = f"{sum(counts)} outlier channels of {sum(map(bool, counts))} norms moved into the weights that read them"
    return [moved] if any(counts) else []


def _smooth(backend: Backend, norm: ReadNorm, ends: Ends, codes: int | None) -> int:
    """Move the outlier channels of one norm; returns their number. Without a number of codes all are used."""
    weights = {name: backend.float_weights[name] for name in norm.readers}
    columns = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)
    exponents = outlier_exponents(torch.maximum(-ends.low, ends.high), columns)
    if not bool(exponents.any()):
        return 0
    factors = torch.exp2(exponents)
    for path in norm.tensors:
        backend.put(norm.outputs[0], path, fetch(backend.model, path).detach() / factors)
    low, high = min(0.0, float((ends.low / factors).min())), max(0.0, float((ends.high / factors).max()))
    for name in norm.outputs:
        backend.write(name, ranged(low, high, backend.sites[name], codes))
    for name, weight in weights.items():
        qparams, site = backend.read(name), backend.sites[name]
        wider = _peak(weight * factors, site) / _peak(weight, site)
        backend.set_float_weight(name, weight * factors)
        backend.write(name, QParams(qparams.scale * wider.double(), qparams.zero_point))
    return int((exponents > 0).sum())


def _codes(backend: Backend, batch: Batch, world: World) -> int:
    """Steps between the least and the greatest code that observers calibrated for: half of the container where hardly
    any code of any value is beyond it (reduce_range)."""
    shares = [0.0]

    def see(_: Node, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_quantized and value.dtype == torch.quint8:
            shares.append(float((value.int_repr() > REDUCED_QMAX).float().mean()))
        return value

    Watcher(backend.model).watch(batch.few(_FEW), see)
    return REDUCED_QMAX if world.first(max(shares)) < _BEYOND else 2 * REDUCED_QMAX + 1


def _peak(weight: Tensor, site: ScaleSite) -> Tensor:
    """Largest magnitude that each scale of a weight is for; 1 where all are zero."""
    peak = weight.abs().amax() if site.axis is None else weight.abs().flatten(1).amax(1)
    return torch.where(peak > 0, peak, 1.0)
