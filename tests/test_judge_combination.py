"""The judge's combination of adapters against PEFT's ``add_weighted_adapter``, and the laws that it obeys."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge_cli.records import Array
from lora_merge_cli.verification import combination
from lora_merge_cli.verification.combination import Part, combined

RANK, OUTPUTS, INPUTS = 4, 10, 14
ALPHAS = (6.0, 1.0, 10.0)
WEIGHTS = ((0.7, -1.3, 0.4), (1.0, 1.0, 1.0), (-0.25, 0.5, 2.0), (0.9, 0.6))
PRUNING = ("ties", "magnitude_prune", "dare_linear", "dare_ties")
METHODS = ("linear", "cat", "svd", *PRUNING, *(f"{method}_svd" for method in PRUNING))


def masks(shape: tuple[int, int], number: int) -> Array:
    return np.random.default_rng([number, *shape]).random(shape) < 0.6


def made(parts: Sequence[Part], method: str, **options: Any) -> Array:
    """The change of a combination, outputs by inputs."""
    given = {"density": 0.6, "sign": "total", "svd_rank": None, "masks": masks} | options
    a, b = combined(parts, method, **given)
    return np.asarray((a @ b).T)


def factors(count: int, seed: int = 0, rank: int = RANK) -> list[tuple[Array, Array]]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((INPUTS, rank)), rng.standard_normal((rank, OUTPUTS))) for _ in range(count)]


def parts_of(weights: Sequence[float], seed: int = 0) -> list[Part]:
    return [(a, b, weight) for (a, b), weight in zip(factors(len(weights), seed), weights, strict=True)]


def by_peft(
    pairs: Sequence[tuple[Array, Array]],
    weights: Sequence[float],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> Array:
    """The delta of PEFT's combined adapter; its draws, in the order that it draws them, are `masks`."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    drawn = 0

    def bernoulli(densities: Any) -> Any:
        nonlocal drawn
        drawn += 1
        return torch.from_numpy(masks(tuple(densities.shape), drawn - 1)).to(densities.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    names = [f"adapter {number}" for number in range(len(pairs))]
    model = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, alpha in zip(names, ALPHAS, strict=False):
            config = peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["layer"])
            if model is None:
                base = torch.nn.Sequential()
                base.add_module("layer", torch.nn.Linear(INPUTS, OUTPUTS, bias=False))
                model = peft.get_peft_model(base, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        model.double()
        layer = model.base_model.model.layer
        for name, (a, b) in zip(names, pairs, strict=True):
            layer.lora_A[name].weight.data = torch.from_numpy(a.T.copy())
            layer.lora_B[name].weight.data = torch.from_numpy(b.T.copy())
        model.add_weighted_adapter(names, list(weights), "combined", combination_type=method, **options)
    assert layer.scaling["combined"] == 1
    return layer.get_delta_weight("combined").detach().numpy()


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(
    ("method", "sign"),
    [(method, "total") for method in METHODS] + [(method, "frequency") for method in METHODS if "ties" in method],
)
def test_a_combination_is_pefts(
    method: str, weights: tuple[float, ...], sign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = factors(len(weights))
    scales = [alpha / RANK for alpha in ALPHAS[: len(weights)]]
    parts = [(a, b, weight * scale) for (a, b), weight, scale in zip(pairs, weights, scales, strict=True)]
    for density, rank in ((0.6, None), (0.6, 2), (1.0, None), (0.03, None)):
        theirs = by_peft(pairs, weights, method, monkeypatch, density=density, svd_rank=rank, majority_sign_method=sign)
        ours = made(parts, method, density=density, sign=sign, svd_rank=rank, scales=scales)
        # PEFT's weights are float32.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("method", METHODS)
def test_a_result_has_the_ranks_that_it_is_said_to_have(method: str) -> None:
    parts = parts_of((0.7, -1.3, 0.4))
    options = {"density": 0.6, "sign": "total", "masks": masks}
    a, b = combined(parts, method, svd_rank=2, **options)
    rank = {"cat": 3 * RANK}.get(method, 2 if method.endswith("svd") else RANK)
    assert (a.shape, b.shape) == ((INPUTS, rank), (rank, OUTPUTS))
    assert np.linalg.matrix_rank(a @ b) == min(rank, OUTPUTS)
    a, b = combined(parts, method, svd_rank=99, **options)
    assert a.shape[1] == b.shape[0] <= {"cat": 3 * RANK}.get(method, OUTPUTS)


def test_the_roots_of_a_product_of_singular_values_go_to_b() -> None:
    a, b = combined(parts_of((2.0, -1.0)), "svd", density=None, sign="total", svd_rank=3, masks=None)
    np.testing.assert_allclose(a.T @ a, np.eye(3), atol=1e-12)
    gram = b @ b.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)


def test_of_equal_magnitudes_the_earlier_entry_in_pefts_order_is_kept() -> None:
    # Half of four entries: A's are (rank, inputs), B's (outputs, rank), a change's (outputs, inputs).
    a, b = np.array([[1.0, -1.0], [1.0, 1.0]]), np.array([[-1.0, 1.0], [1.0, 1.0]])
    options = {"density": 0.5, "sign": "total", "svd_rank": None, "masks": None}
    found_a, found_b = combined([(a, b, 1.0)], "magnitude_prune", **options)
    np.testing.assert_array_equal(found_a.T, [[1, 1], [0, 0]])
    np.testing.assert_array_equal(found_b.T, [[-1, 1], [0, 0]])
    change = made(
        [(np.eye(2), np.array([[1.0, 5.0], [1.0, 1.0]]), 1.0)], "magnitude_prune_svd", masks=None, density=0.5
    )
    np.testing.assert_allclose(change, [[1, 0], [5, 0]], atol=1e-12)


def test_larger_magnitudes_win_over_earlier_entries() -> None:
    kept = combination._largest(np.array([[1.0, -3.0, 1.0], [1.0, 2.0, 0.0]]), 3)
    np.testing.assert_array_equal(kept, [[True, True, False], [False, True, False]])
    assert not combination._largest(np.ones((2, 2)), 0).any()


def test_masks_are_asked_for_by_orientation_and_number() -> None:
    asked: list[tuple[tuple[int, int], int]] = []

    def drawn(shape: tuple[int, int], number: int) -> Array:
        asked.append((shape, number))
        return np.ones(shape, np.bool_)

    parts = parts_of((1.0, 0.5))
    made(parts, "dare_linear", masks=drawn)
    assert asked == [((RANK, INPUTS), 0), ((RANK, INPUTS), 1), ((OUTPUTS, RANK), 2), ((OUTPUTS, RANK), 3)]
    asked.clear()
    made(parts, "dare_ties_svd", masks=drawn)
    assert asked == [((OUTPUTS, INPUTS), 0), ((OUTPUTS, INPUTS), 1)]
    asked.clear()
    made(parts, "dare_ties", masks=drawn, density=1.0)
    made(parts, "linear", masks=drawn)
    assert not asked


def test_kept_entries_are_divided_by_the_density() -> None:
    (a, b), mask = factors(1)[0], masks((RANK, INPUTS), 0)
    found, _ = combined([(a, b, 1.0)], "dare_linear", density=0.6, sign="total", svd_rank=None, masks=masks)
    np.testing.assert_allclose(found.T, np.where(mask, a.T / 0.6, 0))


def test_changes_vote_with_their_scales_and_without_their_weights() -> None:
    one, other = np.array([[3.0]]), np.array([[-2.0]])
    unit = np.ones((1, 1))
    parts = [(unit, one, 0.5), (unit, other, 4.0)]
    assert made(parts, "ties_svd", density=1.0) == pytest.approx(1.5)
    assert made(parts, "ties_svd", density=1.0, scales=(1.0, 2.0)) == pytest.approx(-8.0)
    assert made(parts, "ties_svd", density=1.0, scales=(0.25, 0.25)) == pytest.approx(1.5)
    assert made([(unit, one, 0.0), (unit, other, 4.0)], "ties_svd", density=1.0, scales=(0.0, 1.0)) == pytest.approx(-8)


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_where_the_votes_are_even_plus_is_elected(sign: str) -> None:
    unit = np.ones((1, 1))
    assert made([(unit, -unit, 1.0), (unit, unit, 3.0)], "ties_svd", density=1.0, sign=sign) == pytest.approx(3.0)


weight_lists = st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=2, max_size=4)
seeds = st.integers(0, 2**20)


