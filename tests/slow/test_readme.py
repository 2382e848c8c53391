"""README and docs stay true: their snippets run, their commands and figures are those of the repository."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

import cptv_ao

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
README = PAGES["README.md"]
BENCHMARKS = ROOT / "examples" / "benchmarks"
_SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WITH_SNIPPETS = [name for name, text in PAGES.items() if _SNIPPET.search(text)]


# Pages whose snippets need packages of an extra of their own.
_NEEDS = {"docs/executorch.md": ["executorch.runtime"], "docs/onnx.md": ["onnxscript", "onnxruntime"]}


def test_there_are_snippets() -> None:
    pages = {Path(name).stem for name in WITH_SNIPPETS}
    assert pages >= {"README", "promises", "settings", "report", "saving", "pt2e", "models", "faq", "migration"}
    assert pages >= {"sites", "outliers", "diagnose", "plots", "callbacks", "outputs", "plan"}


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_the_snippets_run(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a page in order, in one namespace, as somebody pastes them."""
    for package in _NEEDS.get(page, []):
        pytest.importorskip(package, reason=f"pip install 'cptv_ao[{Path(page).stem}]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # it was looked up before
    namespace: dict[str, Any] = {"__name__": page}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch.ao
        warnings.simplefilter("error", cptv_ao.CptvWarning)
        torch.manual_seed(0)
        for snippet in _SNIPPET.finditer(PAGES[page]):
            line = PAGES[page][: snippet.start(1)].count("\n")
            exec(compile("\n" * line + snippet[1], page, "exec"), namespace)  # line numbers are those of the page
    if page == "README.md":
        printed = capsys.readouterr().out
        assert printed.startswith("cptv_ao.refine: ")
        assert "sites moved" in printed


def test_the_test_command_is_that_of_ci() -> None:
    command = README.split("## Tests")[1].split("\n\n")[1].strip()
    install, test = command.split(" && ")[-2:]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert install in ci
    assert test in ci


def test_the_commands_name_files_that_exist() -> None:
    named = {
        name for text in PAGES.values() for name in re.findall(r"\b(?:examples|docs|tests)/[\w/]+\.(?:py|md|svg)", text)
    }
    assert len(named) >= 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file() and name != "examples/distributed.py"] == []


def test_every_example_is_told_of() -> None:
    helpers = {"workloads.py", "photos.py", "train.py"}
    examples = {path.name for path in (ROOT / "examples").glob("*.py")} - helpers
    assert [name for name in sorted(examples) if f"examples/{name}" not in PAGES["docs/examples.md"]] == []


def test_the_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        folder = (ROOT / page).parent
        targets = {t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith(("https:", "#"))}
        assert [target for target in sorted(targets) if not (folder / target).exists()] == [], page


def test_the_settings_exist() -> None:
    table = PAGES["docs/settings.md"].split("|---|---|")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    fields = cptv_ao.RefineConfig.__dataclass_fields__
    assert len(names) >= 8
    assert [name for name in names if name not in fields] == []


@pytest.fixture
def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((BENCHMARKS / "results" / "recovery.json").read_text())
    return found


def test_the_tables_are_those_of_the_benchmark(cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from cases import WORKLOADS
    from tables import recovery_table

    methods = ["start", "paper", "sweep", "gradient", "sep-CMA-ES", "ours"]
    assert recovery_table(cells, list(WORKLOADS), methods) in PAGES["docs/benchmarks.md"]


def test_the_table_of_the_parts_is_that_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from ablation import FOLDER, table

    stored = FOLDER.with_suffix(".json")
    if not stored.exists():
        pytest.skip("the ablation was not run yet, and the page says so")
    assert table(json.loads(stored.read_text())) in PAGES["docs/benchmarks.md"]


def test_the_table_of_other_tools_is_that_of_the_benchmark(
    cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from rivals import ROWS, table

    others: list[dict[str, Any]] = json.loads((BENCHMARKS / "results" / "rivals.json").read_text())
    assert {cell["workload"] for cell in others} == set(ROWS)
    assert table([*others, *cells]) in PAGES["docs/other-tools.md"]


def test_the_table_of_the_real_vit_is_that_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from real_vit import CELLS, table

    found = table([json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))])
    assert len(found.splitlines()) >= 4
    assert found in PAGES["docs/benchmarks.md"] and found in README


def top1_of(cells: list[dict[str, Any]], workload: str, method: str) -> str:
    of = [cell for cell in cells if (cell["workload"], cell["method"]) == (workload, method)]
    return f"{100 * mean(cell['top1'] for cell in of):.2f}"


def test_the_pretrained_network_is_that_of_the_benchmark(cells: list[dict[str, Any]]) -> None:
    others: list[dict[str, Any]] = json.loads((BENCHMARKS / "results" / "rivals.json").read_text())
    told = re.findall(r"(start|gradient|NNCF|PPQ LSQ|PPQ|ours) (\d\d\.\d\d)", README.split("## Small networks")[0])
    assert [method for method, _ in told] == ["start", "gradient", "NNCF", "PPQ", "PPQ LSQ", "ours"]
    for method, figure in told:
        assert figure == top1_of([*cells, *others], "EfficientNet-Lite0 W8A8", method), method


def test_the_short_table_is_that_of_the_benchmark(cells: list[dict[str, Any]]) -> None:
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)[^|]* \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) == 4

    gaps = {}
    for cell in (cell for cell in cells if cell["method"] == "start"):
        gaps.setdefault(cell["workload"], []).append(cell["float"] - cell["top1"])
    small = [name for name in gaps if not name.endswith(", recipe") and not name.startswith("EfficientNet")]
    widest = sorted(small, key=lambda workload: -mean(gaps[workload]))[:4]
    assert [row[0] for row in rows] == widest
    for (_, _, *figures), workload in zip(rows, widest, strict=True):
        assert figures == [top1_of(cells, workload, method) for method in ("start", "gradient", "ours")], workload


def test_the_plot_is_drawn_from_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    import plot_recovery

    assert plot_recovery.svg(plot_recovery.shares()) == (ROOT / "docs" / "recovery.svg").read_text()
