"""The sites of the twin as modules: what puts values on a scale, and what rounds weights to codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.qparams import QParams, shift_in_steps
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.weight_rounding import along_axis
from cptv_ao.fx.inplace import OutOfPlace
from cptv_ao.simulation.autograd_ops import Quantize, RoundWeight
from cptv_ao.simulation.limits import Limits, Rounding
from cptv_ao.simulation.qtensor import QTensor, straight_through_round


class SiteModule(OutOfPlace):
    """Scale and zero_point of one site as buffers, so that `functional_call` can replace them."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, site: ScaleSite, qparams: QParams) -> None:
        super().__init__()
        self.site = site
        self.rounding: Rounding = "round"
        self.register_buffer("scale", qparams.scale.to(torch.float32))
        self.register_buffer("zero_point", qparams.zero_point.to(torch.float32))

    def follow(self, other: SiteModule) -> None:
        """Hold what another one of the same site does."""
        self.site, self.rounding = other.site, other.rounding
        for name, value in other._buffers.items():
            setattr(self, name, value)

    def state(self) -> tuple[Tensor | None, ...]:
        """What it holds, for `restore`: copies, but of what nobody writes into."""
        return self.scale.clone(), self.zero_point.clone()

    def restore(self, state: tuple[Any, ...]) -> None:
        """Put back what `state` returned."""
        self.scale.copy_(state[0])
        self.zero_point.copy_(state[1])

    def limit(self, qmax: int) -> None:
        """Clip codes at `qmax`."""
        self.site = replace(self.site, qmax=qmax)


class Quantizer(SiteModule):
    """An activation site: puts floats on its scale; `passes`: they are on it already."""

    passes = False

    def forward(self, value: Tensor | QTensor) -> QTensor:
        if self.passes:
            assert isinstance(value, QTensor)
            return value
        like, limits = self.like()
        return like.with_codes(Quantize.apply(value, like.scale, like.zero_point, limits))

    def like(self, relu: bool = False) -> tuple[QTensor, Limits]:
        """A tensor on this scale, without codes yet, and what rounds them."""
        zero_point = self.zero_point
        if self.rounding == "round" and zero_point.requires_grad:  # an optimizer moves it in fractions
            zero_point = straight_through_round(zero_point)
        like = QTensor(self.scale, self.scale, zero_point, self.site.qmin, self.site.qmax, self.rounding)
        return like, like.limits(relu)


class WeightQuantizer(SiteModule):
    """A weight site: the codes as they are in the model, or re-rounded from a float weight at the present scale."""

    codes: Tensor
    weight: Tensor | None
    shift: Tensor | None
    codes_scale: Tensor | None
    correction: Tensor | None

    def __init__(
        self, site: ScaleSite, qparams: QParams, codes: Tensor, float_weight: Tensor | None, shiftable: bool
    ) -> None:
        super().__init__(site, qparams)
        self._symmetric = not site.affine and not bool(self.zero_point.any())
        # As whole numbers of few bits, and the float weight where it is: a large network has many.
        centred = codes.to(torch.int8 if self._symmetric and codes.dtype == torch.int8 else torch.int16, copy=True)
        if not self._symmetric:
            centred -= along_axis(self.zero_point, site.axis, codes.dim()).to(torch.int16)
        self.register_buffer("codes", centred)
        self.register_buffer("weight", float_weight)
        #: as in `QParams`; or in steps (float32), where a descent moves it
        self.register_buffer("shift", None)
        #: the scale that codes are found at, where that is not `scale`; see `LearnableQParams`
        self.register_buffer("codes_scale", None)
        #: of the bias; see `QParams`
        self.register_buffer("correction", None)
        self.set_beside(qparams)
        #: whether weights may be rounded to other codes than the nearest
        self.shiftable = shiftable and float_weight is not None
        #: take the codes from `codes` (True) or from the float weight at the present scale (False)
        self.keep_codes = True

    def follow(self, other: SiteModule) -> None:
        super().follow(other)
        assert isinstance(other, WeightQuantizer)
        self.keep_codes = other.keep_codes

    def set_beside(self, qparams: QParams) -> None:
        """Round as the shift of qparams says, and correct the bias so."""
        self.shift = None if qparams.shift is None else qparams.shift.to(self.scale.device)
        self._set_correction(qparams.correction)

    def state(self) -> tuple[Tensor | None, ...]:
        correction = None if self.correction is None else self.correction.clone()
        return (*super().state(), self.codes.clone(), self.shift, correction)

    def restore(self, state: tuple[Any, ...]) -> None:
        super().restore(state)
        self.codes.copy_(state[2])
        self.shift = state[3]
        self._set_correction(state[4])

    def add_correction(self, by: Tensor) -> None:
        """Correct the bias by so much more (C,)."""
        self._set_correction(by if self.correction is None else self.correction + by)

    def _set_correction(self, new: Tensor | None) -> None:
        """Into the tensor that is there, if there is one: a recorded run reads it where it is."""
        if new is not None and self.correction is not None:
            self.correction.copy_(new)
        else:
            self.correction = None if new is None else new.to(self.scale.device, copy=True)

    def corrected(self, bias: Tensor | None) -> Tensor | None:
        """The bias of the layer; as it was given where it computes in float."""
        if self.correction is None or self.rounding == "none":
            return bias
        return self.correction if bias is None else bias + self.correction

    def forward(self) -> Tensor:
        """Centred codes (C, ...), float32."""
        return self.codes.float() if self.keep_codes or self.weight is None else self._rounded(self.rounding)

    def dequantize(self) -> Tensor:
        """The weight as a float tensor (C, ...)."""
        value: Tensor = self() * along_axis(self.scale, self.site.axis, self.codes.dim())
        return value

    def refresh(self) -> None:
        """Re-round `codes` at the present scale, where the float weight is known."""
        if self.weight is not None:
            self.codes.copy_(self._rounded("round"))

    def _rounded(self, rounding: Rounding) -> Tensor:
        site = self.site
        if self._symmetric:
            limits = Limits(site.qmin, site.qmax, rounding == "round")
        else:
            zero_point = along_axis(self.zero_point.round(), site.axis, self.codes.dim())  # one may move in fractions
            limits = Limits.of(zero_point, site.qmin, site.qmax, rounding)
        if rounding == "none":
            limits = Limits.of(self.scale, site.qmin, site.qmax, "none")
        rounds = rounding == "round"
        shift = self.shift if rounds else None
        if shift is not None and not shift.is_floating_point():
            shift = shift_in_steps(shift)
        scale = self.codes_scale if rounds and self.codes_scale is not None else self.scale
        codes: Tensor = RoundWeight.apply(self.weight, scale, site.axis, limits, shift)
        return codes