@settings(deadline=None, max_examples=30)
@given(weight_lists, seeds, st.randoms(use_true_random=False))
def test_the_order_of_adapters_does_not_matter(weights: list[float], seed: int, random: Any) -> None:
    parts = parts_of(weights, seed)
    shuffled = list(parts)
    random.shuffle(shuffled)
    for method in ("linear", "cat", "svd", "ties", "magnitude_prune", "magnitude_prune_svd"):
        ranks = {"svd_rank": 99} if method.endswith("svd") else {}
        np.testing.assert_allclose(made(parts, method, **ranks), made(shuffled, method, **ranks), rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=30)
@given(weight_lists, seeds)
def test_whole_sums_are_exact(weights: list[float], seed: int) -> None:
    parts = parts_of(weights, seed)
    total = sum(c * (a @ b).T for a, b, c in parts)
    for method, options in (
        ("cat", {}),
        ("svd", {"svd_rank": 99}),
        ("magnitude_prune_svd", {"svd_rank": 99, "density": 1.0}),
        ("dare_linear_svd", {"svd_rank": 99, "density": 1.0}),
    ):
        np.testing.assert_allclose(made(parts, method, **options), total, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(made(parts, "magnitude_prune", density=1.0), made(parts, "linear"), atol=1e-12)
    np.testing.assert_allclose(made(parts[:1], "linear"), parts[0][2] * (parts[0][0] @ parts[0][1]).T, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(weight_lists, seeds, st.integers(1, 6))
def test_nothing_of_that_rank_is_closer(weights: list[float], seed: int, rank: int) -> None:
    parts = parts_of(weights, seed)
    total = made(parts, "cat")
    lost = np.linalg.svd(total, compute_uv=False)[rank:]
    found = np.linalg.norm(total - made(parts, "svd", svd_rank=rank))
    np.testing.assert_allclose(found, np.linalg.norm(lost), atol=1e-9)
