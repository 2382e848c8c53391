"""What `refine` and `diagnose` start from: the sites of a model, its float weights and its teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.open import OpenedModel
from cptv_ao.core.batches import Batch
from cptv_ao.core.contexts import is_cpu
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.errors import NonFiniteError, UnsupportedModelError
from cptv_ao.core.packed_outputs import not_finite
from cptv_ao.core.qparams import PER_CHANNEL
from cptv_ao.core.tensors import Select, compared, first_floating, moved
from cptv_ao.fx.inplace import written
from cptv_ao.fx.quantized_ops import is_observer, is_rounding
from cptv_ao.fx.running import call, run
from cptv_ao.simulation.twin import unquantized


@dataclass(frozen=True)
class FloatSources:
    """Where the teacher's outputs and the float weights come from; None: nothing but the quantized model is there."""

    teacher: nn.Module | None
    weights: nn.Module | None

    @staticmethod
    def of(opened: OpenedModel, float_model: nn.Module | None) -> FloatSources:
        """Of a model that may hold float weights itself, and its float original, where that is there."""
        return FloatSources(float_model, opened.float_weights if float_model is None else float_model)

    def teacher_for(self, backend: Backend, batch: Batch) -> nn.Module:
        """The float model, or else the quantized one in float (with the float weights that its backend knows).

        Args:
            batch: some calibration images, on which the twin is tried.

        Raises:
            UnsupportedModelError: there is no float model, and the float twin does not know an op.
        """
        if self.teacher is not None:
            return self.teacher
        try:
            return unquantized(backend).checked(batch).module
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"without float_model the teacher is the quantized model in float, which cannot be had: {error}; pass "
                "float_model= (the float or the prepared model)",
                error.node,
            ) from error


class OnDevice(nn.Module):
    """A copy of a float model on another device; what it is given and what it returns is where the caller computes.

    Raises:
        Exception: whatever a model raises that cannot be copied or put there.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self._device = copy.deepcopy(model).to(device), device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*moved(args, self._device), **moved(kwargs, self._device))
        return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, output)


def teacher_on(teacher: nn.Module, device: str, batch: Batch) -> tuple[nn.Module, list[str]]:
    """A teacher on a device, where it runs there; else itself, and a note that says why not.

    Args:
        batch: some images, of which it is tried on one.
    """
    if is_cpu(device):
        return teacher, []
    try:
        found = OnDevice(teacher, device)
        with torch.no_grad(), as_float(found):
            call(found, batch.few(1))
        return found, []
    except Exception as error:  # of the user's own model, which was made for another device
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        return teacher, [f"the float network ran on the CPU, not on {device}: {problem}"]


@contextmanager
def as_float(model: nn.Module) -> Iterator[None]:
    """Make a float or prepared model compute in float while the context lasts.

    The observers of a prepared model pass their input on without looking at it, and the reference modules that
    convert_fx leaves in it (it replaces the modules of the prepared model too) use their float weights.

    Where a model was trained with fake quantization (QAT), and has it in use, that network is the one that somebody
    trained: its values and weights are rounded at the scales that they have, and nothing is observed. Buffers that a
    graph itself writes (it counts the batches that its batch norms were trained on) are copies inside.
    """
    trained = fakes_quantization(model)
    patched: list[tuple[nn.Module, str]] = []
    held: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for buffers, name in _written_buffers(model):
            held.append((buffers, name, buffers[name]))
            buffers[name] = buffers[name].clone()
        for module in model.modules():
            if is_observer(module):
                patched.append((module, "forward"))
                module.forward = partial(_rounded, module) if is_rounding(module) else _identity
            elif not trained and hasattr(module, "get_weight") and isinstance(getattr(module, "weight", None), Tensor):
                patched.append((module, "get_weight"))
                object.__setattr__(module, "get_weight", partial(getattr, module, "weight"))
        yield
    finally:
        for module, name in patched:
            object.__delattr__(module, name)
        for buffers, name, buffer in held:
            buffers[name] = buffer


def _written_buffers(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Buffers that nodes of a graph work in place on: those of the module that holds each, and its name there."""
    for node in model.graph.nodes if isinstance(model, GraphModule) else ():
        source = written(node, model.get_submodule(str(node.target)) if node.op == "call_module" else None)
        if source is not None and source.op == "get_attr":
            path, _, name = str(source.target).rpartition(".")
            buffers: dict[str, Any] = model.get_submodule(path)._buffers
            if name in buffers:
                yield buffers, name


def fakes_quantization(model: nn.Module) -> bool:
    """Whether a model has fake quantization in use."""
    return any(is_rounding(module) for module in model.modules())


def _rounded(fake: Any, value: Tensor) -> Tensor:
    """What fake quantization makes of a value (...) at the scales that it has."""
    qmin, qmax = fake.activation_post_process.quant_min, fake.activation_post_process.quant_max
    scale, zero_point = fake.scale.detach(), fake.zero_point.detach()
    if isinstance(fake.zero_point, nn.Parameter):  # one that was learned, between codes
        zero_point = zero_point.round().clamp(qmin, qmax)
    if fake.qscheme in PER_CHANNEL:
        return torch.fake_quantize_per_channel_affine(value, scale, zero_point, fake.ch_axis, qmin, qmax)
    return torch.fake_quantize_per_tensor_affine(value, scale, zero_point, qmin, qmax)


def _identity(value: Tensor) -> Tensor:
    return value


def taught(teacher: nn.Module, select: Select, world: World, batch: Batch) -> Tensor:
    """The output (N, C) of a float or prepared model on some images, the same on all ranks."""
    with as_float(teacher):
        (output,) = teacher_outputs(teacher, [batch], select)
    return world.from_first(output)


def teacher_outputs(
    teacher: Callable[..., Any], batches: Sequence[Batch], select: Select = first_floating, world: World = ALONE
) -> list[Tensor]:
    """Run the teacher once: its outputs (N, C) per batch, each computed by one rank.

    Raises:
        NonFiniteError: an output is NaN or infinite.
    """
    outputs: list[Tensor | None] = [None] * len(batches)
    with torch.no_grad():
        for index, batch in enumerate(batches):
            if not world.mine(index):
                continue
            output = compared(run(teacher, batch, index), select)
            if bad := not_finite(select, output):
                raise NonFiniteError(f"the teacher's {bad} on calibration batch {index} holds NaN or inf")
            outputs[index] = output.to(
                "cpu", copy=True
            )  # a model may return a buffer of its own, and write into it again
    return world.share(outputs)
