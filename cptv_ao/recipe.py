"""What to give to stock `prepare_fx` so that a model of timm and others traces, converts and loses little.

Nothing of torch is patched: the float model is copied and a few of its modules are rewritten into equal ones.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfig, QConfigMapping, get_default_qconfig, get_default_qconfig_mapping
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.fx.tracer import QuantizationTracer
from torch.ao.quantization.observer import PerChannelMinMaxObserver
from torch.fx import Graph, GraphModule

from cptv_ao.errors import UnsupportedModelError
from cptv_ao.tracing import WEIGHTED_FUNCTIONS, graph_of, is_float_interpolation, rewrite, undo

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def qconfig_mapping(weight_bits: int = 8, engine: str | None = None) -> QConfigMapping:
    """A stock QConfigMapping whose per-channel weights have 2 to 8 bits, with codes that stay in their range.

    Args:
        weight_bits: bits of the weights. Below 8 the range is symmetric (3 bits: -3..3), since convert_fx does not
            clamp and a range of -4..3 would get codes of +4. `RefineConfig(weight_range=(-4, 3))` lets `refine` use
            the code that is left over.
        engine: `x86`, `fbgemm`, `onednn` or `qnnpack`; None: the one of `torch.backends.quantized.engine`.

    Returns:
        torch.ao's default mapping of the engine (activations 8 bits, histogram observers), with these weights.

    Raises:
        ValueError: bits or an engine that do not exist.
    """
    if weight_bits not in range(2, 9):
        raise ValueError(f"weight_bits: expected 2 to 8, got {weight_bits!r}")
    engine = torch.backends.quantized.engine if engine is None else engine
    if engine not in torch.backends.quantized.supported_engines:
        known = ", ".join(e for e in torch.backends.quantized.supported_engines if e != "none")
        raise ValueError(f"engine: expected one of {known}, got {engine!r}")
    half = 2 ** (weight_bits - 1)
    low = -half if weight_bits == 8 else 1 - half
    weight = PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=low, quant_max=half - 1
    )
    default = get_default_qconfig(engine)  # type: ignore[no-untyped-call]
    mapping = get_default_qconfig_mapping(engine)
    own = QConfig(activation=default.activation, weight=weight)  # type: ignore[no-untyped-call]
    mapping.set_global(own)
    for kind, qconfig in list(mapping.object_type_qconfigs.items()):
        if qconfig is not None and qconfig.weight is default.weight:  # linear, conv ...
            mapping.set_object_type(kind, own)
    return mapping


@dataclass(frozen=True)
class Recipe:
    """What to pass to `prepare_fx`; `print()` tells what was done and why.

    Attributes:
        model: a copy of the float model that computes the same; pass it to `prepare_fx`, and to `refine` as
            `float_model`.
        qconfig_mapping: the mapping that was given, with what cannot be quantized left out.
        prepare_custom_config: names the modules that stay float because they cannot be traced.
        notes: what was done, one line each.
    """

    model: nn.Module
    qconfig_mapping: QConfigMapping
    prepare_custom_config: PrepareCustomConfig
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.notes) or "nothing to change: stock prepare_fx takes this model as it is"


def recipe(
    model: nn.Module, example_inputs: tuple[Any, ...], *, qconfig_mapping: QConfigMapping | None = None
) -> Recipe:
    """Make a float model ready for stock `prepare_fx`, keeping as much of it quantized as possible.

    Batch norms that hold their activation (timm's BatchNormAct2d) are taken apart, so that FX fuses them with their
    convolution, and identities between them vanish. A module that cannot be traced, or that computes a weight or
    bias in its forward, is rewritten into its own graph for inputs like `example_inputs` (of any batch size, of this
    image size); where that fails it stays float.

    Args:
        model: the float model; it is not changed.
        example_inputs: what `prepare_fx` takes: a tuple of positional inputs, batch first, 2 or more images.
        qconfig_mapping: as for `prepare_fx`; None: `cptv_ao.qconfig_mapping()`.

    Raises:
        UnsupportedModelError: the model as a whole can neither be traced nor rewritten; `node` names the module.

    Example:
        >>> ready = cptv_ao.recipe(model, example_inputs)                             # doctest: +SKIP
        >>> prepared = prepare_fx(                                                    # doctest: +SKIP
        ...     ready.model, ready.qconfig_mapping, example_inputs,
        ...     prepare_custom_config=ready.prepare_custom_config)
    """
    if not isinstance(example_inputs, tuple):
        raise TypeError(f"example_inputs: expected a tuple as for prepare_fx, got {type(example_inputs).__name__}")
    mapping = _default_mapping() if qconfig_mapping is None else copy.deepcopy(qconfig_mapping)
    with torch.no_grad():
        rewriter = _Rewriter(model, example_inputs, mapping)
        rewriter.prepare_modules()
        rewriter.make_traceable()
    custom = PrepareCustomConfig().set_non_traceable_module_classes(list(rewriter.leaves))
    return Recipe(rewriter.model, mapping, custom, tuple(rewriter.notes))


_default_mapping = qconfig_mapping


class _Rewriter:
    def __init__(self, model: nn.Module, example: tuple[Any, ...], mapping: QConfigMapping) -> None:
        self._given, self._example, self._mapping = model.eval(), example, mapping
        self.model = copy.deepcopy(model)
        self.leaves: dict[type, None] = {}
        self.notes: list[str] = []
        self._rewritten: set[str] = set()
        self._numbered = 0

    def prepare_modules(self) -> None:
        """Exchange modules for equal ones that FX knows better."""
        norms = 0
        for path, module in list(self.model.named_modules()):
            if type(module) is nn.Identity:
                self._replace(path, Through())
            elif isinstance(module, nn.BatchNorm2d) and type(module) is not nn.BatchNorm2d and hasattr(module, "act"):
                self._replace(path, NormAct(module))
                norms += 1
            elif isinstance(module, _CONVOLUTIONS) and isinstance(module.padding, str):
                self._number_padding(path, module)
        if norms:
            self.notes.append(f"{norms} batch norms with an activation taken apart, so that FX fuses them")
        if self._numbered:
            self.notes.append(f"{self._numbered} convolutions with padding by name got it in numbers")

    def make_traceable(self) -> None:
        """Rewrite the modules that stand in the way, one class after another, until nothing does."""
        while True:
            tracer = QuantizationTracer([], list(self.leaves))
            try:
                graph = tracer.trace(self.model)
            except Exception as error:
                path = _innermost(error, self.model)
                self._adapt(path, f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            path, reason = _not_convertible(graph, tracer) or self._misread(graph)
            if not reason or path in self._rewritten:
                return
            self._adapt(path, reason)

    def _misread(self, graph: Graph) -> tuple[str, str]:
        """The model itself and what is wrong with it where its graph computes something else than it."""
        try:
            self._compare(GraphModule(self.model, graph), self._example)
        except Exception as error:
            return "", f"its graph is not the model ({type(error).__name__}: {error})".splitlines()[0]
        return "", ""

    def _adapt(self, path: str, reason: str) -> None:
        """Rewrite all modules of a class; where one of them cannot be, the class stays float."""
        kind = type(self.model.get_submodule(path))
        paths = [p for p, module in self.model.named_modules() if type(module) is kind]
        before = self.model
        try:
            if self._rewritten.intersection(paths):
                raise RuntimeError(reason)
            self._rewrite(paths)
        except Exception as error:
            if not path:
                raise UnsupportedModelError(
                    f"recipe: the top level of {kind.__name__} cannot be traced ({reason}) and not be rewritten "
                    f"({type(error).__name__}: {error}); move the code at fault into a module of its own, which then "
                    "stays float",
                    path,
                ) from error
            self.model = before
            for each in paths:
                undo(before.get_submodule(each))
            self.leaves[kind] = None
            self.notes.append(f"{kind.__name__} ({len(paths)} modules) stays float: {reason}")
            return
        self._rewritten.update(paths)
        where = f"{kind.__name__} ({len(paths)} modules)" if path else "the whole model"
        self.notes.append(f"{where} rewritten for inputs like the example's: {reason}")

    def _rewrite(self, paths: list[str]) -> None:
        for path, (args, kwargs) in _inputs_of(self.model, paths, self._example).items():
            if path:
                rewrite(self.model.get_submodule(path), args, kwargs)
            else:
                self.model = graph_of(self.model, args, kwargs)
        for example in (self._example, _another_batch(self._example)):
            self._compare(self.model, example)

    def _compare(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        """Compare with the given model on some inputs."""
        expected, got = _tensors(self._given(*example)), _tensors(model(*example))
        if len(expected) != len(got):
            raise RuntimeError(f"{len(got)} outputs in place of {len(expected)}")
        for a, b in zip(expected, got, strict=True):
            if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True):
                raise RuntimeError(f"other outputs for inputs of shapes {_shapes(example)}")

    def _replace(self, path: str, module: nn.Module) -> None:
        if path:
            owner, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(owner), name, module.eval())

    def _number_padding(self, path: str, module: nn.Module) -> None:
        """Padding by name, as numbers, which the quantized kernels take; asymmetric ones stay float."""
        convolution = cast(nn.Conv2d, module)
        totals = [d * (k - 1) for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)]
        if convolution.padding == "valid":
            totals = [0] * len(totals)
        if any(total % 2 for total in totals):
            self._mapping.set_module_name(path, None)
            self.notes.append(f"{path} stays float: its padding is not the same on both sides")
        else:
            convolution.padding = tuple(total // 2 for total in totals)
            self._numbered += 1


class Through(nn.Module):
    """An identity that leaves no trace in a graph; torch.nn.Identity would keep FX from fusing across it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class NormAct(nn.Module):
    """A batch norm and its activation as two modules, which FX fuses with the convolution before them."""

    def __init__(self, module: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine)
        self.norm.load_state_dict({k: v for k, v in module.state_dict().items() if "." not in k})
        parts = (getattr(module, "drop", None), getattr(module, "act", None))
        self.rest = nn.Sequential(*(part for part in parts if part is not None and type(part) is not nn.Identity))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.rest(self.norm(x)))


