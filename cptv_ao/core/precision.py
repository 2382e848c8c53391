"""How exact matrices of float32 numbers are multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


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


@contextmanager
def cpu_products_in_bfloat16() -> Iterator[None]:
    """Matrix products on a CPU of float32 numbers rounded to bfloat16 (8 bits of mantissa; sums in float32) while the
    context lasts, where it has instructions for them, which take half the time. Elsewhere nothing is touched.

    Whole numbers up to 256 are multiplied exactly.
    """
    if not _multiplies_bfloat16():
        yield
        return
    mkldnn: Any = torch.backends.mkldnn
    matmul = mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def attention_by_products() -> Iterator[None]:
    """Attention on a CPU as two products of matrices while the context lasts, where it multiplies bfloat16.

    The fused kernel multiplies each head by itself, which takes oneDNN 2 to 40 times as long in bfloat16 as all of them
    together do; and a graph goes backward by the kernel that it went forward by.
    """
    if not _multiplies_bfloat16():
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


@cache
def _multiplies_bfloat16() -> bool:
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
