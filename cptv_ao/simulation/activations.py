"""What passes the activation sites of a network in float, and what the outputs make of changes there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cptv_ao.core.batches import Batch
from cptv_ao.fx.running import own_inputs
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.twin import Twin

Pull = Callable[[Any], Tensor]
"""Makes one number of what the network returns."""


def steps_and_gradients(
    twin: Twin, scales: Mapping[str, Tensor], batch: Batch, pull: Pull
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Run a batch through the twin in float, forward and backward.

    Args:
        scales: of activation sites, by name (), in whose steps values are told.
        pull: of what its gradient is.

    Returns:
        By site, of each time that something is put on its scale: the values in steps of it, not rounded, centred
        at 0; and the gradient with respect to these. Without sites that the outputs do not depend on.
    """
    own = {name: scale.float().to(twin.device).requires_grad_() for name, scale in scales.items()}
    owners, seen = {id(scale): name for name, scale in own.items()}, dict[str, tuple[nn.Module, list[Tensor]]]()

    def see(module: nn.Module, _: Any, output: Any) -> None:
        name = owners.get(id(output.scale)) if isinstance(output, QTensor) else None
        if name is None:
            return
        first, codes = seen.setdefault(name, (module, []))
        if first is module:  # the others hand on what that one has put on the scale
            codes.append(output.codes)

    hooks = [module.register_forward_hook(see) for module in twin.module.modules()]
    args, kwargs = own_inputs(batch)
    try:
        with torch.enable_grad(), twin.in_float(twin.names):
            number = pull(twin.call({name: {"scale": scale} for name, scale in own.items()}, *args, **kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    all_codes = [codes for _, found in seen.values() for codes in found]
    if not all_codes or not number.requires_grad:
        return {}
    gradients = iter(torch.autograd.grad(number, all_codes, allow_unused=True))
    pairs = {
        name: [(codes.detach(), pulled) for codes, pulled in zip(found, gradients, strict=False) if pulled is not None]
        for name, (_, found) in seen.items()
    }
    return {name: found for name, found in pairs.items() if found}
