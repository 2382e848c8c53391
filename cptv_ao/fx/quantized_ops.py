"""The quantized modules and ops of torch that are understood, by type and by packet, in one table.

Whatever else is quantized is told of and left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
import torch.ao.nn.quantized.reference as nnqr
import torch.ao.nn.sparse.quantized as sparse
import torch.ao.nn.sparse.quantized.dynamic as sparse_dynamic
from torch import nn
from torch.ao.quantization import FakeQuantizeBase, ObserverBase
from torch.fx import GraphModule, Node

from cptv_ao.fx.decomposed_ops import is_of, packet_of
from cptv_ao.fx.ops import by_type, op_name

#: How a quantized op keeps its scales.
#:     static: a packed weight, and an output scale of its own
#:     dynamic: a packed weight; the scales of activations are computed at run time
#:     lookup: a weight that is read by rows, or that only a kernel can read
#:     scaled: an output scale of its own, no weight
#:     binary: an output scale of its own where both inputs are tensors, else it is the input's times a constant
#:     inherits: the scale of its input; dequantizes: none
#:     reference: not lowered; the weight is quantized each time
Role = Literal["static", "dynamic", "lookup", "scaled", "binary", "inherits", "dequantizes", "reference"]


@dataclass(frozen=True)
class Quantized:
    """A kind of quantized op.

    Attributes:
        product: what the weight is multiplied by, `""` without a weight.
        after: what is computed behind the product, before the output is rounded: `relu`, `leaky_relu`, `tanh`.
        adds: whether a second input is added; its memory is given to the output (oneDNN).
        channels: the dimension of the channels of the output, where it is certain.
        fixed: why the output scale never moves.
    """

    role: Role
    product: Literal["", "linear", "conv", "transposed conv"] = ""
    after: Literal["", "relu", "leaky_relu", "tanh"] = ""
    adds: bool = False
    channels: int | None = None
    fixed: str = ""


def _rows(owner: Any, names: str, row: Quantized) -> dict[Any, Quantized]:
    """A row for each of the names that this torch has."""
    return {getattr(owner, name): row for name in names.split() if hasattr(owner, name)}


_LINEAR = Quantized("static", "linear", channels=-1)
_CONV = Quantized("static", "conv", channels=1)
_TRANSPOSED = Quantized("static", "transposed conv", channels=1)

_MODULES: dict[type[nn.Module], Quantized] = {
    **_rows(nnq, "Linear", _LINEAR),
    **_rows(nniq, "LinearReLU", Quantized("static", "linear", "relu", channels=-1)),
    **_rows(nniq, "LinearLeakyReLU", Quantized("static", "linear", "leaky_relu", channels=-1)),
    **_rows(nniq, "LinearTanh", Quantized("static", "linear", "tanh", channels=-1)),
    **_rows(nnq, "Conv1d Conv2d Conv3d", _CONV),
    **_rows(nniq, "ConvReLU1d ConvReLU2d ConvReLU3d", Quantized("static", "conv", "relu", channels=1)),
    **_rows(nniq, "ConvAdd2d", Quantized("static", "conv", adds=True, channels=1)),
    **_rows(nniq, "ConvAddReLU2d", Quantized("static", "conv", "relu", adds=True, channels=1)),
    **_rows(nnq, "ConvTranspose1d ConvTranspose2d ConvTranspose3d", _TRANSPOSED),
    **_rows(nnqd, "Linear", Quantized("dynamic", "linear")),
    **_rows(nniqd, "LinearReLU", Quantized("dynamic", "linear", "relu")),
    **_rows(nnqd, "Conv1d Conv2d Conv3d", Quantized("dynamic", "conv")),
    **_rows(nnqd, "ConvTranspose1d ConvTranspose2d ConvTranspose3d", Quantized("dynamic", "transposed conv")),
    **_rows(nnqd, "GRU GRUCell LSTM LSTMCell RNNCell", Quantized("lookup")),
    **_rows(nnq, "Embedding EmbeddingBag", Quantized("lookup")),
    **_rows(
        nnq, "BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d", Quantized("scaled", channels=1)
    ),
    **_rows(nniq, "BNReLU2d BNReLU3d", Quantized("scaled", after="relu", channels=1)),
    **_rows(nnq, "LayerNorm", Quantized("scaled", channels=-1)),
    **_rows(nnq, "GroupNorm ELU LeakyReLU Hardswish PReLU Quantize", Quantized("scaled")),
    **_rows(nnq, "Softmax", Quantized("scaled", fixed="fixed qparams of softmax")),
    **_rows(nnq, "Sigmoid", Quantized("scaled", fixed="fixed qparams of sigmoid")),
    **_rows(nnq, "Dropout ReLU6", Quantized("inherits")),
    **_rows(nnq, "DeQuantize", Quantized("dequantizes")),
    **{kind: Quantized("reference") for kind in vars(nnqr).values() if isinstance(kind, type)},
}

_OPS: dict[Any, Quantized] = {
    **_rows(torch.ops.quantized, "add mul", Quantized("binary")),
    **_rows(torch.ops.quantized, "add_relu mul_relu", Quantized("binary", after="relu")),
    **_rows(torch.ops.quantized, "linear", _LINEAR),
    **_rows(torch.ops.quantized, "linear_relu", Quantized("static", "linear", "relu", channels=-1)),
    **_rows(torch.ops.quantized, "conv1d conv2d conv3d", _CONV),
    **_rows(
        torch.ops.quantized, "conv1d_relu conv2d_relu conv3d_relu", Quantized("static", "conv", "relu", channels=1)
    ),
    **_rows(torch.ops.quantized, "conv_transpose1d conv_transpose2d conv_transpose3d", _TRANSPOSED),
    **_rows(
        torch.ops.quantized,
        "linear_dynamic linear_relu_dynamic linear_dynamic_fp16 linear_relu_dynamic_fp16",
        Quantized("dynamic", "linear"),
    ),
    **_rows(torch.ops.quantized, "conv1d_dynamic conv2d_dynamic conv3d_dynamic", Quantized("dynamic", "conv")),
    **_rows(torch.ops.quantized, "layer_norm", Quantized("scaled", channels=-1)),
    **_rows(torch.ops.quantized, "instance_norm", Quantized("scaled", channels=1)),
    **_rows(torch.ops.quantized, "group_norm hardswish elu leaky_relu prelu matmul", Quantized("scaled")),
    **_rows(torch.ops.quantized, "dropout", Quantized("inherits")),
}

#: Of two values, on a scale of its own.
SUMS = {torch.ops.quantized.add, torch.ops.quantized.add_relu}

# Namespaces of torch.ops that compute with quantized values, and functions that make such.
_NAMESPACES = (
    torch.ops.quantized,
    torch.ops.quantized_decomposed,
    torch.ops.onednn,
    torch.ops.sparse,
    torch.ops._quantized,
)
_MAKERS = {torch.quantize_per_channel, torch.quantize_per_tensor, torch.quantize_per_tensor_dynamic}


def of_module(module: nn.Module) -> Quantized | None:
    """What is known of a quantized module."""
    return by_type(module, _MODULES)


def of_node(node: Node, modules: Mapping[str, nn.Module]) -> Quantized | None:
    """What is known of the quantized module or op of torch.ops that a node calls."""
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return None if module is None else of_module(module)
    return _OPS.get(packet_of(node.target)) if node.op == "call_function" else None


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of torch's quantized ones, or made from one, known or not."""
    return any(kind in _ALL for kind in type(module).__mro__)


