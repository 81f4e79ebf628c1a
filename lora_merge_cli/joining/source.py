"""Several fine-tunes of one base, offered as one checkpoint: each leaf is joined as it is read, in memory that is bounded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lora_merge_cli.ahead import Ahead
from lora_merge_cli.compare import count_non_finite
from lora_merge_cli.draws import keep_run
from lora_merge_cli.dtypes import FLOAT32, is_float
from lora_merge_cli.errors import Unrepresentable, WrongBase
from lora_merge_cli.formats.flat import runs
from lora_merge_cli.formats.interface import Source, Stored
from lora_merge_cli.joining.arithmetic import joined
from lora_merge_cli.joining.first_pass import may_be_joined, recipe_of, refuse_not_finite, refuse_unequal
from lora_merge_cli.joining.method import Joining
from lora_merge_cli.joining.recipe import Draw as Drawn
from lora_merge_cli.joining.recipe import Recipe, Trim
from lora_merge_cli.records import Array, Index, KeyPath, Region, TensorSpec, display, region_shape
from lora_merge_cli.side_by_side import Leaf

Draw: TypeAlias = Callable[[int, str, int, int, float], Array]
"""``(seed, name, start, stop, density)``: which of a leaf's entries from `start` to before `stop` are kept, bool."""

Canonical: TypeAlias = Callable[[KeyPath], KeyPath]
"""A leaf's path without what differs between the spellings of one model."""

_DRAWN_AT_A_TIME = 2**20
_WIDE = np.dtype(np.float64)


@dataclass(frozen=True)
class Figures:
    """What a method found for one leaf."""

    moved: bool
    """Whether any fine-tune differs from the base, rounded to its dtype."""
    coefficients: tuple[float, ...] = ()
    """By fine-tune, the factor of what it changes, or of its own values with slerp and Karcher; 0 for one that did not move.
    Empty where signs are elected, or where nothing is joined."""
    kept: tuple[float, ...] = ()
    """By fine-tune, the share of its entries that a trim kept, or the chance that a draw keeps one; 0 for one that did not move."""


@dataclass(frozen=True)
class _Joint:
    """The leaves that one joint leaf is made of."""

    spec: TensorSpec
    """What it is to be."""
    leaves: tuple[Leaf, ...]
    """The base's and the fine-tunes', or, where the base has none that fits, the fine-tunes' alone."""
    name: str
    """Its name, whatever the file."""
    is_joined: bool
    """Whether there is anything to join, and not just values on which all must agree."""
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    """Held while the leaf is read for its recipe."""


