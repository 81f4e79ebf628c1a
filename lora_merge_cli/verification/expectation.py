"""What a right merge of a checkpoint holds, from its index and the user's flags. Makes no plan, and reads none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.dialects import Dialect
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.plan import (
    DTYPE_CHOICES,
    MergeOptions,
    cast_dtype,
    check_options,
    match_base,
    nothing_to_merge,
)
from lora_merge_cli.records import AdapterSite, KeyPath, Scale, TensorSpec, display
from lora_merge_cli.selection import select_sites

ANY_DTYPE = "any"
"""The value of ``--dtype`` that takes the fused kernels as they are stored."""


@dataclass(frozen=True)
class ExpectedLeaf:
    """A leaf that the result should have."""

    source: TensorSpec
    """Where its values come from."""
    dtype: np.dtype[Any] | None
    """What it should be stored in; None where any floating-point dtype will do."""
    site: AdapterSite | None = None
    """The adapter that should be in it."""
    base: TensorSpec | None = None
    """The base's leaf: the adapter was added to it, and the fine-tune froze it."""


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


def expect(
    checkpoint: Checkpoint,
    dialect: Dialect,
    options: MergeOptions,
    base: Checkpoint | None,
    claimed_scales: Mapping[str, float],
) -> Expectation:
    """What a right merge of `checkpoint` holds.

    Args:
        checkpoint: The one with the adapters.
        dialect: Its trainer's conventions.
        options: What the merge was asked for.
        base: The float32 checkpoint that the fine-tune started from, if the merge was given it.
        claimed_scales: Scales by kernel name that the result's provenance states, for where nobody else does.

    Raises:
        UsageError: An option has no valid value, or a glob matches no site.
        Refused: The checkpoint cannot be merged so, or the base is of another model.
    """
    check_options(options, (ANY_DTYPE, *DTYPE_CHOICES))
    index = checkpoint.source.index()
    where = str(checkpoint.source.path)
    survey = dialect.survey(index, options.scales, where)
    chosen, excluded = select_sites(dialect, survey.sites, options.include, options.exclude)
    if survey.problems:
        raise survey.problems[0]
    if not chosen:
        raise nothing_to_merge(checkpoint, index)
    claimed = tuple(s.name for s in chosen if s.parameters.scale.value is None and s.name in claimed_scales)
    sites = tuple(_with_claim(site, claimed_scales[site.name]) if site.name in claimed else site for site in chosen)
    unscaled = [site for site in sites if site.parameters.scale.value is None]
    if unscaled:
        raise dialect.unknown_scale(unscaled, where)
    bases = match_base(checkpoint, dialect, index, sites, base)
    by_target = {target: site for site in sites for target in site.targets}
    gone = {leaf.path for leaf in survey.dropped} | {
        path for site in (*sites, *excluded) for path in site.factors.values()
    }
    leaves: dict[KeyPath, ExpectedLeaf] = {}
    names: dict[str, TensorSpec] = {}
    for path, spec in index.tensors.items():
        if path in gone:
            continue
        name = dialect.canonical(path)
        other = names.setdefault(display(name), spec)
        if other is not spec:
            raise CorruptCheckpoint("two leaves of one name", where=where, found=f"{other.path} and {spec.path}")
        site = by_target.get(path)
        if site is not None and not is_float(spec.dtype):
            raise UnsupportedCheckpoint(
                "a kernel that is not floating-point", where=f"{where} :: {spec.name}", found=spec.dtype.name
            )
        leaves[name] = ExpectedLeaf(spec, _expected_dtype(dialect, spec, site, options), site, bases.get(path))
    notes = list(survey.notes)
    if excluded:
        notes.append(f"{len(excluded)} of {len(survey.sites)} adapters are left out by --include and --exclude")
    return Expectation(leaves, sites, tuple(notes), claimed)


def _expected_dtype(
    dialect: Dialect, spec: TensorSpec, site: AdapterSite | None, options: MergeOptions
) -> np.dtype[Any] | None:
    if site is not None:
        if options.dtype == ANY_DTYPE:
            return None
        return cast_dtype(options.dtype, spec.dtype, dialect.fused_dtype(spec.dtype))
    if is_float(spec.dtype) and spec.kind == "array":
        return cast_dtype(options.dtype_untouched, spec.dtype, spec.dtype)
    return spec.dtype


def _with_claim(site: AdapterSite, value: float) -> AdapterSite:
    scale = Scale(value, "claimed by lora_merge.json, stated by nobody here", assumed=True)
    return dataclasses.replace(site, parameters=dataclasses.replace(site.parameters, scale=scale))
