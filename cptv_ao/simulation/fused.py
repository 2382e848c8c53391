"""Passes over activations that a GPU does at once: rescale, round and clamp; and back, with all sums that scales need.

In plain torch each is five passes over memory forward and as many backward, which is what a step of the descent takes
its time for. Where Triton is not there, or cannot compile, and on a CPU, the plain forms compute it.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.errors import CptvWarning
from cptv_ao.simulation.limits import Limits

# Values of one program, and what one that adds up goes over in turn.
_BLOCK, _TURNS = 1024, 8
# Rows of a tile of the kernel that adds up by column; columns of those of values that have none.
_ROWS, _COLUMNS, _FLAT = 32, 128, 1024


def takes(value: Tensor, channel_dim: int | None = None) -> bool:
    """Whether a tensor is computed on here.

    Args:
        channel_dim: of values of channels, which must be last, or can be in memory.
    """
    if not value.is_cuda or value.dtype != torch.float32 or not 0 < value.numel() < 2**31 - 2**20:
        return False
    if torch.compiler.is_compiling() or isinstance(value, torch._subclasses.FakeTensor):
        return False
    last = channel_dim is None or channel_dim % value.dim() == value.dim() - 1
    return (last or (value.dim() == 4 and channel_dim == 1)) and compiles(value.device)


@cache
def compiles(device: torch.device) -> bool:
    """Whether Triton is there and computes on a device what torch does."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("kernels are tried before a graph is captured")  # by the run that warms it up
    try:
        x, number = torch.linspace(-3, 3, 257, device=device), torch.ones((), device=device)
        found = fit(x, 2 * number, None, Limits(-4 * number, 5 * number, True))
        if torch.equal(found, (2 * x).round().clamp(-4, 5)):
            return True
        problem = "it computes something else than torch"
    except Exception as error:  # whatever a compiler raises that is not there, or not whole
        problem = (str(error).splitlines() or [type(error).__name__])[0]
    warnings.warn(f"no fused kernels on {device}, plain torch computes there: {problem}", CptvWarning, stacklevel=2)
    return False


def fit(x: Tensor, multiplier: Tensor, offset: Tensor | None, limits: Limits, channel_dim: int = -1) -> Tensor:
    """The codes of (x + offset) * multiplier, in the layout of x.

    Args:
        multiplier: () or (C,); `offset`: (C,), or None.
    """
    x, multiplier, columns = _operands(x, multiplier, offset, channel_dim)
    codes = torch.empty_like(x)
    low, high = (_end(end, x.device) for end in (limits.low, limits.high))
    _kernels().fit[(_cdiv(x.numel(), _BLOCK),)](
        x, multiplier, _or(offset, x), low, high, codes, x.numel(), columns or 1,
        BY_COLUMN=columns is not None, MOVED=offset is not None, ROUNDS=limits.rounds, BLOCK=_BLOCK,
        enable_fp_fusion=False,
    )  # fmt: skip
    return codes


