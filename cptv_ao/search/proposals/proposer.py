"""What is tried on the kernels before the block visits: the initial population, then a descent from the best of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.contexts import is_cpu
from cptv_ao.core.losses import is_per_image
from cptv_ao.core.sites import ScaleSite
from cptv_ao.evaluation.calibration import Calibration
from cptv_ao.search.budget import Budget
from cptv_ao.search.proposals.bias_correction import BiasCorrector
from cptv_ao.search.proposals.confirmed_descent import ConfirmedDescent
from cptv_ao.search.proposals.gradient import State
from cptv_ao.search.proposals.initial_scales import Meanwhile, Proposal
from cptv_ao.search.proposals.population import Population
from cptv_ao.search.proposals.saturation_limits import SaturationLimits
from cptv_ao.search.proposals.searched_scales import SearchedScales
from cptv_ao.search.proposals.step_images import StepImages
from cptv_ao.simulation.twin import Twin

# Images of one step of the descent: larger batches of the loader are cut, and further where a forward of an image is
# dear, to where a step costs so many floating point operations forward; on a GPU to half of the most, which is as good
# in less time and memory. Losses that compare images stay at the most.
_STEP_IMAGES, _STEP_IMAGES_ON_GPU, _STEP_LEAST, _STEP_FLOPS = 100, 50, 2, 2.5e10


class Proposer:
    """Yields proposals for the whole model; each starts from what the loop left in the model before.

    Args:
        backend: of the model.
        store: what is searched: that, or a simulation of it. Which sites the kernels saturate on is found on the
            kernels all the same, once: what they cannot add up would be rejected.
        groups: the tied groups that are searched, by the name of their leader.
        calibration: whose search images the descent learns from.
        budget: asked before each proposal and step whether to go on.

    Raises:
        UnsupportedModelError: the model has a node that neither the float twin nor a kernel computes.
    """

    def __init__(
        self,
        backend: Backend,
        store: ScaleStore,
        groups: Mapping[str, tuple[ScaleSite, ...]],
        calibration: Calibration,
        budget: Budget,
    ) -> None:
        self._config, self._budget = calibration.config, budget
        images = _step_images(calibration)
        twin = Twin(backend).checked(calibration.search.batches[0])
        twin.reround_weights()
        if not is_cpu(self._config.device):
            images.to(self._config.device)
            twin.to(self._config.device)
        #: what is to be said of the twin that proposes
        self.twin_notes = twin.notes
        self._searched = SearchedScales(backend, store, groups, twin)
        limits = SaturationLimits(backend, twin, groups, calibration.probe, calibration.world)
        self._biases = BiasCorrector(twin, groups, images, calibration.cost)
        self._population = Population(self._searched, calibration, budget, images, limits, self._biases)
        self._descent = ConfirmedDescent(self._searched, calibration, budget, images, limits, self._biases)

    @property
    def image_forwards(self) -> int:
        """Images run through the twin so far by this rank; forward and backward count as three."""
        return self._descent.image_forwards + self._biases.image_forwards + self._population.image_forwards

    def proposals(self, on_step: Callable[[float], None], on_pause: Callable[[bool], None]) -> Iterator[Proposal]:
        """The population, then those of the descent, or where it was before `resume` what is left of these.

        Args:
            on_step: called with the loss of each step of the descent.
            on_pause: called between its steps, when `state` says where it is; with True where that is worth saving.
        """
        if not self._descent.begun:
            yield from self._population.proposals()
            if not self._config.gradient_steps or not self._budget.left:
                return
        yield from self._descent.proposals(on_step, on_pause)

    def beside_the_judge(self, on_step: Callable[[float], None]) -> Meanwhile | None:
        """What to do while the kernels judge a proposal: the descent goes on, where it is on a GPU; None: nothing.

        Without a limit of seconds it goes on for so many steps, that a search finds the same each time.
        """
        return self._descent.beside_the_judge(on_step)

    def state(self) -> State | None:
        """Where the descent is, for `resume`; None where it has not begun, or has come to its end."""
        return self._descent.state()

    def resume(self, state: State) -> None:
        """Begin in the descent, with what `state` returned for the same model, config and images.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        self._descent.resume(state)


def _step_images(calibration: Calibration) -> StepImages:
    if not is_per_image(calibration.config.loss):
        return StepImages(calibration, _STEP_IMAGES)
    if not is_cpu(calibration.config.device):
        return StepImages(calibration, _STEP_IMAGES_ON_GPU)
    most = max(_STEP_LEAST, min(_STEP_IMAGES, round(_STEP_FLOPS / calibration.cost.flops)))
    return StepImages(calibration, most, _STEP_IMAGES)
