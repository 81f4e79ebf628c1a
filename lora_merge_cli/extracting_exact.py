"""Extraction from a checkpoint with adapters inside: its own factors, bit for bit, and the leaves that it trained in full."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_merge_cli.adapter_writing import carried, write_adapter
from lora_merge_cli.dense_deltas import Sides, is_moved
from lora_merge_cli.dialects.detached_document import TRAINED, Document, detached_config
from lora_merge_cli.errors import NothingToMerge, UsageError, WrongBase
from lora_merge_cli.extract_report import ExtractReport
from lora_merge_cli.extracting_document import base_record, kept_dtypes, made_by
from lora_merge_cli.extracting_prepared import ExtractRequest, PreparedExtraction, trained_record
from lora_merge_cli.factors import FactorReader, check_factors
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.listening import Listener
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.pairing import by_canonical_path
from lora_merge_cli.plan import MergePlan, plan_merge
from lora_merge_cli.records import Replacement, TensorSpec, first_names
from lora_merge_cli.staging import check_space


def plan_of(request: ExtractRequest, inputs: Inputs) -> MergePlan:
    """How the adapters inside would be merged: whatever makes that impossible makes an adapter of them wrong too."""
    if request.rank is not None or request.energy is not None:
        flag = "--rank" if request.rank is not None else "--energy"
        raise UsageError(
            f"{flag} is for dense checkpoints, and this one has adapters inside: they are taken as they are",
            where=inputs.checkpoint.source.path,
            hint=f"leave {flag} out; lora-merge resize makes an adapter smaller",
        )
    if inputs.base is None and not inputs.dialect.tells_frozen:
        raise UsageError(
            "only the base tells what this fine-tune trained in full",
            where=inputs.checkpoint.source.path,
            hint="pass --base BASE",
        )
    return plan_merge(inputs, MergeOptions(request.scales, include=request.include, exclude=request.exclude))


def extract_exact(
    prepared: PreparedExtraction, stage: Path, listener: Listener, pool: ThreadPoolExecutor
) -> ExtractReport:
    """The factors of a fine-tune with adapters inside, and what it trained in full."""
    inputs, plan, request = prepared.inputs, prepared.plan, prepared.request
    assert plan is not None and request.output is not None, "there are adapters inside, and a place for them"
    source = inputs.checkpoint.source
    _refuse_silence(inputs, plan)
    frozen, trained = prepared.known_groups()
    frozen, moved = _compared(prepared, frozen, listener, pool)
    order = {path: place for place, path in enumerate(source.index().tensors)}
    trained = sorted([*trained, *moved], key=lambda spec: order[spec.path])
    carried_whole = [] if request.without_trained else trained
    _refuse_reshaped(inputs, carried_whole)
    factors = {factor.path for site in plan.sites for factor in site.factors.values()}
    tensors = source.index().tensors
    specs = [*(tensors[path] for path in sorted(factors, key=order.__getitem__)), *carried_whole]
    check_space(request.output, sum(spec.nbytes for spec in specs))
    listener.start(sum(spec.nbytes for spec in specs))
    document = Document(
        inputs.dialect,
        plan.sites,
        tuple(Replacement(spec.path, spec.path, TRAINED) for spec in carried_whole),
        kept_dtypes(inputs, [*frozen, *carried_whole]),
        base_record(inputs),
        len(trained) - len(carried_whole),
    )
    write_adapter(
        stage,
        [carried(source, spec, spec, listener) for spec in specs],
        detached_config(document, made_by=made_by(inputs)),
        inputs.checkpoint,
    )
    return prepared.said(
        prepared.exact_sites(),
        tuple(map(trained_record, trained)),
        len(frozen),
        frozen_checked=inputs.base is not None,
        notes=_exact_notes(prepared, plan),
    )


def _refuse_silence(inputs: Inputs, plan: MergePlan) -> None:
    """Refuse factors that are not finite, or that no merge could make anything of.

    Raises:
        NonFiniteInput: One holds NaN or Inf.
        NothingToMerge: A factor of each site is zero.
    """
    found = check_factors(plan, inputs, FactorReader(inputs))
    if len(found.silent) == len(plan.sites):
        raise NothingToMerge(
            "every delta is zero: a factor of each site is zero",
            where=inputs.checkpoint.source.path,
            hint="the adapter was never trained, or this is the wrong step",
        )


def _compared(
    prepared: PreparedExtraction, frozen: Sequence[TensorSpec], listener: Listener, pool: ThreadPoolExecutor
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Of the leaves that the fine-tune should have frozen: those that are the base's, and those that it trained all the same.

    Raises:
        WrongBase: A leaf that it froze for certain is not the base's.
    """
    inputs, plan = prepared.inputs, prepared.plan
    assert plan is not None, "there are adapters inside"
    if inputs.base is None:
        return list(frozen), []
    source, base = inputs.checkpoint.source, inputs.base.source
    bases = {step.before.path: step.base for step in plan.steps if step.before is not None and step.base is not None}
    listener.start(sum(spec.nbytes for spec in frozen))
    kept: list[TensorSpec] = []
    moved: list[TensorSpec] = []
    for spec in frozen:
        (moved if is_moved(source, base, Sides(spec, bases[spec.path]), pool) else kept).append(spec)
        listener.advance(spec.name, spec.nbytes)
    under = {target for site in plan.sites for target in site.targets}
    wrong = [spec.name for spec in moved if inputs.dialect.tells_frozen or spec.path in under]
    if wrong:
        raise WrongBase(
            "the base is not what the fine-tune started from",
            where=base.path,
            expected="every frozen leaf to equal the base's, rounded to its dtype, bit for bit",
            found=f"{len(wrong)} of {len(frozen)} that differ: {first_names(wrong, 3)}",
        )
    return kept, moved


def _refuse_reshaped(inputs: Inputs, trained: Sequence[TensorSpec]) -> None:
    """Refuse what no merge would put into the base: a leaf of another shape, but for rows behind the base's."""
    if inputs.base is None:
        return
    bases = by_canonical_path(inputs.dialect, inputs.base.source.index().tensors.values())
    for spec in trained:
        base = bases.get(inputs.dialect.canonical(spec.path))
        if base is not None and (len(base.shape) != len(spec.shape) or base.shape[1:] != spec.shape[1:]):
            raise WrongBase(
                "a leaf trained in full that has another shape in the base",
                where=f"{inputs.base.source.path} :: {base.name}",
                expected=spec.shape,
                found=base.shape,
                hint="merge the fine-tune itself, or pass --without-trained",
            )


def _exact_notes(prepared: PreparedExtraction, plan: MergePlan) -> list[str]:
    inputs = prepared.inputs
    # What a merge would say of the base is not so here.
    notes = [note for note in plan.notes if not note.startswith("with --base")]
    if inputs.base is None:
        return [*notes, "without --base nobody compared the frozen leaves: merge the adapter into the right base"]
    ours = {inputs.dialect.canonical(path) for path in inputs.checkpoint.source.index().tensors}
    theirs = by_canonical_path(inputs.dialect, inputs.base.source.index().tensors.values())
    only = [spec.name for name, spec in theirs.items() if name not in ours]
    if only:
        notes.append(f"{len(only)} leaves that only the base has stay in it: {first_names(only, 3)}")
    return notes