class JoinedSource:
    """The joint fine-tune. Its leaves are those of the first fine-tune, each float32, or float64 if any of them is.

    Where a fine-tune's leaf is the base's, rounded to its own dtype, bit for bit, it changes nothing; a leaf that none moved is the
    base's to the bit. What the base lacks, and what is no floating-point array, is the first fine-tune's in its own dtype and must
    be the same in all. The leaf's statistics are taken when it is first asked for, by a reading of its own or several; see `ties`.

    Args:
        base: B.
        tuned: T_1 ... T_n.
        joining: What to make of them.
        canonical: Matches the leaves of different files; whole paths do where it maps two of one file to one name.
        device: The JAX device to compute on; JAX's first if None.
        draw: The lottery of ``dare-ties``; see `draws`.

    Raises:
        WrongBase: The fine-tunes have not the same leaves.
    """

    def __init__(
        self,
        base: Source,
        tuned: Sequence[Source],
        joining: Joining,
        canonical: Canonical,
        device: Any = None,
        draw: Draw = keep_run,
    ) -> None:
        if len(tuned) != len(joining.weights):
            raise ValueError(f"{len(tuned)} fine-tunes and {len(joining.weights)} weights")
        self._base, self._tuned, self._joining = base, tuple(tuned), joining
        self._device = device
        self._draw = draw
        self._recipes: dict[KeyPath, Recipe] = {}
        self._joints = _joints(base, self._tuned, canonical)
        self._index = _index(base, self._tuned, self._joints, canonical)

    @property
    def path(self) -> Path:
        """The first fine-tune's."""
        return self._tuned[0].path

    def index(self) -> Index:
        """The first fine-tune's leaves in their joint dtypes. Leaves count as shared where all that have both say so."""
        return self._index

    @property
    def figures(self) -> Mapping[KeyPath, Figures]:
        """What was found, by leaf, for all that were read so far and are joined."""
        return {
            path: self._figures(recipe) for path, recipe in list(self._recipes.items()) if self._joints[path].is_joined
        }

    def scan(self, path: KeyPath, regions: Iterable[Region], pool: Executor | None = None) -> Iterator[Array]:
        """See `Source.scan`.

        Raises:
            CorruptCheckpoint: An input cannot be read.
            NonFiniteInput: One of the leaves holds NaN or Inf, and they are not all the base's.
            Unrepresentable: A result is beyond the leaf's dtype.
            UnsupportedCheckpoint: A leaf that cannot be joined differs between the fine-tunes.
        """
        joint, recipe = self._joint(path), self._recipe(path, pool)
        asked = list(regions)
        with contextlib.ExitStack() as held:
            # Closed in any case: a thread that reads on would outlive its reader.
            scans = {
                number: held.enter_context(Ahead(source.scan(spec.path, asked, pool)))
                for number, (source, spec) in self._read_by(joint, recipe)
            }
            for region, values in zip(asked, zip(*scans.values(), strict=True), strict=True):
                yield self._made(joint, recipe, region, dict(zip(scans, values, strict=True)))

    def read(self, path: KeyPath, region: Region) -> Array:
        """See `Source.read`, and `scan` for what it raises."""
        joint, recipe = self._joint(path), self._recipe(path, None)
        values = {number: source.read(spec.path, region) for number, (source, spec) in self._read_by(joint, recipe)}
        return self._made(joint, recipe, region, values)

    def stored(self, path: KeyPath) -> Stored | None:
        """An input's stored bytes where they are the joint leaf's, else None; see `scan` for what it raises."""
        joint, recipe = self._joint(path), self._recipe(path, None)
        source, spec = joint.leaves[recipe.anchor]
        return source.stored(spec.path) if recipe.is_verbatim and spec.dtype == joint.spec.dtype else None

    def fingerprint(self) -> str:
        """A digest of all inputs' digests and of how they are joined."""
        digest = hashlib.sha256(repr(self._joining).encode())
        for source in (self._base, *self._tuned):
            digest.update(f" {source.fingerprint()}".encode())
        return digest.hexdigest()

    def _joint(self, path: KeyPath) -> _Joint:
        return self._joints[self._index.shared.get(path, path)]

    def _recipe(self, path: KeyPath, pool: Executor | None) -> Recipe:
        joint = self._joint(path)
        key = joint.spec.path
        with joint.lock:
            if key not in self._recipes:
                if joint.is_joined:
                    self._recipes[key] = recipe_of(joint.leaves, self._joining, joint.name, pool)
                else:
                    refuse_unequal(joint.leaves, pool)
                    self._recipes[key] = Recipe(0)
            return self._recipes[key]

    def _read_by(self, joint: _Joint, recipe: Recipe) -> Iterator[tuple[int, Leaf]]:
        return ((number, joint.leaves[number]) for number in recipe.tensors)

    def _made(self, joint: _Joint, recipe: Recipe, region: Region, values: Mapping[int, Array]) -> Array:
        """A region of the joint leaf, from that of all leaves that it is made of."""
        spec = joint.spec
        if recipe.is_verbatim:
            return values[recipe.anchor].astype(spec.dtype, copy=False)
        for number, run in values.items():
            refuse_not_finite(joint.leaves[number], count_non_finite(run))
        places = [(start, start + size) for _, start, size in runs(spec.shape, region, 1)]
        drawn = [self._drawn(term.kept, places) if isinstance(term.kept, Drawn) else None for term in recipe.terms]

        def before(last: int) -> int:
            return sum(min(stop, last + 1) - start for start, stop in places if start <= last)

        flat = {number: np.ascontiguousarray(run).reshape(-1) for number, run in values.items()}
        result = joined(recipe, flat, before, drawn, wide=spec.dtype == _WIDE, device=self._device)
        bad = count_non_finite(result)
        if bad:
            raise Unrepresentable(
                f"a joint tensor is beyond {spec.dtype.name}",
                where=f"{self.path} :: {spec.name}",
                found=f"{bad} of {result.size} entries NaN or Inf",
                hint=None if self._joining.is_spherical else "take smaller weights",
            )
        return result.reshape(region_shape(region))

    def _drawn(self, lot: Drawn, places: Sequence[tuple[int, int]]) -> Array:
        """Which entries a lottery keeps, of runs that follow one another."""
        return np.concatenate(
            [
                # The numbers that are drawn take eight times the memory of what becomes of them.
                self._draw(self._joining.seed, lot.name, part, min(part + _DRAWN_AT_A_TIME, stop), lot.density)
                for start, stop in places
                for part in range(start, stop, _DRAWN_AT_A_TIME)
            ]
        )

    def _figures(self, recipe: Recipe) -> Figures:
        if recipe.is_verbatim:
            return Figures(moved=recipe.anchor != 0)
        numbers = range(1, len(self._tuned) + 1)
        kept = {term.number: term.kept for term in recipe.terms}
        shares = {
            number: how.share if isinstance(how, Trim) else how.density if how is not None else 1.0
            for number, how in kept.items()
        }
        if recipe.election is not None:
            return Figures(moved=True, kept=tuple(shares.get(number, 0.0) for number in numbers))
        weights = {term.number: term.weight for term in recipe.terms}
        if self._joining.is_spherical:
            weights = {1: recipe.scale - sum(weights.values()), **weights}
        return Figures(moved=True, coefficients=tuple(weights.get(number, 0.0) for number in numbers))


