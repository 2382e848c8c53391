"""Finding every scale of a lowered graph: which node holds it, where it is stored, what it moves with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from cptv_ao.backends.scale_slots import (
    AttributeScaleSlot,
    BufferScaleSlot,
    FunctionalWeightSlot,
    ModuleWeightSlot,
    ScaleSlot,
    ScannedGraph,
    WeightSlot,
    infer_range,
)
from cptv_ao.backends.tensor_slots import TensorSlot
from cptv_ao.core.sites import ScaleSite, SiteTable, output_name, weight_name
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.ops import op_name, op_of
from cptv_ao.fx.paths import ModulePaths, fetch, is_scalar
from cptv_ao.fx.producers import producer
from cptv_ao.fx.quantized_ops import Quantized, is_quantized_op, of_module, of_node, quantized_inside

_DYNAMIC = "dynamic quantization computes its scales at run time"
_DTYPE_RANGE = {torch.quint8: (0, 255), torch.qint8: (-128, 127)}


class Scanner:
    """Visits the nodes of one graph in their order."""

    def __init__(self, model: GraphModule, weight_ranges: Mapping[str, tuple[int, int]]) -> None:
        self._model = model
        self._ranges = weight_ranges
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._scopes = ModulePaths(model)
        self._sites: dict[str, ScaleSite] = {}
        self._activations: dict[str, ScaleSlot] = {}
        self._weights: dict[str, WeightSlot] = {}
        self._by_node: dict[Node, str] = {}  # activation site of a node's output
        self._by_attribute: dict[str, str] = {}  # site of a root buffer or packed weight
        self._unknown: list[str] = []
        self._weight_only: list[str] = []
        self._sums: list[Node] = []
        self._weighted: list[tuple[Node, str]] = []  # nodes with a weight site
        self._cats: list[Node] = []

    def visit(self, node: Node) -> None:
        if node.op == "call_module":
            self._visit_module(node, self._modules[str(node.target)])
        elif node.op == "call_function":
            self._visit_function(node)

    def found(self) -> ScannedGraph:
        for node in self._cats:
            self._tie(node)
        table = SiteTable(tuple(self._sites.values()), tuple(self._unknown), tuple(self._weight_only))
        return ScannedGraph(table, self._activations, self._weights, tuple(self._pairs()), tuple(self._remembered()))

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for node in self._sums:
            for given in node.args[:2]:
                source = producer(given, self._by_node, self._modules) if isinstance(given, Node) else None
                if source in self._by_node and node in self._by_node:
                    yield self._by_node[node], self._by_node[source]

    def _remembered(self) -> Iterator[tuple[str, str]]:
        """The output of each packed weight's op, and the input of each convolution that pads."""
        for node, name in self._weighted:
            given, pads = node.args[0], self._weights[name].pads
            if node in self._by_node:
                yield self._by_node[node], name
            source = producer(given, self._by_node, self._modules) if isinstance(given, Node) and pads else None
            if source in self._by_node:
                yield self._by_node[source], name

    @property
    def is_reference(self) -> bool:
        """Whether reference modules are there and nothing was lowered."""
        lowered = any(site.op != "quantize_per_tensor" for site in self._sites.values())
        return not lowered and any("(reference " in unknown for unknown in self._unknown)

    def _visit_module(self, node: Node, module: nn.Module) -> None:
        path, name, known = str(node.target), type(module).__name__, of_module(module)
        if known is None:
            self._unknown += quantized_inside(path, module)
        elif known.role == "reference":
            self._unknown.append(f"{path} (reference {name}, not lowered)")
        elif known.role == "lookup":
            self._weight_only.append(f"{path} ({name})")
        elif known.product:
            fixed = _DYNAMIC if known.role == "dynamic" else ""
            self._add_weight(node, weight_name(path), name, path, ModuleWeightSlot(module), fixed)
        if known is not None and known.role in {"static", "scaled"}:
            self._visit_output(node, module, known)

    def _visit_output(self, node: Node, module: nn.Module, known: Quantized) -> None:
        """Add the site of a module whose output has a scale of its own."""
        path, name, scale = str(node.target), type(module).__name__, cast(Any, module).scale
        if isinstance(scale, Tensor):
            activation: ScaleSlot = BufferScaleSlot(TensorSlot(module, "scale"), TensorSlot(module, "zero_point"))
        else:
            activation = AttributeScaleSlot(module)
        fixed = known.fixed
        if not fixed and not known.product and "scale" not in module.state_dict():  # nnq.ELU
            fixed = "a state_dict does not keep it"
        dtype = module.dtype if isinstance(module, nnq.Quantize) else torch.quint8
        self._add_activation(node, output_name(path), name, path, activation, dtype, fixed, known.channels)

    def _visit_function(self, node: Node) -> None:
        op, known = op_name(node), of_node(node, self._modules)
        if node.target is torch.cat:
            self._cats.append(node)
        if node.target is torch.quantize_per_tensor:
            dtype = node.args[3] if len(node.args) > 3 else torch.quint8
            if not self._visit_buffers(node, op, dtype, None):
                self._unknown.append(f"{node.name} ({op})")
        elif known is not None:
            self._visit_known(node, op, known)
        elif is_quantized_op(node):
            self._unknown.append(f"{node.name} ({op})")

    def _visit_known(self, node: Node, op: str, known: Quantized) -> None:
        """Add the sites of a quantized function."""
        if packet_of(node.target) is torch.ops.quantized.add or packet_of(node.target) is torch.ops.quantized.add_relu:
            self._sums.append(node)
        understood = known.role in {"inherits", "dynamic"}
        if known.product:
            packed = self._visit_packed(node, op, known)
            understood = packed and known.role == "dynamic"
        if known.role in {"static", "scaled", "binary"}:
            with_scale = self._visit_buffers(node, op, torch.quint8, known.channels)
            understood = with_scale or (known.role == "binary" and len(node.args) == 2)
        if not understood:
            self._unknown.append(f"{node.name} ({op})")

    def _visit_packed(self, node: Node, op: str, known: Quantized) -> bool:
        packed = [n for n in node.all_input_nodes if n.op == "get_attr" and self._is_packed(str(n.target))]
        for source in packed:
            attribute = str(source.target)
            dynamic = _DYNAMIC if known.role == "dynamic" else ""
            scope = self._scopes.of(node)
            slot = FunctionalWeightSlot(self._model, attribute)
            self._add_weight(node, self._scopes.name(attribute), op, scope, slot, dynamic)
        return bool(packed)

    def _visit_buffers(self, node: Node, op: str, dtype: Any, channels: int | None) -> bool:
        """Add the site of a function whose scale and zero_point are buffers of the root."""
        sources = [n for n in node.all_input_nodes if n.op == "get_attr"]
        scales = [n for n in sources if is_scalar(fetch(self._model, str(n.target)), floating=True)]
        zeros = [n for n in sources if is_scalar(fetch(self._model, str(n.target)), floating=False)]
        if len(scales) != 1 or len(zeros) != 1:
            return False
        attribute = str(scales[0].target)
        slot = BufferScaleSlot(TensorSlot.of(self._model, attribute), TensorSlot.of(self._model, str(zeros[0].target)))
        scope = self._scopes.of_attribute(attribute)
        name = self._scopes.name(attribute)
        if name in self._sites and self._by_attribute.get(attribute) != name:
            name = attribute
        self._by_attribute[attribute] = name
        fixed = self._fixed_source(node) if node.target is torch.quantize_per_tensor else ""
        self._add_activation(node, name, op, scope, slot, dtype, fixed, channels)
        return True

    def _fixed_source(self, node: Node) -> str:
        """Why the output of a quantize node must not move: it holds the output of a fixed-qparams op."""
        source = node.args[0]
        if not isinstance(source, Node):
            return ""
        op = op_of(source, self._modules)
        return f"fixed qparams of {op.name}" if op is not None and op.effect == "fixed" else ""

    def _add_activation(
        self,
        node: Node,
        name: str,
        op: str,
        scope: str,
        slot: ScaleSlot,
        dtype: Any,
        fixed: str,
        channels: int | None,
    ) -> None:
        self._by_node[node] = name
        if name in self._sites:
            self._sites[name] = replace(self._sites[name], nodes=(*self._sites[name].nodes, node.name))
            return
        if dtype not in _DTYPE_RANGE:
            fixed = fixed or f"dtype {dtype} is not searched"
        qmin, qmax = _DTYPE_RANGE.get(dtype, (0, 0))
        self._activations[name] = slot
        self._sites[name] = ScaleSite(
            name, "activation", op, scope, (), None, qmin, qmax, not fixed, (node.name,), name, fixed, channels
        )

    def _add_weight(self, node: Node, name: str, op: str, scope: str, slot: WeightSlot, fixed: str) -> None:
        if name in self._sites:
            self._weighted.append((node, name))
            self._sites[name] = replace(self._sites[name], nodes=(*self._sites[name].nodes, node.name))
            return
        try:
            weight = slot.weight()
        except RuntimeError:  # QNNPACK, of what it packs for three dimensions: no state_dict either
            self._weight_only.append(f"{name} ({op}, which {torch.backends.quantized.engine} does not give back)")
            return
        if not weight.is_quantized:  # float16, of dynamic linears
            self._weight_only.append(f"{name} ({op}, in float)")
            return
        shape: tuple[int, ...]
        axis: int | None
        if weight.dtype != torch.qint8:
            fixed = fixed or f"weights of dtype {weight.dtype} are not searched"
            shape, axis, qmin, qmax = (), None, 0, 0
        else:
            per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
            axis = weight.q_per_channel_axis() if per_channel else None
            shape = (weight.shape[axis],) if axis is not None else ()
            qmin, qmax = self._ranges.get(name) or infer_range(weight)
        self._weighted.append((node, name))
        self._weights[name] = slot
        self._sites[name] = ScaleSite(
            name, "weight", op, scope, shape, axis, qmin, qmax, False, (node.name,), name, fixed
        )

    def _tie(self, cat: Node) -> None:
        """Tie the producers of the inputs of a cat, where they share their qparams now.

        Before: q1 -> relu --> cat      After: q1.tied == q2.tied
                q2 ---------->/
        """
        inputs = cat.args[0] if cat.args else cat.kwargs["tensors"]
        if not isinstance(inputs, (list, tuple)):
            return
        names = [self._by_node.get(producer(n, self._by_node, self._modules)) for n in inputs if isinstance(n, Node)]
        sites = [self._sites[name] for name in names if name is not None]
        if len(sites) < 2:
            return
        lead = sites[0]
        first = self._activations[lead.name].read()
        for site in sites[1:]:
            own = self._activations[site.name].read()
            if own.scale == first.scale and own.zero_point == first.zero_point:
                self._join(site.tied, lead.tied)
                lead = self._sites[lead.name]

    def _join(self, tied: str, into: str) -> None:
        if tied == into:
            return
        # The first in graph order leads, so that a group's name does not depend on the order of its cats.
        order = list(self._sites)
        lead, other = sorted((tied, into), key=order.index)
        for name, site in self._sites.items():
            if site.tied == other:
                self._sites[name] = replace(site, tied=lead)

    def _is_packed(self, attribute: str) -> bool:
        value = fetch(self._model, attribute)
        return isinstance(value, torch.ScriptObject) and hasattr(value, "unpack")
