"""Outputs that an earlier run finished: told from others, and kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge_cli.errors import OutputExists, VerificationFailed
from lora_merge_cli.formats.interface import PROVENANCE
from lora_merge_cli.prepared import Prepared, provenance_path
from lora_merge_cli.recording import size_of
from lora_merge_cli.report import InterpolateReport, PartRecord, SiteRecord, SurvivalRecord
from lora_merge_cli.verification import judge, open_result

if TYPE_CHECKING:
    from lora_merge_cli.listening import Listener


def finished(prepared: Prepared, planned: InterpolateReport, output: Path) -> InterpolateReport:
    """What the run that finished an output said of it.

    Args:
        prepared: How it would be made.
        planned: What is known of it without computing anything.
        output: What is there.

    Raises:
        OutputExists: Something else is there.
    """
    path = provenance_path(output) if prepared.placement.is_file else output / PROVENANCE
    try:
        document = json.loads(path.read_text())
        same = document["command"] == "interpolate" and document["plan_digest"] == planned.plan_digest
        written = size_of(output) - (0 if prepared.placement.is_file else path.stat().st_size)
        if same and written >= document["bytes_on_disk"]:
            return dataclasses.replace(
                planned,
                status="interpolated",
                sites=tuple(map(_with_survival, planned.sites, document["sites"])),
                parts=tuple(PartRecord(**{**part, "alphas": tuple(part["alphas"])}) for part in document["parts"]),
                bytes_on_disk=document["bytes_on_disk"],
                seconds=document["seconds"],
                notes=(*planned.notes, "an earlier run had finished it"),
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{path.name}: {error}"
    else:
        found = "fewer bytes than were written" if same else "the result of other inputs, alphas or flags"
    raise OutputExists(
        "the output exists, and is not what this run would make",
        where=output,
        found=found,
        hint="choose another -o, or pass --overwrite instead of --resume",
    )


def refuse_unverified(prepared: Prepared, kept: InterpolateReport, listener: Listener | None) -> None:
    """Refuse an output of an earlier run that fails a check, where results are to be verified.

    Args:
        prepared: How it would be made.
        kept: What the earlier run reported.
        listener: Who to tell of progress.

    Raises:
        VerificationFailed: It does.
    """
    request = prepared.request
    if request.verify is None or request.output is None:
        return
    verdict = judge(open_result(request.output), prepared.inputs, request.options, request.verify, listener)
    failed = [check for check in verdict.checks if check.status == "fail"]
    if failed:
        error = VerificationFailed(
            f"the output of an earlier run fails {len(failed)} checks",
            where=request.output,
            found="; ".join(f"{check.id}: {check.message}" for check in failed),
            hint="remove it, or pass --overwrite instead of --resume",
        )
        error.report = dataclasses.replace(kept, checks=verdict.checks, status="rejected")
        raise error


def _with_survival(site: SiteRecord, document: dict[str, Any]) -> SiteRecord:
    """A planned site with what an earlier run measured of it."""
    return dataclasses.replace(
        site,
        relative_norm=document["relative_norm"],
        max_abs=document["max_abs"],
        survival=tuple(SurvivalRecord(**each) for each in document["survival"]),
        nearest=None if document["nearest"] is None else SurvivalRecord(**document["nearest"]),
        worth_from=document["worth_from"],
        moved=document["moved"],
    )
