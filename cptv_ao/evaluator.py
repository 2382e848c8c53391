"""Scoring scales: the loss between the model's outputs and the teacher's, on the model's own kernels.

Only the tail of the graph, from the searched block on, runs per candidate:

    Before: x -> stem -> blocks.0 -> ... -> blocks.k -> ... -> head -> logits
    After:  [cached values that cross the cut] -> blocks.k -> ... -> head -> logits

The tail is generated code that runs on the model itself, so a scale that was written is seen at once and nothing
of the model is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from cptv_ao.data import Batch
from cptv_ao.errors import CalibrationDataError, NonFiniteError, UnsupportedModelError

Select = Callable[[Any], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def first_floating(output: Any) -> Tensor:
    """The first floating tensor of an output: a tensor, a tuple or list, or a dict; depth first.

    Raises:
        UnsupportedModelError: there is none.
    """
    for value in _flatten(output):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise UnsupportedModelError(
        f"expected an output that holds a floating tensor, got {type(output).__name__}; "
        "say which part the loss compares with RefineConfig(output=...)"
    )


def _flatten(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return [leaf for value in output.values() for leaf in _flatten(value)]
    if isinstance(output, (list, tuple)):
        return [leaf for value in output for leaf in _flatten(value)]
    return [output]


@dataclass(frozen=True)
class _Cut:
    """The code on both sides of a cut through the graph, and the names of the values that cross it."""

    head: Callable[..., tuple[Any, ...]]
    tail: Callable[..., Any]


class Evaluator:
    """Loss of the scales that are in the model now, on one set of images.

    Args:
        model: the lowered model; it is run, never written.
        batches: the images.
        teacher: the teacher's output per batch, (N, ...).
        loss: `(candidate (N, C), teacher (N, C)) -> scalar`, averaged over batches weighted by their images.
        select: picks the compared tensor from what the model returns.
    """

    def __init__(
        self,
        model: GraphModule,
        batches: Sequence[Batch],
        teacher: Sequence[Tensor],
        loss: Loss,
        select: Select = first_floating,
    ) -> None:
        self._model = model
        self._batches = tuple(batches)
        self._teacher = tuple(teacher)
        self._loss = loss
        self._select = select
        self._index = {node.name: i for i, node in enumerate(model.graph.nodes)}
        self._cuts: dict[int, _Cut] = {}
        self._cut: _Cut | None = None
        self._entries: list[tuple[Any, ...]] = []
        self._clone: frozenset[int] = frozenset()
        self.images = sum(batch.images for batch in self._batches)
        #: forwards so far, in images of a whole forward's worth of batches (a tail counts as one forward)
        self.image_forwards = 0

    def enter(self, nodes: Sequence[str]) -> None:
        """Cache what crosses the cut before the first of these nodes, with the scales that are in the model now."""
        at = min(self._index[name] for name in nodes)
        if at not in self._cuts:
            self._cuts[at] = _split(self._model, at)
        self._cut = self._cuts[at]
        with torch.inference_mode():
            self._entries = [self._cut.head(self._model, *b.args, **b.kwargs) for b in self._batches]
            self._clone = self._written_in_place()

    def leave(self) -> None:
        """Drop the cached entries; `score` runs the whole model again."""
        self._cut, self._entries, self._clone = None, [], frozenset()

    def score(self, threshold: float = math.inf) -> float:
        """Loss on all images; `inf` as soon as the partial sum shows that it is not below `threshold`.

        Early rejection is exact for losses that are never negative.
        """
        total = 0.0
        with torch.inference_mode():
            for index, (batch, teacher) in enumerate(zip(self._batches, self._teacher, strict=True)):
                total += float(self._loss(self._output(index), teacher)) * batch.images
                self.image_forwards += batch.images
                if total / self.images >= threshold:
                    return math.inf
        return total / self.images

    def outputs(self) -> list[Tensor]:
        """The compared outputs per batch, (N, C) each."""
        with torch.inference_mode():
            return [self._output(i) for i in range(len(self._batches))]

    def _output(self, index: int) -> Tensor:
        if self._cut is None:
            return self._select(run(self._model, self._batches[index], index)).flatten(1)
        entry = self._entries[index]
        if self._clone:
            entry = tuple(_clone(v) if i in self._clone else v for i, v in enumerate(entry))
        return self._select(self._cut.tail(self._model, *entry)).flatten(1)

    def _written_in_place(self) -> frozenset[int]:
        """Which cached values the tail works on in place (timm's ReLU), found by running it once."""
        assert self._cut is not None
        first = self._entries[0]
        copies = tuple(_clone(value) for value in first)
        self._cut.tail(self._model, *copies)
        return frozenset(i for i, (a, b) in enumerate(zip(first, copies, strict=True)) if not _same(a, b))


def run(model: Callable[..., Any], batch: Batch, index: int) -> Any:
    """Run a model on a batch; what it raises about the input is told with the batch.

    Raises:
        CalibrationDataError: the model does not accept the batch.
    """
    try:
        return model(*batch.args, **batch.kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        shapes = [tuple(v.shape) for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]
        raise CalibrationDataError(
            f"calib_loader, batch {index}: the model failed on inputs of shape {shapes}: {error}", index
        ) from error


def teacher_outputs(
    teacher: Callable[..., Any], batches: Sequence[Batch], select: Select = first_floating
) -> list[Tensor]:
    """Run the teacher once: its outputs (N, C) per batch.

    Raises:
        NonFiniteError: an output is NaN or infinite.
    """
    outputs = []
    with torch.no_grad():
        for index, batch in enumerate(batches):
            output = select(run(teacher, batch, index)).flatten(1)
            if not bool(torch.isfinite(output).all()):
                raise NonFiniteError(f"the teacher's output on calibration batch {index} holds NaN or inf")
            outputs.append(output)
    return outputs


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(v) for v in value)
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return bool(torch.equal(a.int_repr() if a.is_quantized else a, b.int_repr() if b.is_quantized else b))
    if isinstance(a, (list, tuple)):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return True


def _split(model: GraphModule, at: int) -> _Cut:
    """Split a graph before its node number `at`, as two functions that take the model as `self`.

    Before: forward(self, x) -> y
    After:  head(self, x) -> live values;  tail(self, *live) -> y
    """
    nodes = list(model.graph.nodes)
    # Constants are fetched where they are used; a placeholder behind the cut is passed through.
    before = [n for n in nodes[:at] if n.op != "get_attr"] + [n for n in nodes[at:] if n.op == "placeholder"]
    known = set(before)
    after = [n for n in nodes if n not in known]
    live = [n for n in before if any(user not in known for user in n.users)]

    head, copied = Graph(), dict[Node, Node]()
    for node in nodes:
        if node in known or (node.op == "get_attr" and any(user in known for user in node.users)):
            copied[node] = head.node_copy(node, lambda n: copied[n])
    head.output(tuple(copied[n] for n in live))

    tail, copied_tail = Graph(), dict[Node, Node]()
    for node in live:
        copied_tail[node] = tail.placeholder(node.name)
    for node in after:
        if node.op != "get_attr" or any(user not in known for user in node.users):
            copied_tail[node] = tail.node_copy(node, lambda n: copied_tail[n])
    return _Cut(_compile(head), _compile(tail))


def _compile(graph: Graph) -> Callable[..., Any]:
    graph.lint()
    code = graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<cptv_ao tail>", "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function
