"""How tables, numbers, shares and decibels are written: for the terminal, the page and the plots alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

UNKNOWN = "-"


def table(rows: Sequence[tuple[str, ...]], left: int = 1) -> list[str]:
    """The lines of a table: so many columns to the left, the others to the right, a rule under the heads, which the
    first row holds."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return lines


def number(value: float | None) -> str:
    """A loss and the like, in five digits."""
    return f"{value:.5g}" if _known(value) else UNKNOWN


def percent(value: float | None) -> str:
    """A share (1 is all) in per cent, below ten with a decimal."""
    if not _known(value):
        return UNKNOWN
    return f"{100 * value:.1f} %" if abs(value) < 0.0995 else f"{100 * value:.0f} %"


def change(before: float, after: float) -> str:
    """From one value > 0 to another in per cent, with its sign."""
    return f"{100 * (after / before - 1):+.1f} %" if before > 0 else UNKNOWN


def decibels(value: float | None) -> str:
    """A signal to noise ratio in dB; `exact` without noise."""
    return UNKNOWN if not _known(value) else f"{value:.1f} dB" if math.isfinite(value) else "exact"


def counted(count: int, one: str) -> str:
    """So many of a kind, which is named in the singular."""
    return f"{count} {one}{'' if count == 1 else 's'}"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and not math.isnan(value)
