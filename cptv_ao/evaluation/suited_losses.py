"""With what loss the outputs of a model are compared: what its graph, its float outputs and the user say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from cptv_ao.core.config import LossName, RefineConfig
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.objective import OutputKind, check_function, settled
from cptv_ao.core.output_losses import OutputLosses, OutputTerm, is_constant, measured
from cptv_ao.core.packed_outputs import HINT, PackedOutputs, told
from cptv_ao.evaluation.calibration import Images
from cptv_ao.evaluation.compared_outputs import OneOutput
from cptv_ao.fx.output_layer import Turns, end_of, output_nodes
from cptv_ao.fx.running import run

# How far the mean of logits varies between images, at most, beside what it would if they were independent numbers: the
# gradient of a softmax adds nothing to the sum of its logits. Trained ones have 0 to .35, regressions .5 to 2. Share of
# their mean by which lengths of embeddings vary, at most.
_LEVEL, _EVEN = 0.4, 0.25


def settled_outputs(
    model: GraphModule,
    teacher: nn.Module,
    images: Images,
    config: RefineConfig,
    world: World = ALONE,
    turns: Turns = lambda _: False,
) -> tuple[RefineConfig, list[str]]:
    """With what loss they are compared.

    Args:
        model: the quantized graph.
        teacher: runs on one image, for the shape of an only output.
        images: with the teacher's outputs, as `chosen_outputs` picks them.
        config: what `chosen_outputs` returned.
        world: the ranks that have run the teacher.
        turns: tells which layers of the graph only turn what they read.

    Returns:
        The config with that loss, and what is to be said of it.

    Raises:
        UnsupportedModelError: no output of several varies.
        ValueError: the loss that was asked for cannot see an output.
    """
    packing = config.output
    if not isinstance(packing, PackedOutputs):
        return settled(config, images.targets[0], _only_kind(model, teacher, images, config, turns))
    _learn(packing, images, world)
    suited = _Suited(model, packing, images.targets, config, turns)
    notes, constant, parts = list[str](), list[str](), list[OutputTerm | None]()
    for index, output in enumerate(packing.outputs):
        if is_constant(packing, index, images.targets):
            constant.append(output.name)
            parts.append(None)
            continue
        part, said = suited.part(index)
        parts.append(part)
        notes += said
    if not any(parts):
        raise UnsupportedModelError(f"every output ({told(constant)}) is the same for all images; {HINT}")
    if constant:
        notes.append(f"outputs left out, for they are the same for all images: {told(constant)}")
    losses = OutputLosses(packing, tuple(parts), config.temperature)
    if len(losses.counted) > 1:
        kinds = ", ".join(f"{part.name} {part.loss_name}" for part in losses.counted)
        notes.append(f"loss: the mean of {kinds}, each as a share of what the best output loses that knows no image")
    else:  # nothing to be weighed against
        alone = tuple(None if part is None else replace(part, size=1.0) for part in parts)
        losses = OutputLosses(packing, alone, config.temperature)
    return replace(config, loss=losses), notes


class _Suited:
    """What loss suits each of several outputs.

    Args:
        targets: the teacher's outputs, packed.
    """

    def __init__(
        self,
        model: GraphModule,
        packing: PackedOutputs,
        targets: Sequence[Tensor],
        config: RefineConfig,
        turns: Turns,
    ) -> None:
        self._model, self._packing, self._targets, self._config, self._turns = model, packing, targets, config, turns
        self._nodes = {} if packing.pick is not None else output_nodes(model)

    def part(self, index: int) -> tuple[OutputTerm, list[str]]:
        """How an output counts, and what is to be said of it.

        Raises:
            ValueError: the loss that was asked for cannot see it.
        """
        config, output = self._config, self._packing.outputs[index]
        own = self._packing.columns(self._targets[0])[index].of(self._targets[0])
        by_name = isinstance(config.loss, Mapping)
        asked = config.loss.get(output.name) or "auto" if isinstance(config.loss, Mapping) else config.loss
        followed, notes = True, list[str]()
        if not isinstance(asked, str):
            said = check_function(replace(config, loss=asked), own)
            followed, notes = not said, [f"output {output.name}: {one}" for one in said]
        elif asked == "auto":
            asked = self._auto(index)
        elif own.shape[1] == 1 and asked != "mse":
            if by_name:
                settled(replace(config, loss=asked), own)
            notes = [f"output {output.name}: mse, for it is one number per image, which {asked} cannot see"]
            asked = "mse"
        part = OutputTerm(output.name, asked, followed=followed)
        size, variance = measured(part, self._packing, index, self._targets, config.temperature)
        return replace(part, size=size, variance=variance), notes

    def _auto(self, index: int) -> LossName:
        columns = self._packing.columns(self._targets[0])[index]
        if columns.stop - columns.start > columns.channels * columns.rows or columns.channels == 1:
            return "mse"
        rows = torch.cat([self._packing.columns(t)[index].of(t) for t in self._targets]).double()
        several = len(self._packing.outputs) > 1
        if self._packing.pick is not None:  # of any node
            return "kl" if not several or _is_level(rows) else "mse"
        end = end_of(self._model, self._node(index), self._turns)
        if end == "layer":
            return "kl" if not several or _is_level(rows) else "mse"
        lengths = rows.norm(dim=1)
        even = float(lengths.std(correction=0)) <= _EVEN * float(lengths.mean())
        return "cosine" if not several or (end == "other" and even) else "mse"

    def _node(self, index: int) -> Node | None:
        output = self._packing.outputs[index]
        return _named(self._nodes, output.name, output.index)


def _is_level(rows: Tensor) -> bool:
    """Whether numbers (N, C) are logits that a softmax was trained on: their mean hardly varies beside themselves."""
    if float(rows.logsumexp(1).abs().max()) < 1e-3:  # logarithms of probabilities
        return True
    independent = float(rows.var(0, correction=0).mean()) / rows.shape[1]
    return float(rows.mean(1).var(correction=0)) <= _LEVEL * independent


def _learn(packing: PackedOutputs, images: Images, world: World) -> None:
    """The columns of batches that other ranks have run."""
    if world.size == 1:
        return
    mine = [packing.table(t).float() if world.mine(i) else None for i, t in enumerate(images.targets)]
    for table in world.share(mine):
        packing.learn_table(table)


def compares_classes(model: GraphModule, config: RefineConfig, turns: Turns) -> bool:
    """Whether the loss that is used will most likely be that of a softmax, as the graph and the user say, before the
    teacher has run.

    Args:
        model, config, turns: as for `settled_outputs`.
    """
    if config.loss != "auto":
        return config.loss == "kl"
    return not isinstance(config.output, PackedOutputs) and _is_of_layer(model, config, turns)


def _only_kind(
    model: GraphModule, teacher: nn.Module, images: Images, config: RefineConfig, turns: Turns
) -> OutputKind:
    """Of the only output; asked only where a loss has to be chosen."""
    if config.loss != "auto":
        return "logits"
    with torch.no_grad():
        output = config.select(run(teacher, images.batches[0].few(1), 0))
    if output.dim() > 2 and output.flatten(1).shape[1] > output.shape[1]:
        return "map"
    return "logits" if _is_of_layer(model, config, turns) else "embedding"


def _is_of_layer(model: GraphModule, config: RefineConfig, turns: Turns) -> bool:
    """Whether the only output comes out of a layer with a weight that does more than turn it."""
    nodes, only = output_nodes(model), config.output
    if only is None:
        node = next(iter(nodes.values()), None)
    elif isinstance(only, OneOutput) and only.pick is None:
        node = _named(nodes, only.name, only.index)
    else:
        return True  # what the user's own function picks may be of any node
    return end_of(model, node, turns) == "layer"


def _named(nodes: Mapping[str, Node], name: str, index: int) -> Node | None:
    """The node of an output, by its name, or where a graph has other names, by its place."""
    held = list(nodes.values())
    return nodes[name] if name in nodes else held[index] if index < len(held) else None
