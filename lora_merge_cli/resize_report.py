"""What a resizing found: the record that its reports are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_merge_cli.report import Report, _Record


@dataclass(frozen=True)
class ResizedRecord(_Record):
    """One adapted module, before and after."""

    module: str
    """Its path in the live model; of a tree the path of its kernel."""
    shape: tuple[int, int]
    """Outputs and inputs of its delta, or of each of its `matrices`; a convolution's inputs times the entries of its kernel."""
    scale: float
    """What the product of its factors was multiplied by; it is in the new factors, unless the rank stays."""
    rank_before: int
    """The rank that it had."""
    rank_after: int
    """The rank that it has: the same where its factors stay as they were."""
    dtype_before: str
    """The dtype that its factors had."""
    dtype_after: str
    """The dtype that they have."""
    norm: float
    """``|delta|_F``, the scale in it."""
    energy_kept: float
    """The share of ``|delta|_F^2`` that the singular values kept have; 1 where the delta is zero."""
    relative_error: float | None
    """``|delta - new delta|_F / |delta|_F`` of the factors as they are stored; null where the delta is zero."""
    matrices: int = 1
    """How many deltas of that shape it has, at one rank: stacked layers, heads, gate and projection. The figures are of all."""


@dataclass(frozen=True, kw_only=True)
class ResizeReport(Report):
    """All that a resizing has to say."""

    command: Literal["resize"] = "resize"
    """Which command made the report."""
    status: Literal["resized", "planned"]
    """``planned``: a dry run."""
    output: str | None
    """The new adapter's directory."""
    method: str
    """What the adapter is, for example ``LoRA`` or ``DoRA``."""
    base: str | None
    """The base that it names."""
    rank: int | None
    """The rank asked for; null if a share of the energy was."""
    energy: float | None
    """The share of each ``|delta|_F^2`` that was to be kept; null if a rank was asked for."""
    modules: tuple[ResizedRecord, ...]
    """Every adapted module."""
    energy_kept: float
    """The share of the sum of all ``|delta|_F^2``."""
    relative_error: float | None
    """The root of the sum of all squared errors, relative to that of all deltas; null where all are zero."""
    factor_bytes_before: int
    """The size of all factors before."""
    factor_bytes_after: int
    """The size of all factors after."""
    bytes_before: int
    """The size of all tensors before, what is copied included."""
    bytes_after: int
    """The size of all tensors after."""
