"""The table of the accuracy benchmark, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

Cells = Sequence[dict[str, Any]]


def recovery_table(cells: Cells, workloads: Sequence[str], methods: Sequence[str]) -> str:
    """Test top-1 in % (mean and spread over seeds), then the share of the gap closed and the KL on unseen images."""
    by_key: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for found in cells:
        by_key.setdefault((found["workload"], found["method"]), []).append(found)
    head = ["workload", "float", *(m if m != "start" else "start (clamped)" for m in methods)]
    parts = []
    for title, show in (
        ("Test top-1, % (EfficientNet: agreement with float)", _top1),
        ("Share of the gap to float that was closed, %", _closed),
        ("KL to float on unseen calibration images", _kl),
        ("Seconds / thousands of image-forwards", _cost),
    ):
        rows = [head]
        for name in workloads:
            start = by_key.get((name, "start"), [])
            if start:
                columns = [show(by_key.get((name, m), []), start) for m in methods]
                rows.append([name, f"{100 * mean(c['float'] for c in start):.2f}", *columns])
        parts.append(f"**{title}**\n\n" + markdown(rows))
    return "\n\n".join(parts)


def top1(found: Cells) -> str:
    """Test top-1 in %, mean and spread over the seeds."""
    values = [100 * c["top1"] for c in found]
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}, 1 seed"


def _top1(found: Cells, start: Cells) -> str:
    if not found:
        return "-"
    return top1(found) + (f" ({100 * mean(c['clamped'] for c in found):.2f})" if "clamped" in found[0] else "")


def _closed(found: Cells, start: Cells) -> str:
    if not found or found[0]["method"] == "start":
        return "-"
    if mean(c["float"] - c["top1"] for c in start) < 0.005:
        return "no gap"
    seeds = {c["seed"] for c in found}
    paired = [c for c in start if c["seed"] in seeds]
    before, reference = mean(c["top1"] for c in paired), mean(c["float"] for c in paired)
    return f"{100 * (mean(c['top1'] for c in found) - before) / (reference - before):.0f}"


def _kl(found: Cells, start: Cells) -> str:
    return f"{mean(c['kl'] for c in found):.4f}" if found else "-"


def _cost(found: Cells, start: Cells) -> str:
    if not found or "seconds" not in found[0]:
        return "-"
    return f"{mean(c['seconds'] for c in found):.0f} / {mean(c['image_forwards'] for c in found) / 1000:.0f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table; the first one is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)
