"""How much a loss minds small changes of the outputs, to second order: by random directions.

Around the teacher's outputs a loss is 1/2 d^T H d for a small change d. A direction v with E[v v^T] = H, drawn anew for
each image, makes it 1/2 E[(v^T d)^2]: the square of one number stands for the whole output (Hutchinson 1989; of the
Gauss-Newton matrix: Martens, ICML 2010).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from cptv_ao.core.losses import JointLoss, Loss, LossChoice


def random_direction(loss: LossChoice, outputs: Tensor, generator: torch.Generator) -> Tensor:
    """A number whose gradient with respect to the outputs is a direction of each image.

    They fit the loss up to a factor that is the same for all images. A function of the user's, of which nobody knows
    what it minds, counts all outputs alike.

    Args:
        loss: its name, or a function.
        outputs: (N, C), with a graph.
        generator: on the CPU, so that every device draws the same.

    Returns:
        Of shape ().
    """
    assert not isinstance(loss, Mapping)
    noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float32).to(outputs)
    return loss.direction(outputs, noise) if isinstance(loss, JointLoss) else direction(loss, outputs, noise)


def direction(loss: str | Loss, outputs: Tensor, noise: Tensor) -> Tensor:
    """The same of given noise, (N, C) as the outputs."""
    if loss == "kl":  # H = diag(p) - p p^T
        shares = outputs.detach().softmax(1)
        noise = shares.sqrt() * noise
        return (outputs * (noise - shares * noise.sum(1, keepdim=True))).sum()
    if loss in ("cosine", "infonce", "soft_infonce"):  # which see the outputs' directions alone
        return (functional.normalize(outputs, dim=1) * noise).sum()
    return (outputs * noise).sum()
