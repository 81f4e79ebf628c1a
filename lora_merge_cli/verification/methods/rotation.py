"""Inputs rotated block by block: ``x_b R_b`` for each run b of inputs, before the kernel sees them."""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array


def rotated(x: Array, blocks: Array) -> Array:
    """The inputs after the rotation.

    Args:
        x: n by inputs.
        blocks: R, number of blocks by size by size; one alone stands for all.
    """
    size = blocks.shape[-1]
    runs = np.moveaxis(x.reshape(len(x), -1, size), 1, 0)
    return np.moveaxis(runs @ blocks, 0, 1).reshape(x.shape)


def kernel_of_rotated(kernel: Array, blocks: Array) -> Array:
    """The kernel that does by itself what `kernel` does to rotated inputs: ``(x R) W^T = x (W R^T)^T``."""
    return rotated(kernel, np.swapaxes(blocks, -1, -2))


def cayley(skew: Array) -> Array:
    """``(I - Q) (I + Q)^-1`` of each skew-symmetric Q; the two commute."""
    identity = np.eye(skew.shape[-1])
    return np.linalg.solve(identity + skew, identity - skew)
