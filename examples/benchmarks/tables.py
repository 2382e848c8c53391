"""The tables of the accuracy benchmark, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from origins import told

Cells = Sequence[dict[str, Any]]


def recovery_table(cells: Cells, workloads: Sequence[str], methods: Sequence[str]) -> str:
    """Test top-1 in % (mean and spread over seeds), share of the gap closed, KL on unseen images and cost; then where
    the cells are from. A cell of one seed says so."""
    by_key: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for found in cells:
        if found["workload"] in workloads and found["method"] in methods:
            by_key.setdefault((found["workload"], found["method"]), []).append(found)
    rows = [name for name in workloads if (name, "start") in by_key]
    searched = [m for m in methods if m != "start"]
    start = {name: by_key[name, "start"] for name in rows}
    parts = []
    for title, show, columns in (
        ("Test top-1, % (EfficientNet: agreement with float)", _top1, methods),
        ("Share of the gap to float that was closed, %", _closed, searched),
        ("KL to float on unseen calibration images", _kl, methods),
        ("Seconds / thousands of image-forwards", _cost, searched),
    ):
        first = show is _top1
        head = [
            "workload",
            *(["float"] if first else []),
            *("start (clamped)" if first and m == "start" else m for m in columns),
        ]
        lines = [head]
        for name in rows:
            float_model = [f"{100 * mean(c['float'] for c in start[name]):.2f}"] if first else []
            lines.append([name, *float_model, *(show(by_key.get((name, m), []), start[name]) for m in columns)])
        parts.append(f"**{title}**\n\n" + markdown(lines))
    return "\n\n".join([*parts, told([cell for found in by_key.values() for cell in found])])


def top1(found: Cells) -> str:
    """Test top-1 in %, mean and spread over the seeds."""
    return spread([100 * c["top1"] for c in found], 2)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and spread (standard deviation); of a single value that it is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}, 1 seed"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def share_closed(found: Cells, start: Cells) -> float | None:
    """Share in % of the gap to float that a method closed, on the seeds that it has; None where there is no gap."""
    if mean(c["float"] - c["top1"] for c in start) < 0.005:
        return None
    seeds = {c["seed"] for c in found}
    paired = [c for c in start if c["seed"] in seeds]
    before, reference = mean(c["top1"] for c in paired), mean(c["float"] for c in paired)
    return 100 * (mean(c["top1"] for c in found) - before) / (reference - before)


def _one(text: str, found: Cells) -> str:
    return text if len(found) > 1 else f"{text}, 1 seed"


def _top1(found: Cells, start: Cells) -> str:
    if not found:
        return "-"
    return top1(found) + (f" ({100 * mean(c['clamped'] for c in found):.2f})" if "clamped" in found[0] else "")


def _closed(found: Cells, start: Cells) -> str:
    if not found:
        return "-"
    share = share_closed(found, start)
    return "no gap" if share is None else _one(f"{round(share)}", found)


def _kl(found: Cells, start: Cells) -> str:
    return _one(f"{mean(c['kl'] for c in found):.4f}", found) if found else "-"


def _cost(found: Cells, start: Cells) -> str:
    if not found:
        return "-"
    seconds, forwards = mean(c["seconds"] for c in found), mean(c["image_forwards"] for c in found)
    return _one(f"{seconds:.0f} / {forwards / 1000:.0f}", found)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table; the first one is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)
