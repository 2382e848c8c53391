"""Finding every scale of a lowered graph: which node holds it, where it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from cptv_ao.backends.lowered_sites import LoweredSites, Place
from cptv_ao.backends.packed_params import ModuleParams, RootParams
from cptv_ao.backends.packed_slots import PackedWeightSlot
from cptv_ao.backends.scale_slots import AttributeScaleSlot, BufferScaleSlot, ScaleSlot, ScannedGraph, WeightSlot
from cptv_ao.backends.tensor_slots import TensorSlot
from cptv_ao.core.sites import output_name, weight_name
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.inplace import first_input
from cptv_ao.fx.ops import op_name, op_of
from cptv_ao.fx.paths import ModulePaths, fetch, is_scalar
from cptv_ao.fx.quantized_ops import SUMS, Quantized, is_quantized_op, of_module, of_node, quantized_inside

_DYNAMIC = "dynamic quantization computes its scales at run time"


class Scanner:
    """Visits the nodes of one graph in their order.

    Attributes:
        is_reference: whether reference modules are there and nothing was lowered.
    """

    def __init__(self, model: GraphModule, weight_ranges: Mapping[str, tuple[int, int]]) -> None:
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._scopes = ModulePaths(model)
        self._sites = LoweredSites(self._modules, weight_ranges)
        self._by_attribute: dict[str, str] = {}  # site of a root buffer
        self._unknown: list[str] = []
        self._weight_only: list[str] = []
        self._references = self._lowered = False

    def visit(self, node: Node) -> None:
        if node.op == "call_module":
            self._visit_module(node, self._modules[str(node.target)])
        elif node.op == "call_function":
            self._visit_function(node)

    def found(self) -> ScannedGraph:
        return self._sites.found(self._unknown, self._weight_only)

    @property
    def is_reference(self) -> bool:
        return self._references and not self._lowered

    def _visit_module(self, node: Node, module: nn.Module) -> None:
        path, name, known = str(node.target), type(module).__name__, of_module(module)
        if known is None:
            self._unknown += quantized_inside(path, module)
        elif known.role == "reference":
            self._references = True
            self._unknown.append(f"{path} (reference {name}, not lowered)")
        elif known.role == "lookup":
            self._weight_only.append(f"{path} ({name})")
        elif known.product:
            self._add_weight(Place(node, weight_name(path), name, path), PackedWeightSlot(ModuleParams(module)), known)
        if known is not None and known.role in {"static", "scaled"}:
            self._visit_output(node, module, known)

    def _visit_output(self, node: Node, module: nn.Module, known: Quantized) -> None:
        """Add the site of a module whose output has a scale of its own."""
        self._lowered = True
        path, name, scale = str(node.target), type(module).__name__, cast(Any, module).scale
        if isinstance(scale, Tensor):
            slot: ScaleSlot = BufferScaleSlot(TensorSlot(module, "scale"), TensorSlot(module, "zero_point"))
        else:
            slot = AttributeScaleSlot(module)
        fixed = known.fixed
        if not fixed and not known.product and "scale" not in module.state_dict():  # nnq.ELU
            fixed = "a state_dict does not keep it"
        dtype = module.dtype if isinstance(module, nnq.Quantize) else torch.quint8
        at = Place(node, output_name(path), name, path)
        self._sites.add_activation(at, slot, dtype, fixed, known.channels)

    def _visit_function(self, node: Node) -> None:
        op, known = op_name(node), of_node(node, self._modules)
        if node.target is torch.cat:
            self._sites.cats.append(node)
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
        if packet_of(node.target) in SUMS:
            self._sites.sums.append(node)
        understood = known.role in {"inherits", "dynamic"}
        if known.product:
            packed = self._visit_packed(node, op, known)
            understood = packed and known.role == "dynamic"
        if known.role in {"static", "scaled", "binary"}:
            with_scale = self._visit_buffers(node, op, torch.quint8, known.channels)
            self._lowered |= with_scale
            understood = with_scale or (known.role == "binary" and len(node.args) == 2)
        if not understood:
            self._unknown.append(f"{node.name} ({op})")

    def _visit_packed(self, node: Node, op: str, known: Quantized) -> bool:
        sources = [n for n in node.all_input_nodes if n.op == "get_attr"]
        packed = [n for n in sources if _is_packed(fetch(self._model, str(n.target)))]
        for source in packed:
            attribute = str(source.target)
            at = Place(node, self._scopes.name(attribute), op, self._scopes.of(node))
            self._add_weight(at, PackedWeightSlot(RootParams(self._model, attribute)), known)
        return bool(packed)

    def _add_weight(self, at: Place, slot: WeightSlot, known: Quantized) -> None:
        if why := self._sites.add_weight(at, slot, _DYNAMIC if known.role == "dynamic" else ""):
            self._weight_only.append(f"{at.name} ({at.op}, {why})")
        else:
            self._lowered = True

    def _visit_buffers(self, node: Node, op: str, dtype: Any, channels: int | None) -> bool:
        """Add the site of a function whose scale and zero_point are buffers of the root."""
        # A value that is quantized may be a number of the model itself.
        value = first_input(node) if node.target is torch.quantize_per_tensor else None
        sources = [n for n in node.all_input_nodes if n.op == "get_attr" and n is not value]
        scales = [n for n in sources if is_scalar(fetch(self._model, str(n.target)), floating=True)]
        zeros = [n for n in sources if is_scalar(fetch(self._model, str(n.target)), floating=False)]
        if len(scales) != 1 or len(zeros) != 1:
            return False
        attribute = str(scales[0].target)
        slot = BufferScaleSlot(TensorSlot.of(self._model, attribute), TensorSlot.of(self._model, str(zeros[0].target)))
        name = self._scopes.name(attribute)
        if name in self._sites and self._by_attribute.get(attribute) != name:
            name = attribute
        self._by_attribute[attribute] = name
        fixed = self._fixed_source(node) if node.target is torch.quantize_per_tensor else ""
        at = Place(node, name, op, self._scopes.of_attribute(attribute))
        self._sites.add_activation(at, slot, dtype, fixed, channels)
        return True

    def _fixed_source(self, node: Node) -> str:
        """Why the output of a quantize node must not move: it holds the output of a fixed-qparams op."""
        source = node.args[0]
        if not isinstance(source, Node):
            return ""
        op = op_of(source, self._modules)
        return f"fixed qparams of {op.name}" if op is not None and op.effect == "fixed" else ""


def _is_packed(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and hasattr(value, "unpack")
