"""What `plan` found: which parts to leave in float, in which order, and what each buys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cptv_ao.core.formatting import UNKNOWN, number, percent, some, table
from cptv_ao.core.plain import as_plain
from cptv_ao.transforms.float_model.exclusion import Part, Without, without


@dataclass(frozen=True)
class PlanStep:
    """A few parts that are left in float together, beside those of the steps before.

    Attributes:
        parts: which; `str()` of one is its module, or `functions of` it.
        share: of the int8 operations, what is in float from here on: multiply-accumulates of layers, and one for each
            value of another quantized op.
        simulated: the loss then, on the float twin.
        loss: the same of a model that `quantize` made, on its own kernels; None where that was not tried.
        seconds: of an image on these kernels, on this machine.
        slowdown: that time as a multiple of what the model that was given takes, measured side by side.
    """

    parts: tuple[Part, ...]
    share: float
    simulated: float
    loss: float | None = None
    seconds: float | None = None
    slowdown: float | None = None


@dataclass(frozen=True)
class Plan:
    """What to leave in float; `str()` is a table, `to_dict()` is JSON-safe.

    Attributes:
        loss_name: of the loss.
        loss: of the model that was given, on its own kernels.
        simulated: of its float twin.
        least: loss of the teacher against itself (0, but for InfoNCE): what no model can go below.
        images: on which all was measured.
        budget: the share of the int8 operations that may be given up.
        steps: the parts that bring most for each operation first; each presumes those before.
        notes: what else is to be said.
    """

    loss_name: str
    loss: float
    simulated: float
    least: float
    images: int
    budget: float
    steps: tuple[PlanStep, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that are left in float."""
        return tuple(dict.fromkeys(part for step in self.steps for part in step.parts))

    def upto(self, steps: int) -> Plan:
        """The first so many steps alone."""
        if not 0 <= steps <= len(self.steps):
            raise ValueError(f"steps: expected 0 to {len(self.steps)}, got {steps}")
        return replace(self, steps=self.steps[:steps])

    def qconfig_mapping(self, mapping: Any) -> Any:
        """A copy of a `QConfigMapping` in which these parts have no qconfig, for stock `prepare_fx`."""
        if not hasattr(mapping, "set_module_name_object_type_order"):
            raise TypeError(f"mapping: expected a QConfigMapping, got {type(mapping).__name__}")
        return without(mapping, self.parts)

    def quantizer(self, quantizer: Any) -> Any:
        """A quantizer for stock `prepare_pt2e` that does what another one does, but for these parts."""
        if not hasattr(quantizer, "annotate"):
            raise TypeError(f"quantizer: expected a Quantizer of PT2E, got {type(quantizer).__name__}")
        return Without(quantizer, self.parts)

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, lists and numbers; what is not finite is None."""
        plain: dict[str, Any] = as_plain(asdict(self), finite=True)
        return plain

    def __str__(self) -> str:
        lines = [f"cptv_ao.plan: {self.loss_name} {number(self.loss)} on the model's own kernels, {self.images} images"]
        lines += ["", *table(_rows(self))]
        if not self.steps:
            lines += ["", f"nothing within {percent(self.budget)} of the int8 operations brings the loss down"]
        else:
            lines += ["", "left in float:", *(f"- {part}" for part in self.parts)]
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(lines)


def _rows(plan: Plan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("also in float", "int8 operations given up", "simulated loss", "loss", "time")]
    rows.append(("-", percent(0.0), number(plan.simulated), number(plan.loss), "1.00x"))
    for step in plan.steps:
        times = UNKNOWN if step.slowdown is None else f"{step.slowdown:.2f}x"
        names = some([str(part) for part in step.parts])
        rows.append((names, percent(step.share), number(step.simulated), number(step.loss), times))
    return rows if any(step.loss is not None for step in plan.steps) else [row[:3] for row in rows]


def with_steps(plan: Plan, steps: Sequence[PlanStep], notes: Sequence[str]) -> Plan:
    """The same plan with other steps, and more to be said."""
    return replace(plan, steps=tuple(steps), notes=(*plan.notes, *notes))
