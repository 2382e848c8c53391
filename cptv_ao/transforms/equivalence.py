"""Whether an equivalent form is one: it is used where the model's outputs in float stay what they were, and left where
they do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from cptv_ao.backends.backend import Backend
from cptv_ao.core.distributed import World
from cptv_ao.core.errors import InvalidScaleError
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.simulation.nothing_rounded import NothingRounded
from cptv_ao.simulation.qtensor import QTensor, real
from cptv_ao.simulation.twin import Twin, unquantized

# How near outputs must be to what they were, beside the largest of them.
_SAME = 1e-3

_Form = TypeVar("_Form")
_Done = TypeVar("_Done")


class Equivalence:
    """Uses forms of a model, as far as they leave what it computes in float.

    Args:
        backend: of the model.
        start: of the model as it is; its outputs for these few images are to stay.
        world: the ranks that all do so.
        confirmed: where the float twin does not know an op, says whether the model as it is now will do; without it no
            form is used there.
        at_once: whether forms are looked at all together once they are there, see `holds`, which takes less time.
    """

    def __init__(
        self,
        backend: Backend,
        start: NothingRounded,
        world: World,
        confirmed: Callable[[], bool] | None = None,
        at_once: bool = False,
    ) -> None:
        self._backend, self._world, self._confirmed = backend, world, confirmed
        self.few = start.few
        self._twin: Twin | None = None
        self._changed, self._apart = False, 0.0
        self._wanted = list[Tensor]()
        if start.found is not None:
            self._twin, output = start.found
            self._wanted = _numbers(output)
        self._at_once = at_once and self.sees

    @property
    def sees(self) -> bool:
        """Whether there is a twin."""
        return self._twin is not None

    @property
    def twin(self) -> Twin | None:
        """The model in float, as it is now; None where an op is not known."""
        if self._changed and self._twin is not None:
            self._twin = unquantized(self._backend)
        self._changed = False
        return self._twin

    @property
    def holds(self) -> bool:
        """Whether the outputs are what they were with all forms that were used `at_once`."""
        twin = self.twin
        return self._apart == 0 or twin is None or self._near(self._outputs(twin), self._apart)

    def used(self, forms: Sequence[_Form], apply: Callable[[_Form], _Done], apart: float = _SAME) -> list[_Done]:
        """Use all forms, or, where that makes the outputs others, what can be used of one half and then of the other.

        Args:
            forms: of one kind.
            apply: writes one into the model; returns something false where there was nothing to do.
            apart: how far outputs may be from what they were, beside the largest of them.

        Returns:
            What `apply` returned for those that were used.

        Raises:
            InvalidScaleError: `at_once`, a form needs a scale that no kernel can use.
        """
        if not forms:
            return []
        if self._at_once:
            with self._backend.writing():
                done = [apply(form) for form in forms]
            if any(done):
                self._changed, self._apart = True, max(self._apart, apart)
            return done
        before, twin = self._backend.snapshot(), self.twin
        try:
            with self._backend.writing():
                done = [apply(form) for form in forms]
            if not any(done) or self._same(apart):
                return done
        except InvalidScaleError:  # a scale that no kernel can use
            pass
        self._backend.restore_all(before)
        self._twin = twin
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
        if self._twin is None:
            return self._confirmed is not None and self._confirmed()
        self._twin = unquantized(self._backend)
        return self._near(self._outputs(self._twin), apart)

    def _near(self, outputs: Sequence[Tensor], apart: float) -> bool:
        furthest = math.inf if not outputs else 0.0
        for output, wanted in zip(outputs, self._wanted, strict=True):
            off = float((output - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)) if wanted.numel() else 0.0
            furthest = max(furthest, off if math.isfinite(off) else math.inf)
        return self._world.most(furthest)[0] < apart

    def _outputs(self, twin: Twin, see: Callable[[Node, Any], Any] = lambda _, value: value) -> list[Tensor]:
        return _numbers(Watcher(twin.module).watch(self.few, see))


def _numbers(output: Any) -> list[Tensor]:
    """All of an output that are numbers."""
    return [numbers for leaf in tree_leaves(output) if (numbers := real(leaf)) is not None]


def forms_used(
    backend: Backend,
    start: NothingRounded,
    world: World,
    use: Callable[[Equivalence], list[str]],
    confirmed: Callable[[], bool] | None = None,
) -> list[str]:
    """What a function returns that uses forms of a model: all of them looked at once, or, where something is wrong with
    that, each kind by itself from the model as it was.

    Args:
        backend, start, world, confirmed: see `Equivalence`.
    """
    before = backend.snapshot()
    check = Equivalence(backend, start, world, confirmed, at_once=True)
    with suppress(ArithmeticError, ValueError):  # of a form that is none; any other comes again below
        done = use(check)
        if check.holds:
            return done
    backend.restore_all(before)
    return use(Equivalence(backend, start, world, confirmed))


def largest(forms: Sequence[_Form], fine: Callable[[Sequence[_Form]], bool]) -> list[_Form]:
    """Forms that are fine: all at once, or those of each half."""
    if not forms or fine(forms):
        return list(forms)
    half = len(forms) // 2
    return [*largest(forms[:half], fine), *largest(forms[half:], fine)] if half else []
