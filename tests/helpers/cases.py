"""A quantized network with what a test needs beside it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import workloads
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx
from torch.fx import GraphModule

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights, weight_ranges
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.twin import unquantized
from helpers import nets


@dataclass
class Case:
    """A float model, what prepare_fx and convert_fx made of it, and calibration batches."""

    float_model: nn.Module
    prepared: GraphModule
    converted: GraphModule
    batches: list[Tensor]

    def copy(self) -> Case:
        """A copy, but for the prepared model: convert_fx leaves it in a state that no deepcopy survives."""
        float_model, converted = copy.deepcopy((self.float_model, self.converted))
        return Case(float_model, self.prepared, converted, [batch.clone() for batch in self.batches])


class Copies:
    """A copy of each case, by its name; it is made when it is first asked for."""

    def __init__(self, make: Mapping[str, Callable[[], Case]]) -> None:
        self._make, self._made = make, dict[str, Case]()

    def __getitem__(self, name: str) -> Case:
        if name not in self._made:
            self._made[name] = self._make[name]()
        return self._made[name].copy()


def vit_case(vit: nn.Module, digits: workloads.Images, weight_bits: int) -> Case:
    batches = list(digits.calibration(128, seed=0).split(32))
    prepared, converted = workloads.quantize(copy.deepcopy(vit), batches[:2], weight_bits=weight_bits)
    return Case(vit, prepared, converted, batches)


def reference_case() -> Case:
    """What convert_to_reference_fx makes of the small convolutional network, at W3A8."""
    model = nets.seeded(nets.ConvNet)
    batches = list(nets.images(16, 3, 16, 16).split(4))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(copy.deepcopy(model), nets.mapping(3), (batches[0],))
        for batch in batches:
            prepared(batch)
        return Case(model, prepared, convert_to_reference_fx(prepared), batches)


def backend_of(case: Case) -> Backend:
    """Its scales, with the float weights and their nominal ranges."""
    backend = Backend(case.converted, weight_ranges(case.float_model))
    attach_float_weights(backend, case.float_model)
    return backend


def in_float(backend: Backend, image: Tensor) -> Tensor:
    """What the model computes in float."""
    with torch.no_grad():
        found = unquantized(backend)(image)
    return found.dequantize() if isinstance(found, QTensor) else found


def error(model: GraphModule, case: Case) -> float:
    """Mean square of what a model's outputs are apart from those of the float one."""
    return float((torch.cat([model(b) - case.float_model(b) for b in case.batches])).square().mean())
