"""Several outputs as one tensor, and one loss of them."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cptv_ao.core.errors import FloatModelMismatchError, UnsupportedModelError
from cptv_ao.core.loss_curvature import random_direction
from cptv_ao.core.losses import LOSSES, compares_images, get_exact_loss, get_loss, is_known, is_per_image
from cptv_ao.core.output_losses import OutputLosses, OutputTerm, is_constant, measured
from cptv_ao.core.output_tree import named_leaves, named_tensors
from cptv_ao.core.packed_outputs import ComparedOutput, PackedOutputs, not_finite

Pair = namedtuple("Pair", ["a", "b"])


@dataclass(frozen=True)
class Held:
    x: Any
    y: Any = None


class Own:
    """Known to nobody but torch's pytree."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts


pytree.register_pytree_node(Own, lambda own: (own.parts, None), lambda parts, _: Own(list(parts)))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_names_of_any_nesting() -> None:
    given = {"a": [1, (2, 3)], "b": Pair(4, OrderedDict(c=5)), "d": Held(6), 7: Own([7])}
    assert named_leaves(given) == {
        "a.0": 1, "a.1.0": 2, "a.1.1": 3, "b.a": 4, "b.b.c": 5, "d.x": 6, "d.y": None, "7.0": 7,
    }  # fmt: skip
    assert named_leaves(3) == {"output": 3}
    assert named_leaves({"a": {"b": 1}, "a.b": 2, 1: 3, "1": 4}) == {"a.b": 1, "a.b (2)": 2, "1": 3, "1 (2)": 4}
    assert list(named_tensors((None, 1, noise(2), [noise(3)]))) == ["2", "3.0"]


OUTPUTS = {"logits": noise(6, 5), "age": noise(6).double(), "map": noise(6, 3, 4, 2).half(), "tokens": noise(6, 7, 4)}
ROWS = {"logits": 1, "age": 1, "map": 1, "tokens": 1}


