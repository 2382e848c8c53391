"""What an equal form changes in a graph beside its scales: tensors that ops compute with, and what moves together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import GraphModule

from cptv_ao.backends.tensor_slots import TensorSlot
from cptv_ao.core.sites import SiteTable
from cptv_ao.fx.paths import fetch


class RewrittenState(NamedTuple):
    """What an equal form has changed at a site at one time: tensors, each with its path, what it moves with, and why
    it does not move."""

    tensors: tuple[tuple[str, Tensor], ...]
    tied: str
    fixed: str


class Rewrites:
    """What was changed in one graph, each thing as a part of a site's state.

    Args:
        sites: of the graph, as they were found.

    Attributes:
        sites: as they are now.
        passed: sites of values that are the very ones of another site, whose scale is theirs; by name, that site.
    """

    def __init__(self, model: GraphModule, sites: SiteTable) -> None:
        self._model, self.sites = model, sites
        self.passed: dict[str, str] = {}
        # Tensors that were replaced, as they were given, by their path; by site.
        self._replaced: dict[str, dict[str, Tensor]] = {}

    def put(self, name: str, path: str, value: Tensor) -> None:
        """Replace a tensor that the op of a site computes with; the float model may hold the one that was there.

        What was replaced for another site before stays a part of the state of that one.
        """
        given, known = fetch(self._model, path), any(path in held for held in self._replaced.values())
        if not known:
            self._replaced.setdefault(name, {})[path] = given
        TensorSlot.of(self._model, path).put(value)

    def tie(self, lead: str, passed: str) -> None:
        """Let a site move with another one, whose values reach it unchanged; a state from before undoes it."""
        self._change([passed], tied=lead)
        self.passed[passed] = lead

    def join(self, one: str, other: str) -> None:
        """Let the sites that move with one of two also move with those of the other; a state from before undoes it."""
        lead, joined = self.sites[one].tied, self.sites[other].tied
        self._change([site.name for site in self.sites.values() if site.tied == joined], tied=lead)

    def fix(self, names: Collection[str], why: str) -> None:
        """Let sites not move; a state from before undoes it."""
        self._change(names, fixed=why)

    def state(self, name: str) -> RewrittenState:
        """What is changed at a site now, for `restore`."""
        tensors = tuple((path, fetch(self._model, path)) for path in self._replaced.get(name, ()))
        site = self.sites[name]
        return RewrittenState(tensors, site.tied, site.fixed)

    def restore(self, name: str, state: RewrittenState) -> None:
        """Put back what `state` returned: the very tensors, and those that were given where it knew of none."""
        now = self.sites[name]
        if (state.tied, state.fixed) != (now.tied, now.fixed):
            self._change([name], tied=state.tied, fixed=state.fixed)
            if state.tied != now.tied:
                self.passed.pop(name, None)
        for path, value in (self._replaced.get(name, {}) | dict(state.tensors)).items():
            TensorSlot.of(self._model, path).put(value)

    def _change(self, names: Collection[str], **fields: Any) -> None:
        sites = [replace(site, **fields) if site.name in names else site for site in self.sites.values()]
        self.sites = SiteTable(tuple(sites), self.sites.unknown, self.sites.weight_only)
