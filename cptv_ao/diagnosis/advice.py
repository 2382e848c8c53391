"""What to do about what was found, in plain sentences."""

from __future__ import annotations

import math

from cptv_ao.core.channel_scaling import FEW_OUTLIERS
from cptv_ao.core.formatting import percent, some
from cptv_ao.diagnosis.results import BlockDiagnosis, Diagnosis, Findings, SiteDiagnosis, excess

# Outputs this near to the float model's (in dB) leave nothing to gain.
_NEAR = 40.0
# A block stands out whose share is this many times the mean share.
_STANDS_OUT = 1.5
# Share of a block's part that one site must have to be named alone.
_NEARLY_ALL, _MOST = 0.8, 0.5
_CLIPS, _NARROW, _COARSE = 0.005, 0.3, 15.0
# Share of the loss that no site explains from which it is worth a word.
_UNEXPLAINED = 0.1


def advise(found: Diagnosis, refined: bool) -> tuple[str, ...]:
    """Sentences, the most useful first.

    Args:
        refined: `refine` was run on this model already.
    """
    told = _repairs(found.findings) + _from_blocks(found, refined) + _remarks(found.findings)
    whole = excess(found)
    if found.floor is not None and whole > 0 and found.floor - found.least > _UNEXPLAINED * whole:
        told.append(
            f"{percent((found.floor - found.least) / whole)} of the loss is in no site: it stays when all of them are "
            "in float (embeddings, dynamic layers, fixed qparams), and no scale can give it back"
        )
    return tuple(told)


def _from_blocks(found: Diagnosis, refined: bool) -> list[str]:
    near = found.sqnr is not None and found.sqnr >= _NEAR
    if near and (found.loss <= found.least or found.agreement in (None, 1.0)):
        what = "exactly those of the float model" if found.sqnr == math.inf else f"{found.sqnr or 0:.0f} dB from float"
        return [f"little to gain: {found.loss_name} is {found.loss:.3g} already, outputs are {what}"]
    if found.findings.broken_kernels:
        return ["no scale makes up for such a kernel: put that right first, then diagnose again"]
    do = "refine has been run already: what is left needs a longer search or more bits" if refined else "run refine"
    worst = next((block for block in found.blocks if block.share > 0), None)
    if worst is None:
        return [f"no block alone brings the loss down: {do}"]
    shares = [block.share for block in found.blocks if not math.isnan(block.share)]
    if len(shares) > 2 and worst.share < _STANDS_OUT * sum(shares) / len(shares):
        return [f"the loss comes from all blocks alike ({worst.name} is the worst with {percent(worst.share)}): {do}"]
    return [f"{worst.name} causes {percent(worst.share)} of the loss{_within(found, worst)}: {do}"]


def _within(found: Diagnosis, block: BlockDiagnosis) -> str:
    """The sites of a block that its part comes from, and what is wrong with the first."""
    sites = [site for site in found.sites if site.block == block.name and site.share is not None]
    if not sites or not sites[0].share or sites[0].share <= 0:
        return ""
    part, why = sites[0].share / block.share, _why(sites[0], found.findings)
    if part >= _NEARLY_ALL:
        return f", nearly all of it from {sites[0].name}{why}"
    if part >= _MOST:
        return f", most of it from {sites[0].name}{why}"
    return f", most from {sites[0].name} ({percent(sites[0].share)}){why}"


def _why(site: SiteDiagnosis, findings: Findings) -> str:
    outliers = site.outlier_channels or 0
    if site.clipped is not None and site.clipped > _CLIPS:
        return f", which clips {percent(site.clipped)} of its values"
    if site.kind == "activation" and 0 < outliers <= FEW_OUTLIERS:
        told = f", whose range is set by {outliers} outlier channel{'s' if outliers > 1 else ''} ({site.outlier:.0f}x)"
        if site.name in findings.smoothable:
            return f"{told}, which refine, given float_model, moves into the layers behind it"
        if site.name in findings.rotatable:
            return f"{told}, which refine, given float_model, spreads over all if the layers allow it"
        return told
    if site.kind == "activation" and site.used is not None and site.used < _NARROW:
        return f", which uses {percent(site.used)} of its code range"
    if site.sqnr is not None and site.sqnr < _COARSE:
        return f", whose codes are coarse ({site.sqnr:.0f} dB)"
    return ""


def _repairs(findings: Findings) -> list[str]:
    """What to put right first: refine does not, or not all of it."""
    told = list(findings.broken_kernels)
    if findings.unfused_norms:
        told.append(
            f"{_count(findings.unfused_norms, 'batch norm')} not fused with the convolution before: refine folds "
            "them into scales, but they go on running; prepare the model with cptv_ao.recipe"
        )
    if findings.saturating:
        told.append(
            f"kernels of this CPU saturate at {some(findings.saturating)}: calibrate with reduce_range=True, run "
            "refine on this kind of CPU, or use one with VNNI"
        )
    return told


def _remarks(findings: Findings) -> list[str]:
    told = []
    if findings.saturation_risk and not findings.saturating:
        told.append(
            f"{_count(findings.saturation_risk, 'activation')} using the upper half of 0..255 in front of 8-bit "
            "weights: kernels of x86 CPUs without VNNI may saturate there; reduce_range=True avoids it"
        )
    if findings.wide_weights:
        told.append(
            f"{_count(findings.wide_weights, 'weight')} using more levels than the bit width says (convert_fx does not "
            "clamp): refine clamps what it moves"
        )
    if findings.float_layers:
        told.append(
            f"{_count(findings.float_layers, 'layer')} computing in float ({some(findings.float_layers)}): see the "
            "qconfig_mapping, or cptv_ao.recipe for models that FX cannot trace"
        )
    if findings.unknown:
        told.append(f"{_count(findings.unknown, 'quantized op')} not understood and left alone by refine")
    return told


def _count(names: tuple[str, ...], what: str) -> str:
    return f"{len(names)} {what}{'s are' if len(names) > 1 else ' is'}"
