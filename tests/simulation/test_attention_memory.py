"""What a graph may hold: attention that is not fused holds how much each token attends to each."""

from __future__ import annotations

import pytest
import torch
from helpers import nets, pt2e
from torch import Tensor, nn
from torch.nn import functional

from cptv_ao.backends.open import open_model
from cptv_ao.core import precision
from cptv_ao.core.batches import Batch
from cptv_ao.simulation.twin import Twin

HEADS, WIDTH = 2, 8


class Attends(nn.Module):
    """Attention with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("tokens", "fused"), [(5, False), (300, True)])
def test_attention_stays_fused_where_there_are_many_tokens(
    tokens: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: True)
    images = torch.randn(3, tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    _, converted = nets.quantize(nets.seeded(Attends), [images])
    twin = Twin(open_model(converted)).checked(Batch((images,), {}, len(images)))
    assert twin.attention_bytes == HEADS * tokens * tokens * 4
    with twin.attention():
        assert torch.backends.cuda.flash_sdp_enabled() == fused
    assert torch.backends.cuda.flash_sdp_enabled()


class ViewsWhatAttends(Attends):
    """A view that is possible only where the heads lie beside each other, as fused attention leaves them."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(b, t, WIDTH))


def test_a_view_of_fused_attention_is_one_of_the_other_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pt2e.torchao()
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: True)
    images = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    converted = pt2e.converted(nets.seeded(ViewsWhatAttends), pt2e.x86(), True, [images])
    twin = Twin(open_model(converted)).checked(Batch((images,), {}, len(images)))
    expected = converted(images)
    with twin.attention():
        assert not torch.backends.cuda.flash_sdp_enabled()
        torch.testing.assert_close(twin(images), expected, rtol=0.0, atol=0.02)
