"""Whether the scales that a model was given with are numbers that a search can start from."""

from __future__ import annotations

import torch

from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.errors import NonFiniteError


def check_finite(store: ScaleStore) -> None:
    """Refuse a model whose scales are zero, NaN or infinite already.

    Raises:
        NonFiniteError: naming the site and the channel.
    """
    for name in store.sites:
        scale = store.read(name).scale.reshape(-1)
        bad = ~(torch.isfinite(scale) & (scale > 0))
        if bool(bad.any()):
            channel = int(bad.nonzero()[0])
            raise NonFiniteError(
                f"{name}: expected a finite scale > 0 in the model that was given, got {float(scale[channel]):.4g}"
                f"{f' in channel {channel}' if len(scale) > 1 else ''}; calibrate again before convert_fx"
            )
