"""A model that leaves as it came, whatever is raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.fx import GraphModule

from cptv_ao.backends import reference
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.tensor_slots import OwnTensors


@contextmanager
def restored_on_error(model: GraphModule, backend: Backend) -> Iterator[None]:
    """Whatever is raised inside, the model leaves as it came, with the very tensors that it came with.

    Inside, scales are written into tensors of the model's own: those that it was given with may be those of another
    model, too, and are never written.

    Args:
        model: the one that was given.
        backend: of that model, or of its lowered copy where it is a reference model.
    """
    before, owned, meta = backend.snapshot(), OwnTensors(backend.tensors), dict(model.meta)
    held = reference.state(model) if backend.model is not model else []

    def undo() -> None:
        with ExitStack() as steps:  # all of them, whatever fails on the way
            steps.callback(_put_back, model.meta, meta)
            steps.callback(reference.restore, held)
            steps.callback(owned.give_back)
            if backend.model is model:  # else what was written is a copy
                steps.callback(backend.restore_all, before)

    try:
        owned.take()
        yield
        owned.settle()
    except BaseException as error:
        _undone(undo, error)
        raise


def _undone(undo: Callable[[], None], error: BaseException) -> None:
    """Undo, once more where that fails (a second Ctrl-C); what then is not as it was is told beside the error."""
    for last in (False, True):
        try:
            undo()
            return
        except BaseException as failed:
            if last and hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(f"cptv_ao: a part of the model could not be put back as it was: {failed!r}")


def _put_back(held: dict[str, Any], before: dict[str, Any]) -> None:
    held.clear()
    held.update(before)