def _innermost(error: BaseException, model: nn.Module) -> str:
    """Path of the innermost module that an exception passed through; "" is the model itself."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = paths.get(id(frame.f_locals.get("self")), found)
    return found


def _not_convertible(graph: Graph, tracer: QuantizationTracer) -> tuple[str, str] | None:
    """Path of a module whose graph convert_fx would break on, and the reason."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for node in graph.nodes:
        scope = tracer.node_name_to_scope[node.name][0] if node.name in tracer.node_name_to_scope else ""
        if node.op == "call_function" and node.target in WEIGHTED_FUNCTIONS:
            weights = node.args[1:3]
            if node.kwargs or not all(w is None or (hasattr(w, "op") and w.op == "get_attr") for w in weights):
                return scope, f"{node.target.__name__} with keyword arguments or a computed weight or bias"
        if is_float_interpolation(node):
            return scope, "interpolate in a mode that has no quantized kernel stays float"
        if node.op == "get_attr" and str(node.target).rpartition(".")[0] in called:
            user = next(iter(node.users), node)
            scope = tracer.node_name_to_scope.get(user.name, (scope, None))[0]
            return scope, f"reads {node.target}, which convert_fx replaces"
    return None


def _inputs_of(
    model: nn.Module, paths: list[str], example: tuple[Any, ...]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each of some modules is given when the model runs on the example."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def remember(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path in found and _shapes((args, kwargs)) != _shapes(found[path]):
                raise RuntimeError("it is called with inputs of several shapes")
            found[path] = (args, kwargs)

        return hook

    handles = [model.get_submodule(p).register_forward_pre_hook(remember(p), with_kwargs=True) for p in paths]
    try:
        model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shapes(value: Any) -> Any:
    return [tuple(t.shape) for t in _tensors(value)]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [t for part in value for t in _tensors(part)] if isinstance(value, (tuple, list, type({}.values()))) else []


def _another_batch(example: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(torch.cat([part, part[:1]]) if isinstance(part, Tensor) and part.dim() else part for part in example)
