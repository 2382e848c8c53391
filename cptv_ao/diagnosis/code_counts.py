"""How often a site takes each of its codes: activations on images, weights as they are stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from cptv_ao.backends.open import open_model
from cptv_ao.core.batches import Batch
from cptv_ao.core.contexts import eval_mode, plain_torch
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.loader import read_batches
from cptv_ao.core.sites import ScaleSite
from cptv_ao.fx.node_runner import Watcher

# Codes of quint8 and of qint8 fit into it.
_LOWEST, _HIGHEST = -128, 255


@dataclass(frozen=True)
class CodeCounts:
    """Codes of one site.

    Attributes:
        site: its description.
        counts: how often each code occurs, from code `first` on, without gaps.
        first: the lowest code that is counted: `site.qmin`, or below it where such a code occurs.
        zero_point: the code that means zero; None where the channels differ.
    """

    site: ScaleSite
    counts: tuple[int, ...]
    first: int
    zero_point: int | None

    @property
    def total(self) -> int:
        """Values that were counted."""
        return sum(self.counts)


def count_codes(model: GraphModule, site: str, calib_loader: Iterable[Any] | None = None) -> CodeCounts:
    """Count the codes of a site.

    Args:
        model: what `convert_fx`, `convert_pt2e` or `convert_to_reference_fx` returned, refined or not; it is run on its
            own kernels and left as it is.
        site: its name, as in `cptv_ao.find_sites(model)`.
        calib_loader: images as for `refine`; weights need none.

    Raises:
        ValueError: there is no such site, or an activation site was given no images.
        UnsupportedModelError: the model is not converted, or the site holds no integer codes.
    """
    backend = open_model(model)
    if site not in backend.sites:
        near = get_close_matches(site, backend.sites, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no site {site!r} in this model; {hint}print(cptv_ao.find_sites(model)) lists them")
    found = backend.sites[site]
    if found.kind == "weight":
        counts = _count(backend.weight(site), site)
    elif calib_loader is None:
        raise ValueError(f"{site} is an activation site: its codes are counted on images, pass calib_loader")
    else:
        counts = _of_activation(backend.model, found, read_batches(calib_loader, backend.form.intake(backend.model)))
    zero_points = set(backend.read(site).zero_point.reshape(-1).tolist())
    seen = (counts > 0).nonzero().reshape(-1) + _LOWEST
    first, last = min(found.qmin, int(seen.min())), max(found.qmax, int(seen.max()))
    inside = counts[first - _LOWEST : last - _LOWEST + 1]
    return CodeCounts(found, tuple(inside.tolist()), first, zero_points.pop() if len(zero_points) == 1 else None)


def _of_activation(model: GraphModule, site: ScaleSite, batches: Iterable[Batch]) -> Tensor:
    counts = torch.zeros(_HIGHEST - _LOWEST + 1, dtype=torch.int64)

    def see(node: Node, value: Any) -> Any:
        if node.name in site.nodes:
            counts.add_(_count(value, site.name))
        return value

    watcher = Watcher(model)
    with plain_torch(), eval_mode(model):
        for batch in batches:
            watcher.watch(batch, see)
    if not int(counts.sum()):
        raise UnsupportedModelError(f"{site.name}: the model computed none of its nodes {site.nodes}", site.name)
    return counts


def _count(value: Any, site: str) -> Tensor:
    """How often each code from `_LOWEST` to `_HIGHEST` occurs."""
    codes = value.int_repr() if isinstance(value, Tensor) and value.is_quantized else value
    if not isinstance(codes, Tensor) or codes.dtype not in (torch.uint8, torch.int8):
        kind = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise UnsupportedModelError(f"{site}: expected 8-bit codes, got {kind}", site)
    return torch.bincount(codes.reshape(-1).int() - _LOWEST, minlength=_HIGHEST - _LOWEST + 1)
