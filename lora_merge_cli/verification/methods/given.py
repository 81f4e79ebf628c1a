"""What an adapter's formula takes, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from lora_merge_cli.records import AdapterSite, Array, Setting

Factors: TypeAlias = dict[str, Array]
"""An adapter's factors by role."""


@dataclass(frozen=True)
class Given:
    """One adapter on one kernel."""

    factors: Mapping[str, Array]
    """By role, float64."""
    scale: float
    """The site's: every constant factor of the change."""
    settings: Mapping[str, Setting]
    """The site's, by PEFT's names."""

    @staticmethod
    def of(site: AdapterSite, factors: Mapping[str, Array]) -> Given:
        """The site with the values that it takes of the adapter's leaves, of any dtype."""
        wide = {role: values.astype(np.float64) for role, values in factors.items()}
        return Given(wide, float(site.parameters.scale.value or 0.0), site.settings)


class LowRankMethod(Protocol):
    """A method that adds a product of two thin matrices."""

    def reduced(self, given: Given) -> Factors:
        """``lora_a`` (rank, inputs) and ``lora_b`` (outputs, rank): the change is ``scale * lora_b @ lora_a``."""
        ...

    def branch(self, given: Given, x: Array) -> Array:
        """What the model adds to the base's output, step by step as PEFT computes it, but for the scale.

        Args:
            given: The adapter.
            x: n by inputs.

        Returns:
            n by outputs.
        """
        ...


class RowMethod(Protocol):
    """A method whose change depends on the kernel, or has no thin factors."""

    def changed(self, given: Given, kernel: Array) -> Array:
        """The kernel with the adapter: outputs by inputs, as `kernel` is."""
        ...

    def forward(self, given: Given, kernel: Array, x: Array) -> Array:
        """What the model computes, step by step as PEFT does.

        Args:
            given: The adapter.
            kernel: Outputs by inputs, unmerged.
            x: n by inputs.

        Returns:
            n by outputs.
        """
        ...
