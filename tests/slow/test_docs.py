"""The documentation is built without a warning, and its API page has every public name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cptv_ao

DOCS = Path(__file__).parents[2] / "docs"
pytest.importorskip("sphinx", reason="extra docs")
pytest.importorskip("myst_parser", reason="extra docs")
pytest.importorskip("furo", reason="extra docs")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "-d", str(out / "trees"), str(DOCS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_built(built: Path) -> None:
    assert [page.name for page in DOCS.glob("*.md") if not (built / f"{page.stem}.html").is_file()] == []


def test_every_public_name_is_documented(built: Path) -> None:
    page = (built / "api.html").read_text()

    def anchor(name: str) -> str:
        found = getattr(cptv_ao, name)
        return f"module-{found.__name__}" if isinstance(found, ModuleType) else f"cptv_ao.{name}"

    assert len(cptv_ao.__all__) >= 25
    assert [name for name in cptv_ao.__all__ if f'id="{anchor(name)}"' not in page] == []


def test_the_docstrings_are_on_the_page(built: Path) -> None:
    page = (built / "api.html").read_text()
    assert "The input model is candidate 0" in page
    assert 'id="cptv_ao.RefineConfig.paper"' in page
    assert "eval-rst" not in page
