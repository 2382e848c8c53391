"""Whether stock prepare_fx and convert_fx take a model: they are run once, and what they break on stays float."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.ao.quantization import HistogramObserver, QConfig, QConfigMapping
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.fx.tracer import QuantizationTracer
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import Graph, Node

from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.tensors import copied
from cptv_ao.transforms.float_model.exclusion import Leave, leaving_nodes
from cptv_ao.transforms.float_model.obstacles import first_line


@dataclass(frozen=True)
class _Part:
    """A node of a graph that may be left in float."""

    told: str
    leave: Leave


def left_in_float(
    model: nn.Module, mapping: QConfigMapping, custom: PrepareCustomConfig, example: tuple[Any, ...]
) -> list[str]:
    """Prepare, calibrate and convert a model once, and leave in float what stands in the way; returns what that is.

    Args:
        mapping: is written.

    Raises:
        UnsupportedModelError: it fails though all of it stays float.
    """

    quick = _quick(mapping)

    def error_of(parts: Sequence[_Part]) -> Exception | None:
        tried = copy.deepcopy(quick)
        for part in parts:
            part.leave(tried)
        return _error(model, tried, custom, example)

    error = error_of([])
    if error is None:
        return []
    first = first_line(error)
    parts = _parts(model, custom)
    found: list[_Part] = []
    if (last := error_of(parts)) is not None:
        raise UnsupportedModelError(
            f"recipe: prepare_fx, a forward or convert_fx fails on this model, whatever stays float ({first}); move "
            "the code at fault into a module of its own and name its class in prepare_custom_config"
        ) from last
    while error_of(found) is not None:
        low, high = 0, len(parts)  # the parts up to `high` suffice, those up to `low` do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if error_of([*found, *parts[:middle]]) is None else (middle, high)
        found.append(parts[high - 1])
    for part in found:
        part.leave(mapping)
    return [f"{part.told} stays float: convert_fx fails otherwise ({first})" for part in found]


class _Ends(HistogramObserver):
    """Takes the ends of what it has seen for its range, which a histogram may search for up to a second."""

    def calculate_qparams(self) -> Any:  # type: ignore[override]
        return self._calculate_qparams(self.min_val, self.max_val)


def _quick(mapping: QConfigMapping) -> QConfigMapping:
    """A copy whose histograms are not searched: what is broken on does not hang on the ranges."""
    quick, made = copy.copy(mapping), dict[QConfig, QConfig]()

    def of_ends(qconfig: Any) -> Any:
        if qconfig is None or type(qconfig.activation()) is not HistogramObserver:
            return qconfig
        if qconfig not in made:
            made[qconfig] = qconfig._replace(activation=partial(_ends, qconfig.activation))
        return made[qconfig]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what observers will not take in a later torch
        for name, held in vars(mapping).items():
            each = {key: of_ends(qconfig) for key, qconfig in held.items()} if isinstance(held, dict) else None
            setattr(quick, name, of_ends(held) if each is None else type(held)(each))
    return quick


def _ends(make: Callable[[], HistogramObserver]) -> HistogramObserver:
    observer = make()
    observer.__class__ = _Ends
    return observer


def _error(
    model: nn.Module, mapping: QConfigMapping, custom: PrepareCustomConfig, example: tuple[Any, ...]
) -> Exception | None:
    """What preparing, calibrating, converting and running a copy raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user is told when they call these themselves
            prepared = prepare_fx(copy.deepcopy(model), mapping, example, prepare_custom_config=custom)
            prepared(*copied(example))  # a model may work in place on its input
            convert_fx(prepared)(*copied(example))
    except Exception as error:
        return error
    return None


def _parts(model: nn.Module, custom: PrepareCustomConfig) -> list[_Part]:
    """All that prepare_fx may quantize, in graph order."""
    tracer = QuantizationTracer([], list(custom.non_traceable_module_classes))
    graph: Graph = tracer.trace(copy.deepcopy(model))
    return [_Part(_told(node), leave) for node, leave in leaving_nodes(graph, tracer.node_name_to_scope).items()]


def _told(node: Node) -> str:
    """What stays float with a node."""
    if node.op == "call_module":
        return str(node.target)
    return f"{node.name} (all of {node.target})" if node.op == "call_method" else node.name
