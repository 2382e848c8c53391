"""Which outputs of a model are compared: every floating one that has rows for the images, or those asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.output_tree import WHOLE, named_tensors
from cptv_ao.core.packed_outputs import HINT, ComparedOutput, PackedOutputs, told
from cptv_ao.core.tensors import first_floating
from cptv_ao.evaluation.float_runs import FloatRuns
from cptv_ao.fx.running import run

# Share of `cache_bytes` that the teacher's outputs on all images may hold; share of the places of maps and sequences
# that are compared at least.
_HELD_SHARE, _LEAST_SHARE = 0.5, 0.01
# Images on which, and on twice as many, it is seen what rows an output has.
_FEW = 2


@dataclass(frozen=True)
class _Seen:
    """A tensor that the float network returns: for few images and for twice as many, or for a batch that is not cut."""

    name: str
    index: int
    few: Tensor
    twice: Tensor | None
    images: int

    @property
    def rows(self) -> int:
        """For each image; 0 where it has none."""
        count = len(self.few) if self.few.dim() and self.few.numel() else 0
        if count % self.images:
            return 0
        alike = self.twice is None or self.twice.shape == (2 * count, *self.few.shape[1:])
        return count // self.images if alike else 0

    @property
    def left_out(self) -> str:
        """Why it cannot be compared; nothing where it can."""
        if not self.few.is_floating_point():
            return str(self.few.dtype).removeprefix("torch.")
        if self.few.layout is not torch.strided:
            return "not dense"
        if not self.few.dim():
            return "one number for the whole batch"
        if not self.few.numel():
            return "empty"
        if self.rows:
            return ""
        shapes = str(tuple(self.few.shape))
        if self.twice is not None and self.twice.shape != self.few.shape:
            shapes += f", {tuple(self.twice.shape)} for twice as many images"
        return f"no row for each image, shape {shapes}"

    @property
    def depends(self) -> bool:
        """Whether its size depends on what the images show, not on their number."""
        if self.twice is None or not self.few.is_floating_point() or not self.few.dim():
            return False
        steps = zip(self.few.shape, self.twice.shape, strict=False)
        return self.few.dim() != self.twice.dim() or any(b not in (a, 2 * a) for a, b in steps)


def chosen_outputs(
    model: nn.Module, teacher: FloatRuns, batches: Sequence[Batch], config: RefineConfig
) -> tuple[RefineConfig, list[Batch], list[str]]:
    """Which outputs are compared.

    Args:
        model: the quantized one; runs on one image where the teacher returns more than one tensor.
        teacher: runs the float model, on a few images and on twice as many.
        batches: as they were counted.
        config: as it was given.

    Returns:
        The config, whose `select` gives one tensor; the batches; and what is to be said.

    Raises:
        UnsupportedModelError: the size of an output depends on what the images show.
        ValueError: the config names an output that is not there, or cannot be compared.
    """
    batch = next((batch for batch in batches if batch.images > 1), batches[0])
    seen = _seen(teacher, batch, config)
    left = {one.name: one.left_out for one in seen if one.left_out}
    left |= {one.name: "only the float network returns it" for one in _missing(seen, model, batch, config)}
    _check_names(config, _names(seen), left)
    floating = [one for one in seen if one.few.is_floating_point() and _is_asked(one.name, config)]
    if len(floating) > 1 and (depending := next((one for one in floating if one.depends), None)):
        raise UnsupportedModelError(_depending(depending))
    wanted = [one for one in floating if one.name not in left]
    if not wanted and isinstance(config.loss, Mapping):
        raise ValueError(f"RefineConfig.loss: expected at least one output that counts among {told(_names(seen))}")
    if not wanted:
        return replace(config, output=config.pick), list(batches), []  # what cannot be compared is told there
    notes = [f"outputs left out: {', '.join(f'{name} ({why})' for name, why in left.items())}"] if left else []
    share = _share(wanted, config, sum(batch.images for batch in batches))
    if len(wanted) == 1 and share == 1 and not _is_by_place(wanted[0], config):
        return replace(config, output=_alone(wanted[0], seen, config)), list(batches), notes
    if share < 1:
        notes.append(
            f"{share:.0%} of the places of maps and sequences are compared, the same of each image: all of them would "
            f"hold more than {_HELD_SHARE:.0%} of cache_bytes"
        )
    packed = PackedOutputs([ComparedOutput(one.name, one.index, one.rows) for one in wanted], config.pick, share)
    return replace(config, output=packed), [replace(batch, per_image=1) for batch in batches], notes


class OneOutput:
    """Picks one tensor of what a model returns."""

    def __init__(self, pick: Callable[[Any], Any] | None, name: str, index: int) -> None:
        self.pick, self.name, self.index = pick, name, index

    def __call__(self, output: Any) -> Tensor:
        output = output if self.pick is None else self.pick(output)
        tensors = named_tensors(output)
        if self.name in tensors:
            return tensors[self.name]
        held = list(tensors.values())
        return held[self.index] if self.index < len(held) else first_floating(output)


def _seen(teacher: FloatRuns, batch: Batch, config: RefineConfig) -> list[_Seen]:
    count = min(_FEW, max(1, batch.images // 2))
    few, cut = batch.few(count), not batch.fixed and batch.images > 1
    first = _tensors(config, teacher(few, 0))
    twice = _tensors(config, teacher(batch.few(2 * count), 0)) if cut else None
    if twice is not None and first.keys() != twice.keys():
        raise UnsupportedModelError(
            f"expected the same outputs for any images, got {told(first)} for {count} of them and {told(twice)} for "
            f"{2 * count}; {HINT}"
        )
    return [
        _Seen(name, index, tensor, None if twice is None else twice[name], few.images)
        for index, (name, tensor) in enumerate(first.items())
    ]


def _missing(seen: Sequence[_Seen], model: nn.Module, batch: Batch, config: RefineConfig) -> list[_Seen]:
    """What a quantized model does not return: its own tensors have the same names, or others in the same order."""
    if len(seen) < 2:
        return []
    with torch.no_grad():
        own = _tensors(config, run(model, batch.few(1), 0))
    by_name = any(one.name in own for one in seen)
    return [one for one in seen if (one.name not in own if by_name else one.index >= len(own))]


def _tensors(config: RefineConfig, output: Any) -> dict[str, Tensor]:
    return named_tensors(output if config.pick is None else config.pick(output))


def _names(seen: Sequence[_Seen]) -> list[str]:
    return [one.name for one in seen]


def _is_asked(name: str, config: RefineConfig) -> bool:
    if isinstance(config.loss, Mapping) and config.loss.get(name, "auto") is None:
        return False
    names = (config.output,) if isinstance(config.output, str) else config.output
    return name in names if isinstance(names, tuple) else True


def _is_by_place(only: _Seen, config: RefineConfig) -> bool:
    """Whether its loss is asked for by its name, or would take all places of a map for one choice."""
    return isinstance(config.loss, Mapping) or (only.few.dim() > 2 and config.loss in ("kl", "cosine"))


def _alone(only: _Seen, seen: Sequence[_Seen], config: RefineConfig) -> Callable[[Any], Tensor] | None:
    """What picks the only output; None: it is all that there is."""
    return config.pick if _names(seen) == [WHOLE] else OneOutput(config.pick, only.name, only.index)


def _check_names(config: RefineConfig, names: Sequence[str], left: Mapping[str, str]) -> None:
    asked = {"loss": tuple(config.loss) if isinstance(config.loss, Mapping) else ()}
    if isinstance(config.output, (str, tuple)):
        asked["output"] = (config.output,) if isinstance(config.output, str) else config.output
    for setting, wanted in asked.items():
        for name in wanted:
            if name not in names:
                raise ValueError(f"RefineConfig.{setting}: expected outputs among {told(names)}, got {name!r}")
            if name in left and setting == "output":
                raise ValueError(f"RefineConfig.{setting}: output {name!r} cannot be compared: {left[name]}")


def _depending(output: _Seen) -> str:
    twice = output.few if output.twice is None else output.twice
    return (
        f"output {output.name!r}: expected a size that does not depend on what the images show, got "
        f"{tuple(output.few.shape)} and {tuple(twice.shape)} for {output.images} and {2 * output.images} images; {HINT}"
    )


def _share(wanted: Sequence[_Seen], config: RefineConfig, images: int) -> float:
    """Of the places of maps and sequences, that may be held for all images."""
    numbers = [(one.few.numel() // one.images, one.few.dim() > 2) for one in wanted]
    total, mapped = sum(n for n, _ in numbers), sum(n for n, is_map in numbers if is_map)
    most = _HELD_SHARE * config.cache_bytes / (4 * images)
    if total <= most or not mapped or not config.cache_bytes:
        return 1.0
    return max((most - total + mapped) / mapped, _LEAST_SHARE)
