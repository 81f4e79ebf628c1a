"""A checkpoint to be written: its inputs open, its plan made, and all that can be said of it before anything is computed."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_merge_cli import __version__
from lora_merge_cli.assets import check_assets
from lora_merge_cli.formats.interface import DEFAULT_SHARD_BYTES, PROVENANCE, Checkpoint, Compression
from lora_merge_cli.inputs import AdapterChoice, Inputs
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.placing import AUTO, Placement, config_corrections, lost_config
from lora_merge_cli.plan import MergePlan, Step
from lora_merge_cli.recording import (
    combining_notes,
    combining_record,
    dropped_records,
    group_records,
    joining_notes,
    joining_record,
    leaf_records,
    mixed_records,
    mixing_record,
    plan_digest,
    rounding_notes,
    rounding_record,
    site_record,
    source_records,
)
from lora_merge_cli.records import AdapterSite, KeyPath
from lora_merge_cli.report import GroupRecord, InterpolateReport, MergeReport, SiteRecord
from lora_merge_cli.verification import Judging


@dataclass(frozen=True)
class MergeRequest:
    """What to merge, and where to."""

    checkpoint: Path
    """A run, step or item directory with adapters inside, or the base of the adapters beside it."""
    output: Path | None = None
    """What to create: a file if it ends in .safetensors or .pth, else a directory. Only a dry run does without."""
    adapters: tuple[AdapterChoice, ...] = ()
    """The adapters beside the checkpoint."""
    base: Path | None = None
    """The float32 checkpoint that a fine-tune with adapters inside started from."""
    step: int | None = None
    """Which step of a run; the newest if None."""
    dialect: str | None = None
    """The adapters' dialect; detected if None."""
    to: str = AUTO
    """The format to write: ``auto`` keeps that of the checkpoint."""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    """The largest size of one file of arrays."""
    overwrite: bool = False
    """Whether an existing output may be replaced."""
    device: str | None = None
    """The JAX device, for example ``cpu`` or ``cuda:1``; JAX's default if None."""
    compression: Compression = "none"
    """How to keep the leaves that change, where the format can compress."""
    jobs: int | None = None
    """How many leaves are read, and how many blocks computed, at a time; see `jobs.jobs_or_default`. Changes no bit."""
    options: MergeOptions = field(default_factory=MergeOptions)
    """What to do with what."""
    verify: Judging | None = None
    """How strictly to verify the result before it appears; None not to."""


@dataclass(frozen=True)
class Prepared:
    """A request whose inputs are open and whose plan is made."""

    request: MergeRequest
    inputs: Inputs
    placement: Placement
    plan: MergePlan

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """What must not be written to."""
        return self.inputs.paths

    @functools.cached_property
    def _targets(self) -> Mapping[KeyPath, Step]:
        return {step.output.path: step for step in self.plan.steps}

    def step_of(self, site: AdapterSite) -> Step:
        """The leaf that a site is on."""
        return self._targets[site.targets[0]]

    def site_record(self, site: AdapterSite) -> SiteRecord:
        """A site before its merge."""
        step = self.step_of(site)
        return site_record(site, step.source, step.output.dtype.name, step.alphas, step.rounding)

    def groups(self) -> tuple[GroupRecord, ...]:
        """What the fine-tune froze and trained."""
        dialect, index = self.inputs.dialect, self.inputs.checkpoint.source.index()
        replaced = {found.target for found in self.plan.replacements}
        return group_records(dialect, index, dialect.grouping(index, self.plan.sites), replaced)

    def warnings(self) -> tuple[str, ...]:
        """What is known before anything is computed, and should make a reader stop."""
        checkpoint, plan = self.inputs.checkpoint, self.plan
        return (
            *plan.warnings,
            *lost_config(checkpoint, plan, is_file=self.placement.is_file),
            *_asset_warnings(checkpoint, plan),
        )

    def report(self) -> MergeReport | InterpolateReport:
        """What would be done."""
        plan, checkpoint = self.plan, self.inputs.checkpoint
        output = self.request.output
        combining = self.request.options.combining.of(len(self.inputs.adapters), plan.sites)
        notes = [*plan.notes, *plan.model.advice, *combining_notes(combining), *joining_notes(self.inputs.joining)]
        rounding = rounding_record(plan.rounding, ((s.rounding, s.output.dtype) for s in plan.steps if s.is_computed))
        notes += rounding_notes(rounding, plan.serving_dtype.name)
        notes += [f"config.json: {key} becomes {value}" for key, value in config_corrections(checkpoint, plan).items()]
        if checkpoint.left_out:
            notes.append(f"left out: {', '.join(checkpoint.left_out)}")
        if self.placement.is_file and (checkpoint.companions or checkpoint.assets):
            notes.append("the output is one file: what stands beside the arrays of the checkpoint is not copied")
        said: dict[str, Any] = {
            "tool_version": __version__,
            "status": "planned",
            "model": plan.model.name,
            "dialect": plan.dialect,
            "sources": source_records(self.inputs),
            "output": None if output is None else str(output),
            "output_format": self.placement.format.name,
            "multiplier": plan.multiplier,
            "serving_dtype": plan.serving_dtype.name,
            "groups": self.groups(),
            "sites": tuple(map(self.site_record, plan.sites)),
            "copied": leaf_records(plan),
            "dropped": dropped_records(self.inputs, plan),
            "warnings": self.warnings(),
            "notes": tuple(notes),
            "output_bytes": plan.output_bytes,
            "peak_bytes_planned": plan.peak_bytes,
            "parents": parents_of(checkpoint),
            "rounding": rounding,
        }
        if plan.mixing is None:
            return MergeReport(**said, combining=combining_record(combining))
        return InterpolateReport(
            **said,
            mixing=mixing_record(plan.mixing),
            joining=joining_record(self.inputs.joining),
            mixed=mixed_records(plan, self.inputs.dialect, {}),
            not_interpolated=plan.unmixed,
            plan_digest=plan_digest(self.inputs, plan, self.placement.format.name),
        )


def provenance_path(file: Path) -> Path:
    """The provenance of an output that is one file: it stands beside it."""
    return file.with_name(f"{file.name}.{PROVENANCE}")


def parents_of(checkpoint: Checkpoint) -> tuple[dict[str, Any], ...]:
    """The provenance of what is merged into: a chain, so that merging a merged checkpoint forgets nothing."""
    if checkpoint.provenance is None:
        return ()
    try:
        document = json.loads(checkpoint.provenance.read_text(), parse_constant=lambda _: None)
        older = tuple(entry for entry in document.pop("parents", ()) if isinstance(entry, dict))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return ({"unreadable": str(checkpoint.provenance)},)
    return (document, *older)


def _asset_warnings(checkpoint: Checkpoint, plan: MergePlan) -> tuple[str, ...]:
    if plan.model.item is None and checkpoint.assets is None:
        return ()
    return check_assets(checkpoint.assets, quantiles=plan.model.needs_quantiles).problems
