"""The plan of a merge: every question that needs no tensor bytes, answered before the first one is read. Pure; needs no JAX."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lora_merge_cli.changes import RESCALING, LeafChange, config_changes, output_dtype
from lora_merge_cli.combining import Combining, refuse_uncombinable
from lora_merge_cli.dtypes import FLOAT32, is_float, is_float8
from lora_merge_cli.errors import (
    AlreadyMerged,
    NothingToMerge,
    UnsupportedCheckpoint,
)
from lora_merge_cli.fine_tunes import of_all
from lora_merge_cli.inputs import Inputs, survey_inputs, tree_of
from lora_merge_cli.mixing import Mixing
from lora_merge_cli.operations import cut, is_row_operation
from lora_merge_cli.operations.interface import INTEGERS
from lora_merge_cli.options import MergeOptions, check_options
from lora_merge_cli.outline import Outline, outline
from lora_merge_cli.records import (
    AdapterSite,
    Constant,
    Created,
    Dropped,
    KeyPath,
    ModelSummary,
    Replacement,
    Survey,
    TensorSpec,
    even_part,
    slab,
)
from lora_merge_cli.rounding import NEAREST, LeafRounding, Rounding
from lora_merge_cli.selection import Selection, select

_BLOCK_BYTES = 8 * 2**20
_CHUNK_BYTES = 128 * 2**20
_BLOCKS_IN_FLIGHT = 12  # read ahead, on the device, and on their way to storage
_FACTOR_BYTES_PER_ENTRY = 32  # two factors and a basis in float32, and the float64 copies that the basis is made from
_RUNTIME_BYTES = 400 * 2**20


Origin = Literal["copied", "cast", "changed", "replaced", "created", "mixed"]
"""Copied bit for bit, cast to another dtype, changed by adapters, replaced by an adapter's own values in whole or in rows, a
leaf that the checkpoint does not have, or interpolated with the base's."""


@dataclass(frozen=True)
class Step:
    """One output leaf, and where it comes from."""

    output: TensorSpec
    """What is written."""
    source: TensorSpec
    """What its values start as: the shape and dtype before any adapter is added."""
    before: TensorSpec | None
    """The checkpoint's leaf that is read; None where only an adapter has values for it."""
    origin: Origin
    """What becomes of it."""
    block: tuple[int, ...]
    """What is read and computed at a time: a run of entries in row-major order; depends on the leaf alone."""
    chunk: tuple[int, ...]
    """What is stored in one piece, in formats that keep an array in several: a run of entries too."""
    sites: tuple[AdapterSite, ...] = ()
    """The adapters that change it."""
    replacements: tuple[Replacement, ...] = ()
    """What adapters bring instead of its own values, with the weight that they are taken at."""
    base: TensorSpec | None = None
    """The base's leaf: to add the delta to, and to compare with."""
    anchor: TensorSpec | None = None
    """Of an interpolation, where it is not that: the leaf of `Inputs.anchor` that alpha 0 stands for."""
    alphas: tuple[float, ...] = (1.0,)
    """How much of the change to take: one for all of it, or one per stacked layer."""
    mixed: bool = False
    """Whether an alpha has a say in it."""
    declared: np.dtype[Any] | None = None
    """What `before` counts as stored in, where it is computed and has a dtype of its own."""
    rounding: LeafRounding = NEAREST
    """How it is rounded."""

    def alpha_of(self, layer: int) -> float:
        """The alpha of one stacked layer."""
        return self.alphas[layer] if len(self.alphas) > 1 else self.alphas[0]

    def tensor_name(self, layer: int) -> str:
        """What random draws call one stacked layer of the leaf, or all of it where none are stacked."""
        stacked = bool(self.sites) and self.sites[0].parameters.equation.stacked
        return f"{self.output.name}#{layer}" if stacked else self.output.name

    @property
    def is_mixture(self) -> bool:
        """Whether it is interpolated with another leaf, and not by its deltas alone."""
        return self.mixed and not self.sites

    @property
    def is_computed(self) -> bool:
        """Whether something is added to it."""
        return self.is_mixture or bool(self.sites)


