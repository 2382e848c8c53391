"""Reading the calibration loader once."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.errors import CalibrationDataError, CptvWarning
from cptv_ao.core.intake import ANY, Intake
from cptv_ao.core.nested import Path, mapped

# What a loader may give that does not say how much it is: beyond it, it is taken for one without an end.
_IMAGES, _BYTES = 100_000, 4 << 30


def read_batches(loader: Iterable[Any], intake: Intake = ANY, limit: int | None = None) -> list[Batch]:
    """Read the loader once: tensors, tuples or lists of the inputs and labels, or dicts of keyword inputs.

    Labels are never looked at. How many images a dict of several tensors holds is a guess, which is never too high,
    until `cptv_ao.evaluation.image_counting` asks a model. Shapes may differ from batch to batch, as those of sequences
    that are padded to the longest of their batch do: whether the model takes that is seen when it runs.

    Args:
        intake: what the model takes. For a graph that was exported for one number of images they are put together anew,
            in batches of as many; those that do not fill one are left out, with a warning.
        limit: stop once so many images are there; the batch that reaches it is read whole.

    Raises:
        CalibrationDataError: empty, without an end, of another type, or not finite; names the batch.
    """
    if isinstance(loader, (Tensor, str, bytes, Mapping)) or not isinstance(loader, Iterable):
        hint = "; wrap it in a list: [images]" if isinstance(loader, Tensor) else ""
        raise CalibrationDataError(f"calib_loader: expected an iterable of batches, got {type(loader).__name__}{hint}")
    batches: list[Batch] = []
    images = size = 0
    told = _told_length(loader)
    for index, item in enumerate(loader):
        batch = _batch(item, intake, index)
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
    return _refilled(batches, intake) if intake.fixed else batches


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


def _batch(item: Any, intake: Intake, index: int) -> Batch:
    where = f"calib_loader, batch {index}"
    given, keywords = intake.inputs(item, index)

    def own(path: Path, value: Any) -> Any:
        return _own(value, f"{where}, input {path[0]!r}" if keywords or len(given) > 1 else where, index)

    batch = Batch(mapped(given, own), mapped(keywords, own), 1, fixed=intake.fixed)
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
        if a.dim() != b.dim() or a.dtype != b.dtype:
            raise CalibrationDataError(unlike(a, b, index), index)


def unlike(first: Tensor, other: Tensor, index: int) -> str:
    """What is said of a tensor that differs from that of the first batch."""
    return (
        f"calib_loader, batch {index}: expected images of shape {tuple(first.shape[1:])} and {first.dtype} as in "
        f"batch 0, got {tuple(other.shape[1:])} and {other.dtype}"
    )


def _refilled(batches: Sequence[Batch], intake: Intake) -> list[Batch]:
    """The same images in batches of as many as a graph takes. Inputs that have the rows it was exported for in a batch
    where others have not are the same for all images.

    Raises:
        CalibrationDataError: there are fewer images than the graph takes, or rows that fit to no number of images.
    """
    rows = {path: shape[0] or 0 for path, shape in intake.shapes.items()}
    filled: list[Batch] = []
    rest: Batch | None = None
    images = left = 0
    for index, batch in enumerate(batches):
        _check_dimensions(batch, intake, index)
        other = {path for path, size in batch.sizes.items() if size != rows.get(path, size)}
        if not other:
            filled.append(batch)
            continue
        sizes, wanted = {batch.sizes[path] for path in other}, {rows[path] for path in other}
        if len(sizes) > 1 or len(wanted) > 1:
            raise CalibrationDataError(
                f"calib_loader, batch {index}: expected inputs with the rows that the model was exported for, "
                f"{_by_name(rows, other)}, got {_by_name(batch.sizes, other)}; export it with a dynamic batch",
                index,
            )
        (count,), (images,) = sizes, wanted
        batch = replace(batch, images=count, shared=frozenset(batch.sizes.keys() - other))
        if rest is not None and (joined := _joined(rest, batch)) is not None:
            batch, left = joined, left - rest.images
        full = batch.images // images
        filled += [batch.rows(images * i, images * (i + 1)) for i in range(full)]
        rest = batch.rows(images * full, batch.images) if batch.images % images else None
        left += 0 if rest is None else rest.images
    if not filled:
        raise CalibrationDataError(
            f"calib_loader: expected at least {images} images, for which the model was exported, got {left}; give more "
            "of them, or export it with a dynamic batch"
        )
    if left:
        warnings.warn(
            f"calib_loader: the last {left} images are left out, for the model was exported for batches of {images}",
            CptvWarning,
            stacklevel=4,
        )
    return filled


def _check_dimensions(batch: Batch, intake: Intake, index: int) -> None:
    for path, tensor in batch.tensors.items():
        wanted = intake.shapes.get(path)
        if wanted is not None and len(wanted) != tensor.dim():
            raise CalibrationDataError(
                f"calib_loader, batch {index}: expected an input of {len(wanted)} dimensions: the model was exported "
                f"for {wanted}, got one of shape {tuple(tensor.shape)}; a batch has the images as its first dimension",
                index,
            )


def _by_name(sizes: Mapping[Path, int], paths: Iterable[Path]) -> str:
    return ", ".join(f"{sizes[path]} of {'.'.join(map(str, path))}" for path in sorted(paths, key=str))


def _joined(first: Batch, second: Batch) -> Batch | None:
    """The images of both in one batch; None where these are of different shapes."""
    known = first.tensors
    each = [path for path in known if path not in first.shared and known[path].dim()]
    if first.shared != second.shared or any(known[p].shape[1:] != second.tensors[p].shape[1:] for p in each):
        return None

    def join(path: Path, value: Any) -> Any:
        return torch.cat([known[path], value]) if path in each else value

    args, kwargs = mapped(second.args, join), mapped(second.kwargs, join)
    return replace(second, args=args, kwargs=kwargs, images=first.images + second.images)
