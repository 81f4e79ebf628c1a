"""Every leaf of an output and what becomes of it: pure, and shared by the plan of a merge or an interpolation and by its judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_merge_cli.changes import RESCALING, LeafChange, leaf_changes
from lora_merge_cli.dialects import Dialect, looks_like_adapter
from lora_merge_cli.errors import NothingToMerge, Refused, ShapeMismatch, UnsupportedCheckpoint, UsageError, WrongBase
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.mixing import Mixing, Override
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.pairing import Pairing, by_canonical_path, config_of_base, respelled
from lora_merge_cli.records import (
    AdapterSite,
    Dropped,
    KeyPath,
    Replacement,
    Survey,
    TensorSpec,
    display,
    first_names,
)
from lora_merge_cli.selection import Selection, leaf_names, matches_any, site_names

_BY_BASE = "the base does not have it so, and --only-common base decides"


@dataclass(frozen=True)
class Outline:
    """What an output consists of."""

    leaves: Mapping[KeyPath, LeafChange]
    """Every leaf by its path, in the checkpoint's order, new ones behind."""
    bases: Mapping[KeyPath, TensorSpec]
    """The base's leaf for each that the fine-tune froze: deltas are added to it, and it must equal the checkpoint's, rounded."""
    selection: Selection
    """The sites and replacements that are in it."""
    dropped: tuple[Dropped, ...]
    """Leaves that it does not have, and why, besides the factors."""
    unmixed: tuple[str, ...] = ()
    """Of an interpolation: leaves that the fine-tune trained and that are its own at every alpha."""
    notes: tuple[str, ...] = ()
    """What a reader of the report should know."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What must be the base's in the model's configuration, by dotted key, since leaves are."""


def outline(inputs: Inputs, survey: Survey, selection: Selection, options: MergeOptions) -> Outline:
    """What becomes of every leaf.

    Args:
        inputs: What is read.
        survey: What the adapters change.
        selection: What of that is wanted.
        options: What the user asks for.

    Raises:
        WrongBase: The base does not have the leaves that it must have.
        ShapeMismatch, UnsupportedCheckpoint: A change does not fit its leaf, or makes no sense.
        NothingToMerge: There is nothing to interpolate with.
        UsageError: An ``--alpha-for`` matches nothing.
    """
    mixing = options.mixing
    if mixing is None:
        return Outline(
            _all_leaves(inputs, survey, selection, options),
            _frozen_bases(inputs, selection.sites),
            selection,
            (*survey.dropped, *selection.dropped),
        )
    between = _with_base if inputs.base is not None else _with_adapters
    found = between(inputs, survey, selection, options, mixing)
    leaves, notes = _with_alphas(inputs, found, mixing)
    for leaf in leaves.values():
        _refuse_meaningless(inputs, leaf)
    return dataclasses.replace(found, leaves=leaves, notes=(*found.notes, *notes))


def _all_leaves(
    inputs: Inputs, survey: Survey, selection: Selection, options: MergeOptions
) -> dict[KeyPath, LeafChange]:
    """The checkpoint's leaves but for factors and what is dropped, then new ones."""
    gone = {leaf.path for leaf in (*survey.dropped, *selection.dropped) if leaf.adapter is None}
    gone |= {factor.path for site in selection.sites if site.adapter is None for factor in site.factors.values()}
    index = inputs.checkpoint.source.index()
    changes = leaf_changes(inputs, survey, selection, options)
    leaves = {
        path: changes[path] if path in changes else LeafChange(path, spec, declared=inputs.declared.get(path))
        for path, spec in {**index.tensors, **dict.fromkeys(changes)}.items()
        if path not in gone
    }
    kept = {path: leaves[path] for path in survey.dtypes if path in leaves}
    return leaves | {path: dataclasses.replace(leaf, declared=survey.dtypes[path]) for path, leaf in kept.items()}


def _frozen_bases(inputs: Inputs, sites: Sequence[AdapterSite]) -> Mapping[KeyPath, TensorSpec]:
    """The base's leaf for each leaf that the fine-tune froze.

    Raises:
        WrongBase: The base does not have them all, in the same shapes.
    """
    if inputs.base is None:
        return {}
    index = inputs.checkpoint.source.index()
    available = by_canonical_path(inputs.dialect, inputs.base.source.index().tensors.values())
    frozen = _frozen(inputs, sites)
    matched, wrong = {}, []
    for path in frozen:
        spec = available.get(inputs.dialect.canonical(path))
        if spec is None or spec.shape != index.tensors[path].shape:
            found = "missing" if spec is None else f"shape {spec.shape}"
            wrong.append(f"{index.tensors[path].name} ({found})")
        else:
            matched[path] = spec
    if wrong:
        raise WrongBase(
            "the base does not have the leaves that the fine-tune froze",
            where=inputs.base.source.path,
            expected=f"{len(frozen)} frozen leaves of {inputs.checkpoint.source.path}",
            found=f"{len(wrong)} missing or of another shape: {first_names(wrong, 3)}",
            hint="give the checkpoint that the fine-tune started from",
        )
    return matched


