"""How far a result lies from the base to the fine-tune: Wise-FT's mixing coefficient, leaf by leaf and layer by layer.

``W = (1 - alpha) * W_base + alpha * W_tuned`` (arXiv:2109.01903, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lora_merge_cli.errors import UsageError
from lora_merge_cli.records import Depth

Side: TypeAlias = Literal["base", "tuned"]


@dataclass(frozen=True)
class Schedule:
    """An alpha per layer, in even steps from the first layer of a stack to its last one."""

    first: float
    """That of layer 0."""
    last: float
    """That of the last layer."""

    def at(self, layer: int, count: int) -> float:
        """The alpha of one of `count` layers; exact at both ends."""
        if layer == 0:
            return self.first
        if layer == count - 1:
            return self.last
        share = layer / (count - 1)
        return (1 - share) * self.first + share * self.last


@dataclass(frozen=True)
class Override:
    """An alpha for the leaves that a glob matches."""

    glob: str
    """``**`` crosses separators, ``.`` and ``/`` match alike; see `selection.matches_any`."""
    alpha: float
    """Their alpha."""


@dataclass(frozen=True)
class Mixing:
    """Which alpha goes where. An override counts first, the first that matches; then the schedule; then `alpha`."""

    alpha: float
    """0 is the base, 1 the fine-tune."""
    overrides: tuple[Override, ...] = ()
    """By glob, in order of precedence."""
    schedule: Schedule | None = None
    """By layer, for leaves that belong to one."""
    extrapolate: bool = False
    """Whether an alpha may lie outside [0, 1]."""
    only_common: Side | None = None
    """Whose leaves to take where one side has a leaf alone, or both have one of two shapes; None to refuse."""
    deltas_only: bool = False
    """Whether to scale the adapters' deltas and nothing else, for want of a base."""

    def __post_init__(self) -> None:
        """Refuse an alpha that makes no sense.

        Raises:
            UsageError: One is not finite, or lies outside [0, 1] without `extrapolate`.
        """
        stated = [("--alpha", self.alpha), *(("--alpha-for", found.alpha) for found in self.overrides)]
        if self.schedule is not None:
            stated += [("--alpha-schedule", self.schedule.first), ("--alpha-schedule", self.schedule.last)]
        for flag, alpha in stated:
            if not math.isfinite(alpha):
                raise UsageError(f"{flag} must be a finite number", found=alpha)
            if not (self.extrapolate or 0 <= alpha <= 1):
                raise UsageError(
                    f"{flag} lies outside [0, 1]",
                    expected="0, the base, to 1, the fine-tune",
                    found=f"{alpha:g}",
                    hint="pass --extrapolate if that is meant",
                )

    def of(self, override: Override | None, depth: Depth | None) -> tuple[float, ...]:
        """The alphas of a leaf: one per layer where it stacks layers and a schedule counts, else one for all of it.

        Args:
            override: The first override that matches the leaf.
            depth: Where it sits in a stack of layers, if it does.
        """
        if override is not None:
            return (override.alpha,)
        if self.schedule is None or depth is None:
            return (self.alpha,)
        if depth.layer is not None:
            return (self.schedule.at(depth.layer, depth.count),)
        return tuple(self.schedule.at(layer, depth.count) for layer in range(depth.count))
