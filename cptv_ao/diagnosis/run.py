"""The steps of `cptv_ao.diagnose`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.turning_layers import turns
from cptv_ao.core.batches import Batch
from cptv_ao.core.blocks import Block, find_blocks
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.formatting import some
from cptv_ao.core.losses import get_exact_loss
from cptv_ao.core.progress import Advance, progress_bar
from cptv_ao.diagnosis.attribution import Attribution, causes_by_substitution, causes_on_twin, steps
from cptv_ao.diagnosis.comparison import Comparison, compared_by_modules, compared_on_twin
from cptv_ao.diagnosis.graph_survey import Survey
from cptv_ao.diagnosis.meters import Fidelity, measured_weight
from cptv_ao.diagnosis.output_fidelity import output_diagnoses
from cptv_ao.diagnosis.results import BlockDiagnosis, Diagnosis, Findings, OutputDiagnosis, SiteDiagnosis
from cptv_ao.evaluation.calibration import Calibration, Images, check_negatives
from cptv_ao.evaluation.compared_outputs import chosen_outputs
from cptv_ao.evaluation.float_runs import FloatRuns
from cptv_ao.evaluation.image_counting import counted
from cptv_ao.evaluation.scoring import SplitEvaluators
from cptv_ao.evaluation.suited_losses import settled_outputs
from cptv_ao.evaluation.teacher import FloatSources, as_float
from cptv_ao.evaluation.teacher_notes import teacher_notes
from cptv_ao.simulation.kernel_agreement import broken_kernels, disagreeing
from cptv_ao.simulation.nothing_rounded import NothingRounded
from cptv_ao.simulation.simulated_backend import SimulatedBackend
from cptv_ao.transforms.equalize import foldable, rotatable, smoothable

_IMAGES = 128
# Those on which kernels are compared with exact arithmetic.
_PROBE_IMAGES = 16
# Share of large codes from which an activation counts as one of the full range: observers with reduce_range let a few
# codes of rare images stand there.
_HIGH = 2e-3


@dataclass(frozen=True)
class _Measured:
    """What was measured, and on what."""

    causes: Attribution
    compared: Comparison
    on_twin: bool
    note: str = ""


def _diagnosis(
    backend: Backend, sources: FloatSources, batches: Sequence[Batch], config: RefineConfig, progress: bool
) -> Diagnosis:
    teacher = sources.teacher_for(backend, batches[0])
    with as_float(teacher):
        runs = FloatRuns(teacher)
        batches = counted(batches, runs, config.pick)
        config, batches, notes = chosen_outputs(backend.model, runs, batches, config)
        batches = _few(batches)
        check_negatives(config, batches)
        images = Images.of(batches, teacher, config)
        config, told = settled_outputs(
            backend.model, teacher, images, replace(config, gradient_steps=0), turns=partial(turns, backend)
        )
        notes += teacher_notes(
            backend, sources, teacher, images, config, NothingRounded(backend, batches[0]), stacklevel=3
        )
        kernels = SplitEvaluators(backend.model, Calibration(config, images)).search
        loss = kernels.score()
        blocks = find_blocks(backend.sites.values(), config.blocks)
        survey = Survey(backend, blocks)
        with progress_bar("diagnose", steps(blocks), progress) as advance:
            measured = _measured(backend, teacher, images, survey, config, loss, advance)
    causes, outputs = measured.causes, output_diagnoses(kernels.outputs(), images, config)
    notes += told + ([measured.note] if measured.note else [])
    if sources.weights is None:
        notes.append("without float_model: compared with the model itself in float; errors of its weights are not seen")
    return Diagnosis(
        loss_name=config.loss_name,
        loss=loss,
        simulated=causes.whole if measured.on_twin else None,
        least=causes.least,
        floor=causes.floor,
        sqnr=min((one.sqnr for one in outputs if one.sqnr is not None), default=None),
        agreement=min((one.agreement for one in _choices(outputs) if one.agreement is not None), default=None),
        images=kernels.images,
        blocks=_blocks(blocks, measured, survey),
        sites=_sites(backend, blocks, measured),
        findings=_findings(backend, survey, measured.compared, batches[0], config),
        notes=tuple(notes),
        outputs=outputs,
    )


def _measured(
    backend: Backend,
    teacher: nn.Module,
    images: Images,
    survey: Survey,
    config: RefineConfig,
    loss: float,
    advance: Advance,
) -> _Measured:
    """On the twin; where it does not know an op, with the float model's own tensors."""
    blocks, outputs = survey.blocks, survey.block_outputs()
    least = least_loss(images, config)
    try:
        simulated = SimulatedBackend(backend, config.device).checked(images.batches[0])
        compared = compared_on_twin(backend, simulated, images.batches, outputs)
        return _Measured(causes_on_twin(simulated, images, blocks, config, least, advance), compared, True)
    except UnsupportedModelError as error:
        note = (
            f"{error}; so shares are those of putting the float model's output of a block in place of the kernels', "
            "which counts what the block adds to all before it, and sites have no SQNR and no share"
        )
    compared, float_outputs = compared_by_modules(backend, teacher, images.batches, outputs)
    ordered = {block.name: outputs[block.name] for block in blocks if block.name in outputs}
    causes = Attribution(loss, least)
    causes_by_substitution(causes, backend, ordered, float_outputs, images, config, advance)
    if left := tuple(block.name for block in blocks if block.name not in compared.blocks):
        note += f"; left out, for no module of the float model ends where they do: {some(left)}"
    return _Measured(causes, compared, False, note)


