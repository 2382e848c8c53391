"""Around every op that torch quantizes: a scale that is sixteen times what it should be is found back, in few steps."""

from __future__ import annotations

import pytest
import torch
from helpers import nets
from helpers.op_nets import ENGINES, KNOWN, quantized
from helpers.search import small_config

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.core.qparams import QParams
from cptv_ao.simulation.kernel_agreement import broken_weights

# Nothing to find: torch's quantized tanh has no form in place; what is left is 0 throughout; torch's kernel computes
# something else than a PReLU, and another thing in each process (2.14).
APART = {"in place", "add -100.0 relu", "PReLU", "PReLU of channels"}
QUICK = [
    "ConvTranspose1d all", "ConvTranspose2d BatchNorm", "Conv2d reflect", "matmul", "-100.0 add",
    "InstanceNorm1d", "elu positional", "dropout off", "-0.5 mul", "AvgPool3d", "resize_",
]  # fmt: skip
SLOW = [name for name in KNOWN if name not in APART.union(QUICK)]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_bad_scale_is_found_back(name: str) -> None:
    make, shape = KNOWN[name]
    for engine in ENGINES:
        try:
            model, _ = quantized(make, shape, engine)
        except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
            pytest.skip(f"torch cannot do it on {engine}: {error}")
        backend = Backend(model)
        if not broken_weights(backend):
            break
    images = [2 * nets.images(*shape, seed=seed) for seed in range(4)]
    leads = [name for name, group in backend.movable().items() if group[0].kind == "activation"]
    given = {lead: backend.read(lead) for lead in leads}
    backend.write(leads[0], QParams(given[leads[0]].scale * 16, given[leads[0]].zero_point))
    config = small_config(gradient_steps=40, passes=0, loss="mse")
    float_model = nets.seeded(make, random_norms=False)
    cptv_ao.refine(model, images, float_model=float_model, config=config, progress=False)
    report = cptv_ao.report(model)
    assert not [note for note in report.notes if "no proposals" in note]
    assert report.after.search < 0.5 * report.before.search, report
    assert torch.isfinite(backend.read(leads[0]).scale)
