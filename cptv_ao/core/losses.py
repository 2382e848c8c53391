"""Losses between a candidate's outputs and the teacher's: plain functions, lower is better, never negative.

Each takes two tensors (N, C) and returns a scalar tensor: the mean over the N images, so that losses of batches
can be averaged by their number of images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]


def kl(candidate: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(candidate)), mean over the images; 0 when they are equal."""
    difference = teacher.log_softmax(1) - candidate.log_softmax(1)
    return (teacher.softmax(1) * difference).sum(1).mean().clamp_min(0)


def mse(candidate: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the outputs."""
    return functional.mse_loss(candidate, teacher)


def cosine(candidate: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine similarity of each image's outputs, mean over the images."""
    return (1 - functional.cosine_similarity(candidate, teacher, dim=1)).mean().clamp_min(0)


def infonce(candidate: Tensor, teacher: Tensor, *, temperature: float = 3.0) -> Tensor:
    """InfoNCE with in-batch negatives, as the authors compute it (arXiv 2211.09643, equation 3 and their code).

    With L2-normalised rows q of the candidate and k of the teacher: CE(q k^T / T, arange(N)) * 2T.

    Raises:
        ValueError: a single image has no negatives.
    """
    _need_negatives(candidate)
    similarity = _similarity(candidate, teacher) / temperature
    target = torch.arange(len(candidate), device=candidate.device)
    return functional.cross_entropy(similarity, target) * (2 * temperature)


def soft_infonce(candidate: Tensor, teacher: Tensor, *, temperature: float = 3.0) -> Tensor:
    """InfoNCE whose targets are the teacher's own similarities, so that images of one class are no false negatives.

    Mean over the rows of KL(softmax(k k^T / T) || softmax(q k^T / T)), times 2T; 0 when q = k.

    Raises:
        ValueError: a single image has no negatives.
    """
    _need_negatives(candidate)
    found = (_similarity(candidate, teacher) / temperature).log_softmax(1)
    wanted = (_similarity(teacher, teacher) / temperature).log_softmax(1)
    return (wanted.exp() * (wanted - found)).sum(1).mean().clamp_min(0) * (2 * temperature)


class JointLoss(ABC):
    """Of several outputs, packed into one tensor (N, numbers of all): what is asked of a loss, asked of each."""

    __name__: str

    @property
    @abstractmethod
    def losses(self) -> tuple[str | Loss, ...]:
        """Names or functions, one for each output that counts."""

    @abstractmethod
    def __call__(self, candidate: Tensor, teacher: Tensor) -> Tensor:
        """To be followed: in the dtype of what it is given."""

    @abstractmethod
    def each(self, candidate: Tensor, teacher: Tensor) -> Tensor:
        """The losses (outputs,) of the outputs, in float64; the joint one is their mean."""

    @abstractmethod
    def direction(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """See `cptv_ao.core.loss_curvature`."""


#: What `RefineConfig.loss` may be: of all outputs, or by the name of each (None: it does not count).
LossChoice = str | Loss | Mapping[str, Any]


def is_per_image(loss: LossChoice) -> bool:
    """Whether a loss is known to be a mean over the images, each on its own."""
    return all(isinstance(one, str) and one in ("auto", "kl", "mse", "cosine") for one in _held(loss))


def is_known(loss: LossChoice) -> bool:
    """Whether it is one of ours, of each output: never negative."""
    return all(isinstance(one, str) for one in _held(loss))


def compares_images(loss: LossChoice) -> str | None:
    """The name of a loss among those asked for that takes its negatives from the batch."""
    return next((one for one in _held(loss) if isinstance(one, str) and "infonce" in one), None)


def _held(loss: LossChoice) -> tuple[str | Loss, ...]:
    if isinstance(loss, JointLoss):
        return loss.losses
    return tuple(one for one in loss.values() if one is not None) if isinstance(loss, Mapping) else (loss,)


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    return functional.normalize(a, dim=1) @ functional.normalize(b, dim=1).T


def _need_negatives(candidate: Tensor) -> None:
    if len(candidate) < 2:
        raise ValueError("InfoNCE needs at least 2 images per batch for its negatives, got 1")


LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl": kl,
    "infonce": infonce,
    "soft_infonce": soft_infonce,
    "mse": mse,
    "cosine": cosine,
}


class _Scalar:
    """A function of the user's as a loss: it may work in place on what it is given, and return any kind of number.

    Raises:
        TypeError: it returns something else.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        self._function = function
        self._name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, candidate: Tensor, teacher: Tensor) -> Tensor:
        value = self._function(candidate.clone(), teacher.clone())
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            return value.reshape(())
        if isinstance(value, Real):
            return torch.tensor(float(value), dtype=torch.float64)
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        hint = "; return its mean over the images" if isinstance(value, Tensor) and value.numel() > 1 else ""
        raise TypeError(f"RefineConfig.loss: expected {self._name} to return one real number, got {got}{hint}")


def get_loss(loss: LossChoice, temperature: float) -> Loss:
    """A loss by name, with its temperature where it has one; a function is made safe (see `_Scalar`).

    `auto` is `kl` here: what it is, and what losses by name are, is decided where the outputs are known.
    """
    assert not isinstance(loss, Mapping)
    if isinstance(loss, JointLoss):
        return loss
    if not isinstance(loss, str):
        return _Scalar(loss)
    function = LOSSES["kl" if loss == "auto" else loss]
    if "infonce" not in loss:
        return function

    def tempered(candidate: Tensor, teacher: Tensor) -> Tensor:
        return function(candidate, teacher, temperature=temperature)

    return tempered


def get_exact_loss(loss: LossChoice, temperature: float) -> Loss:
    """As `get_loss`, for values that are compared with one another: those known by name are computed in float64.

    In float32 a KL of 1e-8 is what roundings of logarithms leave, and half of the time it is not above zero: there no
    candidate could be told from another, though outputs may be 25 dB apart. Functions of the user's are given what the
    model returns.
    """
    if isinstance(loss, JointLoss):
        return EachLoss(loss)
    function = get_loss(loss, temperature)
    if not isinstance(loss, str):
        return function

    def exact(candidate: Tensor, teacher: Tensor) -> Tensor:
        return function(_wide(candidate), _wide(teacher))

    return exact


class EachLoss:
    """A joint loss in float64, which also tells those of its outputs."""

    def __init__(self, joint: JointLoss) -> None:
        self.each = joint.each

    def __call__(self, candidate: Tensor, teacher: Tensor) -> Tensor:
        return self.each(candidate, teacher).mean()


def _wide(value: Tensor) -> Tensor:
    return (value.cpu() if value.device.type == "mps" else value).double()  # there is no float64 on it
