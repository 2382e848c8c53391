"""The sites of a PT2E graph (`torchao.quantization.pt2e`): aten ops between quantize and dequantize nodes.

Scales of activations are numbers among the arguments of the nodes; those of per-channel weights are buffers, beside
the int8 weight (`fold_quantize=True`) or the float one that the graph rounds each time (`fold_quantize=False`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from cptv_ao.backends.compiling import compiled_once, mark_written
from cptv_ao.backends.graph_form import GraphForm
from cptv_ao.backends.scale_slots import BufferScaleSlot, ScaleSlot, ScannedGraph, WeightSlot, quantized_weight
from cptv_ao.backends.tensor_slots import TensorSlot
from cptv_ao.core.intake import Intake
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite, SiteTable
from cptv_ao.core.weight_rounding import round_by_reciprocal
from cptv_ao.fx.decomposed_ops import calls, calls_default, is_decomposed
from cptv_ao.fx.inputs import taken_by_exported
from cptv_ao.fx.paths import fetch

# Ops that put a value, or a weight, on a scale.
_QUANTIZE = ("quantize_per_tensor", "quantize_per_channel", "quantize_per_channel_group", "quantize_per_token")
# What QAT puts around a convolution and its weight.
_FACTORS = (torch.ops.aten.div.Tensor, torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor)


class Pt2eForm(GraphForm):
    """What `convert_pt2e` returns: aten ops in float between quantize and dequantize nodes."""

    simulates_itself = enforces_ranges = scales_in_code = True
    weights_of_modules = False

    def fits(self, model: nn.Module) -> bool:
        return isinstance(model, GraphModule) and any(is_decomposed(node) for node in model.graph.nodes)

    def scan(self, model: GraphModule, weight_ranges: Mapping[str, tuple[int, int]]) -> ScannedGraph:
        return _scan(model)

    def intake(self, model: GraphModule) -> Intake:
        return taken_by_exported(model)


def _scan(model: GraphModule) -> ScannedGraph:
    """Code ranges are those of the nodes, which enforce them.

    Dynamic quantization has no scales to search: what computes them at run time is told as not understood.
    """
    sites: dict[str, ScaleSite] = {}
    activations: dict[str, LiteralScaleSlot] = {}
    weights: dict[str, Pt2eWeightSlot] = {}
    unknown: list[str] = []
    by_qparams: dict[tuple[float, int], str] = {}
    groups = {group[0]: group for group in _weights(model)}
    known = {node for group in groups.values() for node in group}
    for node in model.graph.nodes:
        if node in groups:
            name = _unique(f"{_scope(node)}.weight", node, sites)
            weights[name] = Pt2eWeightSlot(model, groups[node])
            sites[name] = _weight_site(name, groups[node], weights[name])
        elif _quantizes_activation(node):
            name = _unique(f"{_scope(node)}.input", node, sites)
            activations[name] = LiteralScaleSlot(model, node)
            known.update(node.users)
            qmin, qmax = (int(limit) for limit in node.args[3:5])
            # An observer that several nodes share gave them the very same qparams.
            tied = by_qparams.setdefault((float(node.args[1]), int(node.args[2])), name)
            sites[name] = ScaleSite(
                name, "activation", "quantize_per_tensor", _scope(node), (), None, qmin, qmax, True, (node.name,), tied
            )
        elif is_decomposed(node) and node not in known and not (_is_weight(node) or _computed(node)):
            unknown.append(f"{node.name} ({node.target})")
    _fix_shared_codes(sites, weights)
    return ScannedGraph(SiteTable(tuple(sites.values()), tuple(unknown)), activations, weights)


def _weights(model: GraphModule) -> list[list[Node]]:
    """The dequantize nodes of each weight: several where a module is called more than once, or a weight is tied."""
    groups: dict[Any, list[Node]] = {}
    for node in model.graph.nodes:
        if _dequantizes_weight(node):
            source = node.args[0]
            held = source.target if source.op == "get_attr" else source
            places = (part.target if isinstance(part, Node) else part for part in node.args[1:])
            groups.setdefault((held, *places), []).append(node)
    return list(groups.values())


def _fix_shared_codes(sites: dict[str, ScaleSite], weights: Mapping[str, Pt2eWeightSlot]) -> None:
    """Weights whose codes another one has on a scale of its own never move."""
    held = {name: slot.codes_at for name, slot in weights.items()}
    counts = Counter(held.values())
    for name, codes in held.items():
        if codes is not None and counts[codes] > 1:
            sites[name] = replace(sites[name], fixed="its codes stand on another scale, too")


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
    """A weight before its dequantize nodes: int8 codes that are written, or a float weight that the graph rounds."""

    def __init__(self, model: GraphModule, nodes: Sequence[Node]) -> None:
        node, source = nodes[0], nodes[0].args[0]
        assert isinstance(source, Node)
        quantize = source if source.op == "call_function" else None
        held = TensorSlot.of(model, str(_constant(node)))
        self._codes: TensorSlot | None = None if quantize is not None else held
        self.float_weight = held.tensor if quantize is not None else None
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
        self.tensors = (*self._qparams.tensors, *(() if self._codes is None else (self._codes,)))

    @property
    def codes_at(self) -> TensorSlot | None:
        """Where the codes are, None where a float weight is held."""
        return self._codes

    def read(self) -> QParams:
        return self._qparams.read()

    def weight(self) -> Tensor:
        qparams = self.read()
        codes = self._rounded(qparams) if self._codes is None else self._codes.tensor
        if codes.dtype != torch.int8:
            return codes
        return quantized_weight(codes, qparams, self.axis)

    def write_weight(self, codes: Tensor, site: ScaleSite, qparams: QParams, bias: Tensor | None = None) -> None:
        assert bias is None, "the bias is not held with the weight"
        if self._codes is not None:
            self._codes.tensor.copy_(codes)
        self._qparams.write(qparams)

    def state(self) -> Any:
        return None if self._codes is None else self._codes.tensor.clone(), self._qparams.state()

    def restore(self, state: Any) -> None:
        if self._codes is not None:
            self._codes.tensor.copy_(state[0])
        self._qparams.restore(state[1])

    def renew(self) -> None:
        """Nothing to do: a graph in float remembers nothing."""

    def _rounded(self, qparams: QParams) -> Tensor:
        assert self.float_weight is not None
        return round_by_reciprocal(self.float_weight.detach(), qparams, self.axis, self.limits).to(self._dtype)


def _weight_site(name: str, nodes: Sequence[Node], slot: Pt2eWeightSlot) -> ScaleSite:
    fixed = "" if slot.weight().dtype == torch.qint8 else "weights of this dtype are not searched"
    shape, (qmin, qmax) = tuple(slot.read().scale.shape), slot.limits
    users = tuple(dict.fromkeys(user.name for node in nodes for user in node.users))
    op, scope = _op(nodes[0]), _scope(nodes[0])
    return ScaleSite(name, "weight", op, scope, shape, slot.axis, qmin, qmax, False, users, name, fixed)


def fused_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the convolutions of an exported float model, fused with the batch norm behind them, by path.

    Prepared for QAT: batch_norm(conv(x, fake_quantize(weight * factor)) / factor + bias).
    """
    fused: dict[str, Tensor] = {}
    for node in model.graph.nodes if isinstance(model, GraphModule) else ():
        source = _through_factors(node.args[0]) if node.target is torch.ops.aten.batch_norm.default else None
        held = _through_factors(source.args[1]) if source is not None and len(source.args) > 1 else None
        if held is None or held.op != "get_attr":
            continue
        gamma, _, _, var = (fetch(model, str(part.target)) if part is not None else None for part in node.args[1:5])
        factor = torch.rsqrt(var + node.args[7]) * (1 if gamma is None else gamma)
        weight = fetch(model, str(held.target))
        path = str(held.target).removesuffix(".weight")
        fused[path] = weight * factor.reshape([-1] + [1] * (weight.dim() - 1))
    return fused


