"""One more line after `convert_fx`: evolve the observers' scales and give back what quantization took.

>>> quantized = cptv_ao.refine(quantized, calib_loader, float_model=model)    # doctest: +SKIP
>>> print(cptv_ao.report(quantized))                                          # doctest: +SKIP
"""

from cptv_ao.blocks import Block, blocks_by_path
from cptv_ao.config import RefineConfig
from cptv_ao.errors import (
    CalibrationDataError,
    CptvError,
    CptvWarning,
    FloatModelMismatchError,
    InvalidScaleError,
    NonFiniteError,
    UnsupportedModelError,
)
from cptv_ao.loop import Event
from cptv_ao.recipe import Recipe, qconfig_mapping, recipe
from cptv_ao.refine import find_sites, refine
from cptv_ao.report import Report, Status, report
from cptv_ao.sites import QParams, ScaleSite, SiteTable

__all__ = [
    "Block",
    "CalibrationDataError",
    "CptvError",
    "CptvWarning",
    "Event",
    "FloatModelMismatchError",
    "InvalidScaleError",
    "NonFiniteError",
    "QParams",
    "Recipe",
    "RefineConfig",
    "Report",
    "ScaleSite",
    "SiteTable",
    "Status",
    "UnsupportedModelError",
    "blocks_by_path",
    "find_sites",
    "qconfig_mapping",
    "recipe",
    "refine",
    "report",
]
