"""Residual streams of a lowered model rotated: an equivalent form, in which a few large channels are spread over all.

See `cptv_ao.transforms.float_model.rotation` for the method, which does the same to a float model. Here the weights of
layers and the tensors of norms are replaced; where a norm is returned, a linear layer in float rotates back: see
`cptv_ao.transforms.returned_norms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.rotations import WORTH, peak_ratio, rotation
from cptv_ao.core.sites import ScaleSite
from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.equivalence import Equivalence
from cptv_ao.transforms.lone_sites import LoneSites
from cptv_ao.transforms.lowered_patterns import Patterns
from cptv_ao.transforms.lowered_streams import LoweredStreams, Shown
from cptv_ao.transforms.replaced_weights import replace_bias, replace_weight
from cptv_ao.transforms.residual_streams import Layer, ResidualStream
from cptv_ao.transforms.turned_streams import HeldTensors, turn_stream


@dataclass(frozen=True)
class OutlyingStream:
    """A stream whose largest values are `ratio` times larger than those of the rotated one."""

    stream: ResidualStream
    ratio: float

    @property
    def told(self) -> str:
        """What is said of it once it is rotated."""
        sums = len(self.stream.sums)
        return f"a residual stream of {sums} sums rotated: its largest values are {self.ratio:.1f} times smaller so"


def outlying_streams(backend: Backend, few: Batch, world: World) -> list[OutlyingStream]:
    """The streams of a lowered model that are worth a rotation, as a few images show it.

    Args:
        backend: of it, with the float weights of all layers around a stream.
        world: the ranks that all ask so.
    """
    if backend.form.simulates_itself or not Patterns(backend).normed_sums():
        return []
    shown, found = Shown(backend, few), list[OutlyingStream]()
    for stream in LoweredStreams(backend, shown).find():
        sums = (shown.sums[node.name] for node in stream.sums)
        ratio = world.first(peak_ratio(sums, rotation(stream.width)))
        if ratio >= WORTH:
            found.append(OutlyingStream(stream, ratio))
    return found


def rotate_streams(backend: Backend, found: Sequence[OutlyingStream], check: Equivalence) -> list[OutlyingStream]:
    """Rotate streams that norms give to layers alone; nothing where the float twin does not know an op.

    Args:
        backend: of the model, which is written: weights and tensors; not the scales, see `sites_in`.
        check: of the model.

    Returns:
        Those that were rotated.
    """
    if not check.sees:
        return []
    open_ones = [one for one in found if _is_open(backend, one.stream)]
    return check.used(open_ones, partial(_rotate, backend))


def turnable(backend: Backend) -> dict[str, str]:
    """Tensors that `rotate_streams` may replace in a lowered model, by path, with the site that each belongs to."""
    sums, lone = Patterns(backend).normed_sums(), LoneSites(backend)
    if not sums:
        return {}
    paths = list[str]()
    for node in backend.model.graph.nodes:
        module = lone.modules.get(str(node.target)) if node.op == "call_module" else None
        if type(module) in (nn.Linear, nn.Embedding, nnq.LayerNorm):
            paths += [f"{node.target}.{name}" for name in ("weight", "bias") if hasattr(module, name)]
        elif node.op == "get_attr":
            paths.append(str(node.target))
    held = {path: value for path in paths if isinstance(value := fetch(backend.model, path), Tensor)}
    return {path: sums[0] for path, value in held.items() if value.is_floating_point() and value.dim()}


def _is_open(backend: Backend, stream: ResidualStream) -> bool:
    """Whether layers read all its norms, no factors are left behind those that write, and scales may move."""
    factors = [writer.factors for writer in stream.writers if writer.factors is not None]
    folded = all(bool((fetch(backend.model, path) == 1).all()) for path in factors)
    return folded and all(reader.layers for reader in stream.readers) and bool(sites_in(backend, [stream]))


def _rotate(backend: Backend, found: OutlyingStream) -> OutlyingStream:
    """Write the weights and tensors of a rotated stream."""
    stream = found.stream
    turn_stream(_Tensors(backend, stream), stream, rotation(stream.width))
    return found


class _Tensors(HeldTensors):
    """What a rotation reads and writes, in float64; tensors that are replaced belong to the first sum of a stream."""

    def __init__(self, backend: Backend, stream: ResidualStream) -> None:
        self._backend = backend
        self._owner = sites_in(backend, [stream])[0].name

    def wide(self, path: str) -> Tensor:
        held: Tensor = fetch(self._backend.model, path)
        return held.detach().double()

    def put(self, path: str, value: Tensor) -> None:
        self._backend.rewrites.put(self._owner, path, value.to(fetch(self._backend.model, path).dtype))

    def of_layer(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        if layer.bias is None:
            bias = self._backend.weights.biases.given(layer.weight)
            return self._backend.float_weights[layer.weight].double(), None if bias is None else bias.detach().double()
        held = fetch(self._backend.model, layer.bias)
        return self.wide(layer.weight), None if held is None else self.wide(layer.bias)

    def put_layer(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        if layer.bias is not None:
            self.put(layer.weight, weight)
            if bias is not None:
                self.put(layer.bias, bias)
            return
        replace_weight(self._backend, layer.weight, weight.float())
        if bias is not None:
            replace_bias(self._backend, layer.weight, bias.float())


def sites_in(backend: Backend, streams: Sequence[ResidualStream]) -> list[ScaleSite]:
    """Of the activations in streams, and in the norms that read them."""
    nodes = {node.name for stream in streams for node in stream.nodes}
    activations = (site for site in backend.sites.values() if site.kind == "activation" and not site.fixed)
    return [site for site in activations if not nodes.isdisjoint(site.nodes)]
