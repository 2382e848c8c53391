"""What is searched of a model: the groups of its scales, all of them at once and block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.blocks import find_blocks
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.outcome import SiteMove
from cptv_ao.core.qparams import Assignment, QParams, same
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.weight_rounding import count_shifted
from cptv_ao.search.scale_space import ScaleSpace


@dataclass(frozen=True)
class SearchSpace:
    """The scales of a model that a search may move.

    Attributes:
        store: reads and writes them.
        groups: the tied groups, by the name of their leader.
        whole: all of them as one vector.
        blocks: those of each block, in graph order; a block without any is left out.
    """

    store: ScaleStore
    groups: Mapping[str, tuple[ScaleSite, ...]]
    whole: ScaleSpace
    blocks: Mapping[str, ScaleSpace]

    @staticmethod
    def of(store: ScaleStore, config: RefineConfig) -> SearchSpace:
        """What this config searches.

        Raises:
            ValueError: a pattern of `config.include` fits no site.
        """
        groups = _searched(store, config)
        blocks = find_blocks(store.sites.values(), config.blocks)
        by_block = {b.name: {s.name: groups[s.name] for s in b.sites if s.name in groups} for b in blocks}
        spaces = {name: ScaleSpace(store, own) for name, own in by_block.items() if own}
        return SearchSpace(store, groups, ScaleSpace(store, groups), spaces)

    def moved_since(self, first: Mapping[str, Any]) -> Assignment:
        """Qparams of all sites that are not as in a snapshot."""
        moved = [name for name, state in first.items() if not _same_state(self.store.state(name), state)]
        return {name: self.store.read(name) for name in moved}

    def write(self, scales: Assignment) -> None:
        """Write qparams that another process found, by site name.

        Raises:
            KeyError, ValueError: they are not those of this model.
        """
        for name, qparams in scales.items():
            if qparams.shift is not None and qparams.shift.shape != (shape := self.store.float_weights[name].shape):
                raise ValueError(f"{name}: expected a shift of {tuple(shape)}, got {tuple(qparams.shift.shape)}")
            try:
                self.store.write(name, qparams)
            except RuntimeError as error:  # of torch, of other shapes
                raise ValueError(f"{name}: {error}") from error

    def moves(self, before: Mapping[str, QParams]) -> tuple[SiteMove, ...]:
        """What moved between the scales `before` and those in the model."""
        named = [(block, site.name) for block, space in self.blocks.items() for site in space.sites]
        found = ((block, name, before[name], self.store.read(name)) for block, name in named)
        return tuple(self._move(block, name, old, new) for block, name, old, new in found if not same(old, new))

    def _move(self, block: str, name: str, old: QParams, new: QParams) -> SiteMove:
        site, weight = self.store.sites[name], self.store.float_weights.get(name)
        ratio = (new.scale / old.scale).log2().reshape(-1)
        return SiteMove(
            name=name,
            kind=site.kind,
            block=block,
            scales=ratio.numel(),
            moved=int((ratio != 0).sum()),
            log2=float(ratio.abs().max()),
            zero_point=int((new.zero_point - old.zero_point).abs().max()),
            low=float(ratio.min()),
            high=float(ratio.max()),
            codes=0 if weight is None else weight.numel(),
            turned=0 if weight is None else count_shifted(weight, new, site),
            corrected=new.correction is not None,
        )


def _searched(store: ScaleStore, config: RefineConfig) -> dict[str, tuple[ScaleSite, ...]]:
    for pattern in config.include:
        if not any(fnmatchcase(name, pattern) for name in store.sites):
            raise ValueError(
                f"RefineConfig.include: expected patterns of site names, {pattern!r} fits none of the "
                f"{len(store.sites)} sites of this model; print(cptv_ao.find_sites(model)) lists them"
            )
    return {
        lead: group
        for lead, group in store.movable().items()
        if group[0].kind in config.kinds and any(fnmatchcase(lead, pattern) for pattern in config.include)
    }


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(_same_state(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, (int, float, str)) and bool(a == b))
