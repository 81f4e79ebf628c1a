"""One pass over a merged checkpoint beside the one with the adapters: what is found, before anybody judges it."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lora_merge_cli.compare import Comparison, compare_blocks, equals_rounded
from lora_merge_cli.dialects import Dialect, looks_like_adapter
from lora_merge_cli.dtypes import dtype_named, holds_all_values_of, is_float
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.listening import Listener, Silent
from lora_merge_cli.lowrank import adapter_digest, spectrum
from lora_merge_cli.records import (
    AdapterSite,
    Array,
    Index,
    KeyPath,
    Region,
    TensorSpec,
    display,
    full_region,
    region_shape,
)
from lora_merge_cli.side_by_side import Leaf, pieces, side_by_side
from lora_merge_cli.survival import Moments
from lora_merge_cli.verification.expectation import Expectation, ExpectedLeaf
from lora_merge_cli.verification.judged_source import JudgedSource, Unreadable
from lora_merge_cli.verification.site_judge import LayerVerdict, SiteJudge, Terms

_WHOLE_ROWS = 2**18
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
    spectrum: tuple[float, ...]
    """See `lowrank.spectrum`."""
    digest: str
    """See `lowrank.adapter_digest`."""

    @functools.cached_property
    def total(self) -> Moments:
        """Survival of the delta over all layers that were looked at."""
        return Moments.total(verdict.moments for verdict in self.layers.values())


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
    sites: dict[str, SiteFinding] = field(default_factory=dict)
    """By the kernel's name in the checkpoint."""


