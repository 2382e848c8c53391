"""Runs of a float network on a few images, which are looked at for more than one reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cptv_ao.core.batches import Batch
from cptv_ao.fx.running import run

# Of so many images outputs are remembered.
_FEW = 4


class FloatRuns:
    """Runs a float network, on the same few images once.

    Args:
        model: the network; nobody writes into the batches that it is run on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # What was returned, with the batch, whose tensors stay where they are in memory so.
        self._known = dict[Any, tuple[Batch, Any]]()

    def __call__(self, batch: Batch, index: int) -> Any:
        """What it returns.

        Args:
            index: of the batch among those that were read, for the message.

        Raises:
            CalibrationDataError: the model does not accept the batch.
        """
        if batch.images > _FEW:
            return self._run(batch, index)
        told = [(path, repr(value)) for path, value in batch.leaves if path not in batch.tensors]
        held = [(path, t.data_ptr(), t.shape, t.stride(), t.dtype) for path, t in batch.tensors.items()]
        key = (*told, *held)
        if key not in self._known:
            # Copies, for a model may return a buffer of its own, and write into it again.
            output = self._run(batch, index)
            self._known[key] = batch, tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
        return self._known[key][1]

    def _run(self, batch: Batch, index: int) -> Any:
        with torch.no_grad():
            return run(self._model, batch, index)
