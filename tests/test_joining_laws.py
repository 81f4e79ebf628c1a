"""Laws of joining fine-tunes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lora_merge_cli.joining import METHODS, Joining
from lora_merge_cli.records import full_region, grid
from tests.test_joining import LEAF, join, joint, some

SHAPE = (6, 5)
SIXTEENTHS = st.integers(-64, 64).map(lambda number: number / 16)
"""Sums and differences of these are exact in float32."""
TENSOR = arrays(np.float32, SHAPE, elements=SIXTEENTHS)
WEIGHT = st.sampled_from((-1.5, -0.5, 0.25, 1.0, 2.0))
SHARE = st.sampled_from((0.0, 0.25, 1.0, 3.0))
DENSITY = st.sampled_from((0.2, 0.5, 1.0))


def keep_all(seed: int, name: str, start: int, stop: int, density: float) -> np.ndarray:
    return np.ones(stop - start, bool)


@given(TENSOR, st.lists(st.tuples(TENSOR, WEIGHT), min_size=2, max_size=3), st.randoms(), DENSITY)
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("slerp", "karcher")])
def test_the_order_does_not_matter(method: Any, base: Any, weighed: Any, random: Any, density: float) -> None:
    others = list(weighed)
    random.shuffle(others)
    results = []
    for pairs in (weighed, others):
        tuned, weights = zip(*pairs, strict=True)
        if method == "model-stock":
            joining = some(method, len(tuned))
        else:
            joining = Joining(method, weights, True, density if method in ("ties", "dare-ties") else None)
        results.append(join(base, tuned, joining, draw=keep_all))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


@given(TENSOR, TENSOR, TENSOR, st.tuples(SHARE, SHARE).filter(any))
@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_the_order_does_not_matter_on_a_sphere(method: Any, base: Any, one: Any, other: Any, weights: Any) -> None:
    there = join(base, [one, other], Joining(method, weights, True))
    back = join(base, [other, one], Joining(method, weights[::-1], True))
    np.testing.assert_allclose(there, back, rtol=1e-4, atol=1e-4)


@given(TENSOR, TENSOR)
def test_ties_of_one_at_density_one_is_task_arithmetic(base: Any, tuned: Any) -> None:
    alone = join(base, [tuned], Joining("ties", (1.0,), True, 1.0))
    assert alone.tobytes() == join(base, [tuned], Joining("task-arithmetic", (1.0,), True)).tobytes()
    np.testing.assert_array_equal(alone, tuned)


@given(TENSOR, TENSOR, st.sampled_from((0.25, 0.5, 2.0)), SHARE)
def test_slerp_of_parallel_tensors_is_linear(base: Any, tuned: Any, factor: float, share: float) -> None:
    result = join(base, [tuned, tuned * np.float32(factor)], Joining("slerp", (1.0, share), True))
    t = share / (1 + share)
    np.testing.assert_allclose(result, tuned * (1 - t + t * factor), rtol=1e-6, atol=1e-6)


@given(TENSOR, TENSOR, st.integers(2, 3))
@pytest.mark.parametrize("method", METHODS)
def test_equal_fine_tunes_give_that_one(method: Any, base: Any, tuned: Any, count: int) -> None:
    count = 2 if method == "slerp" else count
    density = 1.0 if method in ("ties", "dare-ties") else None
    weights = (1.0,) * count if method not in ("task-arithmetic", "dare-ties") else (1.0,) + (0.0,) * (count - 1)
    stated = method not in ("linear", "model-stock")
    result = join(base, [tuned] * count, Joining(method, weights, stated, density))
    np.testing.assert_allclose(result, tuned, rtol=0, atol=1e-6)
    if method in ("slerp", "karcher"):
        assert result.tobytes() == tuned.tobytes() or np.array_equal(base, tuned)


@given(TENSOR, TENSOR, TENSOR)
@pytest.mark.parametrize("method", ["linear", "task-arithmetic"])
def test_a_sequence_adds_up_to_its_end(method: Any, base: Any, first: Any, second: Any) -> None:
    result = join(base, [first, second], Joining(method, (1.0, 1.0), True, sequential=True))
    np.testing.assert_array_equal(result, second)


DTYPES = (np.float32, ml_dtypes.bfloat16, np.float64)


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from(DTYPES), st.data())
@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_what_is_asked_for(method: Any, seed: int, dtype: Any, data: Any) -> None:
    shape = (3, 4, 10)
    rng = np.random.default_rng(seed)
    # Few values, so that sizes at the threshold tie.
    base, *tuned = (rng.integers(-3, 4, shape).astype(dtype) * dtype(0.3) for _ in range(3))
    joined = joint({LEAF: base}, [{LEAF: values} for values in tuned], some(method, seed=seed))
    whole = joined.read(LEAF, full_region(shape))
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 10))
    with mock.patch("lora_merge_cli.joining.arithmetic._CAPACITY", 2**10):
        for region in grid(full_region(shape), (1, rows, 10)):
            (run,) = joined.scan(LEAF, [region])
            assert run.tobytes() == whole[region].tobytes()
        for region in grid(full_region(shape), (2, rows, columns)):
            assert joined.read(LEAF, region).tobytes() == whole[region].tobytes()
    again = joint({LEAF: base}, [{LEAF: values} for values in tuned], some(method, seed=seed))
    with mock.patch.multiple(
        "lora_merge_cli.side_by_side", BLOCK_ENTRIES=data.draw(st.integers(1, 50)), _PIECE_ENTRIES=7
    ):
        cut = again.read(LEAF, full_region(shape))
    if method in ("slerp", "karcher", "model-stock"):
        # Sums of float64 in other runs.
        np.testing.assert_allclose(cut, whole, rtol=1e-6, atol=1e-6)
    else:
        assert cut.tobytes() == whole.tobytes()
