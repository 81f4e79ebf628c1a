"""Merge, from paths to an output: open, plan, and produce."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge_cli.errors import LoraMergeError, UsageError
from lora_merge_cli.inputs import Inputs, open_inputs
from lora_merge_cli.jobs import jobs_or_default
from lora_merge_cli.placing import placement
from lora_merge_cli.plan import plan_merge
from lora_merge_cli.prepared import MergeRequest, Prepared, provenance_path
from lora_merge_cli.report import InterpolateReport, MergeReport
from lora_merge_cli.staging import anchored, check_target

if TYPE_CHECKING:
    from lora_merge_cli.listening import Listener


def prepare(request: MergeRequest) -> Prepared:
    """Open the inputs and plan the merge; reads no arrays and writes nothing.

    Raises:
        InputError: An input is missing, unreadable or of unknown format.
        Refused: The merge would be wrong or pointless.
        OutputExists: The output exists and may not be replaced.
    """
    inputs = open_inputs(
        request.checkpoint, request.adapters, base=request.base, step=request.step, dialect=request.dialect
    )
    return prepare_opened(request, inputs)


def prepare_opened(request: MergeRequest, inputs: Inputs) -> Prepared:
    """Plan what is made of inputs that are open; see `prepare`."""
    place = placement(request.output, request.to, inputs.checkpoint, request.max_shard_bytes, request.compression)
    jobs_or_default(request.jobs)
    if request.output is not None:
        output = anchored(request.output)
        for path in [output, provenance_path(output)] if place.is_file else [output]:
            check_target(path, inputs.paths, overwrite=request.overwrite)
        request = dataclasses.replace(request, output=output)
    return Prepared(request, inputs, place, plan_merge(inputs, request.options))


def merge(
    request: MergeRequest | Prepared,
    listener: Listener | None = None,
    beside: Callable[[MergeReport | InterpolateReport, Path], None] | None = None,
) -> MergeReport:
    """Merge the adapters of a checkpoint into its kernels and write a dense checkpoint.

    The output appears complete or not at all, and no input is ever changed.

    Args:
        request: What to merge; prepared or not.
        listener: Who to tell of progress.
        beside: Called with the finished report and the staged directory before that is published; if it raises, nothing is.

    Raises:
        VerificationFailed: A check failed; its `report` has them all.
        LoraMergeError: One subclass per way to fail; see `lora_merge_cli.errors`.
    """
    from lora_merge_cli.producing import produce

    prepared = request if isinstance(request, Prepared) else prepare(request)
    if prepared.request.output is None:
        raise UsageError("an output is needed", hint="pass -o OUT")
    (done,) = produce([prepared], listener, beside)
    if isinstance(done, LoraMergeError):
        raise done
    assert isinstance(done, MergeReport), "without alphas it is a merge"
    return done
