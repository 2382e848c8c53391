"""A folder with a module that makes models, for the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_line import FACTORY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "factory.py").write_text(FACTORY)
    (tmp_path / "beside.py").write_text("CLASSES = 5\n")
    return tmp_path


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For runs in this process, which load the modules of the folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    loaded = set(sys.modules)
    yield folder
    for name in {"factory", "beside", "broken"} - loaded:
        sys.modules.pop(name, None)
