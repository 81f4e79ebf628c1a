"""Several low-rank adapters made one as PEFT's ``add_weighted_adapter`` does it. NumPy, float64.

Every method but ``cat`` and ``svd`` joins tensors x_i with weights w_i:

- ``linear``: ``sum w_i x_i`` (task arithmetic, arXiv:2212.04089);
- ``magnitude_prune``: the same of the largest entries of each x_i;
- ``ties`` (arXiv:2306.01708): of those, the mean of ``w_i x_i`` over the adapters whose sign is the majority's;
- ``dare_linear``, ``dare_ties`` (arXiv:2311.03099): as linear and ties, of entries kept at random and divided by the density.

Without ``_svd`` the tensors are the factors A and B, each by itself, weighed by the root of what their product is multiplied by:
the product of the two results has cross terms, and is not the sum of the changes. With ``_svd`` they are the changes themselves,
and the result is cut to a rank. ``cat`` and ``svd`` take the sum of the changes, whole or cut. Source: huggingface/peft,
``src/peft/tuners/lora/model.py`` and ``src/peft/utils/merge_utils.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lora_merge_cli.records import Array

Part: TypeAlias = tuple[Array, Array, float]
"""One adapter: a (inputs, rank), b (rank, outputs), and what their product is multiplied by, its own scale times its weight."""

Masks: TypeAlias = Callable[[tuple[int, int], int], Array]
"""Which entries of a tensor are kept, from its shape and its number."""

_SVD = "_svd"


def combined(
    parts: Sequence[Part],
    method: str,
    *,
    density: float | None,
    sign: str,
    svd_rank: int | None,
    masks: Masks | None,
    scales: Sequence[float] | None = None,
) -> tuple[Array, Array]:
    """One adapter made of several on one kernel.

    A pruned tensor keeps ``int(density * size)`` entries of largest magnitude. Of equal ones the earlier in row-major order wins, A
    being rank by inputs, B outputs by rank and a change outputs by inputs, as PEFT stores them.

    Args:
        parts: The adapters on the kernel, in their order; of one rank where their factors are joined.
        method: PEFT's name of it. For a single adapter PEFT takes ``linear`` whatever it is told: that is the caller's to say.
        density: Which part of each tensor is kept, where the method prunes; 1 keeps all and asks for no mask.
        sign: ``total``, the sign of the sum, or ``frequency``, that of most adapters; 0 counts as positive.
        svd_rank: What a result is cut to; the largest rank if None. No more ranks are returned than the change can have.
        masks: For ``dare``: which entries to keep, in the orientation above. Of n adapters, tensor k is A of the k-th and n + k its
            B; or k its change. Other methods ask for none.
        scales: Each adapter's own scale, without its weight: the majority's sign is that of changes with their scales, and without
            weights. None where all have the same, or none is elected from changes.

    Returns:
        a (inputs, rank) and b (rank, outputs): the change is ``a @ b``.
    """
    if method == "cat":
        return np.hstack([c * a for a, _, c in parts]), np.vstack([b for _, b, _ in parts])
    rank = svd_rank or max(len(b) for _, b, _ in parts)
    if method == "svd":
        return _cut_product(np.hstack([c * a for a, _, c in parts]), np.vstack([b for _, b, _ in parts]), rank)
    join = _Join(method.removesuffix(_SVD), density, sign, masks)
    if method.endswith(_SVD):
        return _cut(join.of(*_changes(parts, scales), 0), rank)
    roots = [math.sqrt(abs(c)) for _, _, c in parts]
    signed = [math.copysign(root, c) for root, (_, _, c) in zip(roots, parts, strict=True)]
    joined_a = join.of([a.T for a, _, _ in parts], signed, 0)
    joined_b = join.of([b.T for _, b, _ in parts], roots, len(parts))
    return joined_a.T, joined_b.T


@dataclass(frozen=True)
class _Join:
    """How tensors of one shape are joined; see `combined`."""

    method: str
    density: float | None
    sign: str
    masks: Masks | None

    def of(self, tensors: Sequence[Array], weights: Sequence[float], first: int) -> Array:
        """The tensors, the first of which has the number `first`, joined."""
        kept = [self._kept(tensor, first + number) for number, tensor in enumerate(tensors)]
        total = np.zeros_like(kept[0])
        if not self.method.endswith("ties"):
            for tensor, weight in zip(kept, weights, strict=True):
                total += weight * tensor
            return total
        votes = sum(np.sign(tensor) if self.sign == "frequency" else tensor for tensor in kept)
        majority = np.where(votes >= 0, 1.0, -1.0)
        count = np.zeros_like(total)
        for tensor, weight in zip(kept, weights, strict=True):
            agrees = np.sign(tensor) == majority
            total += np.where(agrees, weight * tensor, 0.0)
            count += agrees
        return np.asarray(total / np.maximum(count, 1.0))

    def _kept(self, tensor: Array, number: int) -> Array:
        if self.method == "linear":
            return tensor
        assert self.density is not None, "what prunes has a density"
        if self.density >= 1:
            return tensor
        if self.method.startswith("dare"):
            assert self.masks is not None, "what draws has masks"
            rows, columns = tensor.shape
            return np.where(self.masks((rows, columns), number), tensor / self.density, 0.0)
        return np.where(_largest(tensor, int(self.density * tensor.size)), tensor, 0.0)


def _largest(tensor: Array, count: int) -> Array:
    """Where the entries of largest magnitude are."""
    sizes = np.abs(tensor).reshape(-1)
    if not count:
        return np.zeros(tensor.shape, np.bool_)
    smallest = np.partition(sizes, sizes.size - count)[sizes.size - count]
    kept = sizes > smallest
    kept[np.flatnonzero(sizes == smallest)[: count - int(np.count_nonzero(kept))]] = True
    return np.reshape(kept, tensor.shape)


def _changes(parts: Sequence[Part], scales: Sequence[float] | None) -> tuple[list[Array], list[float]]:
    """Each adapter's own change, outputs by inputs, and its weight."""
    own = [1.0] * len(parts) if scales is None else scales
    changes = [scale * (a @ b).T for (a, b, _), scale in zip(parts, own, strict=True)]
    return changes, [c / scale if scale else 0.0 for (_, _, c), scale in zip(parts, own, strict=True)]


def _cut(change: Array, rank: int) -> tuple[Array, Array]:
    """The best approximation of a change, outputs by inputs, of at most so many ranks: the singular values go to b."""
    left, values, right = np.linalg.svd(change, full_matrices=False)
    return right[:rank].T, (left * values)[:, :rank].T


def _cut_product(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """`_cut` of ``(a @ b).T``, from the factors' bases alone."""
    (a_basis, a_rest), (b_basis, b_rest) = np.linalg.qr(a), np.linalg.qr(b.T)
    inner_a, inner_b = _cut(b_rest @ a_rest.T, rank)
    return a_basis @ inner_a, inner_b @ b_basis.T
