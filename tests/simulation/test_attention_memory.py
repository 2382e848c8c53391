"""What a graph may hold: attention that is not fused holds how much each token attends to each."""

from __future__ import annotations

import pytest
import torch
from helpers import nets
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