def packed_as(outputs: Mapping[str, Tensor], **changes: Any) -> PackedOutputs:
    return PackedOutputs(
        [ComparedOutput(name, index, len(tensor) // 6) for index, (name, tensor) in enumerate(outputs.items())],
        **changes,
    )


def test_packed_and_seen_again() -> None:
    packing = packed_as(OUTPUTS)
    packed = packing(OUTPUTS)
    assert packed.shape == (6, 5 + 1 + 24 + 28) and packed.dtype == torch.float32
    for (name, tensor), columns in zip(OUTPUTS.items(), packing.columns(packed), strict=True):
        assert torch.equal(columns.of(packed), tensor.float().reshape(6, -1)), name
    places = [columns.places(packed) for columns in packing.columns(packed)]
    assert [tuple(p.shape) for p in places] == [(6, 5), (6, 1), (48, 3), (42, 4)]
    assert torch.equal(places[2], OUTPUTS["map"].float().movedim(1, 3).reshape(-1, 3))
    for columns, own in zip(packing.columns(packed), places, strict=True):
        value = torch.arange(own.shape[1]) + 1.0
        there = columns.everywhere(value, packed)
        assert torch.equal(columns.places(there), value.expand_as(own))
        there[:, columns.start : columns.stop] = packed[:, columns.start : columns.stop]
        assert torch.equal(there, packed), "and nowhere else"


def test_several_rows_for_an_image_and_a_share_of_the_places() -> None:
    outputs = {"windows": noise(18, 5), "map": noise(6, 3, 20, 20)}
    packing = packed_as(outputs, share=0.1)
    packed = packing(outputs)
    windows, places = packing.columns(packed)
    assert torch.equal(windows.places(packed), outputs["windows"])
    assert places.of(packed).shape == (6, 3 * 40)
    drawn = places.of(packed).reshape(6, 3, 40)
    every = outputs["map"].flatten(2)
    found = [int((every[0, 0] == value).nonzero()) for value in drawn[0, 0]]
    assert found == sorted(set(found)) and torch.equal(drawn, every[:, :, found]), "the same ones of all"
    with torch.inference_mode():
        again = packed_as(outputs, share=0.1)
        again(outputs)
    followed = outputs["map"].clone().requires_grad_()
    again({**outputs, "map": followed}).sum().backward()
    assert followed.grad is not None and int((followed.grad != 0).sum()) == 6 * 3 * 40


def test_what_packing_refuses() -> None:
    packing = packed_as(OUTPUTS)
    packed = packing(OUTPUTS)
    renamed = dict(zip("abcd", OUTPUTS.values(), strict=True))
    assert torch.equal(packing(renamed), packed), "by their order, where the names are others"
    with pytest.raises(FloatModelMismatchError, match=r"expected outputs 'logits', 'age', .* got 'logits';"):
        packing({"logits": OUTPUTS["logits"]})
    with pytest.raises(UnsupportedModelError, match=r"output 'tokens': expected 1 rows for each of 6 images"):
        packing({**OUTPUTS, "tokens": noise(9, 7, 4)})
    with pytest.raises(UnsupportedModelError, match="as many numbers together"):
        packing({**OUTPUTS, "logits": noise(6, 7), "map": noise(6, 2, 11, 1)})
    packed[2, 7] = math.nan
    assert not_finite(packing, packed) == "output 'map'"
    assert not_finite(lambda output: output, packed) == "output" and not not_finite(packing, packing(OUTPUTS))


def test_columns_that_another_rank_has_seen() -> None:
    here, there = packed_as(OUTPUTS), packed_as(OUTPUTS)
    packed = here(OUTPUTS)
    there.learn_table(here.table(packed).float())
    assert there.columns(packed) == here.columns(packed)


def test_an_output_that_is_the_same_for_all_images() -> None:
    same = noise(4).expand(6, 4)
    outputs = {"same": same, "nearly": same * (1 + 1e-8 * torch.arange(6)[:, None]), "other": same + noise(6, 4)}
    packing = packed_as(outputs)
    targets = [packing(outputs), packing(outputs)]
    assert [is_constant(packing, index, targets) for index in range(3)] == [True, True, False]
    second = packing({**outputs, "same": same + 1})
    assert not is_constant(packing, 0, [targets[0], second]), "other batches, other values"


def best(loss: str, rows: Tensor) -> Tensor:
    """The vector of least loss, found by descent."""
    value = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        value += rows.mean(0)
    optimizer = torch.optim.LBFGS([value], max_iter=200, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        found = LOSSES[loss](value.expand_as(rows), rows)
        found.backward()
        return found

    optimizer.step(step)
    return LOSSES[loss](value.expand_as(rows), rows).detach()


@pytest.mark.parametrize("loss", ["kl", "mse", "cosine"])
def test_an_output_is_worth_what_the_best_constant_loses(loss: str) -> None:
    outputs = {"logits": 2 * noise(6, 5) + 1, "map": noise(6, 3, 4, 2) + 0.5}
    packing = packed_as(outputs)
    packed = packing(outputs)
    for index, columns in enumerate(packing.columns(packed)):
        size, variance = measured(OutputTerm("x", loss), packing, index, [packed[:3], packed[3:]], 1.0)
        rows = columns.places(packed).double()
        assert size == pytest.approx(float(best(loss, rows)), rel=1e-3 if loss != "cosine" else 0.05)
        assert variance == pytest.approx(float((rows - rows.mean(0)).square().mean()), rel=1e-6)


def test_an_output_that_hardly_varies_is_measured_by_its_size() -> None:
    outputs = {"flat": 10 + 1e-4 * noise(6, 4)}
    packing = packed_as(outputs)
    size, _ = measured(OutputTerm("flat", "mse"), packing, 0, [packing(outputs)], 1.0)
    assert size == pytest.approx(1e-3 * 100, rel=1e-3)


def absolute(candidate: Tensor, teacher: Tensor) -> Tensor:
    return (candidate - teacher).abs().mean()


def joint() -> tuple[OutputLosses, Tensor, Tensor]:
    packing = packed_as(OUTPUTS)
    teacher = packing(OUTPUTS)
    terms = (OutputTerm("logits", "kl", 0.5), None, OutputTerm("map", "mse", 2.0), OutputTerm("tokens", absolute, 3.0))
    return OutputLosses(packing, terms, 3.0), teacher + 0.1 * noise(*teacher.shape, seed=1), teacher


def test_the_joint_loss_by_hand() -> None:
    losses, candidate, teacher = joint()
    by_hand = []
    for index, loss, size in ((0, "kl", 0.5), (2, "mse", 2.0)):
        columns = losses.packing.columns(teacher)[index]
        got, wanted = columns.places(candidate).double(), columns.places(teacher).double()
        by_hand.append(
            sum(float(LOSSES[loss](g[None], w[None])) for g, w in zip(got, wanted, strict=True)) / len(got) / size
        )
    by_hand.append(float(absolute(candidate[:, 30:], teacher[:, 30:])) / 3.0)
    assert losses.each(candidate, teacher).tolist() == pytest.approx(by_hand, rel=1e-6)
    mean = sum(by_hand) / 3
    assert float(get_exact_loss(losses, 1.0)(candidate, teacher)) == pytest.approx(mean, rel=1e-6)
    followed = candidate.clone().requires_grad_()
    value = get_loss(losses, 1.0)(followed, teacher)
    assert float(value.detach()) == pytest.approx(mean, rel=1e-4)
    value.backward()
    assert followed.grad is not None
    moved = (followed.grad.abs().amax(0) > 0).nonzero().flatten()
    assert moved.tolist() == [index for index in range(58) if index != 5], "all but what does not count"
    assert losses.__name__ == "mean of 3 outputs" and not is_known(losses) and not is_per_image(losses)


def test_what_is_known_of_losses_by_name() -> None:
    assert is_known({"a": "kl", "b": None}) and not is_known({"a": absolute})
    assert is_per_image({"a": "kl", "b": None}) and not is_per_image({"a": "infonce"})
    assert compares_images({"a": "mse", "b": "soft_infonce"}) == "soft_infonce" and compares_images("kl") is None


def test_directions_fit_the_second_order_of_the_joint_loss() -> None:
    """E[(v^T d)^2] = d^T H d, for all outputs together and each alone: they must be weighed against each other."""
    packing = packed_as(OUTPUTS)
    teacher = packing(OUTPUTS)
    terms = (
        OutputTerm("logits", "kl", 0.5), OutputTerm("age", "mse", 0.7), OutputTerm("map", "kl", 2.0),
        OutputTerm("tokens", "cosine", 3.0),
    )  # fmt: skip
    losses = OutputLosses(packing, terms, 1.0)
    outputs, generator = teacher.clone().requires_grad_(), torch.Generator().manual_seed(0)
    step = 1e-3 * noise(*teacher.shape, seed=5)
    draws = (random_direction(losses, outputs, generator) for _ in range(1500))
    directions = torch.stack([torch.autograd.grad(draw, outputs)[0].double() for draw in draws])
    for columns in [slice(c.start, c.stop) for c in packing.columns(teacher)]:
        change = torch.zeros_like(step)
        change[:, columns] = step[:, columns]
        square = ((directions * change.double()).sum(2) ** 2).mean()
        wanted = 2 * float(get_exact_loss(losses, 1.0)(teacher.double() + change.double(), teacher.double()))
        assert float(square) / 4 == pytest.approx(wanted, rel=0.15)


def test_a_step_on_a_gpu_reads_no_number_on_the_host() -> None:
    """The meta device has none to be read."""
    outputs = {name: tensor.to("meta").requires_grad_() for name, tensor in OUTPUTS.items()}
    packing = packed_as(outputs, share=0.5)
    packed = packing(outputs)
    terms = tuple(OutputTerm(name, loss) for name, loss in zip(OUTPUTS, ("kl", "mse", "kl", "infonce"), strict=True))
    losses = OutputLosses(packing, terms, 3.0)
    gradient = torch.autograd.grad(get_loss(losses, 3.0)(packed, packed.detach()), packed, retain_graph=True)[0]
    assert gradient.is_meta and gradient.shape == packed.shape
    assert random_direction(losses, packed, torch.Generator().manual_seed(0)).is_meta
