"""The report as one page of HTML that opens without a network, for people who were not there.

Plots are those of `cptv_ao.plot`, as SVG inside the page; their colours are the page's, so that they follow a dark
theme. All that comes from a model or a user is escaped.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from html import escape
from io import StringIO
from itertools import count
from typing import TYPE_CHECKING, Any

from cptv_ao.core.atomic_file import at_once, target_of
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.formatting import change, decibels, number, percent
from cptv_ao.core.outcome import Outcome, Status, per_block
from cptv_ao.diagnosis.results import Diagnosis
from cptv_ao.reporting import plots
from cptv_ao.reporting.html_style import CSS
from cptv_ao.reporting.summary import gained, what_to_try

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Drawn in place of black, to be replaced by the colour of the page's text; no other part of a plot has it.
_INK = "#010203"
_COLORS = {_INK: "currentColor", plots.BLUE: "var(--blue)", plots.ORANGE: "var(--orange)", plots.GREY: "var(--grey)"}
_LONG = 16  # rows of a table from which it is folded
# Inches: narrow, so that letters are large enough where a phone shrinks it.
_WIDTH = 4.9


def write_page(
    report: Outcome, path: str | os.PathLike[str], diagnosis: Diagnosis | None = None, after: Diagnosis | None = None
) -> None:
    """Write the page of a report; see `Report.save_html`."""
    target_of(path)
    text = page(report, diagnosis, after)
    with at_once(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(report: Outcome, diagnosis: Diagnosis | None = None, after: Diagnosis | None = None) -> str:
    """The page of a report as text."""
    told, status = gained(report), report.status.value
    parts = [
        f'<header class="{_tone(report)}"><p>cptv_ao.refine</p>'
        f"<h1>{escape(told)}</h1><p>{escape(status[:1].upper() + status[1:])}.</p></header>",
        _losses(report),
        _outputs(report),
        _plots(report, diagnosis, after),
        _notes(report),
        _blocks(report),
        _diagnosis("What each block costs", diagnosis),
        _diagnosis("What each block costs, refined", after),
        _sites(report),
        _settings(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>cptv_ao.refine: {escape(told)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _tone(report: Outcome) -> str:
    if report.status is Status.REJECTED:
        return "warn"
    return "good" if report.moves else "plain"


def _losses(report: Outcome) -> str:
    tiles = [_tile(report, f"{report.images[0]} search images", report.before.search, report.after.search)]
    if report.before.holdout is not None and report.after.holdout is not None:
        tiles.append(_tile(report, f"{report.images[1]} held-out images", report.before.holdout, report.after.holdout))
    moved = f"<b>{len(report.moves)}</b> of {report.sites} sites moved"
    turned = sum(m.turned for m in report.moves)
    if turned:
        moved += (
            f", <b>{percent(turned / sum(m.codes for m in report.moves))}</b> of the weight codes rounded the other way"
        )
    if corrected := sum(m.corrected for m in report.moves):
        moved += f", the biases of <b>{corrected}</b> layers corrected"
    cost = f"<b>{report.evaluations:,}</b> candidates scored, <b>{report.image_forwards:,}</b> image-forwards"
    machine = f"{report.threads} thread{'s' if report.threads != 1 else ''}, seed {report.seed}"
    facts = f"<p>{moved}; {cost}, <b>{_seconds(report.seconds)}</b>, {machine}.</p>"
    return f'<section aria-label="Losses">\n<div class="tiles">{"".join(tiles)}</div>\n{facts}</section>'


def _outputs(report: Outcome) -> str:
    if len(report.outputs) < 2:
        return ""
    rows = [
        (one.name, one.loss, *(number(v) for v in (one.before.search, one.after.search)), *map(number, held))
        for one in report.outputs
        for held in [(one.before.holdout, one.after.holdout)]
    ]
    columns = ("output", "loss", "before", "after", "held-out before", "after")
    return _section("Outputs, as shares of what the best output loses that knows no image", columns, rows, text=2)


def _tile(report: Outcome, images: str, before: float, after: float) -> str:
    told = "no change"
    if after != before:
        told = change(before, after).replace("-", "\N{MINUS SIGN}") if before > 0 else ""
    width = 100 * min(1.0, after / before) if before > 0 else 100
    return (
        f'<div class="tile"><h2>{escape(report.loss)} loss, {escape(images)}</h2>'
        f'<p class="figures"><span>{number(before)}</span> <span aria-label="to">→</span> <b>{number(after)}</b> '
        f'<span class="change">{told}</span></p><div class="meter"><i style="width:{width:.1f}%"></i></div></div>'
    )


def _plots(report: Outcome, diagnosis: Diagnosis | None, after: Diagnosis | None) -> str:
    drawings: list[tuple[str, Callable[[], Axes]]] = []
    if report.history:
        drawings.append(
            (
                "Loss over the search, on the search and the held-out images",
                lambda: plots.losses(report, over="seconds"),
            )
        )
    if report.moves:
        drawings.append(("Factors of the scales of each site, block by block", lambda: plots.movement(report)))
    if diagnosis is not None and diagnosis.blocks:
        drawings.append(("Loss that each block costs", lambda: plots.sensitivity(diagnosis, after)))
    try:
        figures = [_figure(label, draw, index) for index, (label, draw) in enumerate(drawings)]
    except ImportError:
        return (
            "<section><h2>Plots</h2><p>Plots need matplotlib: <code>pip install 'cptv_ao[plot]'</code>.</p></section>"
        )
    return f'<section class="plots" aria-label="Plots">\n{"".join(figures)}</section>' if figures else ""


def _figure(label: str, draw: Callable[[], Axes], index: int) -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks; tables have it
        svg = _svg(draw(), index)
    return f'<figure><svg role="img" aria-label="{escape(label)}" {svg.removeprefix("<svg ")}</figure>\n'


def _svg(ax: Axes, index: int) -> str:
    """A plot as SVG for inside of a page: colours of the page, ids of its own, nothing that points elsewhere."""
    figure: Any = ax.figure
    figure.set_size_inches(_WIDTH, figure.get_figheight())
    _recolor(figure)
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = re.sub(
        r'^<svg ([^>]*?)(?:width|height)="[^"]*"([^>]*?)(?:width|height)="[^"]*"', r"<svg \1\2", text, count=1
    )
    numbers = count()
    names: dict[str, str] = {}
    for name in re.findall(r'\sid="([^"]+)"', text):
        names.setdefault(name, f"p{index}-{next(numbers)}")
    text = re.sub(r'(\sid="|href="#|url\(#)([^")]+)', lambda m: m[1] + names.get(m[2], m[2]), text)
    for drawn, shown in _COLORS.items():
        text = text.replace(drawn, shown)
    return re.sub(r"\n\s*\n+", "\n", text).strip()


def _recolor(figure: Any) -> None:
    from matplotlib.text import Text

    for ax in figure.axes:
        ax.tick_params(which="both", colors=_INK)
        for spine in ax.spines.values():
            spine.set_edgecolor(_INK)
    for text in figure.findobj(Text):
        text.set_color(_INK)


def _notes(report: Outcome) -> str:
    parts = []
    if notes := [*what_to_try(report), *report.notes]:
        parts.append(f"<h2>Notes</h2>{_list(notes)}")
    if report.stages:
        parts.append(f"<h2>Proposals for the whole model</h2>{_list(report.stages)}")
    return f"<section>{''.join(parts)}</section>" if parts else ""


def _blocks(report: Outcome) -> str:
    if not report.blocks:
        return ""
    rows = [
        (name, visits, f"{accepted} of {evaluations}", number(before), number(end))
        for name, visits, evaluations, accepted, before, end in per_block(report.blocks)
    ]
    return _section("Block visits", ("block", "visits", "accepted", "loss before", "after"), rows)


def _diagnosis(title: str, found: Diagnosis | None) -> str:
    if found is None:
        return ""
    rows = [
        (b.name, percent(b.share), number(b.loss_without), decibels(b.sqnr), number(b.cosine)) for b in found.blocks
    ]
    columns = ("block", "share of the loss", "loss when it is float", "SQNR", "cosine")
    parts = [_section(f"{title}: loss {number(found.loss)}", columns, rows)]
    if found.sites:
        sites = [(s.name, percent(s.share), decibels(s.sqnr), percent(s.clipped), percent(s.used)) for s in found.sites]
        columns = ("site", "share of the loss", "SQNR", "clipped", "range used")
        parts.append(_section(f"{title}: its {len(sites)} sites", columns, sites))
    if found.advice:
        parts.append(f"<section><h2>{escape(title)}: advice</h2>{_list(found.advice)}</section>")
    return "\n".join(parts)


def _sites(report: Outcome) -> str:
    if not report.moves:
        return ""
    rows = [
        (m.name, _factors(m.low, m.high), f"{m.moved} of {m.scales}", m.zero_point, m.kind, m.block)
        for m in sorted(report.moves, key=lambda m: -m.log2)
    ]
    columns = ("site", "factors", "scales moved", "zero_point step", "kind", "block")
    return _section(f"Sites that moved: {len(rows)} of {report.sites}, the farthest first", columns, rows)


def _settings(report: Outcome) -> str:
    if not report.settings:
        return ""
    default = RefineConfig().told()
    rows = [(name, value, "" if default.get(name) == value else "changed") for name, value in report.settings.items()]
    changed = sum(row[2] != "" for row in rows)
    rows.sort(key=lambda row: row[2] == "")
    title = f"Settings: {changed or 'none'} of {len(rows)} changed from the defaults"
    return _section(title, ("setting", "value", ""), rows, text=3)


def _section(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], text: int = 1) -> str:
    """A table that is folded where it is long; the first `text` columns are words, the others numbers."""
    table = _table(columns, rows, text)
    if len(rows) > _LONG:
        return f"<section><details><summary><h2>{escape(title)}</h2></summary>{table}</details></section>"
    return f"<section><h2>{escape(title)}</h2>{table}</section>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], text: int) -> str:
    def cells(tag: str, row: Sequence[Any]) -> str:
        kinds = ["" if i < text else ' class="n"' for i in range(len(row))]
        told = [escape(str(value)) for value in row]
        told[0] = told[0].replace(".", ".<wbr>")  # long names break where a path does
        return "".join(f"<{tag}{kind}>{value}</{tag}>" for kind, value in zip(kinds, told, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', columns)}</tr></thead>"
    return f'<div class="wide" tabindex="0"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _factors(low: float, high: float) -> str:
    ends = [f"{2**low:.3g}", f"{2**high:.3g}"]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _seconds(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
