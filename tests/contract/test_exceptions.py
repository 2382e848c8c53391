"""Whatever is raised, wherever: the models leave as they came."""

from __future__ import annotations

import copy
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import attention, nets, pt2e
from helpers.cases import Case, reference_case
from helpers.search import small_config
from helpers.state import everything, generators
from helpers.uneven import uneven
from torch import Tensor

import cptv_ao
from cptv_ao.core import losses


class Injected(Exception):
    """Raised by the tests."""


def after(calls: int, error: type[BaseException]) -> Callable[..., None]:
    """A function that raises on its call number `calls`."""
    count = 0

    def step(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == calls:
            raise error

    return step


def check_untouched(case: Case, error: type[BaseException], **arguments: Any) -> None:
    for model in (case.converted, case.float_model):
        model.train()
        model.register_forward_hook(lambda *_: None)
    case.converted.meta["mine"] = "kept"
    given = [everything(case.converted), everything(case.float_model), generators()]
    grad = torch.is_grad_enabled()
    with pytest.raises(error):
        cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, progress=False, **arguments)
    assert everything(case.converted) == given[0]
    assert everything(case.float_model) == given[1]
    assert generators() == given[2]
    assert torch.is_grad_enabled() == grad


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("event", [1, 2, 3, 7, 12])
def test_in_the_callback(case: Case, event: int, error: type[BaseException]) -> None:
    check_untouched(case, error, callback=after(event, error), config=small_config(evaluations=12))


@pytest.mark.slow
def test_in_the_callback_at_every_event(conv: Case) -> None:
    events: list[cptv_ao.Event] = []
    config = small_config(blocks=lambda sites: {s.name: s.kind for s in sites}, gradient_steps=2, evaluations=8)
    copied = conv.copy()
    cptv_ao.refine(
        copied.converted,
        copied.batches,
        float_model=copied.float_model,
        config=config,
        callback=events.append,
        progress=False,
    )
    assert {"candidate", "block", "pass"} <= {event.kind for event in events}
    assert any(event.loss < events[0].best for event in events), "a state that differs from the given one is there"
    for event in range(1, len(events) + 1):
        check_untouched(conv.copy(), Injected, callback=after(event, Injected), config=config)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 6, 9, 20])
def test_in_the_loss(case: Case, call: int) -> None:
    step = after(call, Injected)

    def loss(candidate: Tensor, teacher: Tensor) -> Tensor:
        step()
        return losses.kl(candidate, teacher)

    check_untouched(case, Injected, config=small_config(loss=loss, evaluations=20))


@pytest.mark.parametrize("call", [1, 2, 5, 9])
def test_in_what_picks_the_output(conv: Case, call: int) -> None:
    step = after(call, Injected)

    def output(value: Tensor) -> Tensor:
        step()
        return value

    check_untouched(conv, Injected, config=small_config(output=output))


def test_in_the_block_policy(conv: Case) -> None:
    check_untouched(conv, Injected, config=small_config(blocks=after(1, Injected)))


def test_in_a_policy_that_leaves_sites_out(conv: Case) -> None:
    check_untouched(conv, ValueError, config=small_config(blocks=lambda sites: {}))


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_in_the_loader(conv: Case, batches: int) -> None:
    def loader() -> Any:
        yield from conv.batches[:batches]
        raise Injected

    given = everything(conv.converted), everything(conv.float_model)
    with pytest.raises(Injected):
        cptv_ao.refine(conv.converted, loader(), float_model=conv.float_model, config=small_config(), progress=False)
    assert (everything(conv.converted), everything(conv.float_model)) == given


@pytest.mark.parametrize("call", [1, 2, 3, 8, 9])
def test_in_the_forward_of_the_float_model(conv: Case, call: int) -> None:
    step = after(call, Injected)
    given = everything(conv.converted)
    handle = conv.float_model.register_forward_pre_hook(step)
    if call <= 4 + len(conv.batches):
        with pytest.raises(Injected):
            cptv_ao.refine(
                conv.converted, conv.batches, float_model=conv.float_model, config=small_config(), progress=False
            )
        assert everything(conv.converted) == given
    else:  # on a few images, their halves, one for its cost, once per batch, and never again
        cptv_ao.refine(
            conv.converted, conv.batches, float_model=conv.float_model, config=small_config(), progress=False
        )
    handle.remove()


@pytest.mark.parametrize("call", [1, 2, 10])
def test_in_a_kernel(conv: Case, call: int) -> None:
    """A module of the user's model that fails while candidates are scored."""
    given = everything(conv.converted)
    handle = conv.converted.fc2.register_forward_pre_hook(after(call, Injected))
    with pytest.raises(Injected):
        cptv_ao.refine(
            conv.converted, conv.batches, float_model=conv.float_model, config=small_config(), progress=False
        )
    handle.remove()
    assert everything(conv.converted) == given


