"""What a right merge of a checkpoint holds, from its index and the user's flags. Makes no plan, and reads none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.changes import LeafChange, config_changes, leaf_changes, output_dtype
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint
from lora_merge_cli.inputs import Inputs, survey_inputs
from lora_merge_cli.options import DTYPE_CHOICES, MergeOptions, check_options
from lora_merge_cli.plan import match_base, nothing_to_merge, refuse_unscaled
from lora_merge_cli.records import AdapterSite, KeyPath, Scale, TensorSpec, display
from lora_merge_cli.selection import select

ANY_DTYPE = "any"
"""The value of ``--dtype`` that takes the fused kernels as they are stored."""


@dataclass(frozen=True)
class ExpectedLeaf:
    """A leaf that the result should have."""

    change: LeafChange
    """What becomes of it."""
    dtype: np.dtype[Any] | None
    """What it should be stored in; None where any floating-point dtype will do."""
    base: TensorSpec | None = None
    """The base's leaf: the adapter was added to it, and the fine-tune froze it."""

    @property
    def source(self) -> TensorSpec:
        """What its values are before any delta."""
        return self.change.start

    @property
    def sites(self) -> tuple[AdapterSite, ...]:
        """The adapters that should be in it."""
        return self.change.sites


@dataclass(frozen=True)
class Expectation:
    """All that a right merge holds."""

    leaves: Mapping[KeyPath, ExpectedLeaf]
    """By canonical path."""
    sites: tuple[AdapterSite, ...]
    """The adapters that should be in the kernels."""
    notes: tuple[str, ...]
    """What a reader should know."""
    claimed: tuple[str, ...]
    """The sites whose scale nobody but the result's provenance states."""
    config: Mapping[str, Any]
    """What the model's configuration should say; see `Survey.config`."""


def expect(
    inputs: Inputs, options: MergeOptions, claimed_scales: Mapping[tuple[str, int | None], float]
) -> Expectation:
    """What a right merge holds.

    Args:
        inputs: What was merged.
        options: What the merge was asked for.
        claimed_scales: Scales by kernel name and adapter that the result's provenance states, for where nobody else does.

    Raises:
        UsageError: An option has no valid value, or a glob matches no site.
        Refused: The inputs cannot be merged so, or the base is of another model.
    """
    check_options(options, (ANY_DTYPE, *DTYPE_CHOICES))
    dialect = inputs.dialect
    index = inputs.checkpoint.source.index()
    where = str(inputs.checkpoint.source.path)
    survey = survey_inputs(inputs, options.scales, residual_base=options.residual_base)
    selection = select(dialect, survey, options.include, options.exclude)
    if survey.problems:
        raise survey.problems[0]
    if not selection:
        raise nothing_to_merge(inputs, survey)
    claimed = tuple(
        site.name
        for site in selection.sites
        if site.parameters.scale.value is None and (site.name, site.adapter) in claimed_scales
    )
    sites = tuple(
        _with_claim(site, claimed_scales[site.name, site.adapter]) if site.name in claimed else site
        for site in selection.sites
    )
    selection = dataclasses.replace(selection, sites=sites)
    refuse_unscaled(inputs, sites)
    bases = match_base(inputs, sites)
    changes = leaf_changes(inputs, survey, selection, options)
    gone = {leaf.path for leaf in (*survey.dropped, *selection.dropped) if leaf.adapter is None}
    gone |= {factor.path for site in sites if site.adapter is None for factor in site.factors.values()}
    leaves: dict[KeyPath, ExpectedLeaf] = {}
    names: dict[str, KeyPath] = {}
    for path, spec in {**index.tensors, **dict.fromkeys(changes)}.items():
        if path in gone:
            continue
        name = dialect.canonical(path)
        other = names.setdefault(display(name), path)
        if other != path:
            raise CorruptCheckpoint("two leaves of one name", where=where, found=f"{other} and {path}")
        change = changes[path] if path in changes else LeafChange(path, spec)
        if change.sites and not is_float(change.start.dtype):
            raise UnsupportedCheckpoint(
                "a kernel that is not floating-point",
                where=f"{where} :: {change.start.name}",
                found=change.start.dtype.name,
            )
        leaves[name] = ExpectedLeaf(change, _expected_dtype(inputs, change, options), bases.get(path))
    notes = list(survey.notes)
    if selection.excluded:
        total = len(survey.sites) + len(survey.replacements)
        notes.append(f"{selection.excluded} of {total} adapters are left out by --include and --exclude")
    return Expectation(leaves, sites, tuple(notes), claimed, config_changes(inputs, survey, selection))


def _expected_dtype(inputs: Inputs, change: LeafChange, options: MergeOptions) -> np.dtype[Any] | None:
    if options.dtype == ANY_DTYPE and change.changes:
        return None if is_float(change.start.dtype) else change.start.dtype
    return output_dtype(change, options, inputs.dialect)


def _with_claim(site: AdapterSite, value: float) -> AdapterSite:
    scale = Scale(value, "claimed by lora_merge.json, stated by nobody here", assumed=True)
    return dataclasses.replace(site, parameters=dataclasses.replace(site.parameters, scale=scale))
