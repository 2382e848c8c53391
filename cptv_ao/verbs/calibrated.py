"""The calibration set of a search: which images, what of the outputs, by what loss, against which teacher."""

from __future__ import annotations

from functools import partial

import torch

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.turning_layers import turns
from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.contexts import is_cpu
from cptv_ao.core.distributed import World
from cptv_ao.core.image_subsets import split_batches
from cptv_ao.core.losses import is_per_image
from cptv_ao.evaluation.calibration import Calibration, Images, Pool, check_negatives
from cptv_ao.evaluation.compared_outputs import chosen_outputs
from cptv_ao.evaluation.cost import Seconds, affordable, cost_of
from cptv_ao.evaluation.float_runs import FloatRuns
from cptv_ao.evaluation.image_counting import counted
from cptv_ao.evaluation.suited_losses import compares_classes, settled_outputs
from cptv_ao.evaluation.teacher import FloatSources, as_float, fakes_quantization, taught, teacher_on
from cptv_ao.evaluation.teacher_notes import teacher_notes
from cptv_ao.simulation.nothing_rounded import NothingRounded


def calibrated(
    backend: Backend,
    batches: list[Batch],
    sources: FloatSources,
    config: RefineConfig,
    world: World,
    planned: Seconds | None,
) -> tuple[Calibration, NothingRounded, list[str]]:
    """The images that the search pays for, split in two, what the teacher makes of them, and how that is compared; the
    model in float on the first of them; and notes.

    Args:
        batches: as they were read.
        planned: what a forward took where the search was begun, see `cost_of`.
    """
    teacher, told = teacher_on(sources.teacher_for(backend, batches[0]), config.device, batches[0])
    with as_float(teacher):
        runs = FloatRuns(teacher)
        known = counted(batches, runs, config.pick, world)
        config, known, notes = chosen_outputs(backend.model, runs, known, config)
        cost = cost_of(teacher, backend.model, known[0], config.max_seconds, world, planned, config.device)
        whole = split_batches(known, config.holdout)
        turning = partial(turns, backend)
        of_classes = compares_classes(backend.model, config, turning)
        split = affordable(whole, cost, not is_per_image(config.loss), of_classes)
        check_negatives(config, (*split.search, *split.holdout))
        images, held_out = (Images.of(part, teacher, config, world) for part in (split.search, split.holdout))
        config, said = settled_outputs(backend.model, teacher, images, config, world, turning)
        own = NothingRounded(backend, images.batches[0])
        notes += teacher_notes(backend, sources, teacher, images, config, own, stacklevel=4)
    notes += said + told
    if fakes_quantization(teacher):
        notes.append("the teacher is float_model with its fake quantization, in use since it was trained with it (QAT)")
    if torch.cuda.is_available() and is_cpu(config.device):
        notes.append("torch sees a GPU here: RefineConfig(device='cuda') makes the proposals there")
    if known[0].fixed and not backend.form.intake(backend.model).fixed:
        notes.append("what the model gives for an image depends on the others in its batch: batches are run whole")
    pool = Pool(whole.search, partial(taught, teacher, config.select, world)) if split.images < whole.images else None
    return Calibration(config, images, held_out, world, cost, pool), own, notes
