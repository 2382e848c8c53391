"""What the ordinary ops of a graph do, in one table: a row for each, with all that stands for it.

An op that is not in the table is not understood. Methods are known by their names: a graph has nothing else of them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.reference as nnqr
from torch import nn
from torch.nn import functional

#: What an op does to the codes and the qparams of its first input.
#:     moves: selects and reorders codes (ReLU and max pools among them); the qparams stay
#:     averages, mean: averages codes; the qparams stay
#:     clamps: to real values; the qparams stay
#:     fixed: computes values of a known range, whose qparams the kernels fix
#:     joins: puts several inputs onto the qparams of the first
#:     asks: gives no tensor, but what a tensor is like
#:     quantizes, dequantizes: goes from float to codes, or back
#:     brings: moves, makes or converts float values, and computes nothing
#:     compares: gives truths
#:     layer: has a weight; norm: a batch norm
Effect = Literal[
    "moves", "averages", "mean", "clamps", "fixed", "joins", "asks", "quantizes", "dequantizes", "brings",
    "compares", "layer", "norm",
]  # fmt: skip
_KEEPING: set[Effect] = {"moves", "averages", "mean", "clamps"}
_BRINGING: set[Effect] = {"joins", "asks", "quantizes", "dequantizes", "brings"}


@dataclass(frozen=True, eq=False)
class Op:
    """A kind of op, and all that stands for it in a graph. There is one object of each: compare with `is`.

    Attributes:
        name: our word for it, to tell of it.
        aten: names of its ops in torch.ops.aten.
        computes: of what moves codes, whether it does something to the values all the same.
    """

    name: str
    effect: Effect
    functions: tuple[Any, ...] = ()
    methods: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    aten: tuple[str, ...] = ()
    computes: bool = False

    def __deepcopy__(self, _: Any) -> Op:
        return self

    @property
    def keeps(self) -> bool:
        """Whether the output has the qparams of the first input."""
        return self.effect in _KEEPING

    @property
    def brings(self) -> bool:
        """Whether it only takes values elsewhere, selects or reorders them, and computes nothing."""
        return self.effect in _BRINGING or (self.effect == "moves" and not self.computes)


_MAX_POOLS = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
_RAW_MAX_POOLS = (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)
_ADAPTIVE = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)
_CONVS = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
_CONV_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_REFERENCE = (nnqr.Conv1d, nnqr.Conv2d, nnqr.Conv3d)
_REFERENCE_TRANSPOSED = (nnqr.ConvTranspose1d, nnqr.ConvTranspose2d, nnqr.ConvTranspose3d)
_QUANTIZED_NORMS = (nnq.BatchNorm2d, nnq.BatchNorm3d, nniq.BNReLU2d, nniq.BNReLU3d)

#: Of two values, and of a value and a number (or another value), in float.
FLOAT_SUMS = {operator.add, torch.add}
FLOAT_SCALINGS = {operator.mul, operator.truediv, torch.mul, torch.div}

# What is decided by, somewhere, beside its effect.
DROPOUT = Op(
    "dropout",
    "moves",
    (functional.dropout, torch.dropout, torch.ops.quantized.dropout),
    (),
    (nn.Dropout, nnq.Dropout),
    ("dropout",),
)
IDENTITY = Op("identity", "moves", (), (), (nn.Identity,))
FLATTEN = Op("flatten", "moves", (torch.flatten,), ("flatten",), (nn.Flatten,), ("flatten",))
MEAN = Op("mean", "mean", (torch.mean,), ("mean",), (), ("mean",))
RESIZE = Op("resize", "moves", (), ("resize_",))
RELU = Op(
    "relu", "moves", (functional.relu, torch.relu, torch.relu_), ("relu", "relu_"), (nn.ReLU,), ("relu",), computes=True
)
MAX_POOL = Op(
    "max_pool",
    "moves",
    (*_MAX_POOLS, *_RAW_MAX_POOLS),
    (),
    (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    ("max_pool1d", "max_pool2d", "max_pool3d"),
    computes=True,
)
AVG_POOL = Op(
    "avg_pool",
    "averages",
    (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d),
    (),
    (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    ("avg_pool1d", "avg_pool2d", "avg_pool3d"),
)
RELU6 = Op("relu6", "clamps", (functional.relu6,), (), (nn.ReLU6, nnq.ReLU6), ("relu6",))
HARDTANH = Op("hardtanh", "clamps", (functional.hardtanh, functional.hardtanh_), (), (nn.Hardtanh,), ("hardtanh",))
CLAMP = Op("clamp", "clamps", (torch.clamp, torch.clamp_), ("clamp", "clamp_"), (), ("clamp",))
SIGMOID = Op(
    "sigmoid",
    "fixed",
    (functional.sigmoid, torch.sigmoid, torch.sigmoid_),
    ("sigmoid", "sigmoid_"),
    (nn.Sigmoid,),
    ("sigmoid",),
)
HARDSIGMOID = Op(
    "hardsigmoid",
    "fixed",
    (functional.hardsigmoid,),
    ("hardsigmoid", "hardsigmoid_"),
    (nn.Hardsigmoid,),
    ("hardsigmoid",),
)
TANH = Op("tanh", "fixed", (functional.tanh, torch.tanh, torch.tanh_), ("tanh", "tanh_"), (nn.Tanh,), ("tanh",))
SOFTMAX = Op(
    "softmax", "fixed", (functional.softmax, torch.softmax), ("softmax",), (nn.Softmax,), ("softmax", "_softmax")
)
GETATTR = Op("getattr", "asks", (getattr,))
QUANTIZE = Op(
    "quantize",
    "quantizes",
    (torch.quantize_per_tensor, torch.quantize_per_channel),
    (),
    (),
    ("quantize_per_tensor", "quantize_per_channel"),
)
DEQUANTIZE = Op("dequantize", "dequantizes", (torch.dequantize,), ("dequantize",), (), ("dequantize",))

#: All of them.
OPS = (
    Op("chunk", "moves", (torch.chunk,), ("chunk",), (), ("chunk",)),
    Op("clone", "moves", (torch.clone,), ("clone",), (), ("clone", "alias", "copy")),
    Op("contiguous", "moves", (), ("contiguous",), (), ("contiguous",)),
    Op("detach", "moves", (torch.detach, torch.detach_), ("detach", "detach_"), (), ("detach",)),
    DROPOUT,
    Op("expand", "moves", (), ("expand", "expand_as"), (), ("expand", "expand_as")),
    FLATTEN,
    Op("getitem", "moves", (operator.getitem,), (), (), ("slice", "select")),
    IDENTITY,
    Op("narrow", "moves", (torch.narrow,), ("narrow",), (), ("narrow",)),
    Op("permute", "moves", (torch.permute, torch.movedim), ("permute", "movedim"), (), ("permute", "movedim")),
    Op("repeat", "moves", (), ("repeat",), (), ("repeat",)),
    Op("reshape", "moves", (torch.reshape,), ("reshape", "reshape_as"), (), ("reshape", "reshape_as")),
    RESIZE,
    Op("roll", "moves", (torch.roll,), ("roll",), (), ("roll",)),
    Op("split", "moves", (torch.split,), ("split",), (), ("split", "split_with_sizes")),
    Op("squeeze", "moves", (torch.squeeze,), ("squeeze", "squeeze_"), (), ("squeeze",)),
    Op("transpose", "moves", (torch.transpose, torch.t), ("transpose", "t"), (), ("transpose", "t")),
    Op("unbind", "moves", (torch.unbind,), ("unbind",), (), ("unbind",)),
    Op("unflatten", "moves", (torch.unflatten,), ("unflatten",), (nn.Unflatten,), ("unflatten",)),
    Op("unsqueeze", "moves", (torch.unsqueeze,), ("unsqueeze", "unsqueeze_"), (), ("unsqueeze",)),
    Op("view", "moves", (), ("view", "view_as"), (), ("view", "view_as", "_unsafe_view")),
    RELU,
    MAX_POOL,
    Op(
        "repeat_interleave",
        "moves",
        (torch.repeat_interleave,),
        ("repeat_interleave",),
        (),
        ("repeat_interleave",),
        computes=True,
    ),
    Op(
        "pixel_shuffle", "moves", (functional.pixel_shuffle,), (), (nn.PixelShuffle,), ("pixel_shuffle",), computes=True
    ),
    Op(
        "pixel_unshuffle",
        "moves",
        (functional.pixel_unshuffle,),
        (),
        (nn.PixelUnshuffle,),
        ("pixel_unshuffle",),
        computes=True,
    ),
    Op(
        "channel_shuffle",
        "moves",
        (functional.channel_shuffle, functional.native_channel_shuffle),
        (),
        (nn.ChannelShuffle,),
        ("channel_shuffle",),
        computes=True,
    ),
    AVG_POOL,
    Op(
        "adaptive_avg_pool",
        "averages",
        _ADAPTIVE,
        (),
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    ),
    Op("interpolate", "averages", (functional.interpolate,), (), (nn.Upsample,)),
    MEAN,
    RELU6,
    HARDTANH,
    CLAMP,
    SIGMOID,
    HARDSIGMOID,
    TANH,
    SOFTMAX,
    Op("cat", "joins", (torch.cat,), (), (), ("cat",)),
    Op("stack", "joins", (torch.stack,), (), (), ("stack",)),
    Op("size", "asks", (), ("size", "shape"), (), ("sym_size",)),
    Op("dim", "asks", (), ("dim", "ndimension"), (), ("dim",)),
    Op("numel", "asks", (torch.numel,), ("numel", "nelement"), (), ("numel",)),
    GETATTR,
    Op("assert", "asks", (torch._assert,), (), (), ("_assert_tensor_metadata", "_assert_scalar")),
    Op("compare", "compares", (operator.eq, operator.ne), (), (), ("eq", "ne", "_assert_async")),
    QUANTIZE,
    DEQUANTIZE,
    Op("to", "brings", (), ("to", "float", "type_as"), (), ("to", "_to_copy")),
    Op("pad", "brings", (functional.pad,), (), (), ("pad", "constant_pad_nd")),
    Op("zeros", "brings", (torch.zeros,), ("new_zeros",), (), ("zeros", "new_zeros")),
    Op("ones", "brings", (torch.ones,), (), (), ("ones",)),
    Op("linear", "layer", (functional.linear,), (), (nn.Linear, nnqr.Linear), ("linear",)),
    Op(
        "conv",
        "layer",
        (*_CONVS, *_TRANSPOSED),
        (),
        (*_CONV_MODULES, *_REFERENCE, *_REFERENCE_TRANSPOSED),
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
    ),
    Op("bilinear", "layer", (functional.bilinear,), (), (nn.Bilinear,), ("bilinear",)),
    Op("attention", "layer", (), (), (nn.MultiheadAttention,)),
    Op(
        "batch_norm",
        "norm",
        (functional.batch_norm, torch.batch_norm),
        (),
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nni.BNReLU2d, nni.BNReLU3d, *_QUANTIZED_NORMS),
        ("batch_norm", "_native_batch_norm_legit_no_training"),
    ),
)
