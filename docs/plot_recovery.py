"""The plot of docs/benchmarks.md: `python docs/plot_recovery.py` writes docs/recovery.svg.

The numbers are those of examples/benchmarks/results/recovery.json, as examples/benchmarks/tables.py sums them up: the
share of the gap to float that was closed, for each workload that has a gap.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
BENCHMARKS = DOCS.parent / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from cases import WORKLOADS
from tables import share_closed

COLOURS = {"paper": "#9aa5b1", "gradient": "#e0a030", "ours": "#1f6fd0"}  # told apart by people who see few colours too
TITLE = "Share of the gap to float that was closed, %"
LEFT, RIGHT, TOP, ROW, WIDTH = 190, 40, 58, 26, 720


def shares() -> dict[str, dict[str, float]]:
    """By workload and method, in whole %; workloads without a gap, and methods that were not run, are left out."""
    cells = json.loads((BENCHMARKS / "results" / "recovery.json").read_text())

    def of(workload: str, method: str) -> list[dict[str, Any]]:
        return [cell for cell in cells if (cell["workload"], cell["method"]) == (workload, method)]

    found: dict[str, dict[str, float]] = {}
    for name in WORKLOADS:
        shares = {m: share_closed(of(name, m), of(name, "start")) for m in COLOURS if of(name, m)}
        known = {method: float(round(share)) for method, share in shares.items() if share is not None}
        if known:
            found[name] = known
    return found


def svg(found: dict[str, dict[str, float]]) -> str:
    """A line for each workload from 0 (what convert_fx gave) to 100 (float), a dot for each method."""
    height = TOP + ROW * len(found) + 34
    scale = (WIDTH - LEFT - RIGHT) / 100

    def x(share: float) -> str:
        return f"{LEFT + scale * max(share, 0):.1f}"

    def text(at: str, y: int, words: str, more: str = "") -> str:
        return f'<text x="{at}" y="{y}"{more}>{words}</text>'

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13" fill="#222">',
        f"<title>{TITLE}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        text("12", 22, TITLE, ' font-weight="bold"'),
    ]
    for index, (method, colour) in enumerate(COLOURS.items()):
        at = LEFT + 110 * index
        lines.append(f'<circle cx="{at}" cy="42" r="6" fill="{colour}"/>' + text(str(at + 12), 46, method))
    bottom = TOP + ROW * len(found)
    for tick in range(0, 101, 20):
        lines.append(f'<line x1="{x(tick)}" x2="{x(tick)}" y1="{TOP}" y2="{bottom}" stroke="#e4e7eb"/>')
        lines.append(text(x(tick), bottom + 18, str(tick), ' text-anchor="middle" fill="#666"'))
    for index, (name, row) in enumerate(found.items()):
        y = TOP + ROW * index + ROW // 2
        lines.append(text(str(LEFT - 12), y + 4, name, ' text-anchor="end"'))
        lines.append(f'<line x1="{x(0)}" x2="{x(100)}" y1="{y}" y2="{y}" stroke="#cbd2d9"/>')
        for method, share in row.items():
            told = f"<title>{method}: {share:.0f} %</title>"
            lines.append(f'<circle cx="{x(share)}" cy="{y}" r="6" fill="{COLOURS[method]}">{told}</circle>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    (DOCS / "recovery.svg").write_text(svg(shares()))
