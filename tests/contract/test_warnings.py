"""Warnings: ours are few, of our own category, and point at the user's line; torch's are not let through in floods."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.cases import Case
from helpers.search import small_config
from torch import Tensor, nn

import cptv_ao
from cptv_ao.simulation import fused

PACKAGE = Path(cptv_ao.__file__).parent


def recorded(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    """All warnings of a call, and the filters are as they were."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        call()
        assert warnings.filters == before
    return caught


def line_of(text: str) -> int:
    """The line of this file that ends with a mark."""
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# {text}"))


@pytest.fixture
def settings() -> dict[str, Any]:
    return {"config": small_config(gradient_steps=4, population=("output_error", "ranges")), "progress": False}


def check_ours(caught: list[warnings.WarningMessage], match: str, mark: str) -> None:
    assert [type(found.message) for found in caught] == [cptv_ao.CptvWarning]
    assert re.search(match, str(caught[0].message))
    assert (caught[0].filename, caught[0].lineno) == (__file__, line_of(mark))


@pytest.mark.parametrize("inplace", [True, False])
def test_without_float_model(conv: Case, settings: dict[str, Any], inplace: bool) -> None:
    model, batches = conv.converted, conv.batches

    def call() -> None:
        cptv_ao.refine(model, batches, inplace=inplace, **settings)  # without

    check_ours(recorded(call), r"refine without float_model: the teacher is .*; pass float_model=", "without")


def test_ops_that_are_not_understood(conv: Case, settings: dict[str, Any]) -> None:
    float_model = nets.seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)))
    batches = list(nets.images(8, 6).split(2))
    _, model = nets.quantize(float_model, batches, weight_bits=3)
    graph = model.graph
    output = graph.output_node()
    with graph.inserting_before(output):
        codes = graph.call_function(torch.quantize_per_tensor, (output.args[0], 0.1, 3, torch.quint8))
        celu = graph.call_function(torch.ops.quantized.celu, (codes, 0.1, 3, 1.0))
        output.args = (graph.call_method("dequantize", (celu,)),)
    model.recompile()

    def call() -> None:
        cptv_ao.refine(model, batches, float_model=float_model, **settings)  # unknown

    check_ours(recorded(call), r"not understood, left alone: .*celu", "unknown")


def test_settings_that_cannot_be_compared(conv: Case, settings: dict[str, Any], tmp_path: Path) -> None:
    lock = threading.Lock()

    def loss(candidate: Tensor, teacher: Tensor) -> Tensor:
        with lock:
            return (candidate - teacher).square().mean()

    arguments = {**settings, "config": small_config(loss=loss), "checkpoint": tmp_path / "search"}
    first = conv.copy()
    found = recorded(lambda: cptv_ao.refine(first.converted, conv.batches, float_model=conv.float_model, **arguments))
    assert found == [], "nothing to compare with yet"

    def call() -> None:
        cptv_ao.refine(conv.converted, conv.batches, float_model=conv.float_model, **arguments)  # unseen

    check_ours(recorded(call), r"cannot be compared with those of the search there \(_thread.lock\)", "unseen")


def test_these_are_all_that_the_package_can_emit() -> None:
    """A new warning gets a test here."""
    found = [
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        for _ in re.findall(r"warnings\.warn\(", path.read_text())
    ]
    loader, own = ["core/loader.py"] * 2, ["verbs/refine.py"] * 3
    assert found == [*loader, "evaluation/teacher_notes.py", "simulation/fused.py", *own]


def test_a_gpu_without_a_compiler_is_told_and_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(fused, "fit", fails)
    fused.compiles.cache_clear()
    told = [str(found.message) for found in recorded(lambda: fused.compiles(torch.device("cpu")))]
    assert told == ["no fused kernels on cpu, plain torch computes there: Failed to find C compiler."]
    fused.compiles.cache_clear()


def test_no_warning_with_a_float_model(small: Case, settings: dict[str, Any], tmp_path: Path) -> None:
    model, path = small.converted, tmp_path / "scales"

    def call() -> None:
        cptv_ao.refine(model, small.batches, float_model=small.float_model, checkpoint=tmp_path / "search", **settings)
        cptv_ao.save_scales(model, path)
        cptv_ao.load_scales(model, path)
        str(cptv_ao.find_sites(model))
        str(cptv_ao.report(model))

    assert [str(found.message) for found in recorded(call)] == []


def test_no_warning_of_cats_whose_inputs_differ(vit_w3: Case, settings: dict[str, Any]) -> None:
    torch.set_warn_always(True)
    try:
        caught = recorded(
            lambda: cptv_ao.refine(vit_w3.converted, vit_w3.batches, float_model=vit_w3.float_model, **settings)
        )
        outside = recorded(lambda: vit_w3.converted(vit_w3.batches[0]))
    finally:
        torch.set_warn_always(False)
    assert [str(found.message) for found in caught] == []
    assert any("cat operator" in str(found.message) for found in outside), "it is still told elsewhere"


def test_warnings_of_the_user_are_let_through(conv: Case, settings: dict[str, Any]) -> None:
    def loss(candidate: Tensor, teacher: Tensor) -> Tensor:
        warnings.warn("of the user", UserWarning, stacklevel=1)
        return (candidate - teacher).square().mean()

    config = small_config(loss=loss)
    caught = recorded(
        lambda: cptv_ao.refine(
            conv.converted, conv.batches, float_model=conv.float_model, config=config, progress=False
        )
    )
    assert {str(found.message) for found in caught} == {"of the user"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="of the user"):
            cptv_ao.refine(conv.converted, conv.batches, float_model=conv.float_model, config=config, progress=False)


SCRIPT = """
import sys, warnings
sys.path[:0] = [{tests!r}, {examples!r}]
import torch
torch.set_num_threads(1)
torch.set_warn_always(True)  # what torch says once per process by default
import cptv_ao
from helpers import nets
from helpers.search import small_config
warnings.simplefilter("error")
for net in (nets.ConvNet, nets.FunctionalNet):
    model = nets.seeded(net)
    batches = list(nets.images(16, 3, 16, 16).split(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, converted = nets.quantize(model, batches, weight_bits=3)
    config, path = small_config(gradient_steps=4, population=("output_error", "ranges")), {path!r} + net.__name__
    cptv_ao.refine(converted, batches, float_model=model, config=config, checkpoint=path, progress=False)
    cptv_ao.save_scales(converted, path + ".scales")
    cptv_ao.load_scales(converted, path + ".scales")
    cptv_ao.find_sites(converted)
    cptv_ao.recipe(model, (batches[0],))
try:
    for _ in range(3):
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    print("quiet")
except UserWarning:
    print("loud")
"""


@pytest.mark.slow
def test_a_process_in_which_every_warning_is_an_error(tmp_path: Path) -> None:
    """torch's flood (800 warnings in one refine of ConvNet, measured) is filtered inside our calls, and only there."""
    here = Path(__file__).parents[1]
    code = SCRIPT.format(tests=str(here), examples=str(here.parent / "examples"), path=str(tmp_path / "search"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    if torch.__version__ >= "2.14":  # earlier ones do not warn
        assert done.stdout == "loud\n"


def test_the_filters_are_restored_after_an_error(conv: Case, settings: dict[str, Any]) -> None:
    before = copy.copy(warnings.filters)
    with pytest.raises(cptv_ao.CalibrationDataError):
        cptv_ao.refine(conv.converted, [], float_model=conv.float_model, **settings)
    assert warnings.filters == before
