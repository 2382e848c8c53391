"""What passes the activation sites of a network in float, and what the outputs make of changes there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cptv_ao.core.batches import Batch
from cptv_ao.core.contexts import hooked
from cptv_ao.fx.running import own_inputs
from cptv_ao.simulation.products import tensor_cores
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.qtensor_ops import Requantizer
from cptv_ao.simulation.twin import Twin

Pull = Callable[[Any], Tensor]
"""Makes one number of what the network returns."""


See = Callable[[nn.Module, Any, Any, "str | None"], None]
"""Is shown a module, its arguments and output, and the site that the output has just been put on, if any."""


def followed(twin: Twin, scales: Mapping[str, Tensor], batch: Batch, pull: Pull, see: See) -> Tensor:
    """Run a batch through the twin in float; the number that `pull` makes, with its graph.

    Args:
        scales: of sites, by name, in whose steps values are held.
        see: is shown each module that runs. Of a site it is told at the first module that makes its values, and where
            values of other scales join them (torch.cat): other modules hand on what these have put on the scale.
    """
    own = {name: scale.float().to(twin.device).requires_grad_() for name, scale in scales.items()}
    owners, makers = {id(scale): name for name, scale in own.items()}, dict[str, nn.Module]()
    ties = {name: module.site.tied for name, module in twin.sites.modules.items()}

    def site(value: Any) -> str | None:
        return owners.get(id(value.scale)) if isinstance(value, QTensor) else None

    def show(module: nn.Module, args: Any, output: Any) -> None:
        name = site(output)
        if name is not None and isinstance(module, Requantizer):
            before = site(args[0])
            makes = before is None or ties[before] != ties[name]
        else:
            makes = name is not None and makers.setdefault(name, module) is module
        see(module, args, output, name if makes else None)

    args, kwargs = own_inputs(batch)
    hooks = [module.register_forward_hook(show) for module in twin.module.modules()]
    with hooked(hooks), torch.enable_grad(), twin.in_float(twin.names):
        return pull(twin.call({name: {"scale": scale} for name, scale in own.items()}, *args, **kwargs))


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
    seen = dict[str, list[Tensor]]()

    def see(_: nn.Module, __: Any, output: Any, site: str | None) -> None:
        if site is not None:
            seen.setdefault(site, []).append(output.codes)

    with twin.attention():
        number = followed(twin, scales, batch, pull, see)
    all_codes = [codes for found in seen.values() for codes in found]
    if not all_codes or not number.requires_grad:
        return {}
    with tensor_cores(number):
        gradients = iter(torch.autograd.grad(number, all_codes, allow_unused=True))
    pairs = {
        name: [(codes.detach(), pulled) for codes, pulled in zip(found, gradients, strict=False) if pulled is not None]
        for name, found in seen.items()
    }
    return {name: found for name, found in pairs.items() if found}
