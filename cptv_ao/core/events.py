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

    `step`: a step of the descent on the twin (loss of its batch there); `proposal`: scales for the whole model were
    scored; `candidate`: a vector was scored; `block`: a visit ended; `pass`: all blocks were visited. `loss` is that of
    the step on the search images (inf: rejected early), `best` the best so far. `model` is what is searched, with the
    scales of the moment: those of the candidate, after a proposal or a visit the best so far. Run it, never write it.
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
