"""Several ranks end with the very scales of one, and none is left alone with a failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import attention, nets, pt2e
from helpers.cases import Case
from helpers.killed import Killed
from helpers.quick import each_value
from helpers.ranks import Failed, together
from helpers.search import small_config
from helpers.several_nets import Sequences
from helpers.state import weights

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.core.distributed import World

CONFIG = small_config(passes=2, evaluations=4, gradient_steps=6, population=("output_error", "ranges", "biases"))

# The published search does not end when it gains nothing.
ENDLESS: dict[str, Any] = {"search": "paper", "passes": 10**6}


def refine(case: Case, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Refine; the scales and what the report says of the search."""
    arguments = {name: changes.pop(name) for name in ("callback", "checkpoint") if name in changes}
    batches = changes.pop("batches", case.batches)
    config = replace(changes.pop("config", CONFIG), **changes)
    model = cptv_ao.refine(
        case.converted, batches, float_model=case.float_model, config=config, progress=False, **arguments
    )
    backend, report = Backend(model), cptv_ao.report(model)
    scales = {name: (q.scale.tolist(), q.zero_point.tolist()) for name in backend.sites for q in (backend.read(name),)}
    told = report.to_dict()
    for name in ("seconds", "image_forwards", "threads"):
        told.pop(name)
    for record in told.get("history", ()):
        record.pop("seconds")
    return scales, told


def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the batches of the descent, as large images would be."""
    monkeypatch.setattr("cptv_ao.search.proposals.device_memory._GRAPH_BYTES", 1)


@pytest.mark.parametrize(
    "small",
    [
        "conv",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("functional", "conv per tensor", "functional per tensor")),
    ],
    indirect=True,
)
def test_every_world_size_gives_the_same_scales(small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_every_world_size(small, tmp_path, monkeypatch, config=replace(CONFIG, passes=1))["moves"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"racing": False, "loss": "infonce", "holdout": 0.0},
        {"score_on": "simulation"},
        {"search": "cma", "population": ()},
        {"config": cptv_ao.RefineConfig.paper(weight_bits=3, passes=2, include=("*",), holdout=0.25)},
    ],
)
def test_whatever_is_searched(
    conv: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    check_every_world_size(conv, tmp_path, monkeypatch, **changes)


def check_every_world_size(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    parts(monkeypatch)
    batches = [half for batch in case.batches for half in batch.split(2)]
    wanted = refine(case.copy(), batches=batches, **changes)
    assert wanted[1]["blocks"]
    for size in (1, 2, 3):
        found = together(size, lambda _: refine(case, batches=batches, **changes), folder)
        assert found == [wanted] * size
    return wanted[1]


@pytest.mark.slow
def test_ranks_move_a_pt2e_graph_to_the_same_form(tmp_path: Path) -> None:
    pt2e.torchao()

    def work(_: int) -> Any:
        model = attention.apart(outlier=60)  # in the ranks alone: a process that has exported cannot be forked
        graph = attention.quantized(model)
        attention.refine(graph, model, gradient_steps=4)
        assert attention.NOTE in cptv_ao.report(graph).notes
        return weights(graph), attention.steps(Backend(graph))

    assert together(2, work, tmp_path) == together(1, work, tmp_path) * 2


@pytest.mark.slow
def test_more_ranks_than_batches(conv: Case, tmp_path: Path) -> None:
    wanted = refine(conv.copy(), batches=conv.batches[:2])
    assert together(3, lambda _: refine(conv, batches=conv.batches[:2]), tmp_path) == [wanted] * 3


def test_a_limit_of_seconds_ends_all_ranks_together(conv: Case, tmp_path: Path) -> None:
    found = together(2, lambda _: refine(conv, **ENDLESS, max_seconds=1.5), tmp_path)
    assert found[0] == found[1]
    assert found[0][1]["status"] == "BUDGET"


def test_one_rank_alone_is_asked_to_stop(conv: Case, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if rank == 1:
            at_exchange(10, lambda: os.kill(os.getpid(), signal.SIGINT))
        return refine(conv, **ENDLESS)

    found = together(2, work, tmp_path)
    assert found[0] == found[1]
    assert found[0][1]["status"] == "STOPPED"


def at_exchange(number: int, call: Callable[[], Any]) -> None:
    """From here on in this process: call once, while the ranks answer each other so many times whether to go on.

    A rank spends its time waiting for the others, so this is when most signals arrive.
    """
    most, answers = World.most, iter(range(1, 10**6))

    def asks(self: World, *values: float) -> tuple[float, ...]:
        found = most(self, *values)
        if len(values) == 2 and next(answers) == number:  # `Budget` alone asks for two: why it ends, and the seconds
            call()
        return found

    World.most = asks  # type: ignore[method-assign]


def test_the_callback_and_the_bar_are_those_of_rank_0(
    conv: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def work(rank: int) -> int:
        events: list[Any] = []
        cptv_ao.refine(
            conv.converted, conv.batches, float_model=conv.float_model, config=CONFIG, callback=events.append
        )
        return len(events)

    found = together(2, work, tmp_path)
    assert found[0] > 0
    assert found[1] == 0
    last = [line.rstrip().split("\r")[-1] for line in capfd.readouterr().err.split("\n")]
    bars = [line for line in last if line.startswith("refine:") and "step/s" in line]
    assert len(bars) == 1


# -- failures ---------------------------------------------------------------------------------------------------------


class Spoiled:
    """A loader that fails at its third batch."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        yield from self.batches[:2]
        raise Killed("the disk is gone")


