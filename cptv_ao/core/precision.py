"""How exact a GPU multiplies float32 numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def gpu_products(*, tf32: bool) -> Iterator[None]:
    """Matrix products and convolutions on GPUs in TF32 (inputs of 10 bits of mantissa, sums in float32), which tensor
    cores are for, or in float32, while the context lasts. Nothing is touched where there is no GPU."""
    if not torch.cuda.is_available():
        yield
        return
    before, convolutions = torch.get_float32_matmul_precision(), _convolutions(None)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    _convolutions(["tf32"] * 2 if tf32 else ["ieee"] * 2)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        _convolutions(convolutions)


def _convolutions(wanted: list[Any] | None) -> list[Any]:
    """Set how cuDNN computes, if wanted, and return how it did; torch 2.9 has other names for it than those before, and
    does not bear both."""
    cudnn: Any = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):
        before = [cudnn.allow_tf32]
        if wanted is not None:
            cudnn.allow_tf32 = wanted[0] in (True, "tf32")
        return before
    kinds = (cudnn.conv, cudnn.rnn)
    before = [kind.fp32_precision for kind in kinds]
    for kind, precision in zip(kinds, wanted or before, strict=True):
        kind.fp32_precision = precision
    return before