@dataclass(frozen=True)
class MergePlan:
    """All that a merge will do. A dry run prints it, a run executes it.

    Every input leaf is in exactly one of: a step, the factors of a site, `dropped`.
    """

    dialect: str
    """The trainer's conventions."""
    model: ModelSummary
    """Which model the checkpoint is of."""
    steps: tuple[Step, ...]
    """The output's leaves in the input's order."""
    constants: tuple[Constant, ...]
    """The output's parts that are no arrays."""
    shared: Mapping[KeyPath, KeyPath]
    """Untouched leaves that the checkpoint stores once under several paths: each later path, with the first one."""
    sites: tuple[AdapterSite, ...]
    """The adapters that are merged; their factors are consumed."""
    replacements: tuple[Replacement, ...]
    """What adapters bring whole, with the weights that it is taken at."""
    created: tuple[Created, ...]
    """Leaves that the output has besides the checkpoint's, and why."""
    dropped: tuple[Dropped, ...]
    """Leaves that the output does not have, and why."""
    factors: Mapping[tuple[int | None, KeyPath], TensorSpec]
    """The factors of `sites`, by the adapter's number and path."""
    equal: tuple[tuple[KeyPath, KeyPath], ...]
    """Pairs of the checkpoint's leaves that must hold the same bits."""
    copies: tuple[Replacement, ...]
    """What adapters hold of the checkpoint's own values, and must be that."""
    config: Mapping[str, Any]
    """What changes in the model's configuration; see `Survey.config`."""
    multiplier: float
    """What every delta is multiplied by besides its scale."""
    serving_dtype: np.dtype[Any]
    """What servers cast the result to."""
    notes: tuple[str, ...]
    """What a reader of the report should know."""
    warnings: tuple[str, ...]
    """What should make a reader stop."""
    peak_bytes: int
    """An estimate of the largest resident size."""
    output_bytes: int
    """The size of all output arrays before compression."""
    combining: Combining = field(default_factory=Combining)
    """How several adapters on one kernel become one change."""
    rounding: Rounding = field(default_factory=Rounding)
    """How results are rounded, where they have a choice."""
    mixing: Mixing | None = None
    """Of an interpolation: which alpha goes where."""
    unmixed: tuple[str, ...] = ()
    """Of an interpolation: leaves that the fine-tune trained and that are its own at every alpha."""


def plan_merge(inputs: Inputs, options: MergeOptions) -> MergePlan:
    """Plan the merge of the adapters inside a checkpoint, or beside it, into its kernels.

    Raises:
        UsageError: An option has no valid value, or a glob matches no site.
        Refused: The merge would be wrong or pointless; see its subclasses.
    """
    check_options(options)
    multiplier = options.multiplier
    options = of_all(inputs, options)
    checkpoint, dialect = inputs.checkpoint, inputs.dialect
    index = checkpoint.source.index()
    survey = survey_inputs(inputs, options.scales, residual_base=options.residual_base)
    selection = select(dialect, survey, options.include, options.exclude)
    if survey.problems:
        raise survey.problems[0]
    refuse_nothing(inputs, survey, selection, options)
    refuse_unscaled(inputs, selection.sites)
    refuse_uncombinable(options.combining, [part.checkpoint.source.path for part in inputs.adapters], selection.sites)
    found = outline(inputs, survey, selection, options)
    selection = found.selection
    factors = {
        (site.adapter, factor.path): inputs.source(site.adapter).index().tensors[factor.path]
        for site in selection.sites
        for factor in site.factors.values()
    }
    steps = tuple(_step(inputs, leaf, options, found.bases.get(path)) for path, leaf in found.leaves.items())
    shared = {later: first for later, first in index.shared.items() if _stays_shared(inputs, found, later, first)}
    return MergePlan(
        dialect=dialect.name,
        model=dialect.summary(tree_of(checkpoint)),
        steps=steps,
        constants=index.constants,
        shared=shared,
        sites=selection.sites,
        replacements=tuple(each for leaf in found.leaves.values() for each in leaf.replacements),
        created=survey.created,
        dropped=found.dropped,
        factors=factors,
        equal=survey.equal,
        copies=survey.copies,
        config={**config_changes(inputs, survey, selection), **found.config},
        multiplier=multiplier,
        serving_dtype=options.served(dialect.serving_dtype),
        notes=(*_notes(inputs, survey, selection, options), *found.notes),
        warnings=(*inputs.warnings, *survey.warnings),
        peak_bytes=_peak_bytes(steps, factors.values())
        + _combined_bytes(options.combining, steps)
        + _rounded_bytes(steps),
        output_bytes=sum(step.output.nbytes for step in steps),
        combining=options.combining.of(len(inputs.adapters), selection.sites),
        rounding=options.rounding,
        mixing=options.mixing,
        unmixed=found.unmixed,
    )


def _stays_shared(inputs: Inputs, found: Outline, later: KeyPath, first: KeyPath) -> bool:
    """Whether two leaves that the checkpoint stores once are alike in the output too."""
    if not {later, first} <= found.leaves.keys():
        return False
    one, other = found.leaves[first], found.leaves[later]
    if one.changes or other.changes or one.alphas != other.alphas:
        return False
    if one.anchor is None or other.anchor is None:
        return one.anchor is other.anchor
    return inputs.anchor.index().shared.get(other.anchor.path) == one.anchor.path


