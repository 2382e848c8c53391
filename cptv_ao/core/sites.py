"""Where the scales of a quantized model live, as frozen descriptions.

A `ScaleSite` says what a scale is and what it may become; it holds no tensor. Reading and writing
go through a backend (`cptv_ao.backends`), which also lists the sites of its form of graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from cptv_ao.core.formatting import table

SiteKind = Literal["weight", "activation"]

# Weights of more codes lose so little by the nearest ones that nothing is to be had.
_CODES = 127


@dataclass(frozen=True)
class ScaleSite:
    """One scale, or one vector of per-channel scales, of a quantized model.

    Attributes:
        name: unique and readable: module path plus `weight` or `output`, or the scope plus the name of the
            buffer (`blocks.0.attn.scale_2`), or plus `constant`.
        kind: `weight` (the model holds its codes, which are re-rounded when the scale moves: of a layer, or a constant
            of any other op, as a position embedding that is added) or `activation`.
        op: what the scale belongs to: `quantize_per_tensor`, `Linear`, `ConvReLU2d`, `quantized.add` ...
        scope: path of the module that the op was traced from; `""` at the top level.
        shape: `()` per tensor, `(C,)` per channel.
        axis: channel axis of the weight, None per tensor.
        qmin, qmax: code range that is written: the nominal range of a weight (3-bit: -4..3), the range of
            the dtype of an activation (a lowered op clamps to nothing narrower).
        affine: whether the zero_point may move too.
        nodes: names of the graph nodes whose output (activation) or weight the scale describes, in graph order.
        tied: name of the site that leads the group this one moves with; its own name when it moves alone.
        fixed: why it never moves (`"fixed qparams of softmax"`), `""` when it may.
        channels: of an activation: the dimension of its channels, where the op makes that certain.
    """

    name: str
    kind: SiteKind
    op: str
    scope: str
    shape: tuple[int, ...]
    axis: int | None
    qmin: int
    qmax: int
    affine: bool
    nodes: tuple[str, ...]
    tied: str
    fixed: str = ""
    channels: int | None = None

    @property
    def numel(self) -> int:
        """Number of scales: 1 per tensor, C per channel."""
        return self.shape[0] if self.shape else 1

    @property
    def is_coarse(self) -> bool:
        """Whether it is of a weight that has so few codes that it matters which of two it is rounded to."""
        return self.kind == "weight" and self.qmax - self.qmin <= _CODES


class SiteTable(Mapping[str, ScaleSite]):
    """The sites of one model by name, in graph order; `str()` is a readable table."""

    def __init__(
        self, sites: tuple[ScaleSite, ...], unknown: tuple[str, ...] = (), weight_only: tuple[str, ...] = ()
    ) -> None:
        self._sites = {site.name: site for site in sites}
        if len(self._sites) != len(sites):
            raise ValueError("site names are not unique")
        #: quantized ops that were not understood, as `node (op)`; they are left alone.
        self.unknown = unknown
        #: modules that quantize nothing but a weight they look up or use at run time (embeddings, dynamic LSTMs), as
        #: `path (kind)`; they are left alone.
        self.weight_only = weight_only

    def __getitem__(self, name: str) -> ScaleSite:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def groups(self) -> dict[str, tuple[ScaleSite, ...]]:
        """Sites that may move, by the name of the leader of their tied group, which is its first.

        A group with a fixed member does not move at all.
        """
        members: dict[str, list[ScaleSite]] = {}
        for site in sorted(self._sites.values(), key=lambda site: site.tied != site.name):
            members.setdefault(site.tied, []).append(site)
        return {lead: tuple(group) for lead, group in members.items() if not any(s.fixed for s in group)}

    def counts(self) -> dict[str, int]:
        """Number of sites by op and kind, e.g. `{"Linear weight": 49, "quantized.add activation": 25}`."""
        counts: dict[str, int] = {}
        for site in self._sites.values():
            key = f"{site.op} {site.kind}"
            counts[key] = counts.get(key, 0) + 1
        return counts

    def __str__(self) -> str:
        rows = [("site", "kind", "op", "shape", "codes", "zero_point", "moves")]
        for site in self._sites.values():
            moves = site.fixed or ("alone" if site.tied == site.name else f"with {site.tied}")
            shape = "per tensor" if not site.shape else f"{site.shape[0]} channels"
            zero_point = "moves" if site.affine else "fixed"
            rows.append((site.name, site.kind, site.op, shape, f"{site.qmin}..{site.qmax}", zero_point, moves))
        lines = table(rows, left=len(rows[0]))
        scales = sum(site.numel for site in self._sites.values())
        lines.append(f"{len(self)} sites, {scales} scales, {len(self.groups())} groups that can move")
        if self.weight_only:
            lines.append("weights only, left alone: " + ", ".join(self.weight_only))
        if self.unknown:
            lines.append("not understood, left alone: " + ", ".join(self.unknown))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<SiteTable of {len(self)} sites; print() it for the table>"


def output_name(path: str) -> str:
    """Name of the activation site of the output of a module."""
    return f"{path}.output"


def weight_name(path: str) -> str:
    """Name of the weight site of a module."""
    return f"{path}.weight"
