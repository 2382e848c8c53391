"""One more line after `convert_fx`: evolve the observers' scales and give back what quantization took.

>>> quantized = cptv_ao.refine(quantized, calib_loader, float_model=model)    # doctest: +SKIP
>>> print(cptv_ao.report(quantized))                                          # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from cptv_ao import callbacks, plot
from cptv_ao.backends.open import find_sites
from cptv_ao.core.blocks import Block, blocks_by_path
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.errors import (
    CalibrationDataError,
    CptvError,
    CptvWarning,
    DistributedError,
    FloatModelMismatchError,
    InvalidScaleError,
    NonFiniteError,
    ScalesFileError,
    UnsupportedModelError,
)
from cptv_ao.core.events import STOP, Event
from cptv_ao.core.outcome import BlockResult, Losses, OutputLoss, Point, SiteMove, Status
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite, SiteTable
from cptv_ao.diagnosis.plan_result import Plan, PlanStep
from cptv_ao.diagnosis.results import BlockDiagnosis, Diagnosis, Findings, OutputDiagnosis, SiteDiagnosis
from cptv_ao.reporting.report import Report, report
from cptv_ao.transforms.float_model.exclusion import Part
from cptv_ao.verbs.diagnose import diagnose
from cptv_ao.verbs.plan import plan
from cptv_ao.verbs.refine import refine
from cptv_ao.verbs.scales_file import load_scales, save_scales

if TYPE_CHECKING:
    from cptv_ao.transforms.float_model.recipe import Recipe, qconfig_mapping, recipe

__all__ = [
    "STOP",
    "Block",
    "BlockDiagnosis",
    "BlockResult",
    "CalibrationDataError",
    "CptvError",
    "CptvWarning",
    "Diagnosis",
    "DistributedError",
    "Event",
    "Findings",
    "FloatModelMismatchError",
    "InvalidScaleError",
    "Losses",
    "NonFiniteError",
    "OutputDiagnosis",
    "OutputLoss",
    "Part",
    "Plan",
    "PlanStep",
    "Point",
    "QParams",
    "Recipe",
    "RefineConfig",
    "Report",
    "ScaleSite",
    "ScalesFileError",
    "SiteDiagnosis",
    "SiteMove",
    "SiteTable",
    "Status",
    "UnsupportedModelError",
    "blocks_by_path",
    "callbacks",
    "diagnose",
    "find_sites",
    "load_scales",
    "plan",
    "plot",
    "qconfig_mapping",
    "recipe",
    "refine",
    "report",
    "save_scales",
]


def __getattr__(name: str) -> Any:
    """What prepares models for torch.ao FX is loaded when it is asked for: PT2E needs none of it."""
    if name not in {"Recipe", "qconfig_mapping", "recipe"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import cptv_ao.transforms.float_model.recipe as room

    globals().update(Recipe=room.Recipe, qconfig_mapping=room.qconfig_mapping, recipe=room.recipe)
    return globals()[name]
