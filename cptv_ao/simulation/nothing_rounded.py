"""A model in float, with nothing rounded: what it computes, whatever scales it has."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.simulation.twin import FEW, Twin, unquantized


class NothingRounded:
    """A model in float and what it gives on a few images, found once that is asked for.

    Args:
        backend: of the model, as it is then.
        batch: calibration images.

    Attributes:
        few: the first of these.
    """

    def __init__(self, backend: Backend, batch: Batch) -> None:
        self._backend, self.few = backend, batch.few(FEW)

    @cached_property
    def found(self) -> tuple[Twin, Any] | None:
        """The float twin, and what it returned; None where neither it nor a kernel knows an op.

        Raises:
            CalibrationDataError: the model itself cannot be run on these images.
        """
        twin = unquantized(self._backend)
        try:
            return twin, twin.first_output(self.few)
        except UnsupportedModelError:
            return None