def _blocks(blocks: Sequence[Block], measured: _Measured, survey: Survey) -> tuple[BlockDiagnosis, ...]:
    outputs = survey.block_outputs()
    found = []
    for block in blocks:
        without, share = measured.causes.blocks.get(block.name, (math.nan, math.nan))
        fidelity = measured.compared.blocks.get(block.name, Fidelity())
        node = outputs.get(block.name)
        found.append(BlockDiagnosis(block.name, share, without, fidelity.sqnr, fidelity.cosine, node, len(block.sites)))
    return tuple(sorted(found, key=lambda b: math.inf if math.isnan(b.share) else -b.share))


def _sites(backend: Backend, blocks: Sequence[Block], measured: _Measured) -> tuple[SiteDiagnosis, ...]:
    causes, found = measured.causes, []
    rank = {name: -share for name, (_, share) in causes.blocks.items()}
    for block in blocks:
        for site in block.sites:
            meter = measured.compared.sites.get(site.name)
            seen = measured_weight(backend, site) if meter is None else meter.measured()
            share = causes.sites.get(site.name)
            found.append(SiteDiagnosis(site.name, site.kind, site.op, block.name, share=share, **seen))

    def order(site: SiteDiagnosis) -> tuple[float, float, float]:
        tried = math.inf if site.share is None else -site.share
        return tried, rank.get(site.block, math.inf), math.inf if site.sqnr is None else site.sqnr

    return tuple(sorted(found, key=order))


def _findings(backend: Backend, survey: Survey, compared: Comparison, batch: Batch, config: RefineConfig) -> Findings:
    layers, ops = survey.in_float(compared.floating)
    few = batch.few(_PROBE_IMAGES)
    broken = [] if backend.form.simulates_itself else broken_kernels(backend, few)
    try:
        known = backend.form.simulates_itself or broken
        saturating = () if known else tuple(disagreeing(backend, few, config)[1])
    except UnsupportedModelError:
        saturating = ()
    wide = survey.before_wide_weights()
    return Findings(
        unfused_norms=survey.paths(foldable(backend, batch)),
        float_layers=layers,
        float_ops=ops,
        unknown=backend.sites.unknown,
        smoothable=tuple(sorted(smoothable(backend))),
        rotatable=tuple(sorted(rotatable(backend))),
        wide_weights=survey.wide_weights(),
        saturating=saturating,
        broken_kernels=tuple(broken),
        saturation_risk=tuple(n for n, meter in compared.sites.items() if n in wide and meter.high_share > _HIGH),
    )


def _few(batches: Sequence[Batch]) -> list[Batch]:
    """The first images of what was read; whole batches where these cannot be cut."""
    kept: list[Batch] = []
    left = _IMAGES
    for batch in batches:
        if not kept or 0 < batch.images <= left or left > 1:  # a loss may need more than one image of a batch
            kept.append(batch.few(left))
            left -= kept[-1].images
    return kept


def least_loss(images: Images, config: RefineConfig) -> float:
    """The loss of the teacher against itself."""
    loss = get_exact_loss(config.loss, config.temperature)
    return images.mean(lambda _, __, target: float(loss(target, target)))


def _choices(outputs: Sequence[OutputDiagnosis]) -> Sequence[OutputDiagnosis]:
    """Of several outputs those that choose among classes."""
    return outputs if len(outputs) == 1 else [one for one in outputs if one.loss_name == "kl"]
