"""What an operation must do: say what one adapter makes of one kernel, in a form that several adapters can be summed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from lora_merge_cli.records import AdapterSite, Array


@dataclass(frozen=True)
class Contribution:
    """What a site adds to a kernel W of inputs by outputs: ``gain * W + a @ b``, the gain per output.

    Contributions of several sites to one kernel are added up, each made from the same W. Dims are those of the kernel: batch,
    then inputs or outputs, in the kernel's order.
    """

    a: Array
    """lora_a, dims batch, inputs, rank; float32."""
    b: Array
    """lora_b, dims batch, rank, outputs, with every scale and weight in it, summed where the model sums it alone; float32."""
    gain: Array | None = None
    """What W itself is multiplied by, besides the 1 that stays; dims batch, outputs; float64. None for 0."""


class Operation(Protocol):
    """Arithmetic on one kind of site. Registered in `operations.OPERATIONS`."""

    @property
    def name(self) -> str:
        """The name that sites and plans use."""
        ...

    @property
    def needs_norms(self) -> bool:
        """Whether it needs the norms of ``W + delta`` per output, and so a first pass over the kernel."""
        ...

    def contribute(
        self, site: AdapterSite, factors: Mapping[str, Array], weight: float, norms: Array | None
    ) -> Contribution:
        """What the site adds.

        Args:
            site: The site.
            factors: What it takes of the adapter's leaves, by role, in the stored dtype, finite.
            weight: What the change is multiplied by, besides the site's own scale.
            norms: ``|W + delta|`` over the inputs, dims batch, outputs, float64; None where no norms are needed.

        Raises:
            NonFiniteInput: The arithmetic has no finite result.
        """
        ...
