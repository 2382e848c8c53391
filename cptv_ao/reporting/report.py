"""What the last `refine` did to a model, as a value that prints as the table a person wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import GraphModule

from cptv_ao.core.formatting import change, counted, number, percent, table
from cptv_ao.core.outcome import META_KEY, Outcome, OutputLoss, per_block
from cptv_ao.core.plain import as_plain, from_plain
from cptv_ao.reporting.summary import what_to_try

if TYPE_CHECKING:
    import os

    from cptv_ao.diagnosis.results import Diagnosis


@dataclass(frozen=True)
class Report(Outcome):
    """Result of one `refine`; `str()` is a table, `to_dict()` is JSON-safe, `save_html()` writes a page with plots.

    Attributes:
        status: how it ended, a `Status`.
        loss: name of the loss.
        before, after: `Losses` of the model as it was given and as it came back, of its own kernels.
        blocks: a `BlockResult` for each visit of a block, in order.
        moves: a `SiteMove` for each site that moved.
        stages: what was proposed for the whole model, and what became of it: sentences.
        sites: how many sites were searched.
        evaluations: candidates that were scored.
        image_forwards: images that were run through the network or a part of it.
        images: how many were searched on, and how many were held out.
        seconds: of the search.
        seed: of the search.
        threads: of torch.
        notes: what there is to know besides: sentences.
        history: a `Point` at the start, after each proposal and each visit, of what was searched on: with
            `score_on="simulation"` losses of the simulation.
        settings: those of the `RefineConfig`, in words.
        outputs: an `OutputLoss` for each output that is compared.
    """

    def save_html(
        self, path: str | os.PathLike[str], diagnosis: Diagnosis | None = None, after: Diagnosis | None = None
    ) -> None:
        """Write one page that opens without a network: losses, plots, tables, settings.

        The file is written beside its name and then renamed: it is there whole, or not at all. A symlink stays, and the
        file that it leads to is written. Plots need matplotlib (extra `plot`); without it the page has the tables only,
        and says so.

        Args:
            path: of the page, e.g. `report.html`.
            diagnosis: what `cptv_ao.diagnose` said of the model as it was given.
            after: what it says of the refined model.

        Raises:
            OSError: the file cannot be written, or is none (a folder, a FIFO, a device).
        """
        from cptv_ao.reporting.html_page import write_page

        write_page(self, path, diagnosis, after)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers; what is not finite becomes None."""
        return {**as_plain(self, finite=True), "message": self.status.value}

    def __str__(self) -> str:
        lines = [f"cptv_ao.refine: {self.status.value}", ""]
        lines += table(
            [
                ("loss", "before", "after", "change"),
                (f"{self.loss}, {self.images[0]} search images", *_change(self.before.search, self.after.search)),
            ]
            + (
                [(f"{self.loss}, {self.images[1]} held-out images", *_change(self.before.holdout, self.after.holdout))]
                if self.before.holdout is not None and self.after.holdout is not None
                else []
            )
        )
        lines += ["", *_by_output(self.outputs)] if len(self.outputs) > 1 else []
        lines += ["", *self.stages] if self.stages else []
        if self.blocks:
            rows = [("block", "visits", "evaluations", "accepted", "loss before", "after")]
            for name, visits, evaluations, accepted, before, after in per_block(self.blocks):
                rows.append((name, str(visits), str(evaluations), str(accepted), number(before), number(after)))
            lines += ["", *table(rows)]
        lines += ["", f"{len(self.moves)} of {self.sites} sites moved"]
        if self.moves:
            lines[-1] += "; the farthest:"
            far = sorted(self.moves, key=lambda m: -m.log2)[:8]
            moved = [("site", "scales moved", "largest factor", "zero_point step")]
            moved += [(m.name, f"{m.moved} of {m.scales}", f"{2**m.log2:.3f}", str(m.zero_point)) for m in far]
            lines += table(moved)
        codes, turned = (sum(getattr(m, part) for m in self.moves) for part in ("codes", "turned"))
        if turned:
            lines += ["", f"{turned} of {codes} weight codes ({percent(turned / codes)}) are rounded the other way"]
        if corrected := sum(m.corrected for m in self.moves):
            lines += ["", f"the biases of {counted(corrected, 'layer')} are corrected"]
        lines += ["", *told] if (told := [*what_to_try(self), *self.notes]) else []
        lines.append("")
        lines.append(
            f"{self.evaluations} evaluations, {self.image_forwards} image-forwards, {self.seconds:.1f} s, "
            f"{self.threads} thread{'s' if self.threads != 1 else ''}, seed {self.seed}"
        )
        return "\n".join(lines)


def put_on(model: GraphModule, found: Outcome) -> None:
    """Leave what a refine did with the model, for `report`: as plain values, which load where cptv_ao is not
    installed."""
    model.meta[META_KEY] = as_plain(found)


def report(model: nn.Module) -> Report:
    """The report of the last `refine` of this model.

    Raises:
        ValueError: the model was not refined, or lost its `meta` (`torch.save` does not keep it), or somebody else
            wrote there.
    """
    found = _found(model)
    if found is None:
        raise ValueError("no report: expected a model that cptv_ao.refine returned; call refine(model, ...) first")
    return found


def is_refined(model: nn.Module) -> bool:
    """Whether it has a report."""
    return _found(model) is not None


def _found(model: nn.Module) -> Report | None:
    meta = getattr(model, "meta", None)
    try:
        return from_plain(Report, meta[META_KEY]) if isinstance(meta, dict) else None
    except (KeyError, TypeError, ValueError):
        return None


def _by_output(outputs: Sequence[OutputLoss]) -> list[str]:
    held = any(one.before.holdout is not None for one in outputs)
    title = ("held-out before", "after", "change") if held else ()
    rows: list[tuple[str, ...]] = [("output", "loss", "before", "after", "change", *title)]
    for one in outputs:
        row: tuple[str, ...] = (one.name, one.loss, *_change(one.before.search, one.after.search))
        if one.before.holdout is not None and one.after.holdout is not None:
            row += _change(one.before.holdout, one.after.holdout)
        rows.append(row)
    return table(rows)


def _change(before: float, after: float) -> tuple[str, str, str]:
    return number(before), number(after), change(before, after)
