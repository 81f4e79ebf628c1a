"""Which of the two representable neighbours of a result is stored, and which leaves have that choice.

- ``nearest``: the nearer one, ties to even. What lies on the grid already, as bfloat16 kernels do, is thereby pulled back to where
  it was: a small delta shrinks.
- ``stochastic``: the upper one with the probability that keeps the mean (Gupta et al., arXiv:1502.02551, section 3). The delta is
  kept on average, for noise in every direction.
- ``preserve``: error feedback in the space of the inputs that the adapters react to. See `rounding_numerics.preserved`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from lora_merge_cli.errors import UsageError

Method: TypeAlias = Literal["nearest", "stochastic", "preserve"]
METHODS: tuple[Method, ...] = ("nearest", "stochastic", "preserve")
ServingValues: TypeAlias = Literal["cell", "widened"]

GRIDS = ("bfloat16", "float16")
"""The dtypes between whose values can be chosen."""

DENSE = "a dense interpolation has no low-rank input space"
"""Why a leaf without sites cannot be preserved."""


@dataclass(frozen=True)
class Rounding:
    """How results are rounded: what a user asks for."""

    method: Method = "nearest"
    """Which of the two neighbours to take."""
    mu: float = 1.0
    """Of ``preserve``: what the noise of single entries counts beside the error along the adapter's inputs, see `penalty`."""
    seed: int = 0
    """Of ``stochastic``: what random bits are drawn from."""
    serving_values: ServingValues = "cell"
    """What a float32 file holds whose server will cast it: ``cell``, the exact value if it casts to the chosen neighbour, else the
    nearest one that does; ``widened``, the chosen neighbour itself."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: There is no such method, or mu is no number from 0.
        """
        if self.method not in METHODS:
            raise UsageError("--rounding has no such value", expected=", ".join(METHODS), found=self.method)
        if not (math.isfinite(self.mu) and self.mu >= 0):
            raise UsageError("--mu must be a finite number, 0 or more", found=self.mu)
        if self.serving_values not in ("cell", "widened"):
            raise UsageError("--serving-values has no such value", expected="cell, widened", found=self.serving_values)


@dataclass(frozen=True)
class Choice:
    """How a kernel is rounded, where not to nearest: what a device's program is compiled for."""

    method: Method
    """``stochastic`` or ``preserve``."""
    grid: str
    """The name of the dtype between whose values is chosen."""
    widened: bool
    """Whether a wider file holds the chosen values themselves."""


@dataclass(frozen=True)
class LeafRounding:
    """How one leaf is rounded."""

    method: Method = "nearest"
    """What it gets."""
    grid: np.dtype[Any] | None = None
    """The dtype between whose values is chosen: the stored one, or, of a wider file, the serving one. None to nearest."""
    reason: str | None = None
    """Why it does not get what was asked for; None if it does."""

    def choice(self, asked: Rounding) -> Choice | None:
        """The choice that its entries have; None if they are rounded to nearest."""
        if self.grid is None:
            return None
        return Choice(self.method, self.grid.name, asked.serving_values == "widened")


NEAREST = LeafRounding()


def penalty(mu: float, rank: int, inputs: int) -> float:
    """What the square of an entry's error counts beside that of the error along the adapter's inputs: ``mu * rank / inputs``.

    The mean of ``|u_i|^2`` over the inputs is rank / inputs, so that at mu 1 an average entry counts for both alike.

    Args:
        mu: See `Rounding.mu`.
        rank: How many directions the adapter's inputs span.
        inputs: How many there are.
    """
    return mu * rank / inputs


def leaf_rounding(
    asked: Rounding,
    stored: np.dtype[Any],
    serving: np.dtype[Any],
    *,
    spaceless: str | None = None,
    on_host: bool = False,
) -> LeafRounding:
    """How a leaf that is computed is rounded.

    Args:
        asked: What the user asks for.
        stored: What the leaf is stored in.
        serving: What servers cast it to.
        spaceless: Why the leaf has no low-rank input space; None if it has one.
        on_host: Whether its numbers are none that a device computes with: float64 or integers.
    """
    if asked.method == "nearest":
        return NEAREST
    grid = stored if stored.itemsize < 4 else serving
    if grid.name not in GRIDS:
        why = f"stored as {stored.name}" + (f" and served as {serving.name}" if stored.itemsize >= 4 else "")
        return LeafRounding(reason=f"{why}: only bfloat16 and float16 are rounded otherwise")
    if on_host:
        return LeafRounding(reason="its arithmetic is that of float64 or of integers")
    if asked.method == "preserve" and spaceless is not None:
        return LeafRounding(reason=spaceless)
    return LeafRounding(asked.method, grid)


def without_space(operation: str) -> str:
    """Why a kernel that such an operation changes cannot be preserved."""
    return f"{operation} has no low-rank input space"
