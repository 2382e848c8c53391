"""Values that a lowered graph puts on a second scale, though nothing was computed in between, left on the first one.

    Before: quantized conv (s, z) -> dequantize -> flatten -> quantize_per_tensor (s', z'), which rounds once more
    After:  quantized conv (s, z) -> dequantize -> flatten -> quantize_per_tensor (s, z), which changes no code

FX puts such pairs around what has no quantized kernel, or where it observes both ends of a module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.formatting import counted
from cptv_ao.core.sites import ScaleSite
from cptv_ao.fx.op_table import DEQUANTIZE, QUANTIZE
from cptv_ao.fx.ops import op_of


def stay_on_first(backend: Backend) -> list[str]:
    """Let values stay on the scale that they are on, and tell of it; both have the coarser of the two then."""
    pairs = _pairs(backend)
    for first, second in pairs:
        if backend.sites[first].tied != backend.sites[second].tied:
            now = max((backend.read(name) for name in (first, second)), key=lambda qparams: float(qparams.scale))
            backend.rewrites.join(first, second)
            for site in backend.sites.groups()[backend.sites[first].tied]:
                backend.write(site.name, now)
    told = f"{counted(len(pairs), 'second scale')} of activations left out, with nothing computed behind the first"
    return [told] if pairs else []


def _pairs(backend: Backend) -> list[tuple[str, str]]:
    """Sites that move apart, of the first and of the second scale, in graph order; parts of a value that are put on
    several scales (queries, keys and values of one layer) may be of other sizes each."""
    modules = dict(backend.model.named_modules(remove_duplicate=False))
    activations = (site for site in backend.sites.values() if site.kind == "activation")
    by_node, found = {node: site for site in activations for node in site.nodes}, list[tuple[str, str]]()
    for node in backend.model.graph.nodes:
        second = by_node.get(node.name) if op_of(node, modules) is QUANTIZE else None
        if second is None or (first := _first(node.args[0], by_node, modules)) is None:
            continue
        alike = (first.qmin, first.qmax) == (second.qmin, second.qmax)
        if alike and first.tied != second.tied and not first.fixed and not second.fixed:
            found.append((first.name, second.name))
    parts = Counter(first for first, _ in found)
    return [pair for pair in found if parts[pair[0]] == 1]


def _first(value: Any, by_node: Mapping[str, ScaleSite], modules: Mapping[str, nn.Module]) -> ScaleSite | None:
    """The site whose values these are, dequantized and moved about."""
    dequantized = False
    while isinstance(value, Node):
        if value.name in by_node:
            return by_node[value.name] if dequantized else None
        op = op_of(value, modules)
        dequantized |= op is DEQUANTIZE
        if op is None or not (op is DEQUANTIZE or (op.effect == "moves" and op.brings)) or not value.args:
            return None
        value = value.args[0]
    return None
