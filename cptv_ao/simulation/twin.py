"""The float twin of a lowered model: the same arithmetic in float, differentiable, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.qparams import QParams
from cptv_ao.core.tensors import moved
from cptv_ao.fx.node_runner import ordered
from cptv_ao.fx.running import call, changed_by_hooks, run
from cptv_ao.simulation.builder import Builder
from cptv_ao.simulation.by_kernel import ByKernel
from cptv_ao.simulation.check import Checker
from cptv_ao.simulation.lowered_builder import LoweredBuilder
from cptv_ao.simulation.modules import QuantizedLayer, WeightQuantizer, shift_codes
from cptv_ao.simulation.pt2e_builder import FloatLayer, Pt2eBuilder
from cptv_ao.simulation.qtensor import QTensor, Rounding

# Images on which a twin is checked.
_FEW = 2

#: what weighted layers are given, by layer
LayerInputs = dict[QuantizedLayer | FloatLayer, QTensor | Tensor]


class Twin:
    """A float module that computes what the lowered model's kernels compute.

    Scales and zero_points are buffers by site name. Nothing is shared with the model.

    Args:
        backend: of the lowered model.
        engine: the quantized engine that runs it; the present one where None. QNNPACK rounds biases and sums unlike
            the others.

    Raises:
        UnsupportedModelError: an op is not known; the message names its node.

    Attributes:
        graph_bytes: about what the graph of one image holds; known once the twin is `checked`.
    """

    def __init__(self, backend: Backend, engine: str | None = None) -> None:
        self._backend, self._engine = backend, engine or str(torch.backends.quantized.engine)
        self._model = backend.model
        self.graph_bytes = 0.0
        self._by_kernel: set[str] = set()  # nodes whose kernels compute, since it turned out that the twin cannot
        self._build()

    def _build(self) -> None:
        builder: Builder
        if self._backend.form.simulates_itself:
            builder = Pt2eBuilder(self._backend)
        else:
            builder = LoweredBuilder(self._backend, self._engine, self._by_kernel)
        self.module = builder.build()
        self._sites, self._notes = builder.sites, builder.notes
        by_id = {id(module): path for path, module in self.module.named_modules()}
        self._weighted = [m for m in self.module.modules() if isinstance(m, (QuantizedLayer, FloatLayer))]
        self._paths = {name: by_id[id(module)] for name, module in self._sites.items() if id(module) in by_id}

    @property
    def notes(self) -> list[str]:
        """What is to be said of it, once it is `checked`: where no gradient passes, where kernels are in doubt."""
        calls = [node for node in self.module.graph.nodes if node.op == "call_module"]
        parts = ((node.name, part) for node in calls for part in self.module.get_submodule(str(node.target)).modules())
        closed = [f"{name} ({m.extra_repr()})" for name, m in parts if isinstance(m, ByKernel) and m.gradient == "none"]
        told = f"no gradient passes {', '.join(closed)}: what is before that is proposed for without one"
        return [*self._notes, told] if closed else list(self._notes)

    def _let_kernel(self, node: str | None) -> bool:
        """Have a node's kernel compute it, all else as it is; whether it was not so yet, and can be."""
        before, nodes = self._sites, {n.name: n for n in self._model.graph.nodes}
        called = node in nodes and nodes[node].op.startswith("call_")
        if node is None or not called or node in self._by_kernel or self._backend.form.simulates_itself:
            return False
        self._by_kernel.add(node)
        device = self.device
        self._build()
        self.to(device)
        for name in self._sites.keys() & before.keys():
            self._sites[name].follow(before[name])
        return True

    def checked(self, batch: Batch) -> Twin:
        """Itself, once it has been run on a few images of a batch.

        Where an op is not known on the values that it meets, its kernel computes it from then on.

        Raises:
            UnsupportedModelError: hooks change what the model returns; or neither the twin nor a kernel computes a node
                (the message names it).
            CalibrationDataError: the model itself cannot be run on this batch.
        """
        if told := changed_by_hooks(self._model, batch):
            raise UnsupportedModelError(told)
        few = batch.few(_FEW)
        given = replace(few, args=moved(few.args, self.device), kwargs=moved(few.kwargs, self.device))
        while True:
            checker = Checker(self.module)
            try:
                with torch.no_grad():
                    checker.run(*ordered(self.module, given))
                self.graph_bytes = checker.bytes / max(few.images, 1)
                return self
            except UnsupportedModelError as error:
                run(self._model, few, 0)  # not for want of an op, where the kernels fail too
                if not self._let_kernel(error.node):
                    raise

    @property
    def names(self) -> list[str]:
        """Sites whose scales the twin's output depends on."""
        return list(self._paths)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def call(self, values: Mapping[str, Mapping[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        """Run with others in the place of some of the buffers `scale`, `zero_point` and `shift` (of a weight) of sites.

        Differentiable; the buffers stay as they are.
        """
        with self._replaced(values):
            return self.module(*args, **kwargs)

    @contextmanager
    def _replaced(self, values: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
        """Other tensors in the place of the buffers. `torch.func.functional_call` does the same, but its checks take a
        tenth of a step on small networks."""
        kept = [(buffers, dict(buffers)) for buffers in (self._sites[name]._buffers for name in values)]
        try:
            for (buffers, _), others in zip(kept, values.values(), strict=True):
                buffers.update(others)
            yield
        finally:
            for buffers, before in kept:
                buffers.update(before)

    @property
    def layers(self) -> Sequence[QuantizedLayer | FloatLayer]:
        """Those with a weight on a scale, in graph order."""
        return self._weighted

    def layer_inputs(self, batch: Batch) -> LayerInputs:
        """What each weighted layer is given when the twin runs on a batch, which is left as it is."""
        with torch.no_grad(), self.seeing_inputs() as seen:
            call(self, batch)
        return seen

    @contextmanager
    def seeing_inputs(self) -> Iterator[LayerInputs]:
        """What each weighted layer is given (the last time, where it runs more than once) while the context lasts."""
        seen: LayerInputs = {}

        def see(layer: Any, args: tuple[Any, ...]) -> None:
            seen[layer] = args[0]

        hooks = [layer.register_forward_pre_hook(see) for layer in self._weighted]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def get(self, name: str) -> QParams:
        """Scale and zero_point of a site, how a weight is rounded, and what is added to the bias of its layer."""
        site = self._sites[name]
        shift, correction = (site.shift, site.correction) if isinstance(site, WeightQuantizer) else (None, None)
        return QParams(
            site.scale.double().cpu(),
            site.zero_point.round().long().cpu(),
            None if shift is None else shift_codes(shift),
            None if correction is None else correction.cpu(),
        )

    def set(self, name: str, qparams: QParams) -> None:
        """Write a site. The codes of a weight whose float weight is known are re-rounded.

        A zero_point beyond a `limit` is moved to it.
        """
        module = self._sites[name]
        zero_point = qparams.zero_point.clamp(max=module.site.qmax) if module.site.affine else qparams.zero_point
        checked = replace(qparams, zero_point=zero_point).checked(module.site)
        module.scale.copy_(checked.scale)
        module.zero_point.copy_(checked.zero_point)
        if isinstance(module, WeightQuantizer):
            module.set_beside(checked)
            module.refresh()

    def shiftable_weight(self, name: str) -> Tensor | None:
        """The float weight of a site whose codes need not be the nearest; None where there is none."""
        module = self._sites[name]
        return module.weight if isinstance(module, WeightQuantizer) and module.shiftable else None

    def state(self, name: str) -> tuple[Tensor | None, ...]:
        """What is held for a site, for `restore`: copies, but of what nobody writes into (shift, correction)."""
        module = self._sites[name]
        held = module.scale.clone(), module.zero_point.clone()
        if not isinstance(module, WeightQuantizer):
            return held
        return (*held, module.codes.clone(), module.shift, module.correction)

    def restore(self, name: str, state: tuple[Any, ...]) -> None:
        """Put back what `state` returned."""
        module = self._sites[name]
        module.scale.copy_(state[0])
        module.zero_point.copy_(state[1])
        if isinstance(module, WeightQuantizer):
            module.codes.copy_(state[2])
            module.shift, module.correction = state[3:]

    def reround_weights(self, enabled: bool = True) -> None:
        """Take weight codes from the float weights at the present scales (True), or as they are in the model."""
        for module in self._sites.values():
            if isinstance(module, WeightQuantizer):
                module.keep_codes = not enabled

    def set_rounding(self, rounding: Rounding) -> None:
        """How activations are put on their scales: see `Rounding`."""
        for module in self._sites.values():
            module.rounding = rounding
        self._compute_in_float(rounding != "round")

    def limit(self, names: Iterable[str], qmax: int) -> None:
        """Clip the codes of these activation sites at `qmax`."""
        for name in names:
            self._sites[name].site = replace(self._sites[name].site, qmax=qmax)

    @contextmanager
    def in_float(self, names: Iterable[str]) -> Iterator[None]:
        """Compute these sites in float while the context lasts: activations are not rounded, float weights are used
        where they are known; the codes of other weights stay."""
        names = list(names)
        modules = [self._sites[name] for name in names]
        whole = set(names) >= set(self.names)
        before = [(module, module.rounding, getattr(module, "keep_codes", None)) for module in modules]
        try:
            for module in modules:
                module.rounding = "none"
                if isinstance(module, WeightQuantizer):
                    module.keep_codes = False
            self._compute_in_float(whole)
            yield
        finally:
            self._compute_in_float(False)
            for module, rounding, keep_codes in before:
                module.rounding = rounding
                if isinstance(module, WeightQuantizer):
                    module.keep_codes = bool(keep_codes)

    def _compute_in_float(self, wanted: bool) -> None:
        """Of what kernels compute on floats, whose scales are their own affair."""
        for module in self.module.modules():
            if isinstance(module, ByKernel):
                module.in_float = wanted

    @property
    def device(self) -> torch.device:
        """Where the scales are, and inputs are expected."""
        return next((site.scale.device for site in self._sites.values()), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Twin:
        """Move everything to a device."""
        self.module.to(device)
        return self


def unquantized(backend: Backend) -> Twin:
    """The model in float: float activations, and float weights where these are known, dequantized ones else.

    A teacher where the float model is gone.
    """
    twin = Twin(backend)
    twin.set_rounding("none")
    twin.reround_weights()
    return twin
