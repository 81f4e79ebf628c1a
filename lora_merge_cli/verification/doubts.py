"""How far a right float32 computation of some values may be from what its judge computes in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_merge_cli.records import Array


@dataclass(frozen=True)
class Doubts:
    """Of a run of entries: how far each may be off, and what else some of them may be.

    A comparison that float32 values decide may fall either way where they lie within their own errors of the edge: such an entry
    has several right values that lie far from one another, and any one of them will do.
    """

    error: Array
    """Per entry, the most that it may be off, float64; 0 where it is exact."""
    places: Array
    """The entries that may be something else, ascending, as often as there are other values for each."""
    values: Array
    """These other values, float64."""
    errors: Array
    """The most that each of these may be off."""

    @classmethod
    def of(cls, error: Array) -> Doubts:
        """Those of values without alternatives."""
        nothing = np.empty(0)
        return cls(error, np.empty(0, np.int64), nothing, nothing)

    def part(self, start: int, stop: int) -> Doubts:
        """Those of the entries from `start` to before `stop`."""
        first, last = np.searchsorted(self.places, (start, stop))
        return Doubts(
            self.error[start:stop],
            self.places[first:last] - start,
            self.values[first:last],
            self.errors[first:last],
        )
