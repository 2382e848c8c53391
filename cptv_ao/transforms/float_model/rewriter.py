"""A copy of a float model that stock torch.ao can trace and convert: what is exchanged, rewritten, given up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.fx.tracer import QuantizationTracer
from torch.fx import Graph, Node

from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.formatting import counted
from cptv_ao.core.rotations import WORTH, peak_ratio, rotation
from cptv_ao.transforms.float_model.attention_masks import masked_scores
from cptv_ao.transforms.float_model.example_runs import ExampleRun, another_batch, compare, inputs_of, tensors_of
from cptv_ao.transforms.float_model.example_tracer import graph_of, rewrite, undo
from cptv_ao.transforms.float_model.exclusion import leaving_nodes
from cptv_ao.transforms.float_model.float_streams import FloatStreams
from cptv_ao.transforms.float_model.obstacles import first_line, innermost, not_convertible
from cptv_ao.transforms.float_model.rotation import rotate
from cptv_ao.transforms.float_model.smooth_quant import smooth
from cptv_ao.transforms.residual_streams import ResidualStream

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What FX fuses with a ReLU behind it.
_FUSED = (*_CONVOLUTIONS, nn.Linear, nn.BatchNorm2d)
_RELUS = {torch.relu, nn.functional.relu, "relu", "relu_"}

_Told = TypeVar("_Told")


class Rewriter:
    """A copy of a float model that becomes ready for prepare_fx, step by step.

    What is run or traced is a copy of that copy: models cache what they compute (LeViT its biases), proxies too.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...], mapping: QConfigMapping) -> None:
        self.model = copy.deepcopy(model).eval()
        self._example, self._mapping = example, mapping
        # What must not change, also for another number of images.
        run = self._copy()
        self._expected = [(inputs, tensors_of(run(*inputs))) for inputs in (example, another_batch(example))]
        self.leaves: dict[type, None] = {}
        self.notes: list[str] = []
        self._rewritten: set[str] = set()
        self._numbered = 0

    def prepare_modules(self) -> None:
        """Exchange modules for equal ones that FX knows better."""
        norms = 0
        for path, module in list(self.model.named_modules()):
            if isinstance(module, nn.BatchNorm2d) and type(module) is not nn.BatchNorm2d and hasattr(module, "act"):
                self._replace(path, NormAct(module))
                norms += 1
            elif isinstance(module, _CONVOLUTIONS) and isinstance(module.padding, str):
                self._number_padding(path, module)
        if norms:
            self.notes.append(f"{counted(norms, 'batch norm')} with an activation taken apart, so that FX fuses them")
        if self._numbered:
            self.notes.append(f"{counted(self._numbered, 'convolution')} with padding by name got it in numbers")

    def make_traceable(self) -> None:
        """Rewrite the modules that stand in the way, one class after another, until nothing does."""
        while True:
            tracer = QuantizationTracer([], list(self.leaves))
            traced = self._copy()
            try:
                graph = tracer.trace(traced)
            except Exception as error:
                path = innermost(error, traced)
                self._adapt(path, first_line(error))
                continue
            run = ExampleRun(traced, graph)
            path, reason = not_convertible(graph, tracer) or self._misread(run)
            if not reason or path in self._rewritten:
                self._leave_integers_out(run, tracer)
                self._open_fusions(graph)
                while self._rotate(run):  # a layer behind a norm that begins a stream opens what the norm reads
                    run = self._run_again()
                self._smooth(run)
                return
            self._adapt(path, reason)

    def _misread(self, run: ExampleRun) -> tuple[str, str]:
        """The model itself and what is wrong with it where its graph computes something else than it."""
        inputs, outputs = self._expected[0]
        try:
            compare(run.run, inputs, outputs)
        except Exception as error:
            return "", f"its graph is not the model ({type(error).__name__}: {error})".splitlines()[0]
        return "", ""

    def _open_fusions(self, graph: Graph) -> None:
        """Take identities from between a norm, convolution or linear layer and its ReLU, where they prevent fusion."""
        modules = dict(self.model.named_modules())
        for node in graph.nodes:
            if node.op != "call_module" or type(modules[node.target]) is not nn.Identity or len(node.users) != 1:
                continue
            source, user = node.args[0], next(iter(node.users))
            before = modules.get(source.target) if source.op == "call_module" else None
            after = modules.get(user.target) if user.op == "call_module" else user.target
            if isinstance(before, _FUSED) and (isinstance(after, nn.ReLU) or after in _RELUS):
                self._replace(str(node.target), Through())

    def _run_again(self) -> ExampleRun:
        """The model as it is now, on the example."""
        traced = self._copy()
        run = ExampleRun(traced, QuantizationTracer([], list(self.leaves)).trace(traced))
        run.run(*self._expected[0][0])
        return run

    def _rotate(self, run: ExampleRun) -> bool:
        """Rotate the residual streams of which a few channels are far larger than the others, as the example shows;
        whether there were any."""

        def streams(model: nn.Module) -> list[ResidualStream]:
            return FloatStreams(model, run.graph, run.env).find()

        def turned(model: nn.Module, sums: tuple[Node, ...], turn: Tensor) -> list[str]:
            return rotate(model, next(own for own in streams(model) if own.sums == sums), turn)

        done = False
        for stream in streams(self.model):
            turn = rotation(stream.width)
            sums = (value for node in stream.sums if isinstance(value := run.env.get(node), Tensor))
            ratio = peak_ratio(sums, turn)
            if not ratio >= WORTH:  # nor nan
                continue
            ends = self._changed(partial(turned, sums=stream.sums, turn=turn))
            if ends is not None:
                done = True
                for start in stream.starts:
                    self._mapping.set_module_name(start, None)
                there = f"; a linear layer at {', '.join(stream.starts)}, in float, begins it" if stream.starts else ""
                back = f"; a linear layer at {', '.join(ends)} rotates back" if ends else ""
                self.notes.append(
                    f"a residual stream of {len(stream.sums)} sums rotated: its largest values are {ratio:.1f} times "
                    f"smaller so{there}{back}"
                )
        return done

    def _smooth(self, run: ExampleRun) -> None:
        """Move the outliers of norms into the weights that read them, as the example shows them."""
        if count := self._changed(lambda model: smooth(model, run.graph, run.env)):
            self.notes.append(
                f"{count} outlier channels of norms made smaller, and what reads them larger (SmoothQuant)"
            )

    def _changed(self, change: Callable[[nn.Module], _Told]) -> _Told | None:
        """Change a copy of the model and be that one; what the change returned. None where it is another model then,
        as a float model may be that its own roundings change: nothing is changed."""
        before, self.model = self.model, self._copy()
        try:
            told = change(self.model)
            for inputs, outputs in self._expected:
                compare(self._copy(), inputs, outputs)
        except Exception:  # one that does not run any more (its forward reads what was exchanged) is another one, too
            self.model = before
            return None
        return told

    def _leave_integers_out(self, run: ExampleRun, tracer: QuantizationTracer) -> None:
        """Keep prepare_fx from quantizing what is done to integers, masks and what is no tensor."""
        left: dict[str, None] = {}
        masked = masked_scores(run)
        for node, leave in leaving_nodes(run.graph, tracer.node_name_to_scope).items():
            if node in masked or run.takes_integers(node) or run.is_no_tensor(node):
                left[getattr(node.target, "__name__", str(node.target))] = None
                leave(self._mapping)
        if left:
            self.notes.append(f"given integers, masks or sizes, so not quantized: {', '.join(left)}")

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
            why = first_line(error)
            told = reason if reason in why else f"{reason}; rewritten: {why}"
            self.notes.append(f"{kind.__name__} ({counted(len(paths), 'module')}) stays float: {told}")
            return
        self._rewritten.update(paths)
        where = f"{kind.__name__} ({counted(len(paths), 'module')})" if path else "the whole model"
        self.notes.append(f"{where} rewritten for inputs like the example's: {reason}")

    def _rewrite(self, paths: list[str]) -> None:
        for path, (args, kwargs) in inputs_of(self._copy(), paths, self._example).items():
            if path:
                rewrite(self.model.get_submodule(path), args, kwargs)
            else:
                self.model = graph_of(self.model, args, kwargs)
        for inputs, outputs in self._expected:
            compare(self._copy(), inputs, outputs)

    def _copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

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