def test_the_earlier_report_survives_an_exception(conv: Case) -> None:
    arguments: dict[str, Any] = {"float_model": conv.float_model, "config": small_config(), "progress": False}
    cptv_ao.refine(conv.converted, conv.batches, **arguments)
    report = cptv_ao.report(conv.converted)
    with pytest.raises(KeyboardInterrupt):
        cptv_ao.refine(conv.converted, conv.batches, callback=after(3, KeyboardInterrupt), **arguments)
    assert cptv_ao.report(conv.converted) == report


def test_a_prepared_model_is_unpatched(conv: Case) -> None:
    given = everything(conv.prepared)
    with pytest.raises(Injected):
        cptv_ao.refine(
            conv.converted,
            conv.batches,
            float_model=conv.prepared,
            config=small_config(),
            callback=after(2, Injected),
            progress=False,
        )
    assert everything(conv.prepared) == given


PACKAGE = Path(cptv_ao.__file__).parent
# Rooms that write or hold state: folders and files of the package.
ROOMS = ("search", "backends", "transforms", "evaluation/evaluator.py", "evaluation/batch_losses.py",
         "evaluation/tail_runner.py", "evaluation/entry_cache.py", "core/atomic_file.py", "core/tensor_file.py",
         "simulation/simulated_backend.py", "simulation/twin_sites.py", "verbs/scales_file.py")  # fmt: skip
# Those that write other forms of a model, and other tensors into it.
FORMS = ("transforms", "backends/tensor_slots.py", "backends/reference.py", "backends/pt2e.py")


class AtLine:
    """Traces the lines of some of the package's rooms, and raises KeyboardInterrupt at one of them."""

    def __init__(self, at: int | None = None, rooms: tuple[str, ...] = ROOMS) -> None:
        self.at, self.seen = at, 0
        self.rooms = tuple(str(PACKAGE / room) for room in rooms)
        assert all(Path(room).exists() for room in self.rooms)

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.rooms):
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> AtLine:
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


@pytest.mark.slow
def test_ctrl_c_at_any_line(conv: Case, tmp_path: Path) -> None:
    config = small_config(evaluations=2, gradient_steps=4, population=("output_error",))

    def refine(case: Case, path: Path) -> None:
        cptv_ao.refine(
            case.converted, case.batches, float_model=case.float_model, config=config, progress=False, checkpoint=path
        )

    whole = conv.copy()
    with AtLine() as lines:
        refine(whole, tmp_path / "whole")
    wanted, given = whole.converted(conv.batches[0]), conv.converted(conv.batches[0])
    assert not torch.equal(wanted, given)
    assert lines.seen > 5000
    generator = random.Random(0)
    for index in range(int(os.environ.get("CPTV_AO_INTERRUPTS", "25"))):
        path = tmp_path / f"{index}"
        with AtLine(generator.randrange(1, lines.seen)), pytest.raises(KeyboardInterrupt):
            refine(conv, path)
        assert torch.equal(conv.converted(conv.batches[0]), given)
        again = conv.copy()
        refine(again, path)  # from the checkpoint, where one was written
        assert torch.equal(again.converted(conv.batches[0]), wanted)
        assert {found.name for found in tmp_path.iterdir()} >= {path.name}
        path.unlink()
        assert {found.name for found in tmp_path.iterdir()} == {"whole"}, "nothing temporary is left"


def _uneven() -> Case:
    model, batches = uneven(), list(nets.images(16, 3, 8, 8).split(4))
    return Case(model, *nets.quantize(model, batches), batches)


def _attending() -> Case:
    pt2e.torchao()
    model = attention.apart(outlier=60)
    graph = attention.quantized(model)
    return Case(model, graph, graph, list(attention.BATCHES))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [pytest.param(_uneven, marks=pytest.mark.slow), reference_case, pytest.param(_attending, marks=pytest.mark.slow)],
)
def test_ctrl_c_inside_an_equivalent_form(make: Callable[[], Case]) -> None:
    """Also while a form is half written: all is as it was, and the next search ends where one without it does."""
    case = make()
    config = small_config(evaluations=2, gradient_steps=2, population=("biases",), passes=0)

    def refine(model: Any) -> None:
        cptv_ao.refine(model, case.batches, float_model=case.float_model, config=config, progress=False)

    given, generator, output = everything(case.converted), random.Random(0), case.converted(case.batches[0])
    whole = copy.deepcopy(case.converted)
    with AtLine(rooms=FORMS) as lines:
        refine(whole)
    assert everything(whole) != given and lines.seen > 100
    wanted = whole(case.batches[0])
    for _ in range(int(os.environ.get("CPTV_AO_INTERRUPTS", "5"))):
        with AtLine(generator.randrange(1, lines.seen), FORMS), pytest.raises(KeyboardInterrupt):
            refine(case.converted)
        assert everything(case.converted) == given
        assert torch.equal(case.converted(case.batches[0]), output)
    refine(case.converted)
    assert torch.equal(case.converted(case.batches[0]), wanted)
