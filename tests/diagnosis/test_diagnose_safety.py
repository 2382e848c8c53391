"""What `diagnose` leaves alone, also where something is raised, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from helpers.cases import Case
from helpers.diagnosed import diagnosed
from helpers.quick import some
from helpers.state import everything, generators
from torch import Tensor

import cptv_ao
from cptv_ao.core.losses import kl


def test_the_model_is_only_read(case: Case) -> None:
    case.converted.train()
    case.float_model.train()
    case.float_model.get_submodule(next(n for n, _ in case.float_model.named_modules() if n)).eval()
    models, random = (case.converted, case.float_model), generators()
    given = [everything(model) for model in models]
    batches = [batch.clone() for batch in case.batches]
    first = diagnosed(case)
    assert [everything(model) for model in models] == given
    assert all(torch.equal(a, b) for a, b in zip(case.batches, batches, strict=True))
    assert generators() == random
    assert diagnosed(case) == first, "and the same again"


def test_a_pt2e_graph_is_only_read() -> None:
    model, converted = pt2e.small_model()
    before = [str(node.args) for node in converted.graph.nodes]
    given = [everything(converted), everything(model)]
    cptv_ao.diagnose(converted, pt2e.BATCHES, float_model=model, progress=False)
    assert [everything(converted), everything(model)] == given
    assert [str(node.args) for node in converted.graph.nodes] == before


@pytest.mark.parametrize("at", some(0, 22, 55, 99, others=range(0, 100, 11)))
def test_an_error_anywhere_leaves_the_model(conv: Case, at: int) -> None:
    conv.converted.train()
    given = [everything(conv.converted), everything(conv.float_model)]
    calls = 0

    def failing(candidate: Tensor, teacher: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > at:
            raise KeyboardInterrupt
        return kl(candidate, teacher)

    with pytest.raises(KeyboardInterrupt):
        diagnosed(conv, config=cptv_ao.RefineConfig(loss=failing))
    assert [everything(conv.converted), everything(conv.float_model)] == given


def test_no_more_images_are_read_than_needed(conv: Case) -> None:
    read = 0

    def loader() -> Iterator[Any]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield nets.images(30, 3, 16, 16, seed=read), "a label"

    found = cptv_ao.diagnose(conv.converted, loader(), float_model=conv.float_model, progress=False)
    assert found.images == 128
    assert read == 5


def test_wrong_calls(conv: Case) -> None:
    with pytest.raises(TypeError, match="config: expected a RefineConfig, got dict"):
        diagnosed(conv, config={})
    with pytest.raises(cptv_ao.UnsupportedModelError, match="expected the GraphModule"):
        cptv_ao.diagnose(conv.float_model, conv.batches)  # type: ignore[arg-type]
    with pytest.raises(cptv_ao.CalibrationDataError, match="empty"):
        cptv_ao.diagnose(conv.converted, [], float_model=conv.float_model)
    with pytest.raises(cptv_ao.FloatModelMismatchError):
        diagnosed(conv, float_model=nets.seeded(nets.ConvNet, seed=1))
    one = [batch[:1] for batch in conv.batches]
    with pytest.raises(cptv_ao.CalibrationDataError, match="needs at least 2 images"):
        cptv_ao.diagnose(conv.converted, one, config=cptv_ao.RefineConfig(loss="infonce"))
