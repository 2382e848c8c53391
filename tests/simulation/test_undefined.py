"""Networks that divide by what is 0 once it is quantized: kernels put 0 / 0 on a code, and so does the twin."""

from __future__ import annotations

import pytest
import torch
from helpers import nets
from helpers.search import leaves_of, small_config
from torch import Tensor, nn

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.search.proposals.learnable_qparams import LearnableQParams
from cptv_ao.simulation.twin import Twin


class Shares(nn.Module):
    """Features over sums of others, as in linear attention; some of these are less than half a step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        by, of = self.first(x).relu().split([4, 12], 1)
        shares = of / (by.repeat_interleave(3, 1) + 1e-3)
        return self.head(self.second(shares.clamp(max=8.0)).relu())


BATCHES = list(nets.images(96, 8).split(24))


def test_the_twin_has_the_kernels_codes_and_a_gradient() -> None:
    _, model = nets.quantize(nets.seeded(Shares), BATCHES)
    backend, batch = Backend(model), Batch((BATCHES[0],), {}, 24)
    wanted, twin = model(BATCHES[0]), Twin(backend).checked(batch)
    assert torch.isfinite(wanted).all()
    assert torch.allclose(twin(BATCHES[0]), wanted, atol=1e-6)
    assert any("no number" in told for told in twin.notes)

    groups = [LearnableQParams.of(twin, group, False) for group in backend.movable().values()]
    values = {site.name: group.values() for group in groups for site in group.sites}
    twin.call(values, BATCHES[0]).square().sum().backward()
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in leaves_of(groups))
    assert all(bool(own.log_scale.grad.any()) for own in groups), "not only behind the division"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_search_gets_through_and_tells_of_it(seed: int) -> None:
    model = nets.seeded(Shares, seed)
    _, converted = nets.quantize(model, BATCHES)
    config = small_config(population=cptv_ao.RefineConfig().population, gradient_steps=8)
    refined = cptv_ao.refine(converted, BATCHES, float_model=model, config=config, progress=False)
    report = cptv_ao.report(refined)
    assert any("no number" in note for note in report.notes)
    assert report.after.search < 0.9 * report.before.search
    assert all(bool(refined(batch).isfinite().all()) for batch in BATCHES)
