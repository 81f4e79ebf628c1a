"""Extract: an adapter of its own out of a fine-tune, to share, or to merge into its base again.

Out of a checkpoint with adapters inside come its own factors, bit for bit, with the leaves that it trained in full: merged into the
base, they give what the fine-tune gives. Of two dense checkpoints the difference of each kernel is truncated to a low rank.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from lora_merge_cli import __version__
from lora_merge_cli.adapter_writing import AdapterTensor, carried, write_adapter
from lora_merge_cli.dense_deltas import Factored, LeafDelta, Sides, factor_leaf, is_moved
from lora_merge_cli.dialects import ScaleOptions, looks_like_adapter
from lora_merge_cli.dialects.detached import TRAINED, Document, detached_config
from lora_merge_cli.dialects.kernels import Kernel, torch_kernel, tree_kernel
from lora_merge_cli.dialects.peft.written import (
    adapter_config,
    bias_key,
    factor_key,
    refuse_fused,
    tied_head,
    whole_key,
    whole_modules,
)
from lora_merge_cli.dialects.torch_model import Plain
from lora_merge_cli.dialects.torch_names import dotted
from lora_merge_cli.dtypes import FLOAT32, holds_all_values_of, is_float
from lora_merge_cli.errors import (
    NothingToMerge,
    UnsupportedCheckpoint,
    UsageError,
    WrongBase,
)
from lora_merge_cli.extract_report import ExtractedSite, ExtractReport
from lora_merge_cli.factors import FactorReader, check_factors
from lora_merge_cli.formats.interface import PROVENANCE, Checkpoint
from lora_merge_cli.inputs import Inputs, open_inputs, survey_inputs, tree_of
from lora_merge_cli.jobs import jobs_or_default
from lora_merge_cli.listening import Listener, Silent
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.pairing import by_canonical_path
from lora_merge_cli.plan import MergePlan, plan_merge
from lora_merge_cli.recording import directory_size, peak_rss, source_records, versions
from lora_merge_cli.records import (
    AdapterSite,
    Factor,
    KeyPath,
    LowRank,
    Replacement,
    Scale,
    TensorSpec,
    display,
    first_names,
)
from lora_merge_cli.report import LeafRecord
from lora_merge_cli.selection import leaf_names, matches_any
from lora_merge_cli.staging import anchored, check_space, check_target, filesystem, staged

_ONE = Scale(1.0, "the factors' product is the delta itself")


@dataclass(frozen=True)
class ExtractRequest:
    """What to extract, and where to."""

    tuned: Path
    """The fine-tune: a run, step or item directory with adapters inside, or a dense checkpoint."""
    base: Path | None = None
    """What it started from; dense checkpoints need it."""
    output: Path | None = None
    """The directory to create. Only a dry run does without."""
    rank: int | None = None
    """The rank of the factors of two dense checkpoints."""
    energy: float | None = None
    """The share of ``|delta|^2`` that they keep of each matrix instead."""
    without_trained: bool = False
    """Whether to leave out what was trained in full, and with it a part of the fine-tune."""
    include: tuple[str, ...] = ()
    """Globs of sites to take; of two dense checkpoints, of leaves. All if empty."""
    exclude: tuple[str, ...] = ()
    """Globs of those not to take."""
    scales: ScaleOptions = dataclasses.field(default_factory=ScaleOptions)
    """What is known about alphas."""
    step: int | None = None
    """Which step of a run; the newest if None."""
    device: str | None = None
    """The JAX device that decomposes; JAX's default if None."""
    jobs: int | None = None
    """How many threads read; see `jobs.jobs_or_default`. Changes no bit."""
    overwrite: bool = False
    """Whether an existing output may be replaced."""


@dataclass(frozen=True)
class _Dense:
    """Two dense checkpoints."""

    pairs: Mapping[KeyPath, Sides]
    """Every leaf that is wanted, by the fine-tune's path."""
    kernels: Mapping[KeyPath, Kernel]
    """Those that factors may be made for."""
    total: int
    """How many leaves there are, wanted or not."""


