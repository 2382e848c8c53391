"""Places in a lowered graph where an equivalent form gives its scales more to work with; found here, used in
`cptv_ao.transforms.equalize`.

    unfused norm:  quantized layer -> dequantize -> batch_norm -> quantize_per_tensor
    scaled layer:  quantized layer -> quantized.mul by a tensor of the model
    read norm:     quantized layer norm -> linear layers only
    clipped site:  an activation -> ReLU or ReLU6 only
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.ao.nn.quantized as nnq
from torch.fx import Node
from torch.nn import functional

from cptv_ao.backends.backend import Backend
from cptv_ao.core.sites import ScaleSite
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.op_table import DEQUANTIZE, DROPOUT, IDENTITY, QUANTIZE, RELU, RELU6
from cptv_ao.fx.ops import op_of
from cptv_ao.fx.quantized_ops import of_node
from cptv_ao.fx.readers import own_path, read_once, reads

_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps", "output_scale", "output_zero_point")
# What functions let through above 0; nothing below.
_CLIPS = {RELU: math.inf, RELU6: 6.0}

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
class ReadNorm:
    """A quantized layer norm that only linear layers read.

    Attributes:
        outputs: its sites, of the same qparams.
        node: its name in the graph.
        tensors: paths of its weight and bias.
        readers: sites of the weights that read it.
    """

    outputs: tuple[str, ...]
    node: str
    tensors: tuple[str, ...]
    readers: tuple[str, ...]


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
        self._model = backend.model
        self._modules = dict(self._model.named_modules(remove_duplicate=False))
        self._once = read_once(self._model.graph.nodes)
        ties = Counter(site.tied for site in backend.sites.values())
        alone = [s for s in backend.sites.values() if len(s.nodes) == 1 and not s.fixed and ties[s.tied] == 1]
        self._outputs = {site.nodes[0]: site for site in alone if site.kind == "activation"}
        self._weights = {site.nodes[0]: site for site in alone if site.kind == "weight"}

    def unfused_norms(self) -> list[UnfusedNorm]:
        """In graph order."""
        return self._all(self._unfused)

    def scaled_layers(self) -> list[ScaledLayer]:
        """In graph order."""
        return self._all(self._scaled)

    def read_norms(self) -> list[ReadNorm]:
        """In graph order."""
        return self._all(self._read)

    def clipped_sites(self) -> list[ClippedSite]:
        """In graph order."""
        return self._all(self._clipped)

    def _all(self, pattern: Callable[[Node], _Found | None]) -> list[_Found]:
        return [found for node in self._model.graph.nodes if (found := pattern(node)) is not None]

    def _unfused(self, node: Node) -> UnfusedNorm | None:
        if node.target not in (functional.batch_norm, torch.batch_norm):
            return None
        given = dict(zip(_BATCH_NORM, node.args, strict=False)) | node.kwargs
        tensors = _own_tensors(given, ("running_mean", "running_var", "weight", "bias"), self._once)
        layer, after = self._layer(given["input"], node), self._after(node)
        if tensors is None or "running_var" not in tensors or layer is None or after is None:
            return None
        eps = given.get("eps", 1e-5)
        if given.get("training", False) is not False or not isinstance(eps, float):
            return None
        weight, output = self._weights[layer.name], self._outputs[layer.name]
        if weight.axis != 0 or (output.qmin, output.qmax) != (after.qmin, after.qmax):
            return None
        return UnfusedNorm(weight.name, output.name, after.name, node.name, tensors, eps)

    def _layer(self, value: Any, norm: Node) -> Node | None:
        """The quantized layer whose dequantized output a norm reads, and nothing else."""
        if (
            not isinstance(value, Node)
            or op_of(value, self._modules) is not DEQUANTIZE
            or not isinstance(value.args[0], Node)
        ):
            return None
        layer = value.args[0]
        if layer.name not in self._weights or layer.name not in self._outputs or list(layer.users) != [value]:
            return None
        known = of_node(layer, self._modules)
        if known is None or known.after or known.adds:
            return None
        return layer if [user for user in value.users if reads(user)] == [norm] else None

    def _scaled(self, node: Node) -> ScaledLayer | None:
        product = self._outputs.get(node.name)
        if packet_of(node.target) is not torch.ops.quantized.mul or product is None:
            return None
        for value, factors in (node.args[:2], node.args[1::-1]):
            path, layer = self._tensor(factors, node), self._plain_layer(value, node)
            if path is None or layer is None:
                continue
            weight, output = self._weights[layer.name], self._outputs[layer.name]
            if weight.axis == 0 and (output.qmin, output.qmax) == (product.qmin, product.qmax):
                held = self._outputs[cast(Node, factors).name]
                return ScaledLayer(weight.name, output.name, held.name, product.name, path)
        return None

    def _tensor(self, value: Any, reader: Node) -> str | None:
        """Path of the tensor of the model that is put on a scale for a node alone."""
        if not isinstance(value, Node) or op_of(value, self._modules) is not QUANTIZE or list(value.users) != [reader]:
            return None
        return own_path(value.args[0], self._once) if value.name in self._outputs else None

    def _plain_layer(self, value: Any, reader: Node) -> Node | None:
        """The quantized layer whose output a node alone reads, through what changes nothing in eval mode."""
        while isinstance(value, Node) and list(value.users) == [reader]:
            if value.name in self._weights and value.name in self._outputs:
                known = of_node(value, self._modules)
                return None if known is None or known.after or known.adds else value
            if op_of(value, self._modules) not in (IDENTITY, DROPOUT) or not value.args:
                return None
            value, reader = value.args[0], value
        return None

    def _after(self, norm: Node) -> ScaleSite | None:
        """The site on whose scale the output of a norm is put at once."""
        readers = [user for user in norm.users if reads(user)]
        if len(readers) != 1 or op_of(readers[0], self._modules) is not QUANTIZE:
            return None
        return self._outputs.get(readers[0].name)

    def _read(self, node: Node) -> ReadNorm | None:
        output, norm = self._outputs.get(node.name), self._layer_norm(node)
        if output is None or norm is None:
            return None
        tensors, shape = norm
        users = [user for user in node.users if reads(user)]
        readers = [self._weights[user.name] for user in users if user.name in self._weights]
        layers = [of_node(user, self._modules) for user in users]
        linear = all(layer is not None and layer.product == "linear" for layer in layers)
        if not (tensors and users) or len(shape) != 1 or len(readers) < len(users) or not linear:
            return None
        return ReadNorm((output.name,), node.name, tuple(tensors), tuple(reader.name for reader in readers))

    def _layer_norm(self, node: Node) -> tuple[list[str], Sequence[int]] | None:
        """Paths of weight and bias, and the normalized shape."""
        if node.op == "call_module":
            module: Any = self._modules[str(node.target)]
            if type(module) is not nnq.LayerNorm or str(node.target) not in self._once:
                return None
            held = [name for name in ("weight", "bias") if getattr(module, name, None) is not None]
            return [f"{node.target}.{name}" for name in held], module.normalized_shape
        if packet_of(node.target) is not torch.ops.quantized.layer_norm:
            return None
        given: dict[str, Any] = dict(zip(_LAYER_NORM, node.args, strict=False)) | node.kwargs
        found = _own_tensors(given, ("weight", "bias"), self._once)
        return None if found is None or "weight" not in found else (list(found.values()), given["normalized_shape"])

    def _clipped(self, node: Node) -> ClippedSite | None:
        site = self._outputs.get(node.name)
        highs = None if site is None else self._highs(node)
        return ClippedSite(site.name, max(highs)) if site is not None and highs else None

    def _highs(self, node: Node) -> list[float] | None:
        """What each reader of a value lets through of it above 0; None where one also reads what is below."""
        highs: list[float] = []
        for user in node.users:
            op = op_of(user, self._modules)
            if op in (IDENTITY, DROPOUT):
                behind = self._highs(user)
                if not behind:
                    return None
                highs += behind
            elif op in _CLIPS:
                highs.append(_CLIPS[op])
            elif reads(user):
                return None
        return highs


def _own_tensors(given: Mapping[str, Any], names: Sequence[str], once: Container[str]) -> dict[str, str] | None:
    """Paths of these arguments of a node, those that are None left out; None where one is shared or computed."""
    nodes = {name: given[name] for name in names if given.get(name) is not None}
    paths = {name: path for name, node in nodes.items() if (path := own_path(node, once)) is not None}
    return paths if len(paths) == len(nodes) else None
