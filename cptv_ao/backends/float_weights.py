"""Float weights for a quantized model: found by name in the float or the prepared model, and checked."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_constants import float_tensors, rearranged
from cptv_ao.backends.trained_weights import fused_weights, trained_scales
from cptv_ao.backends.turned_weights import TurnedWeights
from cptv_ao.core.channel_scaling import fold_factors, power_exponents
from cptv_ao.core.errors import FloatModelMismatchError
from cptv_ao.core.sites import ScaleSite, weight_name
from cptv_ao.core.weight_rounding import HALF_STEP, along_axis, weight_steps
from cptv_ao.fx.quantized_ops import of_node

# Share of the values of a constant that may be beyond the range of its scale, as an observer or a refine left it.
_MOST_CLIPPED = 0.4
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def weight_ranges(float_model: nn.Module | None) -> dict[str, tuple[int, int]]:
    """Nominal code ranges by weight site: from the qconfigs that prepare_fx leaves on the modules it shares, or
    from the reference modules that convert_fx leaves in the prepared model."""
    ranges: dict[str, tuple[int, int]] = {}
    for path, module in float_model.named_modules(remove_duplicate=False) if float_model is not None else ():
        inner = _weighted(module)
        qmin, qmax = getattr(inner, "weight_quant_min", None), getattr(inner, "weight_quant_max", None)
        qconfig = getattr(inner, "qconfig", None)
        if qmin is None and qconfig is not None and isinstance(getattr(inner, "weight", None), Tensor):
            observer = qconfig.weight()
            qmin, qmax = getattr(observer, "quant_min", None), getattr(observer, "quant_max", None)
        if qmin is not None and qmax is not None:
            ranges[weight_name(path)] = (int(qmin), int(qmax))
    return ranges


def attach_float_weights(backend: Backend, float_model: nn.Module) -> list[str]:
    """Give the backend the float weight of each of its weight sites, and the scale that it was trained on (QAT).

    A weight is found by module path, fused with a batch norm where that is what was quantized; the weight of a
    functional op, or a constant, by its values, whichever way these were moved. Each is checked, clipped codes aside:
    |w / s - code| within half a step, or within a whole one where a refine has rounded weights up or down.

    Returns:
        The constants, of more than one number, whose values the float model does not hold: they stay as they are.

    Raises:
        FloatModelMismatchError: naming the first module that differs.
    """
    modules = dict(float_model.named_modules(remove_duplicate=False))
    fused = fused_weights(float_model)
    held, unknown = deque(float_tensors(float_model)), list[str]()
    turned = TurnedWeights(backend.model, float_model)
    by_module, nodes = backend.form.weights_of_modules, {node.name: node for node in backend.model.graph.nodes}
    for site in backend.sites.values():
        if site.kind != "weight" or site.fixed:
            continue
        if not backend.weights.slot(site.name).of_layer:
            value = _constant(held, backend.weight(site.name), site)
            if value is not None:
                backend.weights.set_float(site.name, value)
            elif backend.weight(site.name).numel() > 1:  # else rounding took nothing from it
                unknown.append(site.name)
            continue
        path = site.name.removesuffix(".weight") if by_module else site.scope
        weight = backend.weight(site.name)
        user = nodes[site.nodes[0]]
        functional = of_node(user, {}) is not None  # its weight is no module's
        candidates: Iterable[Tensor] = ()
        if not functional and path in modules:
            own = _module_weights(modules, path)
            first = list(islice(own, 1))
            candidates = chain(first, *map(turned.of, first), own, [fused[path]] if path in fused else [])
        elif by_module and not functional:
            _refuse_module(path)
        found = _nearest(candidates, weight, site)
        if found.steps > 2 * HALF_STEP and (functional or not by_module):
            like = [tensor for tensor in held if tensor.numel() == weight.numel()]
            found = _nearest(chain(like, *map(turned.of, like)), weight, site, found)
            _turn_behind(held, found.weight)
            if found.steps > 2 * HALF_STEP:
                found = _nearest(_moved(held, weight), weight, site, found)
        if found.steps > 2 * HALF_STEP:
            _refuse(path, weight, found.shapes)
        backend.weights.set_float(site.name, found.weight)
    backend.weights.trained = trained_scales(float_model, backend.sites, by_module)
    return unknown


def _constant(held: Iterable[Tensor], codes: Tensor, site: ScaleSite) -> Tensor | None:
    """The nearest of the tensors that may have these codes; None where there is none.

    A constant is told by its values alone: where many of them were clipped, by nothing.
    """
    as_they_are = [tensor for tensor in held if tensor.numel() == codes.numel()]
    for candidates in (as_they_are, _moved(held, codes)):
        nearest, found = math.inf, None
        for candidate in candidates:
            off, clipped = _off(candidate.detach(), codes, site)
            beyond, apart = off > 2 * HALF_STEP, float(off.max())
            if bool((clipped | ~beyond).all()) and float(beyond.float().mean()) <= _MOST_CLIPPED and apart < nearest:
                nearest, found = apart, candidate.detach()
        if found is not None:
            return found
    return None


def _moved(held: Iterable[Tensor], codes: Tensor) -> Iterator[Tensor]:
    return chain.from_iterable(rearranged(tensor, codes.shape) for tensor in held)


@dataclass(frozen=True)
class _Nearest:
    """The float weight that is nearest to codes, how many steps it is from them, and the shapes that were seen."""

    steps: float
    weight: Tensor
    shapes: frozenset[tuple[int, ...]] = frozenset()


def _nearest(candidates: Iterable[Tensor], weight: Tensor, site: ScaleSite, before: _Nearest | None = None) -> _Nearest:
    """The first that is within half a step of the codes, else the first within a whole one (there, where a refine has
    rounded up or down, one that is scaled a little may look nearer than the weight itself), else the nearest; with
    columns as `cptv_ao.transforms` scales them where none is within a whole step."""
    steps, found, shapes = math.inf, weight, set(before.shapes if before else ())
    seen = list[Tensor]()  # one after another: the first is it, most often, and others are made for it
    for candidate in candidates:
        shapes.add(tuple(candidate.shape))
        if candidate.numel() == weight.numel():
            seen.append(candidate)
            apart = _distance(candidate.detach(), weight, site)
            if apart < steps:
                steps, found = apart, candidate
            if apart <= HALF_STEP:
                break
    for candidate in seen if steps > 2 * HALF_STEP else ():
        scaled = _scaled(candidate, weight, site)
        apart = _distance(scaled, weight, site)
        if apart < steps:
            steps, found = apart, scaled
        if apart <= HALF_STEP:
            break
    return _Nearest(steps, found, frozenset(shapes))


def _turn_behind(held: deque[Tensor], found: Tensor) -> None:
    """Begin behind what was found: there is what the next op takes, most likely."""
    place = next((i for i, tensor in enumerate(held) if tensor is found), -1)
    held.rotate(-1 - place)


def _refuse_module(path: str) -> None:
    raise FloatModelMismatchError(
        f"float_model: expected a module {path} as in the quantized model, found none; pass the model that "
        "was given to prepare_fx, or the prepared model",
        path,
    )


def _refuse(path: str, weight: Tensor, shapes: Collection[tuple[int, ...]]) -> None:
    expected = tuple(weight.shape)
    if expected in shapes:
        reason = "its weights are not those that were quantized (farther than a step from the codes)"
    else:
        reason = f"expected a weight of shape {expected}, got {sorted(shapes) or 'none'}"
    raise FloatModelMismatchError(
        f"float_model does not match at {path}: {reason}; pass the very model that was given to prepare_fx, "
        "or the prepared model",
        path,
    )


def _module_weights(modules: dict[str, nn.Module], path: str) -> Iterator[Tensor]:
    """The weight of a module as it is, then fused with batch norms: the next one in module order first."""
    module = _weighted(modules[path])
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    yield weight
    own = getattr(module, "bn", None)
    if isinstance(own, _BATCH_NORMS) and own.running_var is not None:  # ConvBnReLU2d of QAT
        yield _fused(module, weight, own)
    names = list(modules)
    place = names.index(path)
    channels = weight.shape[1 if _transposed(module) else 0]
    for name in names[place + 1 :] + names[:place]:
        norm = modules[name]
        if isinstance(norm, _BATCH_NORMS) and norm.num_features == channels and norm.running_var is not None:
            yield _fused(module, weight, norm)
            yield _folded(module, weight, norm)
    for name in names[place + 1 :] + names[:place]:  # as `cptv_ao.transforms.layer_scale` makes them of a weight
        for factors in modules[name].parameters(recurse=False):
            if factors.numel() == channels and factors.is_floating_point():
                yield _by_channel(module, weight, factors.flatten())


def _weighted(module: nn.Module) -> nn.Module:
    """The module that holds a weight: in fused ones of a prepared model (ConvReLU2d) the first, in those of QAT, which
    are sequences too, they themselves."""
    own = isinstance(getattr(module, "weight", None), Tensor)
    return module[0] if isinstance(module, nn.Sequential) and len(module) and not own else module


def _transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "transposed", False))


def _fused(module: nn.Module, weight: Tensor, norm: nn.Module) -> Tensor:
    var, gamma = cast(Tensor, norm.running_var), cast("Tensor | None", norm.weight)
    # The order of operations of torch.nn.utils.fuse_conv_bn_weights, so that the result is equal bit for bit.
    factor = torch.rsqrt(var + cast(float, norm.eps))
    return _by_channel(module, weight, factor if gamma is None else gamma * factor)


def _folded(module: nn.Module, weight: Tensor, norm: nn.Module) -> Tensor:
    """What `cptv_ao.transforms.equalize` makes of a weight."""
    var, gamma, beta = (cast(Any, getattr(norm, name)) for name in ("running_var", "weight", "bias"))
    return _by_channel(module, weight, fold_factors(var.float(), gamma, beta, cast(float, norm.eps)))


def _by_channel(module: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    """A weight times a factor per channel of the module's output (C,)."""
    shape = [1, -1] if _transposed(module) else [-1, 1]
    return weight * factor.reshape(shape + [1] * (weight.dim() - 2))