def _frozen(inputs: Inputs, sites: Sequence[AdapterSite]) -> list[KeyPath]:
    grouping = inputs.dialect.grouping(inputs.checkpoint.source.index(), tuple(sites))
    return [path for path, group in grouping.items() if group in ("frozen", "lora")]


def _with_base(inputs: Inputs, survey: Survey, selection: Selection, options: MergeOptions, mixing: Mixing) -> Outline:
    """A fine-tune, with adapters inside or dense, beside its base."""
    assert inputs.base is not None, "there is one"
    source, dialect, side = inputs.base.source, inputs.dialect, mixing.only_common
    _refuse_adapters_in_base(inputs, source.index().tensors)
    if not survey.sites:
        _refuse_adapter_options(options)
    leaves = _all_leaves(inputs, survey, selection, options)
    apart = Pairing.of(dialect, leaves.values(), source.index().tensors.values())
    if apart and side is None:
        raise WrongBase(
            "leaves that only one side has, or that differ in shape",
            where=source.path,
            expected=f"the leaves of {inputs.checkpoint.source.path}",
            found=first_names(apart.in_words, 5),
            hint="pass --only-common tuned or --only-common base to take that side's",
        )
    dropped = [*survey.dropped, *selection.dropped]
    notes: list[str] = []
    if side == "base":
        odd_sites = tuple(site for site in selection.sites if site.targets[0] in apart.odd)
        selection = _excluding(selection, odd_sites)
        dropped += _dropped_besides(selection, dropped)
        dropped += [Dropped(path, _BY_BASE) for path, spec in apart.odd.items() if spec is None]
        leaves = _with_those_of_base(dialect, _all_leaves(inputs, survey, selection, options), apart)
    elif apart.only_base:
        names = first_names([spec.name for spec in apart.only_base], 3)
        notes.append(f"{len(apart.only_base)} leaves that only the base has are left out: {names}")
    # What an adapter's training froze is known; of a dense checkpoint any leaf may have moved.
    frozen = set(_frozen(inputs, selection.sites)) if survey.sites else set()
    if not dialect.tells_frozen:
        frozen &= {target for site in selection.sites for target in site.targets}
    bases = {path: apart.both[path] for path in leaves if path in frozen and path in apart.both}
    for path, leaf in leaves.items():
        if leaf.decided or path in bases:
            continue
        spec = apart.both.get(path)
        moved = dataclasses.replace(leaf, anchor=spec, asked=not survey.sites)
        leaves[path] = dataclasses.replace(leaf, decided=True) if spec is None else moved
    unmixed = [display(path) for path in apart.odd if side == "tuned"]
    config = config_of_base(inputs) if side == "base" and apart else {}
    return Outline(leaves, bases, selection, tuple(dropped), tuple(unmixed), tuple(notes), config)


def _with_those_of_base(
    dialect: Dialect, leaves: Mapping[KeyPath, LeafChange], apart: Pairing
) -> dict[KeyPath, LeafChange]:
    """The leaves as the base has them, where the two differ: without those that it does not have, and with its own."""
    found = {path: leaf for path, leaf in leaves.items() if apart.odd.get(path, leaf) is not None}
    for path, spec in apart.odd.items():
        if spec is not None:
            found[path] = _of_base(path, spec)
    example = next(iter(leaves))
    for spec in apart.only_base:
        path = respelled(dialect.canonical(spec.path), example, dialect.canonical(example))
        found[path] = _of_base(path, spec)
    return found


def _refuse_adapter_options(options: MergeOptions) -> None:
    given = {
        "--include": options.include,
        "--exclude": options.exclude,
        "--scale": options.multiplier != 1,
    }
    for flag, value in given.items():
        if value:
            raise UsageError(
                f"{flag} is for adapters, and neither side has any",
                hint="--alpha-for gives leaves an alpha of their own",
            )


def _of_base(path: KeyPath, spec: TensorSpec) -> LeafChange:
    return LeafChange(path, None, anchor=spec, alphas=(0.0,), decided=True)


def _refuse_adapters_in_base(inputs: Inputs, tensors: Iterable[KeyPath]) -> None:
    inside = [display(path) for path in tensors if looks_like_adapter(path)]
    if inside and inputs.base is not None:
        raise WrongBase(
            "the base has adapters of its own",
            where=inputs.base.source.path,
            found=first_names(inside, 3),
            hint="merge it first, or give BASE and TUNED in this order",
        )


