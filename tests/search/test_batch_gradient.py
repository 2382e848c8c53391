"""The gradient of a batch is the same, whatever the parts that it is computed in."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from helpers.cases import Case
from helpers.search import learnt, leaves_of
from torch import Tensor

from cptv_ao import RefineConfig
from cptv_ao.core.batches import Batch
from cptv_ao.core.losses import cosine, get_loss, kl
from cptv_ao.core.tensors import first_floating
from cptv_ao.evaluation.calibration import Calibration, Images, Pool
from cptv_ao.search.proposals import device_memory, part_runner
from cptv_ao.search.proposals.batch_gradient import BatchGradient
from cptv_ao.search.proposals.descent_objective import Objective
from cptv_ao.search.proposals.part_runner import PartGraph
from cptv_ao.search.proposals.step_images import StepImages


def found(case: Case, objective: Objective, pull: float | None = None) -> tuple[float, Tensor, float, int]:
    """Loss, gradient and pull of the features on a batch of 4, and the image forwards that they took."""
    images = case.batches[0]
    twin, batch, groups = learnt(case, images)
    leaves = leaves_of(groups)
    with torch.no_grad():
        teacher = case.float_model(images)
        gradient = BatchGradient(twin, groups, objective)
        loss, *rest = gradient.of(0, batch, teacher, leaves, pull)
        return float(loss), *rest, gradient.image_forwards


def near(gradient: Tensor, wanted: Tensor) -> bool:
    """A code that lies on a tie may fall to the other side where products are added up in another order."""
    return float((gradient - wanted).norm()) < 0.01 * float(wanted.norm())


def each_image_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "_GRAPH_BYTES", 1)


@pytest.mark.parametrize("loss", [kl, cosine])
def test_a_mean_over_images_needs_one_pass(conv: Case, monkeypatch: pytest.MonkeyPatch, loss: Any) -> None:
    whole = found(conv, Objective(loss, first_floating, per_image=True))
    each_image_alone(monkeypatch)
    parts = found(conv, Objective(loss, first_floating, per_image=True))
    assert parts[0] == pytest.approx(whole[0], rel=1e-3)
    assert near(parts[1], whole[1])
    assert parts[3] == whole[3] == 3 * 4


@pytest.mark.parametrize("name", ["infonce", "kl"])
def test_a_loss_that_is_not_known_to_be_one_takes_two(conv: Case, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The negatives of an image are in other parts."""
    objective = Objective(get_loss(name, 3.0), first_floating)
    whole = found(conv, objective)
    each_image_alone(monkeypatch)
    parts = found(conv, objective)
    assert parts[0] == pytest.approx(whole[0], rel=1e-3)
    assert near(parts[1], whole[1])
    assert (whole[3], parts[3]) == (3 * 4, 4 * 4)


def test_features_are_balanced_once_on_the_whole_batch(conv: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Objective(kl, first_floating, per_image=True, feature_weight=3.0)
    whole = found(conv, objective)
    each_image_alone(monkeypatch)
    parts = found(conv, objective)
    assert parts[2] == pytest.approx(whole[2], rel=0.01) and whole[2] > 0
    assert near(parts[1], whole[1])
    later = found(conv, objective, whole[2])
    assert near(later[1], whole[1])
    assert later[3] < parts[3], "later steps need no look at all parts first"


def test_the_graph_of_one_part_is_held_at_a_time(conv: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    each_image_alone(monkeypatch)
    alive: list[int] = []
    add_gradient = part_runner.PartGraph.add_gradient

    def seen(self: Any, *args: Any) -> None:
        alive.append(sum(type(one) is part_runner.PartGraph for one in gc.get_objects()))
        add_gradient(self, *args)

    monkeypatch.setattr(part_runner.PartGraph, "add_gradient", seen)
    found(conv, Objective(kl, first_floating, per_image=True, feature_weight=1.0), 1.0)
    assert alive == [1] * 4


@pytest.mark.parametrize("other", [False, True])
def test_the_network_in_float_teaches_where_it_gives_what_the_teacher_does(conv: Case, other: bool) -> None:
    """It runs for the layer inputs anyway; a teacher that gives something else is asked for each batch."""
    twin, first, groups = learnt(conv, conv.batches[0])
    batches = (first, *(Batch((images,), {}, len(images)) for images in conv.batches[1:3]))
    asked = []

    def teach(batch: Batch) -> Tensor:
        asked.append(batch)
        return conv.float_model(batch.args[0]) * (1.1 if other else 1.0)

    with torch.no_grad():
        scored = Images((first,), (teach(first),))
        images = StepImages(Calibration(RefineConfig(), scored, pool=Pool(batches, teach)), first.images)
        gradient = BatchGradient(twin, groups, Objective(kl, first_floating, True, feature_weight=1.0))
        asked.clear()
        assert gradient.begin(images)
        for index, batch in enumerate(batches):
            assert torch.allclose(images.at(index)[1], teach(batch), rtol=1e-3, atol=1e-4)
    once, compared_here = 1, len(batches)
    assert len(asked) == compared_here + (len(batches) if other else once)


def test_what_no_gradient_passes_leaves_that_of_the_other_end() -> None:
    """An op before the outputs that passes none: the layer inputs before it are followed all the same."""
    leaves = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    with torch.enable_grad():
        apart = 2 * leaves[1].sum()
    closed, half, total = torch.ones(4, 5), torch.tensor(0.5), torch.full((5,), 7.0)
    assert PartGraph(closed, torch.zeros(())).gradient(leaves, closed, half).tolist() == [0] * 5
    PartGraph(closed, torch.zeros(())).add_gradient(leaves, closed, 0.5, total)
    assert total.tolist() == [7] * 5
    with torch.enable_grad():
        again = 2 * leaves[1].sum()
    PartGraph(closed, again).add_gradient(leaves, closed, 0.5, total)
    assert total.tolist() == [7, 7, 8, 8, 8]
    assert PartGraph(closed, apart).gradient(leaves, closed, half).tolist() == [0, 0, 1, 1, 1]