def is_quantized_op(node: Node) -> bool:
    """Whether a node calls a quantized function, known or not, or one that makes quantized values."""
    if node.op != "call_function":
        return False
    return is_of(node.target, *_NAMESPACES) or node.target in _MAKERS


def quantized_inside(path: str, module: nn.Module) -> Iterator[str]:
    """What is quantized in a module that a graph calls as a whole (a standalone one, a leaf), itself included, as
    `path (op)`."""
    if is_quantized(module):
        yield f"{path} ({type(module).__name__})"
        return
    if isinstance(module, GraphModule):
        yield from (f"{path}.{node.name} ({op_name(node)})" for node in module.graph.nodes if is_quantized_op(node))
    for name, child in module.named_children():
        yield from quantized_inside(f"{path}.{name}", child)


def is_observer(module: nn.Module) -> bool:
    """Whether a module only looks at what passes through it while a model is prepared, or rounds it (QAT)."""
    torchao: Any = sys.modules.get("torchao.quantization.pt2e")
    others = () if torchao is None else (torchao.ObserverBase, torchao.FakeQuantizeBase)
    return isinstance(module, (ObserverBase, FakeQuantizeBase, *others))


def is_rounding(module: nn.Module) -> bool:
    """Whether a module is one of fake quantization, with a scale of its own, in use."""
    torchao: Any = sys.modules.get("torchao.quantization.pt2e")
    kinds = (FakeQuantizeBase,) if torchao is None else (FakeQuantizeBase, torchao.FakeQuantizeBase)
    return isinstance(module, kinds) and bool(module.fake_quant_enabled[0])


def _package_types(package: ModuleType) -> Iterator[type[nn.Module]]:
    """Quantized modules that a package of torch has, known here or not."""
    for kind in vars(package).values():
        if isinstance(kind, type) and issubclass(kind, nn.Module) and kind not in _OF_FLOAT:
            yield kind


# Some of torch's own are among the names of these packages.
_OF_FLOAT = {kind for kind in vars(nn).values() if isinstance(kind, type)} | {
    nnq.FloatFunctional,
    nnq.FXFloatFunctional,
}
_ALL = frozenset(
    kind
    for package in (nnq, nnq.modules, nnqd, nnqr, nniq, nniqd, sparse, sparse_dynamic)
    for kind in _package_types(package)
)
