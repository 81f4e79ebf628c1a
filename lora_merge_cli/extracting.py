"""Extract: an adapter of its own out of a fine-tune, to share, or to merge into its base again.

Out of a checkpoint with adapters inside come its own factors, bit for bit, with the leaves that it trained in full: merged into the
base, they give what the fine-tune gives. Of two dense checkpoints the difference of each kernel is truncated to a low rank.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from threadpoolctl import threadpool_limits

from lora_merge_cli.dialects import looks_like_adapter
from lora_merge_cli.errors import UsageError, WrongBase
from lora_merge_cli.extract_report import ExtractReport
from lora_merge_cli.extracting_dense import dense_of, extract_dense
from lora_merge_cli.extracting_exact import extract_exact, plan_of
from lora_merge_cli.extracting_prepared import ExtractRequest, PreparedExtraction
from lora_merge_cli.formats.interface import PROVENANCE, Checkpoint
from lora_merge_cli.inputs import open_inputs, survey_inputs
from lora_merge_cli.jobs import jobs_or_default
from lora_merge_cli.listening import Listener, Silent
from lora_merge_cli.recording import directory_size, peak_rss, versions
from lora_merge_cli.records import display, first_names
from lora_merge_cli.staging import anchored, check_target, filesystem, staged

__all__ = ["ExtractRequest", "PreparedExtraction", "extract", "prepare_extraction"]


def prepare_extraction(request: ExtractRequest) -> PreparedExtraction:
    """Open the inputs and see what they are; reads no arrays and writes nothing.

    Raises:
        UsageError: The request contradicts itself or the inputs.
        InputError: An input is missing, unreadable or of unknown format.
        Refused: The adapter would be wrong or pointless.
        OutputExists: The output exists and may not be replaced.
    """
    jobs_or_default(request.jobs)
    inputs = open_inputs(request.tuned, base=request.base, step=request.step)
    if request.output is not None:
        request = dataclasses.replace(request, output=anchored(request.output))
        assert request.output is not None, "it is what it was"
        if request.output.suffix in (".safetensors", ".pth", ".bin"):
            raise UsageError("an adapter is a directory", where=request.output, hint="name one after -o")
        check_target(request.output, inputs.paths, overwrite=request.overwrite)
    if inputs.base is not None:
        _refuse_adapters_in_base(inputs.base)
    survey = survey_inputs(inputs, request.scales)
    if survey.problems:
        raise survey.problems[0]
    if survey.sites:
        return PreparedExtraction(request, inputs, plan_of(request, inputs), None)
    return PreparedExtraction(request, inputs, None, dense_of(request, inputs))


def extract(
    request: ExtractRequest | PreparedExtraction,
    listener: Listener | None = None,
    beside: Callable[[ExtractReport, Path], None] | None = None,
) -> ExtractReport:
    """Write the adapter of a fine-tune into a directory of its own.

    The output appears complete or not at all, and no input is ever changed.

    Args:
        request: What to extract; prepared or not.
        listener: Who to tell of progress.
        beside: Called with the finished report and the staged directory before that is published; if it raises, nothing is.

    Raises:
        WrongBase: A leaf that the fine-tune froze is not the base's.
        NothingToMerge: Nothing moved, or every delta is zero.
        LoraMergeError: One subclass per way to fail; see `lora_merge_cli.errors`.
    """
    started = time.monotonic()
    prepared = request if isinstance(request, PreparedExtraction) else prepare_extraction(request)
    target = prepared.request.output
    if target is None:
        raise UsageError("an output is needed", hint="pass -o OUT")
    run = extract_exact if prepared.plan is not None else extract_dense
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(jobs_or_default(prepared.request.jobs), "read") as pool,
        staged(target, overwrite=prepared.request.overwrite) as stage,
    ):
        report = run(prepared, stage, listener or Silent(), pool)
        _copy_assets(prepared, stage)
        report = dataclasses.replace(
            report,
            status="extracted",
            bytes_on_disk=directory_size(stage),
            versions=versions(),
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss(),
        )
        provenance = stage / PROVENANCE
        with filesystem(provenance):
            provenance.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
        if beside is not None:
            beside(report, stage)
    return report


def _refuse_adapters_in_base(base: Checkpoint) -> None:
    inside = [display(path) for path in base.source.index().tensors if looks_like_adapter(path)]
    if inside:
        raise WrongBase(
            "the base has adapters of its own",
            where=base.source.path,
            found=first_names(inside, 3),
            hint="merge it first, or see that TUNED comes first and BASE after --base",
        )


def _copy_assets(prepared: PreparedExtraction, stage: Path) -> None:
    """What serving needs of the fine-tune beside its arrays."""
    assets = prepared.inputs.checkpoint.assets
    if assets is not None:
        with filesystem(assets):
            shutil.copytree(assets, stage / assets.name, ignore_dangling_symlinks=True)
