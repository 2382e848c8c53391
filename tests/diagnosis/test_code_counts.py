"""The codes that a site takes, on every form of graph."""

from __future__ import annotations

import copy
import warnings

import pytest
from helpers.cases import Case
from helpers.nets import TupleNet, images, quantize, seeded

import cptv_ao
from cptv_ao.diagnosis.code_counts import count_codes


def test_every_site_can_be_counted(case: Case) -> None:
    for name, site in cptv_ao.find_sites(case.converted).items():
        if "not searched" in site.fixed:
            continue
        found = count_codes(case.converted, name, case.batches[:1])
        assert found.total > 0
        assert found.first <= site.qmin
        assert found.first + len(found.counts) > site.qmax


def test_codes_with_keyword_inputs_and_of_a_reference_model() -> None:
    from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx

    from cptv_ao.backends.reference import lower

    model = seeded(lambda: TupleNet(True))
    data = images(8, 6)
    _, converted = quantize(model, [data])
    by_position = count_codes(converted, "b.weight"), count_codes(converted, "a.output", [data])
    assert by_position[1] == count_codes(converted, "a.output", [{"x": data}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(copy.deepcopy(model), cptv_ao.qconfig_mapping(engine="x86"), (data,))
        prepared(data)
        reference = convert_to_reference_fx(prepared)
    name = next(name for name, site in cptv_ao.find_sites(reference).items() if site.kind == "activation")
    assert count_codes(reference, name, [data]) == count_codes(lower(reference), name, [data])


@pytest.mark.slow
def test_codes_of_a_pt2e_graph(conv: Case) -> None:
    pytest.importorskip("torchao")
    import workloads

    exported = workloads.quantize_exported(conv.float_model, conv.batches, weight_bits=3, activation_bits=4)
    sites = cptv_ao.find_sites(exported)
    name = next(name for name, site in sites.items() if site.kind == "activation")
    found = count_codes(exported, name, conv.batches)
    assert len(found.counts) == 16, "the graph holds it to its four bits"
    weight = next(name for name, site in sites.items() if site.kind == "weight")
    assert len(count_codes(exported, weight).counts) == 8