def _notes(inputs: Inputs, survey: Survey, selection: Selection, options: MergeOptions) -> Iterator[str]:
    for _, opened in inputs.opened:
        yield from opened.notes
    yield from survey.notes
    if selection.excluded:
        total = len(survey.sites) + len(survey.replacements)
        yield (
            f"{selection.excluded} of {total} adapters are left out by --include, --exclude or --only-common: "
            "the result does not act as the fine-tune did"
        )
    if inputs.base is not None and options.mixing is None:
        yield "with --base each delta is added to the base's own values, not to the rounded kernel that the fine-tune ran on"
    kernels: dict[KeyPath, list[str]] = {}
    for site in selection.sites:
        if not is_row_operation(site.operation):
            kernels.setdefault(site.targets[0], []).append(site.operation)
    # The first to come rescales nothing but the base.
    ordered = sum(RESCALING in operations[1:] for operations in kernels.values())
    if ordered:
        yield (
            f"the order of the adapters counts: on {ordered} kernels DoRA rescales what the adapters before it made, as peft merges them"
        )


def refuse_unscaled(inputs: Inputs, sites: Sequence[AdapterSite]) -> None:
    """Refuse sites whose scale nothing states.

    Raises:
        UnknownScale: There are some.
    """
    unscaled = [site for site in sites if site.parameters.scale.value is None]
    if unscaled:
        adapter = unscaled[0].adapter
        dialect = inputs.dialect if adapter is None else inputs.adapters[adapter].dialect
        raise dialect.unknown_scale(unscaled, str(inputs.source(adapter).path))


def refuse_nothing(inputs: Inputs, survey: Survey, selection: Selection, options: MergeOptions) -> None:
    """Refuse to merge, or to interpolate by adapters alone, where no site or replacement is chosen.

    Raises:
        NothingToMerge: So it is.
    """
    mixing = options.mixing
    by_adapters = mixing is None or (inputs.base is None and (bool(inputs.adapters) or mixing.deltas_only))
    if by_adapters and not selection:
        raise _nothing_to_merge(inputs, survey)


def _nothing_to_merge(inputs: Inputs, survey: Survey) -> NothingToMerge:
    """The refusal of inputs without chosen sites, and why there are none."""
    checkpoint = inputs.checkpoint
    where = checkpoint.source.path
    if survey.sites or survey.replacements:
        return NothingToMerge("nothing to merge: --include and --exclude leave no site", where=where)
    if inputs.adapters:
        return NothingToMerge("nothing to merge: the adapter changes nothing", where=inputs.source(0).path)
    if checkpoint.provenance is not None:
        return AlreadyMerged(
            "already merged: no adapters are left",
            where=where,
            found=f"{checkpoint.provenance.name} of an earlier merge",
            hint="serve it as it is",
        )
    return NothingToMerge(
        "nothing to merge: no adapter keys, so it is already merged or was trained without LoRA",
        where=where,
        found=f"{len(checkpoint.source.index().tensors)} leaves, none with lora in its name",
        hint="if the adapter is a file of its own, give it with --adapter",
    )


def _step(inputs: Inputs, change: LeafChange, options: MergeOptions, base_spec: TensorSpec | None) -> Step:
    start = change.start
    _refuse_unfit_dtypes(inputs, change, options)
    dtype = output_dtype(change, options, inputs.dialect)
    output = TensorSpec(change.path, start.shape, dtype, start.kind)
    return Step(
        output=output,
        source=start,
        before=change.before,
        origin=_origin(change, dtype),
        block=_block(change),
        chunk=_chunk(output),
        sites=change.sites,
        replacements=change.replacements,
        base=base_spec,
        anchor=change.anchor,
        alphas=change.alphas,
        mixed=options.mixing is not None and change.is_mixed,
        declared=change.declared,
        rounding=_rounding(inputs, change, dtype, options),
    )


def _rounding(inputs: Inputs, change: LeafChange, dtype: np.dtype[Any], options: MergeOptions) -> LeafRounding:
    by_row = next((site.operation for site in change.sites if is_row_operation(site.operation)), None)
    return change.rounding(dtype, options.served(inputs.dialect.serving_dtype), options.rounding, by_row)


def _origin(change: LeafChange, dtype: np.dtype[Any]) -> Origin:
    if change.is_new:
        return "created"
    if change.sites:
        return "changed"
    if change.is_mixture:
        return "mixed"
    if change.replacements:
        return "replaced"
    return "copied" if dtype == change.start.dtype else "cast"


