"""What torch and Python list: their functions and modules, by identity, of which it can be told whether they write.

Torch says by the name that it lists a function under whether it works in place (`relu_`), and which op it is (`view`).
Of a function or module that is not listed here nothing is known, whatever its name.
"""

from __future__ import annotations

import builtins
import math
import operator
import sys
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
import torch.ao.nn.qat as nnqat
import torch.ao.nn.quantizable as quantizable
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
import torch.ao.nn.quantized.functional as quantized_functional
import torch.ao.nn.quantized.reference as nnqr
import torch.ao.nn.sparse.quantized as sparse
import torch.ao.nn.sparse.quantized.dynamic as sparse_dynamic
import torch.ao.quantization
from torch import nn
from torch.nn import functional

from cptv_ao.fx.decomposed_ops import is_of, packet_of

_PAIRS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add, operator.iand: operator.and_, operator.ifloordiv: operator.floordiv,
    operator.ilshift: operator.lshift, operator.imatmul: operator.matmul, operator.imod: operator.mod,
    operator.imul: operator.mul, operator.ior: operator.or_, operator.ipow: operator.pow,
    operator.irshift: operator.rshift, operator.isub: operator.sub, operator.itruediv: operator.truediv,
    operator.ixor: operator.xor,
}  # fmt: skip
_IN_PLACE_METHODS = {f"__{target.__name__}__" for target in _PAIRS} | {"__setitem__"}
_OF_TORCH: tuple[Any, ...] = (
    torch, functional, torch.functional, torch.linalg, torch.fft, torch.special, torch._C._nn, nn.init,
    quantized_functional, torch._C.TensorBase, torch.Tensor,
)  # fmt: skip
_OF_MODULES = (
    nn, nn.modules.linear, nni, nniq, nniqd, nniqat, nnqat, nnq, nnq.modules, nnq.modules.embedding_ops,
    nnq.modules.linear, nnqd, nnqd.modules.rnn, nnqr, quantizable, quantizable.modules.rnn, sparse, sparse_dynamic,
    sparse.linear, torch.ao.quantization,
)  # fmt: skip


def with_item(value: Any, index: Any, item: Any) -> Any:
    """A copy of a tensor in which `copy[index] = item`."""
    value = value.clone()
    value[index] = item
    return value


def is_listed(function: Any) -> bool:
    """Whether this is a function of torch or Python, or one of ours."""
    return function in _LISTED


def is_listed_module(module: nn.Module) -> bool:
    """Whether this is a module of torch itself; one that is only made from such may do anything."""
    return type(module) in _MODULES or type(module) in _modules(_loaded("torch.export._unlift"))


def works_in_place(target: Any) -> bool:
    """Whether a method (by its name, a graph has no more of it) or a function writes into its first input."""
    return _is_in_place(target) if isinstance(target, str) else target in _OUT_OF_PLACE


def counterpart(function: Any) -> Any:
    """The function that returns what an in-place one writes; None where torch has none."""
    return _OUT_OF_PLACE.get(function)


def aten_name(target: Any) -> str:
    """Under which name torch has a method, a function, or an op of torch.ops.aten; `""` of others."""
    if isinstance(target, str):
        return target
    packet = packet_of(target)
    if packet is not None:
        return packet.__name__ if is_of(packet, torch.ops.aten) else ""
    return _NAMES.get(target, "")


def plain_name(name: str) -> str:
    """What torch calls the op of an in-place name out of place."""
    return name.replace("__i", "__", 1) if name in _IN_PLACE_METHODS else name.removesuffix("_")


def _is_in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_METHODS


def _functions(rooms: Iterable[Any]) -> dict[Any, str]:
    """The first name of each function of these modules and classes, one for an operator if there is no other."""
    found: dict[Any, str] = {}
    for room in rooms:
        for name, held in sorted(vars(room).items(), key=lambda item: item[0].startswith("__")):
            if callable(held) and isinstance(held, Hashable):
                found.setdefault(held, name)
    return found


def _modules(rooms: Iterable[Any]) -> frozenset[type]:
    """The kinds of modules of these modules."""
    held = (kind for room in rooms for kind in vars(room).values())
    return frozenset(kind for kind in held if isinstance(kind, type) and issubclass(kind, nn.Module))


def _loaded(*names: str) -> list[Any]:
    """Those of these modules of Python that somebody imported: there are no objects of the kinds of the others. To
    import them here for their kinds alone takes as long as torch itself does."""
    return [sys.modules[name] for name in names if name in sys.modules]


def _counterpart_of(name: str) -> Any:
    """The function that returns what torch's in-place one of this name writes."""
    rooms = (torch, functional, torch.Tensor)
    return next((found for room in rooms if (found := getattr(room, plain_name(name), None)) is not None), None)


_NAMES = _functions(_OF_TORCH) | {operator.pos: "positive"}
_LISTED = frozenset(_NAMES) | frozenset(_functions((operator, math, builtins))) | {with_item}
_OUT_OF_PLACE: dict[Any, Any] = {
    **{function: _counterpart_of(name) for function, name in _NAMES.items() if _is_in_place(name)},
    **_PAIRS,
    operator.setitem: with_item,
    torch.Tensor.__setitem__: with_item,
}
_MODULES = _modules(_OF_MODULES)
