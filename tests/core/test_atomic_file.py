"""A file is there whole, or as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cptv_ao.core.atomic_file import at_once, same_file, target_of, try_out


def test_it_takes_its_name_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    path.chmod(0o640)
    with at_once(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_exception_all_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def interrupted() -> None:
        with at_once(path) as temporary:
            temporary.write_text("after")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_trying_out_leaves_nothing_and_sweeps_what_killed_processes_left(tmp_path: Path) -> None:
    left, others = tmp_path / ".file.0123abcd.partial", tmp_path / ".other.0123abcd.partial"
    left.touch()
    others.touch()
    try_out(tmp_path / "file")
    assert list(tmp_path.iterdir()) == [others]


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="create it first"):
        target_of(tmp_path / "nowhere" / "file")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is none"):
        target_of(tmp_path / "file" / "file")
    with pytest.raises(IsADirectoryError, match="add a file name"):
        target_of(tmp_path)


def test_a_symlink_leads_to_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    assert target_of(tmp_path / "link") == Path(os.path.realpath(tmp_path)) / "file"
    assert same_file(tmp_path / "link", tmp_path / "file")
    assert not same_file(tmp_path / "link", tmp_path / "other")
