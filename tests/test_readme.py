"""The README stays true: its snippets run, in order, in one namespace, and its commands are those of the repository."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import cptv_ao

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_snippets_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = list(re.finditer(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE))
    assert len(snippets) >= 4
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch.ao
        warnings.simplefilter("error", cptv_ao.CptvWarning)
        torch.manual_seed(0)
        for snippet in snippets:
            line = README[: snippet.start(1)].count("\n")
            exec(compile("\n" * line + snippet[1], "README.md", "exec"), namespace)  # line numbers are README.md's
    printed = capsys.readouterr().out
    assert printed.startswith("cptv_ao.refine: ")
    assert "sites moved" in printed
    assert "blocks.0.attn.qkv.weight" in printed


def test_the_test_command_is_that_of_ci() -> None:
    command = README.split("## Tests")[1].split("\n\n")[1].strip()
    install, test = command.split(" && ")[-2:]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert install in ci
    assert test in ci


def test_the_commands_name_files_that_exist() -> None:
    named = re.findall(r"python (examples/\S+\.py)", README)
    assert len(set(named)) >= 5
    assert all((ROOT / name).is_file() for name in named)


def test_the_settings_exist() -> None:
    table = README.split("### The settings")[1].split("`RefineConfig.paper")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    fields = cptv_ao.RefineConfig.__dataclass_fields__
    assert len(names) >= 8
    assert [name for name in names if name not in fields] == []
