"""Whether the kernels of this machine compute what exact arithmetic would, told to the user where they do not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.kernel_faults import scrambling_clamps
from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.formatting import some
from cptv_ao.core.packed_outputs import parts_of
from cptv_ao.core.tensors import Select, compared, first_floating
from cptv_ao.fx.running import call
from cptv_ao.simulation.saturation import saturating_inputs
from cptv_ao.simulation.twin import Twin

# Relative difference of the outputs from which it is worth a word: roundings alone stay well below.
_TOLERATED = 0.03


def broken_weights(backend: Backend) -> list[str]:
    """The weights that a kernel does not compute with: see `cptv_ao.backends.kernel_faults`."""
    weights = [site.name for site in backend.sites.values() if site.kind == "weight"]
    return [name for name in weights if not backend.weights.slot(name).is_right]


def agreement_notes(backend: Backend, few: Batch, config: RefineConfig) -> list[str]:
    """What a report says of saturation: nothing where kernels and exact arithmetic agree, or no twin is known.

    Args:
        backend: of the lowered model, as it was given.
        few: some search images.
    """
    if broken := broken_kernels(backend, few):
        return broken
    try:
        gap, found = disagreeing(backend, few, config)
    except UnsupportedModelError:
        return []
    if gap <= _TOLERATED:
        return []
    told = f"kernels and exact arithmetic differ by {100 * gap:.3g} % on the outputs of the model that was given: "
    if not found:
        return [told + "no kernel saturates, roundings by one code grow on the way to the output"]
    told += (
        f"kernels of this CPU saturate on the activations of {some(found)}; observers with reduce_range=True or a "
        "CPU with VNNI avoid it (depthwise convolutions saturate on any x86 CPU)"
    )
    if config.score_on == "kernels":
        return [told + "; the search ran on these kernels, so its result is right for machines that saturate alike"]
    return [told + "; the search ran on exact arithmetic, which does not see it"]


def broken_kernels(backend: Backend, few: Batch) -> list[str]:
    """Sentences on the kernels of this engine that compute something else than their layers, and the way around.

    Args:
        few: some images, on which the model is run where it has a clamp.
    """
    engine, told = torch.backends.quantized.engine, []
    if transposed := broken_weights(backend):
        told.append(
            f"torch's kernel of transposed convolutions on {engine} computes something else than these layers "
            f"({some(transposed)}): quantize for another engine (qnnpack), leave them in float, or upsample and "
            "convolve instead"
        )
    if clamps := scrambling_clamps(backend.model, few):
        told.append(
            f"torch's kernel of clamps on {engine} mixes up the values of channels_last tensors, as convolutions "
            f"return them, in {some(clamps)} (ReLU6, Hardtanh, clamp): put x.contiguous() in front of it in the "
            "float model, use ReLU, or quantize for another engine (x86)"
        )
    return told


def disagreeing(backend: Backend, few: Batch, config: RefineConfig) -> tuple[float, list[str]]:
    """How far kernels are from exact arithmetic on the outputs, and the sites that the kernels saturate on.

    The sites are looked for only where the gap is more than roundings make.

    Raises:
        UnsupportedModelError: no twin is known.
    """
    select = config.select
    twin = Twin(backend).checked(few)
    gap = disagreement(backend.model, twin, [few], select)
    return gap, sorted(saturating_inputs(backend.model, twin, few)) if gap > _TOLERATED else []


def disagreement(
    model: Callable[..., Any], twin: Twin, batches: Iterable[Batch], select: Select = first_floating
) -> float:
    """How far the kernels are from the simulation: |kernels - simulation| / |simulation|, of the output that is worst.

    Under 0.01 where only roundings differ; a few tenths where 8-bit products saturate in 16 bits (activations of the
    full range on a CPU without VNNI).
    """
    apart: dict[int, float] = defaultdict(float)
    whole: dict[int, float] = defaultdict(float)
    with torch.inference_mode():
        for batch in batches:
            kernels = compared(call(model, batch), select).double().cpu()
            simulated = compared(call(twin, batch.to(twin.device)), select).double().cpu()
            for index, own in enumerate(parts_of(select, simulated)):
                apart[index] += float((kernels[:, own] - simulated[:, own]).square().sum())
                whole[index] += float(simulated[:, own].square().sum())
    return max(_ratio(apart[index], whole[index]) for index in apart)


def _ratio(apart: float, whole: float) -> float:
    return math.sqrt(apart / whole) if whole > 0 else (math.inf if apart > 0 else 0.0)
