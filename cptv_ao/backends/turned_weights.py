"""What `cptv_ao.transforms.stream_rotation` has made of float weights, to be told by the codes of a lowered model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from cptv_ao.core.rotations import rotation
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.paths import fetch

# So many vectors around a layer are tried as what its rows or columns were multiplied by; where both were, so many of
# each.
_NEAR, _NEAREST = 24, 4


class TurnedWeights:
    """Of the layers around residual streams that were rotated: the norms there have no weights any more.

    Args:
        model: a lowered one.
        float_model: its float original.
    """

    def __init__(self, model: GraphModule, float_model: nn.Module) -> None:
        named, self._widths = dict(float_model.named_parameters(remove_duplicate=False)), set[int]()
        for path in _norm_weights(model):
            now, then = fetch(model, path), named.get(path)
            if then is not None and _is_plain(now) and not _is_plain(then):
                self._widths.add(now.numel())
        modules = float_model.modules() if self._widths else ()
        held = [(place, own) for place, module in enumerate(modules) for own in module.parameters(recurse=False)]
        self._places = {own.data_ptr(): place for place, own in held}
        self._vectors = [
            (place, own.detach().flatten().to("cpu", torch.float64))
            for place, own in held
            if own.is_floating_point() and own.dim() and own.numel() == own.shape[-1]
        ]

    def of(self, weight: Tensor) -> Iterator[Tensor]:
        """What may have become of the weight (O, K, ...) of a layer, float32, the likeliest first."""
        if weight.dim() < 2:
            return
        wide, place = weight.detach().to("cpu", torch.float64), self._places.get(weight.data_ptr(), 0)
        written = self._near(wide.shape[0], place)
        read = self._near(wide.shape[1], place) if wide.dim() == 2 else []
        alone = [*((one, None) for one in written), *((None, one) for one in read)]
        both = product(written[:_NEAREST], read[:_NEAREST])
        for row, column in (*alone, *both):
            turned = wide
            if column is not None:
                turned = (turned * column) @ rotation(len(column)).T
            if row is not None:
                turned = (rotation(len(row)) * row) @ turned.flatten(1)
            yield turned.reshape(wide.shape).float()

    def _near(self, width: int, place: int) -> list[Tensor]:
        """Ones, then vectors of this width around the module at a place, without its own; nothing where no norm of this
        width says that there was a rotation."""
        if width not in self._widths:
            return []
        others = [(abs(place - own), vector) for own, vector in self._vectors if len(vector) == width and own != place]
        near = [vector for _, vector in sorted(others, key=lambda one: one[0])[:_NEAR]]
        return [torch.ones(width, dtype=torch.float64), *near]


def _norm_weights(model: GraphModule) -> Iterator[str]:
    """Paths of the weights of quantized layer norms."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in model.graph.nodes:
        if node.op == "call_module" and type(modules[str(node.target)]) is nnq.LayerNorm:
            yield f"{node.target}.weight"
        if packet_of(node.target) is torch.ops.quantized.layer_norm:
            weight = node.kwargs.get("weight", node.args[2] if len(node.args) > 2 else None)
            if isinstance(weight, Node) and weight.op == "get_attr":
                yield str(weight.target)


def _is_plain(weight: Tensor) -> bool:
    """Whether a norm multiplies by powers of two alone, as an equal form of one without a weight does."""
    return bool((torch.frexp(weight.detach().float()).mantissa == 0.5).all())
