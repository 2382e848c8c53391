"""Equivalent forms are used where they are equivalent, whatever a pattern says, and left where they are not."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.search import small_config
from helpers.state import everything
from helpers.uneven import TracedNorm, uneven
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import ALONE
from cptv_ao.simulation.nothing_rounded import NothingRounded
from cptv_ao.transforms.equalize import equalize
from cptv_ao.transforms.equivalence import Equivalence, forms_used, largest
from cptv_ao.transforms.lowered_patterns import Patterns

TOKENS = list(nets.images(64, 16, 16).split(16))
VECTORS = list(nets.images(64, 16).split(16))
IMAGES = list(nets.images(24, 3, 8, 8).split(6))


class Normed(nn.Module):
    """A linear layer, a batch norm over dimension 1 of what it gives, and a ReLU."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.a, self.bn, self.head = nn.Linear(16, 16), nn.BatchNorm1d(size), nn.Linear(16, 10)
        nn.init.normal_(self.bn.running_mean)
        nn.init.uniform_(self.bn.running_var, 0.05, 9)
        nn.init.uniform_(self.bn.weight, -1, 2)

    def forward(self, x: Tensor) -> Tensor:
        bn, y = self.bn, self.a(x)
        y = functional.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps)
        return self.head(y.relu()).flatten(1)


