"""What stands in the twin for writing in place, which no op of the twin does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.tensors import copied
from cptv_ao.fx.inplace import OutOfPlace


class WithPart(OutOfPlace):
    """A copy of a tensor in which a view of it has another value.

    Args:
        steps: the nodes that make the view, one of the other.
    """

    def __init__(self, steps: Sequence[Node]) -> None:
        super().__init__()
        self._names = ", ".join(step.name for step in steps)
        self._steps = [_step(step) for step in steps]

    def forward(self, whole: Any, part: Any) -> Tensor:
        if not (isinstance(whole, Tensor) and isinstance(part, Tensor)):
            raise UnsupportedModelError(
                f"the twin does not know how to write into a part of quantized values: {self._names}"
            )
        new = whole.clone()
        view = new
        for step in self._steps:
            view = step(view)
        view.copy_(part)
        return new


def _step(node: Node) -> Callable[[Any], Any]:
    target: Any = node.target
    function = getattr(torch.Tensor, target) if node.op == "call_method" else target
    args, kwargs = node.args[1:], dict(node.kwargs)
    return lambda value: function(value, *args, **kwargs)


class OnCopies(OutOfPlace):
    """A function or module of which nothing is known: it is given copies of tensors.

    Args:
        name: of its node.
        shared: whether what it is given is read again after it, so that writing into it would be seen.
    """

    def __init__(self, inner: nn.Module, name: str, shared: bool) -> None:
        super().__init__()
        self.inner, self._name, self.shared = inner, name, shared

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = copied((args, kwargs))
        result = self.inner(*given[0], **given[1])
        if self.shared and not _same(given, (args, kwargs)):
            raise UnsupportedModelError(
                f"{self._name}: the float twin does not know a module that writes into its input, which is read later",
                self._name,
            )
        return result


def _same(found: Any, given: Any) -> bool:
    if isinstance(given, Tensor):
        return torch.equal(found, given) or bool(given.isnan().any())
    if isinstance(given, dict):
        return all(_same(found[key], value) for key, value in given.items())
    if isinstance(given, (list, tuple)):
        return all(map(_same, found, given))
    return True
