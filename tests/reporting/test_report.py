"""The report: a table for people, a dict for machines; the bar and the silence."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
from helpers.cases import Case
from helpers.search import small_config

import cptv_ao
from cptv_ao.core.outcome import BlockResult, Losses, SiteMove
from cptv_ao.reporting.report import Report, put_on

TABLE = """\
cptv_ao.refine: improved: the refined scales are in the model

loss                     before   after   change
------------------------------------------------
kl, 800 search images      0.25     0.2  -20.0 %
kl, 200 held-out images     0.5  0.4875   -2.5 %

gradient: accepted, loss 0.24

block     visits  evaluations  accepted  loss before  after
-----------------------------------------------------------
blocks.0       2           35         7         0.25    0.2
head           1           20         0         0.22   0.22

2 of 74 sites moved; the farthest:
site                      scales moved  largest factor  zero_point step
-----------------------------------------------------------------------
head.output                     1 of 1           2.000                3
blocks.0.attn.qkv.weight      7 of 144           1.189                0

not understood, left alone: celu

55 evaluations, 44000 image-forwards, 12.3 s, 1 thread, seed 4"""


@pytest.fixture
def made() -> Report:
    return Report(
        status=cptv_ao.Status.IMPROVED,
        loss="kl",
        before=Losses(0.25, 0.5),
        after=Losses(0.2, 0.4875),
        blocks=(
            BlockResult("blocks.0", 0, 20, 5, 0.25, 0.22),
            BlockResult("head", 0, 20, 0, 0.22, 0.22),
            BlockResult("blocks.0", 1, 15, 2, 0.22, 0.2),
        ),
        moves=(
            SiteMove("blocks.0.attn.qkv.weight", "weight", "blocks.0", 144, 7, 0.25, 0, -0.25, 0.125),
            SiteMove("head.output", "activation", "head", 1, 1, 1.0, 3, 1.0, 1.0),
        ),
        stages=("gradient: accepted, loss 0.24",),
        sites=74,
        evaluations=55,
        image_forwards=44000,
        images=(800, 200),
        seconds=12.34,
        seed=4,
        threads=1,
        notes=("not understood, left alone: celu",),
    )


def test_the_table(made: Report) -> None:
    assert str(made) == TABLE


def refined(case: Case, **changes: object) -> Report:
    config = small_config(**changes)
    return cptv_ao.report(
        cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, config=config, progress=False)
    )


def test_what_moved_is_what_differs(case: Case) -> None:
    before = copy.deepcopy(case.converted)
    report = refined(case, evaluations=5, holdout=0)
    from cptv_ao.backends.backend import Backend

    old, new = Backend(before), Backend(case.converted)
    differ = {
        name
        for name in old.sites
        if not old.read(name).scale.equal(new.read(name).scale)
        or not old.read(name).zero_point.equal(new.read(name).zero_point)
    }
    # A tied site moves with its leader and is listed under the name of its own.
    assert {move.name for move in report.moves} == differ
    assert differ
    for move in report.moves:
        ratio = (new.read(move.name).scale / old.read(move.name).scale).log2()
        assert move.log2 == pytest.approx(float(ratio.abs().max()))
        assert (move.low, move.high) == pytest.approx((float(ratio.min()), float(ratio.max())))
        assert move.moved == int((ratio != 0).sum())
        assert move.scales == old.sites[move.name].numel


def test_the_report_of_a_search_is_consistent(vit_w3: Case) -> None:
    vit_w3.batches = vit_w3.batches[:1]
    report = refined(vit_w3, evaluations=2, passes=2, holdout=0)
    assert [block.name for block in report.blocks if block.visit == 0][:2] == ["stem", "blocks.0"]
    assert report.evaluations == sum(block.evaluations for block in report.blocks) == 2 * 6 * 2
    assert report.sites == 74
    assert report.images == (32, 0)
    for block in report.blocks:
        assert block.after <= block.before
        assert (block.after < block.before) == (block.accepted > 0)
    for block, following in zip(report.blocks, report.blocks[1:], strict=False):
        assert following.before == block.after
    assert str(report).startswith("cptv_ao.refine: improved")


@pytest.mark.parametrize("changes", [{}, {"holdout": 0}, {"score_on": "simulation"}])
def test_the_history_is_that_of_the_search(conv: Case, changes: dict[str, object]) -> None:
    report = refined(conv, evaluations=6, passes=2, population=("output_error",), gradient_steps=8, **changes)
    first, *rest = report.history
    assert (first.evaluations, first.kept) == (0, True)
    assert len(rest) == len(report.stages) + len(report.blocks)
    assert [p.evaluations for p in report.history] == sorted(p.evaluations for p in report.history)
    assert report.history[-1].evaluations == report.evaluations
    searched = [p.search for p in report.history]
    assert searched == sorted(searched, reverse=True), "the best so far never rises"
    assert searched[-len(report.blocks) :] == [block.after for block in report.blocks]
    for point in rest:
        assert (point.holdout is None) == (report.before.holdout is None)
        if point.kept and point.holdout is not None and first.holdout is not None:
            assert point.holdout <= first.holdout
    if not changes.get("score_on"):
        last = [p for p in report.history if p.kept][-1]
        assert (first.search, first.holdout) == (report.before.search, report.before.holdout)
        assert (last.search, last.holdout) == (report.after.search, report.after.holdout)


def test_the_settings_are_told(conv: Case) -> None:
    settings = refined(conv, seed=5, blocks=cptv_ao.blocks_by_path).settings
    assert settings.keys() == cptv_ao.RefineConfig.__dataclass_fields__.keys()
    assert (settings["seed"], settings["loss"], settings["blocks"]) == ("5", "'kl'", "blocks_by_path")


def test_it_is_json_safe(conv: Case) -> None:
    report = refined(conv, evaluations=4)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["status"] == report.status.name
    assert data["message"] == report.status.value
    assert data["before"] == {"search": report.before.search, "holdout": report.before.holdout}
    assert len(data["blocks"]) == len(report.blocks)
    assert [p["search"] for p in data["history"]] == [p.search for p in report.history]
    assert [move["name"] for move in data["moves"]] == [move.name for move in report.moves]


def test_without_held_out_images(conv: Case) -> None:
    report = refined(conv, holdout=0)
    assert report.before.holdout is None and report.images == (16, 0)
    assert "held-out" not in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_model_that_was_not_refined(conv: Case) -> None:
    for model in (conv.converted, conv.float_model):
        with pytest.raises(ValueError, match=r"no report: expected a model that cptv_ao.refine returned"):
            cptv_ao.report(model)


def test_a_copy_keeps_its_report(conv: Case) -> None:
    report = refined(conv)
    assert cptv_ao.report(copy.deepcopy(conv.converted)) == report


def plain(value: object) -> bool:
    if type(value) is dict:
        return all(type(key) is str and plain(held) for key, held in value.items())
    if type(value) is list:
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool)


def test_it_is_kept_as_plain_values(conv: Case, made: Report) -> None:
    report = refined(conv, evaluations=4, gradient_steps=4)
    assert plain(conv.converted.meta)
    assert report == cptv_ao.report(conv.converted) and report.moves and report.history
    assert str(cptv_ao.report(conv.converted)) == str(report)
    for kept in (made, replace(made, before=Losses(float("inf"), None), settings={"a": "b"})):
        put_on(conv.converted, kept)
        assert plain(conv.converted.meta) and cptv_ao.report(conv.converted) == kept
        conv.converted.meta = json.loads(json.dumps(conv.converted.meta))
        assert cptv_ao.report(conv.converted) == kept
        assert pickle.loads(pickle.dumps(cptv_ao.report(conv.converted))) == kept


DAMAGES: list[object] = [
    None, 3, "IMPROVED", [], {}, {"status": "IMPROVED"}, {"status": "FINE"}, {"before": None},
    {"after": {"search": "1"}}, {"blocks": [3]}, {"images": [1]}, {"seconds": None},
    {"settings": {"a": 1}}, {"sites": True}, {"more": 1},
    {"notes": "text"}, {"status": []},
]  # fmt: skip
#: with which it is diagnosed, too
SOME = (None, "IMPROVED", {"status": "FINE"}, {"blocks": [3]})


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_ours_is_no_report(conv: Case, made: Report, damage: object) -> None:
    put_on(conv.converted, made)
    good = conv.converted.meta["cptv_ao"]
    whole = isinstance(damage, dict) and damage and damage != {"status": "IMPROVED"}
    conv.converted.meta["cptv_ao"] = {**good, **damage} if whole else damage  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"no report: expected a model that cptv_ao.refine returned"):
        cptv_ao.report(conv.converted)
    if damage in SOME:
        found = cptv_ao.diagnose(conv.converted, conv.batches[:1], float_model=conv.float_model, progress=False)
        conv.converted.meta.clear()
        never = cptv_ao.diagnose(conv.converted, conv.batches[:1], float_model=conv.float_model, progress=False)
        assert found.advice == never.advice
    conv.converted.meta = None
    with pytest.raises(ValueError, match="no report"):
        cptv_ao.report(conv.converted)


def test_no_progress_is_silent(conv: Case, capfd: pytest.CaptureFixture[str]) -> None:
    refined(conv)
    assert capfd.readouterr() == ("", "")


def test_the_bar_shows_the_loss_and_reaches_its_end(conv: Case, capfd: pytest.CaptureFixture[str]) -> None:
    config = small_config(evaluations=4)
    cptv_ao.refine(conv.converted, conv.batches, float_model=conv.float_model, config=config)
    out, err = capfd.readouterr()
    assert out == ""
    report = cptv_ao.report(conv.converted)
    last = err.replace("\n", "\r").split("\r")
    last_line = [line for line in last if line.strip()][-1]
    assert last_line.startswith("refine: 100%")
    assert f"{report.evaluations}/{report.evaluations}" in last_line
    assert "loss 0." in last_line or ("loss " in last_line and "e-" in last_line)


def test_the_callback_sees_every_step(vit_w3: Case) -> None:
    events: list[cptv_ao.Event] = []
    config = small_config(evaluations=3, passes=2, holdout=0)
    cptv_ao.refine(
        vit_w3.converted,
        vit_w3.batches,
        float_model=vit_w3.float_model,
        config=config,
        callback=events.append,
        progress=False,
    )
    report = cptv_ao.report(vit_w3.converted)
    kinds = [event.kind for event in events]
    assert kinds.count("candidate") == report.evaluations == 36
    assert (kinds.count("block"), kinds.count("pass")) == (len(report.blocks), 2)
    assert [e.evaluations for e in events] == sorted(e.evaluations for e in events)
    best = [e.best for e in events]
    assert best == sorted(best, reverse=True), "the best loss never rises"
    assert best[-1] == report.after.search
    with pytest.raises(AttributeError):
        events[0].loss = 0.0  # type: ignore[misc]