class Plain(nn.Module):
    """What can be folded, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), TracedNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.bn(self.conv(x)))
        return self.head(x.mean((2, 3)))


def opened(model: nn.Module, batches: list[Tensor], bits: int = 8) -> tuple[Backend, Any]:
    converted = nets.quantize(model, batches, weight_bits=bits)[1]
    backend = Backend(converted)
    attach_float_weights(backend, model)
    return backend, converted


def error(converted: nn.Module, model: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return float(torch.cat([converted(b) - model(b) for b in batches]).square().mean())


def refine(converted: GraphModule, model: nn.Module | None, batches: list[Tensor], **changes: Any) -> cptv_ao.Report:
    config = small_config(**({"loss": "mse", "gradient_steps": 12, "evaluations": 4, "holdout": 0} | changes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cptv_ao.CptvWarning)
        cptv_ao.refine(converted, batches, float_model=model, config=config, progress=False)
    return cptv_ao.report(converted)


@pytest.mark.parametrize("with_float_model", [True, False])
@pytest.mark.parametrize("score_on", ["kernels", "simulation"])
@pytest.mark.parametrize("tokens", [16, 12])
@torch.no_grad()
def test_a_norm_over_tokens_is_not_folded_into_channels(tokens: int, score_on: Any, with_float_model: bool) -> None:
    """The linear layer's channels are the last dimension, the norm's are dimension 1, though as many."""
    model, batches = nets.seeded(lambda: Normed(tokens)), [batch[:, :tokens] for batch in TOKENS]
    backend, converted = opened(model, batches)
    assert len(Patterns(backend).unfused_norms()) == 1
    before = error(converted, model, batches)
    done = equalize(backend, [Batch((batches[0],), {}, 16)])
    assert not [line for line in done if "folded" in line]
    assert error(converted, model, batches) < 1.2 * before
    backend, converted = opened(model, batches, 3)
    before = error(converted, model, batches)
    report = refine(converted, model if with_float_model else None, batches, score_on=score_on)
    assert report.after.search < report.before.search
    assert error(converted, model, batches) < before or not with_float_model


@torch.no_grad()
def test_a_norm_over_the_channels_of_a_linear_layer_is_folded() -> None:
    model = nets.seeded(Normed)
    backend, converted = opened(model, VECTORS)
    before = error(converted, model, VECTORS)
    assert "1 batch norm folded" in equalize(backend, [Batch((VECTORS[0],), {}, 16)])[0]
    assert error(converted, model, VECTORS) < before


@torch.no_grad()
def test_forms_at_fault_are_found_among_others() -> None:
    """Of what is written into a model, that which makes it another one is taken back, and nothing else."""
    model = uneven()
    backend, converted = opened(model, IMAGES)
    given = everything(converted)["state_dict"]
    names = [name for name, site in backend.sites.items() if site.kind == "weight" and len(site.nodes) == 1]
    wrong = {names[1], names[-1]}

    def scale(name: str) -> str:
        """Twice the weight, half the bias added; or, in vain, the weight as it is on another scale."""
        now = backend.read(name)
        if name in wrong:
            backend.weights.set_float(name, backend.float_weights[name] * 2)
        backend.write(name, cptv_ao.QParams(now.scale * 1.01, now.zero_point))
        return name

    check = Equivalence(backend, NothingRounded(backend, Batch((IMAGES[0],), {}, 6)), ALONE)
    scales = {name: backend.read(name).scale for name in names}
    assert set(check.used(names, scale)) == set(names) - wrong
    moved = {name for name in names if not torch.equal(backend.read(name).scale, scales[name])}
    assert moved == set(names) - wrong
    refused = check.used(
        names, lambda name: backend.write(name, cptv_ao.QParams(scales[name] * 0, scales[name].long()))
    )
    assert refused == [], "a scale of zero"
    assert everything(converted)["state_dict"] != given


@torch.no_grad()
def test_only_what_nothing_reads_may_be_clipped() -> None:
    backend, _ = opened(uneven(), IMAGES)
    check = Equivalence(backend, NothingRounded(backend, Batch((IMAGES[0],), {}, 6)), ALONE)
    clipped = Patterns(backend).clipped_sites()
    ranges = {backend.sites[part.site].nodes[0]: (0.0, part.high) for part in clipped}
    read = {site.nodes[0]: (0.0, 1e9) for site in backend.sites.values() if site.name in ("conv3.output", "fc.output")}
    assert ranges and check.clipped(ranges)
    assert read and not check.clipped(read) and not check.clipped(ranges | read)
    both = [*ranges, *read]
    assert set(largest(both, lambda part: check.clipped({node: (ranges | read)[node] for node in part}))) == set(ranges)


@pytest.mark.parametrize("helps", [True, False])
def test_without_a_twin_the_kernels_confirm_it_or_it_is_left(helps: bool) -> None:
    """Channels of very different sizes gain from it."""
    model = nets.seeded(Plain)
    with torch.no_grad():
        conv: Any = model.get_submodule("conv")
        conv.weight.mul_(torch.logspace(-1, 1, 8).reshape(8, 1, 1, 1))
        model.train()(nets.images(64, 3, 8, 8, seed=1))
        model.eval()
    _, converted = opened(model, IMAGES)
    nets.without_twin(converted)
    start, given = error(converted, model, IMAGES), everything(converted)["state_dict"]
    own = {model(b).detach().numpy().tobytes(): converted(b) for b in IMAGES}

    def loss(outputs: Tensor, teacher: Tensor) -> Tensor:
        return (outputs - own[teacher.detach().numpy().tobytes()]).square().mean()

    report = refine(converted, model, IMAGES, loss="mse" if helps else loss, passes=0)
    folded = [note for note in report.notes if "folded" in note]
    assert [note for note in report.notes if "no proposals" in note]
    if helps:
        assert folded and error(converted, model, IMAGES) < 0.8 * start
    else:
        assert not folded and everything(converted)["state_dict"] == given


def test_without_a_twin_and_a_judge_nothing_is_done() -> None:
    backend, converted = opened(nets.seeded(Plain), IMAGES)
    nets.without_twin(converted)
    given = everything(converted)["state_dict"]
    with torch.no_grad():
        assert equalize(backend, [Batch((IMAGES[0],), {}, 6)]) == []
    assert everything(converted)["state_dict"] == given


@torch.no_grad()
def test_forms_that_are_looked_at_together_are_looked_at_alone_where_one_is_wrong() -> None:
    backend, _ = opened(uneven(), IMAGES)
    start = NothingRounded(backend, Batch((IMAGES[0],), {}, 6))
    names = [name for name, site in backend.sites.items() if site.kind == "weight" and len(site.nodes) == 1]
    given, runs = {name: backend.float_weights[name] for name in names}, list[bool]()

    def use(check: Equivalence, wrong: str | None) -> list[str]:
        def write(name: str) -> str:
            backend.weights.set_float(name, given[name] * (2 if name == wrong else 1))
            backend.write(name, backend.read(name))
            return name

        runs.append(check._at_once)
        return [*check.used(names[:1], write), *check.used(names[1:], write)]

    used = partial(forms_used, backend, start, ALONE)
    assert used(partial(use, wrong=None)) == names and runs == [True]
    runs.clear()
    assert used(partial(use, wrong=names[0])) == names[1:] and runs == [True, False]
    assert torch.equal(backend.float_weights[names[0]], given[names[0]])


@torch.no_grad()
def test_a_form_that_has_no_scale_is_left_and_the_others_are_used() -> None:
    backend, _ = opened(uneven(), IMAGES)
    start = NothingRounded(backend, Batch((IMAGES[0],), {}, 6))
    first, second, *_ = [name for name, site in backend.sites.items() if site.kind == "weight" and len(site.nodes) == 1]
    scales = {name: backend.read(name).scale for name in (first, second)}

    def write(name: str) -> str:
        factor = float("nan") if name == first else 1.01
        backend.write(name, cptv_ao.QParams(scales[name] * factor, torch.zeros_like(scales[name], dtype=torch.int64)))
        return name

    assert forms_used(backend, start, ALONE, lambda check: check.used([first, second], write)) == [second]
    assert torch.equal(backend.read(first).scale, scales[first])
    assert not torch.equal(backend.read(second).scale, scales[second])
