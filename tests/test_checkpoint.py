"""Killed at any moment and called again, a refine ends with the scales of one that was not interrupted."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case
from safetensors.torch import load_file
from small import small_config
from test_saved import changed, check_damaged, flipped

import cptv_ao
from cptv_ao.checkpoint import Checkpoint
from cptv_ao.saved import read_file

CONFIG = small_config(passes=2, evaluations=4, gradient_steps=8, population=("output_error", "ranges", "biases"))


class Killed(Exception):
    pass


def refine(case: Case, path: Path | None, *, kill_at: int | None = None, **changes: Any) -> list[cptv_ao.Event]:
    """Refine with a checkpoint; raise at an event of the search."""
    events: list[cptv_ao.Event] = []

    def watch(event: cptv_ao.Event) -> None:
        events.append(event)
        if kill_at is not None and len(events) > kill_at:
            raise Killed

    cptv_ao.refine(
        case.converted,
        changes.pop("batches", case.batches),
        float_model=case.float_model,
        config=replace(CONFIG, **changes),
        callback=watch,
        checkpoint=path,
        progress=False,
    )
    return events


def scales(case: Case) -> dict[str, Any]:
    from cptv_ao.backends.backend import Backend

    backend = Backend(case.converted)
    return {name: backend.read(name) for name in backend.sites}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(
        torch.equal(a[name].scale, b[name].scale) and torch.equal(a[name].zero_point, b[name].zero_point) for name in a
    )


@pytest.mark.parametrize("changes", [{}, {"score_on": "simulation"}, {"search": "cma"}, {"block_order": "backward"}])
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


def test_a_graph_of_pt2e_goes_on_to_the_same_end(pt2e: Any, tmp_path: Path) -> None:
    from cptv_ao.backends.backend import Backend

    float_model = pt2e.nets.seeded(pt2e.Residual)
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


@pytest.mark.parametrize("changes", [{}, {"score_on": "simulation"}, {"rounding_rate": 0.0, "feature_weight": 0.0}])
def test_no_step_of_the_descent_is_lost(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Killed after every second event of the descent."""
    monkeypatch.setattr("cptv_ao.checkpoint._SECONDS", 0.0)
    monkeypatch.setattr("cptv_ao.checkpoint._SHARE", 1e9)
    whole, path = small.copy(), tmp_path / "search"
    events = refine(whole, None, **changes)
    kinds = [event.kind for event in events]
    kill_at, kills = kinds.index("step"), 0
    while not path.exists() or "descent" in read_file(path)[1]:
        with pytest.raises(Killed):
            refine(small.copy(), path, kill_at=kill_at, **changes)
        kill_at, kills = 2, kills + 1
    assert 4 <= kills <= kinds.count("step") + 1, "each attempt goes on from the last one"
    assert "step" not in [event.kind for event in refine(small, path, **changes)]
    assert equal(scales(small), scales(whole))
    assert torch.equal(small.converted(small.batches[0]), whole.converted(whole.batches[0]))
    report, found = cptv_ao.report(whole.converted), cptv_ao.report(small.converted)
    assert (found.after, found.blocks, found.stages, found.moves, found.evaluations) == (
        report.after, report.blocks, report.stages, report.moves, report.evaluations,
    )  # fmt: skip


def test_a_descent_that_was_stopped_goes_on(conv: Case, tmp_path: Path) -> None:
    whole, path, steps = conv.copy(), tmp_path / "search", []
    refine(whole, None)

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
    assert [event.kind for event in seen].count("step") == CONFIG.gradient_steps - 3
    assert equal(scales(conv), scales(whole))


