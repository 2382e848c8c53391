"""A lowered model's forward as a chain of functions between cuts, so that it can start or stop at any block.

    Before: forward(self, x) -> y
    After:  x -> piece 0 -> live values at cut 1 -> piece 1 -> live values at cut 2 -> ... -> y

A piece is generated code that calls the model's own modules and buffers: a scale that was written is seen at once,
nothing of the model is copied, and each node is generated once however many cuts there are.
"""

from __future__ import annotations

import operator
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from cptv_ao.fx.aliasing import Memory
from cptv_ao.fx.inplace import may_write
from cptv_ao.fx.inputs import taken_apart
from cptv_ao.fx.paths import fetch
from cptv_ao.fx.quantized_ops import of_module, of_node

Values = tuple[Any, ...]
_PASS_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_REORDERING = {
    "contiguous", "flatten", "permute", "reshape", "size", "transpose", "view", getattr, operator.getitem,
    operator.floordiv, operator.mod, operator.mul, nn.functional.pad, torch.flatten, torch.permute,
    torch.reshape, torch.transpose,
}  # fmt: skip


class Segments:
    """The forward of a model in eval mode, cut before any of its nodes.

    Args:
        model: it is run, never written.
    """

    def __init__(self, model: GraphModule) -> None:
        self._model = model
        self._nodes, self._position, self._held, self._scope = _flattened(model)
        self._index = {node: i for i, node in enumerate(self._nodes)}
        self._first_use = {n: min((self._index[u] for u in n.users), default=len(self._nodes)) for n in self._nodes}
        self._last_use = {n: max((self._index[u] for u in n.users), default=-1) for n in self._nodes}
        self._written = _written_in_place(self._nodes, self._held)
        self._memory = Memory(self._nodes, self._held.get)
        self._cuts = [0]
        self._functions: dict[tuple[int, int | None], Callable[..., Any]] = {}

    def cut(self, nodes: Iterable[str]) -> int:
        """The cut before the first of these nodes; before what only unpacks and reorders its quantized inputs, and
        where no two values cross it that share memory which is written behind it: entries are copied one by one."""
        at = self._rewound(min(self._position[name] for name in nodes))
        while at and self._memory.shared(self._live(at), at):
            at -= 1
        if at not in self._cuts:
            insort(self._cuts, at)
        return at

    def start(self, args: Iterable[Any], kwargs: dict[str, Any], stop: int | None) -> Any:
        """Run from the model's input to the cut `stop`, or to the model's output (None)."""
        first = self._next(0)
        args, named = taken_apart(self._model, args, kwargs)
        values = self._function(0, first)(self._scope, *args, **named)
        return values if first is None or first == stop else self.run(values, first, stop)

    def run(self, values: Values, start: int, stop: int | None) -> Any:
        """Run from the live values at the cut `start` to those at `stop`, or to the model's output (None)."""
        while start != stop:
            following = self._next(start)
            values = self._function(start, following)(self._scope, *values)
            if following is None:
                break
            start = following
        return values

    def copies(self, at: int) -> tuple[bool, ...]:
        """Which live values at a cut are worked on in place behind it (timm's ReLU): hand over copies of these."""
        return tuple(node in self._written for node in self._live(at))

    def views(self, at: int) -> tuple[bool, ...]:
        """Which live values may be packed tightly: those that are only quantized next, element by element."""

        def packable(node: Node) -> bool:
            return all(u.target is torch.quantize_per_tensor for u in node.users if self._index[u] >= at)

        return tuple(packable(node) for node in self._live(at))

    def stamp(self, at: int | None) -> list[Any]:
        """What the live values at a cut depend on, to be compared with `same_stamp`: scales, weights, versions.

        None: what the outputs depend on, with the code itself, which holds scales where they are literals.
        """
        code = [type(self._scope.root).forward] if at is None else []
        return code + [
            part
            for node, held in self._held.items()
            if at is None or (self._first_use[node] if _is_constant(node) else self._index[node]) < at
            for part in _stamp(self._scope.root, held)
        ]

    def _next(self, start: int) -> int | None:
        return next((cut for cut in self._cuts if cut > start), None)

    def _rewound(self, at: int) -> int:
        """Before: dequantize -> permute -> [cut, float32] -> quantize;  after: [cut, quint8] -> dequantize -> ..."""
        found = at
        for index in range(at - 1, -1, -1):
            node = self._nodes[index]
            if node.op == "call_method" and node.target == "dequantize":
                found = index
            elif not (_is_constant(node) or node.target in _REORDERING):
                break
        return found

    def _live(self, at: int) -> list[Node]:
        return [n for n in self._nodes[:at] if not _is_constant(n) and self._last_use[n] >= at]

    def _function(self, start: int, stop: int | None) -> Callable[..., Any]:
        function = self._functions.get((start, stop))
        if function is None:
            function = self._functions[start, stop] = self._compile(start, stop)
        return function

    def _compile(self, start: int, stop: int | None) -> Callable[..., Any]:
        graph, copied = Graph(), dict[Node, Node]()
        end = len(self._nodes) if stop is None else stop
        for node in self._live(start):
            copied[node] = graph.placeholder(node.name)
        for node in self._nodes[start:end]:
            if _is_constant(node):
                continue
            for used in node.all_input_nodes:  # constants are fetched where they are used
                if _is_constant(used) and used not in copied:
                    copied[used] = graph.node_copy(used)
            copied[node] = graph.node_copy(node, copied.__getitem__)
        if stop is not None:
            graph.output(tuple(copied[n] for n in self._live(stop)))
        graph.lint()
        code = graph.python_code("self")
        scope: dict[str, Any] = dict(code.globals)
        exec(compile(code.src, "<cptv_ao piece>", "exec"), scope)
        function: Callable[..., Any] = scope["forward"]
        return function


