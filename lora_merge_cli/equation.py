"""The equation of an additive adapter: which dims of the factors make which dims of the kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Equation:
    """``delta = einsum(text, lora_a, lora_b)``, with what each dim does read off from where it occurs.

    For example ``"lnhr,lmrd->lnhd"``: l is a batch dim (here the stacked layers), n and h are inputs, d is the output, r the
    rank, and m is summed: the model's up-projection sums over the heads by itself.
    """

    text: str

    @functools.cached_property
    def a(self) -> str:
        """The dims of ``lora_a``."""
        return self.text.split("->")[0].split(",")[0]

    @functools.cached_property
    def b(self) -> str:
        """The dims of ``lora_b``."""
        return self.text.split("->")[0].split(",")[1]

    @functools.cached_property
    def target(self) -> str:
        """The dims of the kernel."""
        return self.text.split("->")[1]

    @functools.cached_property
    def batch(self) -> str:
        """Dims that both factors and the kernel have, in the kernel's order."""
        return "".join(dim for dim in self.target if dim in self.a and dim in self.b)

    @property
    def stacked(self) -> bool:
        """Whether the kernel's first dim is l, the stacked layers."""
        return self.target.startswith("l")

    @property
    def of_one_layer(self) -> Equation:
        """The equation of one of the stacked layers: the same where none are stacked."""
        return Equation(self.text.replace("l", "")) if self.stacked else self

    @functools.cached_property
    def inputs(self) -> str:
        """Dims that the kernel contracts with its input: ``lora_a``'s alone."""
        return "".join(dim for dim in self.target if dim in self.a and dim not in self.b)

    @functools.cached_property
    def outputs(self) -> str:
        """Dims that the kernel produces: ``lora_b``'s alone."""
        return "".join(dim for dim in self.target if dim in self.b and dim not in self.a)

    @functools.cached_property
    def rank(self) -> str:
        """The dim that only the factors share."""
        return "".join(dim for dim in self.a if dim in self.b and dim not in self.target)

    @functools.cached_property
    def summed(self) -> str:
        """Dims of ``lora_b`` that the model sums over by themselves."""
        return "".join(dim for dim in self.b if dim not in self.a and dim not in self.target)

    def sizes(self, a: Sequence[int], b: Sequence[int], target: Sequence[int]) -> dict[str, int] | None:
        """The extent of each dim, or None if the three shapes do not fit the equation."""
        sizes: dict[str, int] = {}
        for dims, shape in ((self.target, target), (self.a, a), (self.b, b)):
            if len(dims) != len(shape):
                return None
            for dim, extent in zip(dims, shape, strict=True):
                if sizes.setdefault(dim, extent) != extent:
                    return None
        return sizes

    def __str__(self) -> str:
        return self.text
