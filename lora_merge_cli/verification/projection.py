"""Sums along the adapter's inputs: of ``U^T q`` against ``U^T d``, gathered piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lora_merge_cli.records import Array, Region
from lora_merge_cli.survival import Realised


@dataclass(frozen=True)
class ProjectedPart:
    """What one piece of a kernel contributes."""

    outputs: Region
    """Which outputs it has."""
    inputs: int
    """How many inputs it has."""
    ideal: Array
    """``U^T d`` over its inputs, rank by outputs."""
    realised: Mapping[str, Array]
    """``U^T q`` over its inputs, by dtype."""


class Projection:
    """The kernel of one index of the batch dims.

    Args:
        rank: The adapter's.
        inputs: How many inputs the kernel has.
        outputs: The extents of its output dims.
    """

    def __init__(self, rank: int, inputs: int, outputs: tuple[int, ...]) -> None:
        self._ideal = np.zeros((rank, *outputs))
        self._realised: dict[str, Array] = {}
        self._missing = inputs * math.prod(outputs)

    def add(self, part: ProjectedPart) -> bool:
        """Add a piece, and say whether it was the last one."""
        where = (slice(None), *part.outputs)
        shape = self._ideal[where].shape
        self._ideal[where] += part.ideal.reshape(shape)
        for name, values in part.realised.items():
            if name not in self._realised:
                self._realised[name] = np.zeros_like(self._ideal)
            self._realised[name][where] += values.reshape(shape)
        self._missing -= part.inputs * math.prod(shape[1:])
        return self._missing == 0

    def sums(self) -> Iterator[tuple[str, Realised]]:
        """The figures by dtype."""
        for name, values in self._realised.items():
            error = values - self._ideal
            yield (
                name,
                Realised(
                    inputs_q_dot_d=float(np.sum(values * self._ideal)),
                    inputs_d_sq=float(np.sum(np.square(self._ideal))),
                    inputs_error_sq=float(np.sum(np.square(error))),
                ),
            )
