"""What leaving layers in float buys, as a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cptv_ao.diagnosis.plan_result import Plan
from cptv_ao.reporting.plots import BLUE, GREY, ORANGE, axes, plain, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Steps whose names are written beside their points.
_NAMED = 8


def tradeoff(plan: Plan, ax: Axes | None = None) -> Axes:
    """The loss over the share of the int8 operations that is given up, step by step.

    The line is the simulation, the marks what kernels confirmed.

    Args:
        plan: of `cptv_ao.plan`.
        ax: to draw on.
    """
    ax = axes(ax, 3.6)
    shares = [0.0, *(100 * step.share for step in plan.steps)]
    ax.step(shares, [plan.simulated, *(step.simulated for step in plan.steps)], where="post", color=BLUE, linewidth=1.4)
    ax.plot(shares, [plan.simulated, *(step.simulated for step in plan.steps)], "o", color=BLUE, markersize=4)
    kernels = [(0.0, plan.loss), *((100 * s.share, s.loss) for s in plan.steps if s.loss is not None)]
    ax.plot(*zip(*kernels, strict=True), "s", color=ORANGE, markersize=5, fillstyle="none")
    ax.axhline(plan.least, color=GREY, linewidth=0.8)
    for share, step in list(zip(shares[1:], plan.steps, strict=True))[:_NAMED]:
        name = plain(str(step.parts[0]), 26) + (f" +{len(step.parts) - 1}" if len(step.parts) > 1 else "")
        right = share > 0.6 * shares[-1]  # where the frame ends
        side, away = ("right", -4) if right else ("left", 4)
        place: dict[str, Any] = {"xytext": (away, 4), "textcoords": "offset points", "ha": side}
        ax.annotate(name, (share, step.simulated), fontsize="x-small", clip_on=True, **place)
    ax.plot([], [], "o-", color=BLUE, label="simulated")
    ax.plot([], [], "s", color=ORANGE, fillstyle="none", label="on kernels")
    ax.legend(frameon=False, fontsize="small", loc="upper right")
    ax.margins(x=0.1)
    ax.set_ylim(bottom=min(0.0, plan.least))
    ax.set_title("What layers in float buy")
    ax.set_xlabel("int8 operations given up, %")
    ax.set_ylabel(f"{plain(plan.loss_name, 20)} loss")
    quiet(ax)
    return ax
