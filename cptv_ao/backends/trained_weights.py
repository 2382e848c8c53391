"""Weights of models that were prepared for training with fake quantization (QAT): as what, and on which scales, they
were rounded while they were trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from cptv_ao.core.qparams import Assignment, QParams
from cptv_ao.core.sites import SiteTable, weight_name
from cptv_ao.fx.paths import fetch
from cptv_ao.fx.quantized_ops import is_rounding

# What QAT of exported models puts around a convolution and its weight.
_FACTORS = (torch.ops.aten.div.Tensor, torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor)


def fused_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the convolutions of an exported float model, fused with the batch norm behind them, by path.

    Prepared for QAT: batch_norm(conv(x, fake_quantize(weight * factor)) / factor + bias).
    """
    fused: dict[str, Tensor] = {}
    for node in model.graph.nodes if isinstance(model, GraphModule) else ():
        source = _through_factors(node.args[0]) if node.target is torch.ops.aten.batch_norm.default else None
        held = _through_factors(source.args[1]) if source is not None and len(source.args) > 1 else None
        if held is None or held.op != "get_attr":
            continue
        gamma, _, _, var = (fetch(model, str(part.target)) if part is not None else None for part in node.args[1:5])
        factor = torch.rsqrt(var + node.args[7]) * (1 if gamma is None else gamma)
        weight = fetch(model, str(held.target))
        path = str(held.target).removesuffix(".weight")
        fused[path] = weight * factor.reshape([-1] + [1] * (weight.dim() - 1))
    return fused


def trained_scales(model: nn.Module, sites: SiteTable, by_module: bool) -> Assignment:
    """The scales on which fake quantization, where it is in use, rounds the weights of a model, by weight site.

    They are not those that a conversion computes from the same ranges: torch's fused fake quantization takes a range
    of -1..1 for -2..1, and a conversion observes weights once more, which turns the codes of those between two.

    Args:
        sites: of what the model was converted to.
        by_module: whether these are named after the modules, or else know the module as their scope.
    """
    fakes = dict(_weight_fakes(model))
    found: Assignment = {}
    for site in sites.values():
        path = site.name.removesuffix(weight_name("")) if by_module else site.scope
        fake = fakes.get(path) if site.kind == "weight" and not site.fixed else None
        if fake is None or fake.scale.numel() != site.numel or bool(fake.zero_point.any()):
            continue
        scale = fake.scale.detach().double().cpu().reshape(site.shape)
        if bool((torch.isfinite(scale) & (scale > 0)).all()):
            found[site.name] = QParams(scale, torch.zeros(site.shape, dtype=torch.int64))
    return found


def _weight_fakes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The fake quantization of each weight, with the path of the module that holds the weight."""
    for path, module in model.named_modules(remove_duplicate=False):
        fake = getattr(module, "weight_fake_quant", None)
        if isinstance(fake, nn.Module) and is_rounding(fake):
            yield path, fake
    for node in model.graph.nodes if isinstance(model, GraphModule) else ():
        fake = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        held = _through_factors(node) if fake is not None and is_rounding(fake) else None
        if held is not None and held.op == "get_attr":
            yield str(held.target).removesuffix(".weight"), fake


def _through_factors(value: Any) -> Node | None:
    """The node whose value this is, but for factors, sums and fake quantization."""
    while isinstance(value, Node) and value.args and (value.op == "call_module" or value.target in _FACTORS):
        value = value.args[0]
    return value if isinstance(value, Node) else None
