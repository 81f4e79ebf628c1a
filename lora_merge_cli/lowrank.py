"""Linear algebra of a pair of factors, in float64 on the host. The delta is never formed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from lora_merge_cli.equation import Equation
from lora_merge_cli.records import Array, TensorSpec


def with_ones(factors: dict[str, Array]) -> dict[str, Array]:
    """The factors with a lora_a of one, where there is none: a bias has no inputs."""
    return factors if "lora_a" in factors else {"lora_a": np.ones(1, np.float32), **factors}


def factor_matrices(equation: Equation, a: Array, b: Array) -> tuple[Array, Array]:
    """The factors as stacks of matrices, lora_b summed over the dims that the model sums by themselves.

    Args:
        equation: Which dims are batch, inputs, rank and outputs.
        a: lora_a.
        b: lora_b.

    Returns:
        float64: lora_a, dims batch (flattened), inputs (flattened), rank; and lora_b, dims batch, rank, outputs (flattened).
    """
    summed = tuple(equation.b.index(dim) for dim in equation.summed)
    kept = "".join(dim for dim in equation.b if dim not in equation.summed)
    b = b.astype(np.float64).sum(axis=summed)
    left = _stack_of_matrices(a.astype(np.float64), equation.a, equation.batch, equation.inputs + equation.rank)
    right = _stack_of_matrices(b, kept, equation.batch, equation.rank + equation.outputs)
    return (
        left.reshape(len(left), -1, left.shape[-1]),
        right.reshape(len(right), right.shape[1], -1),
    )


def column_basis(a: Array, batch_dims: int) -> tuple[Array, Array]:
    """An orthonormal basis Q of all of lora_a's columns, however small, and R with ``A = Q R``; per index of the batch dims.

    Every delta ``A B`` lies in Q's span up to rounding, column by column (Householder QR; Higham, Accuracy and Stability of
    Numerical Algorithms, section 19.3), so that ``<q, d> = <Q^T q, R B>``.

    Args:
        a: lora_a, dims batch, inputs, rank.
        batch_dims: How many of its axes are batch dims.

    Returns:
        Q, float32, dims batch, inputs (flattened), rank; and R, float64, dims batch, rank, rank. Where there are fewer inputs than
        ranks the rest is zero.
    """
    matrices = a.reshape(*a.shape[:batch_dims], -1, a.shape[-1]).astype(np.float64)
    q, r = np.linalg.qr(matrices)
    basis = np.zeros(matrices.shape, np.float32)
    basis[..., : q.shape[-1]] = q
    square = np.zeros((*matrices.shape[:-2], matrices.shape[-1], matrices.shape[-1]))
    square[..., : r.shape[-2], :] = r
    return basis, square


def basis_within(r: Array, inputs: int) -> Array:
    """The basis of `input_basis` in terms of that of `column_basis`: ``P`` with ``U^T = P Q^T``, for one R; float64.

    Args:
        r: R of one matrix.
        inputs: How many inputs lora_a has.
    """
    left, singular, _ = np.linalg.svd(_of_one_size(r))
    return np.asarray((left * (singular > _negligible(singular, inputs, r.shape[-1]))).T)


def input_basis(a: Array, batch_dims: int) -> Array:
    """An orthonormal basis of lora_a's columns, one per index of the batch dims.

    Directions that carry nothing of the factor are zero columns, so one of lower rank, or of zeros, has a smaller basis. How large
    a column is does not matter: what it lacks its row of lora_b may have.

    Args:
        a: lora_a, dims batch, inputs, rank.
        batch_dims: How many of its axes are batch dims.

    Returns:
        float32, of the same shape.
    """
    matrices = a.reshape(*a.shape[:batch_dims], -1, a.shape[-1]).astype(np.float64)
    left, singular, _ = np.linalg.svd(_of_one_size(matrices), full_matrices=False)
    basis = np.zeros(matrices.shape, np.float32)
    basis[..., : left.shape[-1]] = left * (singular > _negligible(singular, *matrices.shape[-2:]))[..., None, :]
    return basis.reshape(a.shape)


def acting(a: Array, b: Array, batch_dims: int) -> Array:
    """lora_a with zeros for columns whose row of lora_b is zero: nothing comes of what they look at.

    Args:
        a: lora_a, dims batch, inputs, rank.
        b: lora_b, dims batch, rank, outputs.
        batch_dims: How many of their axes are batch dims.
    """
    acts = b.any(axis=tuple(range(batch_dims + 1, b.ndim)))
    among_inputs = acts.reshape(*acts.shape[:-1], *(1,) * (a.ndim - batch_dims - 1), acts.shape[-1])
    return np.where(among_inputs, a, a.dtype.type(0))


def _of_one_size(columns: Array) -> Array:
    """Matrices with columns of norm 1, but for those of zeros."""
    norms = np.linalg.norm(columns, axis=-2, keepdims=True)
    return np.asarray(columns / np.where(norms > 0, norms, 1.0))


def _negligible(singular: Array, inputs: int, rank: int) -> Array:
    """What a singular value must exceed to count as more than float32's rounding of the others."""
    return np.asarray(singular[..., :1] * max(inputs, rank) * np.finfo(np.float32).eps)


