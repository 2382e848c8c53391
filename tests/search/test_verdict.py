"""What judges a search may take seconds of its own: they are planned for, and what they do not pay for is left out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import pt2e
from helpers.shipping import BATCHES, mse, settings
from torch import nn
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.core.outcome import Losses
from cptv_ao.search import budget, verdict
from cptv_ao.search.budget import Budget
from cptv_ao.search.verdict import Verdict

pt2e.torchao()


class Judged:
    """Counts how often it is asked; each time takes longer."""

    def __init__(self, *seconds: float) -> None:
        self.asked, self._seconds = 0, seconds

    def losses(self) -> Losses:
        time.sleep(self._seconds[self.asked])
        self.asked += 1
        return Losses(float(self.asked), None)


def test_the_most_that_it_took_is_its_price() -> None:
    shipped, kernels = Judged(0.02, 0.2, 0.0), Judged()
    asked = Verdict(shipped, kernels, Budget(None, 3.0), 0.0)
    assert asked.given == Losses(1.0, None) and asked.seconds >= 0.02
    assert asked.losses(kernels) == Losses(2.0, None) and asked.seconds >= 0.2
    asked.losses(kernels)
    assert asked.seconds >= 0.2 and asked.dear
    assert not asked.too_late
    assert (shipped.asked, kernels.asked) == (3, 0)


def test_the_models_own_kernels_are_never_dear() -> None:
    kernels = Judged(0.0, 0.0)
    asked = Verdict(None, kernels, Budget(None, 1.0, started=time.monotonic() - 10.0), seconds=1.0)
    assert asked.losses(kernels) == Losses(2.0, None)
    assert asked.seconds == 1.0
    assert not asked.dear and not asked.too_late


def refined(
    graph: GraphModule, float_model: nn.Module, seconds: float = 0.0, spoiled: float = 1.0, **changes: Any
) -> tuple[int, Any]:
    """How often what ships was asked for, and the report.

    Args:
        seconds: that each call takes.
        spoiled: factor of the outputs of what ships from the second call on.
    """
    made = []

    def ship(model: GraphModule) -> Callable[[torch.Tensor], torch.Tensor]:
        made.append(model)
        time.sleep(seconds)
        return model if len(made) == 1 or spoiled == 1.0 else lambda x: model(x) * spoiled

    config = settings(accept_on=ship, holdout=0, **changes)
    cptv_ao.refine(graph, BATCHES, float_model=float_model, config=config, progress=False)
    return len(made), cptv_ao.report(graph)


def test_too_few_seconds_for_a_verdict_are_told_and_nothing_is_searched(
    tokens_x86: GraphModule, tokens: nn.Module
) -> None:
    given = tokens_x86(BATCHES[0])
    made, report = refined(tokens_x86, tokens, seconds=0.5, max_seconds=0.4)
    assert made == 1
    assert (report.status, report.evaluations, report.moves) == (cptv_ao.Status.UNCHANGED, 0, ())
    assert report.before == report.after
    (note,) = [note for note in report.notes if "accept_on" in note]
    assert note.startswith("not searched: accept_on takes ") and note.endswith(" s are worth it")
    assert torch.equal(tokens_x86(BATCHES[0]), given)
    assert note in str(report) and note in report.to_dict()["notes"]


def test_where_it_is_dear_an_equal_form_is_judged_with_what_is_found_in_it(
    tokens_x86: GraphModule, tokens: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap, start = copy.deepcopy(tokens_x86), mse(tokens_x86, tokens, BATCHES)
    monkeypatch.setattr(verdict, "_DEAR", 0.0)
    made, report = refined(tokens_x86, tokens, max_seconds=1000.0)
    assert made == 2
    assert report.before.search == pytest.approx(start, rel=1e-5)
    assert report.after.search == pytest.approx(mse(tokens_x86, tokens, BATCHES), rel=1e-5)
    assert report.after.search < start
    monkeypatch.setattr(verdict, "_DEAR", 1.0)
    assert refined(cheap, tokens, max_seconds=1000.0)[0] == 3, "there is an equal form"


def test_an_equal_form_that_nobody_judged_goes_with_what_was_found(
    tokens_x86: GraphModule, tokens: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "_DEAR", 0.0)
    monkeypatch.setattr(budget, "_LATE", 0.0)
    given, weights = tokens_x86(BATCHES[0]), {name: tensor.clone() for name, tensor in tokens_x86.state_dict().items()}
    made, report = refined(tokens_x86, tokens, max_seconds=1000.0)
    assert made == 1
    assert report.status is cptv_ao.Status.REJECTED and report.before == report.after and report.moves == ()
    assert any("no time was left to judge it" in note for note in report.notes)
    assert torch.equal(tokens_x86(BATCHES[0]), given)
    assert all(torch.equal(tokens_x86.state_dict()[name], tensor) for name, tensor in weights.items())


@pytest.mark.slow
def test_an_equal_form_is_judged_where_the_search_found_nothing_in_it(
    tokens_x86: GraphModule, tokens: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "_DEAR", 0.0)
    start = mse(tokens_x86, tokens, BATCHES)
    made, report = refined(tokens_x86, tokens, max_seconds=1000.0, passes=0, gradient_steps=0, population=())
    assert made == 2 and report.evaluations == 0
    after = mse(tokens_x86, tokens, BATCHES)
    assert report.after.search == pytest.approx(after, rel=1e-5)
    assert after <= start
    assert (report.status is cptv_ao.Status.IMPROVED) == (after < start)


def test_an_equal_form_that_is_worse_where_nothing_was_found_is_not_called_a_refusal(
    tokens_x86: GraphModule, tokens: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "_DEAR", 0.0)
    given, nothing = tokens_x86(BATCHES[0]), dict[str, Any](passes=0, gradient_steps=0, population=())
    made, report = refined(tokens_x86, tokens, spoiled=3.0, max_seconds=1000.0, **nothing)
    assert made == 2 and report.evaluations == 0
    assert report.status is cptv_ao.Status.UNCHANGED and report.before == report.after
    assert any("the equal form that it began from is not kept" in note for note in report.notes)
    assert torch.equal(tokens_x86(BATCHES[0]), given)