def pull(
    gradient: Tensor,
    x: Tensor,
    multiplier: Tensor,
    offset: Tensor | None,
    limits: Limits,
    factor: Tensor | None = None,
    channel_dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """What the gradient of codes is before they are clipped, and what it adds up to.

    Args:
        x, multiplier, offset, limits, channel_dim: as they were given to `fit`.
        factor: () that multiplies what is passed on; the sums are without it.

    Returns:
        In the layout of x; and sums of what passed, of that times u, and of what a zero_point is pulled: (3, C) where
        there is a multiplier or an offset by channel, else (3,).
    """
    x, multiplier, columns = _operands(x, multiplier, offset, channel_dim)
    gradient, passed = _like(gradient, x), torch.empty_like(x)
    width = columns or _FLAT
    tile = min(_COLUMNS, _power(width))
    rows = _cdiv(x.numel(), width)
    programs = _cdiv(rows, _ROWS * _TURNS)
    sums = x.new_empty(programs, 3, width)
    low, high = (_end(end, x.device) for end in (limits.low, limits.high))
    one = _end(1.0, x.device) if factor is None else factor
    _kernels().pull[(programs, _cdiv(width, tile))](
        gradient, x, multiplier, _or(offset, x), low, high, one, passed, sums, x.numel(), width,
        BY_COLUMN=columns is not None, MOVED=offset is not None, MARGIN=0.5 if limits.rounds else 0.0,
        RELU=limits.relu, ROWS=_ROWS, COLUMNS=tile, TURNS=_TURNS, enable_fp_fusion=False,
    )  # fmt: skip
    return passed, sums.sum(0) if columns is not None else sums.sum((0, 2))


def add(a: Tensor, b: Tensor, factors: Tensor, limits: Limits) -> Tensor:
    """The codes of (fma(a, s_a, l_a) + fma(b, s_b, l_b)) / s; `factors`: s_a, l_a, s_b, l_b, 1 / s, (5,)."""
    a = _dense(a)
    b, codes = _like(b, a), torch.empty_like(a)
    low, high = (_end(end, a.device) for end in (limits.low, limits.high))
    _kernels().add[(_cdiv(a.numel(), _BLOCK),)](
        a, b, factors, low, high, codes, a.numel(), ROUNDS=limits.rounds, BLOCK=_BLOCK, enable_fp_fusion=False
    )
    return codes


def pull_add(gradient: Tensor, a: Tensor, b: Tensor, factors: Tensor, limits: Limits) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a and of b; and sums (3,): of what passed times u, times a, and of what a zero_point is
    pulled."""
    a = _dense(a)
    b, gradient = _like(b, a), _like(gradient, a)
    d_a, d_b = torch.empty_like(a), torch.empty_like(a)
    programs = _cdiv(a.numel(), _BLOCK * _TURNS)
    sums = a.new_empty(programs, 3)
    low, high = (_end(end, a.device) for end in (limits.low, limits.high))
    _kernels().pull_add[(programs,)](
        gradient, a, b, factors, low, high, d_a, d_b, sums, a.numel(), MARGIN=0.5 if limits.rounds else 0.0,
        RELU=limits.relu, BLOCK=_BLOCK, TURNS=_TURNS, enable_fp_fusion=False,
    )  # fmt: skip
    return d_a, d_b, sums.sum(0)


def apart(a: Tensor, b: Tensor, weight: Tensor, ratio: Tensor) -> Tensor:
    """sum(weight (a - ratio b)^2), (); `weight`: (C,), of the last dimension."""
    programs = _cdiv(a.numel(), _BLOCK * _TURNS)
    sums = a.new_empty(programs)
    _kernels().apart[(programs,)](
        a, b, weight, ratio, ratio, a, sums, a.numel(), weight.numel(),
        BACKWARD=False, BLOCK=_BLOCK, TURNS=_TURNS, enable_fp_fusion=False,
    )  # fmt: skip
    return sums.sum()


def pull_apart(a: Tensor, b: Tensor, weight: Tensor, ratio: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """factor * weight (a - ratio b), and the sum (), without the factor, of that times a."""
    programs, result = _cdiv(a.numel(), _BLOCK * _TURNS), torch.empty_like(a)
    sums = a.new_empty(programs)
    _kernels().apart[(programs,)](
        a, b, weight, ratio, factor, result, sums, a.numel(), weight.numel(),
        BACKWARD=True, BLOCK=_BLOCK, TURNS=_TURNS, enable_fp_fusion=False,
    )  # fmt: skip
    return result, sums.sum()


@cache
def _kernels() -> Any:
    from cptv_ao.simulation import triton_kernels  # Triton is there on GPUs alone

    return triton_kernels


def _end(value: float | Tensor, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else _number(value, device)


@cache
def _number(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def _dense(x: Tensor, channel_dim: int | None = None) -> Tensor:
    """With channels last in memory; without channels one value after another, in any order."""
    in_columns = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if channel_dim is None:
        return x if in_columns else x.contiguous()
    last = channel_dim % x.dim() == x.dim() - 1
    return x.contiguous() if last else x.contiguous(memory_format=torch.channels_last)


def _like(other: Tensor, x: Tensor) -> Tensor:
    """In the layout of x."""
    return other.contiguous() if x.is_contiguous() else other.contiguous(memory_format=torch.channels_last)


def _operands(
    x: Tensor, multiplier: Tensor, offset: Tensor | None, channel_dim: int
) -> tuple[Tensor, Tensor, int | None]:
    """Values in a layout that fits, a multiplier by channel, and how many channels there are; one for all and None
    where neither multiplier nor offset is by channel."""
    if multiplier.dim() == 0 and offset is None:
        return _dense(x), multiplier, None
    channels = x.shape[channel_dim]
    return _dense(x, channel_dim), multiplier.expand(channels).contiguous(), channels


def _or(value: Tensor | None, other: Tensor) -> Tensor:
    return other if value is None else value.contiguous()


def _cdiv(count: int, size: int) -> int:
    return -(-count // size)


def _power(count: int) -> int:
    """The least power of two that is as large."""
    return 1 << max(count - 1, 0).bit_length()
