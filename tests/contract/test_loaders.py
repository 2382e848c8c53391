"""What a calibration loader may be, and which outputs a model may have."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.cases import Case
from helpers.search import small_config
from helpers.state import weights
from torch import Tensor, nn

import cptv_ao
from cptv_ao.core.batches import Batch
from cptv_ao.core.image_subsets import split_batches
from cptv_ao.core.loader import read_batches


class Label:
    """A label that must not be read."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a label was read")

    __iter__ = __len__ = __bool__ = __eq__ = __getitem__ = __getattr__ = __array__ = __deepcopy__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class OneShot:
    """A loader that counts how often it is iterated."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.iterations = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.iterations += 1
        return iter(self.batches)


def refined(case: Case, loader: Iterable[Any]) -> dict[str, Any]:
    model = case.copy().converted
    cptv_ao.refine(model, loader, float_model=case.float_model, config=small_config(), progress=False)
    return weights(model)


@pytest.fixture
def wanted(conv: Case) -> dict[str, Any]:
    return refined(conv, conv.batches)


def test_forms_of_the_same_data_give_the_same_scales(conv: Case, wanted: dict[str, Any]) -> None:
    assert wanted != weights(conv.converted)
    assert refined(conv, (b for b in conv.batches)) == wanted, "a generator"
    assert refined(conv, tuple(conv.batches)) == wanted, "a tuple of batches"
    assert refined(conv, [(b, Label()) for b in conv.batches]) == wanted, "tuples with labels"
    assert refined(conv, [[b, Label(), Label()] for b in conv.batches]) == wanted, "lists with labels"
    assert refined(conv, [{"x": b} for b in conv.batches]) == wanted, "dicts of keyword inputs"
    labelled = [{"x": b, "labels": Label(), "file": "a.png"} for b in conv.batches]
    assert refined(conv, labelled) == wanted, "what the model does not take is left, and not looked at"
    with pytest.raises(cptv_ao.CalibrationDataError, match=r"got none of them among \['images', 'labels'\]"):
        refined(conv, [{"images": b, "labels": 3} for b in conv.batches])


def test_wrappers_of_the_float_model_are_taken_off(conv: Case, wanted: dict[str, Any]) -> None:
    for wrap in (nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))):
        case = conv.copy()
        case.float_model = wrap(conv.float_model)
        assert refined(case, conv.batches) == wanted


def test_a_data_loader(conv: Case, wanted: dict[str, Any]) -> None:
    data = torch.utils.data.TensorDataset(torch.cat(conv.batches), torch.arange(16))
    assert refined(conv, torch.utils.data.DataLoader(data, batch_size=4)) == wanted


def test_it_is_iterated_once(conv: Case) -> None:
    loader = OneShot(conv.batches)
    refined(conv, loader)
    assert loader.iterations == 1


def test_a_loader_may_reuse_its_buffer(conv: Case, wanted: dict[str, Any]) -> None:
    def loader() -> Iterator[Tensor]:
        buffer = torch.empty_like(conv.batches[0])
        for batch in conv.batches:
            yield buffer.copy_(batch)
        buffer.fill_(float("nan"))

    assert refined(conv, loader()) == wanted


class Marked(Tensor):
    """A subclass, as torchvision's tv_tensors are."""


