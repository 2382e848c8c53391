"""The sites of a PT2E graph (`torchao.quantization.pt2e`): aten ops between quantize and dequantize nodes.

Scales of activations are numbers among the arguments of the nodes; those of per-channel weights are buffers, beside
the codes of the weight (`fold_quantize=True`) or the float one that the graph rounds each time
(`fold_quantize=False`). A constant of any op (a position embedding that is added) is held like the weight of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from cptv_ao.backends.graph_form import GraphForm
from cptv_ao.backends.pt2e_slots import QUANTIZE, LiteralScaleSlot, Pt2eWeightSlot, constant_of
from cptv_ao.backends.scale_slots import ScannedGraph
from cptv_ao.core.intake import Intake
from cptv_ao.core.sites import ScaleSite, SiteTable
from cptv_ao.fx.decomposed_ops import calls, calls_default, is_decomposed
from cptv_ao.fx.inputs import taken_by_exported
from cptv_ao.fx.readers import read_once, users_of


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
    """Code ranges are those of the nodes, which enforce them. A weight stands where it is read first, with the input of
    its layer: `convert_pt2e` puts all of them at the beginning of the graph.

    Dynamic quantization has no scales to search: what computes them at run time is told as not understood.
    """
    sites: dict[str, ScaleSite] = {}
    activations: dict[str, LiteralScaleSlot] = {}
    weights: dict[str, Pt2eWeightSlot] = {}
    unknown: list[str] = []
    by_qparams: dict[tuple[float, int], str] = {}
    groups = _weights(model)
    known, once = {node for group in groups for node in group}, read_once(model.graph.nodes)
    read_at: dict[Node, list[list[Node]]] = {}
    for group in groups:
        read_at.setdefault(_first_reader(group), []).append(group)
    for node in model.graph.nodes:
        for group in read_at.get(node, ()):
            slot = Pt2eWeightSlot(model, group, once)
            name = _unique(f"{_scope(group[0])}.{'weight' if slot.of_layer else 'constant'}", group[0], sites)
            weights[name] = slot
            sites[name] = _weight_site(name, group, slot)
        if _quantizes_activation(node):
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
    _tie_constants(sites, weights, by_qparams)
    return ScannedGraph(SiteTable(tuple(sites.values()), tuple(unknown)), activations, weights)


def _weights(model: GraphModule) -> list[list[Node]]:
    """The dequantize nodes of each weight, several where a module is called more than once, or a weight is tied; in the
    order in which they are read."""
    groups: dict[Any, list[Node]] = {}
    for node in model.graph.nodes:
        if _dequantizes_weight(node):
            source = node.args[0]
            held = source.target if source.op == "get_attr" else source
            places = (part.target if isinstance(part, Node) else part for part in node.args[1:])
            groups.setdefault((held, *places), []).append(node)
    return sorted(groups.values(), key=_first_reader)


def _first_reader(group: Sequence[Node]) -> Node:
    """The first node that reads a weight, or its own where none does."""
    return min((user for node in group for user in node.users), default=group[0])


def _fix_shared_codes(sites: dict[str, ScaleSite], weights: Mapping[str, Pt2eWeightSlot]) -> None:
    """Weights whose codes another one has on a scale of its own never move."""
    held = {name: slot.codes_at for name, slot in weights.items()}
    counts = Counter(held.values())
    for name, codes in held.items():
        if codes is not None and counts[codes] > 1:
            sites[name] = replace(sites[name], fixed="its codes stand on another scale, too")


def _tie_constants(
    sites: dict[str, ScaleSite], weights: Mapping[str, Pt2eWeightSlot], by_qparams: Mapping[tuple[float, int], str]
) -> None:
    """Constants on the very qparams of an activation move with it: their observer was shared, since an op wants its
    inputs on one scale (XNNPACK's concatenation runs on no others)."""
    for name, slot in weights.items():
        if not slot.of_layer and slot.axis is None:
            qparams = slot.read()
            lead = by_qparams.get((float(qparams.scale), int(qparams.zero_point)))
            if lead is not None and slot.limits == (sites[lead].qmin, sites[lead].qmax):
                sites[name] = replace(sites[name], tied=lead, affine=True)


def _weight_site(name: str, nodes: Sequence[Node], slot: Pt2eWeightSlot) -> ScaleSite:
    fixed = "" if slot.weight().is_quantized else "weights of this dtype are not searched"
    shape, (qmin, qmax) = tuple(slot.read().scale.shape), slot.limits
    users = tuple(dict.fromkeys(user.name for node in nodes for user in users_of(node)))
    op, scope = _op(nodes[0]), _scope(nodes[0])
    return ScaleSite(name, "weight", op, scope, shape, slot.axis, qmin, qmax, False, users, name, fixed)


def weight_sites(model: GraphModule, sites: Mapping[str, ScaleSite]) -> dict[str, str]:
    """The weight site of each dequantize node of a weight, by name."""
    names = [site.name for site in sites.values() if site.kind == "weight"]
    return {node.name: name for group, name in zip(_weights(model), names, strict=True) for node in group}


def _dequantizes_weight(node: Node) -> bool:
    """Whether a dequantize node gives a weight, on a scale that the graph holds."""
    if calls_default(node, "dequantize_per_channel"):
        scales = node.args[1:3]
        return constant_of(node) is not None and all(isinstance(s, Node) and s.op == "get_attr" for s in scales)
    return calls_default(node, "dequantize_per_tensor") and constant_of(node) is not None and _is_literal(node)


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
    return calls(node.target, *QUANTIZE) and constant_of(node) is not None


def _scope(node: Node) -> str:
    """Path of the module of the first op behind a quantize or dequantize node that has one."""
    for op in sorted(_ops_behind(node)):
        stack: Mapping[str, Any] = op.meta.get("nn_module_stack") or {}
        if stack:
            return str([*stack.values()][-1][0])
    return ""


def _ops_behind(node: Node) -> Iterator[Node]:
    for user in node.users:
        if is_decomposed(user):
            yield from _ops_behind(user)
        else:
            yield user


def _op(node: Node) -> str:
    """Short name of the op that a weight or a constant belongs to: `linear`, `add`."""
    for user in users_of(node):
        return str(user.target).removeprefix("aten.").split(".")[0]
    return "unused"


def _unique(name: str, node: Node, taken: Mapping[str, Any]) -> str:
    name = name.lstrip(".")
    return name if name not in taken else f"{name}_{node.name}"
