"""All sites of a model at one time, and the way back there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Protocol

from torch.fx import GraphModule

from cptv_ao.backends.compiling import compiled_once
from cptv_ao.core.sites import SiteTable


class SiteStates(Protocol):
    """What holds a model's sites, each of which can be put back."""

    @property
    def model(self) -> GraphModule:
        """What computes with the sites; a scale that is written is seen by its next run."""

    @property
    def sites(self) -> SiteTable:
        """All scales, in graph order."""

    def state(self, name: str) -> Any:
        """What is stored at a site now, for `restore`."""

    def restore(self, name: str, state: Any) -> None:
        """Put back what `state` returned, bit for bit."""


class Snapshots:
    """Of a class of `SiteStates`: undoing many writes at once."""

    def snapshot(self: SiteStates) -> dict[str, Any]:
        """`state` of every site."""
        return {name: self.state(name) for name in self.sites}

    def restore_all(self: SiteStates, snapshot: Mapping[str, Any]) -> None:
        """Put back a `snapshot`: all of it, whatever fails on the way, which is raised then."""
        with compiled_once(self.model), ExitStack() as steps:
            for name, state in list(snapshot.items())[::-1]:
                steps.callback(self.restore, name, state)
