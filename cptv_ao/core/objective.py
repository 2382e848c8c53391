"""Which loss is used on the outputs of a model, and whether it can be: a loss that cannot see the output is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from cptv_ao.core.config import LossName, RefineConfig
from cptv_ao.core.losses import Loss, get_loss

#: What `auto` makes of an output. Logits are what a softmax takes; an embedding says where an image lies, and its
#: numbers are no choice among classes; of a map or of tokens each place counts.
OutputKind = Literal["logits", "embedding", "map"]
_AUTO: dict[OutputKind, tuple[LossName, str]] = {
    "logits": ("kl", ""),
    "embedding": (
        "cosine",
        "loss: cosine, for the output comes out of no layer with a weight (or of one that only turns it), as "
        "embeddings do; loss='kl' if these are the logits of classes",
    ),
    "map": (
        "mse",
        "loss: mse, for the output is a map or a sequence, of which each place counts; loss='kl' compares the channels "
        "of each place as the logits of classes",
    ),
}


def settled(config: RefineConfig, teacher: Tensor, kind: OutputKind = "logits") -> tuple[RefineConfig, list[str]]:
    """The config with the loss that is used, and what is to be said of it.

    Args:
        config: as it was given.
        teacher: the teacher's outputs on a batch (N, C).
        kind: what they are.

    Raises:
        TypeError: a function returns something else than a number.
        ValueError: the loss that was asked for gives the same for any output.
    """
    assert not isinstance(config.loss, Mapping)
    if not isinstance(config.loss, str):
        return config, check_function(config, teacher)
    single = teacher.shape[1] == 1
    if config.loss == "auto":
        if single:
            return replace(config, loss="mse"), ["loss: mse, for the output is one number per image"]
        loss, told = _AUTO[kind]
        return replace(config, loss=loss), [told] if told else []
    if single and config.loss != "mse":
        raise ValueError(
            f"RefineConfig.loss: expected a loss that sees an output of one number per image, got {config.loss!r}, "
            "which compares the numbers of an image with one another; use 'mse', a function, or leave it out"
        )
    return config, []


def differentiable(loss: Loss, teacher: Tensor) -> bool:
    """Whether a descent can follow a loss: it must not leave torch (numpy, `.item()`), detach, or take an argmax."""
    outputs = next(_others(teacher)).clone().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        try:
            value = loss(outputs, teacher)
            return value.requires_grad and torch.autograd.grad(value, outputs, allow_unused=True)[0] is not None
        except Exception:  # it has computed a number of outputs without gradients before
            return False


def check_function(config: RefineConfig, teacher: Tensor) -> list[str]:
    """Of a loss that is a function of the user's; what is to be said of it.

    Raises:
        TypeError, ValueError: as `settled`.
    """
    assert not isinstance(config.loss, Mapping)
    loss = get_loss(config.loss, config.temperature)
    perfect = float(loss(teacher, teacher))
    if math.isfinite(perfect) and all(float(loss(other, teacher)) == perfect for other in _others(teacher)):
        raise ValueError(
            f"RefineConfig.loss: expected a function that is higher for worse outputs, got {config.loss_name}, which "
            f"is {perfect:.5g} for the teacher's own outputs and for quite different ones; compare its two arguments "
            f"of shape {tuple(teacher.shape)}"
        )
    if not config.gradient_steps or differentiable(loss, teacher):
        return []
    if config.feature_weight:
        return ["the loss cannot be differentiated: the gradient steps follow the inputs of the layers alone"]
    return ["the loss cannot be differentiated: no gradient steps"]


def _others(teacher: Tensor) -> Iterator[Tensor]:
    """Outputs that are quite different from the teacher's."""
    spread = float(teacher.std(correction=0)) or float(teacher.abs().max()) or 1.0
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(teacher)
    yield teacher + spread * noise
    yield -teacher
    yield 3 * spread * noise
    yield teacher * 2 + spread
    yield teacher + 1e6 * spread * noise  # a loss may tolerate much
