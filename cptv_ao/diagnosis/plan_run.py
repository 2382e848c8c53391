"""The steps of `cptv_ao.plan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch.fx import GraphModule

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.turning_layers import turns
from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.image_subsets import first_images, spread_images
from cptv_ao.core.losses import is_per_image
from cptv_ao.core.progress import progress_bar
from cptv_ao.diagnosis.float_search import FloatSearch, Measure, Prediction
from cptv_ao.diagnosis.plan_confirmation import confirmed
from cptv_ao.diagnosis.plan_result import Plan, PlanStep
from cptv_ao.diagnosis.run import least_loss
from cptv_ao.diagnosis.wiring import Wiring
from cptv_ao.evaluation.calibration import Calibration, Images, check_negatives, on_device
from cptv_ao.evaluation.compared_outputs import chosen_outputs
from cptv_ao.evaluation.cost import cost_of
from cptv_ao.evaluation.float_runs import FloatRuns
from cptv_ao.evaluation.image_counting import counted
from cptv_ao.evaluation.scoring import SplitEvaluators
from cptv_ao.evaluation.suited_losses import settled_outputs
from cptv_ao.evaluation.teacher import FloatSources, as_float
from cptv_ao.evaluation.teacher_notes import teacher_notes
from cptv_ao.simulation.nothing_rounded import NothingRounded
from cptv_ao.simulation.simulated_backend import SimulatedBackend

# Images that are read, and those on which the twin is measured at least.
IMAGES, _FEW = 128, 16
# Groups that are measured in a step at most; steps that there may be; what a measurement costs an image, in float
# forwards; and what all measurements may take together, as a share of what a search is planned for.
_TRIES, _STEPS, _FORWARDS, _SHARE = 4, 20, 3, 0.4


def planned(
    backend: Backend,
    sources: FloatSources,
    batches: Sequence[Batch],
    config: RefineConfig,
    budget: float,
    quantize: Callable[[Plan], GraphModule] | None,
    progress: bool,
) -> Plan:
    """The plan for a model whose float weights are attached."""
    teacher = sources.teacher_for(backend, batches[0])
    with as_float(teacher):
        runs = FloatRuns(teacher)
        config, batches, notes = chosen_outputs(backend.model, runs, counted(batches, runs, config.pick), config)
        batches = first_images(batches, IMAGES)
        check_negatives(config, batches)
        cost = cost_of(teacher, backend.model, batches[0], None)
        count = cost.images(IMAGES, forwards=_FORWARDS * _STEPS, share=_SHARE, least=_FEW)
        measurements = int(cost.flops_of(_SHARE) / (_FORWARDS * cost.flops * count))
        batches = spread_images(batches, count, whole=not is_per_image(config.loss))
        images = Images.of(batches, teacher, config)
        config, told = settled_outputs(
            backend.model, teacher, images, replace(config, gradient_steps=0), turns=partial(turns, backend)
        )
        own = NothingRounded(backend, batches[0])
        notes += teacher_notes(backend, sources, teacher, images, config, own, stacklevel=3)
    loss = SplitEvaluators(backend.model, Calibration(config, images)).search.score()
    simulated = SimulatedBackend(backend, config.device).checked(images.batches[0])
    notes += told
    if sources.weights is None:
        notes.append("without float_model: compared with the model itself in float; errors of its weights are not seen")
    with progress_bar("plan", None, progress) as advance:
        wiring = Wiring(backend, sources.teacher)
        search = _search(wiring, simulated, images, config, measurements)
        found = search.steps(budget, advance)
        steps = tuple(PlanStep(one.parts, one.share, one.loss) for one in found)
        least = least_loss(images, config)
        plan = Plan(config.loss_name, loss, search.given, least, images.count, budget, steps=steps, notes=tuple(notes))
        if quantize is None:
            return replace(plan, notes=(*notes, "losses are simulated: pass quantize= to have them confirmed"))
        return confirmed(plan, backend.model, quantize, images, config, advance) if steps else plan


def _search(
    wiring: Wiring, simulated: SimulatedBackend, images: Images, config: RefineConfig, measurements: int
) -> FloatSearch:
    moved, twin = on_device(simulated, images), simulated.twin
    tries = max(1, min(_TRIES, measurements // 2 // _STEPS))
    measure = Measure(twin, wiring, moved, config)
    prediction = Prediction(twin, moved.batches, config)
    operations = wiring.operations(images.batches[0])
    return FloatSearch(measure, prediction, operations, least_loss(images, config), tries, measurements // 2)
