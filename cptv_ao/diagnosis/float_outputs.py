"""What the float model has in the place of a block's output, where its modules tell.

quantized   ConvReLU2d (conv, with the norm folded in, and relu)      its output
float       conv, norm, relu, each a module or not                    relu(conv of the norm's weights(input of conv))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional

from cptv_ao.backends.backend import Backend
from cptv_ao.core.sites import ScaleSite
from cptv_ao.fx.quantized_ops import Quantized, of_node

_CONVOLUTIONS = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}

_Finish = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


@dataclass(frozen=True)
class _Place:
    """A module of the float model, and what its inputs and its output become at the end of a block."""

    path: str
    finish: _Finish


class FloatOutputs:
    """Where the float model has the outputs of blocks.

    Args:
        backend: of the quantized model, with the float weights that are known.
        float_model: by whose modules they are found.
        outputs: the node of each block's output.

    Attributes:
        missing: blocks whose output no module of the float model has: the quantized op fuses more than that, or ends
            somewhere else.
    """

    def __init__(self, backend: Backend, float_model: nn.Module, outputs: Mapping[str, str]) -> None:
        self._backend = backend
        self._modules = dict(float_model.named_modules(remove_duplicate=False))
        self._quantized = dict(backend.model.named_modules(remove_duplicate=False))
        nodes = {node.name: node for node in backend.model.graph.nodes}
        found = {block: self._place(block, nodes[name]) for block, name in outputs.items()}
        self._places = {block: place for block, place in found.items() if place is not None}
        self.missing = tuple(block for block, place in found.items() if place is None)

    @contextmanager
    def watched(self) -> Iterator[dict[str, Tensor]]:
        """These tensors of what the float model runs on while the context lasts, by block."""
        seen: dict[str, Tensor] = {}

        def see(block: str, finish: _Finish, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                seen[block] = finish(module, args, output.detach()).clone()

        hooks = [
            self._modules[place.path].register_forward_hook(partial(see, block, place.finish))
            for block, place in self._places.items()
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _place(self, block: str, node: Node) -> _Place | None:
        known = of_node(node, self._quantized)
        held: Any = self._quantized.get(str(node.target)) if node.op == "call_module" else None
        path = str(node.target)
        if held is not None and known is not None and known.product and not known.adds and path in self._modules:
            return self._of_layer(path, node, known, held)
        if block not in self._modules or not self._ends_in(block, node):
            return None
        # A module may end before what is fused, or behind it: what is one of both for a relu is not for others.
        return _Place(block, partial(_after, "relu" if known is not None and known.after == "relu" else "", None))

    def _of_layer(self, path: str, node: Node, known: Quantized, held: Any) -> _Place | None:
        module: Any = self._modules[path]
        own: Any = getattr(module, "weight", None)
        if not isinstance(own, Tensor):  # one that is fused there, too, in a prepared model
            return _Place(path, partial(_after, "relu" if known.after == "relu" else "", held))
        weight = self._float_weight(node)
        if weight is not None and weight.shape == own.shape and torch.allclose(weight.to(own), own, rtol=1e-4, atol=0):
            return _Place(path, partial(_after, known.after, held))
        if type(module) not in _CONVOLUTIONS:
            return _Place(path, partial(_after, "relu", held)) if known.after == "relu" and weight is None else None
        return None if weight is None else _Place(path, partial(_fused, weight, held, known.after))

    def _float_weight(self, node: Node) -> Tensor | None:
        names = (site.name for site in self._sites(node) if site.kind == "weight")
        return next((self._backend.float_weights[name] for name in names if name in self._backend.float_weights), None)

    def _ends_in(self, path: str, node: Node) -> bool:
        """Whether a node was traced in a module, as far as its sites or the tracer tell."""
        traced = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
        scopes = [*traced, *(site.scope for site in self._sites(node))]
        return any(scope == path or scope.startswith(f"{path}.") for scope in scopes)

    def _sites(self, node: Node) -> list[ScaleSite]:
        return [site for site in self._backend.sites.values() if node.name in site.nodes]


def _after(after: str, held: Any, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """What a fused op computes behind its product."""
    if after == "relu":
        return functional.relu(output)
    if after == "leaky_relu":
        return functional.leaky_relu(output, held.negative_slope)
    return output.tanh() if after == "tanh" else output


def _fused(weight: Tensor, held: Any, after: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """What a convolution gives with the weight and the bias that a norm was folded into."""
    other = copy.copy(module)  # without hooks, for its forward alone is called
    bias: Tensor | None = held.bias()
    held_as = {"weight": weight, "bias": None if bias is None else bias.detach()}
    other._parameters = {k: None if v is None else nn.Parameter(v.to(output), False) for k, v in held_as.items()}
    return _after(after, held, module, args, other.forward(*args))
