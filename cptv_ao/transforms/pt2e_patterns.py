"""Places in a PT2E graph where an equivalent form gives the scales of linear layers' inputs more to work with; found
here, used in `cptv_ao.transforms.equalize`.

    a norm:     aten.layer_norm(x, w, b) or rms_norm     -> quantize -> dequantize -> aten.linear only
    attention:  aten.linear -> ... values of attention   -> quantize -> dequantize -> aten.linear only

What is subtracted from each channel of the bias on the left is missing behind the quantize node: the weights of
attention add up to one. So it can be given back in the biases on the right.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.pt2e import weight_sites
from cptv_ao.fx.decomposed_ops import called
from cptv_ao.fx.readers import own_path, read_once, reads, users_of
from cptv_ao.transforms.shared_inputs import Reader, SharedInput

_aten = torch.ops.aten
# Norms, and where their weights and biases are among the arguments.
_NORMS: dict[Any, tuple[int, int | None]] = {_aten.layer_norm: (2, 3), _aten.rms_norm: (2, None)}
# Ops that move values of channels about, or pick some.
_PICKS: set[Any] = {
    operator.getitem, _aten.chunk, _aten.select, _aten.slice, _aten.split, _aten.split_with_sizes, _aten.unbind,
}  # fmt: skip
_MOVES = _PICKS | {
    _aten.alias, _aten.clone, _aten.contiguous, _aten.dropout, _aten.expand, _aten.flatten, _aten.permute,
    _aten.reshape, _aten.squeeze, _aten.transpose, _aten.unflatten, _aten.unsqueeze, _aten.view,
}  # fmt: skip


class SharedInputs:
    """Looks for them in a PT2E graph.

    Args:
        backend: of the graph.
    """

    def __init__(self, backend: Backend) -> None:
        self._model, self._sites = backend.model, backend.sites
        self._tied = Counter(site.tied for site in self._sites.values())
        self._once = read_once(self._model.graph.nodes)
        self._weight_of = weight_sites(self._model, backend.sites)
        self._quantized = {
            site.nodes[0]: site.name for site in backend.sites.values() if site.kind == "activation" and not site.fixed
        }

    def find(self) -> list[SharedInput]:
        """In graph order."""
        return [found for node in self._model.graph.nodes if (found := self._shared(node)) is not None]

    def _shared(self, value: Node) -> SharedInput | None:
        users = [user for user in users_of(value) if reads(user)]
        names = [self._quantized[user.name] for user in users if user.name in self._quantized]
        if not names or len(names) < len(users) or not self._alone(names):
            return None
        readers = [self._reader(layer, back) for user in users for back in users_of(user) for layer in users_of(back)]
        read = [reader for reader in readers if reader is not None]
        source = self._source(value)
        if source is None or not read or len(read) < len(readers):
            return None
        norm = called(source) in _NORMS
        weight, bias = self._norm_parameters(source) if norm else (None, own_path(_argument(source, 2), self._once))
        if (weight if norm else bias) is None:
            return None
        owner = names[0] if norm else self._weight(source) or names[0]
        return SharedInput(tuple(names), value.name, source.name, owner, weight, bias, tuple(read))

    def _norm_parameters(self, norm: Node) -> tuple[str | None, str | None]:
        """Paths of the weight and the bias of a norm over the last dimension; no weight where something else reads
        one of them."""
        at, bias_at = _NORMS[called(norm)]
        given = None if bias_at is None else _argument(norm, bias_at)
        weight, bias = own_path(_argument(norm, at), self._once), own_path(given, self._once)
        shape: Any = norm.args[1]
        return (weight, bias) if len(shape) == 1 and (bias or given is None) else (None, None)

    def _alone(self, names: list[str]) -> bool:
        """Whether these sites are tied to each other at most."""
        tied = {self._sites[name].tied for name in names}
        return len(tied) == 1 and self._tied[tied.pop()] == len(set(names))

    def _reader(self, layer: Node, dequantized: Node) -> Reader | None:
        """A linear layer that reads a dequantized value, with a weight and a bias of its own."""
        weight = self._weight(layer)
        if called(layer) is not _aten.linear or layer.args[0] is not dequantized or weight is None:
            return None
        given = _argument(layer, 2)
        bias = own_path(given, self._once)
        if len(self._sites[weight].nodes) != 1 or (given is not None and bias is None):
            return None
        return Reader(weight, bias)

    def _weight(self, layer: Node) -> str | None:
        """Site of the weight of a linear layer, where it is one."""
        weight = _argument(layer, 1)
        return self._weight_of.get(weight.name) if isinstance(weight, Node) else None

    def _source(self, value: Node) -> Node | None:
        """The norm or linear layer whose channels a value has; what is on the way moves them, or mixes positions."""
        node: Any = value
        while isinstance(node, Node):
            op = called(node)
            if op in _NORMS:
                return node if node is value else None
            users = [user for user in node.users if reads(user)]
            if node is not value and len(users) > 1 and not all(called(user) in _PICKS for user in users):
                return None
            if op is _aten.linear:
                return node
            if op is _aten.scaled_dot_product_attention:
                node = node.args[2]
            elif op in {_aten.matmul, _aten.bmm}:
                node = node.args[1] if _is_softmax(node.args[0]) else None
            else:
                node = node.args[0] if op in _MOVES else None
        return None


def _argument(node: Node, place: int) -> Any:
    """An argument, None where it is left out."""
    return node.args[place] if len(node.args) > place else None


def _is_softmax(node: Any) -> bool:
    while isinstance(node, Node) and called(node) in _MOVES - _PICKS:
        node = node.args[0]
    return isinstance(node, Node) and called(node) in {_aten.softmax, _aten._softmax}
