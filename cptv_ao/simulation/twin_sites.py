"""What a twin holds for its sites: reading, writing, undoing, and trying other numbers in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from cptv_ao.core.qparams import QParams
from cptv_ao.simulation.quantizers import SiteModule, WeightQuantizer


class TwinSites:
    """Scales, zero_points and what is beside them, by the name of their site.

    Args:
        modules: the twin's modules that hold them.
    """

    def __init__(self, modules: Mapping[str, SiteModule]) -> None:
        self.modules = modules

    def get(self, name: str) -> QParams:
        """Scale and zero_point of a site, how a weight is rounded, and what is added to the bias of its layer."""
        site = self.modules[name]
        shift, correction = (site.shift, site.correction) if isinstance(site, WeightQuantizer) else (None, None)
        return QParams(
            site.scale.double().cpu(),
            site.zero_point.round().long().cpu(),
            None if shift is None else shift.cpu(),
            None if correction is None else correction.to("cpu", copy=True),
        )

    def set(self, name: str, qparams: QParams) -> None:
        """Write a site. The codes of a weight whose float weight is known are re-rounded.

        A zero_point beyond a `limit` is moved to it.
        """
        module = self.modules[name]
        zero_point = qparams.zero_point.clamp(max=module.site.qmax) if module.site.affine else qparams.zero_point
        checked = replace(qparams, zero_point=zero_point).checked(module.site)
        module.scale.copy_(checked.scale)
        module.zero_point.copy_(checked.zero_point)
        if isinstance(module, WeightQuantizer):
            module.set_beside(checked)
            module.refresh()

    def shiftable_weight(self, name: str) -> Tensor | None:
        """The float weight of a site whose codes need not be the nearest; None where there is none."""
        module = self.modules[name]
        return module.weight if isinstance(module, WeightQuantizer) and module.shiftable else None

    def state(self, name: str) -> tuple[Tensor | None, ...]:
        """What is held for a site, for `restore`."""
        return self.modules[name].state()

    def restore(self, name: str, state: tuple[Any, ...]) -> None:
        """Put back what `state` returned."""
        self.modules[name].restore(state)

    def limit(self, names: Iterable[str], qmax: int) -> None:
        """Clip the codes of these activation sites at `qmax`."""
        for name in names:
            self.modules[name].limit(qmax)

    @contextmanager
    def replaced(self, values: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
        """Other tensors in the place of the buffers, while the context lasts. `torch.func.functional_call` does the
        same, but its checks take a tenth of a step on small networks."""
        kept = [(buffers, dict(buffers)) for buffers in (self.modules[name]._buffers for name in values)]
        try:
            for (buffers, _), others in zip(kept, values.values(), strict=True):
                buffers.update(others)
            yield
        finally:
            for buffers, before in kept:
                buffers.update(before)
