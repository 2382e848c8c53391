"""Several outputs of a model as one tensor (N, numbers of all): what is searched sees one, losses see each again.

{"logits": (N, 10), "mask": (N, 3, 8, 8)}     (N, 10 + 192)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.errors import FloatModelMismatchError, UnsupportedModelError
from cptv_ao.core.formatting import some
from cptv_ao.core.output_tree import named_tensors

#: What to do about an output that cannot be compared as it is.
HINT = "say what is compared with RefineConfig(output=...): a name, names, or a function of what the model returns"


@dataclass(frozen=True)
class ComparedOutput:
    """One output that counts.

    Attributes:
        name: as of `named_tensors`.
        index: which of the tensors it is, where a model has other names for them.
        rows: that it has for each image.
    """

    name: str
    index: int
    rows: int


@dataclass(frozen=True)
class Columns:
    """Where the numbers of one output stand in a row of the packed ones, and what they are.

    Attributes:
        start, stop: the columns.
        rows: of the output for each image.
        channels: numbers of each place.
        channels_first: whether all places of a channel follow one another (maps), or all channels of a place.
    """

    start: int
    stop: int
    rows: int
    channels: int
    channels_first: bool

    def of(self, packed: Tensor) -> Tensor:
        """The output as (N, C): more dimensions one after another."""
        return packed[:, self.start : self.stop].reshape(len(packed) * self.rows, -1)

    def places(self, packed: Tensor) -> Tensor:
        """The output with a row for each place: (N, C), (N * T, C) of tokens, (N * H * W, C) of maps."""
        own = packed[:, self.start : self.stop]
        if self.channels_first:
            return own.reshape(len(packed) * self.rows, self.channels, -1).transpose(1, 2).reshape(-1, self.channels)
        return own.reshape(-1, self.channels)

    def everywhere(self, value: Tensor, like: Tensor) -> Tensor:
        """Packed outputs that have a value of each channel (C,) at each place here."""
        own = like[:, self.start : self.stop].reshape(len(like) * self.rows, -1)
        spread = value[:, None] if self.channels_first else value[None]
        places = own.shape[1] // self.channels
        shape = (self.channels, places) if self.channels_first else (places, self.channels)
        packed = like.clone()
        packed[:, self.start : self.stop] = spread.expand(shape).reshape(1, -1).repeat(1, self.rows)
        return packed


class PackedOutputs:
    """Picks outputs of a model and packs them.

    Of maps and sequences that are too large to be held for all images a share of the places is compared: drawn once,
    the same ones of each image.

    Args:
        outputs: that count.
        pick: gives what they are looked up in; None: what the model returns.
        share: of the places of maps and sequences that are compared.
    """

    def __init__(
        self, outputs: Sequence[ComparedOutput], pick: Callable[[Any], Any] | None = None, share: float = 1.0
    ) -> None:
        self.outputs, self.pick, self.share = tuple(outputs), pick, share
        self._known: dict[int, tuple[Columns, ...]] = {}
        self._drawn: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, output: Any) -> Tensor:
        """Packed in float32, (N, numbers of all); differentiable.

        Raises:
            FloatModelMismatchError: what a model returns lacks an output.
            UnsupportedModelError: an output has not as many rows for each image as it should.
        """
        found = self._found(named_tensors(output if self.pick is None else self.pick(output)))
        images = len(found[0]) // self.outputs[0].rows
        rows, columns, start = [], [], 0
        for compared, tensor in zip(self.outputs, found, strict=True):
            if tensor.dim() == 0 or len(tensor) != images * compared.rows:
                raise UnsupportedModelError(
                    f"output {compared.name!r}: expected {compared.rows} rows for each of {images} images, got a "
                    f"tensor of shape {tuple(tensor.shape)}, whose size depends on what the images show; {HINT}"
                )
            values, channels, first = self._values(tensor)
            rows.append(values.reshape(images, -1))
            columns.append(Columns(start, start + rows[-1].shape[1], compared.rows, channels, first))
            start += rows[-1].shape[1]
        self.learn(tuple(columns))
        return torch.cat(rows, 1)

    def columns(self, packed: Tensor) -> tuple[Columns, ...]:
        """Where each output stands in packed ones (N, numbers of all)."""
        return self._known[packed.shape[1]]

    def learn(self, columns: tuple[Columns, ...]) -> None:
        """Remember where outputs stand in rows of this length: batches may have outputs of their own size."""
        if self._known.setdefault(columns[-1].stop, columns) != columns:
            names = some([repr(output.name) for output in self.outputs])
            raise UnsupportedModelError(
                f"the outputs {names} are of other shapes for some batches, and of as many numbers together; give "
                "images of one size"
            )

    def told(self, packed: Tensor) -> str:
        """The outputs among packed ones and their shapes, in words."""
        pairs = zip(self.outputs, self.columns(packed), strict=True)
        return ", ".join(f"{output.name!r} {tuple(columns.of(packed).shape)}" for output, columns in pairs)

    def table(self, packed: Tensor) -> Tensor:
        """What is known of the columns of packed outputs as numbers, for ranks that have not run the batch."""
        return torch.tensor([[c.stop, c.rows, c.channels, c.channels_first] for c in self.columns(packed)])

    def learn_table(self, table: Tensor) -> None:
        """The same from another rank."""
        start, columns = 0, []
        for stop, rows, channels, first in table.long().tolist():
            columns.append(Columns(start, stop, rows, channels, bool(first)))
            start = stop
        self.learn(tuple(columns))

    def _found(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        if all(output.name in tensors for output in self.outputs):
            found = [tensors[output.name] for output in self.outputs]
        else:
            held = list(tensors.values())
            if any(output.index >= len(held) for output in self.outputs):
                wanted = told([output.name for output in self.outputs])
                raise FloatModelMismatchError(
                    f"expected outputs {wanted}, as the float network returns, got {told(tensors)}; {HINT}"
                )
            found = [held[output.index] for output in self.outputs]
        return [tensor.dequantize() if tensor.is_quantized else tensor for tensor in found]

    def _values(self, tensor: Tensor) -> tuple[Tensor, int, bool]:
        """An output in float32, with the places that are compared; its channels, and whether these come first."""
        tensor = tensor.float()
        if tensor.dim() < 3:
            return tensor, math.prod(tensor.shape[1:]), False
        first = tensor.dim() > 3
        places = tensor.flatten(2) if first else tensor
        dim = 2 if first else 1
        if self.share < 1:
            places = places.index_select(dim, self._places(places.shape[dim], tensor.device))
        return places, places.shape[1 if first else 2], first

    def _places(self, count: int, device: torch.device) -> Tensor:
        if (count, device) not in self._drawn:
            kept = max(1, round(self.share * count))
            with torch.inference_mode(False):  # a descent goes through it, too
                order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
                self._drawn[count, device] = order[:kept].sort().values.to(device)
        return self._drawn[count, device]


def parts_of(select: Callable[[Any], Tensor], output: Tensor) -> list[slice]:
    """The columns of each output in what was picked (N, C); of a single one all."""
    if not isinstance(select, PackedOutputs):
        return [slice(None)]
    return [slice(columns.start, columns.stop) for columns in select.columns(output)]


def not_finite(select: Callable[[Any], Tensor], output: Tensor) -> str:
    """Which of the outputs that were picked hold NaN or inf; nothing where none does.

    Args:
        select: has picked them.
        output: the tensor (N, C).
    """
    finite = torch.isfinite(output)
    if bool(finite.all()):
        return ""
    if not isinstance(select, PackedOutputs):
        return "output"
    pairs = zip(select.outputs, parts_of(select, output), strict=True)
    return f"output {told([one.name for one, part in pairs if not bool(finite[:, part].all())])}"


def told(names: Mapping[str, Any] | Sequence[str]) -> str:
    """Names of outputs in words."""
    return some([repr(name) for name in names], 12) or "none"
