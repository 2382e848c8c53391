"""Plots of what a search did and of what a site holds, with matplotlib (extra `plot`).

    ax = cptv_ao.plot.losses(cptv_ao.report(quantized))
    ax.figure.savefig("losses.png")

Each function takes an `ax` to draw on, or makes a figure of its own, and returns the ax. Nothing is shown, and neither
pyplot nor a global setting is touched. Colours are those of Okabe and Ito, told apart by colour-blind readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from torch.fx import GraphModule

from cptv_ao.core.formatting import percent
from cptv_ao.core.outcome import Outcome, Point, SiteMove
from cptv_ao.diagnosis.results import BlockDiagnosis, Diagnosis, excess

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8c9196"
_WIDTH = 5.6  # inches, of a figure that is made here
_MOST_BARS = 40
_MOST_LABELS = 16


def losses(report: Outcome, ax: Axes | None = None, over: Literal["evaluations", "seconds"] = "evaluations") -> Axes:
    """The loss over the search, on the search and on the held-out images; on a log scale where it falls by ten.

    Dots are the states that were accepted: the last one is what the model has.

    Args:
        report: of a refine.
        ax: to draw on.
        over: what the search has spent: `evaluations` (candidates that were scored) or `seconds`.

    Raises:
        ValueError: the report holds no history.
    """
    if not report.history:
        raise ValueError("losses: expected a report with a history, got one without; call refine again")
    ax = axes(ax, 3.6)
    points = report.history
    at = [float(getattr(point, over)) for point in points]
    drawn = _line(ax, at, points, "search", BLUE, f"{report.images[0]} search images")
    if points[0].holdout is not None:
        drawn += _line(ax, at, points, "holdout", ORANGE, f"{report.images[1]} held-out images")
    if min(drawn) > 0 and max(drawn) >= 10 * min(drawn):
        _log_scale(ax)
    on_twin = ", on the simulation" if points[0].search != report.before.search else ""
    ax.set_title(f"Loss over the search{on_twin} (dots: accepted)")
    ax.set_xlabel("candidates scored" if over == "evaluations" else "seconds")
    ax.set_ylabel(f"{plain(report.loss, 20)} loss")
    ax.legend(frameon=False, fontsize="small")
    quiet(ax)
    return ax


def sensitivity(before: Diagnosis, after: Diagnosis | None = None, ax: Axes | None = None) -> Axes:
    """How much of the output loss each block causes: what goes when that block alone is float.

    Blocks need not add up, and a bar may be below 0: a search makes scales fit each other, so that others make up for
    the errors of a block, and the loss rises where only these are taken away.

    Args:
        before: what `cptv_ao.diagnose` says of a model.
        after: what it says of the refined model; drawn in the same unit, per cent of the loss *before*, so that the
            bars can be compared.
        ax: to draw on.

    Raises:
        ValueError: the diagnosis holds no block.
    """
    blocks = list(before.blocks)
    if not blocks:
        raise ValueError("sensitivity: expected a diagnosis with blocks, got one without")
    shown = _largest(blocks)
    ax = axes(ax, 1.3 + (0.27 if after is None else 0.4) * len(shown))
    height = 0.7 if after is None else 0.38
    label = "as given" if after is not None else "share"
    first = [100 * block.share for block in shown]
    _bars(ax, first, -height / 2 if after is not None else 0.0, height, BLUE, label)
    second: list[float] = []
    if after is not None:
        whole = excess(before)
        unit = 100 * excess(after) / whole if whole > 0 else math.nan
        caused = {block.name: unit * block.share for block in after.blocks}
        second = [caused.get(block.name, math.nan) for block in shown]
        _bars(ax, second, height / 2, height, ORANGE, "refined")
        ax.legend(frameon=False, loc="lower right")
    ax.set_yticks(range(len(shown)), [plain(block.name, 26) for block in shown])
    ax.invert_yaxis()
    ax.margins(x=0.14)
    ax.axvline(0, color=GREY, linewidth=0.8)
    left = f", the largest {len(shown)} of {len(blocks)}" if len(shown) < len(blocks) else ""
    ax.set_title(f"What each block costs{left}")
    unit_of = "%" if after is None else "% of the loss as given"
    below = "\n(below 0: other blocks make up for its errors)" if any(value < -1 for value in first + second) else ""
    ax.set_xlabel(f"loss that goes when the block\nalone is float, {unit_of}{below}")
    quiet(ax, "x")
    ax.spines["left"].set_visible(False)  # the line at 0 is there
    ax.tick_params(axis="y", length=0)
    return ax


def movement(report: Outcome, ax: Axes | None = None) -> Axes:
    """How far the scales of each site moved, in the order of the graph, block by block.

    A line spans the least and the greatest factor among the scales of a site (of a weight: its channels), the mark is
    at the farther end. Sites that did not move are left out.
    """
    ax = axes(ax, 3.6)
    moves = report.moves
    ax.set_title(f"Scales after / before: {len(moves)} of {report.sites} sites moved")
    ax.set_ylabel("factor, log scale")
    ax.axhline(0, color=GREY, linewidth=0.8)
    for kind, color, marker in (("weight", BLUE, "o"), ("activation", ORANGE, "s")):
        at = [i for i, move in enumerate(moves) if move.kind == kind]
        if at:
            ax.vlines(
                at, [moves[i].low for i in at], [moves[i].high for i in at], color=color, linewidth=1.2, alpha=0.7
            )
            ends = [max(moves[i].low, moves[i].high, key=abs) for i in at]
            ax.plot(at, ends, marker, color=color, markersize=3, label=f"{kind}s")
    if moves:
        _mark_blocks(ax, moves)
        far = max(1.0, *(abs(end) for move in moves for end in (move.low, move.high)))
        ax.set_ylim(-1.1 * far, 1.4 * far)  # marks may be anywhere: room for the legend above them
        ax.legend(frameon=False, ncols=2, loc="upper right", fontsize="small")
    ax.yaxis.set_major_formatter(lambda value, _: f"{2**value:.3g}\N{MULTIPLICATION SIGN}")
    quiet(ax)
    return ax


def codes(model: GraphModule, site: str, calib_loader: Iterable[Any] | None = None, ax: Axes | None = None) -> Axes:
    """The codes that a site takes: an activation on images, on the model's own kernels; a weight as it is stored.

    The lowest and the highest code are marked: they hold what lies beyond the range too. The line is the zero_point.

    Args:
        model, site, calib_loader: as for `cptv_ao.diagnosis.code_counts.count_codes`.
        ax: to draw on.

    Raises:
        ValueError: there is no such site, or an activation site was given no images.
        UnsupportedModelError: the model is not converted, or the site holds no 8-bit codes.
    """
    from cptv_ao.diagnosis.code_counts import count_codes

    found = count_codes(model, site, calib_loader)
    ax = axes(ax, 3.2)
    shares = [100 * count / found.total for count in found.counts]
    at = [found.first + i for i in range(len(shares))]
    ends = {found.site.qmin: "lowest", found.site.qmax: "highest"}
    colors = [ORANGE if code in ends or not found.site.qmin <= code <= found.site.qmax else BLUE for code in at]
    ax.bar(at, shares, 1.0 if len(at) > 64 else 0.85, color=colors)
    for code, end in ends.items():
        zero = " (zero)" if code == found.zero_point else ""
        ax.bar([code], [0], color=ORANGE, label=f"{end} code {code}{zero}: {shares[code - found.first]:.3g} %")
    beyond = sum(
        share for code, share in zip(at, shares, strict=True) if not found.site.qmin <= code <= found.site.qmax
    )
    if beyond:
        ax.bar(
            [found.site.qmin],
            [0],
            color=ORANGE,
            label=f"codes beyond {found.site.qmin}..{found.site.qmax}: {beyond:.3g} %",
        )
    if found.zero_point is not None:
        ax.axvline(found.zero_point, color=GREY, linewidth=1, linestyle="--", label=f"zero_point {found.zero_point}")
    inner = max((share for code, share in zip(at, shares, strict=True) if code not in ends), default=0.0)
    if 0 < 4 * inner < max(shares):
        ax.set_ylim(0, 2 * inner)  # or the rest could not be seen; the legend says how high the ends are
    ax.locator_params(axis="x", integer=True)
    ax.set_title(plain(site, 52))
    ax.set_xlabel(f"code ({found.site.kind}, {found.site.qmin}..{found.site.qmax})")
    ax.set_ylabel(f"share of {found.total:,} values, %")
    ax.legend(frameon=False, fontsize="small")
    quiet(ax)
    return ax


def axes(ax: Axes | None, height: float) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'cptv_ao[plot]'") from error
    return Figure(figsize=(_WIDTH, height), layout="constrained").subplots()


def _line(ax: Axes, at: Sequence[float], points: Sequence[Point], which: str, color: str, label: str) -> list[float]:
    """One loss, with a dot at each accepted state; returns the values that were drawn."""
    pairs = [
        (x, float(getattr(p, which)), p.kept) for x, p in zip(at, points, strict=True) if getattr(p, which) is not None
    ]
    kept = [(x, y) for x, y, is_kept in pairs if is_kept]
    told = f"{label}: {kept[0][1]:.3g} to {kept[-1][1]:.3g}"
    style = "-" if which == "search" else "--"
    ax.plot([x for x, _, _ in pairs], [y for _, y, _ in pairs], style, color=color, linewidth=1.4, label=told)
    ax.plot([x for x, _ in kept], [y for _, y in kept], "o", color=color, markersize=4)
    return [y for _, y, _ in pairs]


def _log_scale(ax: Axes) -> None:
    """With plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _mark_blocks(ax: Axes, moves: Sequence[SiteMove]) -> None:
    """Lines between the blocks, and their names below; some of the names where there are many."""
    starts, names = [], []
    for name, group in groupby(range(len(moves)), key=lambda i: moves[i].block):
        starts.append(next(group))
        names.append(name)
    ends = [*starts[1:], len(moves)]
    for start in starts[1:]:
        ax.axvline(start - 0.5, color=GREY, linewidth=0.5, alpha=0.5)
    every = math.ceil(len(names) / _MOST_LABELS)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    ax.set_xticks(middles[::every], [plain(name, 16) for name in names[::every]], rotation=90, fontsize="small")
    ax.set_xlim(-1, len(moves))


