"""What a right merge or interpolation of a checkpoint holds, from its index and the user's flags. Makes no plan, and reads none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.changes import LeafChange, config_changes, output_dtype
from lora_merge_cli.combining import refuse_uncombinable
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint
from lora_merge_cli.fine_tunes import of_all
from lora_merge_cli.inputs import Inputs, survey_inputs
from lora_merge_cli.options import DTYPE_CHOICES, MergeOptions, check_options
from lora_merge_cli.outline import outline
from lora_merge_cli.plan import refuse_nothing, refuse_unscaled
from lora_merge_cli.records import AdapterSite, KeyPath, Scale, TensorSpec, display, first_names
from lora_merge_cli.rounding import LeafRounding, Rounding
from lora_merge_cli.selection import select
from lora_merge_cli.verification.methods import is_by_row

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
    mixed: bool = False
    """Whether it is interpolated: an alpha has a say."""

    @property
    def source(self) -> TensorSpec:
        """What its values are before any delta."""
        return self.change.start

    @property
    def sites(self) -> tuple[AdapterSite, ...]:
        """The adapters that should be in it."""
        return self.change.sites

    @property
    def is_computed(self) -> bool:
        """Whether something is added to it."""
        return self.mixed or bool(self.sites)

    def rounding(self, stored: np.dtype[Any], serving: np.dtype[Any], asked: Rounding) -> LeafRounding:
        """How it should be rounded; see `LeafChange.rounding`."""
        by_row = next((site.operation for site in self.sites if is_by_row(site.operation)), None)
        return self.change.rounding(stored, serving, asked, by_row)

    def alpha_of(self, layer: int) -> float:
        """How much of the change to take in a stacked layer; in all of the leaf where that has one alpha."""
        alphas = self.change.alphas
        return alphas[layer if len(alphas) > 1 else 0]


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
    options = of_all(inputs, options)
    dialect = inputs.dialect
    where = str(inputs.checkpoint.source.path)
    survey = survey_inputs(inputs, options.scales, residual_base=options.residual_base)
    selection = select(dialect, survey, options.include, options.exclude)
    if survey.problems:
        raise survey.problems[0]
    refuse_nothing(inputs, survey, selection, options)
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
    refuse_uncombinable(options.combining, [part.checkpoint.source.path for part in inputs.adapters], sites)
    found = outline(inputs, survey, selection, options)
    selection = found.selection
    leaves: dict[KeyPath, ExpectedLeaf] = {}
    names: dict[str, KeyPath] = {}
    for path, change in found.leaves.items():
        name = dialect.canonical(path)
        other = names.setdefault(display(name), path)
        if other != path:
            raise CorruptCheckpoint("two leaves of one name", where=where, found=f"{other} and {path}")
        if change.sites and not is_float(change.start.dtype):
            raise UnsupportedCheckpoint(
                "a kernel that is not floating-point",
                where=f"{where} :: {change.start.name}",
                found=change.start.dtype.name,
            )
        leaves[name] = ExpectedLeaf(
            change,
            _expected_dtype(inputs, change, options),
            found.bases.get(path),
            mixed=options.mixing is not None and change.is_mixed,
        )
    notes = [*survey.notes, *found.notes]
    if found.unmixed:
        listed = first_names(found.unmixed, 3)
        notes.append(f"{len(found.unmixed)} leaves are the fine-tune's own at every alpha: {listed}")
    if selection.excluded:
        total = len(survey.sites) + len(survey.replacements)
        notes.append(f"{selection.excluded} of {total} adapters are left out by --include, --exclude or --only-common")
    return Expectation(
        leaves, selection.sites, tuple(notes), claimed, {**config_changes(inputs, survey, selection), **found.config}
    )


def _expected_dtype(inputs: Inputs, change: LeafChange, options: MergeOptions) -> np.dtype[Any] | None:
    if options.dtype == ANY_DTYPE and (change.changes or change.asked):
        return None if is_float(change.start.dtype) else change.start.dtype
    return output_dtype(change, options, inputs.dialect)


def _with_claim(site: AdapterSite, value: float) -> AdapterSite:
    scale = Scale(value, "claimed by lora_merge.json, stated by nobody here", assumed=True)
    return dataclasses.replace(site, parameters=dataclasses.replace(site.parameters, scale=scale))
