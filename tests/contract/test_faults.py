"""Faults of the machine: little memory, a folder that cannot be written, a disk that fills up on the way."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import Case
from helpers.quick import some
from helpers.search import small_config
from helpers.state import everything, weights

import cptv_ao

CONFIG = small_config(passes=2, evaluations=3, gradient_steps=6, population=("output_error", "biases"))
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts, /proc")


def refine(case: Case, **arguments: Any) -> cptv_ao.Report:
    settings: dict[str, Any] = {"config": CONFIG, "float_model": case.float_model, "progress": False} | arguments
    cptv_ao.refine(case.converted, settings.pop("loader", case.batches), **settings)
    return cptv_ao.report(case.converted)


# Memory


def test_any_memory_budget_gives_the_same_scales(small: Case) -> None:
    settings: dict[str, Any] = {"passes": 2, "evaluations": 2, "gradient_steps": 3}
    large = small.copy()
    wanted = refine(large, config=small_config(cache_bytes=2**31, **settings))
    assert wanted.moves
    for cache_bytes in (0, 1, 5_000, 40_000):
        little = small.copy()
        report = refine(little, config=small_config(cache_bytes=cache_bytes, **settings))
        assert weights(little.converted) == weights(large.converted), cache_bytes
        assert (report.after, report.blocks, report.evaluations) == (wanted.after, wanted.blocks, wanted.evaluations)


# Checkpoints that cannot be written at all: refused before any work


class Unread:
    """A loader that nobody may read."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("work was begun")


def check_refused(case: Case, path: Any, error: type[Exception], match: str) -> None:
    given = everything(case.converted), everything(case.float_model)
    with pytest.raises(error, match=match):
        refine(case, loader=Unread(), checkpoint=path)
    assert (everything(case.converted), everything(case.float_model)) == given


def test_a_folder_that_is_not_there(conv: Case, tmp_path: Path) -> None:
    path = tmp_path / "absent" / "search"
    check_refused(conv, path, FileNotFoundError, r"checkpoint: the folder .*absent does not exist; create it first")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(conv: Case, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    check_refused(conv, tmp_path / "file" / "search", NotADirectoryError, "checkpoint: expected a file in a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_path_that_is_a_folder(conv: Case, tmp_path: Path) -> None:
    check_refused(conv, tmp_path, IsADirectoryError, "checkpoint: expected the path of a file, got the folder")


@pytest.mark.parametrize("value", [3, True, b"search", ["search"]])
def test_a_path_that_is_none(conv: Case, value: Any) -> None:
    check_refused(conv, value, TypeError, f"checkpoint: expected a path, got {type(value).__name__}")


@linux
def test_a_folder_in_which_nobody_can_write(conv: Case) -> None:
    check_refused(conv, "/proc/search", OSError, "checkpoint: cannot write in its folder")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, where this machine lets us mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount here")
    except FileNotFoundError:
        pytest.skip("no mount here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@linux
def test_a_read_only_disk(conv: Case, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        check_refused(conv, disk / "search", OSError, "cannot write in its folder .Read-only file system")


@linux
def test_a_disk_that_is_full_already(conv: Case, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=32k") as disk:
        fill(disk)
        check_refused(conv, disk / "search", OSError, "cannot write in its folder .No space left on device")


def fill(disk: Path) -> None:
    with open(disk / "other", "ab", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return


# Disks that fill up on the way


@contextmanager
def whole_disk() -> Iterator[None]:
    """Undo `fill_up`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill_up() -> None:
    """From now on no file of this process can be longer than a few bytes: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("write", some(1, 3, others=[2, 4]))
def test_a_disk_that_fills_up_before_a_write(conv: Case, tmp_path: Path, write: int) -> None:
    whole, again, path = conv.copy(), conv.copy(), tmp_path / "search"
    refine(whole)
    held: list[bytes | None] = [None]
    writes = 1  # the first follows the proposals, each of the others a block

    def watch(event: cptv_ao.Event) -> None:
        nonlocal writes
        writes += event.kind == "block"
        if writes == write and (event.kind == "block" or write == 1):
            held[0] = path.read_bytes() if path.exists() else None
            fill_up()

    given = everything(conv.converted)
    told = "what was saved before is whole: make room, and call again" if write > 1 else "checkpoint: cannot be written"
    with whole_disk(), pytest.raises(OSError, match=told):
        refine(conv, checkpoint=path, callback=watch)
    assert everything(conv.converted) == given
    assert [found.name for found in tmp_path.iterdir()] == (["search"] if write > 1 else []), "nothing half-written"
    assert (path.read_bytes() if path.exists() else None) == held[0]
    events: list[cptv_ao.Event] = []
    refine(again, checkpoint=path, callback=events.append)
    assert weights(again.converted) == weights(whole.converted)
    assert any(event.kind == "step" for event in events) == (write == 1), "what was saved is not searched again"


@linux
def test_a_disk_that_really_fills_up(conv: Case, tmp_path: Path) -> None:
    whole, again = conv.copy(), conv.copy()
    refine(whole)
    with mounted(tmp_path / "disk", "size=256k") as disk:
        blocks = 0

        def watch(event: cptv_ao.Event) -> None:
            nonlocal blocks
            blocks += event.kind == "block"
            if blocks == 2:
                fill(disk)

        given = everything(conv.converted)
        with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); what was saved before is"):
            refine(conv, checkpoint=disk / "search", callback=watch)
        assert everything(conv.converted) == given
        assert {found.name for found in disk.iterdir()} == {"search", "other"}
        (disk / "other").unlink()
        refine(again, checkpoint=disk / "search")
    assert weights(again.converted) == weights(whole.converted)


def test_scales_on_a_full_disk(conv: Case, tmp_path: Path) -> None:
    path = tmp_path / "scales"
    cptv_ao.save_scales(conv.converted, path)
    before = path.read_bytes()
    refine(conv)
    with whole_disk():
        fill_up()
        with pytest.raises(OSError, match="File too large"):
            cptv_ao.save_scales(conv.converted, path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["scales"]


def test_what_killed_processes_left_half_written_is_removed(conv: Case, tmp_path: Path) -> None:
    """Their own leavings only."""
    for name in (".search.0a1b2c3d.partial", ".other.0a1b2c3d.partial", ".search.txt"):
        (tmp_path / name).write_bytes(b"half")
    refine(conv, checkpoint=tmp_path / "search")
    assert {found.name for found in tmp_path.iterdir()} == {"search", ".other.0a1b2c3d.partial", ".search.txt"}


def test_files_are_readable_by_others_as_the_umask_says(conv: Case, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    cptv_ao.save_scales(conv.converted, tmp_path / "scales")
    assert (tmp_path / "scales").stat().st_mode == plain.stat().st_mode


# A loss that is no number


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("every", [2, 3, 7])
def test_a_candidate_whose_loss_is_no_number_never_wins(conv: Case, value: float, every: int) -> None:
    calls = 0

    def loss(candidate: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        good = (candidate - teacher).square().mean()
        return good if calls <= 8 or calls % every else good * 0 + value

    report = refine(conv, config=small_config(loss=loss, evaluations=10, holdout=0))
    assert report.after.search <= report.before.search
    assert torch.isfinite(torch.tensor(report.after.search))
    with torch.no_grad():
        outputs = [(conv.converted(b) - conv.float_model(b)).square().mean() for b in conv.batches]
    assert float(sum(outputs) / len(outputs)) == pytest.approx(report.after.search)
