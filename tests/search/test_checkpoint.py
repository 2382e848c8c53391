"""Killed at any moment and called again, a refine ends with the scales of one that was not interrupted."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from helpers.cases import Case, Copies
from helpers.damage import changed
from helpers.killed import CONFIG, Killed, refine
from safetensors.torch import load_file

import cptv_ao
from cptv_ao.core.tensor_file import read_file
from cptv_ao.search.checkpoint import Checkpoint
from cptv_ao.search.state import Resumable


@pytest.fixture(scope="module")
def files(small_cases: Copies, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What searches of `conv` leave behind: one that is over, and one that was killed in its descent."""
    folder = tmp_path_factory.mktemp("files")
    kinds = [event.kind for event in refine(small_cases["conv"], folder / "over")]
    third = [number for number, kind in enumerate(kinds) if kind == "step"][2]  # behind a proposal
    with pytest.raises(Killed):
        refine(small_cases["conv"], folder / "killed", kill_at=third)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def over(files: dict[str, bytes], tmp_path: Path) -> Path:
    """The file of a search of `conv` that is over."""
    (tmp_path / "search").write_bytes(files["over"])
    return tmp_path / "search"


def scales(case: Case) -> dict[str, Any]:
    from cptv_ao.backends.backend import Backend

    backend = Backend(case.converted)
    return {name: backend.read(name) for name in backend.sites}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(
        torch.equal(a[name].scale, b[name].scale) and torch.equal(a[name].zero_point, b[name].zero_point) for name in a
    )


def test_too_few_seconds_change_nothing_and_lose_nothing(small_cases: Copies, over: Path) -> None:
    asked, given, gone_on, saved = (small_cases["conv"] for _ in range(4))
    assert refine(asked, None, max_seconds=1e-4) == []
    report = cptv_ao.report(asked.converted)
    assert equal(scales(asked), scales(given)) and report.status is cptv_ao.Status.UNCHANGED
    assert [note for note in report.notes if note.startswith("not searched: max_seconds=0.0001 pays for nothing here")]
    assert not any("is too short" in note for note in report.notes), "it is said once"
    refine(saved, over)
    refine(gone_on, over, max_seconds=1e-4)
    assert any("is too short" in note for note in cptv_ao.report(gone_on.converted).notes)
    assert equal(scales(gone_on), scales(saved)) and not equal(scales(gone_on), scales(given))


SEARCHES: list[dict[str, Any]] = [{}, {"score_on": "simulation"}, {"search": "cma"}, {"block_order": "backward"}]
QUICK = {("conv", 0), ("functional", 2)}


