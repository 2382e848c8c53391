"""Scales that no model holds, and a loss of them with a known minimum: for search rooms on their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite, SiteTable


def activation(name: str, node: str | None = None, tied: str | None = None) -> ScaleSite:
    """Per tensor, 0..255, whose zero_point may move."""
    return ScaleSite(name, "activation", "Linear", "", (), None, 0, 255, True, (node or name,), tied or name)


def weight(name: str, channels: int, node: str | None = None) -> ScaleSite:
    """Per channel, 4 bits."""
    return ScaleSite(name, "weight", "Linear", "", (channels,), 0, -8, 7, False, (node or name,), name)


def qparams(scale: float, site: ScaleSite, zero_point: int = 0) -> QParams:
    return QParams(
        torch.full(site.shape, scale, dtype=torch.float64), torch.full(site.shape, zero_point, dtype=torch.int64)
    )


@dataclass
class FakeStore:
    """What `ScaleStore` asks for, kept in a dict; `calls` says which sites were written and restored."""

    sites: SiteTable
    values: dict[str, QParams]
    sums: tuple[tuple[str, str], ...] = ()
    model: Any = None
    float_weights: Mapping[str, Tensor] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)

    @staticmethod
    def of(*sites: ScaleSite, scale: float = 0.125, sums: tuple[tuple[str, str], ...] = ()) -> FakeStore:
        """All scales the same."""
        return FakeStore(SiteTable(sites), {site.name: qparams(scale, site) for site in sites}, sums)

    def read(self, name: str) -> QParams:
        return self.values[name]

    def write(self, name: str, qparams: QParams) -> None:
        self.values[name] = qparams.checked(self.sites[name])
        self.calls.append(("write", name))

    def state(self, name: str) -> Any:
        return self.values[name]

    def restore(self, name: str, state: Any) -> None:
        self.values[name] = state
        self.calls.append(("restore", name))

    def snapshot(self) -> dict[str, Any]:
        return dict(self.values)

    def restore_all(self, snapshot: Mapping[str, Any]) -> None:
        self.values = dict(snapshot)

    def movable(self) -> dict[str, tuple[ScaleSite, ...]]:
        return self.sites.groups()

    def correctable(self, name: str) -> bool:
        return False
