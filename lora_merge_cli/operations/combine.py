"""Several adapters on one kernel as one change, as PEFT combines them.

Source: huggingface/peft, ``src/peft/tuners/lora/model.py`` (``add_weighted_adapter``) and ``src/peft/utils/merge_utils.py``;
TIES is arXiv:2306.01708, DARE arXiv:2311.03099. With ``A_i`` (rank, inputs) and ``B_i`` (outputs, rank) the factors of adapter i
as its file holds them, ``s_i`` its scale, ``w_i`` its weight and ``c_i = w_i * s_i``:

- ``sum``, ``cat``: ``sum c_i B_i A_i``, exactly;
- ``svd``: the closest matrix of some rank to that, found from the factors alone;
- ``linear``, ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``: an operator on the factors,
  ``A = op(A_i, sign(c_i) sqrt|c_i|)`` and ``B = op(B_i, sqrt|c_i|)``, so that ``B A`` has cross terms ``B_i A_j``;
- the same with ``_svd``: the operator on the deltas, ``D = op(s_i B_i A_i, w_i)``, then the closest matrix of some rank to it.

The operators, on tensors ``x_i`` with weights ``v_i``:

- pruning keeps ``int(density * size)`` entries of each ``x_i``, those of largest magnitude; of equal ones those that come first in
  row-major order of PEFT's orientation: batch, then rank by inputs for A, outputs by rank for B, outputs by inputs for a delta;
- ``dare`` keeps an entry with probability ``density`` instead, and divides it by that; `draws` says which;
- then the result is ``sum v_i x_i``; with ``ties`` the sum over the adapters whose ``x_i`` has the elected sign alone, divided by
  how many they are. Elected is the sign of ``sum x_i`` (``total``) or of ``sum sign(x_i)`` (``frequency``), plus where that is
  zero. Weights have no vote.

Unlike PEFT's result, which keeps ``use_rslora`` of the first adapter, the combined change has a scale of 1. There is no clamp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.combining import Combining
from lora_merge_cli.draws import keep_mask, tensor_name
from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.operations.interface import Contribution
from lora_merge_cli.records import Array


@dataclass(frozen=True)
class Part:
    """One adapter's factors on a kernel, as `add_delta.arranged_factors` gives them; its delta is ``weight * scale * a @ b``."""

    a: Array
    """lora_a, dims batch, inputs (one or several), rank; float64, finite."""
    b: Array
    """lora_b, dims batch, rank, outputs; float64, finite; without a scale in it."""
    weight: float
    """``w_i``: the adapter's weight times whatever all deltas are multiplied by."""
    scale: float
    """``s_i``: the site's own. Apart from the weight, since signs are elected of deltas that have it and not the weight."""

    @property
    def multiplier(self) -> float:
        """``c_i``."""
        return self.weight * self.scale


def combine(parts: Sequence[Part], combining: Combining, name: str) -> Contribution:
    """What several adapters make of one kernel, or of one of its stacked layers.

    Call it for every kernel of a merge under a method other than ``sum``, also where a kernel has one of the adapters alone:
    pruning prunes that too. `combining.refuse_uncombinable` is to be called before, once for the whole merge.

    Args:
        parts: At least one, in the adapters' order; those that are not on this kernel are left out.
        combining: What `Combining.of` makes of the user's choice.
        name: The target's name, with its layer where layers are stacked: what random draws depend on, and errors name.

    Returns:
        A plain product in float32, rounded once from float64. Its rank is that of the adapters, their sum for ``cat``, or what an
        SVD is truncated to: at most inputs or outputs. The pruned ``_svd`` methods hold the kernel's whole deltas in float64.

    Raises:
        NonFiniteInput: A product of factors, weights and scales is beyond float32.
    """
    batch = parts[0].b.ndim - 2
    inputs = parts[0].a.shape[batch:-1]
    matrices = [_Matrices(part, batch) for part in parts]
    rank = combining.svd_rank or max(part.b.shape[-2] for part in parts)
    with np.errstate(over="ignore", invalid="ignore"):
        if not combining.crosses and not combining.prunes:
            a, b = _side_by_side(matrices)
            if combining.is_svd:
                _refuse_beyond(np.isfinite(a).all() and np.isfinite(b).all(), combining, name)
                a, b = _truncated(a, b, rank)
        elif combining.is_svd:
            delta = _joined_delta(matrices, combining, name)
            _refuse_beyond(np.isfinite(delta).all(), combining, name)
            a, b = _truncated_delta(delta, rank)
        elif len(parts) == 1 and not combining.prunes:
            a, b = _side_by_side(matrices)
        else:
            a, b = _joined_factors(matrices, combining, name)
        result = Contribution(a.astype(FLOAT32).reshape(*a.shape[:-2], *inputs, a.shape[-1]), b.astype(FLOAT32))
    _refuse_beyond(np.isfinite(result.a).all() and np.isfinite(result.b).all(), combining, name)
    return result


def departure(parts: Sequence[Part], contribution: Contribution) -> float:
    """How far a combination is from the sum of the deltas, ``|D - sum c_i D_i| / |sum c_i D_i|`` in Frobenius' norm.

    From the factors alone: with ``L R`` the difference as one product of all factors, and QR factors of ``L`` and of ``R^T``, its
    norm is that of the small ``R_L R_R^T``. As from Gram matrices, without the digits that squaring loses.

    Args:
        parts: What was combined.
        contribution: What `combine` made of it, without a gain.

    Returns:
        About 1e-7 at least, for what is rounded to float32; 0 where both are zero, infinity where the sum alone is.
    """
    batch = parts[0].b.ndim - 2
    a, b = _side_by_side([_Matrices(part, batch) for part in parts])
    whole = _norm(a, b)
    combined = contribution.a.astype(np.float64).reshape(*a.shape[:-1], -1)
    off = _norm(
        np.concatenate([combined, a], axis=-1),
        np.concatenate([contribution.b.astype(np.float64), -b], axis=-2),
    )
    if whole == 0:
        return math.inf if off else 0.0
    return off / whole


