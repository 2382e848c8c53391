"""Where files are written: through symlinks, never over a FIFO or a device, whole or not at all."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from shutil import SpecialFileError
from typing import Any

import pytest
from helpers.cases import Case
from helpers.damage import changed
from helpers.search import small_config

import cptv_ao
from cptv_ao.callbacks import Log
from cptv_ao.core.atomic_file import same_file, straight, try_out
from cptv_ao.core.outcome import Losses
from cptv_ao.reporting.report import Report

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full, FIFOs")


class Unread:
    """A loader that nobody may read."""

    def __iter__(self) -> Any:
        raise AssertionError("work was begun")


def save_scales(case: Case, path: Path) -> None:
    cptv_ao.save_scales(case.converted, path)


def save_html(_: Case, path: Path) -> None:
    numbers = Losses(1.0, None)
    empty = Report(cptv_ao.Status.UNCHANGED, "kl", numbers, numbers, (), (), (), 1, 0, 0, (1, 0), 0.0, 0, 1)
    empty.save_html(path)


def checkpoint(case: Case, path: Path) -> None:
    config = small_config()
    cptv_ao.refine(
        case.converted, case.batches, float_model=case.float_model, config=config, progress=False, checkpoint=path
    )


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


WRITERS = [save_scales, save_html, checkpoint]


@linux
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", ["a device", "a FIFO", "a socket"])
def test_what_is_no_file_is_never_replaced(conv: Case, tmp_path: Path, write: Callable[..., None], kind: str) -> None:
    path = tmp_path / "there"
    if kind == "a device":
        path.symlink_to("/dev/full")
    elif kind == "a FIFO":
        os.mkfifo(path)
    else:
        bind(path)
    before, device = os.lstat(path), os.stat("/dev/full")
    conv.batches = Unread()  # type: ignore[assignment]
    with pytest.raises(SpecialFileError, match=f"expected the path of a file, got {kind}, .*there; give another path"):
        write(conv, path)
    assert os.path.samestat(os.lstat(path), before) and os.path.samestat(os.stat("/dev/full"), device)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_a_symlink_is_written_through(conv: Case, tmp_path: Path, write: Callable[..., None], there: bool) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    target, link, second = folder / "target", tmp_path / "link", tmp_path / "second"
    link.symlink_to(Path("elsewhere") / "target")
    second.symlink_to("link")
    if there and write is not checkpoint:
        target.write_text("before")
        target.chmod(0o600)
    write(conv.copy(), second)
    assert link.is_symlink() and second.is_symlink()
    content = target.read_bytes()
    assert target.is_file() and content != b"before"
    if there and write is not checkpoint:
        assert stat.S_IMODE(target.stat().st_mode) == 0o600, "who may read it"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "link", "second"]
    assert [p.name for p in folder.iterdir()] == ["target"]
    if write is checkpoint:
        write(conv, link)
        assert target.read_bytes() == content, "it is found there, and the search is over"


@pytest.mark.parametrize("write", WRITERS)
def test_symlinks_in_a_circle(conv: Case, tmp_path: Path, write: Callable[..., None]) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write(conv, tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("write", WRITERS)
def test_a_symlink_into_a_folder_that_is_not_there(conv: Case, tmp_path: Path, write: Callable[..., None]) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "absent" / "b")
    with pytest.raises(FileNotFoundError, match="absent does not exist; create it first"):
        write(conv, tmp_path / "a")


def test_another_hard_link_keeps_what_it_had(conv: Case, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    os.link(tmp_path / "a", tmp_path / "b")
    assert same_file(tmp_path / "a", tmp_path / "b")
    cptv_ao.save_scales(conv.converted, tmp_path / "a")
    assert (tmp_path / "b").read_text() == "mine"
    assert not same_file(tmp_path / "a", tmp_path / "b")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written_is_refused(conv: Case, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    (tmp_path / "a").chmod(0o444)
    with pytest.raises(PermissionError, match="may not be written"):
        cptv_ao.save_scales(conv.converted, tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_a_name_that_is_too_long_is_told_before_any_work(conv: Case, tmp_path: Path) -> None:
    """The name of the file itself would just do."""
    conv.batches = Unread()  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"checkpoint: cannot write in its folder .File name too long"):
        checkpoint(conv, tmp_path / ("a" * 250))
    assert list(tmp_path.iterdir()) == []


def test_it_is_tried_out_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    try_out(tmp_path / "a")
    try_out(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "mine"


# What text is written straight into


def test_a_file_is_nothing_to_write_straight_into(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    assert straight(tmp_path / "a") is None and straight(tmp_path / "b") is None and straight(tmp_path) is None
    assert (tmp_path / "a").read_text() == "mine"


@linux
def test_a_socket_takes_no_text(tmp_path: Path) -> None:
    bind(tmp_path / "a")
    with pytest.raises(SpecialFileError, match="got a socket"):
        Log(tmp_path / "a")


def event(name: str) -> cptv_ao.Event:
    return cptv_ao.Event("block", name, 0, 1, 0.5, 0.5, 1.0, None)  # type: ignore[arg-type]


@linux
@pytest.mark.parametrize("name", ["log", "log.csv"])
def test_a_log_into_a_fifo_comes_as_one_stream(tmp_path: Path, name: str) -> None:
    path, read = tmp_path / name, []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    log = Log(path)
    log(event("a"))
    log(event("b"))
    del log
    reader.join(timeout=60)
    lines = read[0].splitlines()
    if name == "log":
        assert [json.loads(line)["name"] for line in lines] == ["a", "b"]
    else:
        assert [line.split(",")[1] for line in lines] == ["name", "a", "b"]
    assert stat.S_ISFIFO(path.stat().st_mode)


@linux
@pytest.mark.slow
def test_a_log_into_the_own_output_loses_nothing(tmp_path: Path) -> None:
    code = (
        "import cptv_ao; from cptv_ao.callbacks import Log; print('first'); log = Log('/dev/stdout');"
        "log(cptv_ao.Event('block', 'a', 0, 1, 0.5, 0.5, 1.0, None)); print('last')"
    )
    path = tmp_path / "printed"
    with open(path, "w") as file:
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], stdout=file, check=True)
    first, line, last = path.read_text().splitlines()
    assert (first, json.loads(line)["name"], last) == ("first", "a", "last")


# Reading


@linux
@pytest.mark.parametrize("kind", ["folder", "FIFO", "device"])
def test_what_is_no_file_is_not_read(conv: Case, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path = Path("/dev/zero")
    with pytest.raises(cptv_ao.ScalesFileError, match="expected a file that save_scales wrote"):
        cptv_ao.load_scales(conv.converted, path)


def test_a_file_is_found_through_symlinks(conv: Case, tmp_path: Path) -> None:
    cptv_ao.save_scales(conv.converted, tmp_path / "a")
    (tmp_path / "b").symlink_to("a")
    cptv_ao.load_scales(conv.converted, tmp_path / "b")
    changed(tmp_path / "b", lambda tensors, data: None)
    assert (tmp_path / "b").is_symlink() and (tmp_path / "a").is_file()
