"""Callbacks: logs that agree with the report, event files that TensorBoard reads, stops that only stop."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from helpers.cases import Case
from helpers.quick import some
from helpers.search import exact_kl, small_config
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.callbacks import EarlyStop, Log, TensorBoard, chain
from cptv_ao.core.events import Callback


def refine(case: Case, callback: Callback, **changes: Any) -> cptv_ao.Report:
    settings = {"evaluations": 6, "passes": 2, "population": ("output_error",), "gradient_steps": 8}
    arguments = {name: changes.pop(name) for name in ("checkpoint",) if name in changes}
    config = small_config(**(settings | changes))
    cptv_ao.refine(
        case.converted,
        case.batches,
        float_model=case.float_model,
        config=config,
        callback=callback,
        progress=False,
        **arguments,
    )
    return cptv_ao.report(case.converted)


def search_loss(model: GraphModule, case: Case) -> float:
    """KL on the search images: all batches but the last, which is held out."""
    with torch.inference_mode():
        return mean(float(exact_kl(model(batch), case.float_model(batch))) for batch in case.batches[:-1])


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def read_csv(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    texts = ("kind", "name")
    return [{k: v if k in texts else json.loads(v) if v else None for k, v in row.items()} for row in rows]


@pytest.mark.parametrize(("name", "read"), [("log.jsonl", read_jsonl), ("log.CSV", read_csv)])
def test_a_log_agrees_with_the_report(
    conv: Case, tmp_path: Path, name: str, read: Callable[[Path], list[dict[str, Any]]]
) -> None:
    events: list[cptv_ao.Event] = []
    (tmp_path / name).write_text("of another run")
    report = refine(conv, chain(Log(tmp_path / name), events.append))
    rows = read(tmp_path / name)
    assert len(rows) == len(events)
    for row, event in zip(rows, events, strict=True):
        for key, value in row.items():
            wanted = getattr(event, key)
            assert value == (None if isinstance(wanted, float) and not math.isfinite(wanted) else wanted)
    assert {row["kind"] for row in rows} == {"step", "proposal", "candidate", "block", "pass"}
    assert any(row["loss"] is None for row in rows), "a candidate was rejected early"
    visits = [(row["name"], row["loss"]) for row in rows if row["kind"] == "block"]
    assert visits == [(block.name, block.after) for block in report.blocks]
    assert max(row["evaluations"] for row in rows) == report.evaluations
    assert list(tmp_path.iterdir()) == [tmp_path / name]


@pytest.mark.parametrize(("name", "read"), [("log.jsonl", read_jsonl), ("log.csv", read_csv)])
def test_a_log_goes_on_behind_a_checkpoint(
    conv: Case, tmp_path: Path, name: str, read: Callable[[Path], list[dict[str, Any]]]
) -> None:
    whole, killed = conv.copy(), conv.copy()
    events: list[cptv_ao.Event] = []
    refine(whole, events.append)

    def kill(event: cptv_ao.Event) -> None:
        if event.kind == "block":
            raise InterruptedError

    path = tmp_path / name
    with pytest.raises(InterruptedError):
        refine(killed, chain(Log(path), kill), checkpoint=tmp_path / "search")
    killed_at = len(read(path))
    refine(conv, Log(path, append=True), checkpoint=tmp_path / "search")
    rows = read(path)
    assert len(rows) > killed_at
    assert [r["loss"] for r in rows if r["kind"] == "block"][1:] == [e.loss for e in events if e.kind == "block"]


def test_a_log_that_cannot_be_written_is_told_before_the_search(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Log(tmp_path / "absent" / "log.csv")


def test_names_with_commas_and_line_breaks_stay_one_row(conv: Case, tmp_path: Path) -> None:
    name = 'a,"b"\n{c}'
    chained = chain(Log(tmp_path / "log.csv"), Log(tmp_path / "log.jsonl"))
    refine(conv, chained, blocks=lambda sites: {site.name: name for site in sites})
    for rows in (read_csv(tmp_path / "log.csv"), read_jsonl(tmp_path / "log.jsonl")):
        assert {row["name"] for row in rows if row["kind"] == "candidate"} == {name}


def test_tensorboard_reads_what_was_written(conv: Case, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    events: list[cptv_ao.Event] = []
    with SummaryWriter(str(tmp_path)) as writer:
        report = refine(conv, chain(TensorBoard(writer), events.append))
    read = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"]}
    assert scalars.keys() == {"refine/best", "refine/candidate", "refine/descent"}
    best = scalars["refine/best"][-1]
    assert best.step == report.evaluations
    assert best.value == pytest.approx(report.history[-1].search, rel=1e-6)
    descent = [event.loss for event in events if event.kind == "step"]
    assert [s.value for s in scalars["refine/descent"]] == pytest.approx(descent, rel=1e-6)
    assert [s.step for s in scalars["refine/descent"]] == list(range(1, len(descent) + 1))
    tried = [(e.evaluations, e.loss) for e in events if e.kind in ("candidate", "proposal") and math.isfinite(e.loss)]
    assert [s.step for s in scalars["refine/candidate"]] == [at for at, _ in tried]


@pytest.mark.parametrize("kind", some("step", "candidate", "pass", others=["proposal", "block"]))
def test_a_callback_can_stop(conv: Case, kind: str) -> None:
    events: list[cptv_ao.Event] = []

    def stop(event: cptv_ao.Event) -> Any:
        events.append(event)
        return cptv_ao.STOP if event.kind == kind else None

    report = refine(conv, stop)
    assert report.status is cptv_ao.Status.CALLBACK
    assert str(report).startswith("cptv_ao.refine: stopped by the callback: the best scales found until then")
    assert report.to_dict()["status"] == "CALLBACK"
    kinds = [event.kind for event in events]
    after_it = kinds[kinds.index(kind) + 1 :]
    # The descent gives what it has found so far, and the visit that runs is ended; nothing new is begun.
    assert {"step", "candidate"}.isdisjoint(after_it)
    assert after_it.count("block") <= 1
    last = [point for point in report.history if point.kept][-1]
    assert (last.search, last.holdout) == (report.after.search, report.after.holdout)
    assert search_loss(conv.converted, conv) == pytest.approx(report.after.search, rel=1e-5), "they are in the model"


@pytest.mark.parametrize("answer", some(True, "stop", None, others=[1, 0]))
def test_nothing_else_stops(conv: Case, answer: Any) -> None:
    assert refine(conv, lambda event: answer).status is not cptv_ao.Status.CALLBACK


@pytest.mark.parametrize("score_on", some("simulation", others=["kernels"]))
def test_an_early_stop_watches_the_model_that_is_searched(conv: Case, score_on: str) -> None:
    """The loss of the search as a metric of the user's is, at each look, that of the history."""
    seen: list[GraphModule] = []

    def metric(model: GraphModule) -> float:
        seen.append(model)
        return search_loss(model, conv)

    stop = EarlyStop(metric, patience=100, higher=False)
    report = refine(conv, stop, score_on=score_on, population=(), gradient_steps=0, evaluations=12)
    assert report.status is not cptv_ao.Status.CALLBACK
    assert all((model is conv.converted) == (score_on == "kernels") for model in seen)
    looks = [(point.evaluations, pytest.approx(point.search, rel=1e-5)) for point in report.history[1:]]
    assert stop.values == looks
    assert len({value for _, value in stop.values}) > 2, "the search gained on the way"


