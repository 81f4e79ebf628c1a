"""What an extraction found: the records of its report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_merge_cli.report import LeafRecord, Report, _Record


@dataclass(frozen=True)
class ExtractedSite(_Record):
    """One kernel whose change is in the adapter as two factors."""

    target: str
    """The kernel's path in the fine-tune."""
    label: str
    """A short name, unique in the checkpoint or nearly so."""
    group: str
    """The part of the model that shares an alpha, for example an expert."""
    equation: str
    """From the factors' dims to the kernel's."""
    rank: int | None
    """The rank of the factors; null before it is chosen."""
    scale: float
    """What the product of the factors is multiplied by."""
    scale_source: str
    """Who says so."""
    scale_assumed: bool
    """Whether a stock preset, and nobody's word, supplied it."""
    shape: tuple[int, ...]
    """The kernel's."""
    nbytes: int | None
    """The size of the factors; null before the rank is chosen."""
    energy_kept: float | None = None
    """The share of ``|delta|^2`` that the factors keep, over all layers and heads; null for factors taken as they are."""
    relative_error: float | None = None
    """``|delta - a b| / |delta|`` of the factors as they are stored, Frobenius; null for factors taken as they are."""
    norm: float | None = None
    """``|delta|``, Frobenius; null for factors taken as they are."""


@dataclass(frozen=True, kw_only=True)
class ExtractReport(Report):
    """All that an extraction, or its dry run, has to say."""

    command: Literal["extract"] = "extract"
    """Which command made the report."""
    status: Literal["planned", "extracted"]
    """``planned``: a dry run."""
    kind: Literal["exact", "truncated"]
    """``exact``: the fine-tune's own factors; ``truncated``: what two dense checkpoints differ by, of low rank."""
    model: str
    """The model, or ``unknown``."""
    dialect: str
    """The conventions of the fine-tune."""
    output: str | None
    """The directory that was created."""
    adapter_format: Literal["lora-merge", "peft"]
    """What reads the adapter; `lora-merge merge` reads both."""
    rank: int | None
    """The largest rank that was asked for; null otherwise."""
    energy: float | None
    """The share of each delta that was asked for; null otherwise."""
    sites: tuple[ExtractedSite, ...]
    """Every kernel with factors."""
    trained: tuple[LeafRecord, ...]
    """The leaves that the adapter holds whole, or would without ``--without-trained``."""
    without_trained: bool
    """Whether these were left out: the adapter is then not the fine-tune."""
    frozen: int
    """How many leaves are the base's."""
    frozen_checked: bool
    """Whether each of them was compared with the base, bit for bit."""
    factors_bytes: int
    """The size of all factors."""
    trained_bytes: int
    """The size of the leaves in `trained`."""
    tuned_bytes: int
    """The size of all arrays of the fine-tune when decoded."""
    bytes_on_disk: int | None = None
    """The size of the adapter's files."""
    device: str | None = None
    """Where the arithmetic ran; null where there was none."""
