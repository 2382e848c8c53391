"""A refined model holds nothing of ours but plain values: it loads where we are not installed."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import warnings
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from helpers.cases import Case
from helpers.saved_nets import Linears, made
from helpers.search import small_config

import cptv_ao


@pytest.mark.slow
def test_a_refined_model_loads_where_we_are_not_installed(tmp_path: Path) -> None:
    from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx

    case, settings = made(Linears), {"progress": False, "config": small_config()}
    prepared = prepare_fx(copy.deepcopy(case.float_model), nets.mapping(3), (case.batches[0],))
    for batch in case.batches:
        prepared(batch)
    forms = [case.converted, convert_to_reference_fx(prepared)]
    for model in forms:
        for float_model in (None, case.float_model):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", cptv_ao.CptvWarning)
                again = cptv_ao.refine(model, case.batches, float_model=float_model, inplace=False, **settings)
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
            torch.save(again.meta, path)
            assert torch.load(path, weights_only=True) == again.meta, "plain values, which need no trust"
            torch.save({"model": again, "meta": again.meta}, path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    code = "import sys, torch; sys.modules['cptv_ao'] = None; [torch.load(p, weights_only=False) for p in sys.argv[1:]]"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("settings", [{}, {"score_on": "simulation"}])
def test_nothing_of_ours_is_left_in_a_model(case: Case, settings: dict[str, Any]) -> None:
    config = small_config(gradient_steps=4, population=("output_error", "ranges", "biases"), **settings)
    cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, config=config, progress=False)
    assert ours(case.converted) == [] == ours(case.float_model)


def test_nothing_of_ours_is_left_in_a_graph_of_pt2e() -> None:
    float_model = nets.seeded(pt2e.Residual)
    graph = pt2e.converted(float_model, pt2e.x86(), True)
    assert pt2e.refine(graph, float_model).moves
    assert cptv_ao.report(copy.deepcopy(graph)) == cptv_ao.report(graph)
    assert ours(graph) == []


def ours(root: Any) -> list[str]:
    """Objects of cptv_ao that can be reached from another one, but for what modules hold."""
    seen: dict[int, Any] = {}
    waiting, found = [root], []
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (type, ModuleType)):
            continue
        seen[id(value)] = value
        home = getattr(value, "__module__", None) if isinstance(value, FunctionType) else type(value).__module__
        if str(home).split(".")[0] == "cptv_ao":
            found.append(repr(value))
        elif isinstance(value, FunctionType):
            waiting += [cell.cell_contents for cell in value.__closure__ or ()]
        else:
            waiting += gc.get_referents(value)
    return found
