"""What joining a leaf needs to know of the whole of it: who moved, norms and angles, sizes. Streamed, and read several times."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lora_merge_cli.compare import count_non_finite, equals_rounded
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import NonFiniteInput, Unrepresentable, UnsupportedCheckpoint
from lora_merge_cli.joining import karcher, model_stock, slerp
from lora_merge_cli.joining.dare import dare_ties
from lora_merge_cli.joining.linear import linear
from lora_merge_cli.joining.method import Joining
from lora_merge_cli.joining.recipe import Recipe, Term, around_base, around_first
from lora_merge_cli.joining.ties import size_bits, ties
from lora_merge_cli.records import Array, Region
from lora_merge_cli.side_by_side import Leaf, flat_pieces, side_by_side

_Pair: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class _Findings:
    """What the first reading found."""

    origins: tuple[int, ...]
    """Whose values count for each tensor. 0, the base's, for a fine-tune that is the base, rounded to its own dtype; that of the
    fine-tune before for one that equals it; else its own number."""
    gram: Array | None
    """The inner products of all tensors, or with Model Stock of their differences from the base; float64."""
    non_finite: tuple[int, ...]
    """How many entries of each tensor, as far as read, are NaN or Inf."""


def recipe_of(leaves: Sequence[Leaf], joining: Joining, name: str, pool: Executor | None = None) -> Recipe:
    """How to make a leaf of the joint fine-tune.

    Args:
        leaves: The base's leaf, and then each fine-tune's; floating-point, of one shape.
        joining: The method.
        name: The leaf's name, the same in whatever file it is.
        pool: Where parts of a leaf may be decoded at the same time.

    Raises:
        CorruptCheckpoint: A leaf cannot be read.
        NonFiniteInput: One that is joined holds NaN or Inf; found here where the method needs a statistic.
        Unrepresentable: A norm is beyond float64.
    """
    found = _read(leaves, joining, pool)
    if not any(found.origins):
        return Recipe(0)
    used = sorted(set(found.origins[1:]) if joining.is_spherical else set(found.origins))
    for number in used:
        refuse_not_finite(leaves[number], found.non_finite[number])
    if joining.is_spherical and len(used) == 1:
        return Recipe(used[0])
    if found.gram is not None:
        if not np.isfinite(found.gram).all():
            raise Unrepresentable("a norm is beyond float64", where=_where(leaves[0]))
        return _turned(found.gram, found.origins, joining).simplest
    weights = joining.effective
    if joining.method in ("linear", "task-arithmetic"):
        return linear(weights, found.origins, sequential=joining.sequential).simplest
    assert joining.density is not None, "the other methods have a density"
    terms = around_base(weights, found.origins, sequential=joining.sequential)
    if joining.method == "dare-ties":
        return dare_ties(terms, name, joining.density)
    return ties(terms, leaves[0][1].size, joining.density, lambda: _sizes(leaves, terms, pool))


def refuse_unequal(leaves: Sequence[Leaf], pool: Executor | None = None) -> None:
    """Refuse a leaf that nothing can be joined of, unless all fine-tunes have the same values.

    Args:
        leaves: Each fine-tune's, of one shape and dtype.
        pool: Where parts of a leaf may be decoded at the same time.

    Raises:
        UnsupportedCheckpoint: Two differ in a bit.
    """
    with _blocks(leaves, pool) as blocks:
        for _, (first, *others) in blocks:
            for leaf, values in zip(leaves[1:], others, strict=True):
                if values.dtype != first.dtype or not equals_rounded(values, first):
                    raise UnsupportedCheckpoint(
                        "a tensor that cannot be joined differs between the fine-tunes",
                        where=_where(leaf),
                        expected=f"the values in {leaves[0][0].path}",
                        found=f"others ({leaf[1].dtype.name})",
                        hint="only floating-point tensors that the base has are joined",
                    )


def refuse_not_finite(leaf: Leaf, count: int) -> None:
    """Refuse a leaf with so many entries that are NaN or Inf, if that is any.

    Raises:
        NonFiniteInput: There are some.
    """
    if count:
        raise NonFiniteInput(
            "a tensor that is to be joined is not finite",
            where=_where(leaf),
            expected="finite values",
            found=f"{count} of {leaf[1].size} entries NaN or Inf",
        )


def _where(leaf: Leaf) -> str:
    return f"{leaf[0].path} :: {leaf[1].name}"


def _turned(gram: Array, origins: tuple[int, ...], joining: Joining) -> Recipe:
    """The recipe of a method that goes by angles."""
    among = gram[np.ix_(origins[1:], origins[1:])]
    if joining.method == "model-stock":
        count = len(origins) - 1
        share = model_stock.share_of_mean(among)
        return Recipe(0, around_base((share / count,) * count, origins) if share else ())
    find: Callable[[Array, tuple[float, ...]], tuple[float, ...]] = (
        slerp.coefficients if joining.method == "slerp" else karcher.coefficients
    )
    return around_first(find(among, joining.effective), origins)


def _read(leaves: Sequence[Leaf], joining: Joining, pool: Executor | None) -> _Findings:
    """Read all leaves side by side; no further than needed to tell who moved, unless the method goes by angles."""
    count = len(leaves)
    pairs = _candidates(leaves, joining)
    gram = np.zeros((count, count)) if joining.needs_angles else None
    non_finite = [0] * count
    with _blocks(leaves, pool) as blocks:
        for _, block in blocks:
            for values in flat_pieces(*block):
                pairs = {(i, k) for i, k in pairs if equals_rounded(values[i], values[k])}
                non_finite = [n + count_non_finite(v) for n, v in zip(non_finite, values, strict=True)]
                if gram is not None:
                    gram += _products(values, from_base=joining.method == "model-stock")
            if gram is None and not pairs:
                break
    origins = [0]
    for number in range(1, count):
        same = [origins[k] for i, k in pairs if i == number]
        origins.append(min(same, default=number))
    return _Findings(tuple(origins), gram, tuple(non_finite))


@contextlib.contextmanager
def _blocks(leaves: Sequence[Leaf], pool: Executor | None) -> Iterator[Iterator[tuple[Region, tuple[Array, ...]]]]:
    """As `side_by_side`, closed at the end: its threads would outlive a reader that stops early."""
    blocks = side_by_side(leaves, pool=pool)
    try:
        yield blocks
    finally:
        if isinstance(blocks, Generator):
            blocks.close()


def _candidates(leaves: Sequence[Leaf], joining: Joining) -> set[_Pair]:
    """Pairs of a fine-tune and an earlier tensor that it may prove to be.

    That is the base; and the fine-tune before, if this one started from it, or if all being one makes a difference.
    """
    from_base = {(number, 0) for number in range(1, len(leaves))}
    from_before = {
        (number, number - 1)
        for number in range(2, len(leaves))
        if joining.sequential or (joining.is_spherical and leaves[number][1].dtype == leaves[number - 1][1].dtype)
    }
    return from_base | from_before


def _products(values: Sequence[Array], *, from_base: bool) -> Array:
    """The inner products of runs of entries, or of their differences from the first; sums are float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide: list[Array] = [run.astype(np.float64) for run in values]
        if from_base:
            wide = [run - wide[0] for run in wide]
        result = np.zeros((len(wide), len(wide)))
        for i, one in enumerate(wide):
            for k in range(i, len(wide)):
                # Neither BLAS nor einsum: their sums depend on threads, and on where in memory the runs lie.
                result[i, k] = result[k, i] = np.multiply(one, wide[k]).sum()
    return result


def _sizes(leaves: Sequence[Leaf], terms: Sequence[Term], pool: Executor | None) -> Iterator[tuple[Array, ...]]:
    """The bits of the sizes of all differences, run after run; computed as `arithmetic.joined` does."""
    numbers = sorted({number for term in terms for number in (term.plus, term.minus)})
    chosen = [leaves[number] for number in numbers]
    wide = np.float64 if any(spec.dtype == np.float64 for _, spec in leaves) else np.float32
    with _blocks(chosen, pool) as blocks:
        for _, block in blocks:
            for part in flat_pieces(*block):
                values: dict[int, Array] = {number: run.astype(wide) for number, run in zip(numbers, part, strict=True)}
                with np.errstate(over="ignore", invalid="ignore"):
                    yield tuple(size_bits(values[term.plus] - values[term.minus]) for term in terms)


def may_be_joined(leaf: Leaf) -> bool:
    """Whether a leaf is an array of floating-point numbers."""
    return is_float(leaf[1].dtype) and leaf[1].kind == "array" and math.prod(leaf[1].shape) > 0