def _with_adapters(
    inputs: Inputs, survey: Survey, selection: Selection, options: MergeOptions, mixing: Mixing
) -> Outline:
    """A base with adapters beside it, or a fine-tune whose deltas alone are scaled."""
    if not inputs.adapters and not mixing.deltas_only:
        raise _no_base(inputs, selection)
    tensors = inputs.checkpoint.source.index().tensors
    resized = tuple(found for found in selection.replacements if _resizes(inputs, found))
    if resized and mixing.only_common is None:
        raise ShapeMismatch(
            "leaves that the adapter brings in another shape than the base's",
            where=inputs.source(resized[0].adapter).path,
            found=first_names([display(found.target) for found in resized], 3),
            hint="pass --only-common tuned or --only-common base to take that side's",
        )
    dropped = [*survey.dropped, *selection.dropped]
    if mixing.only_common == "base":
        selection = dataclasses.replace(
            selection,
            replacements=tuple(found for found in selection.replacements if found not in resized),
            excluded_replacements=(*selection.excluded_replacements, *resized),
        )
        dropped += _dropped_besides(selection, dropped)
    taken_whole = {found.target for found in resized}
    leaves = _all_leaves(inputs, survey, selection, options)
    unmixed = []
    for path, leaf in leaves.items():
        if leaf.replacements and (leaf.before is None or path in taken_whole):
            leaves[path] = dataclasses.replace(leaf, decided=True)
            unmixed.append(display(path))
        elif leaf.replacements:
            leaves[path] = dataclasses.replace(leaf, anchor=leaf.before)
    if not inputs.adapters:
        grouping = inputs.dialect.grouping(inputs.checkpoint.source.index(), selection.sites)
        unmixed += [tensors[path].name for path, group in grouping.items() if group == "trained"]
    return Outline(leaves, {}, selection, tuple(dropped), tuple(unmixed))


def _resizes(inputs: Inputs, found: Replacement) -> bool:
    before = inputs.checkpoint.source.index().tensors.get(found.target)
    brought = inputs.source(found.adapter).index().tensors[found.path]
    return before is not None and found.rows is None and brought.shape != before.shape


def _no_base(inputs: Inputs, selection: Selection) -> Refused:
    where = inputs.checkpoint.source.path
    if selection:
        return WrongBase(
            "no base: of a fine-tune alone only the adapters' deltas can be scaled, and not what it trained in full",
            where=where,
            hint="give BASE and TUNED, or pass --deltas-only if that is wanted",
        )
    return NothingToMerge(
        "nothing to interpolate with", where=where, hint="give BASE and TUNED, or BASE with --adapter"
    )


def _dropped_besides(selection: Selection, dropped: Sequence[Dropped]) -> list[Dropped]:
    """What of an adapter is no longer taken since one side decides."""
    known = {(leaf.adapter, leaf.path) for leaf in dropped}
    return [
        Dropped(leaf.path, _BY_BASE, leaf.adapter)
        for leaf in selection.dropped
        if (leaf.adapter, leaf.path) not in known
    ]


def _excluding(selection: Selection, sites: Sequence[AdapterSite]) -> Selection:
    return dataclasses.replace(
        selection,
        sites=tuple(site for site in selection.sites if site not in sites),
        excluded_sites=(*selection.excluded_sites, *sites),
    )


def _with_alphas(inputs: Inputs, found: Outline, mixing: Mixing) -> tuple[dict[KeyPath, LeafChange], list[str]]:
    """The leaves, each with its alphas, and notes on overrides without an effect.

    Raises:
        UsageError: An override matches no leaf.
    """
    dialect = inputs.dialect
    labels = {site.targets[0]: site_names(dialect, site) for site in found.selection.sites}
    names = {path: (*leaf_names(dialect, path), *labels.get(path, ())) for path in found.leaves}
    matched: dict[KeyPath, Override] = {}
    notes: list[str] = []
    for override in mixing.overrides:
        hits = [path for path in names if matches_any(names[path], (override.glob,))]
        if not hits:
            raise UsageError(
                f"--alpha-for {override.glob!r} matches no leaf",
                expected=f"a glob for names such as {display(dialect.canonical(next(iter(names))))}",
            )
        if not any(found.leaves[path].is_mixed for path in hits):
            notes.append(f"--alpha-for {override.glob!r} matches only leaves that are not interpolated")
        for path in hits:
            matched.setdefault(path, override)
    depths = {} if mixing.schedule is None else dialect.depths(inputs.checkpoint.source.index())
    leaves = {
        path: dataclasses.replace(leaf, alphas=mixing.of(matched.get(path), depths.get(path)))
        if leaf.is_mixed
        else leaf
        for path, leaf in found.leaves.items()
    }
    return leaves, notes


def _refuse_meaningless(inputs: Inputs, leaf: LeafChange) -> None:
    where = f"{inputs.checkpoint.source.path} :: {display(leaf.path)}"
    rescaled = any(site.operation == RESCALING for site in leaf.sites)
    if leaf.replacements and rescaled and not set(leaf.alphas) <= {0.0, 1.0}:
        raise UnsupportedCheckpoint(
            "DoRA on a replaced tensor, part of the way",
            where=where,
            hint="give it alpha 0 or 1 with --alpha-for",
        )
    stacked = all(site.parameters.equation.stacked for site in leaf.sites)
    if len(leaf.alphas) > 1 and (not stacked or len(leaf.alphas) != leaf.start.shape[0]):
        raise UnsupportedCheckpoint(
            "a schedule over layers, and a kernel that does not stack them along its first axis",
            where=where,
            hint="give it an alpha of its own with --alpha-for",
        )