class Examination:
    """One pass.

    Args:
        merged: The result to judge.
        checkpoint: The one with the adapters.
        base: The one that the fine-tune started from, if the merge was given it.
        dialect: The trainer's conventions.
        terms: How a merged kernel may differ from its ideal.
        sample: How many layers of each site to look at; None for all.
        listener: Who to tell of progress.
    """

    def __init__(
        self,
        merged: Checkpoint,
        checkpoint: Checkpoint,
        base: Checkpoint | None,
        dialect: Dialect,
        terms: Terms,
        sample: int | None,
        listener: Listener | None = None,
    ) -> None:
        self._merged, self._checkpoint, self._base = merged, checkpoint, base
        self._dialect, self._terms, self._sample = dialect, terms, sample
        self._judged = JudgedSource(merged.source)
        self._listener = listener or Silent()
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
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
            for leaf, spec in found.values():
                try:
                    if leaf.site is None:
                        self._compare(leaf, spec, pool)
                    else:
                        self._judge(leaf, leaf.site, spec, pool)
                except Unreadable as error:
                    self.findings.unreadable[spec.name] = str(error)
        return self.findings

    def _match_trees(self, expectation: Expectation, index: Index) -> dict[KeyPath, tuple[ExpectedLeaf, TensorSpec]]:
        """The leaves that can be compared; notes what is missing, too much, or of another shape or dtype."""
        findings = self.findings
        present: dict[KeyPath, TensorSpec] = {}
        for path, spec in index.tensors.items():
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
        before = self._checkpoint.source.index()
        findings.unservable = self._dialect.unservable(index)
        findings.unservable_before = self._dialect.unservable(before) is not None
        one, other = (self._constants(tree) for tree in (before, index))
        findings.constants = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        return pairs

    def _constants(self, index: Index) -> dict[str, tuple[str, str | None]]:
        return {
            display(self._dialect.canonical(part.path)): (part.kind, part.value)
            for part in index.constants
            if not looks_like_adapter(part.path)
        }

    def _fits(self, leaf: ExpectedLeaf, spec: TensorSpec) -> bool:
        """Note a wrong dtype, and say whether the values can be compared all the same."""
        stored = spec.dtype
        if leaf.site is not None and not is_float(stored):
            self.findings.recast[spec.name] = f"{stored.name}, no floating-point dtype"
            return False
        if leaf.dtype is None and stored not in (*_FUSED, leaf.source.dtype):
            self.findings.recast[spec.name] = f"{stored.name}, too coarse for a fused kernel"
            return False
        if leaf.dtype is None or stored == leaf.dtype:
            return True
        words = f"{stored.name}, not {leaf.dtype.name}"
        if leaf.site is None and holds_all_values_of(stored, leaf.dtype):
            self.findings.widened[spec.name] = words
        else:
            self.findings.recast[spec.name] = words
        return True

    def _compare(self, leaf: ExpectedLeaf, spec: TensorSpec, pool: ThreadPoolExecutor) -> None:
        """An untouched leaf."""
        wanted = leaf.dtype or leaf.source.dtype
        leaves: list[Leaf] = [(self._checkpoint.source, leaf.source)]
        # The same stored bytes decode to the same values: one of them will do.
        alike = leaf.source.dtype == spec.dtype == wanted and self._stored_alike(leaf.source, spec)
        if not alike:
            leaves.append((self._judged, spec))
        if leaf.base is not None and self._base is not None:
            leaves.append((self._base.source, leaf.base))
        total = Comparison()

        def compare(piece: tuple[Array, Array]) -> tuple[Comparison, bool]:
            with np.errstate(all="ignore"):
                found = compare_blocks(piece[0].astype(wanted, copy=False), piece[1])
                overflows = (
                    bool(found.non_finite_b) and wanted != leaf.source.dtype and bool(np.isfinite(piece[0]).all())
                )
            return found, overflows

        frozen, overflows = True, False
        for region, (before, *others) in side_by_side(leaves):
            after = before if alike else others.pop(0)
            for part, overflow in pool.map(compare, _pieces(region, before, after)):
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

    def _stored_alike(self, before: TensorSpec, after: TensorSpec) -> bool:
        """Whether both leaves are kept as the same bytes."""
        one, other = self._checkpoint.source.stored(before.path), self._judged.stored(after.path)
        if one is None or other is None or one.encoding != other.encoding:
            return False
        return all(a == b for a, b in itertools.zip_longest(one.values, other.values))

    def _judge(self, leaf: ExpectedLeaf, site: AdapterSite, spec: TensorSpec, pool: ThreadPoolExecutor) -> None:
        """A kernel that an adapter was added to."""
        source = self._checkpoint.source
        factors = {role: self._factor(path) for role, path in site.factors.items()}
        values = {role: array for role, (_, array) in factors.items()}
        layers = self._layers(site, spec)
        where = f"{source.path} :: {site.name}"
        judge = SiteJudge(where, site, spec.shape, values, spec.dtype, self._terms, layers)
        leaves: list[Leaf] = [(source, leaf.source), (self._judged, spec)]
        if leaf.base is not None and self._base is not None:
            leaves.append((self._base.source, leaf.base))
        rows = layers if self._sample is not None and site.parameters.equation.stacked else None
        for region, (kernel, merged, *base) in side_by_side(leaves, rows):
            judge.take(region, kernel, merged, base[0] if base else None, pool)
            self._listener.advance(spec.name, merged.nbytes)
        verdicts = judge.finish()
        bad = sum(verdict.non_finite for verdict in verdicts.values())
        if bad:
            self.findings.not_finite[spec.name] = bad
        self._note_frozen(leaf, not judge.base_differs)
        scale = (site.parameters.scale.value or 0.0) * self._terms.multiplier
        self.findings.sites[site.name] = SiteFinding(
            leaf=leaf,
            stacked=site.parameters.equation.stacked,
            dtype=spec.dtype,
            layers=verdicts,
            spectrum=spectrum(site.parameters.equation, values["lora_a"], values["lora_b"], scale),
            digest=adapter_digest(factors),
        )

    def _layers(self, site: AdapterSite, spec: TensorSpec) -> Sequence[int]:
        """The layers to look at: all, or some from the first to the last in even steps."""
        if not site.parameters.equation.stacked:
            return (0,)
        count = spec.shape[0]
        if self._sample is None or self._sample >= count:
            return range(count)
        return sorted({round(at) for at in np.linspace(0, count - 1, self._sample)})

    def _factor(self, path: KeyPath) -> tuple[TensorSpec, Array]:
        source = self._checkpoint.source
        spec = source.index().tensors[path]
        values = source.read(path, full_region(spec.shape))
        bad = int(np.count_nonzero(~np.isfinite(values.astype(np.float64))))
        if bad:
            raise NonFiniteInput(
                "a factor is not finite",
                where=f"{source.path} :: {spec.name}",
                expected="finite values",
                found=f"{bad} of {spec.size} entries NaN or Inf",
            )
        return spec, values

    def _note_frozen(self, leaf: ExpectedLeaf, frozen: bool) -> None:
        if leaf.base is not None:
            self.findings.frozen += 1
            if not frozen:
                self.findings.not_frozen.append(leaf.source.name)


def _pieces(region: Region, before: Array, after: Array) -> Iterator[tuple[Array, Array]]:
    for piece in pieces(full_region(region_shape(region)), columns=_WHOLE_ROWS):
        yield before[piece], after[piece]
