"""Where a PT2E graph holds its scales, weights and constants, and how they are written there."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from cptv_ao.backends.compiling import compiled_once, mark_written
from cptv_ao.backends.scale_slots import BufferScaleSlot, ScaleSlot, WeightSlot, quantized_weight
from cptv_ao.backends.tensor_slots import TensorSlot
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.weight_rounding import round_by_reciprocal, rounding_to
from cptv_ao.fx.decomposed_ops import calls, calls_default
from cptv_ao.fx.ops import op_of
from cptv_ao.fx.paths import fetch
from cptv_ao.fx.readers import own_path

#: Ops that put a value, or a weight, on a scale.
QUANTIZE = ("quantize_per_tensor", "quantize_per_channel", "quantize_per_channel_group", "quantize_per_token")
# Of the codes that are searched.
_SEARCHED = (torch.int8, torch.uint8)


class LiteralScaleSlot:
    """A scale and zero_point among the arguments of a quantize node and of its dequantize nodes, or of several
    dequantize nodes of one weight."""

    tensors: tuple[TensorSlot, ...] = ()

    def __init__(self, model: GraphModule, node: Node, *others: Node) -> None:
        self._model, self._node = model, node
        self._nodes = [node, *others, *(user for user in node.users if calls(user.target, "dequantize_per_tensor"))]

    def read(self) -> QParams:
        scale, zero_point = self._node.args[1:3]
        return QParams(torch.tensor(scale, dtype=torch.float64), torch.tensor(zero_point))

    def write(self, qparams: QParams) -> None:
        self.restore((float(qparams.scale), int(qparams.zero_point)))

    def state(self) -> Any:
        return self._node.args[1:3]

    def restore(self, state: Any) -> None:
        with compiled_once(self._model):
            for node in self._nodes:
                if node.args[1:3] != state:
                    mark_written(self._model)
                    node.args = (node.args[0], *state, *node.args[3:])


class Pt2eWeightSlot(WeightSlot):
    """A weight or a constant before its dequantize nodes: codes that are written, or a float tensor that the graph
    rounds.

    Args:
        nodes: the dequantize nodes.
        once: the tensors that one node alone reads, see `cptv_ao.fx.readers.read_once`.
    """

    def __init__(self, model: GraphModule, nodes: Sequence[Node], once: Container[str]) -> None:
        node, source = nodes[0], nodes[0].args[0]
        assert isinstance(source, Node)
        quantize = source if source.op == "call_function" else None
        self._codes = TensorSlot.of(model, str(source.target)) if quantize is None else None
        self.float_weight = _value(model, quantize.args[0]) if quantize is not None else None
        own = own_path(quantize.args[0], once) if quantize is not None else None
        self.float_at = None if own is None else TensorSlot.of(model, own)
        self.of_layer = any(multiplies(user) for user in nodes)
        self.axis: int | None = None
        if calls_default(node, "dequantize_per_channel"):
            scale, zero_point = (
                TensorSlot.of(model, str(part.target)) for part in node.args[1:3] if isinstance(part, Node)
            )
            self._qparams: ScaleSlot = BufferScaleSlot(scale, zero_point, scale.tensor.shape)
            self.axis = int(node.args[3])  # type: ignore[arg-type]
            limits: Any = node.args[4:7]
        else:
            literals = nodes if quantize is None else [quantize]
            self._qparams = LiteralScaleSlot(model, *literals)
            limits = node.args[3:6]
        self.limits, self._dtype = (int(limits[0]), int(limits[1])), limits[2]
        bias = _bias_of(nodes, once)
        self._bias = None if bias is None else TensorSlot.of(model, bias)
        self.packs_bias = self._bias is not None
        self.tensors = (*self._qparams.tensors, *(slot for slot in (self._codes, self._bias) if slot is not None))

    @property
    def codes_at(self) -> TensorSlot | None:
        """Where the codes are, None where a float weight is held."""
        return self._codes

    def read(self) -> QParams:
        return self._qparams.read()

    def weight(self) -> Tensor:
        qparams = self.read()
        codes = self._rounded(qparams) if self._codes is None else self._codes.tensor
        if codes.dtype not in _SEARCHED:
            return codes
        return quantized_weight(codes, qparams, self.axis)

    def write_weight(self, codes: Tensor, site: ScaleSite, qparams: QParams, bias: Tensor | None = None) -> None:
        if self._codes is not None:
            self._codes.tensor.copy_(codes)
        if bias is not None:
            self._write_bias(bias)
        self._qparams.write(qparams)

    def hold(self, codes: Tensor) -> bool:
        if self.float_at is None:
            return False
        weight, qparams = self.float_at.tensor.detach(), self.read()
        rounded = self._rounded(qparams)
        self._put_float(rounding_to(weight, rounded, codes, qparams.scale, qparams.zero_point, self.axis))
        return torch.equal(self._rounded(qparams), codes)

    def bias(self) -> Tensor | None:
        return None if self._bias is None else self._bias.copied()

    def _write_bias(self, bias: Tensor) -> None:
        assert self._bias is not None, "the bias is not written with the weight"
        with torch.no_grad():
            self._bias.tensor.copy_(bias)

    def _put_float(self, weight: Tensor) -> None:
        """Another one in its place, for the float model may hold the one that is there."""
        assert self.float_at is not None
        self.float_at.put(weight)
        self.float_weight = self.float_at.tensor.detach()

    def state(self) -> Any:
        codes = None if self._codes is None else self._codes.tensor.clone()
        return codes, self._qparams.state(), self.bias(), None if self.float_at is None else self.float_at.tensor

    def restore(self, state: Any) -> None:
        codes, qparams, bias, float_weight = state
        if self._codes is not None:
            self._codes.tensor.copy_(codes)
        if self.float_at is not None and self.float_at.tensor is not float_weight:
            self._put_float(float_weight)
        if bias is not None:
            self._write_bias(bias)
        self._qparams.restore(qparams)

    def renew(self) -> None:
        """Nothing to do: a graph in float remembers nothing."""

    def _rounded(self, qparams: QParams) -> Tensor:
        assert self.float_weight is not None
        return round_by_reciprocal(self.float_weight.detach(), qparams, self.axis, self.limits).to(self._dtype)


def constant_of(node: Node) -> str | None:
    """Target of the tensor that a quantize or dequantize node is about; None for an activation.

    What quantizes may see it through ops that only move its values: the graph rounds that each time.
    """
    source, rounds = node.args[0], calls(node.target, *QUANTIZE)
    while isinstance(source, Node) and calls(source.target, *QUANTIZE):
        source, rounds = source.args[0], True
    while rounds and isinstance(source, Node) and _moves(source):
        source = source.args[0]
    return str(source.target) if isinstance(source, Node) and source.op == "get_attr" else None


def multiplies(node: Node) -> bool:
    """Whether a dequantize node gives the weight of a linear or a convolution, not a constant of any other op."""
    return any(len(user.args) > 1 and user.args[1] is node and _is_layer(user) for user in node.users)


def _bias_of(nodes: Sequence[Node], once: Container[str]) -> str | None:
    """Path of the bias of the layer whose weight these dequantize nodes give; None where it has none, or shares it."""
    users = [user for node in nodes for user in node.users]
    if len(users) != 1 or not _is_layer(users[0]) or users[0].kwargs or not multiplies(nodes[0]):
        return None
    return own_path(users[0].args[2], once) if len(users[0].args) > 2 else None


def _is_layer(node: Node) -> bool:
    op = op_of(node, {})
    return op is not None and op.effect == "layer"


def _moves(node: Node) -> bool:
    """Whether a node gives the values of one other, elsewhere."""
    op = op_of(node, {}) if node.op == "call_function" else None
    return op is not None and op.effect == "moves" and not op.computes and len(node.all_input_nodes) == 1


def _value(model: GraphModule, node: Any) -> Tensor:
    """Of a tensor of the graph, whose values may have been moved."""
    if node.op == "get_attr":
        held: Tensor = fetch(model, str(node.target)).detach()
        return held
    moved: Tensor = node.target(_value(model, node.args[0]), *node.args[1:], **node.kwargs)
    return moved
