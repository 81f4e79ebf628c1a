"""One pass over a merged checkpoint beside the one with the adapters: what is found, before anybody judges it."""

from __future__ import annotations

import contextlib
import functools
import itertools
from ast import literal_eval
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lora_merge_cli.ahead import Ahead
from lora_merge_cli.changes import LeafChange
from lora_merge_cli.compare import Comparison, compare_blocks, count_non_finite, equals_rounded, same_bytes
from lora_merge_cli.dialects import looks_like_adapter
from lora_merge_cli.dtypes import dtype_named, holds_all_values_of, is_float, ulp
from lora_merge_cli.equation import Equation
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.jobs import jobs_or_default
from lora_merge_cli.listening import Listener, Silent
from lora_merge_cli.records import AdapterSite, Array, Index, KeyPath, TensorSpec, display, full_region
from lora_merge_cli.rounding import NEAREST, LeafRounding
from lora_merge_cli.side_by_side import Leaf, flat_pieces, side_by_side
from lora_merge_cli.survival import Moments
from lora_merge_cli.verification.adapted import Adapted
from lora_merge_cli.verification.choices import Chosen
from lora_merge_cli.verification.combined_adapters import as_one
from lora_merge_cli.verification.doubts import Doubts
from lora_merge_cli.verification.expectation import Expectation, ExpectedLeaf
from lora_merge_cli.verification.joint import JointSource
from lora_merge_cli.verification.judged_source import JudgedSource, Unreadable
from lora_merge_cli.verification.methods import is_by_row
from lora_merge_cli.verification.mixture import MixtureFinding, MixtureJudge, mixed, summands
from lora_merge_cli.verification.row_judge import ByRow, RowJudge
from lora_merge_cli.verification.site_factors import SiteFactors, adapted_site
from lora_merge_cli.verification.site_judge import LayerVerdict, SiteJudge, Terms
from lora_merge_cli.verification.start import StartSource

_NUMBERS = ("int", "float", "bool")
_MIXING = 4 * 2.0**-24
_FUSED = tuple(map(dtype_named, ("float32", "bfloat16", "float16", "float64")))


@dataclass(frozen=True)
class SiteFinding:
    """What was found of one site."""

    leaf: ExpectedLeaf
    """What it should be."""
    stacked: bool
    """Whether its kernel stacks layers."""
    dtype: np.dtype[Any]
    """What it is stored in."""
    layers: Mapping[int, LayerVerdict]
    """By number; those that were looked at."""
    spectra: tuple[tuple[float, ...], ...]
    """Of each of its sites; see `Adapted.spectrum`."""
    digests: tuple[str, ...]
    """Of each of its sites; see `lowrank.adapter_digest`."""
    rounding: LeafRounding = NEAREST
    """How it should be rounded."""

    @functools.cached_property
    def total(self) -> Moments:
        """Survival of the delta over all layers that were looked at."""
        return Moments.total(verdict.moments for verdict in self.layers.values())

    @property
    def has_delta(self) -> bool:
        """Whether some layer that was looked at has any of the deltas: not all are at alpha 0."""
        return not self.leaf.mixed or any(self.leaf.alpha_of(layer) for layer in self.layers)

    def of(self, site: AdapterSite) -> tuple[tuple[float, ...], str]:
        """The spectrum and the digest of one of its sites."""
        number = next(number for number, other in enumerate(self.leaf.sites) if other is site)
        return self.spectra[number], self.digests[number]


