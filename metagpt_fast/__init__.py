"""metagpt_fast: merge fine-tuned checkpoints of one base model at the speed of the disk.

    import metagpt_fast as mf

    report = mf.merge("base", ["chat", "math", "code"], "merged")      # checkpoints on disk
    measurement = mf.measure("base", ["chat", "math", "code"])         # norms, cosines, coefficients
    merged = mf.merge_state_dicts(base_sd, [sd1, sd2])                 # tensors in memory
    gram = mf.ops.layer_gram(base, models)                             # the kernels themselves

Names are loaded when they are first used, so that importing the package costs little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import (
    BackendError,
    CheckpointError,
    DataError,
    IntegrationError,
    MeasurementError,
    MetagptFastError,
    OutputError,
    PlanError,
    RecipeError,
)

if TYPE_CHECKING:
    from . import ops
    from ._native import isa, num_threads, set_isa, set_num_threads, supported_isas
    from .measurement import Measurement
    from .merging import carry_out, measure, merge, plan_merge, run
    from .page import save_page
    from .plan import MergePlan
    from .recipe_plan import plan_recipe
    from .report import MergeReport
    from .state_dicts import merge_state_dicts
    from .verify_report import VerifyReport
    from .verifying import verify

_MODULE_OF = {
    "Measurement": "measurement",
    "MergePlan": "plan",
    "MergeReport": "report",
    "carry_out": "merging",
    "isa": "_native",
    "measure": "merging",
    "merge": "merging",
    "merge_state_dicts": "state_dicts",
    "num_threads": "_native",
    "plan_merge": "merging",
    "plan_recipe": "recipe_plan",
    "run": "merging",
    "save_page": "page",
    "set_isa": "_native",
    "set_num_threads": "_native",
    "supported_isas": "_native",
    "verify": "verifying",
    "VerifyReport": "verify_report",
}

__all__ = [
    "BackendError",
    "CheckpointError",
    "DataError",
    "IntegrationError",
    "Measurement",
    "MeasurementError",
    "MergePlan",
    "MergeReport",
    "MetagptFastError",
    "OutputError",
    "PlanError",
    "RecipeError",
    "VerifyReport",
    "__version__",
    "carry_out",
    "isa",
    "measure",
    "merge",
    "merge_state_dicts",
    "num_threads",
    "ops",
    "plan_merge",
    "plan_recipe",
    "run",
    "save_page",
    "set_isa",
    "set_num_threads",
    "supported_isas",
    "verify",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "ops":
        return import_module(".ops", __name__)
    if name in _MODULE_OF:
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
