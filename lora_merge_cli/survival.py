"""Delta survival: how much of an adapter's delta a dtype keeps.

With ``w`` the kernel that the checkpoint holds, ``d`` the ideal delta and ``q = cast(result) - cast(w)`` the realised one:

- gain ``<q, d> / <d, d>``: 1 is kept; below 1 the fine-tune is shrunk as if by a smaller scale;
- cosine ``<q, d> / (|q| |d|)`` and relative error ``|q - d| / |d|``;
- the share of entries that the merge leaves unchanged;
- gain and relative error *along the adapter's inputs*: of ``U^T q`` against ``U^T d``, with U an orthonormal basis of lora_a's
  columns. That is what an input that the adapter reacts to will see.

bfloat16 kernels already lie on the grid that the result is rounded to, so rounding to nearest shrinks a small delta
systematically; metrics of the whole weight do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

GAIN_WORTH_A_WARNING = 0.98
"""Below, a dtype loses enough of a delta along the adapter's inputs to say so."""


@dataclass
class Realised:
    """Sums for one dtype, of the realised delta ``q`` against the ideal ``d``. All in float64."""

    q_dot_d: float = 0.0
    error_sq: float = 0.0
    unchanged: int = 0
    inputs_q_dot_d: float = 0.0
    inputs_d_sq: float = 0.0
    inputs_error_sq: float = 0.0

    def add(self, other: Realised) -> None:
        """Add the sums of another part of the kernel."""
        self.q_dot_d += other.q_dot_d
        self.error_sq += other.error_sq
        self.unchanged += other.unchanged
        self.inputs_q_dot_d += other.inputs_q_dot_d
        self.inputs_d_sq += other.inputs_d_sq
        self.inputs_error_sq += other.inputs_error_sq


@dataclass
class Moments:
    """Sums over the entries of one layer, or of a whole site."""

    delta_sq: float = 0.0
    kernel_sq: float = 0.0
    max_abs: float = 0.0
    entries: int = 0
    realised: dict[str, Realised] = field(default_factory=dict)
    """By the name of the dtype."""
    nearest: Realised | None = None
    """Where another rounding was chosen: what rounding to nearest would have left, in the dtype that was chosen in."""
    moved: int = 0
    """Entries of a wide file that are not the exact result, for the sake of what servers cast them to."""
    rank: int = 0
    """How many directions the adapters' inputs span, the most of any matrix; 0 where that is not known."""
    inputs: int = 0
    """How many inputs a matrix has; 0 where that is not known."""

    def add(self, other: Moments) -> None:
        """Add the sums of another part of the kernel."""
        self.delta_sq += other.delta_sq
        self.kernel_sq += other.kernel_sq
        self.max_abs = max(self.max_abs, other.max_abs)
        self.entries += other.entries
        for name, sums in other.realised.items():
            self.realised.setdefault(name, Realised()).add(sums)
        if other.nearest is not None:
            self.nearest = self.nearest or Realised()
            self.nearest.add(other.nearest)
        self.moved += other.moved
        self.rank = max(self.rank, other.rank)
        self.inputs = max(self.inputs, other.inputs)

    @staticmethod
    def total(parts: Iterable[Moments]) -> Moments:
        """The sums over all parts."""
        total = Moments()
        for part in parts:
            total.add(part)
        return total

    @property
    def is_finite(self) -> bool:
        """Whether all sums are; else a value of one side alone is NaN or Inf."""
        sums = [sum((each.q_dot_d, each.error_sq)) for each in self.realised.values()]
        return math.isfinite(sum([self.delta_sq, self.kernel_sq, *sums]))

    @property
    def relative_norm(self) -> float | None:
        """``|delta| / |kernel|``, Frobenius; None for a kernel of zeros."""
        return _ratio(math.sqrt(self.delta_sq), math.sqrt(self.kernel_sq))

    def realised_of(self, dtype: str) -> Realised:
        """The sums for one dtype; zeros where nothing was measured, there being no delta."""
        return self.realised.get(dtype, Realised())

    def realised_sq(self, dtype: str) -> float:
        """``<q, q>`` for one dtype."""
        return self._squared(self.realised_of(dtype))

    def survival(self, dtype: str) -> Survival:
        """The figures for one dtype."""
        return self._survival(dtype, self.realised_of(dtype))

    def survival_to_nearest(self, dtype: str) -> Survival | None:
        """The figures that rounding to nearest would have had in the dtype that was chosen in; None where it was to nearest."""
        return None if self.nearest is None else self._survival(dtype, self.nearest)

    def break_even(self, dtype: str) -> float | None:
        """The share of an input's energy along the adapter's inputs from which the chosen rounding errs less than the nearest.

        An input x with the share f of ``|x|^2`` in U's span, evenly spread there and outside, meets on average
        ``f * S / rank + (1 - f) * (E - S) / (inputs - rank)`` of squared error per ``|x|^2``, E being the squared error of all
        entries and S that along U. A random input has the share rank / inputs.

        Args:
            dtype: The name of the dtype that was chosen in.

        Returns:
            0 where the choice always errs less; None where it errs no less along the adapter's inputs, or nothing was chosen.
        """
        rank, inputs = self.rank, self.inputs
        if self.nearest is None or not 0 < rank < inputs:
            return None
        chosen = self.realised_of(dtype)
        saved = (self.nearest.inputs_error_sq - chosen.inputs_error_sq) / rank
        outside = [found.error_sq - found.inputs_error_sq for found in (chosen, self.nearest)]
        added = (outside[0] - outside[1]) / (inputs - rank)
        if not saved > 0:
            return None
        return finite(max(added, 0.0) / (max(added, 0.0) + saved))

    def _squared(self, sums: Realised) -> float:
        return max(sums.error_sq + 2 * sums.q_dot_d - self.delta_sq, 0.0)

    def _survival(self, dtype: str, sums: Realised) -> Survival:
        realised_norm = math.sqrt(self._squared(sums))
        return Survival(
            dtype=dtype,
            gain=_ratio(sums.q_dot_d, self.delta_sq),
            cosine=_ratio(sums.q_dot_d, realised_norm * math.sqrt(self.delta_sq)),
            relative_error=_ratio(math.sqrt(sums.error_sq), math.sqrt(self.delta_sq)),
            unchanged=_ratio(sums.unchanged, self.entries),
            gain_along_inputs=_ratio(sums.inputs_q_dot_d, sums.inputs_d_sq),
            error_along_inputs=_ratio(math.sqrt(sums.inputs_error_sq), math.sqrt(sums.inputs_d_sq)),
        )


@dataclass(frozen=True)
class Survival:
    """How much of a delta one dtype keeps. A figure is None where the delta is zero."""

    dtype: str
    """The dtype that the result is cast to."""
    gain: float | None
    """``<q, d> / <d, d>``."""
    cosine: float | None
    """``<q, d> / (|q| |d|)``."""
    relative_error: float | None
    """``|q - d| / |d|``."""
    unchanged: float | None
    """The share of entries with ``q == 0``."""
    gain_along_inputs: float | None
    """The gain of ``U^T q`` against ``U^T d``."""
    error_along_inputs: float | None
    """The relative error of ``U^T q`` against ``U^T d``."""


def finite(value: float) -> float | None:
    """The value, or None for NaN and Inf, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def _ratio(numerator: float, denominator: float) -> float | None:
    ratio = numerator / denominator if denominator > 0 else math.nan
    return finite(ratio)
