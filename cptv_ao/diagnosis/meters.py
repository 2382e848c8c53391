"""How far quantized tensors are from float ones: signal to noise, clipped codes, the code range that is used."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cptv_ao.backends.backend import Backend
from cptv_ao.core.channel_scaling import outlier_ratio
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.weight_rounding import HALF_STEP, along_axis, weight_steps

# Codes above this one overflow where kernels add pairs of products in 16 bits: 2 * 130 * 127 > 2^15.
_NARROW = 129


@dataclass
class Fidelity:
    """SQNR and cosine of a tensor against the one it stands for, over all batches."""

    signal: float = 0.0
    noise: float = 0.0
    cosines: float = 0.0
    rows: int = 0

    def add(self, got: Tensor, wanted: Tensor) -> None:
        """Tensors of one shape, the images first."""
        got, wanted = (t.double().reshape(max(1, t.shape[0] if t.dim() else 1), -1) for t in (got, wanted))
        self.signal += float(wanted.square().sum())
        self.noise += float((got - wanted).square().sum())
        self.cosines += float(functional.cosine_similarity(got, wanted, dim=1).sum())
        self.rows += len(got)

    @property
    def sqnr(self) -> float | None:
        """10 log10(signal / noise) in dB; inf without noise, None where nothing was added."""
        return decibels(self.signal, self.noise) if self.rows else None

    @property
    def cosine(self) -> float | None:
        """Mean over the images."""
        return self.cosines / self.rows if self.rows else None


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); inf without noise, -inf without signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


@dataclass
class ActivationMeter:
    """A float tensor put on the scale of an activation site, over all batches; or only the codes of a kernel."""

    site: ScaleSite
    qparams: QParams
    signal: float = 0.0
    noise: float = 0.0
    count: int = 0
    coded: int = 0
    beyond: int = 0
    high: int = 0
    ends: tuple[float, float] = (math.inf, -math.inf)
    channels: Tensor | None = field(default=None, repr=False)

    def add(self, value: Tensor) -> None:
        """The float tensor of a batch."""
        scale, zero_point = float(self.qparams.scale), int(self.qparams.zero_point)
        value = value.double()
        codes = torch.round(value / scale) + zero_point
        self.beyond += int(((codes < self.site.qmin) | (codes > self.site.qmax)).sum())
        codes.clamp_(self.site.qmin, self.site.qmax)
        self.add_codes(codes)
        self.signal += float(value.square().sum())
        self.noise += float(((codes - zero_point) * scale - value).square().sum())
        self.count += value.numel()
        dim = _channel_dim(self.site, value)
        if dim is not None:
            largest = value.abs().amax([d for d in range(value.dim()) if d != dim]).cpu()
            known = self.channels is not None and self.channels.shape == largest.shape
            self.channels = torch.maximum(self.channels, largest) if known and self.channels is not None else largest

    def add_codes(self, codes: Tensor) -> None:
        """The codes of a batch, where no float tensor is known."""
        self.high += int((codes > _NARROW).sum())
        self.ends = (min(self.ends[0], float(codes.min())), max(self.ends[1], float(codes.max())))
        self.coded += codes.numel()

    @property
    def high_share(self) -> float:
        """Share of the codes with which a sum of two products with 8-bit weights may not fit into 16 bits."""
        return self.high / self.coded if self.coded else 0.0

    def measured(self) -> dict[str, Any]:
        """The fields of a `SiteDiagnosis` that are known."""
        if not self.coded:
            return {}
        found: dict[str, Any] = {"used": (self.ends[1] - self.ends[0] + 1) / (self.site.qmax - self.site.qmin + 1)}
        if self.count:
            found |= {"sqnr": decibels(self.signal, self.noise), "clipped": self.beyond / self.count}
        if self.channels is not None and (known := outlier_ratio(self.channels)) is not None:
            found |= {"outlier": known[0], "outlier_channels": known[1]}
        return found


def measured_weight(backend: Backend, site: ScaleSite) -> dict[str, Any]:
    """The fields of a `SiteDiagnosis` of a weight: its codes against its float weight, where that is known."""
    weight = backend.weight(site.name)
    if weight.dtype not in (torch.qint8, torch.quint8):
        return {}
    codes = weight.int_repr().double()
    rows = codes.transpose(0, site.axis).flatten(1) if site.axis is not None else codes.reshape(1, -1)
    spread = (rows.amax(1) - rows.amin(1) + 1) / (site.qmax - site.qmin + 1)
    found: dict[str, Any] = {"used": float(spread.mean())}
    float_weight = backend.float_weights.get(site.name)
    if float_weight is None:
        return found
    qparams = backend.read(site.name)
    scale, zero_point = (along_axis(part, site.axis, codes.dim()) for part in (qparams.scale, qparams.zero_point))
    wanted = float_weight.double()
    off = weight_steps(wanted, qparams.scale, site.axis) + zero_point - codes
    lowest, highest = codes.min(), codes.max()
    clipped = ((codes == highest) & (off > HALF_STEP)) | ((codes == lowest) & (off < -HALF_STEP))
    noise = float(((codes - zero_point) * scale - wanted).square().sum())
    found["sqnr"] = decibels(float(wanted.square().sum()), noise)
    return {**found, "clipped": float(clipped.double().mean())}


def _channel_dim(site: ScaleSite, value: Tensor) -> int | None:
    """The dimension of the channels, where it is certain enough to speak of channels."""
    if value.dim() < 2:
        return None
    if site.channels is not None:
        return site.channels % value.dim()
    return value.dim() - 1 if value.dim() <= 3 else None
