"""A network whose output a function makes of what its layers give."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

import cptv_ao
from cptv_ao.reporting.report import Report
from helpers import nets
from helpers.search import small_config

GRADIENT: dict[str, Any] = {
    "gradient_steps": 8, "loss": "auto", "population": ("output_error", "ranges", "biases"), "evaluations": 4,
}  # fmt: skip


class Net(nn.Module):
    """Two linear layers; its output is made of theirs by a function."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.end = nn.Linear(12, 24), nn.Linear(24, 6), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.second(functional.relu(self.first(x))))


def quantized(
    end: Callable[[Tensor], Any] = lambda y: y, rows: int = 12
) -> tuple[nn.Module, GraphModule, list[Tensor]]:
    net = nets.seeded(lambda: Net(end))
    batches = list(nets.images(4 * rows, 12).split(rows))
    return net, nets.quantize(net, batches, weight_bits=3)[1], batches


def refined(
    end: Callable[[Tensor], Any] = lambda y: y, *, alone: bool = False, rows: int = 12, **changes: Any
) -> Report:
    net, model, batches = quantized(end, rows)
    config = small_config(**(GRADIENT | changes))
    cptv_ao.refine(model, batches, float_model=None if alone else net, config=config, progress=False)
    report = cptv_ao.report(model)
    json.dumps(report.to_dict(), allow_nan=False)
    return report