def _joints(base: Source, tuned: Sequence[Source], canonical: Canonical) -> dict[KeyPath, _Joint]:
    """What each leaf of the first fine-tune is made of.

    Raises:
        WrongBase: Another one has not the same leaves.
    """
    named = _named((base, *tuned), canonical)
    of_base, first, *others = named
    for source, theirs in zip(tuned[1:], others, strict=True):
        _refuse_other_leaves(source, theirs, tuned[0], first)
    result = {}
    for name, spec in first.items():
        leaves: tuple[Leaf, ...] = (
            (tuned[0], spec),
            *((source, theirs[name]) for source, theirs in zip(tuned[1:], others, strict=True)),
        )
        start = of_base.get(name)
        fits = start is not None and start.shape == spec.shape and may_be_joined((base, start))
        if start is not None and fits and all(map(may_be_joined, leaves)):
            leaves = ((base, start), *leaves)
            wide = any(found.dtype == _WIDE for _, found in leaves)
            joint = dataclasses.replace(spec, dtype=_WIDE if wide else FLOAT32)
            result[spec.path] = _Joint(joint, leaves, display(name), is_joined=True)
        else:
            result[spec.path] = _Joint(spec, leaves, display(name), is_joined=False)
    return result


def _named(sources: Sequence[Source], canonical: Canonical) -> list[dict[KeyPath, TensorSpec]]:
    """Every source's leaves by canonical path, or all by their own where two of one source would be one."""
    tensors = [source.index().tensors for source in sources]
    named = [{canonical(path): spec for path, spec in found.items()} for found in tensors]
    if any(len(names) < len(found) for names, found in zip(named, tensors, strict=True)):
        return [dict(found) for found in tensors]
    return named


def _refuse_other_leaves(
    source: Source, leaves: Mapping[KeyPath, TensorSpec], first_source: Source, first: Mapping[KeyPath, TensorSpec]
) -> None:
    for one, other, path in ((first, leaves, source.path), (leaves, first, first_source.path)):
        for name, spec in one.items():
            if name not in other:
                raise WrongBase(
                    "the fine-tunes are not of one base: one lacks a tensor of another",
                    where=f"{path} :: {spec.name}",
                )
    for name, spec in first.items():
        found = leaves[name]
        alike = found.dtype == spec.dtype or (is_float(found.dtype) and is_float(spec.dtype))
        if found.shape != spec.shape or not alike or found.kind != spec.kind:
            raise WrongBase(
                "the fine-tunes are not of one base: a tensor is of two kinds",
                where=f"{source.path} :: {found.name}",
                expected=f"{spec.shape} {spec.dtype.name}, as in {first_source.path}",
                found=f"{found.shape} {found.dtype.name}",
            )


def _index(base: Source, tuned: Sequence[Source], joints: Mapping[KeyPath, _Joint], canonical: Canonical) -> Index:
    first = tuned[0].index()
    states = [_shared(source, canonical) for source in (base, *tuned[1:])]
    in_base = {canonical(path) for path in base.index().tensors}
    shared = {}
    for later, earlier in first.shared.items():
        pair = canonical(later), canonical(earlier)
        of_base, *others = (pair in stated for stated in states)
        if all(others) and (of_base or pair[0] not in in_base):
            shared[later] = earlier
    specs = {path: dataclasses.replace(joints[shared.get(path, path)].spec, path=path) for path in first.tensors}
    return Index(specs, first.constants, shared)


def _shared(source: Source, canonical: Canonical) -> set[tuple[KeyPath, KeyPath]]:
    return {(canonical(later), canonical(earlier)) for later, earlier in source.index().shared.items()}
