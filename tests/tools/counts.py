"""How much harm was tried, counted from what pytest collects: `python tests/tools/counts.py`.

Each row says how many cases a plain `python -m pytest` runs, and the command that runs more of them. Those that draw
moments or models at random say in their own file how many they draw by default.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
# Name, tests that count (a pattern of node ids), the variable that says how many one test draws, how to run more.
ROWS: tuple[tuple[str, str, str | None, str], ...] = (
    (
        "bad calls, each with its message",
        r"test_bad_input\.py::|test_config\.py::.*(bad|refuse|wrong|invalid)|test_write\.py::.*refused"
        r"|test_faults\.py::test_a_(folder|path)",
        None,
        "python -m pytest tests/contract/test_bad_input.py",
    ),
    (
        "damaged, garbled or foreign files",
        r"test_scales_file\.py::.*(wrong|truncated|garbled|refused)|test_checkpoint\.py::.*(refused|damaged|garbled|no_check)"
        r"|test_saving\.py::.*refused|test_checkpoint_claims\.py::|test_files\.py::.*refused",
        None,
        "python -m pytest tests/verbs/test_scales_file.py tests/search/test_checkpoint*.py",
    ),
    (
        "faults injected",
        r"test_exceptions\.py::test_in_|test_faults\.py::(?!test_a_(folder|path)|test_files)|test_checkpoint\.py::.*disk"
        r"|test_scales_file\.py::.*writing_fails",
        None,
        "python -m pytest tests/contract/test_exceptions.py tests/contract/test_faults.py",
    ),
    ("Ctrl-C pressed", r"test_interrupt\.py::", None, "python -m pytest tests/contract/test_interrupt.py"),
    (
        "interrupts at random lines",
        r"test_exceptions\.py::test_ctrl_c_at_any_line",
        "CPTV_AO_INTERRUPTS",
        "CPTV_AO_INTERRUPTS=200 python -m pytest tests/contract/test_exceptions.py -k any_line",
    ),
    (
        "random models refined",
        r"test_random_models\.py::",
        "CPTV_AO_EXAMPLES",
        "CPTV_AO_EXAMPLES=200 python -m pytest tests/contract/test_random_models.py",
    ),
    (
        "kills by SIGKILL inside refine",
        r"test_checkpoint\.py::test_it_survives_sigkill",
        "CPTV_AO_KILLS",
        "python tests/tools/kill.py --kills 50",
    ),
)


class Collected:
    """A pytest plugin that keeps the ids of the tests."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.ids = [item.nodeid for item in session.items]


def collect() -> list[str]:
    """Ids of all tests, without running one."""
    plugin = Collected()
    with redirect_stdout(io.StringIO()):
        code = pytest.main(["--collect-only", "-s", str(HERE)], plugins=[plugin])
    if code:
        sys.exit(f"pytest could not collect the tests ({code})")
    return plugin.ids


def drawn(variable: str) -> int:
    """How many of them a test draws by default, as its file says where it reads the variable."""
    for path in sorted(HERE.rglob("test_*.py")):
        found = re.search(rf'environ\.get\("{variable}", "(\d+)"\)', path.read_text())
        if found:
            return int(found[1])
    raise LookupError(f"no test reads {variable}")


def counts(ids: list[str], number: Callable[[str], int] = drawn) -> list[tuple[str, int, str]]:
    """Name, number and command of each row."""
    rows = []
    for name, pattern, variable, command in ROWS:
        tests = [node for node in ids if re.search(pattern, node)]
        rows.append((name, sum(number(variable) if variable else 1 for _ in tests), command))
    return rows


def main() -> None:
    """Print the table."""
    ids = collect()
    rows = counts(ids)
    width = max(len(name) for name, _, _ in rows)
    for name, number, command in rows:
        print(f"{name.ljust(width)}  {number:5}  {command}")
    assert all(number for _, number, _ in rows), "a pattern fits no test any more"
    print(f"{'tests in all'.ljust(width)}  {len(ids):5}  python -m pytest")


if __name__ == "__main__":
    main()