def _refuse_beyond(finite: Any, combining: Combining, name: str) -> None:
    if not finite:
        raise NonFiniteInput(f"what --combine {combining.method} makes of the adapters is beyond float32", where=name)


class _Matrices:
    """A part with its inputs flattened, in the row-major order that PEFT's A has them in."""

    def __init__(self, part: Part, batch: int) -> None:
        self.a = part.a.reshape(*part.a.shape[:batch], -1, part.a.shape[-1])
        self.b = part.b
        self.part = part


def _side_by_side(parts: Sequence[_Matrices]) -> tuple[Array, Array]:
    """Factors whose product is the sum of the deltas."""
    return (
        np.concatenate([each.a for each in parts], axis=-1),
        np.concatenate([each.b * each.part.multiplier for each in parts], axis=-2),
    )


def _joined_factors(parts: Sequence[_Matrices], combining: Combining, name: str) -> tuple[Array, Array]:
    roots = [math.sqrt(abs(each.part.multiplier)) for each in parts]
    # The sign goes on one side alone: on both it would be lost in the product.
    signed = [math.copysign(root, each.part.multiplier) for root, each in zip(roots, parts, strict=True)]
    joined = []
    for first, tensors, weights in (
        (0, [each.a for each in parts], signed),
        (len(parts), [each.b for each in parts], roots),
    ):
        pruned = [
            _pruned(_transposed(tensor), combining, tensor_name(name, number))
            for number, tensor in enumerate(tensors, first)
        ]
        joined.append(_transposed(_operated(np.stack(pruned), np.asarray(weights), combining)))
    return joined[0], joined[1]


def _joined_delta(parts: Sequence[_Matrices], combining: Combining, name: str) -> Array:
    """The combined delta, dims batch, outputs, inputs."""
    # Which entries are the largest, and which sign wins, must not hang on the rounding of products: float64 settles both.
    pruned = [
        _pruned(_transposed(each.b) @ _transposed(each.a) * each.part.scale, combining, tensor_name(name, number))
        for number, each in enumerate(parts)
    ]
    return _operated(np.stack(pruned), np.asarray([each.part.weight for each in parts]), combining)


def _pruned(tensor: Array, combining: Combining, name: str) -> Array:
    """A tensor in PEFT's orientation, without the entries that the method drops."""
    density = combining.density
    if density is None or density >= 1:
        return tensor
    if combining.draws:
        return np.where(keep_mask(combining.seed, name, tensor.shape, density), tensor / density, 0)
    return np.where(_largest(tensor, int(density * tensor.size)), tensor, 0)


def _largest(tensor: Array, count: int) -> Array:
    """Which entries are the largest so many in magnitude; of equal ones the first."""
    magnitudes = np.abs(tensor).reshape(-1)
    if count == 0:
        return np.zeros(tensor.shape, np.bool_)
    least = np.partition(magnitudes, magnitudes.size - count)[magnitudes.size - count]
    kept = magnitudes > least
    kept[np.flatnonzero(magnitudes == least)[: count - int(kept.sum())]] = True
    return np.asarray(kept.reshape(tensor.shape))


def _operated(tensors: Array, weights: Array, combining: Combining) -> Array:
    """The weighted sum of pruned tensors, or of those of the elected sign divided by how many they are; axis 0 is the adapters."""
    weighted = tensors * weights.reshape(-1, *[1] * (tensors.ndim - 1))
    if not combining.elects:
        return np.asarray(weighted.sum(axis=0))
    signs = np.sign(tensors)
    votes = (tensors if combining.majority_sign == "total" else signs).sum(axis=0)
    agree = signs == np.where(votes >= 0, 1, -1)
    return np.asarray(np.where(agree, weighted, 0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1))


def _truncated(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The closest product of some rank to ``a @ b`` (Eckart and Young), from QR factors of both."""
    q_a, r_a = np.linalg.qr(a)
    q_b, r_b = np.linalg.qr(_transposed(b))
    u, s, vh = _svd(r_a @ _transposed(r_b))
    return _leading(q_a @ u, s, vh @ _transposed(q_b), rank, max(a.shape[-2], b.shape[-1]))


def _truncated_delta(delta: Array, rank: int) -> tuple[Array, Array]:
    """The closest product of some rank to a delta, dims batch, outputs, inputs: ``B = U S`` and ``A = Vh``."""
    u, s, vh = _svd(delta)
    return _leading(_transposed(vh), s, _transposed(u), rank, max(delta.shape[-2:]))


def _leading(left: Array, s: Array, right: Array, rank: int, extent: int) -> tuple[Array, Array]:
    """The first so many singular triples, as factors; what rounding alone made of a lower rank is zero on both sides."""
    s = s[..., :rank]
    real = s > s[..., :1] * (extent * np.finfo(s.dtype).eps)
    return left[..., :rank] * real[..., None, :], right[..., :rank, :] * (s * real)[..., :, None]


def _svd(matrix: Array) -> tuple[Array, Array, Array]:
    found = np.linalg.svd(matrix, full_matrices=False)
    return found[0], found[1], found[2]


def _norm(left: Array, right: Array) -> float:
    small = np.linalg.qr(left, mode="r") @ _transposed(np.linalg.qr(_transposed(right), mode="r"))
    return float(np.linalg.norm(small))


def _transposed(matrices: Any) -> Any:
    return matrices.swapaxes(-1, -2)
