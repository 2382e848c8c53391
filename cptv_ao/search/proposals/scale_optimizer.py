"""Adam on what is learnt of the scales: log scales, offsets, biases and shifts, each at a rate of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cptv_ao.search.proposals.learnable_qparams import LearnableQParams


class ScaleOptimizer:
    """Adam on the leaves of some groups.

    Args:
        groups: whose leaves move.
        activation_rate: multiple of the learning rate at which activations move; weights move at the rate itself,
            those of many codes slower, and biases, in their units.
        rounding_rate: multiple of the learning rate at which shifts of weights move.
    """

    def __init__(self, groups: Sequence[LearnableQParams], activation_rate: float, rounding_rate: float) -> None:
        self._groups = groups
        by_rate: dict[float, list[Tensor]] = {}
        for group in groups:
            rate = group.weight_rate if group.offset is None else activation_rate
            by_rate.setdefault(rate, []).extend(leaf for leaf in (group.log_scale, group.offset) if leaf is not None)
            if group.bias is not None:
                by_rate.setdefault(1.0, []).append(group.bias.leaf)
            if group.shift is not None:
                by_rate.setdefault(rounding_rate, []).append(group.shift)
        self._confined: dict[tuple[float, float], list[Tensor]] = {}
        for group in groups:
            for leaf, ends in group.confined:
                self._confined.setdefault(ends, []).append(leaf)
        rates: list[dict[str, Any]] = [{"params": leaves, "factor": rate} for rate, leaves in by_rate.items()]
        self._adam = torch.optim.Adam(rates, lr=1.0, betas=(0.9, 0.95), fused=True)
        #: what moves, in the order of their gradients
        self.leaves: list[Tensor] = [leaf for rate in self._adam.param_groups for leaf in rate["params"]]

    def step(self, gradient: Tensor, rate: float) -> None:
        """Move the leaves against their gradients, one after another in one tensor, at a learning rate."""
        for group in self._adam.param_groups:
            group["lr"] = rate * group["factor"]
        sizes = [leaf.numel() for leaf in self.leaves]
        # A scale whose gradient is no number (infinite padding in front of it) stays where it is in this step.
        for leaf, own in zip(self.leaves, torch.split(gradient.nan_to_num_(0.0, 0.0, 0.0), sizes), strict=True):
            leaf.grad = own.reshape(leaf.shape)
        self._adam.step()
        with torch.no_grad():
            for (low, high), leaves in self._confined.items():
                torch._foreach_clamp_min_(leaves, low)
                torch._foreach_clamp_max_(leaves, high)

    def forget_direction(self) -> None:
        """Forget where it was heading; how large gradients are still holds."""
        for state in self._adam.state.values():
            state["exp_avg"].zero_()

    def state(self) -> dict[str, Tensor]:
        """The leaves and their moments, for `set_state`."""
        tensors: dict[str, Tensor] = {}
        for index, leaf in enumerate(self.leaves):
            tensors[f"leaf/{index}"] = leaf.detach()
            tensors |= {f"adam/{index}/{name}": value for name, value in self._adam.state.get(leaf, {}).items()}
        return tensors

    def set_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned.

        Raises:
            KeyError, ValueError: it is not that.
        """
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for index, leaf in enumerate(self.leaves):
                leaf.copy_(like(leaf, tensors[f"leaf/{index}"]))
                own = f"adam/{index}/"
                if found := {key.removeprefix(own): value for key, value in tensors.items() if key.startswith(own)}:
                    moments[index] = {k: like(torch.zeros(()) if k == "step" else leaf, v) for k, v in found.items()}
        self._adam.load_state_dict({**self._adam.state_dict(), "state": moments})


def like(tensor: Tensor, saved: Tensor) -> Tensor:
    """What was saved of a tensor.

    Raises:
        ValueError: it has another shape or dtype, or holds what is no number.
    """
    if saved.shape != tensor.shape or saved.dtype != tensor.dtype or not bool(torch.isfinite(saved).all()):
        raise ValueError(
            f"expected finite numbers of shape {tuple(tensor.shape)} and {tensor.dtype}, got {saved.dtype} of "
            f"{tuple(saved.shape)}"
        )
    return saved
