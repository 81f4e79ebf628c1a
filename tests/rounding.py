"""What `preserve` is, written down as plainly as can be: the oracle of its tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_merge_cli.dtypes import dtype_named

Array = np.ndarray[Any, np.dtype[Any]]


def walked(exact: Array, inputs: Array, mu: float, grid_dtype: str) -> Array:
    """Error feedback along the inputs of one matrix, as the definition says it, float64."""
    left, singular, _ = np.linalg.svd(inputs, full_matrices=False)
    u = left[:, singular > 1e-6 * singular.max(initial=0)]
    below, above = around(exact, grid_dtype)
    s = np.zeros((u.shape[1], exact.shape[1]))
    chosen = np.empty_like(exact)
    for i, row in enumerate(u):
        costs = []
        for side in (below, above):
            e = side[i] - exact[i]
            costs.append(np.square(s + np.outer(row, e)).sum(axis=0) + mu * u.shape[1] / len(u) * e**2)
        chosen[i] = np.where(costs[0] < costs[1], below[i], above[i])
        s += np.outer(row, chosen[i] - exact[i])
    return chosen


def around(exact: Array, grid_dtype: str) -> tuple[Array, Array]:
    """The values of a dtype next below and above, both the value itself where it is one of them."""
    dtype = dtype_named(grid_dtype)
    nearest = exact.astype(np.float32).astype(dtype)
    with np.errstate(over="ignore"):
        up = np.nextafter(nearest, np.array(np.inf, dtype)).astype(np.float64)
        down = np.nextafter(nearest, np.array(-np.inf, dtype)).astype(np.float64)
    n = nearest.astype(np.float64)
    return np.where(n > exact, down, n), np.where(n < exact, up, n)
