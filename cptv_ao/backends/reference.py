"""Models of `convert_to_reference_fx`: refined as a lowered copy, whose scales are then written back.

A reference graph computes in float between quantize and dequantize; its outputs are close to, but not, those of the
lowered model that ships. So a copy is lowered, refined on its own kernels, and the reference model is given what makes
it lower to that very copy.

    Before: quantize_per_tensor(x, s) -> dequantize -> nnqr.Linear(weight, weight_scale) -> quantize_per_tensor(y, s)
    Lowered: quantize_per_tensor(x, s) -> nnq.Linear(packed weight, s)
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.tensor_slots import TensorSlot
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.qparams import PER_CHANNEL
from cptv_ao.core.weight_rounding import rounding_to
from cptv_ao.fx.quantized_ops import is_quantized, of_module

_QUANTIZE = {torch.quantize_per_tensor, torch.quantize_per_channel}
# Marks are 1 + k / _MARKS, exact in float32.
_MARKS = 2**16


@dataclass(frozen=True)
class _Place:
    """Where a reference model keeps the qparams of one quantize node or weighted module.

    Attributes:
        weight: the float weight that is quantized with them on lowering; None for an activation.
        axis: channel axis of the weight, None per tensor.
    """

    scale: TensorSlot
    zero_point: TensorSlot
    weight: TensorSlot | None = None
    axis: int | None = None


def is_reference(model: nn.Module) -> bool:
    """Whether this is what `convert_to_reference_fx` returns: weights to be quantized, and no quantized op yet."""
    if not isinstance(model, GraphModule):
        return False
    weighted = any(_is_reference_module(m) for m in model.modules())
    for node in model.graph.nodes:
        if isinstance(node.target, (torch._ops.OpOverloadPacket, torch._ops.OpOverload)):
            return False
        weighted = weighted or (node.target in _QUANTIZE and _source(node) is not None)
    return weighted and not any(is_quantized(m) and not _is_of_reference(m) for m in model.modules())


def lower(model: GraphModule, qconfig_map: Mapping[str, Any] | None = None) -> GraphModule:
    """Lower a copy of a reference model to the kernels of the present engine, as `convert_fx` does.

    Args:
        model: what `convert_to_reference_fx` returned; it is left alone.
        qconfig_map: qconfigs by node name; a node whose qconfig is None stays in float even between quantized ones.
            A reference model does not remember them.

    Raises:
        UnsupportedModelError: this is not a reference model, or one that torch cannot lower.
    """
    if not is_reference(model):
        raise UnsupportedModelError(
            f"expected the GraphModule that convert_to_reference_fx returns, got {type(model).__name__}"
        )
    lowering = _lowering()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao warns of its own deprecation
        try:
            lowered = lowering(copy.deepcopy(model), dict(qconfig_map or {}), _scopes(model))
        except Exception as error:  # whatever torch raises about an op that it has no kernel for, or cannot tell
            raise UnsupportedModelError(
                f"torch cannot lower this reference model ({type(error).__name__}: {error}): leave that op in float "
                "(its qconfig None), or convert with convert_fx"
            ) from error
    lowered.meta.update(model.meta)
    return lowered


def write_back(lowered: GraphModule, reference: GraphModule, qconfig_map: Mapping[str, Any] | None = None) -> None:
    """Give a reference model the scales of its lowered copy, so that it lowers to the same model bit for bit.

    Float weights stay, but where lowering would round them to another code than the copy's (codes clamped to a
    nominal range, ties): those become the value of the code. Quantize nodes that lowering drops stay as they are.

    No tensor is written: one that is to be another is replaced, for the float model, or another module of this one,
    may hold it too.

    Args:
        lowered: what `lower(reference)` returned, refined.
        reference: gets other tensors.
        qconfig_map: as given to `lower`.

    Raises:
        UnsupportedModelError: a scale of the copy has no place in the reference model; nothing was written.
    """
    backend = Backend(lowered)
    places = _places_by_site(backend, reference, qconfig_map)
    values = {name: backend.read(name) for name in places}
    codes = {name: backend.weight(name).int_repr() for name, place in places.items() if place.weight is not None}
    with torch.no_grad():
        for name, place in places.items():
            _replace(place.scale, values[name].scale)
            _replace(place.zero_point, values[name].zero_point)
            if place.weight is not None:
                _settle(place, codes[name].reshape(place.weight.tensor.shape))


def fix_shared(backend: Backend, reference: GraphModule) -> None:
    """Weights that lowering makes of one weight (a functional op that runs twice) never move: a reference model has one
    place for all of them, where they could not be told apart.

    Args:
        backend: of `lower(reference)`.
    """
    quantized = (node for node in reference.graph.nodes if node.target in _QUANTIZE and _source(node) is not None)
    if all(len(back.users) < 2 for node in quantized for back in node.users):
        return
    places = _places_by_site(backend, reference, None)
    counts = Counter(place.scale for place in places.values())
    held = {name: p.weight for name, p in places.items() if p.weight is not None and counts[p.scale] > 1}
    backend.rewrites.fix(held, "the reference model has one place for several such weights")
    for name, slot in held.items():  # the teacher's
        backend.weights.set_float(name, slot.tensor)


def state(model: GraphModule) -> list[tuple[TensorSlot, Tensor]]:
    """The tensors that `write_back` may replace in a reference model, for `restore`."""
    slots = (slot for place in _places(model) for slot in (place.scale, place.zero_point, place.weight))
    return [(slot, slot.tensor) for slot in slots if slot is not None]


def restore(before: Sequence[tuple[TensorSlot, Tensor]]) -> None:
    """Put back what `state` returned: the very tensors."""
    for slot, tensor in before:
        slot.put(tensor)


def _replace(slot: TensorSlot, value: Tensor) -> None:
    """Another tensor in the place of one that holds other numbers."""
    given = slot.tensor
    value = value.reshape(given.shape).to(given)
    if not torch.equal(value, given):
        slot.put(value.clone())


def _settle(place: _Place, codes: Tensor) -> None:
    """Move the float weights that would be rounded to other codes, by the very functions that lowering calls."""
    held = cast(TensorSlot, place.weight)
    weight, scale, zero_point = held.tensor, place.scale.tensor, place.zero_point.tensor
    if place.axis is None:
        quantized = torch.quantize_per_tensor(weight, float(scale), int(zero_point), torch.qint8)
    else:
        quantized = torch.quantize_per_channel(weight, scale, zero_point, place.axis, torch.qint8)
    _replace(held, rounding_to(weight, quantized.int_repr(), codes, scale, zero_point, place.axis))


def _places_by_site(
    backend: Backend, reference: GraphModule, qconfig_map: Mapping[str, Any] | None
) -> dict[str, _Place]:
    """The place in the reference model of each site of its lowered copy.

    Found by marking: each place of a copy of the reference model gets a scale of its own; where that scale turns up
    after lowering is the site.
    """
    marked = copy.deepcopy(reference)
    with torch.no_grad():
        for k, place in enumerate(_places(marked)):
            place.scale.put(torch.full_like(place.scale.tensor, 1 + k / _MARKS))
    marks = Backend(lower(marked, qconfig_map))
    places = _places(reference)
    found: dict[str, _Place] = {}
    for name, site in backend.sites.items():
        mark = float(marks.read(name).scale.reshape(-1)[0]) if name in marks.sites else 0.0
        index = round((mark - 1) * _MARKS)
        if 0 <= index < len(places) and mark == 1 + index / _MARKS:
            found[name] = places[index]
        elif not site.fixed:
            raise UnsupportedModelError(f"{name}: the reference model has no place for this scale", name)
    return found


def _places(model: GraphModule) -> list[_Place]:
    """Every place of a reference model that holds qparams, in a fixed order."""
    places = []
    for module in model.modules():
        if _is_reference_module(module) and getattr(module, "weight_dtype", None) == torch.qint8:
            owner = cast(Any, module)
            axis = owner.weight_axis_int if owner.weight_qscheme in PER_CHANNEL else None
            scale, zero_point = TensorSlot(owner, "weight_scale"), TensorSlot(owner, "weight_zero_point")
            places.append(_Place(scale, zero_point, TensorSlot(owner, "weight"), axis))
    seen = set()
    for node in model.graph.nodes:
        if node.op != "call_function" or node.target not in _QUANTIZE:
            continue
        sources = [a for a in node.args[1:3] if isinstance(a, Node) and a.op == "get_attr"]
        if len(sources) != 2 or str(sources[0].target) in seen:
            continue
        seen.add(str(sources[0].target))
        scale, zero_point = (TensorSlot.of(model, str(source.target)) for source in sources)
        axis = int(node.args[3]) if node.target is torch.quantize_per_channel else None
        weight = _source(node)
        places.append(_Place(scale, zero_point, None if weight is None else TensorSlot.of(model, weight), axis))
    return places


def _source(node: Node) -> str | None:
    """The weight that a quantize node quantizes; None for an activation (a constant such as pos_embed is one too)."""
    first = node.args[0] if node.args else None
    weight = isinstance(first, Node) and first.op == "get_attr" and node.args[-1] is torch.qint8
    return str(cast(Node, first).target) if weight else None


def _is_reference_module(module: nn.Module) -> bool:
    return _is_of_reference(module) and isinstance(getattr(module, "weight", None), Tensor)


def _is_of_reference(module: nn.Module) -> bool:
    known = of_module(module)
    return known is not None and known.role == "reference"


def _scopes(model: GraphModule) -> dict[str, tuple[str, Any]]:
    """Path of the module that owns the weight of each functional op, by node name: packed weights are named by it."""
    scopes: dict[str, tuple[str, Any]] = defaultdict(lambda: ("", None))
    for node in model.graph.nodes:
        weight = _source(node) if node.target in _QUANTIZE else None
        for dequantize in node.users if weight is not None else ():
            scopes.update({op.name: (str(weight).rpartition(".")[0], None) for op in dequantize.users})
    return scopes


def _lowering() -> Callable[..., GraphModule]:
    """What `convert_fx` calls last; the engines share it."""
    try:
        from torch.ao.quantization.fx.lower_to_fbgemm import lower_to_fbgemm
    except ImportError as error:
        raise UnsupportedModelError("this torch cannot lower reference models; pass what convert_fx returns") from error
    return cast(Callable[..., GraphModule], lower_to_fbgemm)