@pytest.mark.parametrize(
    ("small", "changes"),
    [
        pytest.param(name, changes, marks=[] if (name, number) in QUICK else pytest.mark.slow)
        for name in ("conv", "functional", "conv per tensor", "functional per tensor")
        for number, changes in enumerate(SEARCHES)
    ],
    indirect=["small"],
)
def test_it_goes_on_to_the_very_same_end(small: Case, tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = small.copy()
    events = refine(whole, None, **changes)
    wanted, report = whole.converted(whole.batches[0]), cptv_ao.report(whole.converted)
    path = tmp_path / "search"
    kills = 0
    visits = [event.kind for event in events].index("candidate")
    for kill_at in (2, visits - 2, 3, 6, 5):  # in the descent, at its proposals, in and between blocks
        killed = small.copy()
        given = killed.converted(killed.batches[0])
        try:
            refine(killed, path, kill_at=kill_at, **changes)
        except Killed:
            kills += 1
            assert torch.equal(killed.converted(killed.batches[0]), given)
    assert kills >= 3
    resumed = small.copy()
    seen = refine(resumed, path, **changes)
    assert torch.equal(resumed.converted(resumed.batches[0]), wanted)
    assert equal(scales(resumed), scales(whole))
    found = cptv_ao.report(resumed.converted)
    assert (found.after, found.blocks, found.stages, found.moves, found.evaluations) == (
        report.after, report.blocks, report.stages, report.moves, report.evaluations,
    )  # fmt: skip
    assert [replace(point, seconds=0.0) for point in found.history] == [
        replace(point, seconds=0.0) for point in report.history
    ]
    seconds = [point.seconds for point in found.history]
    assert seconds == sorted(seconds), "the clock goes on where the file left it"
    assert len(seen) < len(events)


def test_a_graph_of_pt2e_goes_on_to_the_same_end(tmp_path: Path) -> None:
    from cptv_ao.backends.backend import Backend

    float_model = nets.seeded(pt2e.Residual)
    given = pt2e.converted(float_model, pt2e.x86(), True)
    graphs = [copy.deepcopy(given) for _ in range(3)]
    cases = [Case(float_model, given, graph, pt2e.BATCHES) for graph in graphs]
    settings: dict[str, Any] = {"output": first, "population": ("output_error",)}
    refine(cases[0], None, **settings)
    for kill_at in (9, 9):
        with pytest.raises(Killed):
            refine(cases[1], tmp_path / "search", kill_at=kill_at, **settings)
    assert len(refine(cases[2], tmp_path / "search", **settings)) > 0
    whole, resumed = (Backend(graph) for graph in (graphs[0], graphs[2]))
    assert all(torch.equal(whole.read(name).scale, resumed.read(name).scale) for name in whole.sites)
    reports = [cptv_ao.report(graph) for graph in (graphs[0], graphs[2])]
    assert reports[0].after == reports[1].after and reports[0].blocks == reports[1].blocks and reports[0].moves


def first(output: dict[str, torch.Tensor]) -> torch.Tensor:
    return output["logits"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"score_on": "simulation"}, marks=pytest.mark.slow),
        pytest.param({"rounding_rate": 0.0, "feature_weight": 0.0}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "small",
    [
        pytest.param("conv", marks=pytest.mark.slow),
        "functional",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("conv per tensor", "functional per tensor")),
    ],
    indirect=True,
)
def test_no_step_of_the_descent_is_lost(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Killed after every second event of the descent."""
    monkeypatch.setattr("cptv_ao.search.checkpoint._SECONDS", 0.0)
    monkeypatch.setattr("cptv_ao.search.checkpoint._SHARE", 1e9)
    whole, path = small.copy(), tmp_path / "search"
    events = refine(whole, None, **changes)
    kinds = [event.kind for event in events]
    kill_at, kills = kinds.index("step"), 0
    while not path.exists() or "descent" in read_file(path)[1]:
        with pytest.raises(Killed):
            refine(small.copy(), path, kill_at=kill_at, **changes)
        kill_at, kills = 2, kills + 1
    halves = sum("of the way" in event.name for event in events)
    assert 4 <= kills <= kinds.count("step") + halves + 1, "each attempt goes on from the last one"
    assert "step" not in [event.kind for event in refine(small, path, **changes)]
    assert equal(scales(small), scales(whole))
    assert torch.equal(small.converted(small.batches[0]), whole.converted(whole.batches[0]))
    report, found = cptv_ao.report(whole.converted), cptv_ao.report(small.converted)
    assert (found.after, found.blocks, found.stages, found.moves, found.evaluations) == (
        report.after, report.blocks, report.stages, report.moves, report.evaluations,
    )  # fmt: skip


def test_a_descent_that_was_stopped_goes_on(conv: Case, tmp_path: Path) -> None:
    whole, path, steps = conv.copy(), tmp_path / "search", []
    kinds = [event.kind for event in refine(whole, None)]

    def stop(event: cptv_ao.Event) -> Any:
        steps.append(event.kind == "step")
        return cptv_ao.STOP if sum(steps) == 3 else None

    stopped = conv.copy()
    model = cptv_ao.refine(
        stopped.converted, stopped.batches, float_model=stopped.float_model, config=CONFIG, callback=stop,
        checkpoint=path, progress=False,
    )  # fmt: skip
    assert cptv_ao.report(model).status is cptv_ao.Status.CALLBACK
    seen = refine(conv, path)
    assert [event.kind for event in seen].count("step") == kinds.count("step") - 3 > 0
    assert equal(scales(conv), scales(whole))


def test_in_the_descent_it_is_saved_as_often_as_it_pays(
    conv: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    save = Checkpoint.save

    def watched(self: Checkpoint, search: Resumable) -> None:
        descent = search.state().descent
        saved.append(None if descent is None else descent[1]["course"]["steps"])
        save(self, search)

    monkeypatch.setattr(Checkpoint, "save", watched)
    refine(conv, tmp_path / "search", gradient_steps=40, population=())
    assert [steps for steps in saved if steps is not None] == [0, 10, 20, 30], "at its proposals, in the first minute"


def test_a_search_that_is_over_is_not_run_again(conv: Case, tmp_path: Path) -> None:
    first = conv.copy()
    refine(first, tmp_path / "search")
    events = refine(conv, tmp_path / "search")
    assert not [event for event in events if event.kind in ("step", "candidate")]
    assert torch.equal(conv.converted(conv.batches[0]), first.converted(conv.batches[0]))


def test_limits_may_be_changed(conv: Case, tmp_path: Path) -> None:
    whole, part = conv.copy(), conv.copy()
    refine(whole, None)
    refine(part, tmp_path / "search", max_evaluations=12)
    assert cptv_ao.report(part.converted).status is cptv_ao.Status.BUDGET
    refine(conv, tmp_path / "search")
    assert (
        cptv_ao.report(conv.converted).evaluations <= cptv_ao.report(whole.converted).evaluations + CONFIG.evaluations
    )


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("config", "another config: seed is 0 there and 7 here"),
        ("data", "another data"),
        ("order", "another data"),
        ("model", "another model"),
    ],
)
def test_another_search_is_refused(conv: Case, over: Path, what: str, told: str) -> None:
    changes: dict[str, Any] = {}
    if what == "config":
        changes["seed"] = 7
    elif what == "data":
        changes["batches"] = [batch + 1e-3 for batch in conv.batches]
    elif what == "order":
        changes["batches"] = conv.batches[::-1]
    else:
        conv.converted.fc1.scale *= 2
    given = conv.converted(conv.batches[0])
    with pytest.raises(cptv_ao.ScalesFileError, match=f"the checkpoint of a search with {told}"):
        refine(conv, over, **changes)
    assert torch.equal(conv.converted(conv.batches[0]), given)


def no_position(_: Any, data: dict[str, Any]) -> None:
    del data["position"]


def odd_position(_: Any, data: dict[str, Any]) -> None:
    data["position"] = {"passes": 0, "somewhere": 3}


def odd_random(_: Any, data: dict[str, Any]) -> None:
    data["random"] = {"bit_generator": "PCG64", "state": "__import__('os')"}


def odd_scale(tensors: dict[str, Any], _: Any) -> None:
    name = next(key for key in tensors if key.startswith("now/") and key.endswith("/scale"))
    tensors[name] = tensors[name].new_full(tensors[name].shape, -1.0)


def no_fingerprint(_: Any, data: dict[str, Any]) -> None:
    del data["fingerprint"]


@pytest.mark.parametrize("change", [no_position, odd_position, odd_random, odd_scale, no_fingerprint])
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(conv: Case, over: Path, change: Any) -> None:
    changed(over, change)
    given = conv.converted(conv.batches[0])
    with pytest.raises(cptv_ao.CptvError, match=r"not the checkpoint of a search|scale must be finite and > 0"):
        refine(conv, over)
    assert torch.equal(conv.converted(conv.batches[0]), given)


@pytest.mark.parametrize("damage", ["descent/leaf/0", "descent/adam/0/exp_avg", "course", "random"])
def test_a_damaged_descent_is_refused(conv: Case, files: dict[str, bytes], tmp_path: Path, damage: str) -> None:
    def change(tensors: dict[str, Any], data: dict[str, Any]) -> None:
        if damage in tensors:
            tensors[damage] = torch.zeros(7, 7)
        else:
            assert damage in data["descent"]
            data["descent"][damage] = {"steps": 3, "what": 4}

    path = tmp_path / "search"
    path.write_bytes(files["killed"])
    changed(path, change)
    given = conv.converted(conv.batches[0])
    with pytest.raises(cptv_ao.ScalesFileError, match="not the checkpoint of a search"):
        refine(conv, path)
    assert torch.equal(conv.converted(conv.batches[0]), given)


@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", b"\xff" * 200, b"PK\x03\x04" * 9])
def test_a_garbled_checkpoint_is_refused(conv: Case, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "search").write_bytes(content)
    with pytest.raises(cptv_ao.ScalesFileError, match="not a whole safetensors file"):
        refine(conv, tmp_path / "search")


def test_scales_are_no_checkpoint_and_a_checkpoint_no_scales(conv: Case, over: Path, tmp_path: Path) -> None:
    cptv_ao.save_scales(conv.converted, tmp_path / "scales")
    with pytest.raises(cptv_ao.ScalesFileError, match="not the checkpoint of a search"):
        refine(conv, tmp_path / "scales")
    with pytest.raises(cptv_ao.ScalesFileError, match="expected the site table of a model"):
        cptv_ao.load_scales(conv.converted, over)


def test_a_disk_that_is_full_leaves_the_model_as_it_was(
    conv: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = conv.converted(conv.batches[0])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cptv_ao.verbs.scales_file.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        refine(conv, tmp_path / "search")
    assert torch.equal(conv.converted(conv.batches[0]), given)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        refine(conv, tmp_path / "absent" / "search")


def test_what_is_written_is_tensors_and_json(over: Path) -> None:
    assert {key.split("/")[0] for key in load_file(over)} == {"now", "best"}
    with open(over, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert set(header["__metadata__"]) == {"cptv_ao"}
    json.loads(header["__metadata__"]["cptv_ao"])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and counts threads in /proc")
def test_it_survives_sigkill() -> None:
    """Fifty by hand: `python tests/tools/kill.py --kills 50`."""
    kills = int(os.environ.get("CPTV_AO_KILLS", "5"))
    here = Path(__file__).parents[1]
    command = [sys.executable, str(here / "tools" / "kill.py"), "--kills", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["landed"] == kills
    assert result["equal"]
    assert result["resumed"] >= 1
    assert result["progressed"] >= 1
    assert result["left_over"] == 0
