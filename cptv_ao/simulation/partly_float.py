"""A twin of which some nodes compute in float, as kernels do where their qconfig is None."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map_only

from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.twin import Twin


@dataclass(frozen=True)
class FloatRegion:
    """What becomes float where some nodes do.

    Attributes:
        activations: sites whose values are no longer rounded where they are made.
        weights: sites whose float weight is used.
        entries: nodes of the twin that are still quantized and read such values: they round what they are given.
    """

    activations: frozenset[str] = frozenset()
    weights: frozenset[str] = frozenset()
    entries: frozenset[str] = frozenset()

    @property
    def sites(self) -> frozenset[str]:
        return self.activations | self.weights


@contextmanager
def partly_float(twin: Twin, region: FloatRegion) -> Iterator[None]:
    """Compute a region in float while the context lasts; sites that the twin does not have are left out."""
    known: Collection[str] = set(twin.names)
    hooks = [
        twin.module.get_submodule(str(node.target)).register_forward_pre_hook(_rounded, with_kwargs=True)
        for node in twin.module.graph.nodes
        if node.op == "call_module" and node.name in region.entries
    ]
    try:
        with twin.in_float([name for name in region.sites if name in known]):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounded(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map_only(QTensor, _on_scale, (args, kwargs))


def _on_scale(value: QTensor) -> QTensor:
    return value if value.rounding == "round" else replace(value, rounding="round").fitted(value.codes)
