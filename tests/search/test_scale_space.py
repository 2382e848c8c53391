"""Between vectors and scales: what is written, repaired and put back, with scales that no model holds."""

from __future__ import annotations

import numpy as np
import torch
from helpers.fake_store import FakeStore, activation, qparams, weight

from cptv_ao.core.qparams import QParams
from cptv_ao.search.scale_space import ScaleSpace


def opened(*sums: tuple[str, str]) -> tuple[FakeStore, ScaleSpace]:
    store = FakeStore.of(activation("in"), activation("tied", tied="in"), weight("w", 3), activation("out"), sums=sums)
    return store, ScaleSpace(store, store.movable())


def test_a_vector_holds_scales_and_zero_points_of_each_group_once() -> None:
    store, space = opened()
    store.write("w", QParams(torch.tensor([1.0, 2.0, 4.0]).double(), torch.zeros(3, dtype=torch.int64)))
    space.refresh()
    assert space.vector.tolist() == [0.125, 0, 1, 2, 4, 0.125, 0]
    assert [group.name for group in space.layout.groups] == ["in", "w", "out"]
    assert space.nodes == ["in", "tied", "w", "out"]


def test_what_is_written_is_what_is_read_in_all_of_a_group() -> None:
    store, space = opened()
    wanted = np.array([0.5, 7, 1, 2, 3, 0.25, 200])
    space.write(wanted)
    assert space.vector.tolist() == wanted.tolist()
    assert float(store.read("tied").scale) == 0.5 and int(store.read("tied").zero_point) == 7
    assert store.read("w").scale.tolist() == [1, 2, 3]
    assert ScaleSpace(store, store.movable()).vector.tolist() == wanted.tolist()


def test_only_what_differs_is_written_and_the_base_is_put_back() -> None:
    store, space = opened()
    given = space.vector
    changed = given.copy()
    changed[2] = 0.25
    space.write(changed)
    assert store.calls == [("write", "w")]
    space.write(changed)
    assert len(store.calls) == 1
    space.write(given)
    assert store.calls[1:] == [("restore", "w")], "the state of the base, not written anew"
    space.write(changed)
    space.rebase()
    assert space.base.tolist() == changed.tolist()
    store.calls.clear()
    space.write(given)
    assert store.calls == [("write", "w")], "it is the base no longer"


def test_undo_brings_back_what_stood_beside_a_scale() -> None:
    store, space = opened()
    shift, before = torch.ones(3, 2, dtype=torch.int8), store.snapshot()
    changed = space.vector
    changed[2] = 0.25
    space.write(changed, {"w": (shift, None)})
    assert store.read("w").shift is shift
    assert store.read("w").scale.tolist() == [0.25, 0.125, 0.125]
    space.undo()
    assert all(store.values[name] is before[name] for name in before)
    assert space.vector.tolist() == space.base.tolist()


def test_a_vector_is_repaired_to_what_kernels_hold() -> None:
    _, space = opened()
    found = space.repair(np.array([1e9, 300.4, 1e-9, 0.1, -1.0, 0.1, -3.6]))
    assert found[0] == 0.125 * 64 and found[2] == 0.125 / 64 and found[4] == 0.125 / 64
    assert (found[1], found[6]) == (255, 0)
    assert found[3] == float(np.float32(0.1)) != 0.1
    assert np.array_equal(space.repair(found), found)


def test_the_output_of_an_add_comes_into_reach_of_its_input() -> None:
    _, space = opened(("out", "in"))
    near = np.array([4.0, 0, 1, 1, 1, 0.0625, 0])
    assert space.repair(near).tolist() == near.tolist()
    far = np.array([4.0, 0, 1, 1, 1, 0.0078125, 0])
    found = space.repair(far)
    assert found[0] == 4.0, "the output follows"
    assert 2.0**7.99 < found[0] / found[5] < 2.0**8


def test_an_input_comes_into_reach_of_an_output_that_cannot_move() -> None:
    store = FakeStore.of(activation("in"), activation("out"), scale=0.125, sums=(("out", "in"),))
    store.write("out", qparams(2.0**-7, store.sites["out"]))
    space = ScaleSpace(store, {"in": store.movable()["in"]})
    assert space.repair(np.array([1.0, 0])).tolist() == [1.0, 0]
    found = space.repair(np.array([4.0, 0]))
    assert 2.0**7.99 < found[0] / 2.0**-7 < 2.0**8


def test_an_assignment_of_some_sites_leaves_the_others() -> None:
    store, space = opened()
    found = space.from_assignment({"out": qparams(0.5, store.sites["out"], 9)})
    assert found.tolist() == [*space.vector[:5], 0.5, 9]