def test_in_the_descent_it_is_saved_as_often_as_it_pays(
    conv: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    save = Checkpoint.save

    def watched(self: Checkpoint, loop: Any, proposer: Any) -> None:
        saved.append(None if proposer._descent is None else proposer._descent.steps)
        save(self, loop, proposer)

    monkeypatch.setattr(Checkpoint, "save", watched)
    refine(conv, tmp_path / "search", gradient_steps=40)
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
def test_another_search_is_refused(conv: Case, tmp_path: Path, what: str, told: str) -> None:
    refine(conv.copy(), tmp_path / "search")
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
        refine(conv, tmp_path / "search", **changes)
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
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(conv: Case, tmp_path: Path, change: Any) -> None:
    path = tmp_path / "search"
    refine(conv.copy(), path)
    changed(path, change)
    given = conv.converted(conv.batches[0])
    with pytest.raises(cptv_ao.CptvError, match=r"not the checkpoint of a search|scale must be finite and > 0"):
        refine(conv, path)
    assert torch.equal(conv.converted(conv.batches[0]), given)


def odd_seconds(_: Any, data: dict[str, Any]) -> None:
    data["seconds"] = float("nan")


def odd_step(_: Any, data: dict[str, Any]) -> None:
    next(iter(data["step_sizes"].values()))["weights"] = -1.0


def odd_shift(tensors: dict[str, Any], _: Any) -> None:
    tensors["now/fc1.weight/shift"] = torch.ones(3, 3, dtype=torch.int8)


def odd_correction(tensors: dict[str, Any], _: Any) -> None:
    tensors["now/fc1.weight/correction"] = torch.ones(7)


@pytest.mark.parametrize("change", [odd_seconds, odd_step, odd_shift, odd_correction])
def test_what_cannot_be_is_refused(conv: Case, tmp_path: Path, change: Any) -> None:
    test_a_damaged_checkpoint_is_refused_and_changes_nothing(conv, tmp_path, change)


# Files that are whole, and lie


def doubled(tensors: dict[str, Any], prefix: str) -> None:
    for key in tensors:
        if key.startswith(prefix) and key.endswith("weight/scale"):
            tensors[key] = tensors[key] * 2


def worse_best(tensors: dict[str, Any], _: Any) -> None:
    doubled(tensors, "best/")


def worse_now(tensors: dict[str, Any], _: Any) -> None:
    doubled(tensors, "now/")


def lower_best(_: Any, data: dict[str, Any]) -> None:
    for losses in (data["losses"]["best"], *[point for point in data["history"] if point["kept"]][1:]):
        losses["search"] *= 0.5


def lower_now(_: Any, data: dict[str, Any]) -> None:
    data["losses"]["now"] *= 0.5


def lower_start(_: Any, data: dict[str, Any]) -> None:
    data["losses"]["start"]["search"] = data["history"][0]["search"] = 1e9


def other_history(_: Any, data: dict[str, Any]) -> None:
    data["history"][-1]["search"] = data["history"][0]["search"] = 0.0


@pytest.mark.parametrize("settings", [{}, {"score_on": "simulation"}])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (worse_best, "its scales are not what it says: best"),
        (worse_now, "its scales are not what it says: best"),
        (lower_best, "its scales are not what it says: best"),
        (lower_now, "its scales are not what it says: best"),
        (lower_start, "it started from another loss"),
        (other_history, "expected a history from the start's losses to the best ones"),
    ],
)
def test_scales_are_scored_again_before_they_count(
    conv: Case, tmp_path: Path, change: Any, told: str, settings: dict[str, Any]
) -> None:
    path = tmp_path / "search"
    refine(conv.copy(), path, **settings)
    changed(path, change)
    given = conv.converted(conv.batches[0])
    with pytest.raises(cptv_ao.ScalesFileError, match=f"search: .*{told}.*delete it to search from the start"):
        refine(conv, path, **settings)
    assert torch.equal(conv.converted(conv.batches[0]), given)