@dataclass(frozen=True)
class PreparedExtraction:
    """A request whose inputs are open."""

    request: ExtractRequest
    inputs: Inputs
    plan: MergePlan | None
    """Of a fine-tune with adapters inside: how they would be merged."""
    dense: _Dense | None
    """Of two dense checkpoints: how they pair up."""

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """What must not be written to."""
        return self.inputs.paths

    @property
    def for_peft(self) -> bool:
        """Whether the adapter is one that PEFT loads."""
        return self.plan is None and isinstance(self.inputs.dialect, Plain)

    def report(self) -> ExtractReport:
        """What would be done, as far as it is known before an array is read."""
        if self.plan is not None:
            return self._exact_report()
        assert self.dense is not None, "it is one of the two"
        kernels = {path: self.dense.pairs[path].tuned for path in self.dense.kernels}
        sites = tuple(
            _site_record(self._dense_site(path, kernel, 0), kernels[path], None, None)
            for path, kernel in self.dense.kernels.items()
        )
        note = f"which of the {len(self.dense.pairs)} leaves moved is known once both sides are read: sites are what may have"
        return self.said(sites, (), 0, frozen_checked=False, notes=(note,))

    def said(
        self,
        sites: tuple[ExtractedSite, ...],
        trained: tuple[LeafRecord, ...],
        frozen: int,
        *,
        frozen_checked: bool,
        warnings: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> ExtractReport:
        """A report of what was found."""
        request, checkpoint = self.request, self.inputs.checkpoint
        model = self.inputs.dialect.summary(tree_of(checkpoint))
        opened = [note for _, each in self.inputs.opened for note in each.notes]
        loud = list(warnings)
        if request.without_trained and trained:
            loud.append(
                f"{len(trained)} leaves that were trained in full are left out: "
                "base and adapter together do not act as the fine-tune does"
            )
        if request.include or request.exclude:
            loud.append(
                "--include or --exclude leave out a part: base and adapter together do not act as the fine-tune does"
            )
        assets = ["the fine-tune's normalisation statistics are in assets/ beside the adapter: serve with them"]
        return ExtractReport(
            status="planned",
            tool_version=__version__,
            sources=source_records(self.inputs),
            warnings=tuple(loud),
            notes=(*opened, *notes, *(assets if checkpoint.assets is not None else [])),
            kind="exact" if self.plan is not None else "truncated",
            model=model.name,
            dialect=self.inputs.dialect.name,
            output=None if request.output is None else str(request.output),
            adapter_format="peft" if self.for_peft else "lora-merge",
            rank=request.rank,
            energy=request.energy,
            sites=sites,
            trained=trained,
            without_trained=request.without_trained,
            frozen=frozen,
            frozen_checked=frozen_checked,
            factors_bytes=sum(site.nbytes or 0 for site in sites),
            trained_bytes=sum(leaf.nbytes for leaf in trained),
            tuned_bytes=checkpoint.source.index().nbytes,
        )

    def _exact_report(self) -> ExtractReport:
        plan = self.plan
        assert plan is not None, "there are adapters inside"
        frozen, trained = self.known_groups()
        notes = list(plan.notes)
        if self.inputs.base is None:
            notes.append("without --base nobody compares the frozen leaves: merge the adapter into the right base")
        elif not self.inputs.dialect.tells_frozen:
            notes.append("which leaves were trained in full is known once they are compared with the base's")
        return self.said(
            self.exact_sites(), tuple(map(_trained_record, trained)), len(frozen), frozen_checked=False, notes=notes
        )

    def exact_sites(self) -> tuple[ExtractedSite, ...]:
        """The sites of the adapters inside."""
        assert self.plan is not None, "there are some"
        tensors = self.inputs.checkpoint.source.index().tensors
        return tuple(
            _site_record(
                site,
                tensors[site.targets[0]],
                site.parameters.rank,
                sum(tensors[factor.path].nbytes for factor in site.factors.values()),
            )
            for site in self.plan.sites
        )

    def known_groups(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """The leaves that the fine-tune froze, those under adapters among them, and those that it trained in full."""
        assert self.plan is not None, "there are adapters inside"
        index = self.inputs.checkpoint.source.index()
        grouping = self.inputs.dialect.grouping(index, self.plan.sites)
        frozen: list[TensorSpec] = []
        trained: list[TensorSpec] = []
        for step in self.plan.steps:
            assert step.before is not None, "adapters inside create nothing"
            (trained if grouping[step.before.path] == "trained" else frozen).append(step.before)
        return frozen, trained

    def _dense_site(self, path: KeyPath, kernel: Kernel, rank: int) -> AdapterSite:
        """The site of a kernel of two dense checkpoints, with keys as they are in the adapter."""
        return _dense_site(self.inputs, path, kernel, rank, for_peft=self.for_peft)


def prepare_extraction(request: ExtractRequest) -> PreparedExtraction:
    """Open the inputs and see what they are; reads no arrays and writes nothing.

    Raises:
        UsageError: The request contradicts itself or the inputs.
        InputError: An input is missing, unreadable or of unknown format.
        Refused: The adapter would be wrong or pointless.
        OutputExists: The output exists and may not be replaced.
    """
    jobs_or_default(request.jobs)
    inputs = open_inputs(request.tuned, base=request.base, step=request.step)
    if request.output is not None:
        request = dataclasses.replace(request, output=anchored(request.output))
        assert request.output is not None, "it is what it was"
        if request.output.suffix in (".safetensors", ".pth", ".bin"):
            raise UsageError("an adapter is a directory", where=request.output, hint="name one after -o")
        check_target(request.output, inputs.paths, overwrite=request.overwrite)
    if inputs.base is not None:
        _refuse_adapters_in_base(inputs.base)
    survey = survey_inputs(inputs, request.scales)
    if survey.problems:
        raise survey.problems[0]
    if survey.sites:
        return PreparedExtraction(request, inputs, _plan_of(request, inputs), None)
    return PreparedExtraction(request, inputs, None, _dense_of(request, inputs))


def extract(
    request: ExtractRequest | PreparedExtraction,
    listener: Listener | None = None,
    beside: Callable[[ExtractReport, Path], None] | None = None,
) -> ExtractReport:
    """Write the adapter of a fine-tune into a directory of its own.

    The output appears complete or not at all, and no input is ever changed.

    Args:
        request: What to extract; prepared or not.
        listener: Who to tell of progress.
        beside: Called with the finished report and the staged directory before that is published; if it raises, nothing is.

    Raises:
        WrongBase: A leaf that the fine-tune froze is not the base's.
        NothingToMerge: Nothing moved, or every delta is zero.
        LoraMergeError: One subclass per way to fail; see `lora_merge_cli.errors`.
    """
    started = time.monotonic()
    prepared = request if isinstance(request, PreparedExtraction) else prepare_extraction(request)
    target = prepared.request.output
    if target is None:
        raise UsageError("an output is needed", hint="pass -o OUT")
    run = _extract_exact if prepared.plan is not None else _extract_dense
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(jobs_or_default(prepared.request.jobs), "read") as pool,
        staged(target, overwrite=prepared.request.overwrite) as stage,
    ):
        report = run(prepared, stage, listener or Silent(), pool)
        _copy_assets(prepared, stage)
        report = dataclasses.replace(
            report,
            status="extracted",
            bytes_on_disk=directory_size(stage),
            versions=versions(),
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss(),
        )
        provenance = stage / PROVENANCE
        with filesystem(provenance):
            provenance.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
        if beside is not None:
            beside(report, stage)
    return report


def _plan_of(request: ExtractRequest, inputs: Inputs) -> MergePlan:
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


def _dense_of(request: ExtractRequest, inputs: Inputs) -> _Dense:
    """How two dense checkpoints pair up."""
    where = inputs.checkpoint.source.path
    if inputs.base is None:
        raise UsageError(
            "no adapters inside: only the base tells what changed", where=where, hint="pass --base BASE and --rank N"
        )
    from lora_merge_cli.truncation import check_cut

    check_cut(request.rank, request.energy)
    if request.scales.alpha or request.scales.rslora:
        raise UsageError("--lora-alpha and --rslora are for adapters, and neither side has any", hint="leave them out")
    dialect = inputs.dialect
    theirs = by_canonical_path(dialect, inputs.base.source.index().tensors.values())
    pairs: dict[KeyPath, Sides] = {}
    odd: list[str] = []
    for path, spec in inputs.checkpoint.source.index().tensors.items():
        base = theirs.pop(dialect.canonical(path), None)
        if base is None or base.shape != spec.shape or is_float(base.dtype) != is_float(spec.dtype):
            found = "not in the base" if base is None else f"{base.shape} {base.dtype.name} in the base"
            odd.append(f"{spec.name} ({found})")
        else:
            pairs[path] = Sides(spec, base)
    odd += [f"{spec.name} (only in the base)" for spec in theirs.values()]
    if odd:
        raise WrongBase(
            "leaves that only one side has, or that differ in shape",
            where=inputs.base.source.path,
            expected=f"the leaves of {where}",
            found=first_names(odd, 5),
            hint="give the checkpoint that the fine-tune started from",
        )
    wanted = _wanted(request, inputs, pairs)
    kernels = {path: kernel for path in wanted if (kernel := _kernel(inputs, pairs[path])) is not None}
    if isinstance(dialect, Plain):
        refuse_fused((dotted(path) for path in wanted), str(where))
    return _Dense(wanted, kernels, len(pairs))


def _kernel(inputs: Inputs, sides: Sides) -> Kernel | None:
    if isinstance(inputs.dialect, Plain):
        return torch_kernel(inputs.dialect, sides.tuned, (inputs.base or inputs.checkpoint).config)
    return tree_kernel(inputs.dialect, sides.tuned)


def _wanted(request: ExtractRequest, inputs: Inputs, pairs: Mapping[KeyPath, Sides]) -> dict[KeyPath, Sides]:
    """What ``--include`` and ``--exclude`` choose."""
    names = {path: leaf_names(inputs.dialect, path) for path in pairs}
    for flag, globs in (("--include", request.include), ("--exclude", request.exclude)):
        for glob in globs:
            if not any(matches_any(found, (glob,)) for found in names.values()):
                raise UsageError(
                    f"{flag} {glob!r} matches no leaf",
                    expected=f"a glob for names such as {display(next(iter(names.values()))[-1])}",
                )
    return {
        path: sides
        for path, sides in pairs.items()
        if (not request.include or matches_any(names[path], request.include))
        and not matches_any(names[path], request.exclude)
    }


def _refuse_adapters_in_base(base: Checkpoint) -> None:
    inside = [display(path) for path in base.source.index().tensors if looks_like_adapter(path)]
    if inside:
        raise WrongBase(
            "the base has adapters of its own",
            where=base.source.path,
            found=first_names(inside, 3),
            hint="merge it first, or see that TUNED comes first and BASE after --base",
        )


def _extract_exact(
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
        _dtypes(inputs, [*frozen, *carried_whole]),
        _base_record(inputs),
        len(trained) - len(carried_whole),
    )
    write_adapter(
        stage,
        [carried(source, spec, spec, listener) for spec in specs],
        detached_config(document, made_by=_made_by(inputs)),
        inputs.checkpoint,
    )
    return prepared.said(
        prepared.exact_sites(),
        tuple(map(_trained_record, trained)),
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


def _dtypes(inputs: Inputs, specs: Sequence[TensorSpec]) -> dict[KeyPath, Any]:
    """What the fine-tune keeps leaves in, where that is not what the base does; of all leaves where there is no base."""
    if inputs.base is None:
        return {spec.path: spec.dtype for spec in specs if is_float(spec.dtype)}
    bases = by_canonical_path(inputs.dialect, inputs.base.source.index().tensors.values())
    found = {}
    for spec in specs:
        base = bases.get(inputs.dialect.canonical(spec.path))
        if base is not None and base.dtype != spec.dtype:
            found[spec.path] = spec.dtype
    return found


def _base_record(inputs: Inputs) -> dict[str, str] | None:
    if inputs.base is None:
        return None
    source = inputs.base.source
    return {"path": str(source.path), "fingerprint": source.fingerprint()}


def _made_by(inputs: Inputs) -> dict[str, str]:
    source = inputs.checkpoint.source
    return {"tool": f"lora-merge {__version__}", "tuned": str(source.path), "fingerprint": source.fingerprint()}


def _extract_dense(
    prepared: PreparedExtraction, stage: Path, listener: Listener, pool: ThreadPoolExecutor
) -> ExtractReport:
    """Factors of what two dense checkpoints differ by, and what cannot be factored."""
    from lora_merge_cli.devices import find_device

    inputs, dense, request = prepared.inputs, prepared.dense, prepared.request
    assert dense is not None and inputs.base is not None, "there are two sides"
    device = find_device(request.device)
    listener.start(sum(sides.tuned.nbytes for sides in dense.pairs.values()))
    moved = []
    for path, sides in dense.pairs.items():
        if is_moved(inputs.checkpoint.source, inputs.base.source, sides, pool):
            moved.append(path)
        listener.advance(sides.tuned.name, sides.tuned.nbytes)
    if not moved:
        raise NothingToMerge(
            "nothing to extract: every leaf is the base's",
            where=inputs.checkpoint.source.path,
            hint="see that TUNED and BASE are two checkpoints",
        )
    shape = _peft_shape(prepared, moved) if prepared.for_peft else _tree_shape(prepared, moved)
    work = stage.parent / "factors"
    factored: dict[KeyPath, Factored] = {}
    listener.start(sum(dense.pairs[path].tuned.nbytes for path in shape.kernels))
    for number, path in enumerate(shape.kernels):
        sides, equation = dense.pairs[path], dense.kernels[path].equation
        delta = LeafDelta(inputs.checkpoint.source, inputs.base.source, sides, equation, pool)
        factored[path] = factor_leaf(delta, work / str(number), request.rank, request.energy, device)
        listener.advance(sides.tuned.name, sides.tuned.nbytes)
    sites = {
        path: _dense_site(inputs, path, dense.kernels[path], found.rank, for_peft=prepared.for_peft)
        for path, found in factored.items()
    }
    tensors = [
        _factor_tensor(sites[path], found, role) for path, found in factored.items() for role in ("lora_a", "lora_b")
    ]
    whole = [
        carried(inputs.checkpoint.source, spec, dataclasses.replace(spec, path=key), Silent())
        for key, spec in shape.whole
        if not request.without_trained
    ]
    assert request.output is not None, "there is a place for it"
    check_space(request.output, sum(tensor.spec.nbytes for tensor in (*tensors, *whole)))
    write_adapter(stage, [*tensors, *whole], shape.config(sites, not request.without_trained), inputs.checkpoint)
    sources = dense.pairs
    report = prepared.said(
        tuple(_measured(sites[path], sources[path].tuned, found) for path, found in factored.items()),
        tuple(_trained_record(spec, reason) for spec, reason in shape.reasons.items()),
        dense.total - len(moved),
        frozen_checked=True,
        warnings=shape.warnings,
        notes=shape.notes,
    )
    return dataclasses.replace(report, device=f"{device.device_kind} ({device.platform}:{device.id})")


@dataclass(frozen=True)
class _Shape:
    """What an adapter of two dense checkpoints consists of."""

    kernels: tuple[KeyPath, ...]
    """Those that get factors."""
    whole: tuple[tuple[KeyPath, TensorSpec], ...]
    """The key of each leaf that is brought whole."""
    reasons: Mapping[TensorSpec, str]
    """The leaves that are brought whole, and why."""
    config: Callable[[Mapping[KeyPath, AdapterSite], bool], dict[str, Any]]
    """``adapter_config.json``, from the sites, and from whether the others are brought."""
    warnings: tuple[str, ...] = ()
    """What should make a reader stop."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""


def _tree_shape(prepared: PreparedExtraction, moved: Sequence[KeyPath]) -> _Shape:
    inputs, dense = prepared.inputs, prepared.dense
    assert dense is not None, "there are two sides"
    kernels = tuple(path for path in moved if path in dense.kernels)
    others = [dense.pairs[path].tuned for path in moved if path not in dense.kernels]
    still = [sides.tuned for path, sides in dense.pairs.items() if path not in set(moved)]
    widened = [sides.tuned for sides in map(dense.pairs.__getitem__, kernels) if _is_widened(sides)]

    def config(sites: Mapping[KeyPath, AdapterSite], with_whole: bool) -> dict[str, Any]:
        brought = others if with_whole else []
        document = Document(
            inputs.dialect,
            tuple(sites.values()),
            tuple(Replacement(spec.path, spec.path, TRAINED) for spec in brought),
            _dtypes(inputs, [*still, *widened, *brought]),
            _base_record(inputs),
            len(others) - len(brought),
        )
        return detached_config(document, made_by=_made_by(inputs))

    return _Shape(
        kernels,
        tuple((spec.path, spec) for spec in others),
        dict.fromkeys(others, "no kernel that is known to take factors"),
        config,
    )


def _peft_shape(prepared: PreparedExtraction, moved: Sequence[KeyPath]) -> _Shape:
    inputs, dense = prepared.inputs, prepared.dense
    assert dense is not None and inputs.base is not None, "there are two sides"
    where = str(inputs.checkpoint.source.path)
    tensors = inputs.checkpoint.source.index().tensors
    config = inputs.base.config or {}
    riding = _biases(dense, moved)
    modules = whole_modules(
        [path for path in moved if path not in dense.kernels and path not in riding], tensors, where
    )
    kernels = tuple(path for path in moved if path in dense.kernels and _module(path) not in modules)
    biases = [dense.pairs[path].tuned for path in riding if _module(path) not in modules]
    if not kernels:
        raise NothingToMerge(
            "no weight of a linear layer changed that factors can be made of, and PEFT's LoRA needs some",
            where=where,
            found=f"{len(modules)} modules that changed otherwise: {first_names(modules, 3)}",
        )
    whole = [spec for path, spec in tensors.items() if _module(path) in modules]
    odd = [spec for spec in whole if not is_float(spec.dtype)]
    if odd:
        raise UnsupportedCheckpoint(
            "a tensor of a module to bring whole that is not floating-point", where=f"{where} :: {odd[0].name}"
        )
    keys = [((whole_key(dotted(spec.path)),), spec) for spec in whole]
    keys += [((bias_key(_module(spec.path)),), spec) for spec in biases]
    pair = tied_head([dotted(path) for path in tensors], modules, config)
    if pair is not None:
        shared = next(spec for spec in whole if _module(spec.path) == pair[0])
        keys.append(((whole_key(f"{pair[1]}.weight"),), shared))
        modules = [*modules, pair[1]]
    adapted = {_module(path) for path in dense.kernels}
    reasons = dict.fromkeys(biases, "the bias of a module with factors")
    for spec in whole:
        reasons[spec] = (
            "of a linear layer of which something else changed: PEFT brings the whole module"
            if _module(spec.path) in adapted
            else "no weight of a linear layer"
        )
    transposed = any(kernel.equation.target == "io" for kernel in dense.kernels.values())

    def written(sites: Mapping[KeyPath, AdapterSite], with_whole: bool) -> dict[str, Any]:
        ranks = {_module(path): site.parameters.rank for path, site in sites.items()}
        base = str(inputs.base.directory) if inputs.base is not None else ""
        return adapter_config(
            ranks,
            modules if with_whole else (),
            config,
            base,
            transposed=transposed,
            biases=with_whole and bool(biases),
        )

    notes = [f"modules that are brought whole: {first_names(sorted(modules), 3)}"] if modules else []
    brought = {*kernels, *(spec.path for spec in reasons)}
    changed = [dense.pairs[path] for path in moved if path in brought]
    return _Shape(kernels, tuple(keys), reasons, written, tuple(_rounding(changed)), tuple(notes))


def _biases(dense: _Dense, moved: Sequence[KeyPath]) -> list[KeyPath]:
    """The biases that moved with the weight of their own linear layer."""
    adapted = {_module(path) for path in moved if path in dense.kernels}
    return [
        path
        for path in moved
        if _module(path) in adapted and dotted(path).endswith(".bias") and is_float(dense.pairs[path].tuned.dtype)
    ]


def _is_widened(sides: Sides) -> bool:
    """Whether the fine-tune keeps a leaf in a dtype that tells more apart than the base's, which float32 holds."""
    narrow, wide = sides.base.dtype, sides.tuned.dtype
    return is_float(narrow) and not holds_all_values_of(narrow, wide) and not holds_all_values_of(narrow, FLOAT32)


def _rounding(changed: Sequence[Sides]) -> Iterator[str]:
    """What a merge would lose: PEFT's adapters do not say what leaves are to be stored in, so that it is the base's dtypes."""
    widened = [sides for sides in changed if _is_widened(sides)]
    if widened:
        first = widened[0]
        yield (
            f"{len(widened)} leaves that the adapter changes are {first.tuned.dtype.name} in the fine-tune and "
            f"{first.base.dtype.name} in the base, which a merge would round them to: merge with --dtype float32 for "
            f"the errors that are said here ({first_names([sides.tuned.name for sides in widened], 3)})"
        )


def _module(path: KeyPath) -> str:
    return dotted(path).rpartition(".")[0]


def _dense_site(inputs: Inputs, path: KeyPath, kernel: Kernel, rank: int, *, for_peft: bool) -> AdapterSite:
    """The site of a kernel of two dense checkpoints, with keys as they are in the adapter."""
    name = dotted(path)

    def key(role: str) -> KeyPath:
        return (factor_key(name, role),) if for_peft else (*path, role)

    label = inputs.dialect.canonical(path)
    return AdapterSite(
        targets=(path,),
        operation="add_delta",
        factors={role: Factor(key(role)) for role in ("lora_a", "lora_b")},
        parameters=LowRank(rank, _ONE, kernel.equation),
        forward=kernel.forward,
        group=inputs.dialect.part(path),
        module=next((str(part) for part in reversed(label) if part not in ("w", "kernel")), ""),
        label=display(label).removesuffix(".weight"),
    )


def _factor_tensor(site: AdapterSite, found: Factored, role: str) -> AdapterTensor:
    spec = TensorSpec(site.factors[role].path, found.shape(role), FLOAT32)
    return AdapterTensor(spec, functools.partial(found.blocks, role))


def _measured(site: AdapterSite, spec: TensorSpec, found: Factored) -> ExtractedSite:
    size = sum(_factor_tensor(site, found, role).spec.nbytes for role in ("lora_a", "lora_b"))
    return dataclasses.replace(
        _site_record(site, spec, found.rank, size),
        energy_kept=found.energy_kept,
        relative_error=found.relative_error,
        norm=found.norm,
    )


def _site_record(site: AdapterSite, spec: TensorSpec, rank: int | None, nbytes: int | None) -> ExtractedSite:
    scale = site.parameters.scale
    assert scale.value is not None, "a site without a scale was refused"
    return ExtractedSite(
        target=site.name,
        label=site.label,
        group=site.group,
        equation=str(site.parameters.equation),
        rank=rank,
        scale=scale.value,
        scale_source=scale.source,
        scale_assumed=scale.assumed,
        shape=spec.shape,
        nbytes=nbytes,
    )


def _trained_record(spec: TensorSpec, reason: str = TRAINED) -> LeafRecord:
    return LeafRecord(spec.name, "copied", spec.dtype.name, spec.nbytes, reason)


def _copy_assets(prepared: PreparedExtraction, stage: Path) -> None:
    """What serving needs of the fine-tune beside its arrays."""
    assets = prepared.inputs.checkpoint.assets
    if assets is not None:
        with filesystem(assets):
            shutil.copytree(assets, stage / assets.name, ignore_dangling_symlinks=True)
