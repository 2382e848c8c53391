"""Of quantized modules the float one that computes with the same weights: for their gradient, and for the network in
float."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
from torch import Tensor, nn

from cptv_ao.fx.ops import by_type
from cptv_ao.fx.quantized_ops import is_quantized, of_module
from cptv_ao.simulation.pointwise import function_of


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)


def float_form(module: nn.Module) -> nn.Module | None:
    """The float module that computes what a quantized one does, or one whose parts are quantized (a copy); None where a
    part is not known."""
    make = by_type(module, _FORMS)
    if make is not None:
        try:
            with torch.random.fork_rng(devices=[]):  # a layer draws its weights when it is made, which are replaced
                return make(module)
        except RuntimeError:  # QNNPACK does not give weights of three dimensions back
            return None
    if (function := function_of(module)) is not None:
        return Applied(function)
    if (known := of_module(module)) is not None and known.role == "reference":
        return copy.deepcopy(module)  # it computes in float
    if is_quantized(module) and not isinstance(module, nnq.LSTM):
        return None
    own = copy.copy(module)
    own._modules = dict(module._modules)  # the quantized parts of the module stay with it
    for name, child in module.named_children():
        found = float_form(child)
        if found is None:
            return None
        own._modules[name] = found
    return own


def _set(module: nn.Module, values: Mapping[str, Tensor | None]) -> nn.Module:
    """A float module with these numbers, in float and not to be trained."""
    with torch.no_grad():
        for name, value in values.items():
            if value is not None:
                given = value.dequantize() if value.is_quantized else value
                getattr(module, name).copy_(given.float().reshape(getattr(module, name).shape))
    return module.eval().requires_grad_(False)


def _linear(module: Any) -> nn.Module:
    weight, bias = module._weight_bias()
    return _set(nn.Linear(weight.shape[1], weight.shape[0], bias is not None), {"weight": weight, "bias": bias})


def _conv(module: Any, kind: type[nn.Module]) -> nn.Module:
    weight, bias = module._weight_bias()
    settings = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
    if module.transposed:
        settings["output_padding"] = module.output_padding
    size = module.in_channels, module.out_channels, module.kernel_size
    return _set(kind(*size, bias=bias is not None, **settings), {"weight": weight, "bias": bias})


def _embedding(module: Any) -> nn.Module:
    weight = module.weight().dequantize()
    return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight, _freeze=True)


def _bag(module: Any) -> nn.Module:
    """The kernels know sums alone, whatever the module was told."""
    weight = module.weight().dequantize()
    rows, width = weight.shape
    made = nn.EmbeddingBag(rows, width, mode="sum", _weight=weight, include_last_offset=module.include_last_offset)
    return made.requires_grad_(False)


def _recurrent(module: Any, kind: type[nn.Module]) -> nn.Module | None:
    """Of several layers, one or two directions each."""
    if module.dtype != torch.qint8:
        return None
    given = module.num_layers, module.bias, module.batch_first, module.dropout, module.bidirectional
    made = kind(module.input_size, module.hidden_size, *given)
    return _set(made, {**module.get_weight(), **(module.get_bias() if module.bias else {})})


def _cell(module: Any, kind: type[nn.Module], **settings: Any) -> nn.Module | None:
    if module.weight_dtype != torch.qint8:
        return None
    made = kind(module.input_size, module.hidden_size, module.bias, **settings)
    return _set(made, {**module.get_weight(), **(module.get_bias() if module.bias else {})})


def _layer_norm(module: Any) -> nn.Module:
    weight, bias = module.weight, module.bias
    made = nn.LayerNorm(module.normalized_shape, module.eps, weight is not None, bias is not None)
    return _set(made, {"weight": weight, "bias": bias})


def _prelu(module: Any) -> nn.Module:
    """Torch's kernel of it does not compute this (2.14: it scales positive values too)."""
    return _set(nn.PReLU(module.weight.numel()), {"weight": module.weight})


def _with_relu(make: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
    return lambda module: nn.Sequential(make(module), nn.ReLU())


_CONVS: Mapping[type[nn.Module], type[nn.Module]] = {
    nnq.Conv1d: nn.Conv1d, nnq.Conv2d: nn.Conv2d, nnq.Conv3d: nn.Conv3d,
    nnq.ConvTranspose1d: nn.ConvTranspose1d, nnq.ConvTranspose2d: nn.ConvTranspose2d,
    nnq.ConvTranspose3d: nn.ConvTranspose3d,
    nnqd.Conv1d: nn.Conv1d, nnqd.Conv2d: nn.Conv2d, nnqd.Conv3d: nn.Conv3d,
    nnqd.ConvTranspose1d: nn.ConvTranspose1d, nnqd.ConvTranspose2d: nn.ConvTranspose2d,
    nnqd.ConvTranspose3d: nn.ConvTranspose3d,
}  # fmt: skip
_FUSED_CONVS: Mapping[type[nn.Module], type[nn.Module]] = {
    nniq.ConvReLU1d: nn.Conv1d, nniq.ConvReLU2d: nn.Conv2d, nniq.ConvReLU3d: nn.Conv3d,
}  # fmt: skip
# By type of quantized module.
_FORMS: dict[type[nn.Module], Callable[[Any], nn.Module | None]] = {
    nnq.Linear: _linear,
    nniq.LinearReLU: _with_relu(_linear),
    nnqd.Linear: _linear,
    nniqd.LinearReLU: _with_relu(_linear),
    **{kind: partial(_conv, kind=made) for kind, made in _CONVS.items()},
    **{kind: _with_relu(partial(_conv, kind=made)) for kind, made in _FUSED_CONVS.items()},
    nnqd.LSTM: partial(_recurrent, kind=nn.LSTM),
    nnqd.GRU: partial(_recurrent, kind=nn.GRU),
    nnqd.LSTMCell: partial(_cell, kind=nn.LSTMCell),
    nnqd.GRUCell: partial(_cell, kind=nn.GRUCell),
    nnqd.RNNCell: lambda module: _cell(module, nn.RNNCell, nonlinearity=module.nonlinearity),
    nnq.Embedding: _embedding,
    nnq.EmbeddingBag: _bag,
    nnq.LayerNorm: _layer_norm,
    nnq.PReLU: _prelu,
    nnq.Dropout: lambda module: nn.Identity(),
    nnq.ReLU6: lambda module: nn.ReLU6(),
    nnq.DeQuantize: lambda module: nn.Identity(),
    nnq.Quantize: lambda module: nn.Identity(),
    nnq.QFunctional: lambda module: nnq.FloatFunctional(),
}


def dequantized(module: nn.Module) -> nn.Module | None:
    """Of a quantized module that computes in float, whatever it is given, the float one; None of others."""
    return cast(nn.Module, float_form(module)) if by_type(module, _IN_FLOAT) else None


_IN_FLOAT: Mapping[type[nn.Module], bool] = {nnq.Embedding: True, nnq.Dropout: True, nnq.ReLU6: True}
