"""Truncated singular value decompositions against NumPy's in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli import truncation
from lora_merge_cli.errors import NonFiniteInput, UsageError
from lora_merge_cli.truncation import Truncated, smallest_rank, truncate, truncate_product

Array = np.ndarray[Any, np.dtype[Any]]

SHAPES = [(40, 70), (70, 40), (130, 150), (9, 300), (300, 9), (1, 5), (5, 1)]


class Passes:
    """A delta that is read in blocks, and how often it was."""

    def __init__(self, delta: Array, height: int = 17) -> None:
        self.delta, self.height, self.count = delta, height, 0

    def __call__(self) -> Iterator[tuple[int, Array]]:
        self.count += 1
        for first in range(0, len(self.delta), self.height):
            yield first, self.delta[first : first + self.height]


def cut(delta: Array, **asked: Any) -> Truncated:
    return truncate(Passes(delta), *delta.shape, **asked)


def noise(rows: int, columns: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32)


def with_spectrum(rows: int, columns: int, spectrum: Any, seed: int = 0) -> Array:
    """A float32 delta with these singular values."""
    k = len(spectrum)
    left = np.linalg.qr(noise(rows, k, seed).astype(np.float64))[0]
    right = np.linalg.qr(noise(columns, k, seed + 1).astype(np.float64))[0]
    return ((left * np.asarray(spectrum)) @ right.T).astype(np.float32)


def singular_values(delta: Array) -> Array:
    return np.linalg.svd(delta.astype(np.float64), compute_uv=False)


def error_of(found: Truncated, delta: Array) -> float:
    product = found.left.astype(np.float64) @ found.right.astype(np.float64)
    return float(np.linalg.norm(delta.astype(np.float64) - product))


def best_error(delta: Array, rank: int) -> float:
    return float(np.sqrt(np.sum(singular_values(delta)[rank:] ** 2)))


def check_shape(found: Truncated, delta: Array) -> None:
    assert (found.left.dtype, found.right.dtype, found.singular_values.dtype) == (np.float32, np.float32, np.float64)
    assert found.left.shape == (delta.shape[0], found.rank)
    assert found.right.shape == (found.rank, delta.shape[1])
    # Each factor carries the root of the singular values.
    root = np.sqrt(found.singular_values)
    for norms in (np.linalg.norm(found.left, axis=0), np.linalg.norm(found.right, axis=1)):
        np.testing.assert_allclose(norms, root, rtol=1e-5, atol=1e-6 * np.sqrt(found.total))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 400])
def test_a_rank_is_cut_optimally(shape: tuple[int, int], rank: int) -> None:
    delta = noise(*shape)
    found = cut(delta, rank=rank)
    check_shape(found, delta)
    assert found.rank == min(rank, *shape)
    total = np.linalg.norm(delta.astype(np.float64))
    optimum = best_error(delta, rank)
    assert error_of(found, delta) <= optimum + 1e-6 * total, "Eckart and Young"
    assert found.total == pytest.approx(total, rel=1e-6)
    assert found.relative_error == pytest.approx(error_of(found, delta) / total, abs=1e-6)
    assert found.energy_kept == pytest.approx(1 - (optimum / total) ** 2, abs=1e-6)
    np.testing.assert_allclose(found.singular_values, singular_values(delta)[: found.rank], rtol=1e-5)


@given(
    shape=st.sampled_from([(1, 9), (2, 2), (12, 31), (31, 12), (40, 40)]),
    decay=st.floats(0, 3),
    energy=st.floats(0.01, 0.99999),
    seed=st.integers(0, 99),
)
def test_an_energy_gets_the_least_rank(shape: tuple[int, int], decay: float, energy: float, seed: int) -> None:
    delta = with_spectrum(*shape, np.arange(1, min(shape) + 1) ** -decay, seed)
    found = cut(delta, energy=energy)
    shares = np.cumsum(singular_values(delta) ** 2) / np.sum(singular_values(delta) ** 2)
    assert shares[found.rank - 1] >= energy - 1e-6
    assert found.rank == 1 or shares[found.rank - 2] < energy + 1e-6
    assert found.energy_kept == pytest.approx(shares[found.rank - 1], abs=1e-6)


@pytest.mark.parametrize("shape", [(80, 200), (200, 80), (1030, 1100), (1100, 1030)])
@pytest.mark.parametrize("asked", [{"rank": 6}, {"rank": 9}, {"energy": 1.0}])
def test_what_is_of_low_rank_comes_back_whole(shape: tuple[int, int], asked: dict[str, Any]) -> None:
    delta = with_spectrum(*shape, [5, 2, 1, 0.3, 0.02, 0.005])
    passes = Passes(delta, 200)
    found = truncate(passes, *shape, **asked)
    assert found.rank == asked.get("rank", 6), "rounding is no direction"
    norm = float(np.linalg.norm(delta))
    assert error_of(found, delta) <= 2e-6 * norm
    assert found.relative_error == pytest.approx(error_of(found, delta) / norm, rel=0.5)
    assert passes.count <= 5


def test_random_directions_come_near_the_optimum() -> None:
    delta = with_spectrum(1030, 1100, np.arange(1, 1031) ** -0.5)
    passes = Passes(delta, 300)
    found = truncate(passes, *delta.shape, rank=20)
    assert passes.count == 4
    total = np.linalg.norm(delta.astype(np.float64))
    assert best_error(delta, 20) <= error_of(found, delta) * (1 + 1e-5) <= best_error(delta, 20) * 1.002
    assert found.relative_error == pytest.approx(error_of(found, delta) / total, abs=1e-6)
    assert found.energy_kept == pytest.approx(1 - (error_of(found, delta) / total) ** 2, abs=1e-6)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("gram", [True, False])
def test_long_sides_in_small(shape: tuple[int, int], gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways for sides that no test can afford."""
    monkeypatch.setattr(truncation, "_GRAM_AT_ONCE", 8)
    monkeypatch.setattr(truncation, "_GRAM_AT_ALL", 1000 if gram else 8)
    monkeypatch.setattr(truncation, "_FIRST_SKETCH", 4)
    monkeypatch.setattr(truncation, "_TILE_ENTRIES", 8)
    monkeypatch.setattr(truncation, "_PANEL_ENTRIES", 2000)
    delta = with_spectrum(*shape, np.arange(1, 61) ** -0.7)
    shares = np.cumsum(singular_values(delta) ** 2) / np.sum(singular_values(delta) ** 2)
    for energy in (0.3, 0.6, 0.9, 0.9999, 1.0):
        least = int(np.argmax(shares >= min(energy, 1 - 1e-6))) + 1
        found = cut(delta, energy=energy)
        assert found.energy_kept >= min(energy, 1 - 1e-6) - 1e-6
        assert least <= found.rank <= least + (0 if gram and energy > 0.5 else 2) or energy == 1.0
    assert found.rank == 60


