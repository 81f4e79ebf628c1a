"""What the judge of a joint fine-tune must know of a whole leaf: who moved, inner products, where a trim ends. Read in passes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np

from lora_merge_cli.compare import equals_rounded
from lora_merge_cli.draws import tensor_name
from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.formats.interface import Source
from lora_merge_cli.joining.method import Joining
from lora_merge_cli.records import Array, Region
from lora_merge_cli.side_by_side import Leaf, flat_pieces, side_by_side
from lora_merge_cli.verification.joint_angles import factors, share_of_mean
from lora_merge_cli.verification.joint_entries import Kept, Lottery, Making, Share, doubt_of, is_exact, size_of
from lora_merge_cli.verification.joint_largest import k_largest, place_of

_Any = TypeVar("_Any")

_Run: TypeAlias = tuple[dict[int, Array], dict[int, Array]]
"""A run of entries: the values, and the errors of those that are computed, by tensor."""


@dataclass(frozen=True)
class Tensor:
    """The base's leaf, or a fine-tune's."""

    leaf: Leaf
    """Where to read it."""
    errors: Source | None = None
    """Where to read how far a merge's values, computed in float32, may be from these; None for stored values."""

    def as_merged(self, values: Array) -> Array:
        """The values in the dtype that a merge has them in."""
        return values if self.errors is None else values.astype(FLOAT32)

    @property
    def is_wide(self) -> bool:
        """Whether a merge has it in float64."""
        return self.errors is None and self.leaf[1].dtype == np.float64


