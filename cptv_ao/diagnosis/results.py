"""What `diagnose` found, as a value that prints as the table a person wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cptv_ao.core.formatting import decibels, number, percent, some, table
from cptv_ao.core.plain import as_plain

_ROWS = 10


@dataclass(frozen=True)
class BlockDiagnosis:
    """One block.

    Attributes:
        name: as in the report of `refine`.
        share: of the output loss that goes away when the block is in float; negative where its errors offset those of
            others; NaN where it could not be found out. Shares of all blocks need not add up to 1.
        loss_without: the output loss with the block in float, on the same simulation that `share` was taken on.
        sqnr: of the block's output against the float model's, in dB; all errors up to there count.
        cosine: the same, as the mean cosine of the images.
        node: name of the graph node that is taken for the block's output.
        sites: number of its sites.
    """

    name: str
    share: float
    loss_without: float
    sqnr: float | None
    cosine: float | None
    node: str | None
    sites: int


@dataclass(frozen=True)
class SiteDiagnosis:
    """One site: the float tensor (of the float model, without errors from before) put on the site's scale.

    Attributes:
        name, kind, op, block: of the site.
        sqnr: of the quantized tensor against the float one, in dB.
        clipped: share of the codes that stand at an end of the range for a value beyond it.
        used: share of the code range between the lowest and the highest code; of a weight per channel, the mean of its
            channels. Above 1 where a weight has more levels than its bits say.
        share: of the output loss that goes away when this site alone is in float; None where it was not tried (only
            sites of the blocks with the largest shares are) or where the float weight is not known.
        outlier: largest value of a channel, as a multiple of that of the median channel.
        outlier_channels: channels that reach four times the median one.
    """

    name: str
    kind: str
    op: str
    block: str
    sqnr: float | None = None
    clipped: float | None = None
    used: float | None = None
    share: float | None = None
    outlier: float | None = None
    outlier_channels: int | None = None


@dataclass(frozen=True)
class OutputDiagnosis:
    """One output of the model.

    Attributes:
        name: keys, fields and indices that lead to it, with dots between; `output` where it is all.
        loss_name: of the loss that it is compared by.
        loss: on the model's own kernels; of several outputs as a share of what the best output loses that is the same
            for all images.
        sqnr: against the float model's, in dB.
        agreement: share of the images, of maps and sequences of their places, with the same largest number; None for
            single numbers.
    """

    name: str
    loss_name: str
    loss: float
    sqnr: float | None
    agreement: float | None


@dataclass(frozen=True)
class Findings:
    """What the graph itself tells.

    Attributes:
        unfused_norms: batch norms in float between a quantized layer and its scale, which refine folds into the layer.
        float_layers: linear layers and convolutions that compute in float.
        float_ops: other ops that compute in float, by kind, with how many of each.
        unknown: quantized ops that were not understood, as of `find_sites`.
        smoothable: activation sites behind norms, whose outlier channels refine moves into the layers that read them.
        rotatable: activation sites of residual streams, whose outlier channels refine may spread over all.
        wide_weights: weights with codes beyond their nominal range, as `name (-4..4 for -4..3)`.
        saturating: activation sites on which a kernel of this machine saturates, on these images.
        broken_kernels: sentences on kernels of this engine that compute something else than their layers.
        saturation_risk: activation sites that use the upper half of 0..255 in front of 8-bit weights: kernels of x86
            CPUs without VNNI may saturate there, whatever this machine does.
    """

    unfused_norms: tuple[str, ...] = ()
    float_layers: tuple[str, ...] = ()
    float_ops: Mapping[str, int] | None = None
    unknown: tuple[str, ...] = ()
    smoothable: tuple[str, ...] = ()
    rotatable: tuple[str, ...] = ()
    wide_weights: tuple[str, ...] = ()
    saturating: tuple[str, ...] = ()
    saturation_risk: tuple[str, ...] = ()
    broken_kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `str()` is a table, `to_dict()` is JSON-safe, `to_pandas()` two data frames.

    Attributes:
        loss_name: of the loss.
        loss: of the model on its own kernels.
        simulated: of its float twin, on which shares are taken; None where the twin does not know an op.
        least: loss of the teacher against itself (0, but for InfoNCE): what no model can go below.
        floor: loss of the twin with every site in float: what no site explains; None without a twin.
        sqnr: of the model's outputs against the teacher's, in dB; of several outputs the lowest.
        agreement: share of the images on which model and teacher have the same largest output; None for one output. Of
            several outputs the lowest of those that are compared as logits, if any are.
        images: on which all was measured.
        blocks: ordered by `share`, the largest first.
        sites: those with a `share` first, the largest first; then by block, the lowest `sqnr` first.
        findings: what the graph tells.
        notes: what could not be measured, and why.
        advice: sentences.
        outputs: those that are compared, each by itself.
    """

    loss_name: str
    loss: float
    simulated: float | None
    least: float
    floor: float | None
    sqnr: float | None
    agreement: float | None
    images: int
    blocks: tuple[BlockDiagnosis, ...]
    sites: tuple[SiteDiagnosis, ...]
    findings: Findings
    notes: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    outputs: tuple[OutputDiagnosis, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers; what is not finite becomes None."""
        data: dict[str, Any] = as_plain(self, finite=True)
        return data

    def to_pandas(self) -> tuple[Any, Any]:
        """Data frames of the blocks and of the sites, one row each, in the order of `blocks` and `sites`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Diagnosis.to_pandas needs pandas: pip install pandas (or use to_dict())") from error
        blocks = pandas.DataFrame(
            [asdict(block) for block in self.blocks], columns=list(BlockDiagnosis.__annotations__)
        )
        sites = pandas.DataFrame([asdict(site) for site in self.sites], columns=list(SiteDiagnosis.__annotations__))
        return blocks, sites

    def __str__(self) -> str:
        told = (
            f"cptv_ao.diagnose: {self.loss_name} {number(self.loss)} on the model's own kernels, {self.images} images"
        )
        lines = [told + _outputs(self), ""]
        lines += [*_by_output(self), ""] if len(self.outputs) > 1 else []
        if self.simulated is not None:
            lines += [f"shares below are of the simulation, whose loss is {number(self.simulated)}:"]
        lines += [*_blocks(self), "", *_sites(self)]
        facts = _facts(self.findings)
        lines += ["", *facts] if facts else []
        lines += ["", *self.notes] if self.notes else []
        lines += ["", *(f"- {sentence}" for sentence in self.advice)] if self.advice else []
        return "\n".join(lines)


def _outputs(found: Diagnosis) -> str:
    told = "" if found.sqnr is None else f"; outputs {decibels(found.sqnr)}"
    return told if found.agreement is None else f"{told}, {percent(found.agreement)} of the images agree with float"


def _by_output(found: Diagnosis) -> list[str]:
    rows = [("output", "loss", "", "SQNR", "agreement")]
    for one in found.outputs:
        rows.append((one.name, one.loss_name, number(one.loss), decibels(one.sqnr), percent(one.agreement)))
    return table(rows)


def _blocks(found: Diagnosis) -> list[str]:
    rows = [("block", "causes", "loss without", "output SQNR", "cosine", "sites")]
    for block in found.blocks[:_ROWS]:
        cosine = "-" if block.cosine is None else f"{block.cosine:.4f}"
        rows.append(
            (
                block.name,
                percent(block.share),
                number(block.loss_without),
                decibels(block.sqnr),
                cosine,
                str(block.sites),
            )
        )
    return table(rows) + _more(len(found.blocks), "blocks")


def _sites(found: Diagnosis) -> list[str]:
    rows = [("site", "causes", "SQNR", "clipped", "range used", "outlier")]
    for site in found.sites[:_ROWS]:
        outlier = "-" if site.outlier is None else f"{site.outlier:.1f}x"
        shares = (percent(site.share), decibels(site.sqnr), percent(site.clipped), percent(site.used))
        rows.append((site.name, *shares, outlier))
    return table(rows) + _more(len(found.sites), "sites")


def _facts(findings: Findings) -> list[str]:
    named = {
        "kernels of this machine saturate on": findings.saturating,
        "may saturate on x86 CPUs without VNNI": findings.saturation_risk,
        "batch norms not fused": findings.unfused_norms,
        "layers in float": findings.float_layers,
        "ops in float": tuple(f"{kind} {count}" for kind, count in (findings.float_ops or {}).items()),
        "not understood, left alone": findings.unknown,
        "more levels than nominal": findings.wide_weights,
    }
    return [f"{title}: {some(names)}" for title, names in named.items() if names]


def _more(count: int, what: str) -> list[str]:
    return [f"({count - _ROWS} more {what} in to_dict() and to_pandas())"] if count > _ROWS else []


def excess(found: Diagnosis) -> float:
    """The loss that shares are of."""
    return (found.loss if found.simulated is None else found.simulated) - found.least
