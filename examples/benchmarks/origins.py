"""Where a number is from: day, commit, CPU and torch, stored with each cell and told under each table."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent
_PACKAGE = _HERE.parents[1] / "cptv_ao"
_TOLD = {"day": "day", "commit": "commit", "cpu": "CPU", "torch": "torch"}


def origin() -> dict[str, str]:
    """Of what is measured now; a `+` behind the commit says that the package differs from it."""
    return {"day": time.strftime("%Y-%m-%d"), "commit": _commit(), "cpu": _cpu(), "torch": torch.__version__}


def told(cells: Sequence[dict[str, Any]]) -> str:
    """The line under a table of these cells: what is known of their origin, and of how many something is not."""
    known = {name: sorted({cell[name] for cell in cells if name in cell}) for name in _TOLD}
    parts = [f"{_TOLD[name]} {', '.join(values)}" for name, values in known.items() if values]
    lines = ["Measured: " + "; ".join(parts) + "."] if parts else []
    counts = {name: sum(name not in cell for cell in cells) for name in _TOLD}
    for count in sorted(set(counts.values()) - {0}):
        lacking = ", ".join(_TOLD[name] for name, found in counts.items() if found == count)
        lines.append(f"Not stored with {count} of {len(cells)} cells: {lacking}.")
    return " ".join(lines)


def _commit() -> str:
    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=_HERE, capture_output=True, text=True, check=False)

    try:
        found = git("rev-parse", "--short", "HEAD").stdout.strip() or "unknown"
        return found + "+" * (git("diff", "--quiet", "HEAD", "--", str(_PACKAGE)).returncode == 1)
    except OSError:  # no git on this machine
        return "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