@dataclass
class Findings:
    """All that was found. Names are display names."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    reshaped: dict[str, str] = field(default_factory=dict)
    """Leaves of another shape, with both shapes in words."""
    widened: dict[str, str] = field(default_factory=dict)
    """Untouched leaves of a wider dtype, with both dtypes in words."""
    recast: dict[str, str] = field(default_factory=dict)
    """Leaves of a dtype that they should not have, with both in words."""
    constants: list[str] = field(default_factory=list)
    """Parts that are no arrays, and not the checkpoint's."""
    unservable: str | None = None
    """Why the trainer's loader would not find the arrays."""
    unservable_before: bool = False
    """Whether it would not find the checkpoint's either."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Leaves of the result that cannot be read, and why."""
    altered: dict[str, Comparison] = field(default_factory=dict)
    """Untouched leaves whose values are not the checkpoint's."""
    not_finite: dict[str, int] = field(default_factory=dict)
    """Entries of the result that are NaN or Inf, and should not be."""
    not_finite_before: dict[str, int] = field(default_factory=dict)
    """Entries that are NaN or Inf in an untouched leaf, and were so in the checkpoint."""
    not_frozen: list[str] = field(default_factory=list)
    """Leaves that should be the base's, rounded, and are not."""
    frozen: int = 0
    """How many leaves were compared with the base's."""
    untouched: int = 0
    """How many untouched leaves were compared."""
    replaced: dict[str, int] = field(default_factory=dict)
    """Leaves that an adapter brings, in whole or in rows, and how many of their entries are not what it brings."""
    mixed: dict[str, MixtureFinding] = field(default_factory=dict)
    """Leaves without a site that are interpolated, or that only the base has."""
    sites: dict[str, SiteFinding] = field(default_factory=dict)
    """By the kernel's name in the checkpoint."""
    stored: dict[KeyPath, np.dtype[Any]] = field(default_factory=dict)
    """What each leaf that can be compared is stored in, by canonical path."""


