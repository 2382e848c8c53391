"""What is told of the float network that a model is compared with: whether it is the one that was quantized, and
whether its outputs say anything."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from cptv_ao.backends.backend import Backend
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.errors import CptvWarning
from cptv_ao.core.formatting import percent
from cptv_ao.core.output_losses import all_alike
from cptv_ao.core.packed_outputs import PackedOutputs, parts_of
from cptv_ao.core.tensors import Select, compared
from cptv_ao.evaluation.calibration import Images
from cptv_ao.evaluation.teacher import FloatSources, fakes_quantization
from cptv_ao.fx.running import run
from cptv_ao.simulation.by_kernel import ByKernel
from cptv_ao.simulation.nothing_rounded import NothingRounded

# How far they may be apart with nothing rounded: a share of how far roundings move them (of squares), and what float
# arithmetic in another order does.
_TOLERATED, _ARITHMETIC = 0.05, 1e-6


def teacher_notes(
    backend: Backend,
    sources: FloatSources,
    teacher: nn.Module,
    images: Images,
    config: RefineConfig,
    own: NothingRounded,
    stacklevel: int,
) -> list[str]:
    """Sentences, of which it also warns.

    Weights are compared with the codes when they are found; all else in which a float model may differ from the one
    that was quantized (biases, norms, buffers) shows in the outputs of the model with nothing rounded. That cannot be
    told where a float weight is not known, or an op is not simulated.

    Args:
        backend: of the model, as it was given, with its float weights.
        sources: whether there is a float model.
        teacher: which computes in float (`as_float`), on any device.
        images: with its outputs.
        config: says what of the outputs is compared.
        own: the model in float, on the first of these images.
        stacklevel: of the warnings, from the function that calls this one.
    """
    told = []
    if not isinstance(config.output, PackedOutputs) and images.count > 1 and all_alike(images.targets):
        told.append(
            f"the float network's output is the same for all {images.count} images that are looked at: scales that fit "
            "it may fit no other image; give calibration images that differ"
        )
    if sources.teacher is not None and not fakes_quantization(teacher):
        told += _mismatch(backend, teacher, images, config.select, own)
    for one in told:
        warnings.warn(one, CptvWarning, stacklevel=stacklevel + 1)
    return told


def _mismatch(backend: Backend, teacher: nn.Module, images: Images, select: Select, own: NothingRounded) -> list[str]:
    if any(site.kind == "weight" and name not in backend.float_weights for name, site in backend.sites.items()):
        return []
    few, found = own.few, own.found
    wanted = images.targets[0][: few.images * few.per_image].double()
    if found is None or any(isinstance(module, ByKernel) for module in found[0].module.modules()):
        return []

    def outputs(model: nn.Module) -> Tensor:
        return compared(run(model, few, 0), select).double().cpu()

    with torch.no_grad():
        unrounded, rounded = compared(found[1], select).double().cpu(), outputs(backend.model)
        if not wanted.shape == unrounded.shape == rounded.shape:
            return []
        gap, rounding = _worst(select, unrounded, rounded, wanted)
        if not gap > _TOLERATED * rounding or not gap > _ARITHMETIC:
            return []
        if not torch.equal(outputs(teacher), outputs(teacher)):
            return ["float_model gives other outputs each time that it is run on the same images"]
    return [
        "float_model computes something else than the network that was quantized: its outputs and the model's are "
        f"{percent(gap**0.5)} apart with nothing rounded, {percent(rounding**0.5)} as they are: other biases, norms or "
        "buffers? pass the very model that was given to prepare_fx or exported, or the prepared model (one that was "
        "refined before and came out of a state_dict has biases of its own)"
    ]


def _worst(select: Select, own: Tensor, rounded: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Squares of how far the unrounded and the rounded outputs are from those wanted, beside these: of the output
    where the first is most of the second."""
    found = list[tuple[float, float]]()
    for columns in parts_of(select, wanted):
        whole = float(wanted[:, columns].square().sum().clamp_min(torch.finfo(torch.float32).tiny))
        gap, rounding = (float((o[:, columns] - wanted[:, columns]).square().sum()) / whole for o in (own, rounded))
        found.append((gap, rounding))
    return max(found, key=lambda pair: pair[0] / max(pair[1], _ARITHMETIC))
