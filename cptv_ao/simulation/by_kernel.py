"""Ops that the twin has no arithmetic for: the kernel itself computes them, and the gradient is that of a float form.

Forward:  values of the twin -> quantized tensors -> the function or module of the lowered model -> values of the twin
Backward: through what the float form of the op computes on dequantized values; where it has none, straight through,
          where the output has the shape of the input; else no gradient passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from cptv_ao.core.tensors import copied
from cptv_ao.fx.inplace import OutOfPlace
from cptv_ao.simulation.qtensor import QTensor, dequantize, from_kernel, to_kernel
from cptv_ao.simulation.quantizers import Quantizer

#: What the gradient of an op is: that of its float form, straight through, or none.
Gradient = Literal["float", "straight", "none"]


class ByKernel(OutOfPlace):
    """A function or module of the lowered model on values of the twin, on any device; kernels run on the CPU.

    Args:
        told: what it is, to tell of it.
        kernel: the function or module; the very one of the model, whose scale is put back after each call.
        float_form: computes the same with floats; None where nothing is known that does.
        output: puts the result on its scale, where the kernel has an output scale of its own.
        places: of that scale and its zero_point among the arguments of a function, by number or name.

    Attributes:
        in_float: compute with the float form, if there is one, as it is done where no input is rounded.
        gradient: what is passed back; None as long as it has not run.
    """

    def __init__(
        self,
        told: str,
        kernel: Callable[..., Any],
        float_form: Callable[..., Any] | None,
        output: Quantizer | None = None,
        places: Sequence[int | str] = (),
    ) -> None:
        super().__init__()
        self._told, self.float_form, self.output, self._places = told, float_form, output, places
        self._kernel = (kernel,)  # no part of this module: it stays where it is
        self.in_float = False
        self.gradient: Gradient | None = None

    def extra_repr(self) -> str:
        return self._told

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, (QTensor, Tensor))]
        with torch.no_grad():
            result = self._run(args, kwargs, _device(given))
        rounds = not self.in_float and all(
            leaf.rounding == "round" for leaf in (*given, self.output) if isinstance(leaf, (QTensor, Quantizer))
        )
        if rounds and self.gradient is not None and not torch.is_grad_enabled():
            return result
        leaves, spec = tree_flatten(result)
        floats = self._floats(args, kwargs, len(leaves), given, leaves)
        return tree_unflatten([self._passed(*pair, given, rounds) for pair in zip(leaves, floats, strict=True)], spec)

    def _run(self, args: Any, kwargs: Any, device: torch.device) -> Any:
        """What the kernel makes of these values, as values of the twin."""
        (kernel,) = self._kernel
        args, kwargs = tree_map(to_kernel, (args, kwargs))
        args, kwargs = copied((args, kwargs))
        if self.output is None:
            return tree_map(lambda leaf: from_kernel(leaf, device), kernel(*args, **kwargs))
        scale = float(self.output.scale.detach()), int(self.output.zero_point.detach().round())
        if self._places:
            given = dict(enumerate(args)) | kwargs | dict(zip(self._places, scale, strict=True))
            first = [given.pop(place) for place in range(len(args))]
            found = kernel(*first, **given)
        else:
            with _scale_set(kernel, *scale):
                found = kernel(*args, **kwargs)
        found = tree_map(lambda leaf: from_kernel(leaf, device), found)
        like, _ = self.output.like()
        return tree_map(lambda leaf: like.with_codes(leaf.codes) if isinstance(leaf, QTensor) else leaf, found)

    def _floats(self, args: Any, kwargs: Any, count: int, given: list[Any], leaves: list[Any]) -> list[Any]:
        """What the outputs are in float, with their gradient; None where that is not known."""
        if self.float_form is not None:
            args, kwargs = tree_map(dequantize, (args, kwargs))
            try:
                found = tree_leaves(self.float_form(*args, **kwargs))
            except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError):
                self.float_form = None  # it is none of these values
            else:
                if len(found) == count and all(map(_alike, found, leaves)):
                    self.gradient = "float"
                    return found
        first = next((leaf for leaf in given if _is_real(leaf)), None)
        straight = [first if first is not None and _alike(first, leaf) else None for leaf in leaves]
        self.gradient = "straight" if any(leaf is not None for leaf in straight) else "none"
        return [None if leaf is None else dequantize(leaf) for leaf in straight]

    def _passed(self, found: Any, value: Any, given: list[Any], rounds: bool) -> Any:
        """What the kernel found, with the gradient of the same in float; that itself where nothing is rounded."""
        if value is None or not _is_real(found):
            return found
        if not isinstance(found, QTensor):
            return PassedOn.apply(value, found) if rounds else value.to(found.dtype)
        if self.output is not None:
            like = self.output(value)
        else:
            keeps = next((leaf for leaf in given if isinstance(leaf, QTensor) and _same_scale(leaf, found)), found)
            like = keeps.fitted(value / keeps.scale)
        return like.with_codes(PassedOn.apply(like.codes, found.codes)) if rounds else like


class PassedOn(torch.autograd.Function):
    """Other numbers in the place of a value, to which their gradient goes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return other.view_as(other)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@contextmanager
def _scale_set(kernel: Any, scale: float, zero_point: int) -> Iterator[None]:
    """A quantized module with another output scale."""
    names = {"scale": scale, "zero_point": zero_point}
    before = {name: getattr(kernel, name) for name in names}
    try:
        for name, value in names.items():
            held = before[name]
            setattr(kernel, name, torch.full_like(held, value) if isinstance(held, Tensor) else value)
        yield
    finally:
        for name, held in before.items():
            setattr(kernel, name, held)


def _device(values: list[Any]) -> torch.device:
    return next((v.codes.device if isinstance(v, QTensor) else v.device for v in values), torch.device("cpu"))


def _is_real(value: Any) -> bool:
    return isinstance(value, QTensor) or (isinstance(value, Tensor) and value.is_floating_point())


def _shape(value: Any) -> Any:
    return value.codes.shape if isinstance(value, QTensor) else getattr(value, "shape", None)


def _alike(value: Any, other: Any) -> bool:
    return bool(_shape(value) == _shape(other))


def _same_scale(value: QTensor, other: QTensor) -> bool:
    same = torch.equal(value.scale.detach(), other.scale) and torch.equal(value.zero_point.detach(), other.zero_point)
    return same and (value.low, value.high) == (other.low, other.high)
