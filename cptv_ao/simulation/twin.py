"""The float twin of a lowered model: the same arithmetic in float, differentiable, on any device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.precision import attention_by_products
from cptv_ao.fx.node_runner import ordered
from cptv_ao.fx.running import changed_by_hooks, run
from cptv_ao.simulation.builder import Builder
from cptv_ao.simulation.by_kernel import ByKernel
from cptv_ao.simulation.check import Checker
from cptv_ao.simulation.limits import Rounding
from cptv_ao.simulation.lowered_builder import LoweredBuilder
from cptv_ao.simulation.pt2e_builder import Pt2eBuilder
from cptv_ao.simulation.quantizers import WeightQuantizer
from cptv_ao.simulation.twin_sites import TwinSites
from cptv_ao.simulation.weighted_layer import WeightedLayer

#: Images on which it is told what a network computes.
FEW = 2
# What attention that is not fused may hold, as a share of the graph without it: many tokens would take a multiple.
_ATTENTION_SHARE = 0.25


class Twin:
    """A float module that computes what the lowered model's kernels compute.

    Scales and zero_points are buffers by site name. What it shares with the model, float weights, it only reads.

    Args:
        backend: of the lowered model.
        engine: the quantized engine that runs it; the present one where None. QNNPACK rounds biases and sums unlike
            the others.

    Raises:
        UnsupportedModelError: an op is not known; the message names its node.

    Attributes:
        module: the graph; `sites`: what it holds for them.
        names: sites whose scales its output depends on.
        layers: those with a weight on a scale, in graph order.
        graph_bytes: about what the graph of one image holds; known once the twin is `checked`.
        attention_bytes: what it holds beside that where attention is not fused.
    """

    def __init__(self, backend: Backend, engine: str | None = None) -> None:
        self._backend, self._engine = backend, engine or str(torch.backends.quantized.engine)
        self._model = backend.model
        self.graph_bytes = self.attention_bytes = 0.0
        self._by_kernel: set[str] = set()  # nodes whose kernels compute, since it turned out that the twin cannot
        self._undefined: list[str] = []
        self._build()

    def _build(self) -> None:
        builder: Builder
        if self._backend.form.simulates_itself:
            builder = Pt2eBuilder(self._backend)
        else:
            builder = LoweredBuilder(self._backend, self._engine, self._by_kernel)
        self.module = builder.build()
        self.sites, self._notes = TwinSites(builder.sites), builder.notes
        used = set(self.module.modules())
        self._holding = [module for module in used if module._buffers]
        self.layers = [m for m in self.module.modules() if isinstance(m, WeightedLayer)]
        self.names = [name for name, module in builder.sites.items() if module in used]

    @property
    def notes(self) -> list[str]:
        """What is to be said of it, once it is `checked`: where no gradient passes, where kernels are in doubt, and
        where it computes 0 / 0."""
        calls = [node for node in self.module.graph.nodes if node.op == "call_module"]
        parts = ((node.name, part) for node in calls for part in self.module.get_submodule(str(node.target)).modules())
        closed = [f"{name} ({m.extra_repr()})" for name, m in parts if isinstance(m, ByKernel) and m.gradient == "none"]
        found = list(self._notes)
        if closed:
            found.append(f"no gradient passes {', '.join(closed)}: what is before that is proposed for without one")
        if self._undefined:
            found.append(
                f"{', '.join(self._undefined)}: no number (0 / 0, say) on the first images, and what is quantized of "
                "that is an arbitrary code: keep in float what is divided there"
            )
        return found

    def _let_kernel(self, node: str | None) -> bool:
        """Have a node's kernel compute it, all else as it is; whether it was not so yet, and can be."""
        before, nodes = self.sites.modules, {n.name: n for n in self._model.graph.nodes}
        called = node in nodes and nodes[node].op.startswith("call_")
        if node is None or not called or node in self._by_kernel or self._backend.form.simulates_itself:
            return False
        self._by_kernel.add(node)
        device = self.device
        self._build()
        self.to(device)
        for name, module in self.sites.modules.items():
            if name in before:
                module.follow(before[name])
        return True

    def checked(self, batch: Batch) -> Twin:
        """Itself, once it has been run on a few images of a batch, see `first_output`."""
        self.first_output(batch.few(FEW))
        return self

    def first_output(self, few: Batch) -> Any:
        """What it returns for a few images, the first time that it is run.

        Where an op is not known on the values that it meets, its kernel computes it from then on.

        Raises:
            UnsupportedModelError: hooks change what the model returns; or neither the twin nor a kernel computes a node
                (the message names it).
            CalibrationDataError: the model itself cannot be run on these images.
        """
        if told := changed_by_hooks(self._model, few):
            raise UnsupportedModelError(told)
        given = few.to(self.device)
        while True:
            checker = Checker(self.module)
            try:
                with torch.no_grad():
                    output = checker.run(*ordered(self.module, given))
                count, self._undefined = max(few.images, 1), checker.undefined
                self.graph_bytes, self.attention_bytes = checker.bytes / count, checker.attention_bytes / count
                return output
            except UnsupportedModelError as error:
                run(self._model, few, 0)  # not for want of an op, where the kernels fail too
                if not self._let_kernel(error.node):
                    raise

    def layers_alone(self, names: Collection[str]) -> list[WeightedLayer]:
        """The layers with these weights; not those with one that is computed with more than once."""
        runs = Counter(layer.weight.site.name for layer in self.layers)
        return [layer for layer in self.layers if runs[name := layer.weight.site.name] == 1 and name in names]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def call(self, values: Mapping[str, Mapping[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        """Run with others in the place of some of the buffers `scale`, `zero_point` and `shift` (of a weight) of sites.

        Differentiable; the buffers stay as they are.
        """
        with self.sites.replaced(values):
            return self.module(*args, **kwargs)

    def reround_weights(self, enabled: bool = True) -> None:
        """Take weight codes from the float weights at the present scales (True), or as they are in the model."""
        for module in self.sites.modules.values():
            if isinstance(module, WeightQuantizer):
                module.keep_codes = not enabled

    def attention(self) -> AbstractContextManager[None]:
        """Attention of a graph that goes backward, while the context lasts: by products on a CPU that is quicker at it,
        where it is known that there are not too many tokens for that."""
        fits = 0 < self.graph_bytes * _ATTENTION_SHARE >= self.attention_bytes
        return attention_by_products() if self.device.type == "cpu" and fits else nullcontext()

    @contextmanager
    def in_float(self, names: Iterable[str]) -> Iterator[None]:
        """Compute these sites in float while the context lasts: activations are not rounded, float weights are used
        where they are known; the codes of other weights stay."""
        names = list(names)
        modules = [self.sites.modules[name] for name in names]
        whole = set(names) >= set(self.names)
        before = [(module, module.rounding, getattr(module, "keep_codes", None)) for module in modules]
        try:
            for module in modules:
                module.rounding = "none"
                if isinstance(module, WeightQuantizer):
                    module.keep_codes = False
            _compute_in_float(self.module, whole)
            yield
        finally:
            _compute_in_float(self.module, False)
            for module, rounding, keep_codes in before:
                module.rounding = rounding
                if isinstance(module, WeightQuantizer):
                    module.keep_codes = bool(keep_codes)

    def stamp(self, replaced: Mapping[str, Collection[str]] = MappingProxyType({})) -> tuple[Any, ...]:
        """What a run that was recorded reads beside its inputs: where tensors are in memory, code ranges, and how is
        rounded. It changes where one of these does.

        Args:
            replaced: buffers by site that it does not read, as of `call`.
        """
        unread = {(self.sites.modules[site], name) for site, names in replaced.items() for name in names}
        held = tuple(
            None if buffer is None else buffer.data_ptr()
            for module in self._holding
            for name, buffer in module._buffers.items()
            if (module, name) not in unread
        )
        sites = (
            (m.site.qmin, m.site.qmax, m.rounding, getattr(m, "keep_codes", None)) for m in self.sites.modules.values()
        )
        return held, tuple(sites)

    @property
    def device(self) -> torch.device:
        """Where the scales are, and inputs are expected."""
        return next((site.scale.device for site in self.sites.modules.values()), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Twin:
        """Move everything to a device."""
        self.module.to(device)
        return self


def set_rounding(twin: Twin, rounding: Rounding) -> None:
    """How activations are put on their scales: see `Rounding`."""
    for module in twin.sites.modules.values():
        module.rounding = rounding
    _compute_in_float(twin.module, rounding != "round")


def _compute_in_float(module: nn.Module, wanted: bool) -> None:
    """Of what kernels compute on floats, whose scales are their own affair."""
    for part in module.modules():
        if isinstance(part, ByKernel):
            part.in_float = wanted


def unquantized(backend: Backend) -> Twin:
    """The model in float: float activations, and float weights where these are known, dequantized ones else.

    A teacher where the float model is gone.
    """
    twin = Twin(backend)
    set_rounding(twin, "none")
    twin.reround_weights()
    return twin
