"""What to give to stock `prepare_fx` so that a model of timm and others traces, converts and loses little.

Nothing of torch is patched: the float model is copied and a few of its modules are rewritten into equal ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping, get_default_qconfig, get_default_qconfig_mapping
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from cptv_ao.transforms.float_model.rewriter import Rewriter
from cptv_ao.transforms.float_model.trial import left_in_float


def qconfig_mapping(weight_bits: int = 8, engine: str | None = None) -> QConfigMapping:
    """A stock QConfigMapping whose per-channel weights have 2 to 8 bits, with codes that stay in their range.

    Args:
        weight_bits: bits of the weights. Below 8 the range is symmetric (3 bits: -3..3), since convert_fx does not
            clamp and a range of -4..3 would get codes of +4. `RefineConfig(weight_range=(-4, 3))` lets `refine` use
            the code that is left over.
        engine: `x86`, `fbgemm`, `onednn` or `qnnpack`; None: the one of `torch.backends.quantized.engine`.

    Returns:
        torch.ao's default mapping of the engine (activations 8 bits, histogram observers), with these weights.

    Raises:
        ValueError: bits or an engine that do not exist.
    """
    if weight_bits not in range(2, 9):
        raise ValueError(f"weight_bits: expected 2 to 8, got {weight_bits!r}")
    engine = torch.backends.quantized.engine if engine is None else engine
    if engine not in torch.backends.quantized.supported_engines:
        known = ", ".join(e for e in torch.backends.quantized.supported_engines if e != "none")
        raise ValueError(f"engine: expected one of {known}, got {engine!r}")
    half = 2 ** (weight_bits - 1)
    low = -half if weight_bits == 8 else 1 - half
    weight = PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=low, quant_max=half - 1
    )
    default = get_default_qconfig(engine)  # type: ignore[no-untyped-call]
    mapping = get_default_qconfig_mapping(engine)
    own = QConfig(activation=default.activation, weight=weight)  # type: ignore[no-untyped-call]
    mapping.set_global(own)
    for kind, qconfig in list(mapping.object_type_qconfigs.items()):
        if qconfig is not None and qconfig.weight is default.weight:  # linear, conv ...
            mapping.set_object_type(kind, own)
    return mapping


@dataclass(frozen=True)
class Recipe:
    """What to pass to `prepare_fx`; `print()` tells what was done and why.

    Attributes:
        model: a copy of the float model that computes the same; pass it to `prepare_fx`, and to `refine` as
            `float_model`.
        qconfig_mapping: the mapping that was given, with what cannot be quantized left out.
        prepare_custom_config: names the modules that stay float because they cannot be traced.
        notes: what was done, one line each.
    """

    model: nn.Module
    qconfig_mapping: QConfigMapping
    prepare_custom_config: PrepareCustomConfig
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.notes) or "nothing to change: stock prepare_fx takes this model as it is"


def recipe(
    model: nn.Module, example_inputs: tuple[Any, ...], *, qconfig_mapping: QConfigMapping | None = None
) -> Recipe:
    """Make a float model ready for stock `prepare_fx`, keeping as much of it quantized as possible.

    Batch norms that hold their activation (timm's BatchNormAct2d) are taken apart, so that FX fuses them with their
    convolution, and identities between them vanish. A module that cannot be traced, or that computes a weight or bias
    in its forward, is rewritten into its own graph for inputs like `example_inputs` (of any batch size, of this image
    size); where that fails, or hangs on the numbers in its inputs, it stays float. So do masks that are added to the
    scores of an attention, the sum and its softmax: no 8 bits hold them. Where a few channels of a norm are far larger
    than the others on these inputs, they are divided in the norm and multiplied in the linear layers that read it
    (SmoothQuant, arXiv 2211.10438), which costs nothing and leaves the others more codes. Where a few channels of a
    residual stream are, the whole stream is rotated (QuaRot, arXiv 2404.00456), if its values are sums of what linear
    layers, convolutions and tensors of the model give, and only layer norms before linear layers, or such layers, read
    them: its largest values become several times smaller. Where the model returns the last norm itself, a linear layer
    of that width is put behind it, which rotates back; where a norm begins the stream (CLIP), one that stays in float.
    At the end prepare_fx, one batch and convert_fx are run on a copy: what they break on is found, named and left in
    float.

    Args:
        model: the float model; it is not changed.
        example_inputs: what `prepare_fx` takes: a tuple of positional inputs, batch first, 2 or more images, real ones
            if outliers are to be found.
        qconfig_mapping: as for `prepare_fx`; None: `cptv_ao.qconfig_mapping()`.

    Raises:
        UnsupportedModelError: the model as a whole can neither be traced nor rewritten; `node` names the module. Or
            torch.ao fails on it, whatever stays float.

    Example:
        >>> ready = cptv_ao.recipe(model, example_inputs)                             # doctest: +SKIP
        >>> prepared = prepare_fx(                                                    # doctest: +SKIP
        ...     ready.model, ready.qconfig_mapping, example_inputs,
        ...     prepare_custom_config=ready.prepare_custom_config)
    """
    if not isinstance(example_inputs, tuple):
        raise TypeError(f"example_inputs: expected a tuple as for prepare_fx, got {type(example_inputs).__name__}")
    mapping = _default_mapping() if qconfig_mapping is None else copy.deepcopy(qconfig_mapping)
    with torch.no_grad():
        rewriter = Rewriter(model, example_inputs, mapping)
        rewriter.prepare_modules()
        rewriter.make_traceable()
        custom = PrepareCustomConfig().set_non_traceable_module_classes(list(rewriter.leaves))
        tried = left_in_float(rewriter.model, mapping, custom, example_inputs)
    return Recipe(rewriter.model, mapping, custom, (*rewriter.notes, *tried))


_default_mapping = qconfig_mapping
