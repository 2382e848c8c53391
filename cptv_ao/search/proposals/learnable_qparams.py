"""What the gradient descent moves, and the qparams that it stands for: of a tied group, and of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from cptv_ao.core.qparams import SHIFT_PARTS, Assignment, QParams, rescaled
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.weight_rounding import weight_steps
from cptv_ao.simulation.twin import Twin

#: A zero_point moves by this many codes where a log scale moves by 1.
_CODES_PER_LOG = 20.0
# Weights of more codes than this (to one side of 0) move at a lower rate, so that no step of the default learning rate
# moves an outer code by more than one. At 8 bits it would be four: noise that fits these images and no others.
_FULL_RATE_CODES = 33
# Weights of so many steps between their ends keep their codes where their scale moves: fewer gain by other codes, and
# of more, half a step does not make up for what an outer one moves by.
_HELD_CODES = range(14, 2 * _FULL_RATE_CODES + 1)
# How near a tie steps may be, for a shift is rounded to whole parts.
_INSIDE = 1 / SHIFT_PARTS
#: No biases are learnt.
NO_UNITS: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class LearnableBias:
    """What is added to the bias of a layer: of each channel (C,) some of its units (C,)."""

    leaf: Tensor
    unit: Tensor

    @staticmethod
    def of(now: QParams, unit: Tensor) -> LearnableBias:
        """Where these qparams are."""
        return LearnableBias(_in_units(now, unit).requires_grad_(), unit)

    @property
    def value(self) -> Tensor:
        """What is added (C,)."""
        return self.leaf * self.unit

    def go_to(self, qparams: QParams, share: float = 1.0) -> None:
        """Move the leaf a share of the way to what these qparams add."""
        self.leaf.lerp_(_in_units(qparams, self.unit), share)


@dataclass(frozen=True)
class LearnableQParams:
    """Of one tied group: the logarithm of its scales, its zero_point in units of `_CODES_PER_LOG`, and of a weight
    what is added to each of its steps before rounding, and to the bias of its layer.

    Weights of some codes (four bits) keep theirs where a scale moves, for a step of it would turn many at once that
    were chosen together: they are found at the scale that they had (`held`), and the shift makes up for the other one.
    (A scale for the codes and one for the values: LSQ with both, as in NVIDIA's ModelOpt; here the first one stands.)
    """

    sites: tuple[ScaleSite, ...]
    log_scale: Tensor
    offset: Tensor | None
    shift: Tensor | None
    weight: Tensor | None = None
    held: Tensor | None = None
    bias: LearnableBias | None = None

    @staticmethod
    def of(
        twin: Twin, group: tuple[ScaleSite, ...], shifts: bool, units: Mapping[str, Tensor] = NO_UNITS
    ) -> LearnableQParams:
        """Where the scales of the twin are; with `shifts` also those of its weights that may have some, and with the
        units (C,) of some weights what is added to their biases."""
        lead = group[0]
        now = twin.sites.get(lead.name)
        log_scale = now.scale.float().log().to(twin.device).requires_grad_()
        offset = (now.zero_point.float() / _CODES_PER_LOG).to(twin.device).requires_grad_() if lead.affine else None
        weight = twin.sites.shiftable_weight(lead.name) if shifts else None
        unit = units.get(lead.name) if len(group) == 1 else None
        bias = None if unit is None else LearnableBias.of(now, unit)
        if weight is None:
            return LearnableQParams(group, log_scale, offset, None, bias=bias)
        held = now.scale.float().to(twin.device) if lead.qmax - lead.qmin in _HELD_CODES else None
        shift = _steps(weight, now).requires_grad_()
        return LearnableQParams(group, log_scale, offset, shift, weight, held, bias)

    @property
    def weight_rate(self) -> float:
        """Multiple of the learning rate at which the scales move, if they are those of a weight."""
        return min(1.0, 2 * _FULL_RATE_CODES / (self.sites[0].qmax - self.sites[0].qmin))

    def values(self) -> dict[str, Tensor]:
        """Buffers of the twin's sites."""
        found = {"scale": self.log_scale.exp()}
        if self.offset is not None:
            found["zero_point"] = self.offset * _CODES_PER_LOG
        if self.shift is not None:
            found["shift"] = self.shift
        if self.held is not None:
            found["codes_scale"] = self.held
        if self.bias is not None:
            found["correction"] = self.bias.value
        return found

    @property
    def confined(self) -> list[tuple[Tensor, tuple[float, float]]]:
        """The ends that a step may not move a leaf beyond: zero_points are codes, shifts half a step at most."""
        site, found = self.sites[0], list[tuple[Tensor, tuple[float, float]]]()
        if self.offset is not None:
            found.append((self.offset, (site.qmin / _CODES_PER_LOG, site.qmax / _CODES_PER_LOG)))
        return found if self.shift is None else [*found, (self.shift, (-0.5, 0.5))]

    def go_to(self, qparams: QParams, share: float = 1.0) -> None:
        """Move the leaves a share of the way to where these qparams are; below 0: away from there."""
        self.log_scale.lerp_(qparams.scale.log().to(self.log_scale), share)
        if self.offset is not None:
            self.offset.lerp_((qparams.zero_point / _CODES_PER_LOG).to(self.offset), share)
        if self.shift is not None:
            self.shift.lerp_(_steps(self.shift, qparams), share)
        if self.held is not None and share == 1:
            self.held.copy_(qparams.scale)
        if self.bias is not None:
            self.bias.go_to(qparams, share)

    def hold(self, scale: Tensor) -> None:
        """Find codes at another scale from now on; they stay what they are."""
        if self.held is not None and self.shift is not None:
            to = scale.to(self.held)
            with torch.no_grad():
                self.shift.copy_(self._shift_at(to))
            self.held.copy_(to)

    def _shift_at(self, scale: Tensor) -> Tensor:
        """The shift that makes the same codes at another scale as `held` does: it leaves each as far from the next one
        as it is, if half a step is enough for that."""
        assert self.shift is not None and self.held is not None and self.weight is not None
        axis = self.sites[0].axis
        at_held = weight_steps(self.weight, self.held, axis) + self.shift.detach()
        at_scale = weight_steps(self.weight, scale, axis)
        inside = (at_held - at_held.round()).clamp_(_INSIDE - 0.5, 0.5 - _INSIDE)
        return inside.add_(at_held.round_()).sub_(at_scale).clamp_(-0.5, 0.5)

    def qparams(self, site: ScaleSite, now: QParams) -> QParams:
        """Of a site of the group, which has the qparams `now`."""
        scale, zero_point = self.log_scale.detach().exp().double().cpu(), now.zero_point
        if self.offset is not None:
            codes = (self.offset.detach() * _CODES_PER_LOG).round()
            zero_point = codes.clamp(site.qmin, site.qmax).long().cpu()
        shift = self.shift if self.held is None else self._shift_at(scale.to(self.held))
        correction = now.correction if self.bias is None else self.bias.value.detach().cpu()
        return QParams(scale, zero_point, None if shift is None else _shift_codes(shift), correction)


class LearnableScales:
    """All that a descent moves.

    Args:
        twin: with the scales to start from.
        groups: the tied groups that are searched, by the name of their leader; those that the twin has are learnt.
        shifts: whether it is also learnt how weights are rounded.
        units: of weights (C,), of what is added to their biases, where that is learnt.

    Attributes:
        groups: the tied groups that are learnt.
    """

    def __init__(
        self,
        twin: Twin,
        groups: Mapping[str, tuple[ScaleSite, ...]],
        shifts: bool,
        units: Mapping[str, Tensor] = NO_UNITS,
    ) -> None:
        self._twin, known = twin, set(twin.names)
        simulated = [group for group in groups.values() if all(site.name in known for site in group)]
        self.groups = [LearnableQParams.of(twin, group, shifts, units) for group in simulated]

    def hold(self, scales: Callable[[str], QParams]) -> None:
        """Find codes at other scales from now on, by site name; they stay what they are."""
        for group in self.groups:
            group.hold(scales(group.sites[0].name).scale)

    def take_biases(self, scales: Callable[[str], QParams]) -> None:
        """Go on from what other qparams add to biases, by site name."""
        with torch.no_grad():
            for group in self.groups:
                if group.bias is not None:
                    group.bias.go_to(scales(group.sites[0].name))

    @property
    def units(self) -> dict[str, Tensor]:
        """Of what is added to biases, by the leader of the group: they hold for the whole descent."""
        return {group.sites[0].name: group.bias.unit for group in self.groups if group.bias is not None}

    def assignment(self) -> Assignment:
        """The scales as they are now, by site name."""
        return {s.name: g.qparams(s, self._twin.sites.get(s.name)) for g in self.groups for s in g.sites}

    def go_to(self, scales: Callable[[str], QParams], share: float = 1.0) -> None:
        """Go a share of the way to other scales, by site name; below 0: away from them."""
        with torch.no_grad():
            for group in self.groups:
                group.go_to(scales(group.sites[0].name), share)

    def rescale(self, factors: Mapping[str, float]) -> None:
        """Multiply the scales of groups, by the name of their leader; the lower ends of their ranges stay."""
        with torch.no_grad():
            for group in self.groups:
                if (factor := factors.get(group.sites[0].tied)) is not None:
                    site = group.sites[0]
                    group.go_to(rescaled(group.qparams(site, self._twin.sites.get(site.name)), factor, site))


def _steps(weight: Tensor, qparams: QParams) -> Tensor:
    """The shift of qparams in steps, of a weight's shape and on its device."""
    shift = qparams.shift_steps
    return torch.zeros_like(weight) if shift is None else shift.to(weight.device)


def _in_units(qparams: QParams, unit: Tensor) -> Tensor:
    """What qparams add to a bias (C,)."""
    return torch.zeros_like(unit) if qparams.correction is None else qparams.correction.to(unit) / unit


def _shift_codes(shift: Tensor) -> Tensor:
    """A shift in steps as that of qparams."""
    return (shift.detach() * SHIFT_PARTS).round_().to("cpu", torch.int8)
