"""Every chain of ops that torch fuses, from its own lists: the float twin has the codes of the fused kernel."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_nets import BACKENDS, ENGINES, FLAT, LINE, PLANE, SOLID, Around, Functional, Pair, quantized, trained
from torch import Tensor, nn
from torch.nn import functional

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.simulation.twin import Twin

Chain = tuple[Any, ...]


def called(convolution: Any, rank: int) -> Any:
    """With all its arguments, which lowering asks for."""
    one, zero = (1, 0) if rank == 1 else ([1] * rank, [0] * rank)
    return lambda x, weight, bias: convolution(x, weight, bias, one, zero, one, 1)


# What a chain begins with, and the shape of its input. Transposed convolutions are given as many channels as they give:
# torch's kernel computes something else where these differ.
FIRST: dict[Any, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    nn.Linear: (lambda: nn.Linear(8, 4), FLAT),
    nn.Conv1d: (lambda: nn.Conv1d(3, 4, 3), LINE),
    nn.Conv2d: (lambda: nn.Conv2d(3, 4, 3), PLANE),
    nn.Conv3d: (lambda: nn.Conv3d(3, 4, 3), SOLID),
    nn.ConvTranspose1d: (lambda: Around(nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 4, 3)), LINE),
    nn.ConvTranspose2d: (lambda: Around(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3)), PLANE),
    nn.ConvTranspose3d: (lambda: Around(nn.Conv3d(3, 4, 3), nn.ConvTranspose3d(4, 4, 3)), SOLID),
    nn.BatchNorm2d: (lambda: trained(nn.BatchNorm2d(3)), PLANE),
    nn.BatchNorm3d: (lambda: trained(nn.BatchNorm3d(3)), SOLID),
    functional.linear: (lambda: Functional(functional.linear, 4, 8), FLAT),
    functional.conv1d: (lambda: Functional(called(functional.conv1d, 1), 4, 3, 3), LINE),
    functional.conv2d: (lambda: Functional(called(functional.conv2d, 2), 4, 3, 3, 3), PLANE),
    functional.conv3d: (lambda: Functional(called(functional.conv3d, 3), 4, 3, 3, 3, 3), SOLID),
    operator.add: (lambda: Pair(operator.add), FLAT),
    operator.mul: (lambda: Pair(operator.mul), FLAT),
    torch.add: (lambda: Pair(torch.add), FLAT),
    torch.mul: (lambda: Pair(torch.mul), FLAT),
}
NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}


class Then(nn.Module):
    """One after another; functions are called as such."""

    def __init__(self, first: nn.Module, rest: Chain) -> None:
        super().__init__()
        self.first, self.ops = first, []
        for index, op in enumerate(rest):
            if isinstance(op, type):
                made = trained(op(4)) if op in NORMS else op()
                self.add_module(f"part{index}", made)
                self.ops.append(made)
            else:
                self.ops.append(op)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for op in self.ops:
            x = op(x)
        return x


def chains(engine: str) -> dict[str, Chain]:
    """By name; those that are trees (oneDNN's fused add, which `test_op_parity` has) are none."""
    found = {}
    for config in BACKENDS[engine]().configs:
        if isinstance(config.pattern, tuple) and not any(isinstance(part, tuple) for part in config.pattern):
            names = [f"{getattr(part, '__module__', '')}.{getattr(part, '__name__', part)}" for part in config.pattern]
            found[" ".join(names)] = config.pattern
    return found


CASES = [(engine, name) for engine in ENGINES for name in chains(engine)]


def test_torch_has_so_many() -> None:
    assert {engine: len(chains(engine)) > 40 for engine in ENGINES} == dict.fromkeys(ENGINES, True)


@pytest.mark.parametrize(
    ("engine", "name"),
    [pytest.param(*case, marks=pytest.mark.slow if number % 2 else ()) for number, case in enumerate(CASES)],
    ids=str,
)
def test_the_twin_has_the_codes_of_a_fused_kernel(engine: str, name: str) -> None:
    first, *rest = chains(engine)[name]
    if engine == "qnnpack" and first is nn.ConvTranspose3d:
        pytest.skip("the kernel gives other numbers each time")
    make, shape = FIRST[first]
    try:
        model, images = quantized(lambda: Then(make(), tuple(rest)), shape, engine)
    except AssertionError as error:  # of torch's fuser
        pytest.skip(f"torch cannot do it on {engine}: {error}")
    with torch.no_grad():
        wanted = model(images.clone())
        twin = Twin(Backend(model)).checked(Batch((images,), {}, len(images)))
        found = twin(images)
    if engine != "qnnpack":  # whose convolutions of volumes are computed by the kernel itself
        assert twin.notes == [], "a kernel computes it"
    steps = wanted.unique().diff()
    off = (found - wanted).abs() / float(steps[steps > 1e-6].min())
    assert float(off.max()) < 1.01
    assert float((off > 0.01).float().mean()) <= 0.02
