"""What becomes of one leaf when all adapters have had their say: pure, and shared by the plan and the judge of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import Any

import numpy as np

from lora_merge_cli.dialects import Dialect
from lora_merge_cli.dtypes import FLOAT32, fits_float32, is_float
from lora_merge_cli.errors import ShapeMismatch, UnsupportedCheckpoint, UsageError
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.options import MergeOptions, cast_dtype
from lora_merge_cli.records import AdapterSite, KeyPath, Replacement, Survey, TensorSpec, display
from lora_merge_cli.rounding import DENSE, NEAREST, LeafRounding, Rounding, leaf_rounding, without_space
from lora_merge_cli.selection import Selection

RESCALING = "dora"
"""The operation that multiplies what it finds."""


@dataclass(frozen=True)
class LeafChange:
    """One leaf of the output.

    With W the checkpoint's values, each adapter k makes of them ``W_k``: its replacement instead of W, in whole or in rows, then
    its own sites. The result is ``W + sum over k of weight_k * (W_k - W)``. An interpolation goes a part ``alpha`` of the way to
    that result from W, or from the base's leaf.
    """

    path: KeyPath
    """Its path in the output."""
    before: TensorSpec | None
    """The checkpoint's leaf that it comes from; None for one that only an adapter has."""
    sites: tuple[AdapterSite, ...] = ()
    """The adapters' sites on it."""
    replacements: tuple[Replacement, ...] = ()
    """What adapters bring instead of its values, each with its whole weight."""
    brought: TensorSpec | None = None
    """The adapter's leaf that replaces it whole."""
    anchor: TensorSpec | None = None
    """Of an interpolation, where that is not what the deltas are added to: the leaf of `Inputs.anchor` that alpha 0 stands for."""
    alphas: tuple[float, ...] = (1.0,)
    """How much of the change to take: one for all of it, or one per stacked layer."""
    decided: bool = False
    """Whether ``--only-common``, or having no base, says which side it is of: it is not interpolated."""
    declared: np.dtype[Any] | None = None
    """What it counts as stored in, where that is not the dtype of `before`: see `Inputs.declared` and `Survey.dtypes`."""
    asked: bool = False
    """Whether ``--dtype`` is for it though no adapter changes it: without adapters it is for all that is interpolated."""

    @property
    def is_mixed(self) -> bool:
        """Whether an alpha has a say."""
        return not self.decided and bool(self.sites or self.anchor is not None)

    @property
    def changes(self) -> bool:
        """Whether anything but its path is another than before."""
        return bool(self.sites or self.replacements)

    @property
    def is_new(self) -> bool:
        """Whether the checkpoint has no leaf of this path."""
        return self.before is None or self.before.path != self.path

    @property
    def start(self) -> TensorSpec:
        """What its values are before any site is applied: shape, and the dtype that they are exact in."""
        whole = self.whole
        if whole is not None and self.brought is not None and (self.before is None or whole.weight == 1):
            return TensorSpec(self.path, self.brought.shape, self.brought.dtype)
        if self.before is None and self.anchor is not None:
            return TensorSpec(self.path, self.anchor.shape, self.anchor.dtype, self.anchor.kind)
        assert self.before is not None, "a leaf comes from the checkpoint, from an adapter or from the base"
        dtype = self.before.dtype
        if self.replacements and is_float(dtype) and dtype.itemsize < FLOAT32.itemsize:
            dtype = FLOAT32
        return TensorSpec(self.path, self.before.shape, dtype, self.before.kind)

    @property
    def is_mixture(self) -> bool:
        """Whether it is interpolated with another leaf, and not by its deltas alone."""
        return self.anchor is not None and not (self.decided or self.sites)

    def rounding(
        self, stored: np.dtype[Any], serving: np.dtype[Any], asked: Rounding, by_row: str | None
    ) -> LeafRounding:
        """How it is rounded: what nothing is added to has no choice.

        Args:
            stored: What it is stored in.
            serving: What servers cast it to.
            asked: What the user asks for.
            by_row: The operation of a site that is no low-rank product, if there is one.
        """
        if self.sites:
            return leaf_rounding(asked, stored, serving, spaceless=None if by_row is None else without_space(by_row))
        if not self.is_mixture:
            return NEAREST
        assert self.anchor is not None, "a mixture has two sides"
        # Of what is computed, merge and judge hold other dtypes.
        mixes = fits_float32(self.declared or self.start.dtype) and fits_float32(self.anchor.dtype)
        return leaf_rounding(asked, stored, serving, spaceless=DENSE, on_host=not mixes)

    @property
    def whole(self) -> Replacement | None:
        """The replacement of the whole leaf, if there is one."""
        return next((found for found in self.replacements if found.rows is None), None)

    @property
    def reads_before(self) -> bool:
        """Whether the checkpoint's own values are part of the result."""
        whole = self.whole
        return self.before is not None and (whole is None or whole.weight != 1)


