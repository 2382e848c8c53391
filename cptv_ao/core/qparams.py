"""Scale and zero_point: what makes the codes of a value, and what makes them from a range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cptv_ao.core.errors import InvalidScaleError
from cptv_ao.core.sites import ScaleSite

#: The highest code of 0..255 that observers with reduce_range calibrate for: 7 bits. Times int8 weights, such codes
#: cannot saturate the int16 pair sums of kernels without VNNI.
REDUCED_QMAX = 127


#: A shift is counted in these parts of a step: -127..127 is half a step down to half a step up.
SHIFT_PARTS = 254


#: torch's schemes of quantized tensors whose channels have scales of their own.
PER_CHANNEL = {torch.per_channel_affine, torch.per_channel_symmetric, torch.per_channel_affine_float_qparams}


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
        return None if self.shift is None else shift_in_steps(self.shift)

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


def shift_in_steps(shift: Tensor) -> Tensor:
    """A shift as qparams have it (int8) in steps, -0.5 to 0.5 (float32)."""
    return shift.to(torch.float32) / SHIFT_PARTS


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


def rescaled(qparams: QParams, factor: float, site: ScaleSite) -> QParams:
    """A scale times a factor, with the zero_point that keeps the lower end of the range, (qmin - z) * s."""
    zero_point = site.qmin - (site.qmin - qparams.zero_point) / factor
    return QParams(qparams.scale * factor, zero_point.round().clamp(site.qmin, site.qmax).long())


def qparams_for_range(low: float, high: float, site: ScaleSite, codes: int | None = None) -> QParams:
    """Qparams that hold low..high, 0 among them, in so many steps; without a number in all that the site has."""
    codes = site.qmax - site.qmin if codes is None else codes
    scale = torch.tensor((high - low) / codes, dtype=torch.float64)
    return QParams(scale, torch.tensor(round(site.qmin - low / float(scale))))


Assignment = dict[str, QParams]
"""Scales and zero_points by site name."""