def test_a_file_that_is_right_about_worse_scales_is_refused(conv: Case, tmp_path: Path) -> None:
    """Not one word of it is wrong: but never worse holds."""
    from cptv_ao.backends.backend import Backend
    from cptv_ao.weights import find_float_weights

    path, spoilt = tmp_path / "search", conv.copy()
    settings: dict[str, Any] = {"gradient_steps": 0, "population": (), "equalize": False, "passes": 1}
    refine(conv.copy(), path, **settings)
    backend = Backend(spoilt.converted)
    find_float_weights(backend, spoilt.float_model)
    qparams = backend.read("fc1.weight")
    backend.write("fc1.weight", replace(qparams, scale=qparams.scale * 50))
    refine(spoilt, None, **settings, max_evaluations=0)
    losses = cptv_ao.report(spoilt.converted).before

    def worse(tensors: dict[str, Any], data: dict[str, Any]) -> None:
        tensors.clear()
        for where in ("best", "now"):
            tensors[f"{where}/fc1.weight/scale"] = qparams.scale * 50
            tensors[f"{where}/fc1.weight/zero_point"] = qparams.zero_point.clone()
        found = {"search": losses.search, "holdout": losses.holdout}
        data["losses"] |= {"best": found, "now": losses.search}
        data["best_is_given"] = False
        data["history"].append({**data["history"][0], **found})

    changed(path, worse)
    given = conv.converted(conv.batches[0])
    with pytest.raises(cptv_ao.ScalesFileError, match="its scales are worse than the given ones"):
        refine(conv, path, **settings)
    assert torch.equal(conv.converted(conv.batches[0]), given)


def test_a_checkpoint_with_one_bit_turned_is_refused(conv: Case, tmp_path: Path) -> None:
    path = tmp_path / "search"
    with pytest.raises(Killed):
        refine(conv.copy(), path, kill_at=8)
    whole, given = path.read_bytes(), conv.converted(conv.batches[0])
    check_damaged(whole)
    for bad in list(flipped(whole, 100, seed=3))[-4:]:
        path.write_bytes(bad)
        with pytest.raises(cptv_ao.ScalesFileError, match=r"search: .*delete it to search from the start"):
            refine(conv, path)
    assert torch.equal(conv.converted(conv.batches[0]), given)


# Settings: what a search was started with


def square(candidate: torch.Tensor, teacher: torch.Tensor, power: float = 2.0) -> torch.Tensor:
    return (candidate - teacher).abs().pow(power).mean()


