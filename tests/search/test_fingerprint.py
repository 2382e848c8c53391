"""What a search is known by: the same for the same, and another for all that makes another search of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import nets
from torch import Tensor, nn

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.search.fingerprint import fingerprint


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, Any]:
    net = nets.seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    return net, nets.quantize(net, [nets.images(8, 6)], weight_bits=4)[1]


@pytest.fixture
def backend(made: tuple[nn.Module, Any]) -> Backend:
    found = Backend(copy.deepcopy(made[1]))
    attach_float_weights(found, copy.deepcopy(made[0]))
    return found


def batches() -> list[Batch]:
    return [Batch((x,), {"scale": torch.tensor(2.0)}, len(x)) for x in nets.images(8, 6).split(4)]


def mean(candidate: Tensor, teacher: Tensor) -> Tensor:
    return (candidate - teacher).abs().mean()


def test_the_same_search_has_the_same(made: tuple[nn.Module, Any], backend: Backend) -> None:
    again = Backend(copy.deepcopy(made[1]))
    attach_float_weights(again, made[0])
    config = RefineConfig(loss=mean)
    found = fingerprint(backend, config, batches())
    assert found == fingerprint(again, config, batches()) and found.unseen == ()
    assert json.loads(json.dumps(found.parts)) == found.parts and found.parts.keys() == {"model", "config", "data"}


def scaled(backend: Backend, kind: str) -> None:
    name = next(name for name, site in backend.sites.items() if site.kind == kind)
    qparams = backend.read(name)
    backend.write(name, replace(qparams, scale=qparams.scale * 1.5))


def other_float_weight(backend: Backend) -> None:
    name = next(iter(backend.float_weights))
    backend.weights.floats[name] = backend.float_weights[name] + 1e-6


def code_changed(backend: Backend) -> None:
    graph = backend.model.graph
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        output.args = (graph.call_method("neg", (output.args[0],)),)
    backend.model.recompile()


@pytest.mark.parametrize(
    "change",
    [lambda b: scaled(b, "weight"), lambda b: scaled(b, "activation"), other_float_weight, code_changed],
    ids=["weight", "activation", "float weight", "code"],
)
def test_another_model_has_another(backend: Backend, change: Callable[[Backend], None]) -> None:
    before = fingerprint(backend, RefineConfig(), batches()).parts
    change(backend)
    after = fingerprint(backend, RefineConfig(), batches()).parts
    assert before["model"] != after["model"]
    assert (before["config"], before["data"]) == (after["config"], after["data"])


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"loss": "kl"}, {"loss": mean}, {"include": ("0*",)}, {"racing": False}]
)
def test_other_settings_have_another(backend: Backend, change: dict[str, Any]) -> None:
    before = fingerprint(backend, RefineConfig(), batches()).parts
    after = fingerprint(backend, RefineConfig(**change), batches()).parts
    (name,) = change
    assert {key for key, told in after["config"].items() if before["config"][key] != told} == {name}
    assert (before["model"], before["data"]) == (after["model"], after["data"])


@pytest.mark.parametrize("change", [{"max_seconds": 5.0}, {"max_evaluations": 3}, {"cache_bytes": 1}])
def test_when_to_stop_and_where_to_hold_things_may_change(backend: Backend, change: dict[str, Any]) -> None:
    assert fingerprint(backend, RefineConfig(**change), batches()) == fingerprint(backend, RefineConfig(), batches())


def test_blocks_are_known_by_what_they_hold(backend: Backend) -> None:
    def alone(sites: Any) -> dict[str, str]:
        return {site.name: site.name for site in sites}

    def likewise(sites: Any) -> dict[str, str]:
        names = [site.name for site in sites]
        return dict(zip(names, names, strict=True))

    one, other, whole = (
        fingerprint(backend, RefineConfig(blocks=policy), []).parts["config"]["blocks"]
        for policy in (alone, likewise, lambda sites: {site.name: "all" for site in sites})
    )
    assert one == other != whole and whole.startswith("1 blocks (")


def test_what_cannot_be_looked_into_is_named(backend: Backend) -> None:
    held = open(__file__)  # noqa: SIM115
    try:
        found = fingerprint(backend, RefineConfig(loss=lambda a, b: mean(a, b) + 0 * len(held.name)), [])
    finally:
        held.close()
    assert len(found.unseen) == 1 and "TextIOWrapper" in found.unseen[0]


def in_another_order(given: list[Batch]) -> list[Batch]:
    return given[::-1]


def one_number(given: list[Batch]) -> list[Batch]:
    given[1].args[0][0, 0] += 1e-6
    return given


def another_keyword(given: list[Batch]) -> list[Batch]:
    return [replace(batch, kwargs={"other": batch.kwargs["scale"]}) for batch in given]


def another_shape(given: list[Batch]) -> list[Batch]:
    return [replace(batch, args=(batch.args[0].reshape(6, 4),)) for batch in given]


@pytest.mark.parametrize("change", [in_another_order, one_number, another_keyword, another_shape])
def test_other_images_have_another(backend: Backend, change: Callable[[list[Batch]], list[Batch]]) -> None:
    before = fingerprint(backend, RefineConfig(), batches()).parts
    after = fingerprint(backend, RefineConfig(), change(batches())).parts
    assert before["data"] != after["data"] and before["model"] == after["model"]
