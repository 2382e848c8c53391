"""Dataclasses as dicts, lists and numbers, and back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest

from cptv_ao.core.plain import as_plain, from_plain


class Kind(Enum):
    ONE = "the first"


@dataclass(frozen=True)
class Inner:
    value: float
    name: str | None


@dataclass(frozen=True)
class Outer:
    kind: Kind
    inner: tuple[Inner, ...]
    pair: tuple[int, bool]
    named: dict[str, list[float]]


WHOLE = Outer(Kind.ONE, (Inner(1.5, None), Inner(2.0, "b")), (3, True), {"a": [0.25]})


def test_what_was_taken_apart_is_put_together_through_json_too() -> None:
    apart = as_plain(WHOLE)
    assert apart == {
        "kind": "ONE",
        "inner": [{"value": 1.5, "name": None}, {"value": 2.0, "name": "b"}],
        "pair": [3, True],
        "named": {"a": [0.25]},
    }
    assert from_plain(Outer, json.loads(json.dumps(apart))) == WHOLE


def test_no_subclass_of_a_plain_type_is_left() -> None:
    assert type(as_plain(np.float64(0.5))) is float
    with pytest.raises(TypeError, match="got object"):
        as_plain({"a": object()})


@pytest.mark.parametrize(
    ("part", "value", "error"),
    [
        ("kind", "TWO", KeyError),
        ("pair", [3], ValueError),
        ("pair", [3.0, True], TypeError),
        ("pair", [True, True], TypeError),
        ("inner", [{"value": 1.0}], ValueError),
        ("inner", [{"value": "1", "name": None}], TypeError),
        ("named", [], TypeError),
        ("more", 1, ValueError),
    ],
)
def test_what_is_not_of_the_kind_is_refused(part: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        from_plain(Outer, as_plain(WHOLE) | {part: value})


def test_a_whole_number_will_do_for_a_float() -> None:
    assert from_plain(Inner, {"value": 2, "name": None}) == Inner(2.0, None)


def test_what_is_not_finite_becomes_none_where_json_has_no_word_for_it() -> None:
    held = {"a": [math.nan, (math.inf, 1.0)], "b": "nan", "c": Inner(-math.inf, "inf")}
    assert as_plain(held, finite=True) == {"a": [None, [None, 1.0]], "b": "nan", "c": {"value": None, "name": "inf"}}
    assert as_plain(held)["c"] == {"value": -math.inf, "name": "inf"}