def _scaled(weight: Tensor, quantized: Tensor, site: ScaleSite) -> Tensor:
    """What `cptv_ao.transforms` made of a weight whose channels it scaled, found by its codes."""
    steps, codes = _steps_and_codes(weight.detach(), quantized, site)
    return weight.detach().float().cpu().reshape(codes.shape) * torch.exp2(power_exponents(steps, codes))


def _distance(weight: Tensor, quantized: Tensor, site: ScaleSite) -> float:
    """How many steps a weight is from its codes, at most, rounded up to a half or a whole one; the codes at the ends
    may stand for anything beyond."""
    off, clipped = _off(weight, quantized, site)
    steps = float(off.masked_fill_(clipped, 0.0).max())
    return next((bound for bound in (HALF_STEP, 2 * HALF_STEP) if steps <= bound), steps)


def _off(weight: Tensor, quantized: Tensor, site: ScaleSite) -> tuple[Tensor, Tensor]:
    """How many steps each value of a weight is from its code, and whether it is beyond the code at an end."""
    steps, codes = _steps_and_codes(weight, quantized, site)
    off, stored = steps - codes, quantized.int_repr()
    highest, lowest = stored.max().clamp_min(1), stored.min().clamp_max(-1)  # all zero is not clipped
    return off.abs(), ((stored == highest) & (off > 0)) | ((stored == lowest) & (off < 0))


def _steps_and_codes(weight: Tensor, quantized: Tensor, site: ScaleSite) -> tuple[Tensor, Tensor]:
    """A float weight in steps of the scale that it was quantized with, and its codes less the zero point."""
    codes = quantized.int_repr().float()
    if site.axis is None:
        scale, zero_point = torch.tensor(quantized.q_scale()), torch.tensor(quantized.q_zero_point())
    else:
        scale, zero_point = quantized.q_per_channel_scales(), quantized.q_per_channel_zero_points()
    steps = weight_steps(weight.to("cpu", torch.float32).reshape(codes.shape), scale.float(), site.axis)
    return steps, codes - along_axis(zero_point, site.axis, codes.dim())