class Examination:
    """One pass.

    Args:
        merged: The result to judge.
        inputs: What was merged.
        terms: How a merged kernel may differ from its ideal.
        sample: How many layers of each site to look at; None for all.
        jobs: How many threads compute; see `jobs.jobs_or_default`.
        listener: Who to tell of progress.
    """

    def __init__(
        self,
        merged: Checkpoint,
        inputs: Inputs,
        terms: Terms,
        sample: int | None,
        jobs: int | None = None,
        listener: Listener | None = None,
    ) -> None:
        self._merged, self._inputs = merged, inputs
        self._checkpoint, self._base, self._dialect = inputs.checkpoint, inputs.base, inputs.dialect
        self._terms, self._sample, self._jobs = terms, sample, jobs_or_default(jobs)
        self._judged = JudgedSource(merged.source)
        self._listener = listener or Silent()
        self._factors = SiteFactors(inputs)
        self.findings = Findings()

    def run(self, expectation: Expectation) -> Findings:
        """Compare the trees, then every leaf.

        Raises:
            CorruptCheckpoint: The checkpoint or the base cannot be read; what is wrong in the result is a finding.
            NonFiniteInput: A factor, or a kernel under one, is not finite in the checkpoint.
        """
        index = self._merged.source.index()
        found = self._match_trees(expectation, index)
        self._listener.start(sum(spec.nbytes for _, spec in found.values()))
        # Pieces are small and computed side by side: threads inside each would only wait for one another.
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(self._jobs) as pool:
            for leaf, spec in found.values():
                try:
                    if leaf.sites:
                        self._judge(leaf, spec, pool)
                    elif leaf.change.anchor is not None:
                        self._compare_mixed(leaf, leaf.change.anchor, spec, pool)
                    elif leaf.change.replacements:
                        self._compare_replaced(leaf, spec)
                    else:
                        self._compare(leaf, spec, pool)
                except Unreadable as error:
                    self.findings.unreadable[spec.name] = str(error)
        return self.findings

    def _match_trees(self, expectation: Expectation, index: Index) -> dict[KeyPath, tuple[ExpectedLeaf, TensorSpec]]:
        """The leaves that can be compared; notes what is missing, too much, or of another shape or dtype."""
        findings = self.findings
        present: dict[KeyPath, TensorSpec] = {}
        before = self._checkpoint.source.index()
        numbers = {part.path: part.value for part in before.constants if part.kind in _NUMBERS}
        for path, spec in index.tensors.items():
            if path in numbers and not spec.shape and path not in before.tensors:
                # Formats without Python numbers keep them as arrays without axes.
                self._compare_number(spec, numbers[path])
                continue
            name = self._dialect.canonical(path)
            if looks_like_adapter(path):
                findings.adapters.append(display(path))
            elif name not in expectation.leaves or name in present:
                findings.unexpected.append(display(path))
            else:
                present[name] = spec
        pairs = {}
        for name, leaf in expectation.leaves.items():
            if name not in present:
                findings.missing.append(leaf.source.name)
            elif present[name].shape != leaf.source.shape:
                findings.reshaped[leaf.source.name] = f"{present[name].shape}, not {leaf.source.shape}"
            elif self._fits(leaf, present[name]):
                pairs[name] = leaf, present[name]
                findings.stored[name] = present[name].dtype
        findings.unservable = self._dialect.unservable(index)
        findings.unservable_before = self._dialect.unservable(before) is not None
        one, other = (self._constants(tree) for tree in (before, index))
        as_arrays = {display(self._dialect.canonical(path)) for path in numbers.keys() & index.tensors.keys()}
        differing = [name for name in {**one, **other} if one.get(name) != other.get(name) and name not in as_arrays]
        findings.constants += differing
        return pairs

    def _compare_number(self, spec: TensorSpec, text: str | None) -> None:
        try:
            same = float(self._judged.read(spec.path, ())) == float(literal_eval(text or "None"))
        except (Unreadable, TypeError, ValueError):
            same = False
        if not same:
            self.findings.constants.append(spec.name)

    def _constants(self, index: Index) -> dict[str, tuple[str, str | None]]:
        return {
            display(self._dialect.canonical(part.path)): (part.kind, part.value)
            for part in index.constants
            if not looks_like_adapter(part.path)
        }

    def _fits(self, leaf: ExpectedLeaf, spec: TensorSpec) -> bool:
        """Note a wrong dtype, and say whether the values can be compared all the same."""
        stored = spec.dtype
        if leaf.dtype is None and not is_float(stored):
            self.findings.recast[spec.name] = f"{stored.name}, no floating-point dtype"
            return False
        if leaf.dtype is None and stored not in (*_FUSED, leaf.source.dtype):
            self.findings.recast[spec.name] = f"{stored.name}, too coarse for a fused kernel"
            return False
        if leaf.dtype is None or stored == leaf.dtype:
            return True
        words = f"{stored.name}, not {leaf.dtype.name}"
        if leaf.sites and not is_float(stored):
            self.findings.recast[spec.name] = f"{stored.name}, no floating-point dtype"
            return False
        asked = leaf.change.changes or leaf.change.asked
        if not asked and holds_all_values_of(stored, leaf.dtype):
            self.findings.widened[spec.name] = words
        else:
            self.findings.recast[spec.name] = words
        return True

    def _compare(self, leaf: ExpectedLeaf, spec: TensorSpec, pool: ThreadPoolExecutor) -> None:
        """An untouched leaf."""
        wanted = leaf.dtype or leaf.source.dtype
        start = StartSource(self._inputs, leaf.change)
        leaves: list[Leaf] = [(start, start.spec)]
        # The same stored bytes decode to the same values: one of them will do.
        alike = leaf.source.dtype == spec.dtype == wanted and self._stored_alike(start, spec)
        if not alike:
            leaves.append((self._judged, spec))
        if leaf.base is not None and self._base is not None:
            leaves.append((self._base.source, leaf.base))
        total = Comparison()

        def compare(piece: tuple[Array, ...]) -> tuple[Comparison, bool]:
            if alike:
                return Comparison(entries=piece[1].size, non_finite_b=count_non_finite(piece[1])), False
            with np.errstate(all="ignore"):
                found = compare_blocks(piece[0].astype(wanted, copy=False), piece[1])
                overflows = (
                    bool(found.non_finite_b) and wanted != leaf.source.dtype and bool(np.isfinite(piece[0]).all())
                )
            return found, overflows

        frozen, overflows = True, False
        for _, (before, *others) in side_by_side(leaves, pool=pool):
            after = before if alike else others.pop(0)
            for part, overflow in pool.map(compare, flat_pieces(before, after)):
                total.merge(part)
                overflows = overflows or overflow
            frozen = frozen and all(equals_rounded(before, base) for base in others)
            self._listener.advance(spec.name, after.nbytes)
        self.findings.untouched += 1
        self._note_frozen(leaf, frozen)
        if total.changed or not total.rounded:
            self.findings.altered[spec.name] = total
        if total.non_finite_b:
            noted = self.findings.not_finite if total.non_finite or overflows else self.findings.not_finite_before
            noted[spec.name] = total.non_finite_b

    def _compare_replaced(self, leaf: ExpectedLeaf, spec: TensorSpec) -> None:
        """A leaf that an adapter brings: its own values, rounded once, or a float32 mixture of both where it is weighted."""
        start = StartSource(self._inputs, leaf.change)
        weighted = any(found.weight != 1 for found in leaf.change.replacements)
        wrong = bad = 0
        for _, (wanted, found) in side_by_side([(start, start.spec), (self._judged, spec)]):
            if is_float(found.dtype):
                bad += int(np.count_nonzero(~np.isfinite(found)))
            if not weighted:
                wrong += _count_not_rounded(found, wanted)
            else:
                ideal, values = wanted.astype(np.float64), found.astype(np.float64)
                limit = self._terms.ulps * ulp(ideal, spec.dtype) + _MIXING * (np.abs(ideal).max(initial=0.0) + 1e-30)
                wrong += int(np.count_nonzero(~(np.abs(values - ideal) <= limit)))
            self._listener.advance(spec.name, found.nbytes)
        self.findings.replaced[spec.name] = wrong
        if bad:
            self.findings.not_finite[spec.name] = bad

    def _compare_mixed(
        self, leaf: ExpectedLeaf, anchor: TensorSpec, spec: TensorSpec, pool: ThreadPoolExecutor
    ) -> None:
        """A leaf between the base's and the fine-tune's, or one that only the base has."""
        change = leaf.change
        judge = MixtureJudge(
            change.alphas,
            spec.dtype,
            self._terms.ulps,
            _weight(change),
            one_sided=change.before is None,
            chosen=self._chosen(leaf, spec),
        )
        by_layer = len(change.alphas) > 1
        rows = range(spec.shape[0]) if by_layer else None
        leaves: list[Leaf] = [(self._inputs.anchor, anchor), (self._judged, spec)]
        with contextlib.closing(self._tuned(change, rows, pool)) as tuned:
            for region, (before, merged) in side_by_side(leaves, rows, pool):
                values, doubts = next(tuned, (before, None))
                judge.take(region[0].start if by_layer else 0, values, before, merged, pool, doubts, region)
                self._listener.advance(spec.name, merged.nbytes)
        self.findings.mixed[spec.name] = judge.finish()
        if judge.not_finite:
            self.findings.not_finite[spec.name] = judge.not_finite
        elif judge.not_finite_before:
            self.findings.not_finite_before[spec.name] = judge.not_finite_before

    def _tuned(
        self, change: LeafChange, rows: Sequence[int] | None, pool: ThreadPoolExecutor
    ) -> Generator[tuple[Array, Doubts | None]]:
        """The blocks of the fine-tune's side of a leaf, as `side_by_side` cuts them; none of one that only the base has."""
        if change.before is None:
            return
        source = self._checkpoint.source
        if isinstance(source, JointSource):
            with Ahead(source.possible(change.before.path, rows, pool)) as blocks:
                yield from blocks
            return
        start = StartSource(self._inputs, change)
        for _, (values,) in side_by_side([(start, start.spec)], rows, pool):
            yield values, None

    def _stored_alike(self, before: StartSource, after: TensorSpec) -> bool:
        """Whether both leaves are kept as the same bytes."""
        one, other = before.stored(before.spec.path), self._judged.stored(after.path)
        if one is None or other is None or one.encoding != other.encoding:
            return False
        end = ("", b"")
        return all(
            name_a == name_b and same_bytes(a, b)
            for (name_a, a), (name_b, b) in itertools.zip_longest(one.values, other.values, fillvalue=end)
        )

    def _judge_whole(self, leaf: ExpectedLeaf, spec: TensorSpec) -> None:
        """A kernel that some adapter changes otherwise than by a low-rank product."""
        start = StartSource(self._inputs, leaf.change)
        parts: list[ByRow | Adapted] = []
        digests: list[str] = []
        spectra: list[tuple[float, ...]] = []
        for site in leaf.sites:
            factors, digest = self._factors.of(site)
            digests.append(digest)
            if is_by_row(site.operation):
                parts.append(ByRow(site, factors, site.weight * self._terms.multiplier))
                spectra.append(())
            else:
                part = adapted_site(site, factors, (start, start.spec), self._terms.multiplier)
                parts.append(part)
                spectra.append(part.spectrum)
        where = f"{self._checkpoint.source.path} :: {leaf.source.name}"
        judge = RowJudge(where, parts, spec.dtype, self._terms, leaf.alpha_of(0), self._chosen(leaf, spec))
        region = full_region(spec.shape)
        kernel = start.read(start.spec.path, region)
        anchor = leaf.change.anchor
        beside = None if anchor is None else self._inputs.anchor.read(anchor.path, region)
        verdict = judge.judge(kernel, self._judged.read(spec.path, region), beside)
        self._listener.advance(spec.name, spec.nbytes)
        if verdict.non_finite:
            self.findings.not_finite[spec.name] = verdict.non_finite
        self.findings.sites[leaf.source.name] = SiteFinding(
            leaf, False, spec.dtype, {0: verdict}, tuple(spectra), tuple(digests), self._rounding(leaf, spec)
        )

    def _judge(self, leaf: ExpectedLeaf, spec: TensorSpec, pool: ThreadPoolExecutor) -> None:
        """A kernel that adapters were added to."""
        if any(is_by_row(site.operation) for site in leaf.sites):
            self._judge_whole(leaf, spec)
            return
        equation = leaf.sites[0].parameters.equation
        start = StartSource(self._inputs, leaf.change)
        layers = self._layers(equation, spec)
        beside = self._beside(leaf)
        added_to = beside if leaf.mixed and leaf.base is not None and beside is not None else (start, start.spec)
        adapted, digests = self._adapted(leaf, added_to)
        where = f"{added_to[0].path} :: {added_to[1].name if leaf.mixed else spec.name}"
        combining = self._terms.combining
        joint = adapted if combining.is_sum else [as_one(adapted, combining, display(leaf.change.path))]
        chosen = self._chosen(leaf, spec)
        judge = SiteJudge(where, joint, spec.shape, spec.dtype, self._terms, layers, chosen)
        leaves: list[Leaf] = [(start, start.spec), (self._judged, spec), *([] if beside is None else [beside])]
        by_layer = self._sample is not None or (leaf.change.anchor is not None and len(leaf.change.alphas) > 1)
        frozen = True
        for region, (kernel, merged, *others) in side_by_side(
            leaves, layers if by_layer and equation.stacked else None, pool
        ):
            other = others[0] if others else None
            if leaf.mixed and leaf.base is not None and other is not None:
                frozen = frozen and equals_rounded(kernel, other)
            alpha = leaf.alpha_of(region[0].start if equation.stacked else 0)
            kernel, base, size = _added_to(leaf, alpha, kernel, other)  # noqa: PLW2901
            judge.take(region, kernel, merged, base, pool, size)
            self._listener.advance(spec.name, merged.nbytes)
        verdicts = judge.finish()
        bad = sum(verdict.non_finite for verdict in verdicts.values())
        before = sum(verdict.non_finite_before for verdict in verdicts.values())
        if bad:
            self.findings.not_finite[spec.name] = bad
        elif before:
            self.findings.not_finite_before[spec.name] = before
        self._note_frozen(leaf, frozen and not judge.base_differs)
        self.findings.sites[leaf.source.name] = SiteFinding(
            leaf=leaf,
            stacked=equation.stacked,
            dtype=spec.dtype,
            layers=verdicts,
            spectra=tuple(part.spectrum for part in adapted),
            digests=tuple(digests),
            rounding=self._rounding(leaf, spec),
        )

    def _rounding(self, leaf: ExpectedLeaf, spec: TensorSpec) -> LeafRounding:
        return leaf.rounding(spec.dtype, self._terms.serving_dtype, self._terms.rounding)

    def _chosen(self, leaf: ExpectedLeaf, spec: TensorSpec) -> Chosen | None:
        return Chosen.of(self._rounding(leaf, spec), self._terms.rounding, display(leaf.change.path), spec.shape)

    def _beside(self, leaf: ExpectedLeaf) -> Leaf | None:
        """What a kernel is compared with: the base's leaf, or the one that an interpolation of its replacement starts from."""
        if leaf.base is not None and self._base is not None:
            return self._base.source, leaf.base
        return None if leaf.change.anchor is None else (self._inputs.anchor, leaf.change.anchor)

    def _adapted(self, leaf: ExpectedLeaf, added_to: Leaf) -> tuple[list[Adapted], list[str]]:
        """The adapters on a kernel, DoRA's norms from a first pass over it, and the digest of each."""
        found, digests = [], []
        for site in leaf.sites:
            factors, digest = self._factors.of(site)
            digests.append(digest)
            found.append(adapted_site(site, factors, added_to, self._terms.multiplier, leaf.change.alphas))
        return found, digests

    def _layers(self, equation: Equation, spec: TensorSpec) -> Sequence[int]:
        """The layers to look at: all, or some from the first to the last in even steps."""
        if not equation.stacked:
            return (0,)
        count = spec.shape[0]
        if self._sample is None or self._sample >= count:
            return range(count)
        return sorted({round(at) for at in np.linspace(0, count - 1, self._sample)})

    def _note_frozen(self, leaf: ExpectedLeaf, frozen: bool) -> None:
        if leaf.base is not None:
            self.findings.frozen += 1
            if not frozen:
                self.findings.not_frozen.append(leaf.source.name)