def test_small_directions_are_found_below_the_noise_of_a_gram_matrix() -> None:
    """Their squares are below float32's rounding of the largest one's."""
    delta = with_spectrum(90, 70, [1.0, *[1e-4] * 40])
    found = cut(delta, energy=1.0)
    assert found.rank == 41
    assert error_of(found, delta) <= 2e-6
    assert cut(delta, energy=0.9999).rank == 1


@pytest.mark.parametrize("asked", [{"rank": 30}, {"energy": 0.97}])
def test_too_few_eigenvectors_are_noticed(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    delta = with_spectrum(70, 80, np.arange(1, 71) ** -0.7)
    expected = cut(delta, **asked)
    monkeypatch.setattr(truncation, "_GRAM_MARGIN", -5)
    found = cut(delta, **asked)
    assert found.rank == expected.rank
    assert found.energy_kept == pytest.approx(expected.energy_kept, abs=1e-6)


@pytest.mark.parametrize("asked", [{"rank": 4}, {"energy": 0.7}])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (1030, 1040)])
def test_the_cut_into_blocks_changes_no_bit(
    asked: dict[str, Any], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truncation, "_TILE_ENTRIES", 16 * shape[1])
    delta = with_spectrum(*shape, 0.8 ** np.arange(30))
    found = [truncate(Passes(delta, height), *shape, **asked) for height in (1, 7, 16, 5000)]
    for other in found[1:]:
        assert found[0].left.tobytes() == other.left.tobytes()
        assert found[0].right.tobytes() == other.right.tobytes()
        assert (found[0].energy_kept, found[0].total) == (other.energy_kept, other.total)


def test_the_seed_decides() -> None:
    delta = noise(1030, 1040)
    first, again, other = (cut(delta, rank=3, seed=seed) for seed in (0, 0, 1))
    assert first.left.tobytes() == again.left.tobytes()
    assert first.left.tobytes() != other.left.tobytes()
    assert first.energy_kept == pytest.approx(other.energy_kept, rel=0.1)


@pytest.mark.parametrize("asked", [{"rank": 4}, {"energy": 0.9}])
@pytest.mark.parametrize("shape", [(12, 15), (1030, 1031)])
def test_zeros_have_one_rank_of_zeros(asked: dict[str, Any], shape: tuple[int, int]) -> None:
    found = cut(np.zeros(shape, np.float32), **asked)
    assert (found.rank, found.energy_kept, found.relative_error, found.total) == (1, 1.0, 0.0, 0.0)
    assert not found.left.any() and not found.right.any()
    check_shape(found, np.zeros(shape, np.float32))


