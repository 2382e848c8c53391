"""The values that cross the cut before the searched block, cached per batch within a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cptv_ao.core.batches import Batch
from cptv_ao.core.tensors import copied
from cptv_ao.fx.running import own_inputs
from cptv_ao.fx.segments import Segments, Values, packed, same_stamp, storages


class EntryCache:
    """Live values per batch at one cut, with the scales that were in the model when they were computed.

    A batch that does not fit the budget has no entry: it runs from the model's input.

    Args:
        pieces: the model.
        batches: the images.
        budget: bytes that all entries together may hold.
        mine: whether the batch of an index is ever asked for here.
    """

    def __init__(self, pieces: Segments, batches: Sequence[Batch], budget: int, mine: Callable[[int], bool]) -> None:
        self._pieces = pieces
        self._batches = batches
        self._budget = budget
        self._mine = mine
        self._at: int | None = None
        self._stamp: list[Any] = []
        self._values: list[Values | None] = []
        self._copies: tuple[bool, ...] = ()
        self._views: tuple[bool, ...] = ()
        #: bytes held now
        self.bytes = 0

    def move(self, at: int) -> int:
        """Cache what crosses the cut `at`, from the present entries where these are still valid.

        They are when they lie before `at` and nothing that they depend on was written since; a pass over the blocks
        in forward order then runs each piece once, not the whole head per block.

        Returns:
            The number of images for which something was run.
        """
        usable = self._at is not None and self._at <= at and same_stamp(self._stamp, self._pieces.stamp(self._at))
        source = self._at if usable else None
        if source == at:
            return 0
        old = self._values if usable else [None] * len(self._batches)
        self.clear()
        self._views = self._pieces.views(at)
        moved, per_image = 0, 0.0
        with torch.inference_mode():
            for index, batch in enumerate(self._batches):
                before, old[index] = old[index], None
                if not self._mine(index) or self.bytes + per_image * batch.images > self._budget:
                    self._values.append(None)
                    continue
                values = self._run(batch, before, source, at)
                moved += batch.images
                size = sum(storages(values).values())
                per_image = max(per_image, size / batch.images)
                fits = self.bytes + size <= self._budget
                self._values.append(values if fits else None)
                self.bytes += size if fits else 0
        self._at, self._stamp = at, self._pieces.stamp(at)
        self._copies = self._pieces.copies(at)
        return moved

    def _run(self, batch: Batch, before: Values | None, source: int | None, at: int) -> Values:
        if before is None or source is None:
            values: Values = self._pieces.start(*own_inputs(batch), at)
        else:
            values = self._pieces.run(before, source, at)
        return tuple(packed(v) if view else v for v, view in zip(values, self._views, strict=True))

    def output(self, index: int) -> Any:
        """The model's output on a batch: the tail from its entry, or the whole model."""
        values = None if self._at is None else self._values[index]
        if values is None or self._at is None:
            return self._pieces.start(*own_inputs(self._batches[index]), None)
        if any(self._copies):
            values = tuple(copied(v) if copy else v for v, copy in zip(values, self._copies, strict=True))
        return self._pieces.run(values, self._at, None)

    def clear(self) -> None:
        """Drop all entries."""
        self._at, self._stamp, self._values, self.bytes = None, [], [], 0
