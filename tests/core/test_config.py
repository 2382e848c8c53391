"""Settings are validated when they are made, each with its name in the message."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cptv_ao import RefineConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", "l2"),
        ("loss", 3),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "3"),
        ("search", "random"),
        ("gradient_steps", -1),
        ("gradient_steps", 1.5),
        ("learning_rate", 0),
        ("learning_rate", -0.1),
        ("passes", -1),
        ("passes", True),
        ("passes", 2.0),
        ("evaluations", 0),
        ("include", "blocks.*"),
        ("include", ["blocks.*"]),
        ("include", (1,)),
        ("kinds", ()),
        ("kinds", ("weights",)),
        ("kinds", "weight"),
        ("blocks", "blocks_by_path"),
        ("block_order", "random"),
        ("weight_range", (-4,)),
        ("weight_range", (3, -4)),
        ("weight_range", (-200, 3)),
        ("weight_range", 3),
        ("holdout", 1.0),
        ("holdout", -0.1),
        ("holdout", "0.2"),
        ("holdout", float("nan")),
        ("output", 3),
        ("output", ()),
        ("output", ("a", 1)),
        ("loss", {"a": "nll"}),
        ("loss", {"a": 3}),
        ("score_on", "gpu"),
        ("seed", -1),
        ("seed", 0.5),
        ("max_evaluations", -1),
        ("max_evaluations", 2.5),
        ("max_seconds", 0),
        ("max_seconds", float("nan")),
        ("epsilon", 0.0),
    ],
)
def test_an_invalid_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"RefineConfig\.{name}: expected .*, got "):
        RefineConfig(**{name: value})


@pytest.mark.parametrize(
    "value", ["auto", "kl", "infonce", "soft_infonce", "mse", "cosine", lambda a, b: (a - b).abs().mean()]
)
def test_every_loss_is_accepted(value: Any) -> None:
    assert RefineConfig(loss=value).loss is value


def test_it_is_frozen_and_by_keyword() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RefineConfig().seed = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        RefineConfig("kl")  # type: ignore[misc]


@pytest.mark.parametrize(("bits", "epsilon"), [(3, 1e-3), (4, 1e-3), (8, 1e-4)])
def test_the_published_settings(bits: int, epsilon: float) -> None:
    config = RefineConfig.paper(weight_bits=bits)
    assert (config.search, config.loss, config.temperature, config.epsilon) == ("paper", "infonce", 3.0, epsilon)
    assert (config.passes, config.evaluations, config.block_order) == (10, 3, "backward")
    assert (config.include, config.kinds, config.gradient_steps) == (("*attn*",), ("weight",), 0)


def test_the_published_settings_can_be_changed() -> None:
    config = RefineConfig.paper(weight_bits=3, seed=5, passes=1)
    assert (config.seed, config.passes, config.search) == (5, 1, "paper")
