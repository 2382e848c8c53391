"""Where the scales of a quantized model live, as frozen descriptions.

A `ScaleSite` says what a scale is and what it may become; it holds no tensor. Reading and writing
go through a backend (`cptv_ao.backends`), which also lists the sites of its form of graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cptv_ao.core.errors import InvalidScaleError

SiteKind = Literal["weight", "activation"]


@dataclass(frozen=True)
class ScaleSite:
    """One scale, or one vector of per-channel scales, of a quantized model.

    Attributes:
        name: unique and readable: module path plus `weight` or `output`, or the scope plus the name of the
            buffer (`blocks.0.attn.scale_2`).
        kind: `weight` (codes are re-rounded when the scale moves) or `activation`.
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


#: The highest code of 0..255 that observers with reduce_range calibrate for: 7 bits. Times int8 weights, such codes
#: cannot saturate the int16 pair sums of kernels without VNNI.
REDUCED_QMAX = 127

#: A shift is counted in these parts of a step: -127..127 is half a step down to half a step up.
SHIFT_PARTS = 254


@dataclass(frozen=True)
class QParams:
    """What makes the codes of a value: round(value / scale + shift / SHIFT_PARTS) + zero_point, clamped.

    Attributes:
        scale, zero_point: float64 and int64 tensors of the site's shape, on the CPU.
        shift: of a weight only, int8 of the weight's own shape: rounds it up or down where that is better than to the
            nearest code (AdaRound, arXiv 2004.10568); None: all to the nearest.
        correction: of a weight only, float32 (C,): what is added to the bias of its layer, in the units of its output
            (bias correction, arXiv 1906.04721); None: nothing.
    """

    scale: Tensor
    zero_point: Tensor
    shift: Tensor | None = None
    correction: Tensor | None = None

    @property
    def shift_steps(self) -> Tensor | None:
        """The shift in steps, -0.5 to 0.5 (float32)."""
        return None if self.shift is None else self.shift.to(torch.float32) / SHIFT_PARTS

    def checked(self, site: ScaleSite) -> QParams:
        """Round the scale to float32, so that a state_dict keeps it, and refuse what no kernel can use.

        Raises:
            InvalidScaleError: scale not finite or not > 0, zero_point outside qmin..qmax, or wrong shape.
        """
        scale = self.scale.to(torch.float32).to(torch.float64)
        if tuple(scale.shape) != site.shape or tuple(self.zero_point.shape) != site.shape:
            raise InvalidScaleError(
                f"{site.name}: expected scale and zero_point of shape {site.shape}, "
                f"got {tuple(scale.shape)} and {tuple(self.zero_point.shape)}",
                site.name,
            )
        bad = ~(torch.isfinite(scale) & (scale > 0))
        if bool(bad.any()):
            channel = int(bad.reshape(-1).nonzero()[0])
            where = f" in channel {channel}" if site.shape else ""
            raise InvalidScaleError(
                f"{site.name}: {site.kind} scale must be finite and > 0, "
                f"got {float(scale.reshape(-1)[channel]):.4g}{where}",
                site.name,
            )
        zero_point = self.zero_point.to(torch.int64, copy=True)
        if site.kind == "activation" and not bool(((zero_point >= site.qmin) & (zero_point <= site.qmax)).all()):
            raise InvalidScaleError(
                f"{site.name}: zero_point must be in {site.qmin}..{site.qmax}, got {int(zero_point.reshape(-1)[0])}",
                site.name,
            )
        return QParams(scale, zero_point, self.shift, self.correction)


def same(a: QParams, b: QParams) -> bool:
    """Whether two qparams make the same codes of every value, and correct the same."""
    if not (torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)):
        return False
    return _equal(a.shift, b.shift) and _equal(a.correction, b.correction)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """None is all zero."""
    if a is None or b is None:
        return not any(bool(part.any()) for part in (a, b) if part is not None)
    return torch.equal(a, b)


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
        """Sites that may move, by the name of the leader of their tied group.

        A group with a fixed member does not move at all.
        """
        members: dict[str, list[ScaleSite]] = {}
        for site in self._sites.values():
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
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * len(lines[0]))
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
