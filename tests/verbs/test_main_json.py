"""`--json`: whole or not at all, through links, and straight into what is no file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import ROOT, output

from cptv_ao.__main__ import main


@pytest.mark.slow
def test_json_goes_where_the_program_prints(folder: Path) -> None:
    """Behind the table, into a pipe as into a file."""
    given = ["diagnose", "factory.py:pair", "--data", "factory:batches", "--quiet", "--json"]
    into_pipe = output(folder, *given, "/dev/stdout")
    table, _, found = into_pipe.partition("\n{\n")
    assert table.startswith("cptv_ao.diagnose: ") and json.loads("{" + found)["loss_name"] == "kl"
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", "-m", "cptv_ao", *given]
    with open(folder / "printed", "w") as file:
        subprocess.run([*command, "/dev/stdout"], cwd=folder, env=environment, stdout=file, check=True)
    assert (folder / "printed").read_text() == into_pipe


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_json_is_written_through_links_and_into_fifos_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["diagnose", "factory.py:pair", "--data", "factory:batches", "--quiet", "--json"]
    (here / "link").symlink_to("target")
    assert main([*given, "link"]) == 0
    whole = (here / "target").read_text()
    assert (here / "link").is_symlink() and json.loads(whole)["images"] == 64
    os.mkfifo(here / "fifo")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((here / "fifo").read_text()))
    reader.start()
    assert main([*given, "fifo"]) == 0
    reader.join(timeout=60)
    assert read == [whole] and (here / "fifo").is_fifo()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cptv_ao.core.atomic_file.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        main([*given, "target"])
    assert (here / "target").read_text() == whole
    assert {path.name for path in here.iterdir()} - {"__pycache__"} == {
        "factory.py",
        "beside.py",
        "link",
        "target",
        "fifo",
    }
