"""Of all combinations of settings, those that are tried without `slow`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def each_value(*axes: Iterable[Any]) -> list[Any]:
    """All combinations as parameters; quick are so many that each value of each axis is in one of them."""
    values = [list(axis) for axis in axes]
    rows = range(max(map(len, values)))
    # Shorter axes begin one further each time, so that those of the same length do not go side by side.
    quick = {tuple((n + a * (n // len(axis))) % len(axis) for a, axis in enumerate(values)) for n in rows}
    return _marked(values, quick)


def each_pair(*axes: Iterable[Any]) -> list[Any]:
    """The same, with each value of the first axis together with each of the second; those of the others take turns."""
    values = [list(axis) for axis in axes]
    pairs = itertools.product(*(range(len(axis)) for axis in values[:2]))
    quick = {(i, j, *((i * (n + 1) + j) % len(axis) for n, axis in enumerate(values[2:]))) for i, j in pairs}
    return _marked(values, quick)


def some(*quick: Any, others: Iterable[Any]) -> list[Any]:
    """Parameters of one axis, of which these alone are quick."""
    return [*quick, *(pytest.param(one, marks=pytest.mark.slow) for one in others if one not in quick)]


def _marked(axes: Sequence[Sequence[Any]], quick: set[tuple[int, ...]]) -> list[Any]:
    found = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        given = [axis[place] for axis, place in zip(axes, places, strict=True)]
        found.append(pytest.param(*given, marks=() if places in quick else pytest.mark.slow))
    return found
