"""A step of the descent on a GPU: what it may not do, and what happens where the card is full. Most of it is seen
without one: tensors of the meta device hold no number that could be read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.cases import Case
from helpers.search import learnt, leaves_of
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.losses import kl
from cptv_ao.core.precision import gpu_products
from cptv_ao.core.qparams import QParams
from cptv_ao.core.tensors import first_floating
from cptv_ao.search.proposals.batch_gradient import BatchGradient
from cptv_ao.search.proposals.captured import Captured
from cptv_ao.search.proposals.descent_objective import Objective
from cptv_ao.search.proposals.feature_matching import _scaled, _target
from cptv_ao.search.proposals.learnable_qparams import LearnableQParams
from cptv_ao.search.proposals.part_runner import PartRunner
from cptv_ao.simulation.layer_inputs import layer_inputs
from cptv_ao.simulation.twin import Twin

LEAVES = ("log_scale", "offset", "shift")
OBJECTIVE = Objective(kl, first_floating, per_image=True, feature_weight=3.0)


def on(device: str, leaf: Tensor | None) -> Tensor | None:
    return None if leaf is None else leaf.detach().to(device).requires_grad_()


def opened(case: Case, device: str) -> tuple[Twin, list[LearnableQParams], list[Tensor], Batch, Tensor]:
    """A twin, what is learnt of it, the leaves of that, a batch, and its targets."""
    images = case.batches[0]
    twin, batch, groups = learnt(case, images)
    with torch.no_grad():
        teacher = case.float_model(images).to(device)
    twin.to(device)
    groups = [replace(group, **{k: on(device, getattr(group, k)) for k in LEAVES}) for group in groups]
    leaves = leaves_of(groups)
    return twin, groups, leaves, replace(batch, args=(images.to(device),)), teacher


@pytest.mark.parametrize("name", ["conv", "vit_w3"])
def test_a_step_reads_no_number_on_the_host(name: str, request: pytest.FixtureRequest) -> None:
    twin, groups, leaves, batch, teacher = opened(request.getfixturevalue(name), "meta")
    gradient = BatchGradient(twin, groups, OBJECTIVE)
    with twin.in_float(twin.names):
        found = layer_inputs(twin, batch).items()
    wanted = {layer: _target(*_scaled(value), layer.channel_dim)[0] for layer, value in found}
    graph = gradient._runner._graph(batch, wanted)
    pull = OBJECTIVE.pull(graph.outputs, teacher)[1]
    total = graph.gradient(leaves, pull, torch.zeros((), device="meta"))
    assert total.is_meta and total.numel() == sum(leaf.numel() for leaf in leaves)


@pytest.mark.parametrize("fits", [0, 1, 2, 3])
def test_where_the_card_is_full_parts_are_halved(conv: Case, monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    twin, groups, leaves, batch, teacher = opened(conv, "cpu")
    whole = BatchGradient(twin, groups, OBJECTIVE)
    wanted = whole.of(0, batch, teacher, leaves, 2.0)[1]
    tried: list[int] = []
    forward = PartRunner.forward

    def full(self: Any, key: Any, part: Batch, *rest: Any) -> Any:
        tried.append(part.images)
        if part.images > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, key, part, *rest)

    monkeypatch.setattr(PartRunner, "forward", full)
    cut = BatchGradient(twin, groups, OBJECTIVE)
    cut._most = batch.images
    if fits == 0:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            cut.of(0, batch, teacher, leaves, 2.0)
        return
    total = cut.of(0, batch, teacher, leaves, 2.0)[1]
    assert tried[0] == batch.images == 4 and max(tried[-(batch.images // min(fits, 2)) :]) <= fits
    assert float((total - wanted).norm()) < 0.01 * float(wanted.norm())


def test_a_stamp_says_what_a_recorded_run_would_not_see(vit_w3: Case) -> None:
    twin, groups, *_ = opened(vit_w3, "cpu")
    name = next(group.sites[0].name for group in groups if group.shift is not None)
    now, before = twin.sites.get(name), twin.stamp()
    twin.sites.set(name, QParams(now.scale * 1.5, now.zero_point))
    assert twin.stamp() == before, "numbers are read where they are"
    corrected = replace(now, correction=torch.ones(len(now.scale)))
    for change in (
        lambda: twin.sites.limit([twin.names[0]], 63),
        lambda: twin.reround_weights(False),
        lambda: twin.sites.set(name, corrected),
    ):
        change()
        assert twin.stamp() != before
        before = twin.stamp()
    twin.sites.set(name, replace(now, correction=corrected.correction * 2))
    assert twin.stamp() == before, "another correction is read where the first one was"
    assert float(twin.sites.get(name).correction[0]) == 2.0 and float(corrected.correction[0]) == 1.0
    shifted = replace(corrected, shift=torch.ones_like(twin.sites.modules[name].codes, dtype=torch.int8))
    own = {name: ("scale", "shift")}
    before = twin.stamp(own)
    for _ in range(2):
        twin.sites.set(name, shifted)
        assert twin.stamp(own) == before, "what a leaf stands for is not read"
    assert twin.stamp() != before


def test_products_are_as_they_were_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with gpu_products(tf32=False):
        assert torch.get_float32_matmul_precision() == "highest"
        with gpu_products(tf32=True):
            assert torch.get_float32_matmul_precision() == "high"
            assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"


def test_what_is_recorded_is_the_step(vit_w3: Case) -> None:
    """Where nothing can be recorded, the very computation runs as it is."""
    twin, groups, leaves, batch, teacher = opened(vit_w3, "cpu")
    recorded, eager = (BatchGradient(twin, groups, OBJECTIVE) for _ in range(2))
    recorded._runner.captured = Captured()
    recorded._runner.captured.refused = "no card"
    with torch.no_grad():
        found, wanted = (gradient.of(0, batch, teacher, leaves, 2.0) for gradient in (recorded, eager))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert recorded.image_forwards == eager.image_forwards


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_launch_is_the_step_that_was_recorded(vit_w3: Case) -> None:
    twin, groups, leaves, batch, teacher = opened(vit_w3, "cuda")
    launched, eager = (BatchGradient(twin, groups, OBJECTIVE) for _ in range(2))
    eager._runner.captured = None
    for _ in range(3):
        with torch.no_grad():
            wanted = eager.of(0, batch, teacher, leaves, 2.0)[1]
            total = launched.of(0, batch, teacher, leaves, 2.0)[1]
            captured = launched._runner.captured
            assert captured is not None and not captured.refused
            assert float((total - wanted).norm()) < 1e-4 * float(wanted.norm())
            for leaf in leaves:
                leaf.add_(0.01)
