"""Random bits that are a function of a seed, a tensor's name and a position: what dropping and rounding at random draw from.

Any run of entries can be drawn by itself, in any order and on any machine, and every NumPy gives the same bits: only raw outputs of
a counter-based generator are used, and compared as integers.

Definition, so that others can reproduce it. Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
turns a key of two and a counter of four 64-bit words into four. The key is the first 16 bytes of the SHA-256 of the seed in
decimal, a zero byte, and the name in UTF-8; its words are little-endian. Entry ``i``, counted in row-major order, has word
``i mod 4`` of the block at counter ``i // 4 + 1``, and is kept where that is below ``floor(density * 2**64)``. The density is no
part of the key: what a lower density keeps, a higher one keeps too.

To be rounded, an entry takes 16 bits. The name in the key is then the leaf's, followed by a zero byte and ``rounding``; entry ``i``
has the bits from ``16 * (i mod 4)`` on, least significant first, of word ``i // 4 mod 4`` of the block at counter ``i // 16 + 1``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_WORDS = 4
_LANES = 4
_RUN = 2**20


def tensor_name(target: str, number: int) -> str:
    """The name of one of the tensors that a target's change is made of.

    Args:
        target: The name of the target.
        number: Which of them, from 0. Where the factors of n adapters are combined, that of adapter k is lora_a, and k + n its
            lora_b; where their deltas are, it is adapter k's. Only the adapters on the target count.
    """
    return f"{target}#{number}"


def keep_mask(seed: int, name: str, shape: Sequence[int], density: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which entries of a tensor are kept, each with probability `density`, independently of the others.

    Args:
        seed: Any integer.
        name: The tensor's name, see `tensor_name`.
        shape: Its extents; entries count in row-major order.
        density: The probability, from 0 to 1; 1 keeps all.
    """
    size = math.prod(shape)
    kept = np.empty(size, np.bool_)
    # A word is eight times as large as what becomes of it.
    for start in range(0, size, _RUN):
        stop = min(start + _RUN, size)
        kept[start:stop] = keep_run(seed, name, start, stop, density)
    return kept.reshape(tuple(shape))


def keep_run(seed: int, name: str, start: int, stop: int, density: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The entries ``start`` to ``stop`` of `keep_mask`, in row-major order, whatever the shape.

    Args:
        seed: Any integer.
        name: The tensor's name.
        start: The first entry, from 0.
        stop: The entry behind the last one.
        density: The probability, from 0 to 1.

    Raises:
        ValueError: The density is no probability.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"a density of {density} is no probability")
    threshold = math.floor(density * 2.0**64)
    if threshold >= 2**64:
        return np.ones(stop - start, np.bool_)
    first = start // _WORDS
    # NumPy counts up before it draws: a generator that was set to a counter gives the block of the next one.
    words = np.random.Philox(key=_key(seed, name), counter=first).random_raw(stop - first * _WORDS)
    return np.asarray(words[start - first * _WORDS :] < np.uint64(threshold))


def rounding_bits(seed: int, name: str, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """16 independent random bits for each of some entries of a leaf, in row-major order, whatever its shape.

    Args:
        seed: Any integer.
        name: The leaf's name in the output.
        start: The first entry, from 0.
        stop: The entry behind the last one.
    """
    first, last = start // _LANES, -(-stop // _LANES)
    block = first // _WORDS
    generator = np.random.Philox(key=_key(seed, f"{name}\0rounding"), counter=block)
    words = generator.random_raw(last - block * _WORDS).astype("<u8", copy=False)
    return np.asarray(words.view("<u2")[start - block * _WORDS * _LANES : stop - block * _WORDS * _LANES])


def _key(seed: int, name: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return np.frombuffer(digest[:16], "<u8").astype(np.uint64)