@dataclass(frozen=True)
class Whole:
    """A leaf in all its versions."""

    tensors: tuple[Tensor, ...]
    """The base's, then each fine-tune's."""
    name: str
    """Its name, whatever the file: what draws go by."""
    joining: Joining
    """What is to be made of them."""

    @property
    def is_wide(self) -> bool:
        """Whether a merge computes in float64."""
        return any(tensor.is_wide for tensor in self.tensors)

    def making(self, pool: Executor | None = None) -> Making:
        """How an entry of the joint leaf follows from those of all versions.

        Raises:
            NonFiniteInput: A version that counts holds NaN or Inf.
        """
        joining = self.joining
        stands_for, inner = self._first_pass(pool)
        if not any(stands_for):
            return Making(0)
        if joining.is_spherical:
            first, *_ = versions = stands_for[1:]
            if len(set(versions)) == 1:
                return Making(first)
            by = factors(self._refused(inner)[np.ix_(versions, versions)], joining)
            shares = [Share(c, version, first, k) for k, (c, version) in enumerate(zip(by, versions, strict=True))]
            return Making(first, _of_two(shares), scale=sum(by))
        weights = joining.effective
        if joining.method == "model-stock":
            versions = stands_for[1:]
            t = share_of_mean(self._refused(inner)[np.ix_(versions, versions)])
            weights = (t / len(weights),) * len(weights)
            if t == 0:
                return Making(0)
        shares = [
            Share(weight, stands_for[k + 1], stands_for[k] if joining.sequential else 0, k)
            for k, weight in enumerate(weights)
        ]
        return self._thinned(_of_two(shares), pool)

    def runs(
        self, numbers: Sequence[int], rows: Sequence[int] | None = None, pool: Executor | None = None
    ) -> Iterator[tuple[Region, _Run]]:
        """Some versions side by side, float64 in one axis, with their errors.

        Raises:
            NonFiniteInput: A value is NaN or Inf.
        """
        computed = [number for number in numbers if self.tensors[number].errors is not None]
        leaves = [self.tensors[number].leaf for number in numbers]
        leaves += [(source, self.tensors[n].leaf[1]) for n in computed if (source := self.tensors[n].errors)]
        with _closing(side_by_side(leaves, rows, pool)) as blocks:
            for region, block in blocks:
                wide = [values.reshape(-1).astype(np.float64) for values in block]
                values = dict(zip(numbers, wide[: len(numbers)], strict=True))
                for number, run in values.items():
                    if not np.isfinite(run).all():
                        raise _not_finite(self.tensors[number].leaf)
                yield region, (values, dict(zip(computed, wide[len(numbers) :], strict=True)))

    def _first_pass(self, pool: Executor | None) -> tuple[list[int], Array]:
        """Whose values count for each version, and all inner products.

        A fine-tune whose values are the base's, rounded to its own dtype, bit for bit, stands for the base; one that is the
        fine-tune before it, rounded, stands for that, if it started from that one or all being one makes a difference.
        """
        joining, count = self.joining, len(self.tensors)
        specs = [tensor.leaf[1] for tensor in self.tensors]
        dtypes = [FLOAT32 if tensor.errors is not None else tensor.leaf[1].dtype for tensor in self.tensors]
        alike = {(k, 0) for k in range(1, count)}
        alike |= {
            (k, k - 1)
            for k in range(2, count)
            if joining.sequential or (joining.is_spherical and dtypes[k] == dtypes[k - 1])
        }
        inner = np.zeros((count, count))
        with _closing(side_by_side([tensor.leaf for tensor in self.tensors], pool=pool)) as blocks:
            for _, block in blocks:
                for piece in flat_pieces(*block):
                    merged = [tensor.as_merged(run) for tensor, run in zip(self.tensors, piece, strict=True)]
                    alike = {(k, other) for k, other in alike if equals_rounded(merged[k], merged[other])}
                    if joining.needs_angles:
                        inner += _inner(piece, from_base=joining.method == "model-stock")
                if not (alike or joining.needs_angles):
                    break
        stands_for = [0]
        for k in range(1, len(specs)):
            stands_for.append(min((stands_for[other] for one, other in alike if one == k), default=k))
        return stands_for, inner

    def _refused(self, inner: Array) -> Array:
        """The inner products.

        Raises:
            NonFiniteInput: They are not finite.
        """
        bad = ~np.isfinite(np.diagonal(inner))
        if bad.any():
            raise _not_finite(self.tensors[int(np.flatnonzero(bad)[-1])].leaf)
        return inner

    def _thinned(self, shares: tuple[Share, ...], pool: Executor | None) -> Making:
        """Of TIES and DARE, with what is kept of each share; of the others all."""
        joining, density = self.joining, self.joining.density
        if density is None:
            return Making(0, shares)
        if joining.method == "dare-ties":
            drawn = tuple(
                dataclasses.replace(
                    share,
                    weight=share.weight / density,
                    kept=None if density == 1 else Lottery(joining.seed, tensor_name(self.name, share.number), density),
                )
                for share in shares
            )
            return Making(0, drawn, election="sum")
        if density == 1 or not shares:
            return Making(0, shares, election="mean")
        ends = self._ends(shares, max(1, int(density * self.tensors[0].leaf[1].size)), pool)
        kept = tuple(dataclasses.replace(share, kept=end) for share, end in zip(shares, ends, strict=True))
        return Making(0, kept, election="mean")

    def _ends(self, shares: Sequence[Share], keep: int, pool: Executor | None) -> list[Kept]:
        """Where the `keep` largest sizes of each difference end: of stored values at one entry, of computed ones in a range.

        Were every size off by its whole error, up or down, the `keep`-th largest would be that of the sizes so changed: it lies
        between the two, whatever the errors are.
        """
        numbers = sorted({number for share in shares for number in (share.plus, share.minus)})

        def sizes() -> Iterator[list[Array]]:
            for _, (values, errors) in self.runs(numbers, pool=pool):
                found: list[Array] = []
                for share in shares:
                    size = size_of(share, values, errors, wide=self.is_wide)
                    if is_exact(share, errors):
                        found.append(size)
                    else:
                        doubt = doubt_of(share, values, errors)
                        found += [size - doubt, size + doubt]
                yield found

        computed = {number for number in numbers if self.tensors[number].errors is not None}
        lengths = [2 if {share.plus, share.minus} & computed else 1 for share in shares]
        found = k_largest(keep, sum(lengths), sizes)
        ends = []
        for number, length in enumerate(lengths):
            at = sum(lengths[:number])
            first, last = found[at], found[at + length - 1]
            place = None
            if length == 1 and first.value > 0 and first.rest < first.equal:
                with _closing(sizes()) as again:
                    place = place_of(first.rest, first.value, (run[at] for run in again))
            ends.append(Kept(first.value, last.value, place))
        return ends


@contextlib.contextmanager
def _closing(blocks: Iterator[_Any]) -> Iterator[Iterator[_Any]]:
    """The blocks; their threads would outlive a reader that stops early."""
    try:
        yield blocks
    finally:
        if isinstance(blocks, Generator):
            blocks.close()


def _of_two(shares: Sequence[Share]) -> tuple[Share, ...]:
    """The shares but for those that are zero everywhere."""
    return tuple(share for share in shares if share.plus != share.minus)


def _inner(piece: Sequence[Array], *, from_base: bool) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.stack([run.astype(np.float64) for run in piece])
        if from_base:
            rows -= rows[0].copy()
        return np.asarray(np.einsum("in,kn->ik", rows, rows))


def _not_finite(leaf: Leaf) -> NonFiniteInput:
    return NonFiniteInput(
        "a tensor that is to be joined is not finite",
        where=f"{leaf[0].path} :: {leaf[1].name}",
        expected="finite values",
        found="NaN or Inf",
    )
