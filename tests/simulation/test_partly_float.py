"""Parts of a twin in float, and what the rounding of a site does to the outputs."""

from __future__ import annotations

import pytest
import torch
from helpers import nets
from helpers.cases import Case, backend_of
from torch import Tensor, nn

from cptv_ao.core.batches import Batch
from cptv_ao.diagnosis.wiring import Wiring
from cptv_ao.simulation.partly_float import FloatRegion, partly_float
from cptv_ao.simulation.rounding_effects import rounding_effects
from cptv_ao.simulation.twin import Twin


def test_all_of_it_is_the_float_model_and_none_of_it_the_twin(small: Case) -> None:
    backend = backend_of(small)
    twin, wiring, images = Twin(backend), Wiring(backend), small.batches[0]
    whole = {node.name for node in backend.model.graph.nodes}
    with torch.no_grad():
        given = twin(images)
        with partly_float(twin, wiring.region(whole)):
            found = twin(images)
        with partly_float(twin, wiring.region([])):
            assert torch.equal(twin(images), given)
        assert torch.equal(twin(images), given)
        assert torch.allclose(found, small.float_model(images.clone()), atol=1e-4)


def test_hooks_and_rounding_are_put_back_after_an_exception(small: Case) -> None:
    twin = Twin(backend_of(small))
    nodes = [node.name for node in twin.module.graph.nodes if node.op == "call_module"]
    region = FloatRegion(frozenset(twin.names), frozenset(), frozenset(nodes))
    with partly_float(twin, region):
        assert any(module._forward_pre_hooks for module in twin.module.modules())
    with pytest.raises(AttributeError), partly_float(twin, region):
        twin.module("no tensor")
    assert not any(module._forward_pre_hooks for module in twin.module.modules())
    assert {module.rounding for module in twin.sites.modules.values()} == {"round"}


def test_a_reader_that_is_quantized_rounds_what_it_is_given() -> None:
    """Before: first (float) -> second; after it is as if the output of `first` were rounded where it is made."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    images = nets.images(16, 8)
    backend = backend_of(Case(model, *nets.quantize(model, [images], weight_bits=4), [images]))
    twin, region = Twin(backend), Wiring(backend).region(["_0"])
    assert region == FloatRegion(frozenset({"0.input_scale_0", "0.output"}), frozenset({"0.weight"}), frozenset({"_1"}))
    with torch.no_grad():
        with partly_float(twin, region):
            found = twin(images)
        with twin.in_float([name for name in (*region.activations, *region.weights) if name != "0.output"]):
            assert torch.equal(found, twin(images))


def test_effects_are_exact_in_a_linear_network() -> None:
    """The oracle rounds one site alone, and looks at what the direction sees of it."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)).eval()
    images = nets.images(6, 8)
    backend = backend_of(Case(model, *nets.quantize(model, [images], weight_bits=3), [images]))
    twin = Twin(backend)
    direction = nets.images(6, 4, seed=1)

    def pull(output: Tensor) -> Tensor:
        return (output * direction).sum()

    found = rounding_effects(twin, Batch((images,), {}, 6), pull)
    assert set(found) == set(twin.names)
    with torch.no_grad():
        wanted = model(images)
        for name, effect in found.items():
            with twin.in_float(set(twin.names) - {name}):
                by_image = ((twin(images) - wanted) * direction).sum(1)
            assert effect.float() == pytest.approx(by_image, abs=1e-5), name
