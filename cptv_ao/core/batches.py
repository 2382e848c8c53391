"""Reading the calibration loader once."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cptv_ao.core.errors import CalibrationDataError, CptvWarning

# What a loader may give that does not say how much it is: beyond it, it is taken for one without an end.
_IMAGES, _BYTES = 100_000, 4 << 30

Path = tuple[Any, ...]
"""Where an input stands in a batch: its place or keyword, and those inside of nested lists and dicts."""


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward call: positional tensors, or keyword inputs.

    `fixed`: cannot be cut (a graph that was exported without a dynamic batch, rows that depend on each other).
    `shared`: inputs that are the same for all images, though they may have as many rows as there are images.
    `per_image`: rows of the model's output for each image.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    images: int
    fixed: bool = False
    shared: frozenset[Path] = frozenset()
    per_image: int = 1

    def rows(self, start: int, stop: int) -> Batch:
        """The images start..stop of this batch."""

        def cut(path: Path, value: Any) -> Any:
            each = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.images
            return value[start:stop] if each and path not in self.shared else value

        return replace(self, args=mapped(self.args, cut), kwargs=mapped(self.kwargs, cut), images=stop - start)

    def few(self, count: int) -> Batch:
        """At most so many images, or all of them where the number is fixed."""
        return self if self.fixed else self.rows(0, min(count, self.images))

    def parts(self, count: int) -> list[tuple[Batch, slice]]:
        """About so many parts of equal size, each with its rows of the output; one part where it cannot be cut."""
        count = 1 if self.fixed else min(self.images, max(1, count))
        if count == 1:
            return [(self, slice(None))]
        ends = pairwise(self.images * i // count for i in range(count + 1))
        return [(self.rows(i, j), slice(i * self.per_image, j * self.per_image)) for i, j in ends]

    @cached_property
    def tensors(self) -> dict[Path, Tensor]:
        """All that are among the inputs, by where they stand."""
        found = (*leaves(self.args), *leaves(self.kwargs))
        return {path: value for path, value in found if isinstance(value, Tensor)}

    @property
    def sizes(self) -> dict[Path, int]:
        """How many rows each of its tensors has; without those that have none, being numbers."""
        return {path: tensor.shape[0] for path, tensor in self.tensors.items() if tensor.dim()}

    @property
    def bytes(self) -> int:
        """What its tensors hold."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def read_batches(
    loader: Iterable[Any],
    fixed: bool = False,
    limit: int | None = None,
    takes: Callable[[str], bool] = lambda keyword: True,
) -> list[Batch]:
    """Read the loader once: tensors, tuples or lists whose first item is the input, or dicts of keyword inputs.

    Labels (further items of a tuple) are never looked at. How many images a dict of several tensors holds is a guess,
    which is never too high, until `cptv_ao.evaluation.image_counting` asks a model.

    Args:
        fixed: see `Batch`.
        limit: stop once so many images are there; the batch that reaches it is read whole.
        takes: whether the model has an input of this name: dicts may hold others (labels, names of files), which are
            left.

    Raises:
        CalibrationDataError: empty, without an end, of another type, of changing shape, or not finite; names the batch.
    """
    if isinstance(loader, (Tensor, str, bytes, Mapping)) or not isinstance(loader, Iterable):
        hint = "; wrap it in a list: [images]" if isinstance(loader, Tensor) else ""
        raise CalibrationDataError(f"calib_loader: expected an iterable of batches, got {type(loader).__name__}{hint}")
    batches: list[Batch] = []
    images = size = 0
    told = _told_length(loader)
    for index, item in enumerate(loader):
        batch = replace(_batch(_taken(item, takes, index), index), fixed=fixed)
        if batches:
            _check_alike(batches[0], batch, index)
        elif limit is None:
            _warn_of_many(batch, told)
        batches.append(batch)
        images, size = images + batch.images, size + batch.bytes
        if limit is not None and images >= limit:
            break
        if limit is None and index >= told and (images > _IMAGES or size > _BYTES):
            raise CalibrationDataError(
                f"calib_loader: expected an end, got {images} images ({size / 2**30:.2g} GiB) in {index + 1} batches "
                f"so far, {'more than its length' if told else 'and it has no length'}; all are held in memory and "
                f"about 1,000 are enough: pass list(itertools.islice(calib_loader, n)) for its first n batches",
                index,
            )
    if not batches:
        raise CalibrationDataError("calib_loader: expected at least one batch, got an empty iterable")
    return batches


def _taken(item: Any, takes: Callable[[str], bool], index: int) -> Any:
    """Of a dict what the model takes; anything else as it is."""
    if not isinstance(item, Mapping) or not item:
        return item
    taken = {key: value for key, value in item.items() if not isinstance(key, str) or takes(key)}
    if not taken:
        raise CalibrationDataError(
            f"calib_loader, batch {index}: expected a dict of the model's inputs, got none of them among "
            f"{sorted(map(str, item))}",
            index,
        )
    return taken


