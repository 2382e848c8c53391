"""Plots: what is drawn is what the report, the diagnosis and the model hold; nothing global is touched."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.cases import Case, Copies
from helpers.search import small_config
from helpers.state import everything
from torch.fx import GraphModule

import cptv_ao

pytest.importorskip("matplotlib", reason="extra plot")

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from cptv_ao import plot
from cptv_ao.diagnosis.code_counts import count_codes
from cptv_ao.diagnosis.plan_result import PlanStep
from cptv_ao.transforms.float_model.exclusion import Part as FloatPart

LONG = "stages.2.blocks.11.attention.self.projection.of_the_value_with_a_very_long_name_that_nobody_can_read"
HOSTILE = "</script> $\\frac{ $x$ & --> \n <b>"


@dataclass(frozen=True)
class Part:
    name: str
    share: float
    loss_without: float
    sqnr: float | None
    cosine: float | None


@dataclass(frozen=True)
class Diagnosis:
    loss: float
    blocks: tuple[Part, ...]
    simulated: float | None = None
    least: float = 0.0
    sites: tuple[Any, ...] = ()
    advice: tuple[str, ...] = ()


def diagnosis(loss: float, shares: dict[str, float]) -> Diagnosis:
    return Diagnosis(loss, tuple(Part(name, share, loss * (1 - share), 12.5, 0.97) for name, share in shares.items()))


@pytest.fixture(scope="module")
def report(small_cases: Copies) -> cptv_ao.Report:
    """Of a search that gained, step by step."""
    conv = small_cases["conv"]
    config = small_config(evaluations=12, passes=2)
    cptv_ao.refine(conv.converted, conv.batches, float_model=conv.float_model, config=config, progress=False)
    found = cptv_ao.report(conv.converted)
    assert len({point.search for point in found.history}) > 2
    assert found.moves
    return found


def drawn(ax: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points of the lines that a legend names, by the first words of their label."""
    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    return {
        str(line.get_label()).split(":")[0]: [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        for line in lines
    }


@pytest.mark.parametrize("over", ["evaluations", "seconds"])
def test_losses_are_those_of_the_history(report: cptv_ao.Report, over: Any) -> None:
    ax = plot.losses(report, over=over)
    at = [getattr(point, over) for point in report.history]
    searched, held = report.images
    lines = drawn(ax)
    assert lines == {
        f"{searched} search images": list(zip(at, [p.search for p in report.history], strict=True)),
        f"{held} held-out images": list(zip(at, [p.holdout for p in report.history], strict=True)),
    }
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    kept = [point for point in report.history if point.kept]
    assert [len(line.get_xdata()) for line in dots] == [len(kept), len(kept)]
    assert [float(line.get_ydata()[-1]) for line in dots] == [report.after.search, report.after.holdout]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("candidates scored" if over == "evaluations" else over, "kl loss")


def test_losses_without_held_out_images_and_without_a_history(report: cptv_ao.Report) -> None:
    history = tuple(replace(point, holdout=None) for point in report.history)
    assert len(drawn(plot.losses(replace(report, history=history)))) == 1
    with pytest.raises(ValueError, match="expected a report with a history"):
        plot.losses(replace(report, history=()))


def test_losses_say_where_they_are_not_those_of_the_kernels(report: cptv_ao.Report) -> None:
    assert "simulation" not in plot.losses(report).get_title()
    other = replace(report, before=replace(report.before, search=1.0))
    assert "on the simulation" in plot.losses(other).get_title()


@pytest.mark.parametrize(("least", "scale"), [(0.05, "log"), (0.5, "linear"), (0.0, "linear")])
def test_a_log_scale_where_it_spans_decades(report: cptv_ao.Report, least: float, scale: str) -> None:
    points = [cptv_ao.Point(i, float(i), loss, None, True) for i, loss in enumerate((1.0, least))]
    assert plot.losses(replace(report, history=tuple(points))).get_yscale() == scale


def test_sensitivity_is_the_share_of_each_block() -> None:
    shares = {"stem": 0.02, "blocks.1": 0.43, "blocks.0": 0.31, "head": -0.01}
    ax = plot.sensitivity(diagnosis(0.4, shares))
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([100 * share for share in shares.values()])
    assert [label.get_text() for label in ax.get_yticklabels()] == list(shares)
    assert [text.get_text() for text in ax.texts] == ["2.0 %", "43 %", "31 %", "-1.0 %"]
    assert "below 0" not in ax.get_xlabel()
    assert "below 0" in plot.sensitivity(diagnosis(0.4, {"stem": 0.3, "head": -0.2})).get_xlabel()
    bottom, top = ax.get_ylim()
    assert bottom > top, "the first block is at the top"


def test_sensitivity_before_and_after_in_one_unit() -> None:
    """Half of a loss that is a tenth of what it was: 5 % of the loss before."""
    before = diagnosis(0.4, {"stem": 0.2, "head": 0.6})
    after = diagnosis(0.04, {"head": 0.5, "stem": 0.1, "another": 0.9})
    ax = plot.sensitivity(before, after)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([20, 60, 1, 5])
    above = plot.sensitivity(replace(before, simulated=0.6, least=0.2), replace(after, simulated=0.4, least=0.2))
    assert [bar.get_width() for bar in above.patches] == pytest.approx([20, 60, 5, 25])
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["as given", "refined"]
    assert "of the loss as given" in ax.get_xlabel()


def test_sensitivity_of_many_blocks_shows_the_largest() -> None:
    shares = {f"blocks.{i}": (i * 37 % 100) / 1000 for i in range(100)}
    ax = plot.sensitivity(diagnosis(1.0, shares))
    names = [label.get_text() for label in ax.get_yticklabels()]
    wanted = sorted(shares, key=lambda name: -shares[name])[:40]
    assert names == [name for name in shares if name in wanted]
    assert "the largest 40 of 100" in ax.get_title()
    unknown = plot.sensitivity(diagnosis(1.0, {"stem": 0.5, "head": math.nan}), diagnosis(0.5, {"stem": 0.5}))
    assert [text.get_text() for text in unknown.texts] == ["50 %", "-", "25 %", "-"]
    with pytest.raises(ValueError, match="a diagnosis with blocks"):
        plot.sensitivity(diagnosis(1.0, {}))


def test_movement_spans_the_scales_of_each_site(report: cptv_ao.Report) -> None:
    ax = plot.movement(report)
    spans = [float(y) for lines in ax.collections for path in lines.get_paths() for y in path.vertices[:, 1]]
    by_kind = [m for kind in ("weight", "activation") for m in report.moves if m.kind == kind]
    assert spans == pytest.approx([end for m in by_kind for end in (m.low, m.high)])
    marks = [y for points in drawn(ax).values() for _, y in points]
    assert [abs(y) for y in marks] == pytest.approx([m.log2 for m in by_kind])
    assert list(drawn(ax)) == ["weights", "activations"]
    blocks = list(dict.fromkeys(move.block for move in report.moves))
    assert [label.get_text() for label in ax.get_xticklabels()] == blocks
    assert ax.get_title() == f"Scales after / before: {len(report.moves)} of {report.sites} sites moved"
    empty = plot.movement(replace(report, moves=()))
    assert (drawn(empty), empty.get_title()) == ({}, f"Scales after / before: 0 of {report.sites} sites moved")


def test_movement_of_a_large_model_names_some_blocks(report: cptv_ao.Report) -> None:
    moves = tuple(replace(report.moves[0], name=f"{i}.weight", block=f"blocks.{i // 5}") for i in range(500))
    ax = plot.movement(replace(report, moves=moves))
    assert len(ax.get_xticklabels()) <= 16


def test_codes_of_a_weight(conv: Case) -> None:
    wanted = conv.converted.fc1.weight().int_repr()
    found = count_codes(conv.converted, "fc1.weight")
    assert found.total == wanted.numel()
    assert {found.first + i: n for i, n in enumerate(found.counts) if n} == {
        int(code): int((wanted == code).sum()) for code in wanted.unique()
    }
    ax = plot.codes(conv.converted, "fc1.weight")
    heights = [bar.get_height() for bar in ax.patches[: len(found.counts)]]
    assert heights == pytest.approx([100 * n / found.total for n in found.counts])
    qmin, qmax = found.site.qmin, found.site.qmax
    ends = [
        round(bar.get_x() + bar.get_width() / 2) for bar in ax.patches if to_hex(bar.get_facecolor()) == plot.ORANGE
    ]
    assert {qmin, qmax} <= set(ends)
    assert all(not qmin < code < qmax for code in ends)


def test_codes_beyond_the_nominal_range_are_told(conv: Case) -> None:
    """Stock 3-bit weights of convert_fx use nine levels."""
    codes = conv.converted.conv1.weight().int_repr()
    share = 100 * float((codes > 3).float().mean())
    assert share > 0
    legend = plot.codes(conv.converted, "conv1.weight").get_legend()
    assert legend is not None
    assert f"codes beyond -4..3: {share:.3g} %" in {text.get_text() for text in legend.get_texts()}


def test_codes_of_an_activation_are_those_of_the_kernels(conv: Case) -> None:
    """Against the outputs of the module itself; the model is left as it was, training flags too."""
    model = conv.converted
    outputs: list[torch.Tensor] = []
    handle = model.fc1.register_forward_hook(lambda _, __, out: outputs.append(out.int_repr()))
    with torch.no_grad():
        for batch in conv.batches:
            model(batch)
    handle.remove()
    wanted = torch.bincount(torch.cat(outputs).reshape(-1).int(), minlength=256)
    model.train()
    given = everything(model)
    ax = plot.codes(model, "fc1.output", [(batch, "a label") for batch in conv.batches])
    assert everything(model) == given
    found = count_codes(model, "fc1.output", conv.batches)
    assert found.counts == tuple(wanted.tolist())
    assert found.first == 0
    assert found.zero_point == model.fc1.zero_point
    assert ax.get_ylabel() == f"share of {found.total:,} values, %"
    legend = ax.get_legend()
    assert legend is not None
    labels = {text.get_text() for text in legend.get_texts()}
    zero = " (zero)" if found.zero_point == 0 else ""
    assert {
        f"lowest code 0{zero}: {100 * found.counts[0] / found.total:.3g} %",
        f"zero_point {found.zero_point}",
    } <= labels


def test_what_cannot_be_counted_is_told(conv: Case) -> None:
    with pytest.raises(ValueError, match=r"no site 'fc1.weigth' in this model; did you mean 'fc1.weight'\?"):
        plot.codes(conv.converted, "fc1.weigth")
    with pytest.raises(ValueError, match="no site 'nothing like it' in this model; print"):
        plot.codes(conv.converted, "nothing like it")
    with pytest.raises(ValueError, match=r"fc1\.output is an activation site: .* pass calib_loader"):
        plot.codes(conv.converted, "fc1.output")
    with pytest.raises(cptv_ao.CalibrationDataError):
        plot.codes(conv.converted, "fc1.output", [])


def plan(*paths: str) -> cptv_ao.Plan:
    shares = [0.02 * (i + 1) for i in range(len(paths))]
    steps = [PlanStep((FloatPart(path),), x, 0.3 - x, 0.31 - x) for path, x in zip(paths, shares, strict=True)]
    return cptv_ao.Plan(HOSTILE, 0.4, 0.39, 0.0, 128, 0.1, tuple(steps))


def test_the_tradeoff_is_that_of_the_plan() -> None:
    ax = plot.tradeoff(plan("a", "b"))
    kernels = next(line for line in ax.get_lines() if line.get_marker() == "s")
    assert list(kernels.get_xdata()) == pytest.approx([0.0, 2.0, 4.0])
    assert list(kernels.get_ydata()) == pytest.approx([0.4, 0.29, 0.27])
    assert [text.get_text() for text in ax.texts] == ["a", "b"]


def every_plot(report: cptv_ao.Report, model: GraphModule) -> list[Callable[[Axes | None], Axes]]:
    shares = diagnosis(0.4, {LONG: 0.3, HOSTILE: 0.2, "stem": 0.0, "head": -0.05})
    return [
        lambda ax: plot.losses(replace(report, loss=HOSTILE), ax),
        lambda ax: plot.sensitivity(shares, ax=ax),
        lambda ax: plot.sensitivity(shares, shares, ax),
        lambda ax: plot.movement(
            replace(report, moves=tuple(replace(m, block=LONG + m.block) for m in report.moves)), ax
        ),
        lambda ax: plot.codes(model, "fc1.weight", ax=ax),
        lambda ax: plot.tradeoff(plan(LONG, HOSTILE), ax),
    ]


@pytest.mark.parametrize("index", range(6))
def test_they_draw_on_the_ax_that_they_are_given(conv: Case, report: cptv_ao.Report, index: int) -> None:
    figure = Figure()
    ax, other = figure.subplots(1, 2)
    assert every_plot(report, conv.converted)[index](ax) is ax
    assert ax.has_data()
    assert not other.has_data()


@pytest.mark.parametrize("index", range(6))
def test_names_that_are_long_or_hostile_stay_inside(conv: Case, report: cptv_ao.Report, index: int) -> None:
    figure: Any = every_plot(report, conv.converted)[index](None).figure
    figure.draw_without_rendering()
    box = figure.get_tightbbox()  # of all that is drawn, in inches
    assert box.x0 >= 0 and box.y0 >= 0
    assert box.x1 <= figure.get_figwidth() and box.y1 <= figure.get_figheight()


@pytest.mark.slow
def test_nothing_is_shown_and_nothing_global_is_touched(conv: Case, report: cptv_ao.Report) -> None:
    import matplotlib

    given = dict(matplotlib.rcParams)
    for draw in every_plot(report, conv.converted):
        draw(None)
    assert dict(matplotlib.rcParams) == given
    code = (
        "import sys, cptv_ao\n"
        "assert 'matplotlib' not in sys.modules and 'tensorboard' not in sys.modules\n"
        "from cptv_ao import callbacks, plot\n"
        "assert 'matplotlib' not in sys.modules and 'tensorboard' not in sys.modules\n"
        "point = [cptv_ao.Point(i, float(i), 1.0 / (i + 1), None, True) for i in range(3)]\n"
        "losses = type('L', (), {'search': 1.0})\n"
        "report = type('R', (), {'history': point, 'before': losses, 'images': (3, 0), 'loss': 'kl'})\n"
        "plot.losses(report)\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_it_says_what_to_install(report: cptv_ao.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'cptv_ao\[plot\]'"):
        plot.losses(report)


def test_losses_of_an_accepted_state_that_is_not_the_last(report: cptv_ao.Report) -> None:
    """What the held-out images refuse is drawn, but has no dot."""
    first = report.history[0]
    refused = replace(first, evaluations=5, search=first.search / 2, holdout=2 * (first.holdout or 1.0), kept=False)
    ax = plot.losses(replace(report, history=(first, refused)))
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[0], [0]]
    assert all(len(points) == 2 for points in drawn(ax).values())
    assert math.isclose(drawn(ax)[f"{report.images[0]} search images"][1][1], first.search / 2)