def leaf_changes(
    inputs: Inputs, survey: Survey, selection: Selection, options: MergeOptions
) -> Mapping[KeyPath, LeafChange]:
    """Every leaf that adapters change, replace or create, by its path in the output.

    Raises:
        ShapeMismatch: A replacement does not fit its leaf.
        UnsupportedCheckpoint: Weights and replacements that have no meaning together.
    """
    index = inputs.checkpoint.source.index()
    created = {leaf.path: leaf.source for leaf in survey.created}
    brings: dict[KeyPath, list[Replacement]] = {}
    for found in selection.replacements:
        weighed = with_fields(found, weight=found.weight * options.multiplier)
        brings.setdefault(found.target, []).append(weighed)
    sites: dict[KeyPath, list[AdapterSite]] = {}
    for site in selection.sites:
        sites.setdefault(site.targets[0], []).append(site)
    changes = {}
    for path in dict.fromkeys([*created, *brings, *sites]):
        replacements = tuple(brings.get(path, ()))
        before = index.tensors.get(created.get(path, path))
        brought = next((_brought(inputs, found, before) for found in replacements if found.rows is None), None)
        change = LeafChange(path, before, tuple(sites.get(path, ())), replacements, brought)
        for found in replacements:
            if found.rows is not None:
                _refuse_unfit_rows(inputs, found, change.start)
        _refuse_meaningless(change, inputs)
        changes[path] = change
    return changes


def config_changes(inputs: Inputs, survey: Survey, selection: Selection) -> Mapping[str, Any]:
    """What changes in the model's configuration, for what is selected: a vocabulary keeps its size with its tensors.

    Raises:
        UsageError: Of the tensors that an adapter resized, only some are selected.
    """
    left_out = [found for found in selection.excluded_replacements if _resizes(inputs, found)]
    if not left_out:
        return survey.config
    if any(_resizes(inputs, found) for found in selection.replacements):
        raise UsageError(
            "--include and --exclude leave out a tensor that has another size in the adapter, and take another such one",
            where=display(left_out[0].target),
            hint="take all resized tensors, or none",
        )
    return {key: value for key, value in survey.config.items() if key.split(".")[-1] != "vocab_size"}


def _resizes(inputs: Inputs, found: Replacement) -> bool:
    before = inputs.checkpoint.source.index().tensors.get(found.target)
    spec = inputs.source(found.adapter).index().tensors[found.path]
    return before is not None and found.rows is None and spec.shape != before.shape


def output_dtype(change: LeafChange, options: MergeOptions, dialect: Dialect) -> np.dtype[Any]:
    """What the leaf is stored in: that of the checkpoint's leaf, an adapter's where there is none, or what the user asks for."""
    stored = change.declared or (change.before.dtype if change.before is not None else change.start.dtype)
    if not is_float(stored) or change.start.kind != "array":
        return stored
    if not (change.changes or change.asked):
        return cast_dtype(options.dtype_untouched, stored, stored)
    auto = dialect.fused_dtype(stored) if change.sites else stored
    return cast_dtype(options.dtype, stored, auto)


