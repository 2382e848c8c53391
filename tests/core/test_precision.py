"""Products of matrices in bfloat16, on a CPU that has instructions for them: exact for codes, and only inside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cptv_ao.core import precision
from cptv_ao.core.precision import attention_by_products, cpu_products_in_bfloat16


@pytest.fixture
def has_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some kind: oneDNN computes the same without them."""
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: True)


def _whole(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.usefixtures("has_instructions")
def test_products_of_codes_are_exact() -> None:
    """Centred activations of eight bits are between -255 and 255."""
    codes, weight = _whole(-255, 256, 64, 96), _whole(-128, 128, 48, 96)
    with cpu_products_in_bfloat16():
        found = codes @ weight.T
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), codes.double() @ weight.double().T)


@pytest.mark.usefixtures("has_instructions")
def test_what_was_set_comes_back_whatever_happens() -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision

    def fail() -> None:
        with cpu_products_in_bfloat16():
            assert matmul.fp32_precision == "bf16"
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert matmul.fp32_precision == before
    torch.get_float32_matmul_precision()  # raises where old and new ways to set it are mixed


def test_nothing_is_touched_on_a_cpu_without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: False)
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    wanted = values @ values.T
    with cpu_products_in_bfloat16():
        assert torch.equal(values @ values.T, wanted)


@pytest.mark.usefixtures("has_instructions")
def test_attention_is_not_fused_where_products_are_quick() -> None:
    values = [torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(i), requires_grad=True) for i in range(3)]
    fused = functional.scaled_dot_product_attention(*values)
    before = torch.backends.cuda.flash_sdp_enabled()
    with attention_by_products():
        assert not torch.backends.cuda.flash_sdp_enabled()
        found = functional.scaled_dot_product_attention(*values)
    assert torch.backends.cuda.flash_sdp_enabled() == before
    assert "Flash" in str(fused.grad_fn) and "Flash" not in str(found.grad_fn)
    torch.testing.assert_close(found, fused)


def test_attention_stays_fused_on_a_cpu_without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: False)
    before = torch.backends.cuda.flash_sdp_enabled()
    with attention_by_products():
        assert torch.backends.cuda.flash_sdp_enabled() == before