def spoil_loader(case: Case, _: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"batches": Spoiled(case.batches)}


def spoil_data(case: Case, _: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"batches": [*case.batches[:-1], case.batches[-1] * torch.nan]}


def spoil_float_model(case: Case, _: pytest.MonkeyPatch) -> dict[str, Any]:
    case.float_model = torch.nn.Linear(3, 3)
    return {}


def spoil_score(_: Case, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    from cptv_ao.evaluation.tail_runner import TailRunner

    calls = iter(range(10**6))
    run = TailRunner.output

    def output(self: TailRunner, index: int) -> Any:
        if next(calls) == 9:
            raise Killed("out of memory")
        return run(self, index)

    patch.setattr(TailRunner, "output", output)
    return {}


def spoil_step(_: Case, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    from cptv_ao.search.proposals.part_runner import PartRunner

    def forward(*_: Any) -> Any:
        raise Killed("out of memory")

    patch.setattr(PartRunner, "forward", forward)
    return {}


@pytest.mark.parametrize(
    ("spoil", "which"), each_value([spoil_loader, spoil_data, spoil_float_model, spoil_score, spoil_step], [0, 1])
)
def test_a_rank_that_fails_ends_all_and_no_model_is_touched(
    conv: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, which: int
) -> None:
    parts(monkeypatch)
    given = conv.converted(conv.batches[0])
    kept: dict[int, bool] = {}

    def work(rank: int) -> Any:
        changes = spoil(conv, monkeypatch) if rank == which else {}
        try:
            return refine(conv, **changes)
        except Exception as error:
            kept[rank] = torch.equal(conv.converted(conv.batches[0]), given)
            return type(error).__name__, str(error), kept[rank]

    found = together(2, work, tmp_path)
    own, (kind, told, same) = found[which], found[1 - which]
    assert own[0] != "DistributedError"
    assert own[2]
    assert kind == "DistributedError"
    assert told.startswith(f"rank {which} failed, so all ranks end: {own[0]}: {own[1]}"[:200])
    assert same


@pytest.mark.slow
def test_a_callback_that_raises_ends_all_ranks(conv: Case, tmp_path: Path) -> None:
    def callback(event: cptv_ao.Event) -> None:
        if event.kind == "block":
            raise Killed("enough")

    found = together(2, lambda _: refine(conv, callback=callback), tmp_path)
    assert [failed.kind for failed in found] == ["Killed", "DistributedError"]
    assert all("rank 0 failed, so all ranks end: Killed: enough" in failed.text for failed in found[1:])


@pytest.mark.parametrize(
    ("how", "told"),
    [(signal.SIGKILL, "rank 0 lost"), pytest.param(signal.SIGSTOP, "rank 0 lost", marks=pytest.mark.slow)],
)
def test_a_rank_that_is_gone_or_hangs_leaves_nobody_waiting(conv: Case, tmp_path: Path, how: Any, told: str) -> None:
    given = conv.converted(conv.batches[0])

    def work(rank: int) -> Any:
        if rank == 1:
            at_exchange(10, lambda: os.kill(os.getpid(), how))
        try:
            return refine(conv, **ENDLESS)
        except cptv_ao.DistributedError as error:
            return str(error), torch.equal(conv.converted(conv.batches[0]), given)

    started = time.monotonic()
    text, same = together(2, work, tmp_path, seconds=5.0)[0]
    assert told in text
    assert same
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("what", "changes"),
    [("data", {"batches": []}), ("config", {"seed": 3}), ("model", {}), ("float model", {})],
)
def test_ranks_that_were_given_different_things_are_told(
    conv: Case, tmp_path: Path, what: str, changes: dict[str, Any]
) -> None:
    def work(rank: int) -> Any:
        mine = dict(changes) if rank else {}
        if "batches" in mine:
            mine["batches"] = conv.batches[::-1]
        if rank and what == "model":
            conv.converted.fc1.scale *= 2
        if rank and what == "float model":  # of which codes say nothing
            conv.float_model.get_parameter("fc2.bias").data += 1
        return refine(conv, **mine)

    found = together(2, work, tmp_path)
    assert all(isinstance(failed, Failed) and failed.kind == "DistributedError" for failed in found)
    assert all(f"expected the same on every rank, the {what} differs" in failed.text for failed in found)


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "at"),
    [
        (2, 1, "candidate"),
        (1, 2, "step"),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in [(1, 2, "candidate"), (3, 2, "candidate")]),
        pytest.param(2, 3, "step", marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_with_another_world_size(
    conv: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int, at: str
) -> None:
    parts(monkeypatch)
    monkeypatch.setattr("cptv_ao.search.checkpoint._SECONDS", 0.0)
    wanted = refine(conv.copy())
    path, seen = tmp_path / "search", []

    def killed(event: cptv_ao.Event) -> None:
        seen.append(event.kind)
        if seen.count(at) > (9 if at == "candidate" else 2):
            raise Killed("enough")

    found = together(first, lambda _: refine(conv, checkpoint=path, callback=killed), tmp_path)
    assert found[0].kind == "Killed"
    assert path.exists()
    given = (
        (lambda rank: {"checkpoint": path} if rank == 0 else {}) if second == 3 else (lambda _: {"checkpoint": path})
    )
    assert together(second, lambda rank: refine(conv, **given(rank)), tmp_path) == [wanted] * second


# -- when -------------------------------------------------------------------------------------------------------------


def test_a_group_that_is_not_there(conv: Case) -> None:
    with pytest.raises(ValueError, match="expected an initialised process group, found none"):
        refine(conv, distributed=True)


def test_one_rank_may_search_on_its_own(conv: Case, tmp_path: Path) -> None:
    wanted = refine(conv.copy(), distributed=False)
    found = together(2, lambda rank: refine(conv, distributed=False) if rank == 0 else "other work", tmp_path)
    assert found == [wanted, "other work"]


def test_what_the_ranks_tell_each_other(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 5), torch.tensor(-0.0), torch.full((2, 1, 4), torch.inf), torch.randn(1)]

    def work(rank: int) -> Any:
        with World(together=True) as world:
            shared = world.share([tensor if world.mine(i) else None for i, tensor in enumerate(tensors)])
            words = world.bytes_from_first(b"\0\x80words" if rank == 0 else None)
            nothing = world.bytes_from_first(None if rank == 0 else b"ignored")
            empty = world.bytes_from_first(b"" if rank == 0 else None)
            most = world.most(float(rank), -float(rank))
            same = all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(shared, tensors, strict=True))
            return same, words, nothing, empty, most, world.first(7.5 if rank == 0 else 9.5)

    assert together(3, work, tmp_path) == [(True, b"\0\x80words", None, b"", (2.0, 0.0), 7.5)] * 3