@pytest.mark.parametrize(
    ("values", "higher", "looks"),
    [
        ([0.1, 0.2, 0.2, 0.1, 0.9], True, 4),
        ([0.9, 0.8, 0.7, 0.8, 0.9, 0.1], False, 5),
        ([math.nan, math.nan, 1.0], True, 2),
        ([0.1, math.nan, 0.2, 0.1, math.nan], True, 5),
    ],
)
def test_patience(conv: Case, values: list[float], higher: bool, looks: int) -> None:
    left = iter(values)
    stop = EarlyStop(lambda model: next(left), patience=2, higher=higher)
    assert refine(conv, stop, passes=5).status is cptv_ao.Status.CALLBACK
    assert len(stop.values) == looks


@pytest.mark.parametrize("score_on", some("kernels", others=["simulation"]))
def test_an_early_stop_selects_nothing(conv: Case, score_on: str) -> None:
    """A metric that is best at the start changes nothing but how long the search takes."""
    plain = conv.copy()
    events: list[cptv_ao.Event] = []
    whole = refine(plain, events.append, score_on=score_on)
    watched = conv.copy()
    worse = iter(range(1000, 0, -1))
    patient = EarlyStop(lambda model: float(model(conv.batches[0]).abs().sum() * 0) + next(worse), patience=100)
    report = refine(watched, patient, score_on=score_on)
    assert len(patient.values) == len(whole.history) - 1
    assert report.after == whole.after
    assert torch.equal(plain.converted(conv.batches[0]), watched.converted(conv.batches[0]))
    hasty = EarlyStop(lambda model: 0.0, patience=1)
    report = refine(conv, hasty, score_on=score_on)
    assert len(hasty.values) == 2
    assert report.after.search <= report.before.search


def test_a_metric_that_raises_leaves_the_model_as_it_was(conv: Case) -> None:
    given = conv.converted(conv.batches[0])
    with pytest.raises(ZeroDivisionError):
        refine(conv, EarlyStop(lambda model: 1 / 0))
    assert torch.equal(conv.converted(conv.batches[0]), given)


def test_patience_is_checked() -> None:
    with pytest.raises(ValueError, match="expected a patience of at least 1 look, got 0"):
        EarlyStop(lambda model: 0.0, patience=0)
