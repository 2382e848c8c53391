"""The state of a search as a value: what a file keeps of it, and what of a file is no such state."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cptv_ao.core.outcome import BlockResult, Losses, Point
from cptv_ao.core.qparams import QParams, same
from cptv_ao.search.state import Position, Record, SearchLosses, SearchState, from_file, to_file

START, BEST = Losses(2.0, 3.0), Losses(1.0, 2.5)
RECORD = Record(
    position=Position(1, 2, True),
    losses=SearchLosses(START, BEST, 1.5),
    rejected=False,
    step_sizes={"block": {"weight": 0.25}},
    evaluations=7,
    seconds=12.5,
    results=(BlockResult("block", 0, 4, 1, 2.0, 1.0),),
    stages=("ranges: accepted, loss 1",),
    history=(Point(0, 0.0, 2.0, 3.0, True), Point(3, 1.0, 1.0, 2.5, True), Point(7, 2.0, 1.5, None, False)),
    raced=3,
)


def qparams(scale: float, **beside: torch.Tensor) -> QParams:
    return QParams(torch.tensor(scale, dtype=torch.float64), torch.tensor(3), **beside)


def state(**changes: Any) -> SearchState:
    weight = qparams(0.5, shift=torch.ones(2, 2, dtype=torch.int8), correction=torch.ones(2))
    descent = {"leaf/0": torch.ones(3)}, {"course": {"steps": 2}}
    made = SearchState(
        RECORD, dict(np.random.default_rng(5).bit_generator.state), {"a/b": qparams(0.1), "w": weight}, {"w": weight}
    )
    return replace(made, **{"descent": descent, **changes})


def through_a_file(given: SearchState) -> SearchState:
    tensors, data = to_file(given)
    held = [tensor.data_ptr() for tensor in tensors.values()]
    assert len(set(held)) == len(held), "safetensors refuses tensors that share memory"
    return from_file(tensors, json.loads(json.dumps(data)))


def test_a_file_keeps_all_of_it() -> None:
    given = state()
    found = through_a_file(given)
    assert (found.record, found.random) == (given.record, given.random)
    assert found.best is not None and given.best is not None
    for held, was in ((found.now, given.now), (found.best, given.best)):
        assert held.keys() == was.keys() and all(same(held[name], was[name]) for name in was)
    assert found.descent is not None and given.descent is not None
    assert found.descent[1] == given.descent[1] and torch.equal(found.descent[0]["leaf/0"], torch.ones(3))


def test_given_scales_are_not_no_scales_that_moved() -> None:
    assert through_a_file(state(best=None)).best is None
    assert through_a_file(state(best={})).best == {}
    assert through_a_file(state(descent=None)).descent is None


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("seconds", -1.0),
        ("seconds", float("inf")),
        ("evaluations", -1),
        ("evaluations", 1.5),
        ("raced", -1),
        ("step_sizes", {"block": {"weight": 0.0}}),
        ("history", []),
        ("position", {"passes": -1, "blocks": 0, "gained": False}),
        ("best_is_given", "no"),
        ("random", None),
        ("rejected", 1),
    ],
)
def test_what_could_not_be_is_refused(part: str, value: Any) -> None:
    tensors, data = to_file(state())
    assert part in data
    with pytest.raises((KeyError, TypeError, ValueError)):
        from_file(tensors, data | {part: value})


@pytest.mark.parametrize(
    ("key", "tensor"),
    [("now/w/shift", torch.ones(2, 2)), ("now/w/correction", torch.ones(2, 2)), ("now/w/zero_point", None)],
)
def test_tensors_of_another_kind_are_refused(key: str, tensor: torch.Tensor | None) -> None:
    tensors, data = to_file(state())
    del tensors[key]
    with pytest.raises((KeyError, ValueError)):
        from_file(tensors if tensor is None else tensors | {key: tensor}, data)


def test_losses_that_were_found_again_are_compared() -> None:
    claimed = RECORD.losses
    assert claimed.fault(claimed) == ""
    assert "started from another loss" in claimed.fault(replace(claimed, start=Losses(2.5, 3.0)))
    assert "not what it says: best 1.0 and 2.5 held out, here 1.25" in claimed.fault(
        replace(claimed, best=Losses(1.25, 2.5))
    )
    assert "last 1.5, here 1.75" in claimed.fault(replace(claimed, now=1.75))
    worse = replace(claimed, best=Losses(1.0, 3.5))
    assert "worse than the given ones" in worse.fault(worse)