def delta_singular_values(equation: Equation, a: Array, b: Array) -> Array:
    """Singular values of the unscaled delta, per index of the batch dims, from the factors alone.

    With QR factors ``A = Q_a R_a`` and ``B^T = Q_b R_b`` the delta is ``Q_a (R_a R_b^T) Q_b^T``, whose singular values are those of
    the small matrix in the middle.

    Args:
        equation: Which dims are batch, inputs, rank and outputs.
        a: lora_a, finite.
        b: lora_b, finite.

    Returns:
        float64, dims batch (flattened) and rank, descending.
    """
    left, right = factor_matrices(equation, a, b)
    middle = np.linalg.qr(left, mode="r") @ np.swapaxes(np.linalg.qr(np.swapaxes(right, -1, -2), mode="r"), -1, -2)
    return np.linalg.svd(middle, compute_uv=False)


def spectrum(equation: Equation, a: Array, b: Array, scale: float) -> tuple[float, ...]:
    """Singular values of the scaled delta; see `mean_spectrum`."""
    return mean_spectrum([delta_singular_values(equation, a, b)], scale)


def mean_spectrum(singular_values: Sequence[Array], scale: float) -> tuple[float, ...]:
    """Singular values of the scaled delta, descending, as root mean squares over layers and batch dims.

    Args:
        singular_values: Of each layer, those that `delta_singular_values` gives.
        scale: What the delta is multiplied by.
    """
    values = np.concatenate(singular_values)
    with np.errstate(over="ignore"):
        scaled = abs(scale) * np.sqrt(np.mean(np.square(values), axis=0))
    return tuple(map(float, np.minimum(scaled, np.finfo(np.float64).max)))


class LeafDigest:
    """A digest of a factor's name, shape, dtype and values."""

    def __init__(self, spec: TensorSpec) -> None:
        self._digest = hashlib.sha256(f"{spec.name}\0{spec.shape}\0{spec.dtype.name}\0".encode())

    def add(self, values: Array) -> None:
        """Add the next values, in row-major order."""
        self._digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    @property
    def text(self) -> str:
        """The digest of what was added so far."""
        return self._digest.hexdigest()


def adapter_digest(factors: Mapping[str, str]) -> str:
    """A digest of one adapter's factors, by role."""
    joined = "".join(digest for _, digest in sorted(factors.items()))
    return f"sha256:{hashlib.sha256(joined.encode()).hexdigest()}"


def _stack_of_matrices(values: Array, dims: str, batch: str, rest: str) -> Array:
    moved = np.transpose(values, [dims.index(dim) for dim in batch + rest])
    lead = int(np.prod(moved.shape[: len(batch)]))
    return moved.reshape(lead, *moved.shape[len(batch) :])
