"""Where a search takes place: on the kernels of the model, or on its float twin with the kernels as the judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.formatting import number
from cptv_ao.core.outcome import Losses, Outcome, Status
from cptv_ao.core.sites import ScaleSite
from cptv_ao.evaluation.calibration import Calibration, on_device
from cptv_ao.evaluation.scoring import Shipped, SplitEvaluators, check_losses
from cptv_ao.search.baseline import Baseline, equalized_baseline
from cptv_ao.search.budget import Budget
from cptv_ao.search.proposals.proposer import Proposer
from cptv_ao.search.proposals.simulated import SimulatedProposer
from cptv_ao.simulation.simulated_backend import SimulatedBackend


class KernelTarget:
    """The kernels of a model: what is searched is what ships.

    Args:
        backend: of the model, which gets an equivalent form where it has one.
        kernels: scores the model that was given.
        calibration: as for `SplitEvaluators`.
        equalize: whether to look for an equivalent form.

    Attributes:
        store: what the search writes its candidates into.
        scoring: what it scores them with.
    """

    def __init__(self, backend: Backend, kernels: SplitEvaluators, calibration: Calibration, equalize: bool) -> None:
        self.store: ScaleStore = backend
        self._backend, self._calibration = backend, calibration
        accept_on = calibration.config.accept_on
        self._judge = kernels if accept_on is None else Shipped(backend.model, accept_on, calibration)
        self._scorings: list[SplitEvaluators] = []
        self._search_with(kernels)
        self._form: Baseline | None = None
        if equalize and (found := equalized_baseline(backend, self._judge, calibration)):
            self._form, scoring = found
            self._judge = scoring if accept_on is None else self._judge
            self._search_with(scoring)

    def _search_with(self, scoring: SplitEvaluators) -> None:
        self.scoring = scoring
        self._scorings.append(scoring)

    @property
    def given(self) -> Baseline | None:
        """The model that was given, where the search starts from another form of it, with losses like the search's."""
        return self._form

    @property
    def image_forwards(self) -> int:
        """Images scored so far by this rank."""
        return sum(scoring.image_forwards for scoring in self._scorings)

    def proposer(self, groups: Mapping[str, tuple[ScaleSite, ...]], budget: Budget) -> Proposer:
        """Proposals for the whole model.

        Raises:
            UnsupportedModelError: the float twin does not know an op of it.
        """
        return Proposer(self._backend, groups, self._calibration, budget)

    def judged(self, found: Outcome) -> Outcome:
        """What the search has made of the model that ships."""
        form = self._form
        return found if form is None or found.after == form.losses else replace(found, notes=found.notes + form.done)


class SimulationTarget(KernelTarget):
    """The float twin of a model, on any device: what is found there ships where the kernels find it no worse."""

    def __init__(self, backend: Backend, kernels: SplitEvaluators, calibration: Calibration, equalize: bool) -> None:
        super().__init__(backend, kernels, calibration, equalize)
        self._shipping = backend
        simulated = SimulatedBackend(backend, calibration.config.device)
        self._simulated = simulated.checked(calibration.search.batches[0])
        self.store = self._simulated
        search, holdout = (on_device(self._simulated, part) for part in (calibration.search, calibration.holdout))
        self._search_with(SplitEvaluators(self._simulated.model, replace(calibration, search=search, holdout=holdout)))
        self._before = check_losses(self._judge.losses())

    @property
    def given(self) -> None:
        """None: the losses of the model that was given are those of what ships, none of the twin's."""
        return None

    def proposer(self, groups: Mapping[str, tuple[ScaleSite, ...]], budget: Budget) -> Proposer:
        return SimulatedProposer(self._simulated, self._shipping, groups, self._calibration, budget)

    def judged(self, found: Outcome) -> Outcome:
        report = confirmed(found, self._simulated, self._shipping, self._judge, self._before)
        return super().judged(report if self._form is None else self._form.judge(report, self._shipping))


def open_target(backend: Backend, kernels: SplitEvaluators, calibration: Calibration, equalize: bool) -> KernelTarget:
    """Where this config searches this model; arguments as for `KernelTarget`.

    Raises:
        ValueError: `accept_on` where the kernels that are searched accept.
    """
    config = calibration.config
    if config.score_on == "simulation" or backend.form.simulates_itself:
        return SimulationTarget(backend, kernels, calibration, equalize)
    if config.accept_on is not None:
        raise ValueError("accept_on: a search on the kernels is accepted there; add score_on='simulation'")
    return KernelTarget(backend, kernels, calibration, equalize)


def confirmed(
    found: Outcome, simulated: SimulatedBackend, backend: Backend, judge: SplitEvaluators | Shipped, before: Losses
) -> Outcome:
    """Write what was found into the lowered model, and keep it if its own kernels find it no worse on both sets.

    Args:
        found: what the search on the twin reports.
        judge, before: gives the losses of the lowered model that count, and those before the search.

    Returns:
        The report of what ships: before and after are losses of the kernels. Where they are worse, the model has the
        scales from before again.
    """
    losses = number(found.before.search), number(found.after.search)
    told = f"searched on the simulation, whose loss went from {losses[0]} to {losses[1]}"
    if not found.moves:
        return replace(found, before=before, after=before, notes=(*found.notes, told))
    given = backend.snapshot()
    simulated.commit()
    after = judge.losses()
    if not after.worse_than(before):
        return replace(found, before=before, after=after, notes=(*found.notes, told + "; the kernels confirm it"))
    backend.restore_all(given)
    held_out = (
        f", held-out {number(before.holdout)} to {number(after.holdout)}" if before.holdout and after.holdout else ""
    )
    told += f"; rejected: on the kernels it went from {number(before.search)} to {number(after.search)}{held_out}"
    notes = (*found.notes, told + "; the default score_on='kernels' searches there")
    return replace(found, status=Status.REJECTED, before=before, after=before, moves=(), notes=notes)
