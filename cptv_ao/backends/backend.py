"""Reading and writing the scales of a quantized model: what `convert_fx` or `convert_pt2e` returned.

The slots of the scales of a lowered FX model (all seen on torch 2.13 to 2.15):

    buffers of the root      quantize_per_tensor, quantized.add / mul / layer_norm / linear ...
    python floats            nnq.Linear, nnq.Conv*, and their fused forms
    buffers of the module    nnq.LayerNorm, nnq.Hardswish, nnq.BatchNorm*
    packed weights           inside a ScriptObject, of a module or of the root; re-packed when the scale moves

and of a PT2E graph: arguments of its quantize and dequantize nodes, and buffers. Nothing above this room knows which
of the two it works on.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from cptv_ao.backends.compiling import compiled_once
from cptv_ao.backends.forms import form_of
from cptv_ao.backends.rewrites import Rewrites, RewrittenState
from cptv_ao.backends.snapshots import Snapshots
from cptv_ao.backends.weight_store import WeightStore
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite, SiteTable


class SiteState(NamedTuple):
    """All that a site is at one time; as tuples, which can be compared part by part.

    Attributes:
        stored: its scale, as its slot gave it; of a weight all that is held for it (a `WeightState`).
    """

    stored: Any
    rewritten: RewrittenState


class Backend(Snapshots):
    """The sites of one quantized model, and the only place that writes into it.

    Args:
        model: what `convert_fx` or `convert_pt2e` returned.
        weight_ranges: `(qmin, qmax)` of weight codes by site name, where it is known; inferred from the codes else.

    Attributes:
        form: what form of graph it is, and what that can do.
        weights: what is beside the scales of weights: codes, float weights, biases.
        rewrites: what an equal form changes beside scales.
        tensors: those that writing scales writes into.
        sums: pairs of sites, of the output and of an input of an add, whose scales the engine wants near each other.

    Raises:
        UnsupportedModelError: the model is neither a lowered FX model nor a PT2E graph, or has no quantized op.
    """

    def __init__(self, model: GraphModule, weight_ranges: Mapping[str, tuple[int, int]] | None = None) -> None:
        self.model = model
        self.form = form_of(model)
        found = self.form.scan(model, weight_ranges or {})
        self._activations = found.activations
        self.tensors = found.tensors
        qnnpack = torch.backends.quantized.engine == "qnnpack"
        self.sums = found.sums if qnnpack else ()
        self.weights = WeightStore(model, found.weights, found.sites, found.remembered if qnnpack else ())
        self.rewrites = Rewrites(model, found.sites)

    @property
    def sites(self) -> SiteTable:
        """As they are now: see `Rewrites`."""
        return self.rewrites.sites

    def read(self, name: str) -> QParams:
        """Scale and zero_point as they are in the model now (float64, int64; copies), how a weight is rounded, and what
        was added to the bias of its layer."""
        return self.weights.read(name) if name in self.weights else self._activations[name].read()

    def write(self, name: str, qparams: QParams) -> None:
        """Write a scale; a weight is re-rounded from its float weight, as `shift` says, and clamped to qmin..qmax, and
        the bias of its layer is what it was given plus the `correction`.

        Raises:
            InvalidScaleError: see `QParams.checked`; the model is untouched.
            KeyError: a weight site without a float weight.
        """
        checked = qparams.checked(self.sites[name])
        if name in self.weights:
            self.weights.write(name, checked)
        else:
            self._activations[name].write(checked)
            self.weights.renew(name)

    def write_exactly(self, name: str, qparams: QParams, codes: Tensor | None, bias: Tensor | None = None) -> None:
        """Write qparams as they are, and the codes of a weight, which are not rounded again; a bias if given.

        What is there already is left alone, and so is a weight without codes (one that is fixed). Where the graph
        rounds a float weight itself, values that are rounded to other codes are replaced by those of their codes.

        Raises:
            UnsupportedModelError: something else computes with that float weight, too.
        """
        now = self.read(name)
        same = torch.equal(now.scale, qparams.scale) and torch.equal(now.zero_point, qparams.zero_point)
        if name in self.weights:
            if codes is not None and not (bias is None and same and torch.equal(self.weight(name).int_repr(), codes)):
                self.weights.write_codes(name, qparams, codes, bias)
                held = torch.equal(self.weight(name).int_repr(), codes)
                if not held and not self.weights.hold(name, codes):
                    raise UnsupportedModelError(
                        f"{name}: expected a weight that takes codes, got a float one that the graph rounds, and that "
                        "something else reads or ops move before; convert with fold_quantize=True"
                    )
        elif not same:
            self._activations[name].write(qparams)
            self.weights.renew(name)

    def state(self, name: str) -> SiteState:
        """What is stored at the site now, to be handed back to `restore`: bit for bit, without re-packing."""
        stored = self.weights.state(name) if name in self.weights else self._activations[name].state()
        return SiteState(stored, self.rewrites.state(name))

    def restore(self, name: str, state: SiteState) -> None:
        """Put back what `state` returned."""
        self.rewrites.restore(name, state.rewritten)
        if name in self.weights:
            self.weights.restore(name, state.stored)
        else:
            self._activations[name].restore(state.stored)
        self.weights.renew(name)

    def writing(self) -> AbstractContextManager[None]:
        """Around many writes, with no run of the model among them: a graph that holds scales is compiled once."""
        return compiled_once(self.model)

    def weight(self, name: str) -> Tensor:
        """The quantized weight tensor of a weight site."""
        return self.weights.tensor(name)

    @property
    def float_weights(self) -> Mapping[str, Tensor]:
        """Float weights given so far, by site name."""
        return self.weights.floats

    def correctable(self, name: str) -> bool:
        """Whether a bias is written with a weight, and may be corrected."""
        return name in self.weights and self.weights.slot(name).packs_bias

    def movable(self) -> dict[str, tuple[ScaleSite, ...]]:
        """Tied groups that can be searched: not fixed, and weights only where their float weights are known."""
        return {
            lead: group
            for lead, group in self.sites.groups().items()
            if all(site.kind == "activation" or site.name in self.float_weights for site in group)
        }