# -- the example, as users start it -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_and_one_process_print_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm", reason="its network is of timm's blocks")
    import distributed

    small = [distributed.__file__, "--steps", "3", "--evaluations", "1"]
    monkeypatch.setattr(sys, "argv", small)
    distributed.main()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *torchrun, *small], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    printed = (capsys.readouterr().out, done.stdout)
    alone, both = (sorted(line for line in text.split("\n") if line.startswith("rank ")) for text in printed)
    assert both == [alone[0], alone[0].replace("rank 0", "rank 1")]


def test_several_outputs_of_images_of_several_sizes(tmp_path: Path) -> None:
    """Each rank runs the float network on some batches: what it does not run has outputs of other sizes."""
    net = nets.seeded(Sequences)
    batches = [nets.images(12, length, 6, seed=length) for length in (3, 4, 5, 6)]
    _, model = nets.quantize(net, batches, weight_bits=4)

    def work(_: int) -> Any:
        config = replace(CONFIG, loss="auto")
        own = cptv_ao.refine(model, batches, float_model=net, config=config, inplace=False, progress=False)
        report = cptv_ao.report(own)
        return report.before, report.after, report.moves, report.outputs

    (alone,), both = (together(size, work, tmp_path) for size in (1, 2))
    assert not isinstance(alone, Failed), alone
    for found in both:
        assert found == alone
    assert [one.name for one in alone[3]] == ["0", "1"] and alone[1].search < alone[0].search
