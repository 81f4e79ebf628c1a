"""What the user asks of a merge or an interpolation, and of their judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_merge_cli.combining import Combining
from lora_merge_cli.dialects import ScaleOptions
from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.errors import UsageError
from lora_merge_cli.mixing import Mixing
from lora_merge_cli.rounding import Rounding

DTYPE_CHOICES = ("auto", "keep", "float32", "bfloat16", "float16")
SERVING_CHOICES = DTYPE_CHOICES[2:]


@dataclass(frozen=True)
class MergeOptions:
    """What the user asks of a merge."""

    scales: ScaleOptions = field(default_factory=ScaleOptions)
    """What is known about alphas."""
    multiplier: float = 1.0
    """What every delta is multiplied by besides its scale; 1 is as trained."""
    dtype: str = "auto"
    """The dtype of the leaves that change; one of `DTYPE_CHOICES`."""
    dtype_untouched: str = "keep"
    """The dtype of the leaves that do not change; any of `DTYPE_CHOICES` but auto."""
    include: tuple[str, ...] = ()
    """Globs of sites to merge; all if empty."""
    exclude: tuple[str, ...] = ()
    """Globs of sites not to merge."""
    residual_base: bool = False
    """Whether the base is the residual that an adapter's initialisation left of the model."""
    mixing: Mixing | None = None
    """How far to go from the base to the fine-tune; None for all the way, which is a merge."""
    combining: Combining = field(default_factory=Combining)
    """How several adapters on one kernel become one change."""
    rounding: Rounding = field(default_factory=Rounding)
    """Which of a result's two neighbours is stored."""
    serving_dtype: str | None = None
    """What servers cast the result to, one of `SERVING_CHOICES`; what the model's servers are known for if None."""

    def served(self, known: np.dtype[Any]) -> np.dtype[Any]:
        """What servers cast the result to.

        Args:
            known: What they do where the user says nothing.
        """
        return known if self.serving_dtype is None else dtype_named(self.serving_dtype)


def cast_dtype(choice: str, stored: np.dtype[Any], auto: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that a choice of `DTYPE_CHOICES` stands for."""
    if choice == "auto":
        return auto
    return stored if choice == "keep" else dtype_named(choice)


def check_options(options: MergeOptions, dtypes: Sequence[str] = DTYPE_CHOICES) -> None:
    """Refuse options without a valid value; `dtypes` are the valid ones for the leaves that change.

    Raises:
        UsageError: One has none.
    """
    for flag, value, choices in (
        ("--dtype", options.dtype, dtypes),
        ("--dtype-untouched", options.dtype_untouched, DTYPE_CHOICES[1:]),
    ):
        if value not in choices:
            raise UsageError(f"{flag} has no such value", expected=", ".join(choices), found=value)
    if options.serving_dtype not in (None, *SERVING_CHOICES):
        raise UsageError(
            "--serving-dtype has no such value", expected=", ".join(SERVING_CHOICES), found=options.serving_dtype
        )
    if not math.isfinite(options.multiplier):
        raise UsageError("--scale must be a finite number", found=options.multiplier)
