"""Where a search is, as a value; its tensors and JSON data, and back. What is read is checked; whether its losses are
those of its scales, only scoring them tells: a file can say anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from cptv_ao.core.outcome import BlockResult, Losses, Point
from cptv_ao.core.plain import as_plain, from_plain
from cptv_ao.core.qparams import Assignment, QParams
from cptv_ao.evaluation.cost import Seconds
from cptv_ao.search.proposals.gradient import State as DescentState

_DESCENT = "descent/"


@dataclass(frozen=True)
class Position:
    """Where a run is.

    Attributes:
        passes, blocks: whole passes, and blocks of the pass after them.
        gained: whether that pass has gained anything.
        idle: images that were scored since something was gained.
    """

    passes: int = 0
    blocks: int = 0
    gained: bool = False
    idle: int = 0


@dataclass(frozen=True)
class SearchLosses:
    """Of the model that was given, of the best scales so far, and of those that are in the model (search images)."""

    start: Losses
    best: Losses
    now: float

    def fault(self, found: SearchLosses) -> str:
        """What is wrong with losses that a file tells, in words; nothing where scoring its scales again has found the
        same, and the best ones are not worse than the model that was given."""
        if self.start != found.start:
            return (
                f"it started from another loss ({_exactly(self.start)}, here {_exactly(found.start)}): is this "
                "another machine or thread count?"
            )
        if self != found:
            return (
                f"its scales are not what it says: best {_exactly(self.best)}, here {_exactly(found.best)}; last "
                f"{self.now}, here {found.now}"
            )
        if found.best.worse_than(found.start):
            return f"its scales are worse than the given ones: {_exactly(found.best)}, those {_exactly(found.start)}"
        return ""


@dataclass(frozen=True)
class Record:
    """What a search has done so far, as far as numbers and words tell it.

    Attributes:
        rejected: whether a state was not accepted for what it made of the held-out images.
        step_sizes: of the strategies, by block.
        raced: races of the evaluator so far.
    """

    position: Position
    losses: SearchLosses
    rejected: bool
    step_sizes: dict[str, dict[str, float]]
    evaluations: int
    seconds: float
    results: tuple[BlockResult, ...]
    stages: tuple[str, ...]
    history: tuple[Point, ...]
    raced: int

    def checked(self) -> Record:
        """Itself.

        Raises:
            ValueError: naming what could not be, beside what its scales score.
        """
        at = self.position
        counts = (at.passes, at.blocks, at.idle, self.evaluations, self.raced)
        steps = [step for steps in self.step_sizes.values() for step in steps.values()]
        if min(counts) < 0 or not 0 <= self.seconds < math.inf or not all(0 < step < math.inf for step in steps):
            raise ValueError("expected counts and seconds >= 0, and step sizes > 0")
        kept = [point for point in self.history if point.kept]
        if not kept:
            raise ValueError("expected a history that begins with the start")
        first, last = (Losses(point.search, point.holdout) for point in (kept[0], kept[-1]))
        if (first, last) != (self.losses.start, self.losses.best):
            raise ValueError("expected a history from the start's losses to the best ones")
        return self


@dataclass(frozen=True)
class SearchState:
    """All that a search needs to go on, in another process, too.

    Attributes:
        record: what it has done so far.
        random: state of its random generator, JSON-safe.
        now: of the sites that are not as where it started.
        best: the same of the best scales so far; None where these are those of the model that was given.
        descent: where the descent is; None where it has not begun, or is over.
        image_seconds: what the search measured to plan by, see `cptv_ao.evaluation.cost`; 0 where no time is limited.
    """

    record: Record
    random: dict[str, Any]
    now: Assignment
    best: Assignment | None
    descent: DescentState | None = None
    image_seconds: Seconds = (0.0, 0.0)


class Resumable(Protocol):
    """A search that can be saved, and go on from what was saved."""

    def state(self) -> SearchState:
        """Where it is."""

    def resume(self, state: SearchState) -> None:
        """Go to where it was. Its losses are not those of its scales until `score_again` has found them.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is no state of this search.
        """

    def score_again(self) -> SearchLosses:
        """Find the losses of the scales that `resume` has brought back; all ranks together."""


def to_file(state: SearchState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state as tensors and JSON data."""
    data = {**as_plain(state.record), "best_is_given": state.best is None, "random": state.random}
    data["image_seconds"] = list(state.image_seconds)
    tensors = _tensors("now", state.now) | _tensors("best", state.best or {})
    if state.descent is not None:
        own, data["descent"] = state.descent
        tensors |= {_DESCENT + key: tensor for key, tensor in own.items()}
    return tensors, data


def from_file(tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> SearchState:
    """The state that `to_file` took apart.

    Raises:
        KeyError, TypeError, ValueError: it is not that.
    """
    record = from_plain(Record, {field.name: data[field.name] for field in fields(Record)}).checked()
    if type(data["best_is_given"]) is not bool or not isinstance(data["random"], dict):
        raise TypeError("expected to be told whether the best scales are the given ones, and the random generator")
    best = None if data["best_is_given"] else _assignment("best", tensors)
    descent = None
    if data.get("descent") is not None:
        own = {key.removeprefix(_DESCENT): t for key, t in tensors.items() if key.startswith(_DESCENT)}
        descent = own, data["descent"]
    now, planned = _assignment("now", tensors), image_seconds(data)
    return SearchState(record, data["random"], now, best, descent, planned)


def image_seconds(data: Mapping[str, Any]) -> Seconds:
    """What `to_file` was told of the seconds of a forward.

    Raises:
        KeyError, ValueError: it is not that.
    """
    found = data["image_seconds"]
    numbers = found if isinstance(found, list) and all(type(one) is float for one in found) else []
    if len(numbers) != 2 or not all(0 <= one < math.inf for one in numbers):
        raise ValueError(f"image_seconds: expected two finite numbers >= 0, got {found!r}")
    return numbers[0], numbers[1]


def _tensors(prefix: str, scales: Assignment) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, qparams in scales.items():
        for part in fields(qparams):
            if (held := getattr(qparams, part.name)) is not None:
                tensors[f"{prefix}/{name}/{part.name}"] = held.clone()  # "now" and "best" may hold the same
    return tensors


def _assignment(prefix: str, tensors: Mapping[str, Tensor]) -> Assignment:
    scales: Assignment = {}
    for key, scale in tensors.items():
        if key.startswith(f"{prefix}/") and key.endswith("/scale"):
            own = key.removesuffix("/scale")
            shift, correction = tensors.get(f"{own}/shift"), tensors.get(f"{own}/correction")
            if shift is not None and shift.dtype != torch.int8:
                raise ValueError(f"{own}/shift: expected torch.int8, got {shift.dtype}")
            if correction is not None and (correction.dtype, correction.dim()) != (torch.float32, 1):
                raise ValueError(
                    f"{own}/correction: expected torch.float32 of 1 dimension, got {correction.dtype} of "
                    f"{correction.dim()}"
                )
            scales[own.removeprefix(f"{prefix}/")] = QParams(scale, tensors[f"{own}/zero_point"], shift, correction)
    return scales


def _exactly(losses: Losses) -> str:
    """All digits: what is told apart by equality must not look equal."""
    return f"{losses.search}" if losses.holdout is None else f"{losses.search} and {losses.holdout} held out"