class Weighted:
    def __init__(self, weight: float) -> None:
        self.weight = torch.tensor([weight])

    def __call__(self, candidate: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (candidate - teacher).square().mean() * self.weight.sum()

    def measure(self, candidate: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self(candidate, teacher)


class Huber(torch.nn.Module):
    def __init__(self, beta: float) -> None:
        super().__init__()
        self.inner = torch.nn.SmoothL1Loss(beta=beta)

    def forward(self, candidate: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.inner(candidate, teacher)


LOSSES: dict[str, tuple[Any, Any]] = {
    "partial": (lambda: partial(square, power=2.0), lambda: partial(square, power=2.5)),
    "object": (lambda: Weighted(1.0), lambda: Weighted(2.0)),
    "bound method": (lambda: Weighted(1.0).measure, lambda: Weighted(2.0).measure),
    "module": (lambda: Huber(1.0), lambda: Huber(0.5)),
    "module of torch": (lambda: torch.nn.SmoothL1Loss(beta=1.0), lambda: torch.nn.SmoothL1Loss(beta=0.5)),
    "default": (lambda: lambda c, t, k=1.0: k * (c - t).square().mean(), lambda: lambda c, t, k=2.0: k * square(c, t)),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_of_the_users_own_is_known_again(conv: Case, tmp_path: Path, kind: str) -> None:
    make, other = LOSSES[kind]
    refine(conv.copy(), tmp_path / "search", loss=make())
    assert not [e for e in refine(conv.copy(), tmp_path / "search", loss=make()) if e.kind == "candidate"]
    with pytest.raises(
        cptv_ao.ScalesFileError, match=r"another config: loss is \S+ \(\w{16}\) there and \S+ \(\w{16}\) here"
    ):
        refine(conv, tmp_path / "search", loss=other())


def site_by_site(sites: Any) -> dict[str, str]:
    names = [site.name for site in sites]
    return dict(zip(names, names, strict=True))


def test_blocks_count_by_what_they_are(conv: Case, tmp_path: Path) -> None:
    refine(conv.copy(), tmp_path / "search", blocks=lambda sites: {site.name: site.name for site in sites})
    by_other_words = refine(conv.copy(), tmp_path / "search", blocks=site_by_site)
    assert not [event for event in by_other_words if event.kind == "candidate"]
    with pytest.raises(cptv_ao.ScalesFileError, match=r"another config: blocks is .* blocks .* there and 1 blocks"):
        refine(conv.copy(), tmp_path / "search", blocks=lambda sites: {site.name: "all" for site in sites})
    refine(conv.copy(), tmp_path / "default")
    refine(conv, tmp_path / "default", blocks=cptv_ao.blocks_by_path)


@pytest.mark.parametrize(
    ("where", "told"), [("there", "1 there and no setting here"), ("here", "no setting there and")]
)
def test_settings_of_another_version_are_named(conv: Case, tmp_path: Path, where: str, told: str) -> None:
    def change(_: Any, data: dict[str, Any]) -> None:
        config = data["fingerprint"]["config"]
        if where == "there":
            config["of_a_newer_version"] = "1"
        else:
            del config["racing"]

    refine(conv.copy(), tmp_path / "search")
    changed(tmp_path / "search", change)
    name = "of_a_newer_version" if where == "there" else "racing"
    with pytest.raises(cptv_ao.ScalesFileError, match=f"another config: {name} is {told}"):
        refine(conv, tmp_path / "search")


def test_what_cannot_be_compared_is_told(conv: Case, tmp_path: Path) -> None:
    lock = threading.Lock()

    def loss(candidate: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        with lock:
            return square(candidate, teacher)

    with warnings.catch_warnings():
        warnings.simplefilter("error", cptv_ao.CptvWarning)
        refine(conv.copy(), tmp_path / "search", loss=loss)
    with pytest.warns(cptv_ao.CptvWarning, match=r"cannot be compared .* \(_thread.lock\); it goes on") as told:
        refine(conv, tmp_path / "search", loss=loss)
    assert told[0].filename == __file__


@pytest.mark.parametrize("damage", ["descent/leaf/0", "descent/adam/0/exp_avg", "course", "random"])
def test_a_damaged_descent_is_refused(conv: Case, tmp_path: Path, damage: str) -> None:
    def change(tensors: dict[str, Any], data: dict[str, Any]) -> None:
        if damage in tensors:
            tensors[damage] = torch.zeros(7, 7)
        else:
            data["descent"][damage] = {"steps": 3, "what": 4}

    path = tmp_path / "search"
    with pytest.raises(Killed):
        refine(conv.copy(), path, kill_at=8)
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


def test_scales_are_no_checkpoint_and_a_checkpoint_no_scales(conv: Case, tmp_path: Path) -> None:
    cptv_ao.save_scales(conv.converted, tmp_path / "scales")
    with pytest.raises(cptv_ao.ScalesFileError, match="not the checkpoint of a search"):
        refine(conv, tmp_path / "scales")
    refine(conv, tmp_path / "search")
    with pytest.raises(cptv_ao.ScalesFileError, match="expected the site table of a model"):
        cptv_ao.load_scales(conv.converted, tmp_path / "search")


def test_a_disk_that_is_full_leaves_the_model_as_it_was(
    conv: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = conv.converted(conv.batches[0])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cptv_ao.saved.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        refine(conv, tmp_path / "search")
    assert torch.equal(conv.converted(conv.batches[0]), given)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        refine(conv, tmp_path / "absent" / "search")


def test_what_is_written_is_tensors_and_json(conv: Case, tmp_path: Path) -> None:
    path = tmp_path / "search"
    refine(conv, path)
    assert {key.split("/")[0] for key in load_file(path)} == {"now", "best"}
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert set(header["__metadata__"]) == {"cptv_ao"}
    json.loads(header["__metadata__"]["cptv_ao"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and counts threads in /proc")
def test_it_survives_sigkill() -> None:
    """Fifty by hand: `python tests/kill.py --kills 50`."""
    kills = int(os.environ.get("CPTV_AO_KILLS", "5"))
    here = Path(__file__).parent
    command = [sys.executable, str(here / "kill.py"), "--kills", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["landed"] == kills
    assert result["equal"]
    assert result["resumed"] >= 1
    assert result["progressed"] >= 1
    assert result["left_over"] == 0
