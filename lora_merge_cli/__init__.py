"""lora-merge: fuse LoRA adapters into the kernels of robot policies and language models, and say what became of them.

The public API. Names load on first use, so that ``lora-merge --help`` imports neither NumPy nor JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_merge_cli.combining import Combining as Combining
    from lora_merge_cli.dialects.interface import ScaleOptions as ScaleOptions
    from lora_merge_cli.diffing import DiffRequest as DiffRequest
    from lora_merge_cli.diffing import diff as diff
    from lora_merge_cli.errors import LoraMergeError as LoraMergeError
    from lora_merge_cli.extract_report import ExtractReport as ExtractReport
    from lora_merge_cli.extracting import ExtractRequest as ExtractRequest
    from lora_merge_cli.extracting import extract as extract
    from lora_merge_cli.fine_tunes import JoinRequest as JoinRequest
    from lora_merge_cli.formats import open_checkpoint as open_checkpoint
    from lora_merge_cli.inputs import AdapterChoice as AdapterChoice
    from lora_merge_cli.inspection import Inspection as Inspection
    from lora_merge_cli.inspection import InspectRequest as InspectRequest
    from lora_merge_cli.inspection import inspect as inspect
    from lora_merge_cli.interpolating import InterpolateRequest as InterpolateRequest
    from lora_merge_cli.interpolating import interpolate as interpolate
    from lora_merge_cli.interpolating import prepare_interpolation as prepare_interpolation
    from lora_merge_cli.joining import Joining as Joining
    from lora_merge_cli.merging import merge as merge
    from lora_merge_cli.merging import prepare as prepare
    from lora_merge_cli.mixing import Mixing as Mixing
    from lora_merge_cli.mixing import Override as Override
    from lora_merge_cli.mixing import Schedule as Schedule
    from lora_merge_cli.options import MergeOptions as MergeOptions
    from lora_merge_cli.prepared import MergeRequest as MergeRequest
    from lora_merge_cli.report import DiffReport as DiffReport
    from lora_merge_cli.report import InterpolateReport as InterpolateReport
    from lora_merge_cli.report import MergeReport as MergeReport
    from lora_merge_cli.report import SweepReport as SweepReport
    from lora_merge_cli.report import VerifyReport as VerifyReport
    from lora_merge_cli.resize_report import ResizeReport as ResizeReport
    from lora_merge_cli.resizing import ResizeRequest as ResizeRequest
    from lora_merge_cli.resizing import resize as resize
    from lora_merge_cli.rounding import Rounding as Rounding
    from lora_merge_cli.verification import Judging as Judging
    from lora_merge_cli.verification import VerifyRequest as VerifyRequest
    from lora_merge_cli.verification import verify as verify

_HOMES = {
    "AdapterChoice": "inputs",
    "Combining": "combining",
    "DiffReport": "report",
    "DiffRequest": "diffing",
    "ExtractReport": "extract_report",
    "ExtractRequest": "extracting",
    "InspectRequest": "inspection",
    "Inspection": "inspection",
    "InterpolateReport": "report",
    "InterpolateRequest": "interpolating",
    "JoinRequest": "fine_tunes",
    "Joining": "joining",
    "Judging": "verification",
    "LoraMergeError": "errors",
    "MergeOptions": "options",
    "MergeReport": "report",
    "MergeRequest": "prepared",
    "Mixing": "mixing",
    "Override": "mixing",
    "ResizeReport": "resize_report",
    "ResizeRequest": "resizing",
    "Rounding": "rounding",
    "ScaleOptions": "dialects.interface",
    "Schedule": "mixing",
    "SweepReport": "report",
    "VerifyReport": "report",
    "VerifyRequest": "verification",
    "diff": "diffing",
    "extract": "extracting",
    "inspect": "inspection",
    "interpolate": "interpolating",
    "merge": "merging",
    "open_checkpoint": "formats",
    "prepare": "merging",
    "prepare_interpolation": "interpolating",
    "resize": "resizing",
    "verify": "verification",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604  (all strings: the names in _HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
