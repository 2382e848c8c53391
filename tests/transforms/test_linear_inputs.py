"""What linear layers of a lowered model read, evened out and centred: equal in float, and finer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import nets
from helpers.cases import Case, backend_of, error, in_float
from helpers.search import small_config
from torch import Tensor, nn
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import weight_ranges
from cptv_ao.core.batches import Batch
from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.equalize import equalize
from cptv_ao.transforms.lowered_patterns import Patterns

DIM = 8
EVENED = "inputs of linear layers evened out with the weights there"
CENTRED = "the channels of 2 inputs of linear layers moved to the middle of their ranges"


class Gate(nn.Module):
    """Two norms that linear layers alone read, the first one three of them, and a sum over both."""

    def __init__(self, norm_bias: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(6, DIM)
        self.norm1, self.norm2 = nets.Norm(DIM, bias=norm_bias), nets.Norm(DIM)
        self.gate, self.value, self.skip = (nn.Linear(DIM, DIM, bias=bias) for _ in range(3))
        self.fc1, self.fc2, self.head = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM), nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm1(x)
        x = x + self.gate(y) * self.value(y) + self.skip(y)
        return self.head(x + self.fc2(functional.relu(self.fc1(self.norm2(x)))))


def unlike(wide: float = 16.0, **kwargs: Any) -> Case:
    """Channels behind the norms lie apart, and every other one is so much larger; what reads it makes up for it."""
    model: Any = nets.seeded(lambda: Gate(**kwargs))
    readers = {"norm1": ("gate", "value", "skip"), "norm2": ("fc1",)}
    with torch.no_grad():
        for norm, layers in readers.items():
            for given in model.get_submodule(norm).parameters():
                given += torch.linspace(-3, 3, DIM)
                given[::2] *= wide
            for layer in layers:
                model.get_submodule(layer).weight[:, ::2] /= wide
    batches = list(nets.images(32, 4, 6).split(8))
    return Case(model, *nets.quantize(model, batches), batches)


def evened_out(notes: list[str]) -> int:
    return sum(int(note.split()[0]) for note in notes if EVENED in note)


@torch.no_grad()
def test_the_function_stays_and_the_error_falls() -> None:
    case = unlike()
    given = case.copy()
    backend, batch = backend_of(case), Batch((case.batches[0],), {}, 8)
    before, wanted = error(case.converted, case), in_float(backend, case.batches[1])
    notes = equalize(backend, [batch])
    assert evened_out(notes) >= 8 and notes[-1] == CENTRED
    torch.testing.assert_close(in_float(backend, case.batches[1]), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_float(backend_of(case), case.batches[1]), wanted, rtol=1e-4, atol=1e-4)
    assert error(case.converted, case) < 0.5 * before == 0.5 * error(given.converted, given)
    again = equalize(backend_of(case), [batch])
    assert evened_out(again) <= evened_out(notes) / 3, "they are nearly even already"


@torch.no_grad()
def test_the_middles_go_into_biases_that_were_not_there() -> None:
    case = unlike(bias=False)
    backend = backend_of(case)
    wanted = in_float(backend, case.batches[1])
    assert equalize(backend, [Batch((case.batches[0],), {}, 8)])[-1] == CENTRED
    torch.testing.assert_close(in_float(backend, case.batches[1]), wanted, rtol=1e-4, atol=1e-4)
    assert all(bool(case.converted.get_submodule(name).bias().any()) for name in ("gate", "value", "skip"))


@torch.no_grad()
def test_a_norm_without_a_bias_is_only_multiplied() -> None:
    case = unlike(norm_bias=False)
    backend = backend_of(case)
    wanted = in_float(backend, case.batches[1])
    notes = equalize(backend, [Batch((case.batches[0],), {}, 8)])
    assert evened_out(notes) and notes[-1] == CENTRED.replace("2 inputs", "1 input")
    torch.testing.assert_close(in_float(backend, case.batches[1]), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_float_weights_channels_are_only_centred() -> None:
    case = unlike()
    backend = Backend(case.converted, weight_ranges(case.float_model))
    wanted = in_float(backend, case.batches[1])
    codes = {name: backend.weight(name).int_repr() for name, site in backend.sites.items() if site.kind == "weight"}
    assert equalize(backend, [Batch((nets.images(64, 4, 6),), {}, 64)]) == [CENTRED]
    torch.testing.assert_close(in_float(backend, case.batches[1]), wanted, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(backend.weight(name).int_repr(), given) for name, given in codes.items())


class Read(Gate):
    """What the first norm gives is read by itself, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.stem(x))
        return self.head(self.fc2(functional.relu(self.fc1(self.norm2(y + self.skip(y))))))


@torch.no_grad()
def test_what_something_else_reads_stays() -> None:
    model = nets.seeded(Read)
    batches = list(nets.images(32, 4, 6).split(8))
    backend = backend_of(Case(model, *nets.quantize(model, batches), batches))
    assert [[reader.weight for reader in norm.readers] for norm in Patterns(backend).read_norms()] == [["fc1.weight"]]


def test_a_search_starts_there_and_a_fresh_conversion_gets_it_all(tmp_path: Path) -> None:
    case = unlike(bias=False)
    fresh, other, start = case.copy().converted, case.copy(), error(case.converted, case)
    config = small_config(gradient_steps=20, evaluations=2, loss="mse", population=("ranges", "biases"))

    def refined(one: Case, **changes: Any) -> cptv_ao.Report:
        settings: dict[str, Any] = {"float_model": one.float_model, "progress": False, "config": config} | changes
        return cptv_ao.report(cptv_ao.refine(one.converted, one.batches, **settings))

    report = refined(case)
    assert CENTRED in report.notes and evened_out(list(report.notes))
    assert not evened_out(list(refined(other, config=small_config(equalize=False, loss="mse")).notes))
    found = error(case.converted, case)
    assert found < 0.5 * start
    cptv_ao.save_scales(case.converted, tmp_path / "refined")
    cptv_ao.load_scales(fresh, tmp_path / "refined")
    with torch.no_grad():
        assert torch.equal(fresh(case.batches[1]), case.converted(case.batches[1]))
    other.converted.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        assert torch.equal(other.converted(case.batches[1]), case.converted(case.batches[1]))
    cptv_ao.diagnose(case.converted, case.batches, float_model=case.float_model)
    again = refined(case)
    assert error(case.converted, case) <= found * (1 + 1e-6)
    assert CENTRED not in again.notes


@torch.no_grad()
def test_an_outlier_becomes_smaller_in_its_norm() -> None:
    model: Any = nets.seeded(Gate)
    model.norm2.weight[2] *= 60
    model.norm2.bias[2] = 60
    model.fc1.weight[:, 2] /= 60
    batches = list(nets.images(32, 4, 6).split(8))
    case = Case(model, *nets.quantize(model, batches), batches)
    backend = backend_of(case)
    equalize(backend, [Batch((batches[0],), {}, 8)])
    factor = fetch(backend.model, "norm2.weight")[2] / model.norm2.weight[2]
    assert 0 < float(factor) < 1 / 4
