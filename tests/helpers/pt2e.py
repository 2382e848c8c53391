"""PT2E graphs of a small network, by the quantizers of torchao; who asks for one is skipped where it is absent."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import cptv_ao
from helpers import nets
from helpers.search import small_config


def torchao() -> Any:
    """Its module of prepare_pt2e and convert_pt2e."""
    return pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="pip install 'cptv_ao[pt2e]'")


class Residual(nn.Module):
    """Convolution, batch norm, in-place relu, a residual add, a cat, pooling, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc1, self.fc2 = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(x + self.conv2(x))
        x = torch.cat([x, torch.nn.functional.max_pool2d(x, 3, 1, 1)], 1)
        hidden = torch.nn.functional.gelu(self.fc1(x.mean((2, 3))))
        return {"logits": self.fc2(hidden), "hidden": hidden}


def x86() -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())


def xnnpack() -> Any:
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def per_tensor() -> Any:
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=False))


def exported(model: nn.Module, example: tuple[Any, ...], **changes: Any) -> GraphModule:
    """Its graph, in which `x86` finds the layers: on torch 2.11 only what was exported strictly tells of them."""
    return torch.export.export(model, example, strict=torch.__version__ < (2, 13), **changes).module()


BATCHES = [nets.images(6, 3, 8, 8, seed=seed) for seed in range(4)]


def converted(model: nn.Module, quantizer: Any, fold: bool, batches: Sequence[Tensor] = BATCHES) -> GraphModule:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        dynamic = ({0: torch.export.Dim("batch", min=1, max=1024)},)
        graph = exported(copy.deepcopy(model), (batches[0],), dynamic_shapes=dynamic)
        prepared = torchao().prepare_pt2e(graph, quantizer)
        for batch in batches:
            prepared(batch)
        return torchao().convert_pt2e(prepared, fold_quantize=fold)


def small_model() -> tuple[nn.Module, Any]:
    model = nets.seeded(Residual)
    return model, converted(model, x86(), True)


def refine(model: GraphModule, float_model: nn.Module | None, **changes: Any) -> cptv_ao.Report:
    config = small_config(
        **({"evaluations": 4, "gradient_steps": 12, "population": ("curvature",), "output": "logits"} | changes)
    )
    assert cptv_ao.refine(model, BATCHES, float_model=float_model, config=config, progress=False) is model
    return cptv_ao.report(model)