def _told_length(loader: Iterable[Any]) -> int:
    """How many batches a loader says that it has; 0 where it does not say."""
    try:
        return operator.length_hint(loader)
    except Exception:  # whatever a `__len__` that was never meant to be called raises
        return 0


def _warn_of_many(first: Batch, count: int) -> None:
    images, size = first.images * count, first.bytes * count
    if images > _IMAGES or size > _BYTES:
        warnings.warn(
            f"calib_loader: {count} batches of {first.images} images are being read, and held in memory "
            f"({size / 2**30:.3g} GiB); about 1,000 images are enough: list(itertools.islice(calib_loader, n)) are its "
            "first n batches",
            CptvWarning,
            stacklevel=4,
        )


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """What stands in nested dicts, lists and tuples, with where it stands."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from leaves(part, (*path, index))
    else:
        yield path, value


def mapped(value: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """The same with each leaf changed; dicts of any kind become plain ones."""
    if isinstance(value, Mapping):
        return {key: mapped(part, change, (*path, key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [mapped(part, change, (*path, index)) for index, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return change(path, value)


def _batch(item: Any, index: int) -> Batch:
    where = f"calib_loader, batch {index}"
    first = item[0] if isinstance(item, (list, tuple)) and item else item
    keyed = isinstance(item, Mapping)

    def own(path: Path, value: Any) -> Any:
        return _own(value, f"{where}, input {path[0]!r}" if keyed else where, index)

    kwargs = mapped(dict(item), own) if keyed else {}
    args = () if keyed else (_own(first, where, index),)
    batch = Batch(args, kwargs, 1)
    if not batch.tensors:
        raise CalibrationDataError(
            f"{where}: expected a tensor, a tuple whose first item is the input tensor, or a dict of keyword inputs, "
            f"got {type(item).__name__}",
            index,
        )
    sizes = [size for size in batch.sizes.values() if size]
    if not sizes:
        shape = tuple(next(iter(batch.tensors.values())).shape)
        raise CalibrationDataError(
            f"{where}: expected a batch dimension with at least one image, got a tensor of shape {shape}", index
        )
    return replace(batch, images=min([size for size in sizes if size > 1], default=1))


def _own(value: Any, where: str, index: int) -> Any:
    """A plain, finite tensor of our own: the caller may reuse its buffers for the next batch, and a model may work in
    place on its input. What is no tensor stays what it is."""
    if isinstance(value, np.ndarray):
        raise CalibrationDataError(
            f"{where}: expected a tensor, got a numpy array; give torch.from_numpy(array)", index
        )
    if not isinstance(value, Tensor):
        return value
    if unusable := _unusable(value):
        raise CalibrationDataError(f"{where}: expected a dense tensor of numbers, got {unusable}", index)
    held = value.detach().clone().as_subclass(Tensor)
    if not _is_finite(held):
        raise CalibrationDataError(f"{where}: the input holds NaN or inf; clean the calibration data", index)
    return held


def _unusable(tensor: Tensor) -> str:
    """What a tensor is that no quantized model takes, and what to give in its place."""
    if tensor.is_nested:
        return "a nested one; pad its parts to one shape"
    if tensor.layout is not torch.strided:
        return f"one of layout {tensor.layout}; give tensor.to_dense()"
    if tensor.is_quantized:
        return f"a quantized one ({tensor.dtype}); give tensor.dequantize()"
    if tensor.is_meta:
        return "one on the meta device, which holds no numbers"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}, which is not its own data; give a plain tensor"
    return ""


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # no isfinite for 8-bit floats
    return bool(torch.isfinite(wide).all())


def _check_alike(first: Batch, batch: Batch, index: int) -> None:
    if len(first.args) != len(batch.args) or first.kwargs.keys() != batch.kwargs.keys():
        raise CalibrationDataError(f"calib_loader, batch {index}: its inputs differ from those of batch 0", index)
    wanted, found = first.tensors, batch.tensors
    if missing := wanted.keys() ^ found.keys():
        name = ".".join(str(part) for part in missing.pop())
        raise CalibrationDataError(
            f"calib_loader, batch {index}: its inputs differ from those of batch 0: a tensor at {name} in one of them",
            index,
        )
    for path, a in wanted.items():
        b = found[path]
        if a.dim() != b.dim() or a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            raise CalibrationDataError(
                f"calib_loader, batch {index}: expected images of shape {tuple(a.shape[1:])} and {a.dtype} as in "
                f"batch 0, got {tuple(b.shape[1:])} and {b.dtype}",
                index,
            )
