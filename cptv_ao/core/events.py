"""What a callback is told of a search, and what it may answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from torch.fx import GraphModule


@dataclass(frozen=True)
class Event:
    """One step of a refine, as given to the callback.

    Attributes:
        kind: `step`: a step of the descent on the twin; `proposal`: scales for the whole model were scored;
            `candidate`: a vector was scored; `block`: a visit ended; `pass`: all blocks were visited.
        name: of the proposal or of the block.
        pass_index: which pass over the blocks it belongs to; 0 is the first.
        evaluations: candidates that were scored until then.
        loss: that of the step on the search images, of a `step` that of its batch on the twin; inf: rejected early.
        best: the lowest loss on the search images so far.
        seconds: since the call of `refine`, with those before a checkpoint.
        model: what is searched, with the scales of the moment: those of the candidate, after a proposal or a visit the
            best so far. Run it, never write it.
    """

    kind: Literal["step", "proposal", "candidate", "block", "pass"]
    name: str
    pass_index: int
    evaluations: int
    loss: float
    best: float
    seconds: float
    model: GraphModule = field(repr=False, compare=False)


class _Answer(Enum):
    STOP = "stop"


#: A callback that returns it ends the search; the best scales so far stay in the model. Anything else goes on.
STOP: Final = _Answer.STOP

Callback = Callable[[Event], Any]
