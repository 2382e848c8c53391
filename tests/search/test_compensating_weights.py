"""Weights that give back what quantization took before them: against weights that are rounded on their own."""

from __future__ import annotations

import pytest
import torch
from helpers import nets
from helpers.cases import Case, backend_of
from helpers.search import small_config
from torch import Tensor

import cptv_ao
from cptv_ao.core.batches import Batch
from cptv_ao.core.qparams import Assignment, same
from cptv_ao.search.proposals import sequential_rounding
from cptv_ao.search.proposals.compensating_weights import compensating_weights
from cptv_ao.search.proposals.sequential_rounding import sequential_roundings
from cptv_ao.simulation.twin import Twin


def twin_and_names(case: Case) -> tuple[Twin, list[str]]:
    backend = backend_of(case)
    twin = Twin(backend)
    twin.reround_weights()
    return twin, [site.name for site in backend.sites.values() if site.kind == "weight"]


def batch_of(images: Tensor) -> Batch:
    return Batch((images,), {}, len(images))


def apart(twin: Twin, found: Assignment, images: Tensor) -> float:
    """Squared distance of the outputs from those in float, with weights of an assignment."""
    with torch.no_grad(), twin.in_float(twin.names):
        wanted = twin(images).dequantize()
    before = {name: twin.sites.get(name) for name in found}
    for name, qparams in found.items():
        twin.sites.set(name, qparams)
    with torch.no_grad():
        distance = float((twin(images).dequantize() - wanted).square().sum())
    for name, qparams in before.items():
        twin.sites.set(name, qparams)
    return distance


def test_outputs_come_nearer_than_by_rounding_each_layer_on_its_own(vit_w2: Case) -> None:
    """On images that it was not found on."""
    twin, names = twin_and_names(vit_w2)
    *told, unseen = vit_w2.batches
    batch = batch_of(torch.cat(told))
    found, alone = compensating_weights(twin, names, batch), sequential_roundings(twin, names, [batch])
    assert set(found) == set(alone) == set(names)
    assert apart(twin, found, unseen) < 0.8 * apart(twin, alone, unseen)


def test_wide_layers_make_up_part_by_part(vit_w2: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those do whose Gram matrix would take more memory than there is."""
    twin, names = twin_and_names(vit_w2)
    *told, unseen = vit_w2.batches
    nearest = apart(twin, {}, unseen)
    monkeypatch.setattr(sequential_rounding, "_COLUMNS", 12)
    found = compensating_weights(twin, names, batch_of(torch.cat(told)))
    assert set(found) == set(names)
    assert apart(twin, found, unseen) < 0.8 * nearest


def test_the_twin_is_left_as_it_was(vit_w2: Case) -> None:
    twin, names = twin_and_names(vit_w2)
    before = {name: twin.sites.get(name) for name in names}
    found = compensating_weights(twin, names, batch_of(vit_w2.batches[0]))
    assert all(same(twin.sites.get(name), before[name]) for name in names)
    assert not any(same(found[name], before[name]) for name in names)


def test_only_chosen_weights_change(vit_w2: Case) -> None:
    twin, names = twin_and_names(vit_w2)
    assert set(compensating_weights(twin, names[1:3], batch_of(vit_w2.batches[0]))) == set(names[1:3])


def test_weights_of_eight_bits_are_left(conv: Case) -> None:
    twin, names = twin_and_names(Case(conv.float_model, *nets.quantize(conv.float_model, conv.batches), conv.batches))
    assert names and compensating_weights(twin, names, batch_of(conv.batches[0])) == {}


def test_convolutions_come_nearer_too(conv: Case) -> None:
    twin, names = twin_and_names(conv)
    images = torch.cat(conv.batches)
    found = compensating_weights(twin, names, batch_of(images))
    assert found
    assert apart(twin, found, images) < 0.8 * apart(twin, {}, images)


def test_scales_move_by_a_tenth_at_most(vit_w2: Case) -> None:
    twin, names = twin_and_names(vit_w2)
    before = {name: twin.sites.get(name) for name in names}
    for name, qparams in compensating_weights(twin, names, batch_of(vit_w2.batches[0])).items():
        factor = qparams.scale / before[name].scale
        assert bool((factor < 1.11).all() and (factor > 0.9).all())
        assert bool((factor != 1).any())


def test_a_search_gains_by_them(vit_w2: Case) -> None:
    config = small_config(population=("output_error",), passes=0, gradient_steps=0)
    refined = cptv_ao.refine(
        vit_w2.converted, vit_w2.batches, float_model=vit_w2.float_model, config=config, inplace=False, progress=False
    )
    (stage,) = [stage for stage in cptv_ao.report(refined).stages if stage.startswith("weights that compensate")]
    assert "accepted" in stage
