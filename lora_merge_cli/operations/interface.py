"""What an operation must do: say what one adapter makes of one kernel.

Most adapters add a product of two thin factors, perhaps after scaling the outputs: a `Contribution`, several of which follow one
another without the kernel ever being formed between them (`LowRankOperation`). The others say what becomes of some outputs' rows
of the kernel (`RowOperation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lora_merge_cli.records import AdapterSite, Array, Setting


@dataclass(frozen=True)
class Contribution:
    """What a site makes of a kernel X of inputs by outputs: ``X + gain * X + a @ b``, the gain per output.

    X is what the sites before it made of the unmerged kernel; see `in_sequence`. Dims are those of the kernel: batch, then inputs
    or outputs, in the kernel's order.
    """

    a: Array
    """lora_a, dims batch, inputs, rank; float32."""
    b: Array
    """lora_b, dims batch, rank, outputs, with every scale and weight in it, summed where the model sums it alone; float32."""
    gain: Array | None = None
    """What X itself is multiplied by, besides the 1 that stays; dims batch, outputs; float64. None for 0."""


class LowRankOperation(Protocol):
    """Arithmetic on a kind of site that adds a low-rank product. Registered in `operations.LOW_RANK`."""

    @property
    def name(self) -> str:
        """The name that sites and plans use."""
        ...

    @property
    def needs_norms(self) -> bool:
        """Whether it needs the norms of ``W + delta`` per output, and so a first pass over the kernel."""
        ...

    def reduce(self, site: AdapterSite, factors: Mapping[str, Array]) -> Mapping[str, Array]:
        """The factors as ``lora_a`` and ``lora_b``, in the dims of the site's equation, and whatever else `contribute` takes.

        Args:
            site: The site.
            factors: What it takes of the adapter's leaves, by role, in the stored dtype, finite.
        """
        ...

    def contribute(
        self, site: AdapterSite, factors: Mapping[str, Array], weight: float, norms: Array | None
    ) -> Contribution:
        """What the site adds.

        Args:
            site: The site.
            factors: What `reduce` made of the adapter's leaves.
            weight: What the change is multiplied by, besides the site's own scale.
            norms: ``|W + delta|`` over the inputs, dims batch, outputs, float64; None where no norms are needed.

        Raises:
            NonFiniteInput: The arithmetic has no finite result.
        """
        ...


@dataclass(frozen=True)
class RowOperands:
    """What a `RowOperation` computes from besides the kernel."""

    per_row: Mapping[str, Array] = field(default_factory=dict)
    """What has an entry, or a row, for each output; float32 or int32."""
    shared: Mapping[str, Array] = field(default_factory=dict)
    """What all outputs have in common; float32 or int32."""


class RowOperation(Protocol):
    """Arithmetic on a kind of site whose change of an output's row depends on that row of the kernel alone, and on the adapter.

    The kernel is outputs by inputs; a convolution's inputs are flattened together with its kernel axes, a bias has one input.
    Registered in `operations.BY_ROW`.
    """

    @property
    def name(self) -> str:
        """The name that sites and plans use."""
        ...

    def operands(self, site: AdapterSite, factors: Mapping[str, Array], shape: tuple[int, int]) -> RowOperands:
        """What `change` takes, prepared on the host in float64 and rounded once.

        Args:
            site: The site.
            factors: What it takes of the adapter's leaves, by role, in the stored dtype, finite.
            shape: Outputs and inputs.

        Raises:
            NonFiniteInput: The arithmetic has no finite result.
        """
        ...

    def change(
        self,
        settings: Mapping[str, Setting],
        kernel: Any,
        per_row: Mapping[str, Any],
        shared: Mapping[str, Any],
        first: Any,
    ) -> Any:
        """What is added to some rows at weight 1: JAX, traced, float32, products at `Precision.HIGHEST`.

        Args:
            settings: The site's; Python values.
            kernel: The rows of the unmerged kernel, rows by inputs, float32.
            per_row: `RowOperands.per_row`, of these rows.
            shared: `RowOperands.shared`.
            first: The number of the first of the rows; traced.

        Returns:
            Rows by inputs, float32.
        """
        ...


INTEGERS = frozenset({"indices"})
"""The roles of factors that are positions, not values."""
