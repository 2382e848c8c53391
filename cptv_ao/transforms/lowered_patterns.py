"""Places in a lowered graph where an equivalent form gives its scales more to work with; found here, used in
`cptv_ao.transforms.equalize`.

    unfused norm:  quantized layer -> dequantize -> batch_norm -> quantize_per_tensor
    scaled layer:  quantized layer -> quantized.mul by a tensor of the model
    read norm:     quantized layer norm -> linear layers only, see `cptv_ao.transforms.shared_inputs`
    clipped site:  an activation -> ReLU or ReLU6 only
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch.fx import Node
from torch.nn import functional

from cptv_ao.backends.backend import Backend
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.quantized_ops import SUMS, of_node
from cptv_ao.fx.readers import reads, users_of
from cptv_ao.transforms.lone_sites import LoneSites
from cptv_ao.transforms.shared_inputs import Reader, SharedInput

_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class UnfusedNorm:
    """A batch norm in float between a quantized layer and a quantize node.

    Attributes:
        weight, output: sites of the layer.
        after: site of the quantize node.
        node: its name in the graph.
        tensors: paths of its own tensors, by the names of `torch.nn.functional.batch_norm`.
    """

    weight: str
    output: str
    after: str
    node: str
    tensors: Mapping[str, str]
    eps: float


@dataclass(frozen=True)
class ScaledLayer:
    """A quantized layer whose output is multiplied by a tensor of the model.

    Attributes:
        weight, output: sites of the layer.
        factors: site of the tensor.
        product: site of the product.
        path: of the tensor.
    """

    weight: str
    output: str
    factors: str
    product: str
    path: str


@dataclass(frozen=True)
class ClippedSite:
    """An activation of which the functions that read it let through what is in 0..high alone."""

    site: str
    high: float


class Patterns:
    """Looks for them around the sites that belong to one node alone and move alone.

    Args:
        backend: of a lowered model.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend, self._graph, self._lone = backend, backend.model.graph, LoneSites(backend)

    def unfused_norms(self) -> list[UnfusedNorm]:
        """In graph order."""
        return self._all(self._unfused)

    def scaled_layers(self) -> list[ScaledLayer]:
        """In graph order."""
        return self._all(self._scaled)

    def read_norms(self) -> list[SharedInput]:
        """In graph order."""
        return self._all(self._read)

    def clipped_sites(self) -> list[ClippedSite]:
        """In graph order."""
        return self._all(self._clipped)

    def normed_sums(self) -> list[str]:
        """Sites of sums that a layer norm reads: of residual streams."""
        sums = {node for node in self._graph.nodes if packet_of(node.target) in SUMS}
        read = [node for node in sums if any(self._lone.layer_norm(user) for user in node.users)]
        return [self._lone.outputs[node.name].name for node in read if node.name in self._lone.outputs]

    def _all(self, pattern: Callable[[Node], _Found | None]) -> list[_Found]:
        return [found for node in self._graph.nodes if (found := pattern(node)) is not None]

    def _unfused(self, node: Node) -> UnfusedNorm | None:
        if node.target not in (functional.batch_norm, torch.batch_norm):
            return None
        given = dict(zip(_BATCH_NORM, node.args, strict=False)) | node.kwargs
        tensors = self._lone.own_tensors(given, ("running_mean", "running_var", "weight", "bias"))
        layer, after = self._lone.dequantized_layer(given["input"], node), self._lone.put_on(node)
        if tensors is None or "running_var" not in tensors or layer is None or after is None:
            return None
        eps = given.get("eps", 1e-5)
        if given.get("training", False) is not False or not isinstance(eps, float):
            return None
        weight, output = self._lone.weights[layer.name], self._lone.outputs[layer.name]
        if weight.axis != 0 or (output.qmin, output.qmax) != (after.qmin, after.qmax):
            return None
        return UnfusedNorm(weight.name, output.name, after.name, node.name, tensors, eps)

    def _scaled(self, node: Node) -> ScaledLayer | None:
        product = self._lone.outputs.get(node.name)
        if packet_of(node.target) is not torch.ops.quantized.mul or product is None:
            return None
        for value, factors in (node.args[:2], node.args[1::-1]):
            path, layer = self._lone.tensor(factors, node), self._lone.plain_layer(value, node)
            if path is None or layer is None:
                continue
            weight, output = self._lone.weights[layer.name], self._lone.outputs[layer.name]
            if weight.axis == 0 and (output.qmin, output.qmax) == (product.qmin, product.qmax):
                held = self._lone.outputs[cast(Node, factors).name]
                return ScaledLayer(weight.name, output.name, held.name, product.name, path)
        return None

    def _read(self, node: Node) -> SharedInput | None:
        output, norm = self._lone.outputs.get(node.name), self._lone.layer_norm(node)
        if output is None or norm is None:
            return None
        (weight, bias), shape = norm
        users = [user for user in users_of(node) if reads(user)]
        readers = [self._lone.weights[user.name] for user in users if user.name in self._lone.weights]
        layers = [of_node(user, self._lone.modules) for user in users]
        linear = all(layer is not None and layer.product == "linear" for layer in layers)
        if weight is None or not users or len(shape) != 1 or len(readers) < len(users) or not linear:
            return None
        packed = tuple(Reader(reader.name, None, self._backend.correctable(reader.name)) for reader in readers)
        return SharedInput((output.name,), node.name, node.name, output.name, weight, bias, packed)

    def _clipped(self, node: Node) -> ClippedSite | None:
        site = self._lone.outputs.get(node.name)
        highs = None if site is None else self._lone.highs(node)
        return ClippedSite(site.name, max(highs)) if site is not None and highs else None
