"""What of an output is compared, and as what."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch

from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.tensors import compared, copied, first_floating, moved

Pair = namedtuple("Pair", ["a", "b"])
X, Y = torch.arange(6.0).reshape(2, 3), torch.tensor([1, 2])


def test_the_first_floating_tensor_is_found_in_depth() -> None:
    assert first_floating((Y, {"a": [Y, X]}, X + 1)) is X
    with pytest.raises(UnsupportedModelError, match="expected an output that holds a floating tensor, got dict"):
        first_floating({"a": Y})


def test_rows_and_float32() -> None:
    assert compared(X.reshape(2, 1, 3).double()).dtype == torch.float32
    assert torch.equal(compared(X.reshape(2, 1, 3).half()), X)
    assert compared(X[0]).shape == (3, 1)


@pytest.mark.parametrize(
    ("output", "match"),
    [(X.sum(), "a single number for the whole batch"), (X.to_sparse(), "in a dense tensor"), (X.cfloat(), "complex64")],
)
def test_what_has_no_rows_of_real_numbers_is_refused(output: Any, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        compared(output, lambda found: found)
    with pytest.raises(UnsupportedModelError, match="expected it to pick a tensor, got int"):
        compared(output, lambda _: 3)


def test_a_copy_has_its_own_memory_and_the_same_types() -> None:
    given = Pair(OrderedDict(x=X.clone()), [Y.clone(), "label"])
    found = copied(given)
    assert type(found) is Pair and type(found.a) is OrderedDict and type(found.b) is list
    found.a["x"].zero_()
    assert torch.equal(given.a["x"], X)
    assert found.b[1] == "label"


def test_moving_keeps_the_nesting() -> None:
    found = moved({"a": [X, 1], "b": (Y,)}, "meta")
    assert found["a"][0].is_meta and found["b"][0].is_meta
    assert found["a"][1] == 1 and type(found["b"]) is tuple
