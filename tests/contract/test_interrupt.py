"""Ctrl-C: the first ends the search with the best scales so far, the second gives up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.cases import Case
from helpers.quick import some
from helpers.search import small_config

import cptv_ao


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """A process that was started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def refine(case: Case, kind: str, times: int, **changes: Any) -> list[cptv_ao.Event]:
    """Refine; press Ctrl-C at the second event of a kind, and again at the following events."""
    events: list[cptv_ao.Event] = []
    seen = pressed = 0

    def press(event: cptv_ao.Event) -> None:
        nonlocal seen, pressed
        events.append(event)
        seen += event.kind == kind
        if seen >= 2 and pressed < times:
            pressed += 1
            os.kill(os.getpid(), signal.SIGINT)

    config = small_config(**({"evaluations": 4, "gradient_steps": 40} | changes))
    cptv_ao.refine(
        case.converted, case.batches, float_model=case.float_model, config=config, callback=press, progress=False
    )
    return events


@pytest.mark.parametrize("kind", some("step", "candidate", others=["proposal", "block"]))
def test_the_first_ends_the_search_with_what_was_found(conv: Case, kind: str, capsys: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    events = refine(conv, kind, times=1)
    report = cptv_ao.report(conv.converted)
    assert report.status is cptv_ao.Status.STOPPED
    assert report.after.search <= report.before.search
    after_it = [event.kind for event in events][[event.kind for event in events].index(kind) :]
    assert after_it.count("candidate") <= 2 + 4 * (kind == "block")
    assert "Ctrl-C again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    if kind in ("candidate", "block"):
        assert report.moves, "the descent had found something"


@pytest.mark.parametrize("kind", ["step", "candidate"])
def test_the_second_leaves_the_model_as_it_was_given(conv: Case, kind: str) -> None:
    given, before = conv.converted(conv.batches[0]), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        refine(conv, kind, times=2)
    assert torch.equal(conv.converted(conv.batches[0]), given)
    assert signal.getsignal(signal.SIGINT) is before
    assert "cptv_ao" not in conv.converted.meta


def test_handlers_of_others_and_other_threads_are_left_alone(conv: Case) -> None:
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    try:
        refine(conv, "candidate", times=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [1]
    assert cptv_ao.report(conv.converted).status is not cptv_ao.Status.STOPPED
    thread = threading.Thread(target=refine, args=(conv, "nothing", 0))
    thread.start()
    thread.join()
    assert cptv_ao.report(conv.converted).status is not cptv_ao.Status.STOPPED