class TooShort(torch.utils.data.IterableDataset[Tensor]):
    """Gives more, or fewer, batches than it says."""

    def __init__(self, batches: list[Tensor], length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class Lengthless(OneShot):
    """Its length is nobody's business."""

    def __len__(self) -> int:
        raise RuntimeError("unknown")


def test_kinds_of_the_same_tensors_give_the_same_scales(conv: Case, wanted: dict[str, Any]) -> None:
    wide = [torch.stack([batch, batch.new_zeros(batch.shape)], -1)[..., 0] for batch in conv.batches]
    assert not wide[0].is_contiguous()
    assert refined(conv, wide) == wanted, "not contiguous"
    assert refined(conv, [batch.clone().requires_grad_() * 1 for batch in conv.batches]) == wanted, "with a gradient"
    assert refined(conv, [nn.Parameter(batch) for batch in conv.batches]) == wanted, "parameters"
    assert refined(conv, [batch.as_subclass(Marked) for batch in conv.batches]) == wanted, "a subclass"
    with torch.inference_mode():
        frozen = [batch.clone() for batch in conv.batches]
    assert refined(conv, frozen) == wanted, "inference tensors"


def test_what_a_loader_says_of_its_length_is_not_believed(conv: Case, wanted: dict[str, Any]) -> None:
    for length in (1, 9):
        assert refined(conv, TooShort(conv.batches, length)) == wanted
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the DataLoader
            assert refined(conv, torch.utils.data.DataLoader(TooShort(conv.batches, length), batch_size=None)) == wanted
    assert refined(conv, Lengthless(conv.batches)) == wanted


def test_expanded_tensors() -> None:
    (batch,) = read_batches([torch.ones(1, 3).expand(5, 3)])
    assert batch.args[0].is_contiguous()
    assert type(read_batches([torch.ones(2, 3).as_subclass(Marked)])[0].args[0]) is Tensor


def test_more_than_memory_should_hold_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cptv_ao.core.loader._IMAGES", 40)
    with pytest.warns(
        cptv_ao.CptvWarning, match="calib_loader: 11 batches of 4 images are being read, and held in mem"
    ):
        assert len(read_batches([torch.ones(4, 2)] * 11)) == 11
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_batches([torch.ones(4, 2)] * 10)
        read_batches([torch.ones(4, 2)] * 11, limit=20)


def test_reading_many_batches_looks_at_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """How often a batch is asked for its images does not grow with the number of batches."""
    asked = []

    class Counting(Batch):
        def __getattribute__(self, name: str) -> Any:
            asked.append(name)
            return super().__getattribute__(name)

    monkeypatch.setattr("cptv_ao.core.loader.Batch", Counting)
    costs = []
    for count in (10, 100):
        asked.clear()
        read_batches([torch.ones(4, 2)] * count, limit=10_000)
        costs.append(len(asked))
    assert costs[1] < 11 * costs[0]


def test_the_users_batches_are_not_written(conv: Case) -> None:
    given = [batch.clone() for batch in conv.batches]
    refined(conv, conv.batches)
    assert all(torch.equal(a, b) for a, b in zip(given, conv.batches, strict=True))


def test_a_single_batch_is_split_into_search_and_held_out_images(conv: Case) -> None:
    refined_model = cptv_ao.refine(
        conv.converted, [torch.cat(conv.batches)], float_model=conv.float_model, config=small_config(), progress=False
    )
    assert cptv_ao.report(refined_model).images == (12, 4)


def test_a_smaller_last_batch(conv: Case) -> None:
    batches = [conv.batches[0], conv.batches[1][:2], conv.batches[2][:1], conv.batches[3]]
    refined_model = cptv_ao.refine(
        conv.converted, batches, float_model=conv.float_model, config=small_config(), progress=False
    )
    assert cptv_ao.report(refined_model).images == (7, 4)


@pytest.mark.parametrize(("count", "fraction", "held"), [(2, 0.2, 1), (10, 0.2, 2), (4, 0.0, 0), (3, 0.99, 2)])
def test_how_many_batches_are_held_out(count: int, fraction: float, held: int) -> None:
    batches = read_batches(list(nets.images(2 * count, 3).split(2)))
    split = split_batches(batches, fraction)
    assert (len(split.search), len(split.holdout)) == (count - held, held)
    assert [*split.search, *split.holdout] == batches


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("with_float", [False, True])
def test_models_that_return_a_tuple_or_a_dict(as_dict: bool, with_float: bool) -> None:
    float_model = nets.seeded(lambda: nets.TupleNet(as_dict))
    batches = list(nets.images(24, 6).split(6))
    _, model = nets.quantize(float_model, batches, weight_bits=3)
    config = small_config(evaluations=20, holdout=0)
    if with_float:
        cptv_ao.refine(model, batches, float_model=float_model, config=config, progress=False)
    else:
        with pytest.warns(cptv_ao.CptvWarning):
            cptv_ao.refine(model, batches, config=config, progress=False)
    assert type(model(batches[0])) is (dict if as_dict else tuple)
    report = cptv_ao.report(model)
    assert report.after.search < report.before.search


def test_the_compared_output_can_be_chosen() -> None:
    float_model = nets.seeded(lambda: nets.TupleNet(True))
    batches = list(nets.images(24, 6).split(6))
    _, model = nets.quantize(float_model, batches, weight_bits=3)
    seen = set()

    def loss(candidate: Tensor, teacher: Tensor) -> Tensor:
        seen.add((candidate.shape[1], teacher.shape[1]))
        return (candidate - teacher).square().mean()

    config = small_config(output=lambda out: out["hidden"], loss=loss)
    cptv_ao.refine(model, batches, float_model=float_model, config=config, progress=False)
    assert seen == {(6, 6)}, "hidden has 6 features, the logits 3"
