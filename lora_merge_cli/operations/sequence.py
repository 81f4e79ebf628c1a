"""Several contributions to one kernel, one after the other, as one.

Additive adapters commute. DoRA rescales whatever the adapters before it made of the kernel: with norms from the unmerged kernel W,
two of them give ``g_2 * (g_1 * (W + D_1) + D_2)``, as PEFT merges them (huggingface/peft, ``src/peft/tuners/lora/dora.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.operations.interface import Contribution
from lora_merge_cli.records import Array


def in_sequence(parts: Sequence[Contribution]) -> Contribution:
    """One contribution that does what all do in their order: ``X_k = (1 + gain_k) * X_(k-1) + a_k @ b_k``.

    Args:
        parts: At least one; all of one kernel.
    """
    batch = parts[0].b.ndim - 2
    if len(parts) == 1:
        return parts[0]
    gain: Array | None = None
    seen: list[Array] = []
    for part in parts:
        if part.gain is not None:
            factor = 1.0 + part.gain
            seen = [(b * np.expand_dims(factor, batch)).astype(FLOAT32) for b in seen]
            gain = part.gain if gain is None else (1.0 + gain) * factor - 1.0
        seen.append(part.b)
    return Contribution(np.concatenate([part.a for part in parts], axis=-1), np.concatenate(seen, axis=batch), gain)


def partial(contribution: Contribution, alpha: float) -> Contribution:
    """A part of the way from the kernel to what a contribution makes of it."""
    if alpha == 1:
        return contribution
    gain = None if contribution.gain is None else alpha * contribution.gain
    return Contribution(contribution.a, (alpha * contribution.b.astype(np.float64)).astype(FLOAT32), gain)