def _weight(change: LeafChange) -> float:
    """The largest weight at which an adapter's own values are mixed into the leaf; 0 where they are taken as they are."""
    return max((abs(found.weight) for found in change.replacements if found.weight != 1), default=0.0)


def _added_to(
    leaf: ExpectedLeaf, alpha: float, kernel: Array, beside: Array | None
) -> tuple[Array, Array | None, Array | None]:
    """What deltas are added to in a block.

    Args:
        leaf: What the block is of.
        alpha: How far it is to go.
        kernel: What the leaf starts as.
        beside: What `Examination._beside` has there.

    Returns:
        The kernel that figures are of, the base's that the deltas are added to instead, and the magnitudes of what the kernel is
        itself a float32 sum of.
    """
    if beside is None or not leaf.mixed:
        return kernel, beside, None
    if leaf.base is not None:
        return beside, None, None
    weight = _weight(leaf.change)
    with np.errstate(all="ignore"):
        exact = alpha in (0, 1) and not weight
        sides = kernel.astype(np.float64), beside.astype(np.float64)
        return mixed(kernel, beside, alpha), None, None if exact else summands(*sides, alpha, weight)


def _count_not_rounded(found: Array, wanted: Array) -> int:
    """How many entries are not the wanted ones, rounded to their dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = wanted.astype(found.dtype)
    if equals_rounded(found, rounded):
        return 0
    return max(1, int(np.count_nonzero(found != rounded)))
