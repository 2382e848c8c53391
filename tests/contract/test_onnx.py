"""The road to ONNX: quantize PT2E, refine, export, run it with onnxruntime.

The file says what the graph says (QuantizeLinear, DequantizeLinear); onnxruntime fuses these with what lies between.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pt2e
from helpers.shipping import BATCHES, UNSEEN, mse, outputs, settings
from torch import Tensor, nn
from torch.fx import GraphModule

import cptv_ao

onnx = pytest.importorskip("onnx", reason="pip install 'cptv_ao[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'cptv_ao[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'cptv_ao[onnx]'")
pt2e.torchao()

DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=1024)},)


def exported(graph: nn.Module, path: Path) -> Path:
    """An ONNX file of a graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph, (BATCHES[0],), dynamic_shapes=DYNAMIC)
        torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    return path


def session(graph: nn.Module, path: Path, optimized: Path | None = None) -> Any:
    """What onnxruntime makes of a graph: runs a batch.

    Args:
        optimized: where it writes the graph that it runs.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # that a file of an optimized graph is for this machine alone
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    runs = onnxruntime.InferenceSession(exported(graph, path), options, providers=["CPUExecutionProvider"])
    name = runs.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(runs.run(None, {name: images.numpy()})[0])

    return run


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_the_whole_road(tokens_x86: GraphModule, tokens: nn.Module, tmp_path: Path) -> None:
    before = mse(tokens_x86, tokens, BATCHES)
    cptv_ao.refine(tokens_x86, BATCHES, float_model=tokens, config=settings(), progress=False)
    after = session(tokens_x86, tmp_path / "refined.onnx", optimized=tmp_path / "runs.onnx")
    assert cptv_ao.report(tokens_x86).after.search < 0.9 * cptv_ao.report(tokens_x86).before.search
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    quantized = [node for node in tokens_x86.graph.nodes if node.target is quantize]
    assert ops(tmp_path / "refined.onnx").count("QuantizeLinear") == len(quantized) == 6
    # qkv, proj, fc1, fc2: the patches' convolution gives floats, and the head is a Gemm with a bias, which is none.
    assert ops(tmp_path / "runs.onnx").count("MatMulIntegerToFloat") == 4
    assert mse(after, tokens_x86, UNSEEN) < 0.01 * mse(tokens_x86, tokens, UNSEEN), "next to quantization it is nothing"
    agreement = outputs(after, UNSEEN).argmax(1) == outputs(tokens_x86, UNSEEN).argmax(1)
    assert agreement.float().mean() >= 0.98
    assert mse(after, tokens, BATCHES) < 0.9 * before


@pytest.mark.slow
def test_what_the_session_gives_is_accepted(tokens_x86: GraphModule, tokens: nn.Module, tmp_path: Path) -> None:
    before, made = outputs(tokens_x86, BATCHES), list[Any]()

    def ship(model: GraphModule) -> Any:
        made.append(session(model, tmp_path / f"{len(made)}.onnx"))
        return made[-1]

    config = settings(accept_on=ship, holdout=0, equalize=False)  # in which it would be judged once more
    cptv_ao.refine(tokens_x86, BATCHES, float_model=tokens, config=config, progress=False)
    report = cptv_ao.report(tokens_x86)
    given, found = made
    for runs, wanted, losses in ((given, before, report.before), (found, outputs(tokens_x86, BATCHES), report.after)):
        assert mse(runs, tokens, BATCHES) == pytest.approx(losses.search, rel=1e-5)
        assert float((outputs(runs, BATCHES) - wanted).square().mean()) < 0.01 * losses.search
    assert report.after.search < report.before.search