class _Flat(NamedTuple):
    """A graph in the order in which it runs, in a flat namespace.

    Attributes:
        position: of each node of the model, by its name.
        held: what a call_module or get_attr node refers to.
        scope: has that by the targets of these nodes.
    """

    nodes: list[Node]
    position: dict[str, int]
    held: dict[Node, Any]
    scope: SimpleNamespace


def _flattened(model: GraphModule) -> _Flat:
    """A copy of the graph with placeholders first, without the modules that do nothing in eval mode.

    Modules and tensors get short targets in a flat namespace: on a small network looking up
    `self.blocks.0.attn.qkv` through nn.Module costs as much as the loss.
    """
    graph, copied, held = Graph(), dict[Node, Node](), dict[Node, Any]()
    scope, position = SimpleNamespace(root=model), dict[str, int]()
    nodes = list(model.graph.nodes)
    for node in [n for n in nodes if n.op == "placeholder"] + [n for n in nodes if n.op != "placeholder"]:
        position[node.name] = len(graph.nodes)
        if node.op not in ("call_module", "get_attr"):
            copied[node] = graph.node_copy(node, copied.__getitem__)
            continue
        value = fetch(model, str(node.target))
        if isinstance(value, _PASS_THROUGH) and _does_nothing(value):
            copied[node] = copied[node.all_input_nodes[0]]
            continue
        new = copied[node] = graph.node_copy(node, copied.__getitem__)
        if isinstance(value, (nn.Module, Tensor)):
            new.target = f"n{len(held)}"
            setattr(scope, new.target, value)
            held[new] = value
        else:  # a packed weight is replaced when it is written: look it up each time
            new.target = f"root.{node.target}"
            held[new] = str(node.target)
    return _Flat(list(graph.nodes), position, held, scope)


def _is_constant(node: Node) -> bool:
    """Whether a node depends on no other: an attribute, or a module that is called with nothing."""
    return node.op == "get_attr" or (node.op == "call_module" and not node.all_input_nodes)


# What any module holds; the rest is its own: scales, packed weights, how the twin rounds.
_EVERY_MODULE = frozenset(vars(nn.Module()))


def same_stamp(a: list[Any], b: list[Any]) -> bool:
    """Whether nothing was written between two stamps."""
    if len(a) != len(b):
        return False
    return all(x is y or (isinstance(x, (int, float, str)) and x == y) for x, y in zip(a, b, strict=True))


def packed(value: Any) -> Any:
    """A tensor without the storage around it, where it is a small part of that (`x[:, 0]`)."""
    if isinstance(value, Tensor) and value.numel() * value.element_size() * 2 < value.untyped_storage().nbytes():
        return value.clone(memory_format=torch.contiguous_format)
    return value


def storages(value: Any) -> dict[int, int]:
    """Bytes of each storage that a value holds on to, by address."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if isinstance(value, (list, tuple)):
        return {address: size for v in value for address, size in storages(v).items()}
    if is_dataclass(value):  # the twin's QTensor
        return storages(list(vars(value).values()))
    return {}


def _does_nothing(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks
    return type(module) in _PASS_THROUGH and not module.training and not hooked


def _stamp(root: Any, held: Any) -> list[Any]:
    if isinstance(held, str):
        return [fetch(root, held)]
    if isinstance(held, Tensor):
        # An inference tensor has no version: a fresh object is like no other, so what depends on it is run again.
        return [object() if held.is_inference() else held._version]
    parts: list[Any] = []
    for module in held.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            parts += [] if tensor is None else [tensor, *_stamp(root, tensor)]
        parts += [value for name, value in vars(module).items() if name not in _EVERY_MODULE]
    return parts


def _written_in_place(nodes: list[Node], held: dict[Node, Any]) -> set[Node]:
    """Nodes whose memory a later node may write: in one pass from the end, through whatever may be a view."""
    written: set[Node] = set()
    for node in reversed(nodes):
        if any(may_write(user, held.get(user)) or (user in written and not _is_new(user, held)) for user in node.users):
            written.add(node)
    return written


def _is_new(node: Node, held: dict[Node, Any]) -> bool:
    """Whether a node's value is known to have memory of its own."""
    if node.op == "call_method":
        return node.target == "dequantize"
    known = of_module(held[node]) if node.op == "call_module" else of_node(node, {})
    if known is not None:
        return known.role in {"static", "scaled", "binary"} and not known.adds
    return node.target is torch.quantize_per_tensor