def _brought(inputs: Inputs, found: Replacement, before: TensorSpec | None) -> TensorSpec:
    """The adapter's leaf instead of the checkpoint's, which it must fit: rows beyond a vocabulary are all that may be new."""
    source = inputs.source(found.adapter)
    spec = source.index().tensors[found.path]
    where = f"{source.path} :: {spec.name}"
    if before is None:
        if found.weight != 1:
            raise UnsupportedCheckpoint(
                "a new tensor at a weight other than 1: there is nothing to take the rest from",
                where=where,
                found=f"weight {found.weight:g}",
                hint="leave it out with --exclude, or take the adapter at weight 1",
            )
        return spec
    if is_float(spec.dtype) != is_float(before.dtype) or (found.weight != 1 and not is_float(spec.dtype)):
        raise ShapeMismatch(
            "a replacement of another kind of numbers", where=where, expected=before.dtype.name, found=spec.dtype.name
        )
    grown = spec.shape[:1] != before.shape[:1]
    if len(spec.shape) != len(before.shape) or spec.shape[1:] != before.shape[1:] or (grown and found.weight != 1):
        raise ShapeMismatch(
            "a replacement that does not fit",
            where=where,
            expected=before.shape,
            found=spec.shape,
            hint="a tensor of another size is taken at weight 1 or not at all" if found.weight != 1 else None,
        )
    return spec


def _refuse_unfit_rows(inputs: Inputs, found: Replacement, start: TensorSpec) -> None:
    source = inputs.source(found.adapter)
    spec = source.index().tensors[found.path]
    rows = found.rows or ()
    if spec.shape != (len(rows), *start.shape[1:]) or not all(0 <= row < start.shape[0] for row in rows):
        raise ShapeMismatch(
            "token rows that do not fit",
            where=f"{source.path} :: {spec.name}",
            expected=f"{(len(rows), *start.shape[1:])}, for rows of {start.shape}",
            found=f"{spec.shape}, for rows up to {max(rows, default=-1)}",
        )
    if not (is_float(spec.dtype) and is_float(start.dtype)):
        raise ShapeMismatch(
            "token rows of another kind of numbers",
            where=f"{source.path} :: {spec.name}",
            expected=start.dtype.name,
            found=spec.dtype.name,
        )


def _refuse_meaningless(change: LeafChange, inputs: Inputs) -> None:
    owners = {site.adapter for site in change.sites} | {found.adapter for found in change.replacements}
    rescaled = any(site.operation == RESCALING for site in change.sites)
    weighed = any(found.weight != 1 for found in change.replacements)
    if change.replacements and rescaled and (len(owners) > 1 or weighed):
        raise UnsupportedCheckpoint(
            "DoRA on a replaced tensor, weighted or beside another adapter",
            where=display(change.path),
            hint="merge that adapter alone, at weight 1",
        )
    for site in change.sites:
        _refuse_unfit_site(inputs, site, change.start)
        first = change.sites[0].parameters.equation
        one, other = [_roles(equation.target, equation.inputs) for equation in (first, site.parameters.equation)]
        if one != other:
            raise UnsupportedCheckpoint(
                "two adapters that read one kernel in two orientations",
                where=f"{inputs.checkpoint.source.path} :: {display(change.path)}",
                found=f"{first} and {site.parameters.equation}",
            )


def _refuse_unfit_site(inputs: Inputs, site: AdapterSite, start: TensorSpec) -> None:
    """A site was found on the checkpoint's leaf; another adapter may bring that in another size."""
    source = inputs.source(site.adapter)
    tensors = source.index().tensors
    before = inputs.checkpoint.source.index().tensors.get(site.targets[0])
    shapes = {role: factor.extents(tensors[factor.path].shape) for role, factor in site.factors.items()}
    if "lora_b" not in shapes:
        if before is not None and before.shape != start.shape:
            raise ShapeMismatch(
                "an adapter on a tensor that another adapter brings in another shape",
                where=f"{source.path} :: {display(site.targets[0])}",
                expected=before.shape,
                found=start.shape,
            )
        return
    a, b = shapes.get("lora_a", (1,)), shapes["lora_b"]
    if site.parameters.equation.sizes(a, b, start.shape) is None:
        raise ShapeMismatch(
            "factors that do not fit what another adapter brings",
            where=f"{source.path} :: {display(site.factors['lora_b'].path)}",
            expected=f"factors for {start.shape}",
            found=f"{a} and {b}",
        )


def _roles(target: str, inputs: str) -> tuple[bool, ...]:
    return tuple(dim in inputs for dim in target)