def _refuse_unfit_dtypes(inputs: Inputs, change: LeafChange, options: MergeOptions) -> None:
    spec = change.start
    path = inputs.checkpoint.source.path
    if change.sites:
        leaves = [(path, spec)]
        for site in change.sites:
            source = inputs.source(site.adapter)
            leaves += [
                (source.path, source.index().tensors[factor.path])
                for role, factor in site.factors.items()
                if role not in INTEGERS
            ]
        for where, leaf in leaves:
            if not is_float(leaf.dtype):
                raise UnsupportedCheckpoint(
                    "a kernel or factor that is not floating-point, as if quantised",
                    where=f"{where} :: {leaf.name}",
                    found=leaf.dtype.name,
                    hint="merge into the checkpoint that it was quantised from",
                )
    flag = "--dtype" if change.changes or change.asked else "--dtype-untouched"
    if is_float8(spec.dtype) and output_dtype(change, options, inputs.dialect) != spec.dtype:
        raise UnsupportedCheckpoint(
            "a float8 leaf that would change its dtype",
            where=f"{path} :: {spec.name}",
            found=spec.dtype.name,
            hint=f"pass {flag} keep",
        )
    if change.sites and spec.dtype == np.float64 and output_dtype(change, options, inputs.dialect) == np.float64:
        raise UnsupportedCheckpoint(
            "a float64 kernel under an adapter, and the arithmetic is float32",
            where=f"{path} :: {spec.name}",
            hint="pass --dtype float32",
        )


def _block(change: LeafChange) -> tuple[int, ...]:
    start = change.start
    if change.sites:
        equation = change.sites[0].parameters.equation
        if (
            any(is_row_operation(site.operation) for site in change.sites)
            and not cut(equation, start.shape).outputs_first
        ):
            return start.shape
        inner = cut(equation.of_one_layer, start.shape[1:] if equation.stacked else start.shape).block
        return (1, *inner) if equation.stacked else inner
    if len(change.alphas) > 1:
        return (1, *slab(start.shape[1:], _BLOCK_BYTES // start.dtype.itemsize))
    return slab(start.shape, _BLOCK_BYTES // start.dtype.itemsize)


def _chunk(output: TensorSpec) -> tuple[int, ...]:
    """A layer where layers are stacked, so that readers may take one at a time; else what is small enough to hold several of."""
    if not output.shape:
        return ()
    first, *rest = output.shape
    row = math.prod(rest) * output.dtype.itemsize
    rows = 1 if len(rest) > 1 else even_part(first, max(1, _CHUNK_BYTES // max(row, 1)))
    return (rows, *(max(1, extent) for extent in rest))


def _combined_bytes(combining: Combining, steps: Sequence[Step]) -> int:
    """What a combination of whole deltas holds of one kernel: each delta pruned, stacked, weighted and its signs, and an SVD."""
    if not (combining.prunes and combining.is_svd):
        return 0
    return max(((4 * len(step.sites) + 3) * 8 * step.output.size for step in steps if step.sites), default=0)


def _rounded_bytes(steps: Sequence[Step]) -> int:
    """What rounding to another value than the nearest holds besides: errors carried on, ranks by outputs, or random bits."""

    def of(step: Step) -> int:
        if step.rounding.method == "stochastic":
            return _BLOCKS_IN_FLIGHT * math.prod(step.block) * 2
        if step.rounding.method == "nearest":
            return 0
        equation = step.sites[0].parameters.equation
        extents = dict(zip(equation.target, step.source.shape, strict=True))
        rank, outputs = (
            sum(site.parameters.rank for site in step.sites),
            math.prod(extents[d] for d in equation.outputs),
        )
        inputs = math.prod(extents[d] for d in equation.inputs)
        held = inputs + 2 * outputs  # U, and one more projection, in float64
        return rank * (_BLOCKS_IN_FLIGHT * outputs + held) * FLOAT32.itemsize

    return max(map(of, steps), default=0)


def _peak_bytes(steps: Sequence[Step], factors: Collection[TensorSpec]) -> int:
    """An estimate: the blocks between reading and storing, and the largest factors."""
    block = max(
        (
            math.prod(step.block) * (step.source.dtype.itemsize + step.output.dtype.itemsize)
            + sum(
                math.prod(step.block) * other.dtype.itemsize for other in (step.base, step.anchor) if other is not None
            )
            for step in steps
        ),
        default=0,
    )
    held = max((spec.size for spec in factors), default=0)
    return _RUNTIME_BYTES + _BLOCKS_IN_FLIGHT * block + held * _FACTOR_BYTES_PER_ENTRY
