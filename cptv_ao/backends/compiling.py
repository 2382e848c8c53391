"""The code of a graph after numbers in it were written: compiled once for many writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch.fx import GraphModule

# Graphs in which numbers were written since their code was compiled, and those that are being written now.
_stale: WeakSet[GraphModule] = WeakSet()
_open: WeakSet[GraphModule] = WeakSet()


@contextmanager
def compiled_once(model: GraphModule) -> Iterator[None]:
    """Compile what is written inside at the end, whatever is raised; where contexts are nested, at that of the first.

    Nothing inside may call the model: its code is that from before.
    """
    first = model not in _open
    _open.add(model)
    try:
        yield
    finally:
        if first:
            _open.discard(model)
            if model in _stale:
                model.recompile()
                _stale.discard(model)  # not before: an interrupt leaves it to the next time


def mark_written(model: GraphModule) -> None:
    """Say, inside of `compiled_once` and before it is done, that numbers in the graph are written."""
    _stale.add(model)
