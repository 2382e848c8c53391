"""What can go wrong, as types that carry the offending object."""

from __future__ import annotations


class CptvError(Exception):
    """Base of every error that cptv_ao raises on purpose."""


class UnsupportedModelError(CptvError, TypeError):
    """The model is not something that `refine` can work on.

    `node` names the graph node or module at fault, where there is one.
    """

    def __init__(self, message: str, node: str | None = None) -> None:
        super().__init__(message)
        self.node = node


class FloatModelMismatchError(CptvError, ValueError):
    """`float_model` is not the float original of the quantized model.

    `module` is the path of the first module that differs.
    """

    def __init__(self, message: str, module: str | None = None) -> None:
        super().__init__(message)
        self.module = module


class CalibrationDataError(CptvError, ValueError):
    """The calibration loader gave something that cannot be used; `batch` is its index."""

    def __init__(self, message: str, batch: int | None = None) -> None:
        super().__init__(message)
        self.batch = batch


class NonFiniteError(CptvError, ValueError):
    """A scale, an input, an output or a loss of the given model is NaN or infinite."""


class InvalidScaleError(CptvError, ValueError):
    """A scale or zero_point that cannot be written; `site` names where."""

    def __init__(self, message: str, site: str | None = None) -> None:
        super().__init__(message)
        self.site = site


class ScalesFileError(CptvError, ValueError):
    """A file of scales or a checkpoint that is damaged, or of something else."""


class DistributedError(CptvError, RuntimeError):
    """Another rank failed, has gone away, or has come apart from this one; `rank` is the one that failed, if known."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class CptvWarning(UserWarning):
    """Every warning of cptv_ao: filter by this category."""
