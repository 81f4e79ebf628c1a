"""What an operation must do: change the values of a leaf, tile by tile, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lora_merge_cli.records import AdapterSite, Array, Region
from lora_merge_cli.survival import Moments


class Update(Protocol):
    """One site being changed. Holds the carry between tiles.

    Law: the values of a tile depend on the leaf's shape, the site and the tile alone, not on the order or the grouping in which
    tiles are asked for.
    """

    def step(self, region: Region, kernel: Array, base: Array | None) -> Pending:
        """Start computing one tile.

        Args:
            region: Where the tile lies in the leaf.
            kernel: The checkpoint's values there, in the stored dtype.
            base: The values to add the delta to instead, float32; None to use the kernel's.
        """
        ...

    def finish(self) -> tuple[Moments, ...]:
        """The sums per layer; one entry for a leaf that stacks no layers.

        Raises:
            RuntimeError: Some tile was never asked for.
        """
        ...


class Pending(Protocol):
    """A tile on its way."""

    def result(self) -> Array:
        """Wait for the tile.

        Raises:
            NonFiniteInput: The kernel has a NaN or Inf there.
            Unrepresentable: A finite result is not finite in the stored dtype.
        """
        ...


class Operation(Protocol):
    """Arithmetic on one kind of site. Registered in `operations.OPERATIONS`."""

    @property
    def name(self) -> str:
        """The name that sites and plans use."""
        ...

    def tile(self, site: AdapterSite, shape: Sequence[int]) -> tuple[int, ...]:
        """The extents that the leaf is computed in: a function of the shape and the site alone."""
        ...

    def init(
        self,
        site: AdapterSite,
        where: str,
        shape: Sequence[int],
        factors: Mapping[str, Array],
        dtype: np.dtype[Any],
        serving_dtype: np.dtype[Any],
        multiplier: float,
        device: Any,
    ) -> Update:
        """Begin with a site.

        Args:
            site: The site.
            where: The kernel as errors name it.
            shape: The kernel's shape.
            factors: The adapter's leaves by role, in the stored dtype, finite.
            dtype: What the result is stored in.
            serving_dtype: What a server will cast it to.
            multiplier: What the whole delta is multiplied by, besides the site's own scale.
            device: The JAX device to compute on.
        """
        ...
