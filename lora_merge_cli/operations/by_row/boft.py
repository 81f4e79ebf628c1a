"""BOFT: the inputs rotated in butterfly stages, then the outputs scaled, ``(W M^T) * s`` (arXiv:2311.06243).

M is a product of stages ``P_m D_m P_m^T``, the first of them rightmost, D_m block-diagonal. Its blocks are ``(I - S) (I + S)^-1``
of the skew-symmetric part ``S = (X - X^T) / 2`` of what is stored. P_m brings together what the stage's blocks mix; with a single
stage there is none.
Source: huggingface/peft, ``src/peft/tuners/boft/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_merge_cli.operations.by_row.arithmetic import rounded
from lora_merge_cli.operations.by_row.rotations import cayley, change_of_rotation
from lora_merge_cli.operations.interface import RowOperands
from lora_merge_cli.records import AdapterSite, Array, Setting


class Boft:
    """BOFT; it has no constant factor.

    Roles: ``r`` (stages, blocks, b, b), ``s`` with an entry per output.
    """

    name = "boft"

    def operands(self, site: AdapterSite, factors: Mapping[str, Array], shape: tuple[int, int]) -> RowOperands:
        """See `RowOperation.operands`."""
        stored = factors["r"].astype(np.float64)
        less_one = cayley(site, (stored - np.swapaxes(stored, -1, -2)) / 2)
        gain = factors["s"].astype(np.float64).reshape(shape[0]) - 1.0
        return RowOperands(
            per_row={"gain": rounded(site, gain, "BOFT's scale")},
            shared={
                "less_one": rounded(site, less_one, "BOFT's rotation"),
                "order": np.stack([_order(stage, stored.shape) for stage in range(len(stored))]).astype(np.int32),
            },
        )

    def change(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  (others need them)
        kernel: Any,
        per_row: Mapping[str, Any],
        shared: Mapping[str, Any],
        first: Any,  # noqa: ARG002
    ) -> Any:
        """See `RowOperation.change`: what the stages so far have changed is carried on its own, as it is small beside W."""
        import jax.numpy as jnp

        changed = jnp.zeros_like(kernel)
        stages = len(shared["order"])
        for stage in range(stages):
            rotated = kernel + changed
            if stages == 1:
                changed = change_of_rotation(rotated, shared["less_one"][stage])
                continue
            order = shared["order"][stage]
            back = jnp.argsort(order)
            changed = changed + change_of_rotation(rotated[:, back], shared["less_one"][stage])[:, order]
        gain = per_row["gain"][:, None]
        return changed + gain * (kernel + changed)


def _order(stage: int, shape: tuple[int, ...]) -> Array:
    """Which input each row of P_m takes.

    Within runs of ``2^m`` blocks, halves of blocks are sorted: those at even places before those at odd ones.

    Args:
        stage: m, from 0.
        shape: Stages, blocks, b, b.
    """
    stages, blocks, size, _ = shape
    inputs = np.arange(blocks * size)
    if stages == 1:
        return inputs
    halves = inputs.reshape(-1, 2 ** (stage + 1), size // 2)
    return np.concatenate([halves[:, 0::2], halves[:, 1::2]], axis=1).reshape(-1)
