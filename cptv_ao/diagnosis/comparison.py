"""The tensors of a quantized model beside those of the float one: at the ends of blocks, and at the sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.diagnosis.float_outputs import FloatOutputs
from cptv_ao.diagnosis.meters import ActivationMeter, Fidelity
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.fx.running import run
from cptv_ao.simulation.qtensor import real
from cptv_ao.simulation.simulated_backend import SimulatedBackend


@dataclass
class Comparison:
    """What was seen on all batches.

    Args:
        backend: of the model.

    Attributes:
        blocks: fidelity of the outputs of blocks, where the float model has that tensor.
        sites: what was measured at the activation sites.
        floating: names of the nodes of the model whose value is a floating tensor.
    """

    backend: Backend
    blocks: dict[str, Fidelity] = field(default_factory=dict)
    sites: dict[str, ActivationMeter] = field(default_factory=dict)
    floating: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for site in self.backend.sites.values():
            if site.kind == "activation" and site.qmax > site.qmin:
                self.sites[site.name] = ActivationMeter(site, self.backend.read(site.name))
        self._meters = {node: meter for meter in self.sites.values() for node in meter.site.nodes}

    def add(self, block: str, got: Tensor, wanted: Tensor) -> None:
        """The output of a block on a batch, of the model and of the float model."""
        self.blocks.setdefault(block, Fidelity()).add(got.cpu(), wanted.cpu())

    def kernels(self, batch: Batch, wanted: Mapping[str, str], see: Callable[[ActivationMeter, Any], Any]) -> Any:
        """Run the model; its real values at the nodes of `wanted` (block to node), by block."""
        return self._run(self.backend.model, batch, wanted, see, self.floating)

    def twin(self, model: Any, batch: Batch, wanted: Mapping[str, str]) -> dict[str, Tensor]:
        """Run the twin, which computes in float now, and measure what meets the sites; else as `kernels`."""
        return self._run(model, batch, wanted, lambda meter, value: meter.add(value.dequantize()), set())

    def _run(
        self,
        model: Any,
        batch: Batch,
        wanted: Mapping[str, str],
        see: Callable[[ActivationMeter, Any], Any],
        floating: set[str],
    ) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        blocks = {node: block for block, node in wanted.items()}

        def look(node: Node, value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                floating.add(node.name)
            if node.name in blocks and (held := real(value)) is not None:
                values[blocks[node.name]] = held
            if node.name in self._meters:
                see(self._meters[node.name], value)
            return value

        Watcher(model).watch(batch, look)
        return values


def compared_on_twin(
    backend: Backend, simulated: SimulatedBackend, batches: Sequence[Batch], outputs: Mapping[str, str]
) -> Comparison:
    """The kernels' tensors beside those of the twin in float.

    Args:
        outputs: the node of each block's output.

    Raises:
        UnsupportedModelError: the twin does not know an op.
    """
    found = Comparison(backend)
    twin = simulated.twin
    for batch in batches:
        got = found.kernels(batch, outputs, lambda *_: None)
        with twin.in_float(twin.names):
            wanted = found.twin(simulated.model, simulated.batch(batch), outputs)
        for block, value in got.items():
            if block in wanted and wanted[block].shape == value.shape:
                found.add(block, value, wanted[block])
    return found


def compared_by_modules(
    backend: Backend, teacher: nn.Module, batches: Sequence[Batch], outputs: Mapping[str, str]
) -> tuple[Comparison, list[dict[str, Tensor]]]:
    """The kernels' tensors beside those that the float model has in the place of the blocks' outputs.

    Of the sites only the codes are seen. Returns also the float tensors per batch, by block.
    """
    found, places = Comparison(backend), FloatOutputs(backend, teacher, outputs)
    float_outputs = []
    for index, batch in enumerate(batches):
        got = found.kernels(batch, outputs, lambda meter, value: meter.add_codes(value.int_repr()))
        with places.watched() as wanted:
            run(teacher, batch, index)
        alike = {block: wanted[block] for block, value in got.items() if _same_shape(wanted.get(block), value)}
        for block, value in alike.items():
            found.add(block, got[block], value)
        float_outputs.append(alike)
    return found, float_outputs


def _same_shape(value: Tensor | None, other: Tensor) -> bool:
    return value is not None and value.shape == other.shape
