"""Running a model on held batches, as far as possible from the searched block on alone:

    Before: x -> stem -> blocks.0 -> ... -> blocks.k -> ... -> head -> logits
    After:  [cached values that cross the cut] -> blocks.k -> ... -> head -> logits

The tail is generated code that runs on the model itself (`cptv_ao.fx.segments`), so a scale that was written is seen at
once and nothing of the model is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.fx import GraphModule

from cptv_ao.core.batches import Batch
from cptv_ao.evaluation.entry_cache import EntryCache
from cptv_ao.evaluation.parallel_runs import ParallelRuns, Parts, results
from cptv_ao.fx.running import has_hooks, run
from cptv_ao.fx.segments import Segments


class TailRunner:
    """Runs the tail of a model, or all of it.

    Args:
        model: it is run, never written.
        batches: the images.
        cache_bytes: what the cached block entries may hold; batches beyond it run the whole model.
        mine: whether the batch of an index is ever asked for here.
    """

    def __init__(
        self, model: GraphModule, batches: Sequence[Batch], cache_bytes: int, mine: Callable[[int], bool]
    ) -> None:
        self._model, self._batches = model, batches
        self._pieces = Segments(model)
        self._entries = EntryCache(self._pieces, batches, cache_bytes, mine)
        self._entered = False
        self._parallel = ParallelRuns.of(model)
        self._begun: dict[int, Parts] = {}
        #: images run so far to cache block entries
        self.image_entries = 0
        #: spent inside the model so far
        self.seconds = 0.0

    def plan(self, blocks: Iterable[Sequence[str]]) -> None:
        """Say which blocks (nodes of each) will be entered, so that the code of each is generated once."""
        for nodes in blocks:
            self._pieces.cut(nodes)

    def enter(self, nodes: Sequence[str]) -> None:
        """Cache what crosses the cut before the first of these nodes, with the scales that are in the model now.

        Not where hooks see the call of the model itself: what runs behind a cut does not call it.
        """
        if has_hooks(self._model):
            return
        with self._timed():
            self.image_entries += self._entries.move(self._pieces.cut(nodes))
        self._entered = True

    def leave(self) -> None:
        """Run the whole model again. The entries stay, for the next block to start from."""
        self._entered = False

    def clear(self) -> None:
        """Drop the cached entries, and leave the block."""
        self._entries.clear()
        self._entered = False

    def begin(self, indices: Iterable[int]) -> None:
        """Let parts of these batches run side by side, where they can; all of them are asked for next, in this order,
        before anything is written into the model."""
        self._begun = {}
        if self._parallel is not None and not self._entered:
            self._begun = {index: self._parallel.begin(index, self._batches[index]) for index in indices}

    def output(self, index: int) -> list[Any]:
        """What the model returns for a batch, or for each of its parts, one after another."""
        with self._timed():
            if index in self._begun:
                return results(self._begun.pop(index))
            return [self._entries.output(index) if self._entered else run(self._model, self._batches[index], index)]

    def stamp(self) -> list[Any]:
        """What the outputs depend on, to be compared with `same_stamp`."""
        return self._pieces.stamp(None)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
