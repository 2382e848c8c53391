"""How much of the output loss each block causes: what the loss does once the block is in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.blocks import Block
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.losses import get_exact_loss
from cptv_ao.core.progress import Advance
from cptv_ao.core.tensors import compared
from cptv_ao.evaluation.calibration import Calibration, Images, on_device
from cptv_ao.evaluation.evaluator import Evaluator
from cptv_ao.evaluation.scoring import SplitEvaluators
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.simulation.simulated_backend import SimulatedBackend

# Sites that are tried one by one: those of the blocks with the largest shares.
_SITES = 32


@dataclass
class Attribution:
    """Losses without each block and site, and what they are compared with.

    Attributes:
        whole: the loss with everything quantized.
        least: that of the teacher against itself, which nothing can go below.
        floor: that with every site in float; None where it could not be found out.
        blocks, sites: by name, the loss without it and the share of `whole` (less `least`) that goes away.
    """

    whole: float
    least: float
    floor: float | None = None
    blocks: dict[str, tuple[float, float]] = field(default_factory=dict)
    sites: dict[str, float] = field(default_factory=dict)

    def share(self, gone: float) -> float:
        """A difference of losses as a share of the loss; 0 where there is no loss."""
        excess = self.whole - self.least
        return gone / excess if excess > 0 else 0.0


def causes_on_twin(
    simulated: SimulatedBackend,
    images: Images,
    blocks: Sequence[Block],
    config: RefineConfig,
    least: float,
    advance: Advance,
) -> Attribution:
    """Each block in float on the twin, all others as they are; then one by one the sites of the worst blocks.

    Raises:
        UnsupportedModelError: the twin does not know an op.
    """
    twin = simulated.twin
    evaluator = SplitEvaluators(simulated.model, Calibration(config, on_device(simulated, images))).search
    known, there = set(twin.names), {node.name for node in twin.module.graph.nodes}
    own = {block.name: [site for site in block.sites if site.name in known] for block in blocks}
    nodes = {name: [n for site in sites for n in site.nodes if n in there] for name, sites in own.items()}
    causes = Attribution(evaluator.score(), least)
    with twin.in_float(twin.names):
        causes.floor = evaluator.score()
    evaluator.plan(part for part in nodes.values() if part)
    for name, sites in own.items():
        without = causes.whole
        if nodes[name]:
            evaluator.enter(nodes[name])
            without = _without(evaluator, simulated, [site.name for site in sites])
        causes.blocks[name] = without, causes.share(causes.whole - without)
        advance(name)
    left = _SITES
    for name in sorted(own, key=lambda name: -causes.blocks[name][1]):
        tried = [s for s in own[name] if s.kind == "activation" or s.name in simulated.float_weights][:left]
        if tried:
            evaluator.enter(nodes[name])
        for site in tried:
            without = _without(evaluator, simulated, [site.name])
            causes.sites[site.name] = causes.share(causes.whole - without)
            advance(site.name)
        left -= len(tried)
    evaluator.invalidate()
    return causes


def steps(blocks: Sequence[Block]) -> int:
    """How often `advance` is called, at most."""
    return len(blocks) + min(_SITES, sum(len(block.sites) for block in blocks))


def _without(evaluator: Evaluator, simulated: SimulatedBackend, names: Sequence[str]) -> float:
    with simulated.twin.in_float(names):
        return evaluator.score()


def causes_by_substitution(
    causes: Attribution,
    backend: Backend,
    outputs: Mapping[str, str],
    float_outputs: Sequence[Mapping[str, Tensor]],
    images: Images,
    config: RefineConfig,
    advance: Advance,
) -> None:
    """The float model's output of a block in place of the kernels', so that this block and all before it are in float.

    What a block adds to that is its share; these shares add up to 1 over all blocks but the last ones.

    Args:
        causes: given the blocks; its whole loss is that of the model on its kernels.
        outputs: the node of each block's output, blocks in graph order.
        float_outputs: the float model's tensors per batch, by block, in the shape of these nodes.
    """
    select, loss = config.select, get_exact_loss(config.loss, config.temperature)
    before = causes.whole
    for name, node in outputs.items():
        advance(name)
        if not all(name in found for found in float_outputs):
            continue
        total = 0.0
        for batch, target, found in zip(images.batches, images.targets, float_outputs, strict=True):
            output = Watcher(backend.model).watch(batch, partial(_substituted, node, found[name]))
            total += float(loss(compared(output, select), target)) * batch.images
        without = total / sum(batch.images for batch in images.batches)
        causes.blocks[name] = without, causes.share(before - without)
        before = without


def _substituted(name: str, float_value: Tensor, node: Node, value: Any) -> Any:
    if node.name != name:
        return value
    if value.is_quantized:
        return torch.quantize_per_tensor(float_value, value.q_scale(), value.q_zero_point(), value.dtype)
    return float_value