def _largest(blocks: Sequence[BlockDiagnosis]) -> list[BlockDiagnosis]:
    """At most `_MOST_BARS` of the blocks, those that cost most, in the order that they have."""
    last = sorted(blocks, key=lambda block: -math.inf if math.isnan(block.share) else block.share)[:-_MOST_BARS]
    return [block for block in blocks if block not in last]


def _bars(ax: Axes, values: Sequence[float], shift: float, height: float, color: str, label: str) -> None:
    """A bar per row, and its value at its right, where no name of a block is."""
    ax.barh([row + shift for row in range(len(values))], values, height, color=color, label=label)
    for row, value in enumerate(values):
        at = (max(0.0, value), row + shift)  # 0 where it is NaN: not known
        told = percent(value / 100)
        ax.annotate(told, at, (3, 0), textcoords="offset points", va="center", fontsize="small")


def plain(text: str, longest: int) -> str:
    """One short line, with its middle left out where it is too long; a dollar is a dollar, not mathematics."""
    line = " ".join(str(text).split())
    if len(line) > longest:
        half = (longest - 1) // 2
        line = f"{line[:half]}…{line[-half:]}"
    return line.replace("$", r"\$")


def quiet(ax: Axes, axis: Literal["x", "y"] = "y") -> None:
    """No frame but the axes, and a faint grid."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(True, axis=axis, color=GREY, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
