"""Where a search is, as tensors and JSON data, and back. What is read is checked, and its losses are found anew: a file
can say anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.outcome import BlockResult, Losses, Point
from cptv_ao.core.plain import as_plain, from_plain
from cptv_ao.core.qparams import QParams
from cptv_ao.search.loop import Loop, Position


@dataclass(frozen=True)
class Claimed:
    """Losses that a file tells of its scales."""

    start: Losses
    best: Losses
    now: float


@dataclass(frozen=True)
class _Told:
    """All that a file tells beside tensors and generators."""

    position: Position
    losses: Claimed
    best_is_given: bool
    rejected: bool
    step_sizes: dict[str, dict[str, float]]
    evaluations: int
    seconds: float
    results: tuple[BlockResult, ...]
    stages: tuple[str, ...]
    history: tuple[Point, ...]
    raced: int


def taken_from(loop: Loop) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Where a search is, for `put_into`: what it moved, by site, and JSON data."""
    backend, now = loop.backend, loop.backend.snapshot()
    tensors = _moved(loop, "now")
    if not loop.best_is_given:
        backend.restore_all(loop.best_state)
        tensors |= _moved(loop, "best")
        backend.restore_all(now)
    told = _Told(
        position=loop.position,
        losses=Claimed(loop.start, loop.best, loop.loss),
        best_is_given=loop.best_is_given,
        rejected=loop.rejected,
        step_sizes=loop.step_sizes,
        evaluations=loop.budget.evaluations,
        seconds=loop.budget.seconds,
        results=tuple(loop.results),
        stages=tuple(loop.stages),
        history=tuple(loop.history),
        raced=loop.search.raced,
    )
    return tensors, {**as_plain(told), "random": loop.rng.bit_generator.state}


def put_into(loop: Loop, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> Claimed:
    """Bring a search to where it was. Its losses are not those of its scales until `score_again` has found them.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not what `taken_from` returned for the same model.
    """
    told = from_plain(_Told, {field.name: data[field.name] for field in fields(_Told)})
    _check(told)
    loop.best_state = loop.given_state
    if not told.best_is_given:
        _write(loop, tensors, "best")
        loop.best_state = loop.backend.snapshot()
        loop.backend.restore_all(loop.first_state)
    _write(loop, tensors, "now")
    loop.position, loop.rejected = told.position, told.rejected
    loop.rng.bit_generator.state = data["random"]
    loop.step_sizes.update(told.step_sizes)
    loop.budget.go_on_from(told.evaluations, told.seconds)
    loop.results += told.results
    loop.stages += told.stages
    loop.history = list(told.history)
    loop.search.raced = told.raced
    return told.losses


def score_again(loop: Loop, claimed: Claimed) -> str:
    """Find the losses of the scales that `put_into` has brought back; all ranks together.

    Returns:
        Where they are not what was claimed, or the best ones are worse than the model that was given: that, in words.
    """
    if claimed.start != loop.start:
        return (
            f"it started from another loss ({_in_words(claimed.start)}, here {_in_words(loop.start)}): is this another "
            "machine or thread count?"
        )
    now, best = loop.backend.snapshot(), loop.start
    if not loop.best_is_given:
        loop.backend.restore_all(loop.best_state)
        best = loop.losses()
        loop.backend.restore_all(now)
    loop.begin_at(best)
    if (best, loop.loss) != (claimed.best, claimed.now):
        return (
            f"its scales are not what it says: best {_in_words(claimed.best)}, here {_in_words(best)}; last "
            f"{claimed.now:.6g}, here {loop.loss:.6g}"
        )
    if best.worse_than(loop.start):
        return f"its scales are worse than the given ones: {_in_words(best)}, those {_in_words(loop.start)}"
    return ""


def _check(told: _Told) -> None:
    """What could not be, beside what its scales score.

    Raises:
        ValueError: naming it.
    """
    counts = (told.position.passes, told.position.blocks, told.evaluations, told.raced)
    steps = [step for steps in told.step_sizes.values() for step in steps.values()]
    if min(counts) < 0 or not 0 <= told.seconds < math.inf or not all(0 < step < math.inf for step in steps):
        raise ValueError("expected counts and seconds >= 0, and step sizes > 0")
    kept = [point for point in told.history if point.kept]
    first, last = (Losses(point.search, point.holdout) for point in (kept[0], kept[-1]))
    if (first, last) != (told.losses.start, told.losses.best):
        raise ValueError("expected a history from the start's losses to the best ones")


def _moved(loop: Loop, prefix: str) -> dict[str, Tensor]:
    """Qparams of the sites that are not as where the search started."""
    tensors: dict[str, Tensor] = {}
    for name, first in loop.first_state.items():
        if not _same(loop.backend.state(name), first):
            qparams = loop.backend.read(name)
            tensors[f"{prefix}/{name}/scale"] = qparams.scale
            tensors[f"{prefix}/{name}/zero_point"] = qparams.zero_point
            for part, beside in (("shift", qparams.shift), ("correction", qparams.correction)):
                if beside is not None:
                    tensors[f"{prefix}/{name}/{part}"] = beside.clone()  # "now" and "best" may hold the same
    return tensors


def _write(loop: Loop, tensors: Mapping[str, Tensor], prefix: str) -> None:
    for name in loop.first_state:
        scale = tensors.get(f"{prefix}/{name}/scale")
        if scale is not None:
            zero_point = tensors[f"{prefix}/{name}/zero_point"]
            shift, correction = (tensors.get(f"{prefix}/{name}/{part}") for part in ("shift", "correction"))
            if shift is not None:
                _expect(f"{name}/shift", shift, torch.int8, loop.backend.float_weights[name].dim())
            if correction is not None:
                _expect(f"{name}/correction", correction, torch.float32, 1)
            try:
                loop.backend.write(name, QParams(scale, zero_point, shift, correction))
            except RuntimeError as error:  # of torch, of other shapes
                raise ValueError(f"{name}: {error}") from error


def _expect(name: str, found: Tensor, dtype: torch.dtype, dims: int) -> None:
    if found.dtype != dtype or found.dim() != dims:
        raise ValueError(f"{name}: expected {dtype} of {dims} dimensions, got {found.dtype} of {found.dim()}")


def _in_words(losses: Losses) -> str:
    held_out = "" if losses.holdout is None else f" and {losses.holdout:.6g} held out"
    return f"{losses.search:.6g}{held_out}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, (int, float, str)) and bool(a == b))
