"""Equivalent forms of a converted model, from which a search of scales gets further: its function in float is the same.

Batch norms that FX did not fuse: all channels of a convolution's output share one scale before the norm makes them
alike. Scales of weights are per channel, so they take the norm's factors without another code, and the bias its
offsets (batch norm folding, Jacob et al., arXiv 1712.05877); the norm that is left is the identity.

    Before: quantized conv (scale for all channels) -> dequantize -> batch_norm -> quantize_per_tensor(s, z)
    After:  quantized conv (s, z)                   -> dequantize -> identity   -> quantize_per_tensor(s, z)

Factors by channel behind a layer (LayerScale) become part of it: see `cptv_ao.transforms.layer_scale`.

Ranges below 0, or above 6, of what a ReLU or ReLU6 reads: they take codes and say nothing.

A few channels of a residual stream that are far larger than the others: see `cptv_ao.transforms.stream_rotation`.

Channels of different size from layer to layer: see `cptv_ao.transforms.cross_layer`.

Values that are put on a second scale: see `cptv_ao.transforms.second_scales`.

Channels that linear layers read behind a norm, in PT2E graphs behind attention, too: see
`cptv_ao.transforms.linear_inputs`. Keys of attention in lowered models: see
`cptv_ao.transforms.attention_keys`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.formatting import counted
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.fx.paths import fetch
from cptv_ao.simulation.nothing_rounded import NothingRounded
from cptv_ao.simulation.twin import FEW
from cptv_ao.transforms.attention_keys import centre_keys
from cptv_ao.transforms.attention_patterns import AttentionPatterns, Keys
from cptv_ao.transforms.bn_folding import _fold, is_folded
from cptv_ao.transforms.channel_groups import ChannelGroup, ChannelGroups
from cptv_ao.transforms.channel_ranges import (
    ByChannel,
    ChannelRange,
    channel_ends,
    hold_ranges,
    last_dimension,
    moving_with,
    whole_values,
)
from cptv_ao.transforms.cross_layer import equalizable, equalized
from cptv_ao.transforms.equivalence import Equivalence, forms_used, largest
from cptv_ao.transforms.layer_scale import fold_scale
from cptv_ao.transforms.linear_inputs import even_out, open_inputs
from cptv_ao.transforms.lowered_patterns import ClippedSite, Patterns, ScaledLayer, UnfusedNorm
from cptv_ao.transforms.pt2e_patterns import SharedInputs
from cptv_ao.transforms.range_clipping import cut_range, observed_codes
from cptv_ao.transforms.second_scales import stay_on_first
from cptv_ao.transforms.shared_inputs import SharedInput
from cptv_ao.transforms.stream_rotation import OutlyingStream, outlying_streams, rotate_streams, sites_in, turnable

# How far folded norms may move the outputs: -128 has no counterpart where a channel changes its sign, and a channel
# that hardly varies is given as if it did not.
_FOLDED = 1e-2


@dataclass(frozen=True)
class _Found:
    """Where a lowered model may have other forms."""

    norms: Sequence[UnfusedNorm]
    scaled: Sequence[ScaledLayer]
    clipped: Sequence[ClippedSite]
    streams: Sequence[OutlyingStream]
    keys: Sequence[Keys]
    read: Sequence[SharedInput]


def equalize(
    backend: Backend,
    batches: Sequence[Batch],
    world: World = ALONE,
    confirmed: Callable[[], bool] | None = None,
    start: NothingRounded | None = None,
) -> list[str]:
    """Fold unfused batch norms and layer scales, cut ranges that functions clip, rotate residual streams, bring
    channels to like ranges across layers, and even out and centre what linear layers read, and keys of attention.

    Each is left where it makes the model compute something else in float (see `cptv_ao.transforms.equivalence`).

    Args:
        backend: of the model, which is written. Channels are evened out where the readers' float weights are known.
        batches: calibration images.
        world: the ranks that all do so.
        confirmed: says whether the model as it is now will do, where the float twin does not know an op of it; without
            it such a model stays as it is.
        start: of the model as it is, where it is known what it gives on the first few images.

    Returns:
        What was done, one line each; nothing where the model is as it was.
    """
    biases = backend.weights.biases
    corrected = biases.take_as_given()  # a form of a model that was refined before has these, too
    start = NothingRounded(backend, batches[0]) if start is None else start
    if backend.form.simulates_itself:
        done = _equalize_exported(backend, batches, world, start)
    else:
        done = _equalize_lowered(backend, batches, world, confirmed, start)
    if not done:
        biases.know(corrected)
    return done


def _equalize_lowered(
    backend: Backend,
    batches: Sequence[Batch],
    world: World,
    confirmed: Callable[[], bool] | None,
    start: NothingRounded,
) -> list[str]:
    """As `equalize`, of a lowered model."""
    patterns = Patterns(backend)
    norms, read = patterns.unfused_norms(), open_inputs(backend, patterns.read_norms())
    scaled, clipped, keys = patterns.scaled_layers(), patterns.clipped_sites(), AttentionPatterns(backend).keys()
    norms = _with_channels_first(backend, norms, batches[0])
    streams = outlying_streams(backend, batches[0].few(FEW), world)
    if not (norms or scaled or read or keys or streams or clipped or _groups(backend, norms)):
        return stay_on_first(backend)
    found = _Found(norms, scaled, clipped, streams, keys, read)
    return forms_used(backend, start, world, partial(_use_lowered, backend, found, batches, world), confirmed)


def _use_lowered(
    backend: Backend, found: _Found, batches: Sequence[Batch], world: World, check: Equivalence
) -> list[str]:
    """Use the forms that were found."""
    norms, streams, keys, read = found.norms, found.streams, found.keys, found.read
    folded = sum(check.used(norms, partial(_fold, backend), _FOLDED))
    scales = sum(check.used(found.scaled, partial(fold_scale, backend), _FOLDED))
    clipped = [c for c in found.clipped if backend.read(c.site).zero_point > backend.sites[c.site].qmin]
    clipped = largest(clipped, lambda part: check.clipped(_ranges(backend, part)))
    groups = _groups(backend, [norm for norm in norms if is_folded(backend, norm)])
    codes = observed_codes(backend, batches[0], world) if clipped or read or groups or keys or streams else 0
    cut = sum(check.used(clipped, partial(cut_range, backend, codes=codes)))
    notes = []
    if folded:
        notes.append(f"{counted(folded, 'batch norm')} folded into the scales and biases of the layers before them")
    if scales:
        notes.append(f"{counted(scales, 'layer scale')} folded into the layers before them")
    if cut:
        notes.append(f"ranges of {counted(cut, 'activation')} cut to what the functions behind them let through")
    rotated = rotate_streams(backend, streams, check)
    notes += [one.told for one in rotated]
    notes += equalized(backend, groups, batches, codes, check, world)
    # Nothing that follows changes what is looked at here.
    moving = moving_with(backend, (site.name for site in sites_in(backend, [one.stream for one in rotated])))
    channels = [*(one.source for one in keys), *(one.value for one in read)]
    ends = _ends(check, whole_values(moving) | dict.fromkeys(channels, last_dimension), batches, world)
    hold_ranges(backend, moving, ends, codes)
    notes += centre_keys(backend, keys, ends, batches, check, world, codes)
    notes += even_out(backend, read, ends, check, codes)
    return notes + stay_on_first(backend)


def _equalize_exported(backend: Backend, batches: Sequence[Batch], world: World, start: NothingRounded) -> list[str]:
    """The same for a PT2E graph, where norms are float, and what they give is put on a scale."""
    shared = open_inputs(backend, SharedInputs(backend).find())
    if not shared:
        return []

    def use(check: Equivalence) -> list[str]:
        ends = _ends(check, {part.value: last_dimension for part in shared}, batches, world)
        return even_out(backend, shared, ends, check)

    return forms_used(backend, start, world, use)


def _ends(
    check: Equivalence, wanted: Mapping[str, ByChannel], batches: Sequence[Batch], world: World
) -> dict[str, ChannelRange]:
    """Of the model as it is; none where the float twin does not know an op."""
    return channel_ends(check.twin, wanted, batches, world) if wanted and check.twin is not None else {}


def smoothable(backend: Backend) -> set[str]:
    """Names of the activation sites whose outlier channels `equalize` moves, where their readers' float weights are
    known."""
    return {name for part in _shared_inputs(backend) if part.scalable(backend) for name in part.sites}


def rotatable(backend: Backend) -> set[str]:
    """Names of the activation sites of residual streams, whose outlier channels a rotation spreads over all (see
    `cptv_ao.transforms.stream_rotation`), if its layers allow one."""
    return set() if backend.form.simulates_itself else set(Patterns(backend).normed_sums())


def foldable(backend: Backend, batch: Batch) -> list[str]:
    """Names of the nodes of the batch norms that `equalize` folds."""
    if backend.form.simulates_itself:  # norms are float there
        return []
    norms = _with_channels_first(backend, Patterns(backend).unfused_norms(), batch)
    return [norm.node for norm in norms if not is_folded(backend, norm)]


def replaceable(backend: Backend) -> dict[str, str]:
    """Tensors that `equalize` may replace in a model, by path, with the site that each belongs to."""
    shared = {path: name for part in _shared_inputs(backend) for path, name in part.tensors.items()}
    if backend.form.simulates_itself:
        return shared
    patterns = Patterns(backend)
    tensors = {path: norm.weight for norm in patterns.unfused_norms() for path in norm.tensors.values()}
    scaled = {scaled.path: scaled.weight for scaled in patterns.scaled_layers()}
    return turnable(backend) | tensors | scaled | shared


def _shared_inputs(backend: Backend) -> list[SharedInput]:
    return SharedInputs(backend).find() if backend.form.simulates_itself else Patterns(backend).read_norms()


def _groups(backend: Backend, folded: Sequence[UnfusedNorm]) -> list[ChannelGroup]:
    """Values whose channels can be scaled, where these norms are the identity."""
    return equalizable(backend, ChannelGroups(backend, {norm.node for norm in folded}).find())


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
