"""Which settings a search goes on with: those that it was started with, functions and objects among them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import Case
from helpers.damage import changed
from helpers.killed import refine

import cptv_ao


def square(candidate: torch.Tensor, teacher: torch.Tensor, power: float = 2.0) -> torch.Tensor:
    return (candidate - teacher).abs().pow(power).mean()


class Weighted:
    def __init__(self, weight: float) -> None:
        self.weight = torch.tensor([weight])

    def __call__(self, candidate: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (candidate - teacher).square().mean() * self.weight.sum()

    def measure(self, candidate: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self(candidate, teacher)


class Huber(torch.nn.Module):
    def __init__(self, beta: float) -> None:
        super().__init__()
        self.inner = torch.nn.SmoothL1Loss(beta=beta)

    def forward(self, candidate: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.inner(candidate, teacher)


LOSSES: dict[str, tuple[Any, Any]] = {
    "partial": (lambda: partial(square, power=2.0), lambda: partial(square, power=2.5)),
    "object": (lambda: Weighted(1.0), lambda: Weighted(2.0)),
    "bound method": (lambda: Weighted(1.0).measure, lambda: Weighted(2.0).measure),
    "module": (lambda: Huber(1.0), lambda: Huber(0.5)),
    "module of torch": (lambda: torch.nn.SmoothL1Loss(beta=1.0), lambda: torch.nn.SmoothL1Loss(beta=0.5)),
    "default": (lambda: lambda c, t, k=1.0: k * (c - t).square().mean(), lambda: lambda c, t, k=2.0: k * square(c, t)),
}


FEW: dict[str, Any] = {"gradient_steps": 0, "population": (), "equalize": False, "passes": 1, "evaluations": 1}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_of_the_users_own_is_known_again(conv: Case, tmp_path: Path, kind: str) -> None:
    make, other = LOSSES[kind]
    assert [e for e in refine(conv.copy(), tmp_path / "search", **FEW, loss=make()) if e.kind == "candidate"]
    assert not [e for e in refine(conv.copy(), tmp_path / "search", **FEW, loss=make()) if e.kind == "candidate"]
    with pytest.raises(
        cptv_ao.ScalesFileError, match=r"another config: loss is \S+ \(\w{16}\) there and \S+ \(\w{16}\) here"
    ):
        refine(conv, tmp_path / "search", **FEW, loss=other())


def site_by_site(sites: Any) -> dict[str, str]:
    names = [site.name for site in sites]
    return dict(zip(names, names, strict=True))


@pytest.mark.slow
def test_blocks_count_by_what_they_are(conv: Case, tmp_path: Path) -> None:
    refine(conv.copy(), tmp_path / "search", **FEW, blocks=lambda sites: {site.name: site.name for site in sites})
    by_other_words = refine(conv.copy(), tmp_path / "search", **FEW, blocks=site_by_site)
    assert not [event for event in by_other_words if event.kind == "candidate"]
    with pytest.raises(cptv_ao.ScalesFileError, match=r"another config: blocks is .* blocks .* there and 1 blocks"):
        refine(conv.copy(), tmp_path / "search", **FEW, blocks=lambda sites: {site.name: "all" for site in sites})
    refine(conv.copy(), tmp_path / "default", **FEW)
    refine(conv, tmp_path / "default", **FEW, blocks=cptv_ao.blocks_by_path)


@pytest.mark.parametrize(
    ("where", "told"), [("there", "1 there and no setting here"), ("here", "no setting there and")]
)
def test_settings_of_another_version_are_named(conv: Case, tmp_path: Path, where: str, told: str) -> None:
    def change(_: Any, data: dict[str, Any]) -> None:
        config = data["fingerprint"]["config"]
        if where == "there":
            config["of_a_newer_version"] = "1"
        else:
            del config["racing"]

    refine(conv.copy(), tmp_path / "search", **FEW)
    changed(tmp_path / "search", change)
    name = "of_a_newer_version" if where == "there" else "racing"
    with pytest.raises(cptv_ao.ScalesFileError, match=f"another config: {name} is {told}"):
        refine(conv, tmp_path / "search", **FEW)
