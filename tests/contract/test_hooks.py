"""Forward hooks of the user's: what is scored is what the model with its hooks returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.output_nets import quantized
from helpers.search import exact_kl, small_config
from torch import Tensor, nn

import cptv_ao

SETTINGS: dict[str, Any] = {"gradient_steps": 4, "evaluations": 4}


def doubled(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output * 2


def doubled_input(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 2,)


def halved(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """Of a layer on its scale."""
    if not output.is_quantized:
        return output / 2
    values = output.dequantize() / 2
    return torch.quantize_per_tensor(values, output.q_scale(), output.q_zero_point(), output.dtype)


def hook(model: nn.Module, where: str) -> None:
    if where == "behind the model":
        model.register_forward_hook(doubled)
    elif where == "before the model":
        model.register_forward_pre_hook(doubled_input)
    else:
        model.second.register_forward_hook(halved)


@pytest.mark.filterwarnings("ignore:refine without float_model")
@pytest.mark.parametrize("where", ["behind the model", "before the model", "inside"])
@pytest.mark.parametrize("score_on", ["kernels", "simulation"])
def test_hooks_that_change_the_output_are_scored(where: str, score_on: str) -> None:
    net, model, batches = quantized()
    hook(net, where)
    hook(model, where)
    arguments: dict[str, Any] = {"config": small_config(**SETTINGS, score_on=score_on), "progress": False}
    match = "forward hooks change what the model returns"
    if score_on == "simulation":
        with pytest.raises(cptv_ao.UnsupportedModelError, match=match):
            cptv_ao.refine(model, batches, float_model=net, **arguments)
        return
    cptv_ao.refine(model, batches, float_model=net, **arguments)
    report = cptv_ao.report(model)
    with torch.no_grad():
        true = sum(float(exact_kl(model(batch), net(batch))) for batch in batches[:3]) / 3
    assert report.after.search == pytest.approx(true, rel=1e-5)
    assert report.blocks[-1].after == report.after.search
    assert report.blocks[0].before == report.before.search
    assert any(match in note for note in report.notes)
    assert report.stages == ()
    with pytest.raises(cptv_ao.UnsupportedModelError, match=match):  # no teacher can be made of the model
        cptv_ao.refine(model, batches, **arguments)


@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_that_only_look_see_the_model_and_change_nothing(everywhere: bool) -> None:
    def found(looking: bool) -> Any:
        net, model, batches = quantized()
        handle = None
        if looking and everywhere:
            handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(type(m)))
        elif looking:
            handle = model.register_forward_hook(lambda m, *_: seen.add(type(m)))
        try:
            cptv_ao.refine(model, batches, float_model=net, config=small_config(**SETTINGS), progress=False)
        finally:
            if handle is not None:
                handle.remove()
        report = cptv_ao.report(model)
        return report.before, report.after, report.stages, report.moves, type(model)

    seen: set[type] = set()
    plain = found(False)
    assert found(True)[:-1] == plain[:-1]
    assert seen
