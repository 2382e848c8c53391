"""The vectorised losses against explicit double loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import nets
from torch import Tensor

from cptv_ao.core import losses
from cptv_ao.core.losses import get_exact_loss, get_loss

ROWS, CLASSES = 7, 5


@pytest.fixture
def candidate() -> Tensor:
    return nets.images(ROWS, CLASSES, seed=1).double()


@pytest.fixture
def teacher() -> Tensor:
    return nets.images(ROWS, CLASSES, seed=2).double()


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def cosine_of(a: Tensor, b: Tensor) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def divergence(wanted: list[float], found: list[float]) -> float:
    """KL of two rows of logarithms."""
    return sum(math.exp(w) * (w - f) for w, f in zip(wanted, found, strict=True))


def similarities(a: Tensor, b: Tensor, temperature: float) -> list[list[float]]:
    return [log_softmax([cosine_of(q, k) / temperature for k in b]) for q in a]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_infonce(candidate: Tensor, teacher: Tensor, temperature: float) -> None:
    rows = similarities(candidate, teacher, temperature)
    wanted = sum(-row[i] for i, row in enumerate(rows)) / ROWS * 2 * temperature
    assert float(losses.infonce(candidate, teacher, temperature=temperature)) == pytest.approx(wanted, rel=1e-12)
    assert float(get_loss("infonce", temperature)(candidate, teacher)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.2, 3.0])
def test_soft_infonce(candidate: Tensor, teacher: Tensor, temperature: float) -> None:
    found, wanted = similarities(candidate, teacher, temperature), similarities(teacher, teacher, temperature)
    value = sum(divergence(w, f) for w, f in zip(wanted, found, strict=True)) / ROWS * 2 * temperature
    assert float(losses.soft_infonce(candidate, teacher, temperature=temperature)) == pytest.approx(value, rel=1e-12)
    assert float(get_loss("soft_infonce", temperature)(candidate, teacher)) == pytest.approx(value, rel=1e-12)


def test_kl(candidate: Tensor, teacher: Tensor) -> None:
    pairs = zip(teacher.tolist(), candidate.tolist(), strict=True)
    wanted = sum(divergence(log_softmax(t), log_softmax(c)) for t, c in pairs) / ROWS
    assert float(losses.kl(candidate, teacher)) == pytest.approx(wanted, rel=1e-12)


def test_mse(candidate: Tensor, teacher: Tensor) -> None:
    squares = [(float(candidate[i, j]) - float(teacher[i, j])) ** 2 for i in range(ROWS) for j in range(CLASSES)]
    assert float(losses.mse(candidate, teacher)) == pytest.approx(sum(squares) / len(squares), rel=1e-12)


def test_cosine(candidate: Tensor, teacher: Tensor) -> None:
    wanted = sum(1 - cosine_of(c, t) for c, t in zip(candidate, teacher, strict=True)) / ROWS
    assert float(losses.cosine(candidate, teacher)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", ["kl", "soft_infonce", "mse", "cosine"])
def test_a_perfect_candidate_has_no_loss_and_none_is_negative(name: str, teacher: Tensor) -> None:
    loss = get_loss(name, 3.0)
    assert float(loss(teacher, teacher)) == pytest.approx(0, abs=1e-12)
    for seed in range(5):
        near = teacher.float() + 1e-4 * nets.images(ROWS, CLASSES, seed=seed)
        assert float(loss(near, teacher.float())) >= 0


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_losses_of_batches_average_by_their_images(name: str) -> None:
    """The mean over images: duplicating the images changes nothing (negatives in InfoNCE aside)."""
    a, b = nets.images(ROWS, CLASSES, seed=3), nets.images(ROWS, CLASSES, seed=4)
    loss = get_loss(name, 3.0)
    twice = float(loss(torch.cat([a, a]), torch.cat([b, b])))
    extra = 2 * 3.0 * math.log(2) if name == "infonce" else 0.0
    assert twice == pytest.approx(float(loss(a, b)) + extra, rel=1e-5)


@pytest.mark.parametrize("loss", [losses.infonce, losses.soft_infonce])
def test_one_image_has_no_negatives(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="needs at least 2 images per batch for its negatives, got 1"):
        loss(torch.ones(1, 3), torch.ones(1, 3))


@pytest.mark.parametrize("name", ["kl", "soft_infonce", "mse", "cosine"])
def test_small_losses_of_float32_outputs_mean_something(name: str) -> None:
    """Halving a small error quarters its loss, whatever float32 makes of it."""
    teacher, error = nets.images(ROWS, CLASSES, seed=1), nets.images(ROWS, CLASSES, seed=2)
    for size in (1e-3, 1e-5):
        near, nearer = teacher + size * error, teacher + size / 2 * error
        exact = get_exact_loss(name, 3.0)
        ratio = float(exact(near, teacher)) / float(exact(nearer, teacher))
        assert ratio == pytest.approx(4, rel=2e-2), size
    assert float(exact(teacher, teacher)) == pytest.approx(0, abs=1e-15)


def test_functions_of_the_user_are_given_what_the_model_returns() -> None:
    seen: list[torch.dtype] = []

    def own(candidate: Tensor, teacher: Tensor) -> Tensor:
        seen.extend((candidate.dtype, teacher.dtype))
        return (candidate - teacher).abs().mean()

    get_exact_loss(own, 3.0)(torch.ones(2, 3), torch.zeros(2, 3))
    assert seen == [torch.float32, torch.float32]
