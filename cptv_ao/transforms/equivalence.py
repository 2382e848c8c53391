"""Whether an equivalent form is one: it is used where the model's outputs in float stay what they were, and left where
they do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.errors import InvalidScaleError, UnsupportedModelError
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.simulation.qtensor import QTensor, real
from cptv_ao.simulation.twin import Twin, unquantized

#: Images on which outputs are compared.
FEW = 2
# How near outputs must be to what they were, beside the largest of them.
_SAME = 1e-3

_Form = TypeVar("_Form")
_Done = TypeVar("_Done")


class Equivalence:
    """Uses forms of a model, as far as they leave what it computes in float.

    Args:
        backend: of the model, as it was given.
        batches: calibration images; the first few are looked at.
        world: the ranks that all do so.
        confirmed: where the float twin does not know an op, says whether the model as it is now will do; without it no
            form is used there.

    Attributes:
        twin: the model in float, as it is now; None where an op is not known.
    """

    def __init__(
        self, backend: Backend, batches: Sequence[Batch], world: World, confirmed: Callable[[], bool] | None = None
    ) -> None:
        self._backend, self._world, self._confirmed = backend, world, confirmed
        self.few = batches[0].few(FEW)
        self.twin: Twin | None = None
        try:
            twin = unquantized(backend).checked(self.few)
            self._wanted = self._outputs(twin)
            self.twin = twin
        except UnsupportedModelError:
            pass

    def used(self, forms: Sequence[_Form], apply: Callable[[_Form], _Done], apart: float = _SAME) -> list[_Done]:
        """Use all forms, or, where that makes the outputs others, what can be used of one half and then of the other.

        Args:
            forms: of one kind.
            apply: writes one into the model; returns something false where there was nothing to do.
            apart: how far outputs may be from what they were, beside the largest of them.

        Returns:
            What `apply` returned for those that were used.
        """
        if not forms:
            return []
        before, twin = self._backend.snapshot(), self.twin
        try:
            with self._backend.writing():
                done = [apply(form) for form in forms]
            if not any(done) or self._same(apart):
                return done
        except InvalidScaleError:  # a scale that no kernel can use
            pass
        self._backend.restore_all(before)
        self.twin = twin
        half = len(forms) // 2
        return [*self.used(forms[:half], apply, apart), *self.used(forms[half:], apply, apart)] if half else []

    def clipped(self, ranges: Mapping[str, tuple[float, float]]) -> bool:
        """Whether the outputs stay where the values of these nodes are clipped to ranges; True without a twin."""

        def see(node: Node, value: Any) -> Any:
            if node.name not in ranges:
                return value
            low, high = ranges[node.name]
            if isinstance(value, QTensor):
                return value.with_codes(value.codes.clamp(low / float(value.scale), high / float(value.scale)))
            return value.clamp(low, high)

        return self.twin is None or self._near(self._outputs(self.twin, see), _SAME)

    def _same(self, apart: float) -> bool:
        if self.twin is None:
            return self._confirmed is not None and self._confirmed()
        self.twin = unquantized(self._backend)
        return self._near(self._outputs(self.twin), apart)

    def _near(self, outputs: Sequence[Tensor], apart: float) -> bool:
        furthest = math.inf if not outputs else 0.0
        for output, wanted in zip(outputs, self._wanted, strict=True):
            off = float((output - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)) if wanted.numel() else 0.0
            furthest = max(furthest, off if math.isfinite(off) else math.inf)
        return self._world.most(furthest)[0] < apart

    def _outputs(self, twin: Twin, see: Callable[[Node, Any], Any] = lambda _, value: value) -> list[Tensor]:
        """All that are numbers."""
        leaves = tree_leaves(Watcher(twin.module).watch(self.few, see))
        return [numbers for leaf in leaves if (numbers := real(leaf)) is not None]


def largest(forms: Sequence[_Form], fine: Callable[[Sequence[_Form]], bool]) -> list[_Form]:
    """Forms that are fine: all at once, or those of each half."""
    if not forms or fine(forms):
        return list(forms)
    half = len(forms) // 2
    return [*largest(forms[:half], fine), *largest(forms[half:], fine)] if half else []
