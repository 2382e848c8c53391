"""Which loss is used on the outputs of a model, and whether it can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cptv_ao.core.config import RefineConfig
from cptv_ao.core.losses import kl, mse
from cptv_ao.core.objective import differentiable, settled

TEACHER = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
SINGLE = TEACHER[:, :1]


def blind(candidate: Tensor, teacher: Tensor) -> Tensor:
    return teacher.square().mean() + 0 * candidate.sum()


def in_numbers(candidate: Tensor, teacher: Tensor) -> Any:
    return float((candidate - teacher).abs().mean())


@pytest.mark.parametrize(("teacher", "wanted"), [(TEACHER, "kl"), (SINGLE, "mse")])
def test_auto_sees_the_output(teacher: Tensor, wanted: str) -> None:
    config, told = settled(RefineConfig(loss="auto"), teacher)
    assert config.loss == wanted
    assert bool(told) == (wanted == "mse")


@pytest.mark.parametrize(("kind", "wanted"), [("logits", "kl"), ("embedding", "cosine"), ("map", "mse")])
def test_auto_suits_what_the_output_is(kind: Any, wanted: str) -> None:
    config, told = settled(RefineConfig(loss="auto"), TEACHER, kind)
    assert config.loss == wanted
    assert bool(told) == (kind != "logits"), "what is not the usual is said"
    assert settled(RefineConfig(loss="auto"), SINGLE, kind)[0].loss == "mse", "of one number nothing else sees anything"
    assert settled(RefineConfig(loss="infonce"), TEACHER, kind) == (RefineConfig(loss="infonce"), [])


def test_a_loss_that_cannot_see_the_output_is_refused() -> None:
    for name in ("kl", "cosine"):
        with pytest.raises(ValueError, match="expected a loss that sees an output of one number per image"):
            settled(RefineConfig(loss=name), SINGLE)
        assert settled(RefineConfig(loss=name), TEACHER)[0].loss == name
    with pytest.raises(ValueError, match="higher for worse outputs, got blind"):
        settled(RefineConfig(loss=blind), TEACHER)


def test_what_a_descent_can_follow() -> None:
    assert differentiable(kl, TEACHER) and differentiable(mse, SINGLE)
    assert not differentiable(in_numbers, TEACHER)
    assert not differentiable(lambda c, t: mse(c.detach(), t), TEACHER)
    assert not differentiable(lambda c, t: (c.argmax(1) != t.argmax(1)).float().mean(), TEACHER)


@pytest.mark.parametrize(
    ("weight", "told"),
    [(0.0, "the loss cannot be differentiated: no gradient steps"), (1.0, "follow the inputs of the layers alone")],
)
def test_gradient_steps_without_a_gradient_are_told(weight: float, told: str) -> None:
    (note,) = settled(RefineConfig(loss=in_numbers, gradient_steps=10, feature_weight=weight), TEACHER)[1]
    assert told in note
    assert settled(RefineConfig(loss=in_numbers, gradient_steps=0, feature_weight=weight), TEACHER)[1] == []
