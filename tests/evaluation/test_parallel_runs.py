"""Parts of a batch run side by side where torch has cores for it, and nobody can tell from the result."""

from __future__ import annotations

from collections.abc import Iterator
from threading import get_ident
from typing import Any

import pytest
import torch
from helpers import nets
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from cptv_ao.core import losses
from cptv_ao.core.batches import Batch
from cptv_ao.evaluation.evaluator import Evaluator
from cptv_ao.evaluation.parallel_runs import ParallelRuns, may_share, results


@pytest.fixture
def eight_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def converted() -> GraphModule:
    return nets.quantize(nets.seeded(nets.ConvNet), [nets.images(8, 3, 16, 16)])[1]


def batches(*sizes: int) -> list[Batch]:
    return [Batch((nets.images(size, 3, 16, 16, seed=seed),), {}, size) for seed, size in enumerate(sizes)]


def evaluated(model: GraphModule, held: list[Batch]) -> tuple[float, list[Tensor]]:
    with torch.no_grad():
        teacher = [model(*batch.args).roll(1, 0) for batch in held]
    evaluator = Evaluator(model, held, teacher, losses.kl)
    evaluator.check()
    return evaluator.score(), evaluator.outputs()


def test_losses_and_outputs_are_those_of_one_thread(converted: GraphModule, eight_threads: None) -> None:
    held = batches(16, 9, 3, 32)
    side_by_side = evaluated(converted, held)
    assert ParallelRuns.of(converted) is not None
    assert torch.get_num_threads() == 8
    torch.set_num_threads(1)
    loss, outputs = evaluated(converted, held)
    assert side_by_side[0] == pytest.approx(loss, rel=1e-6)
    for one, other in zip(side_by_side[1], outputs, strict=True):
        torch.testing.assert_close(one, other)


def test_parts_are_in_order_and_run_in_threads_of_their_own(eight_threads: None) -> None:
    seen: dict[int, int] = {}

    def model(images: Tensor) -> Tensor:
        seen[int(images[0])] = get_ident()
        assert torch.get_num_threads() == 2
        assert torch.is_inference_mode_enabled()
        return images * 2

    runs = ParallelRuns(model, 4)
    images = torch.arange(40.0)
    assert torch.equal(torch.cat(results(runs.begin(0, Batch((images,), {}, 40)))), images * 2)
    assert sorted(seen) == [0, 10, 20, 30]
    assert get_ident() not in seen.values()
    assert len(runs.begin(0, Batch((images[:6],), {}, 6))) == 1
    assert len(runs.begin(0, Batch((images,), {}, 40, fixed=True))) == 1


def test_a_model_that_fails_says_on_which_batch(eight_threads: None) -> None:
    from cptv_ao.core.errors import CalibrationDataError

    def model(_: Tensor) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(CalibrationDataError, match="batch 7"):
        results(ParallelRuns(model, 4).begin(7, Batch((torch.zeros(8),), {}, 8)))


class Counts(nn.Module):
    """Keeps something from one run to the next."""

    def forward(self, images: Tensor) -> Tensor:
        return images


class Leaf(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Counts) or super().is_leaf_module(module, name)


def hooked(converted: GraphModule) -> Any:
    return next(module for module in converted.modules() if module is not converted).register_forward_hook


def test_who_may_share_a_model(converted: GraphModule) -> None:
    assert may_share(converted)
    handle = hooked(converted)(lambda *_: None)
    assert not may_share(converted)
    handle.remove()
    own = nn.Sequential(nn.Linear(2, 2), Counts())
    assert not may_share(GraphModule(own, Leaf().trace(own)))
    assert may_share(symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    if "qnnpack" in torch.backends.quantized.supported_engines:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "qnnpack"
        try:
            assert not may_share(converted)
        finally:
            torch.backends.quantized.engine = before


def test_few_cores_run_one_batch_after_another(converted: GraphModule) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert ParallelRuns.of(converted) is None
    finally:
        torch.set_num_threads(before)
