"""Work of a GPU that is recorded once and launched at once: a CUDA graph instead of thousands of launches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Compute = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
"""From some tensors others, all on one GPU, without reading a number on the host."""


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    found: tuple[Tensor, ...]


class Captured:
    """Graphs by what they compute; all in one pool of memory.

    Attributes:
        refused: why the last one that was tried cannot be recorded; empty where all can.
    """

    def __init__(self) -> None:
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool: Any = None  # as torch names it
        self.refused = ""

    def clear(self) -> None:
        """Forget all; what they held of the card is free again."""
        self._recorded.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def run(self, key: Hashable, compute: Compute, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What `compute` makes of tensors; it is recorded when a key is new, and launched as it was recorded else.

        Args:
            key: of what is computed, with the shapes and dtypes of what is given, and all that `compute` reads of the
                host.

        Returns:
            Tensors that the next run writes over.
        """
        if self.refused:
            return compute(given)
        if key not in self._recorded:
            recorded = self._record(compute, given)
            if recorded is None:
                return compute(given)
            self._recorded[key] = recorded
        own = self._recorded[key]
        for held, new in zip(own.given, given, strict=True):
            held.copy_(new)
        own.graph.replay()
        return own.found

    def _record(self, compute: Compute, given: Sequence[Tensor]) -> _Recorded | None:
        """None where a number is read on the host."""
        held = [tensor.clone() for tensor in given]
        stream = torch.cuda.Stream(held[0].device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(held[0].device))
        with torch.cuda.stream(stream):
            compute(held)  # which compiles and allocates what is there for good
            self.refused = _host_read(compute, held)
        torch.cuda.current_stream(held[0].device).wait_stream(stream)
        if self.refused:
            return None
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            found = compute(held)
        self._pool = self._pool or graph.pool()
        return _Recorded(graph, held, found)


def _host_read(compute: Compute, given: Sequence[Tensor]) -> str:
    """What torch says where a computation waits for the card; empty where it does not."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            compute(given)
            return ""
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode(before)
