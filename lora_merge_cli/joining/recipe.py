"""What one leaf of the joint fine-tune is made of, once the statistics of the whole leaf are known: pure.

Tensors are called by number: 0 is the base's leaf, i that of fine-tune i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Election: TypeAlias = Literal["mean", "sum"]
"""What becomes of the entries that agree with the elected sign: TIES takes their weighted mean, DARE-TIES their sum."""


@dataclass(frozen=True)
class Trim:
    """Which entries of a difference are among its largest.

    Those whose size, in float32, has larger bits than `bits`, and those of equal bits up to a place.
    """

    bits: int
    """The bits of the smallest size that is kept, as an unsigned integer: sizes are ordered as their bits are."""
    last: int | None
    """The place, in row-major order, of the last entry of that very size that is kept; None if all are."""
    share: float
    """The kept share of the entries."""


@dataclass(frozen=True)
class Draw:
    """Which entries of a difference a lottery keeps."""

    name: str
    """What the lottery is called: the leaf's name and the number of the fine-tune."""
    density: float
    """The probability that an entry is kept."""


@dataclass(frozen=True)
class Term:
    """``weight * (plus - minus)``, of which some entries may be left out."""

    weight: float
    """Its factor."""
    plus: int
    """A tensor's number."""
    minus: int
    """Another tensor's number."""
    number: int
    """The number of the fine-tune that it stands for."""
    kept: Trim | Draw | None = None
    """Which entries it has; all if None."""


@dataclass(frozen=True)
class Recipe:
    """``scale * anchor + sum of the terms``; with an election, of the terms' entries that have the elected sign."""

    anchor: int
    """The number of the tensor that the terms are added to."""
    terms: tuple[Term, ...] = ()
    """What is added; nothing: the leaf is the anchor's."""
    scale: float = 1.0
    """The anchor's factor."""
    election: Election | None = None
    """What an election of signs decides on; None if all entries count."""

    @property
    def tensors(self) -> tuple[int, ...]:
        """The numbers of all tensors that it reads, ascending."""
        return tuple(sorted({self.anchor, *(number for term in self.terms for number in (term.plus, term.minus))}))

    @property
    def simplest(self) -> Recipe:
        """The same, as one tensor alone where the factors of all others cancel: its values are exact then."""
        if self.election is not None or any(term.kept is not None for term in self.terms):
            return self
        factors = {self.anchor: self.scale}
        for term in self.terms:
            factors[term.plus] = factors.get(term.plus, 0.0) + term.weight
            factors[term.minus] = factors.get(term.minus, 0.0) - term.weight
        left = {number: factor for number, factor in factors.items() if factor}
        return Recipe(next(iter(left))) if list(left.values()) == [1.0] else self

    @property
    def is_verbatim(self) -> bool:
        """Whether the leaf is the anchor's, to the bit."""
        return not self.terms and self.scale == 1


def around_base(weights: tuple[float, ...], origins: tuple[int, ...], *, sequential: bool = False) -> tuple[Term, ...]:
    """``sum of w_i * (T_i - B)``, or with `sequential` of ``w_i * (T_i - T_(i-1))``, without the terms that are zero.

    Args:
        weights: One per fine-tune.
        origins: Whose values count for each tensor, the base's first; see `first_pass.Findings.origins`.
        sequential: Whether each difference is from the fine-tune before.
    """
    before = origins[:-1] if sequential else (0,) * len(weights)
    triples = enumerate(zip(weights, origins[1:], before, strict=True), 1)
    return tuple(Term(weight, plus, minus, number) for number, (weight, plus, minus) in triples if plus != minus)


def around_first(coefficients: tuple[float, ...], origins: tuple[int, ...]) -> Recipe:
    """``sum of c_i * T_i``, written as ``(sum of c_i) * T_1 + sum of c_i * (T_i - T_1)``.

    Fine-tunes of one base are close to each other: the differences are small, and so is what rounding loses. Where the
    coefficients' sum is 1, an entry that all share stays as it is.

    Args:
        coefficients: One per fine-tune.
        origins: As in `around_base`.
    """
    first = origins[1]
    numbered = enumerate(zip(coefficients, origins[1:], strict=True), 1)
    terms = tuple(Term(c, other, first, number) for number, (c, other) in numbered if other != first)
    return Recipe(first, terms, sum(coefficients))