def _through_factors(value: Any) -> Node | None:
    """The node whose value this is, but for factors, sums and fake quantization."""
    while isinstance(value, Node) and (value.op == "call_module" or value.target in _FACTORS):
        value = value.args[0]
    return value if isinstance(value, Node) else None


def weight_sites(model: GraphModule, sites: Mapping[str, ScaleSite]) -> dict[str, str]:
    """The weight site of each dequantize node of a weight, by name."""
    names = [site.name for site in sites.values() if site.kind == "weight"]
    return {node.name: name for group, name in zip(_weights(model), names, strict=True) for node in group}


def _constant(node: Node) -> str | None:
    """Target of the weight that a quantize or dequantize node is about; None for an activation."""
    source = node.args[0]
    while isinstance(source, Node) and calls(source.target, *_QUANTIZE):
        source = source.args[0]
    return str(source.target) if isinstance(source, Node) and source.op == "get_attr" else None


def _dequantizes_weight(node: Node) -> bool:
    """Whether a dequantize node gives a weight, on a scale that the graph holds."""
    if calls_default(node, "dequantize_per_channel"):
        scales = node.args[1:3]
        return _constant(node) is not None and all(isinstance(s, Node) and s.op == "get_attr" for s in scales)
    return calls_default(node, "dequantize_per_tensor") and _constant(node) is not None and _is_literal(node)


def _quantizes_activation(node: Node) -> bool:
    """Whether a quantize node has the scale of an activation, which dequantize nodes on that very scale alone read."""
    if not calls_default(node, "quantize_per_tensor") or _is_weight(node) or not _is_literal(node):
        return False
    return all(calls_default(user, "dequantize_per_tensor") and user.args[1:5] == node.args[1:5] for user in node.users)


def _is_literal(node: Node) -> bool:
    return not any(isinstance(part, Node) for part in node.args[1:3])


def _computed(node: Node) -> bool:
    """Whether a node quantizes with a scale that another one computes (which is told)."""
    return is_decomposed(node) and any(isinstance(part, Node) and part.op != "get_attr" for part in node.args[1:3])


def _is_weight(node: Node) -> bool:
    return calls(node.target, *_QUANTIZE) and _constant(node) is not None


def _scope(node: Node) -> str:
    """Path of the module of the first op behind a quantize or dequantize node that has one."""
    for user in node.users:
        stack: Mapping[str, Any] = user.meta.get("nn_module_stack") or {}
        paths = [str(path) for path, _ in stack.values()]
        if paths and not is_decomposed(user):
            return paths[-1]
        found = _scope(user) if is_decomposed(user) else ""
        if found:
            return found
    return ""


def _op(node: Node) -> str:
    """Short name of the op that a weight belongs to: `linear`, `conv2d`."""
    for user in node.users:
        return str(user.target).removeprefix("aten.").split(".")[0]
    return "unused"


def _unique(name: str, node: Node, taken: Mapping[str, Any]) -> str:
    name = name.lstrip(".")
    return name if name not in taken else f"{name}_{node.name}"
