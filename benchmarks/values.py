"""Random values of realistic spread, fast: parts of one pool of normal numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_POOL = 2**24


class Normals:
    """Normally distributed values. Each call draws where in the pool its values begin, so that no two leaves are alike."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._pool = self._rng.standard_normal(_POOL, dtype=np.float32)

    def values(self, shape: tuple[int, ...], dtype: np.dtype[Any], std: float) -> NDArray[Any]:
        """An array of them with this standard deviation."""
        flat = np.empty(int(np.prod(shape)), dtype)
        for start in range(0, flat.size, _POOL // 2):
            part = flat[start : start + _POOL // 2]
            offset = int(self._rng.integers(_POOL - part.size + 1))
            part[:] = self._pool[offset : offset + part.size] * np.float32(std)
        return flat.reshape(shape)
