"""The verb: `refine(model, calib_loader)`. Orchestration only; each step lives in a room of its own."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.backends.open import OpenedModel
from cptv_ao.backends.rollback import restored_on_error
from cptv_ao.core.batches import Batch
from cptv_ao.core.blocks import find_blocks
from cptv_ao.core.config import RefineConfig, given_config
from cptv_ao.core.contexts import eval_mode, plain_torch, stop_on_interrupt
from cptv_ao.core.distributed import World
from cptv_ao.core.errors import CptvWarning, UnsupportedModelError
from cptv_ao.core.events import Callback
from cptv_ao.core.formatting import some
from cptv_ao.core.identity import Identity
from cptv_ao.core.loader import read_batches
from cptv_ao.core.outcome import Outcome
from cptv_ao.core.progress import progress_bar
from cptv_ao.evaluation.inductor import fused_by_inductor
from cptv_ao.evaluation.output_scores import OutputScores
from cptv_ao.evaluation.scoring import SplitEvaluators, check_losses
from cptv_ao.evaluation.teacher import FloatSources
from cptv_ao.fx.running import unwrapped
from cptv_ao.reporting.report import put_on
from cptv_ao.reporting.saving_notes import saving_notes
from cptv_ao.search.baseline import equalized_baseline
from cptv_ao.search.budget import Budget
from cptv_ao.search.checkpoint import Checkpoint, check_path
from cptv_ao.search.fingerprint import fingerprint
from cptv_ao.search.loop import Loop
from cptv_ao.search.outcome import outcome_of, unsearched
from cptv_ao.search.progress import SearchProgress, bar_total
from cptv_ao.search.proposals.proposer import Proposer
from cptv_ao.search.run import Search
from cptv_ao.search.search_space import SearchSpace
from cptv_ao.search.target import KernelTarget, is_exact, open_target, verdict_of
from cptv_ao.simulation.twin import FEW
from cptv_ao.transforms.returned_norms import ReturnedNorms, returned_norms
from cptv_ao.verbs.calibrated import calibrated
from cptv_ao.verbs.judged import judged, told_seconds


@dataclass(frozen=True)
class _Asked:
    """How a refine searches, who is told, and where it is saved."""

    config: RefineConfig
    world: World
    budget: Budget
    listeners: tuple[Callback, ...]
    progress: bool
    checkpoint: str | os.PathLike[str] | None


def refine(
    model: GraphModule,
    calib_loader: Iterable[Any],
    *,
    float_model: nn.Module | None = None,
    config: RefineConfig | None = None,
    callback: Callback | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    inplace: bool = True,
) -> GraphModule:
    """Search better scales for a converted model and write them into it (CPT-V, arXiv 2211.09643).

    The input model is candidate 0: what is returned has a loss that is not higher, on the search images and on
    held-out calibration images. On any exception the model is exactly as it was given. Tensors that change are replaced
    in the model, not written, since other models may hold them, too. The first Ctrl-C ends the search with the best
    scales so far, the second one raises. Autocast is off inside: all models run in their own dtypes.

    Args:
        model: what `convert_fx`, `convert_pt2e` or `convert_to_reference_fx` returned. It is written in place and
            returned. A PT2E graph is searched on its own simulation and accepted on the graph. A reference model gets
            the scales that make it lower to the very model that was searched, and where these do not round a weight
            to the code that was searched, the value of that code in its place.
        calib_loader: iterable of input tensors (N, ...), of tuples whose first item is the input, or items are the
            inputs where the model needs two or more (labels behind them are never read), or of dicts of keyword inputs:
            in these the tensors that have as many rows as the output are the images, and others (masks, positions) are
            the same for all, and those that the model does not take are left. Batches may be padded to a length of
            their own. For a graph that was exported for one number of images they are put together anew, in batches of
            as many. Iterated once, and held in memory. About 1,000 images are a good number. One without a length, or
            longer than that, is refused after 100,000 images or 4 GiB: it may have no end;
            `list(itertools.islice(calib_loader, n))` are its first n batches.
        float_model: the float model that was given to `prepare_fx` or exported, the prepared FX model, or the exported
            float one. Gives the teacher's outputs and the float weights that are re-rounded at a new scale. Without it
            the teacher is the model itself with float activations, and weights stay as they are (but for those that
            the model holds in float: a reference model, a PT2E graph that is not folded).
        config: settings; the default is the recommended one.
        callback: called with an `Event` after each step. It watches; returning `cptv_ao.STOP` ends the search with the
            best scales so far, which is all that it can decide. See `cptv_ao.callbacks`.
        progress: show a progress bar on stderr.
        checkpoint: path of a file that is written in the descent (after each of its proposals, and about once a
            minute) and after each block. If it is there already, the search goes on from it, and ends with the very
            scales of one that was not interrupted (with `max_seconds` it goes on, but what fits into a time differs).
            It stays when the search is over.
        inplace: write into `model`; False refines and returns a copy.

    Returns:
        The refined model; `cptv_ao.report(model)` says what was done.

    Raises:
        UnsupportedModelError: the model is not a converted model.
        FloatModelMismatchError: `float_model` is not its float original.
        CalibrationDataError: the loader is empty, has no end, or gives something that the model cannot run on.
        NonFiniteError: scales or outputs of the model are NaN or infinite.
        ScalesFileError: the checkpoint is damaged, or of another model, config or data, or its scales are not what it
            says.
        ValueError: the loss that was asked for cannot see the model's output, or there is no such `config.device`.
        OSError: the checkpoint cannot be written. One that cannot be written at all is refused before any work; where
            a disk fills up on the way, what was saved before is whole, and the next call goes on from it.

    Example:
        >>> quantized = convert_fx(prepared)                                          # doctest: +SKIP
        >>> quantized = cptv_ao.refine(quantized, calib_loader, float_model=model)    # doctest: +SKIP
        >>> print(cptv_ao.report(quantized))                                          # doctest: +SKIP
    """
    config = given_config(config)
    float_model = unwrapped(float_model)
    with World.of(config.distributed) as world, plain_torch():
        budget = Budget(config.max_evaluations, config.max_seconds, world)  # its seconds count from here
        if checkpoint is not None and world.rank == 0:
            check_path(checkpoint)
        opened = OpenedModel.of(model if inplace else copy.deepcopy(model), float_model, config)
        sources, given, searched = FloatSources.of(opened, float_model), opened.given, opened.backend.model
        listeners = (callback,) if callback is not None and world.rank == 0 else ()
        asked = _Asked(_allowed(config, opened), world, budget, listeners, progress and world.rank == 0, checkpoint)
        with (
            eval_mode(searched, float_model),
            returned_norms(searched) as norms,
            restored_on_error(given, opened.backend),
        ):
            batches = read_batches(calib_loader, opened.backend.form.intake(searched))
            report = _refine(opened.backend, batches, sources, asked, norms)
            if report.moves:
                opened.commit()
            opened.backend.weights.biases.remember()
            put_on(given, replace(report, notes=(*report.notes, *norms.notes, *saving_notes(given))))
            world.same("the end of the search", b"")  # from here on nothing fails: all ranks keep what was found
    return given


def _refine(
    backend: Backend, batches: list[Batch], sources: FloatSources, asked: _Asked, norms: ReturnedNorms
) -> Outcome:
    """The method: what is known of the model, what it is scored on, where it is searched, the search, the verdict."""
    config, budget = asked.config, asked.budget
    blocks = len(find_blocks(backend.sites.values(), config.blocks))
    unit = "step" if config.max_seconds is None else "s"
    with progress_bar("refine", bar_total(config, blocks), asked.progress, unit) as bar:
        progress = SearchProgress(bar, budget)
        unknown = _attach_weights(backend, sources)
        checkpoint = _checkpoint(backend, batches, sources, asked)
        progress.stage("outputs of the float network")
        planned = None if checkpoint is None else checkpoint.image_seconds
        calibration, own, told = calibrated(backend, batches, sources, config, asked.world, planned)
        short = progress.begun(calibration, sum(batch.images for batch in batches))

        # Another form rounds its weights anew, as they were not trained (QAT).
        equalizes = config.equalize and config.searches_all and not backend.weights.trained
        if equalizes:
            norms.open(backend, calibration.probe.few(FEW), asked.world)
        config, given = calibration.config, {name: backend.read(name) for name in backend.sites}
        progress.stage("losses of the model as it was given")
        kernels = SplitEvaluators(backend.model, calibration)
        told += fused_by_inductor(backend.model, config.accept_on)
        notes, before = [*_unknown(backend), *unknown, *told], backend.snapshot()
        verdict = verdict_of(backend, kernels, calibration, budget)
        scores = OutputScores(backend.model, kernels, verdict.shipped, calibration)
        dear = progress.priced(calibration, verdict)
        if dear and planned is None:  # a search that was saved is not lost
            notes.append(dear)
            report = unsearched(verdict.given, len(given), calibration, asked.config.told(), notes, budget.seconds)
            return replace(report, outputs=scores.told(report))
        notes += short

        progress.stage("equal forms")
        scored = not is_exact(backend, verdict)
        form = equalized_baseline(backend, verdict.given, calibration, own, scored) if equalizes else None
        del own  # it holds all weights once more
        target = open_target(backend, kernels, form, calibration, verdict)
        space = SearchSpace.of(target.store, config)
        budget.reserve(target.verdict_seconds + told_seconds(calibration, scores))

        loop = Loop(space, target.scoring, config, budget, (*asked.listeners, progress), target.given)
        check_losses(loop.best.start)
        make_proposer = partial(_proposer, target, space, config, budget, notes)
        search = Search(loop, make_proposer, checkpoint, calibration.cost.measured)
        with stop_on_interrupt(budget.stop):
            search.run()

    found = outcome_of(loop, given, calibration, asked.config.told(), notes)
    pays = budget.pays(told_seconds(calibration, scores))
    report = judged(found, target, backend, before, calibration, pays)
    report = replace(report, outputs=scores.told(report), seconds=budget.seconds)
    forwards = target.image_forwards + scores.image_forwards + search.image_forwards
    return replace(report, image_forwards=int(asked.world.sum(torch.tensor(forwards))))


def _unknown(backend: Backend) -> list[str]:
    """What is said of nodes that nobody knows."""
    notes = [f"not understood, left alone: {node}" for node in backend.sites.unknown]
    if notes:
        warnings.warn("; ".join(notes), CptvWarning, stacklevel=4)
    return notes


def _allowed(config: RefineConfig, opened: OpenedModel) -> RefineConfig:
    """What of a config this model lets be done."""
    if not opened.keeps_form:
        return config
    return replace(config, equalize=False, population=tuple(one for one in config.population if one != "biases"))


def _attach_weights(backend: Backend, sources: FloatSources) -> list[str]:
    """The float weights from which codes are rounded anew, where they are known; what is said of constants without."""
    if sources.weights is not None:
        unknown = attach_float_weights(backend, sources.weights)
        told = "constants whose values float_model does not hold (an exported one may) stay, with all on their scale: "
        return [told + some(unknown)] if unknown else []
    warnings.warn(
        "refine without float_model: the teacher is the quantized model with float activations, and weight scales "
        "stay as they are; pass float_model= (the float or the prepared model) for the full gain",
        CptvWarning,
        stacklevel=4,
    )
    return []


def _checkpoint(backend: Backend, batches: Sequence[Batch], sources: FloatSources, asked: _Asked) -> Checkpoint | None:
    """Where the search is saved; the ranks of one search must all have been given the same."""
    path, world = asked.checkpoint, asked.world
    wanted = world.first(0.0 if path is None else 1.0)
    if world.size == 1 and not wanted:
        return None
    prints = fingerprint(backend, asked.config, batches)
    for what, value in prints.parts.items():
        world.same(f"the {what}", json.dumps(value).encode())
    if world.size > 1:
        world.same("the float model", Identity().of(None if sources.teacher is None else sources.teacher.state_dict()))
    if not wanted:
        return None
    checkpoint = Checkpoint(path or "", prints.parts, world)
    if checkpoint.found and prints.unseen and world.rank == 0:
        warnings.warn(
            f"{path}: the settings hold what cannot be compared with those of the search there "
            f"({', '.join(prints.unseen)}); it goes on as if they were the same",
            CptvWarning,
            stacklevel=4,
        )
    return checkpoint


def _proposer(
    target: KernelTarget, space: SearchSpace, config: RefineConfig, budget: Budget, notes: list[str]
) -> Proposer | None:
    """The proposals for the whole model; None, with a note, where neither the twin nor a kernel computes a node."""
    if not (config.population or config.gradient_steps) or not space.groups:
        return None
    try:
        proposer = target.proposer(space.groups, budget)
        notes += proposer.twin_notes
        return proposer
    except UnsupportedModelError as error:
        notes.append(f"no proposals from the float twin: {error}")
        return None
