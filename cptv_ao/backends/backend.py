"""Reading and writing the scales of a quantized model: what `convert_fx` or `convert_pt2e` returned.

The homes of the scales of a lowered FX model (all seen on torch 2.13 to 2.15):

    buffers of the root      quantize_per_tensor, quantized.add / mul / layer_norm / linear ...
    python floats            nnq.Linear, nnq.Conv*, and their fused forms
    buffers of the module    nnq.LayerNorm, nnq.Hardswish, nnq.BatchNorm*
    packed weights           inside a ScriptObject, of a module or of the root; re-packed when the scale moves

and of a PT2E graph: arguments of its quantize and dequantize nodes, and buffers. Nothing above this room knows which
of the two it works on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from cptv_ao.backends.compiling import compiled_once
from cptv_ao.backends.forms import form_of
from cptv_ao.backends.scale_slots import Home, PackedHome, WeightHome
from cptv_ao.backends.tensor_slots import Owned, Slot
from cptv_ao.core.errors import NonFiniteError
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite, SiteTable
from cptv_ao.core.weight_rounding import round_weight, shift_of
from cptv_ao.fx.paths import fetch


class Backend:
    """The sites of one quantized model, and the only place that writes into it.

    Args:
        model: what `convert_fx` or `convert_pt2e` returned.
        weight_ranges: `(qmin, qmax)` of weight codes by site name, where it is known; inferred from the codes else.

    Raises:
        UnsupportedModelError: the model is neither a lowered FX model nor a PT2E graph, or has no quantized op.
    """

    def __init__(self, model: GraphModule, weight_ranges: Mapping[str, tuple[int, int]] | None = None) -> None:
        self.model = model
        #: what form of graph it is, and what that can do
        self.form = form_of(model)
        found = self.form.scan(model, weight_ranges or {})
        self.sites: SiteTable = found.sites
        #: pairs of sites, of the output and of an input of an add, whose scales the engine wants near each other
        self.sums = found.sums if torch.backends.quantized.engine == "qnnpack" else ()
        self._homes: dict[str, Home] = found.homes
        self._remembered = found.remembered if torch.backends.quantized.engine == "qnnpack" else ()
        self._float_weights: dict[str, Tensor] = {}
        self._shifts: dict[str, Tensor | None] = {}
        # By weight whose layer has a corrected bias: the bias that it was given, and what was added.
        self._corrected: dict[str, tuple[Tensor | None, Tensor] | None] = {}
        #: sites of values that are the very ones of another site, whose scale is theirs
        self.passed: dict[str, str] = {}
        # Tensors beside the scales that were replaced, as they were given, by their path; by site.
        self._replaced: dict[str, dict[str, Tensor]] = {}
        for name, home in self._homes.items():
            held = getattr(home, "float_weight", None)
            if held is not None:
                self.set_float_weight(name, held)

    def read(self, name: str) -> QParams:
        """Scale and zero_point as they are in the model now (float64, int64; copies), how a weight is rounded, and what
        was added to the bias of its layer."""
        corrected = self._corrected.get(name)
        correction = None if corrected is None else corrected[1]
        return replace(self._homes[name].read(), shift=self._shifts.get(name), correction=correction)

    def write(self, name: str, qparams: QParams) -> None:
        """Write a scale; a weight is re-rounded from its float weight, as `shift` says, and clamped to qmin..qmax, and
        the bias of its layer is what it was given plus the `correction`.

        Raises:
            InvalidScaleError: see `QParams.checked`; the model is untouched.
            KeyError: a weight site without a float weight.
        """
        site = self.sites[name]
        checked = qparams.checked(site)
        home = self._homes[name]
        if isinstance(home, WeightHome):
            codes = round_weight(self._float_weights[name], checked, site)
            home.write_weight(codes, site, checked, self._correct(name, checked.correction))
            self._shifts[name] = checked.shift
        else:
            home.write(checked)
            self._renew(name)

    def _correct(self, name: str, correction: Tensor | None) -> Tensor | None:
        """The bias of a layer with this correction; None where it is the one that is there."""
        corrected = self._corrected.get(name)
        if correction is None and corrected is None:
            return None
        given = self.bias(name)
        self._corrected[name] = None if correction is None else (given, correction)
        added = torch.zeros_like(corrected[1]) if correction is None and corrected is not None else correction
        return added if given is None or added is None else given + added

    def write_exactly(self, name: str, qparams: QParams, codes: Tensor | None, bias: Tensor | None = None) -> None:
        """Write qparams as they are, and the codes of a weight (int8), which are not rounded again; a bias if given.

        What is there already is left alone, and so is a weight without codes (one that is fixed).
        """
        now = self.read(name)
        same = torch.equal(now.scale, qparams.scale) and torch.equal(now.zero_point, qparams.zero_point)
        site, home = self.sites[name], self._homes[name]
        if isinstance(home, WeightHome):
            if codes is not None and not (bias is None and same and torch.equal(home.weight().int_repr(), codes)):
                home.write_weight(codes, site, qparams, bias)
        elif not same:
            home.write(qparams)
            self._renew(name)

    def _renew(self, name: str) -> None:
        """Pack again what remembers another scale or zero_point of this activation, or was this weight before."""
        for weight in {weight for activation, weight in self._remembered if name in (activation, weight)}:
            home = self._homes[weight]
            if isinstance(home, PackedHome):
                home.renew()

    def state(self, name: str) -> Any:
        """What is stored at the site now, to be handed back to `restore`: bit for bit, without re-packing."""
        replaced = tuple((path, fetch(self.model, path)) for path in self._replaced.get(name, ()))
        beside = self._shifts.get(name), self._corrected.get(name), self._float_weights.get(name)
        return self._homes[name].state(), beside, replaced, self.sites[name].tied

    def restore(self, name: str, state: Any) -> None:
        """Put back what `state` returned."""
        held, (self._shifts[name], self._corrected[name], weight), replaced, tied = state
        if weight is not None:
            self._float_weights[name] = weight
        if tied != self.sites[name].tied:
            self._tie(name, tied)
            self.passed.pop(name, None)
        for path, value in (self._replaced.get(name, {}) | dict(replaced)).items():
            Slot.of(self.model, path).put(value)
        self._homes[name].restore(held)
        self._renew(name)

    def snapshot(self) -> dict[str, Any]:
        """`state` of every site."""
        return {name: self.state(name) for name in self.sites}

    def restore_all(self, snapshot: Mapping[str, Any]) -> None:
        """Put back a `snapshot`: all of it, whatever fails on the way, which is raised then."""
        with self.writing(), ExitStack() as steps:
            for name, state in list(snapshot.items())[::-1]:
                steps.callback(self.restore, name, state)

    def owned(self) -> Owned:
        """For tensors of one's own in the place of those that writing scales writes into."""
        return Owned(slot for home in self._homes.values() for slot in home.slots)

    def writing(self) -> AbstractContextManager[None]:
        """Around many writes, with no run of the model among them: a graph that holds scales is compiled once."""
        return compiled_once(self.model)

    def weight(self, name: str) -> Tensor:
        """The quantized weight tensor of a weight site."""
        return self._weight_home(name).weight()

    def set_float_weight(self, name: str, weight: Tensor) -> None:
        """Give the float weight from which the codes of a weight site are re-rounded.

        Where codes are not the nearest, since the model was refined before, they are what a re-rounding keeps.
        """
        quantized = self._weight_home(name).weight()
        # A functional conv1d is packed as a conv2d.
        given = weight.detach().to("cpu", torch.float32).reshape(quantized.shape).contiguous()
        self._float_weights[name] = given
        if self.shiftable(name):
            self._shifts[name] = shift_of(given, quantized.int_repr(), self._homes[name].read(), self.sites[name])

    def bias(self, name: str) -> Tensor | None:
        """What is added to the products with a weight, in float, less a correction; (C,)."""
        corrected = self._corrected.get(name)
        return self._weight_home(name).bias() if corrected is None else corrected[0]

    def correctable(self, name: str) -> bool:
        """Whether the bias of a weight's layer is packed with it: so in lowered models."""
        return isinstance(self._homes[name], PackedHome)

    def scale_channels(self, name: str, factor: Tensor, bias: Tensor) -> None:
        """Multiply what a layer gives, channel by channel, and give it another bias.

        Args:
            name: of its weight, whose scales are per channel of the output.
            factor: (C,); where it is negative, codes change their sign (-128 becomes 127), where it is 0, they are 0.
            bias: (C,), the whole new one.
        """
        home, site, shape = self._weight_home(name), self.sites[name], (-1, *[1] * (self.weight(name).dim() - 1))
        scale = self.read(name).scale * torch.where(factor == 0, 1.0, factor.abs().double())
        qparams = replace(self.read(name), scale=scale).checked(site)
        codes = home.weight().int_repr().short() * factor.sign().short().reshape(shape)
        home.write_weight(codes.clamp(-128, 127).to(torch.int8), site, qparams, bias)
        if name in self._float_weights:
            self.set_float_weight(name, self._float_weights[name] * factor.reshape(shape))

    def tie(self, lead: str, passed: str) -> None:
        """Let a site move with another one, whose values reach it unchanged; a state from before undoes it."""
        self._tie(passed, lead)
        self.passed[passed] = lead

    def fix(self, names: Collection[str], why: str) -> None:
        """Let sites never move."""
        self._change(names, fixed=why)

    def _tie(self, name: str, lead: str) -> None:
        self._change([name], tied=lead)

    def _change(self, names: Collection[str], **fields: Any) -> None:
        sites = [replace(site, **fields) if site.name in names else site for site in self.sites.values()]
        self.sites = SiteTable(tuple(sites), self.sites.unknown, self.sites.weight_only)

    def put(self, name: str, path: str, value: Tensor) -> None:
        """Replace a tensor that the op of a site computes with; the float model may hold the one that was there."""
        given = fetch(self.model, path)
        self._replaced.setdefault(name, {}).setdefault(path, given)
        Slot.of(self.model, path).put(value)

    def shiftable(self, name: str) -> bool:
        """Whether a weight may have other codes than the nearest: not where the graph rounds a float weight itself."""
        return getattr(self._homes[name], "float_weight", None) is None

    @property
    def float_weights(self) -> Mapping[str, Tensor]:
        """Float weights given so far, by site name."""
        return self._float_weights

    def movable(self) -> dict[str, tuple[ScaleSite, ...]]:
        """Tied groups that can be searched: not fixed, and weights only where their float weights are known."""
        return {
            lead: group
            for lead, group in self.sites.groups().items()
            if all(site.kind == "activation" or site.name in self._float_weights for site in group)
        }

    def check_finite(self) -> None:
        """Refuse a model whose scales are zero, NaN or infinite already.

        Raises:
            NonFiniteError: naming the site and the channel.
        """
        for name in self.sites:
            scale = self.read(name).scale.reshape(-1)
            bad = ~(torch.isfinite(scale) & (scale > 0))
            if bool(bad.any()):
                channel = int(bad.nonzero()[0])
                raise NonFiniteError(
                    f"{name}: expected a finite scale > 0 in the model that was given, got {float(scale[channel]):.4g}"
                    f"{f' in channel {channel}' if len(scale) > 1 else ''}; calibrate again before convert_fx"
                )

    def _weight_home(self, name: str) -> WeightHome:
        home = self._homes[name]
        if not isinstance(home, WeightHome):
            raise KeyError(f"{name} is an activation site, not a weight")
        return home