@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize("asked", [{"rank": 4}, {"energy": 0.9}])
def test_neither_factor_overflows_nor_vanishes(size: float, asked: dict[str, Any]) -> None:
    plain = with_spectrum(70, 80, 0.5 ** np.arange(20))
    small = np.float32(size) * plain
    found = cut(small, **asked)
    product = found.left.astype(np.float64) @ found.right.astype(np.float64)
    expected = cut(plain, **asked)
    assert found.rank == expected.rank
    assert found.energy_kept == pytest.approx(expected.energy_kept, abs=1e-5)
    wanted = size * (expected.left.astype(np.float64) @ expected.right.astype(np.float64))
    assert np.linalg.norm(product - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_rows_of_very_different_size() -> None:
    delta = noise(64, 70)
    delta[:32] *= 1e-30
    found = cut(delta, rank=32)
    assert error_of(found, delta) <= 2e-6 * np.linalg.norm(delta)


def test_power_steps_weigh_rows_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "_GRAM_AT_ONCE", 8)
    monkeypatch.setattr(truncation, "_TILE_ENTRIES", 8 * 300)
    delta = noise(200, 300)
    delta[:8] = with_spectrum(8, 300, [3e-3, 2e-3, 1e-3])
    delta[8:] *= 1e-8
    found = cut(delta, rank=3)
    assert error_of(found, delta) <= 1.01 * best_error(delta, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    delta = noise(20, 30)
    delta[13, 2] = value
    with pytest.raises(NonFiniteInput):
        cut(delta, rank=2)


@pytest.mark.parametrize("asked", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"rank": -1}, {"energy": 0.0}])
@pytest.mark.parametrize("way", [lambda **asked: cut(noise(4, 4), **asked), lambda **asked: truncate_product(noise(4, 2), noise(2, 4), **asked)])  # fmt: skip
def test_a_cut_that_makes_no_sense_is_refused(asked: dict[str, Any], way: Callable[..., object]) -> None:
    with pytest.raises(UsageError) as refusal:
        way(**asked)
    assert refusal.value.exit_code == 2
    for energy in (1.1, -0.5, float("nan"), float("inf")):
        with pytest.raises(UsageError):
            way(energy=energy)


@pytest.mark.parametrize("k", [1, 5, 12, 40])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (7, 90)])
@pytest.mark.parametrize("rank", [1, 4, 100])
def test_a_product_is_cut_as_its_matrix_is(k: int, shape: tuple[int, int], rank: int) -> None:
    left, right = noise(shape[0], k), noise(k, shape[1], 1)
    delta = left.astype(np.float64) @ right
    found = truncate_product(left, right, rank=rank)
    check_shape(found, delta)
    assert found.rank == min(rank, k, *shape)
    total = np.linalg.norm(delta)
    optimum = best_error(delta, rank)
    assert error_of(found, delta) <= optimum + 3e-7 * total
    assert found.total == pytest.approx(total, rel=1e-12)
    assert found.energy_kept == pytest.approx(1 - (optimum / total) ** 2, abs=1e-12)
    assert found.relative_error == pytest.approx(optimum / total, abs=1e-12)


@given(
    spectrum=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12).map(lambda values: sorted(values, reverse=True)),
    energy=st.floats(1e-3, 1, exclude_max=True),
)
def test_the_least_rank_of_a_product(spectrum: list[float], energy: float) -> None:
    squares = np.square(spectrum)
    rank = smallest_rank(np.asarray(spectrum), energy)
    kept = np.cumsum(squares) / np.sum(squares)
    assert kept[rank - 1] >= energy - 1e-12
    assert rank == 1 or kept[rank - 2] < energy + 1e-12


def test_all_of_a_product_is_its_rank() -> None:
    left, right = noise(40, 9), noise(9, 50, 1)
    left[:, 3] = left[:, 4]
    right[7] = 0
    assert truncate_product(left, right, energy=1.0).rank == 7
    assert truncate_product(left * 0, right, energy=1.0).rank == 1
    zero = truncate_product(left, right * 0, rank=5)
    assert (zero.rank, zero.energy_kept, zero.relative_error, zero.total) == (1, 1.0, 0.0, 0.0)


@given(rank=st.integers(1, 8), more=st.integers(0, 8), seed=st.integers(0, 50))
def test_cutting_twice_is_cutting_once(rank: int, more: int, seed: int) -> None:
    left, right = noise(20, 10, seed), noise(10, 24, seed + 1)
    first = truncate_product(left, right, rank=rank + more)
    twice, once = truncate_product(first.left, first.right, rank=rank), truncate_product(left, right, rank=rank)
    np.testing.assert_allclose(twice.left @ twice.right, once.left @ once.right, atol=2e-4)
    assert once.energy_kept <= first.energy_kept + 1e-12
