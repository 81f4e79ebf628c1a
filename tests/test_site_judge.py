"""The bound of an entry: any right float32 merge stays below it, and what is further off than rounding does not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.dialects import ScaleOptions, Subject, Tree
from lora_merge_cli.dialects.openpi import OpenPI
from lora_merge_cli.records import AdapterSite, Index, TensorSpec, full_region, grid
from lora_merge_cli.verification.adapted import Adapted
from lora_merge_cli.verification.model_layer import INPUTS, layer_inputs
from lora_merge_cli.verification.site_judge import LayerVerdict, SiteJudge, Terms
from tests.trees import BFLOAT16, dense

MODULES = {
    "q_einsum": lambda n, h, d, r: ((n, d, h), (n, d, r), (n, r, h)),
    "attn_vec_einsum": lambda n, h, d, r: ((n, h, d), (n, h, r), (n, r, d)),
    "kv_einsum": lambda n, h, d, r: ((2, n, d, h), (2, n, d, r), (2, n, r, h)),
}


def site_of(module: str, shapes: tuple[tuple[int, ...], ...], alpha: float) -> AdapterSite:
    parts = ("w", "lora_a", "lora_b")
    specs = [
        TensorSpec(("params", "attn", module, part), (2, *shape), np.dtype(np.float32))
        for part, shape in zip(parts, shapes, strict=True)
    ]
    tree = Tree(Index({spec.path: spec for spec in specs}), "x")
    survey = OpenPI().survey(Subject(tree), ScaleOptions({"": alpha}))
    return survey.sites[0]


def judged(
    site: AdapterSite, w: Any, a: Any, b: Any, merged: Any, block: tuple[int, ...] | None = None, ulps: float = 0.5
) -> dict[int, LayerVerdict]:
    terms = Terms(BFLOAT16, ulps, 1.0)
    adapted = Adapted(site, a.astype(np.float64), b.astype(np.float64), 1.0)
    judge = SiteJudge("x", [adapted], w.shape, merged.dtype, terms, range(2))
    with ThreadPoolExecutor(2) as pool:
        for region in grid(full_region(w.shape), block or w.shape):
            judge.take(region, w[region], merged[region], None, pool)
    return judge.finish()


def float32_merge(site: AdapterSite, w: Any, a: Any, b: Any, rng: np.random.Generator) -> Any:
    """Product by product in float32, in a random order of ranks and heads."""
    delta = np.zeros(w.shape, np.float32)
    heads = range(b.shape[1]) if site.parameters.equation.summed else [None]
    terms = [(r, head) for r in range(a.shape[-1]) for head in heads]
    for index in rng.permutation(len(terms)):
        r, head = terms[index]
        if head is None:
            delta += a[..., :, r, None] * b[..., r, None, :]
        else:
            delta += a[..., r, None] * b[:, head, r][:, None, None, :]
    return w.astype(np.float32) + np.float32(site.parameters.scale.value or 0) * delta


cases = st.tuples(
    st.sampled_from(sorted(MODULES)),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(-12, 6),
    st.integers(-20, 8),
    st.integers(0, 2**32 - 1),
)


@given(cases, st.sampled_from([np.dtype(np.float32), BFLOAT16, np.dtype(np.float16)]))
def test_a_right_float32_merge_stays_within_its_bound(case: tuple[Any, ...], dtype: np.dtype) -> None:
    module, n, h, d, r, w_size, d_size, seed = case
    rng = np.random.default_rng(seed)
    shapes = MODULES[module](n, h, d, r)
    site = site_of(module, shapes, 3.0)
    w, a, b = (rng.standard_normal((2, *shape)).astype(np.float32) for shape in shapes)
    w, a = w * np.float32(2.0**w_size), a * np.float32(2.0**d_size)
    merged = float32_merge(site, w, a, b, rng).astype(dtype)
    found = judged(site, w, a, b, merged)
    assert max(verdict.worst_share for verdict in found.values()) <= 1
    assert max(verdict.forward.share for verdict in found.values()) <= 1


@given(cases)
def test_the_ideal_is_what_the_layer_computes_and_an_entry_off_it_is_found(case: tuple[Any, ...]) -> None:
    module, n, h, d, r, _, _, seed = case
    rng = np.random.default_rng(seed)
    shapes = MODULES[module](n, h, d, r)
    site = site_of(module, shapes, 3.0)
    w, a, b = (rng.standard_normal((2, *shape)).astype(np.float32) for shape in shapes)
    scale = site.parameters.scale.value or 0
    right = np.stack([dense(module, w[layer], a[layer], b[layer], scale) for layer in range(2)])
    assert max(verdict.worst_share for verdict in judged(site, w, a, b, right).values()) < 1e-6
    merged = np.ascontiguousarray(right, np.float32)
    flat = int(rng.integers(merged.size))
    size = np.abs(w).max() + scale * np.abs(a).max() * np.abs(b).sum()
    merged.reshape(-1)[flat] += np.float32((r + n + 6) * 2.0**-23 * size)
    found = judged(site, w, a, b, merged)
    assert sum(verdict.beyond for verdict in found.values()) == 1


@pytest.mark.parametrize("module", sorted(MODULES))
def test_blocks_change_no_figure(module: str) -> None:
    rng = np.random.default_rng(4)
    shapes = MODULES[module](3, 4, 6, 2)
    site = site_of(module, shapes, 3.0)
    w, a, b = (rng.standard_normal((2, *shape)).astype(np.float32) for shape in shapes)
    merged = (float32_merge(site, w, a, b, rng) * np.float32(1.001)).astype(BFLOAT16)
    whole = judged(site, w, a, b, merged)
    parts = judged(site, w, a, b, merged, tuple(max(1, n // 2) for n in w.shape))
    for layer, verdict in whole.items():
        other = parts[layer]
        assert (other.beyond, other.worst_share) == (verdict.beyond, verdict.worst_share)
        assert other.forward.error == pytest.approx(verdict.forward.error)
        survival, again = verdict.moments.survival("bfloat16"), other.moments.survival("bfloat16")
        assert again.gain_along_inputs == pytest.approx(survival.gain_along_inputs)
        assert again.unchanged == survival.unchanged


def test_survival_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(5)
    shapes = MODULES["attn_vec_einsum"](3, 4, 6, 2)
    site = site_of("attn_vec_einsum", shapes, 3.0)
    w = rng.standard_normal((2, *shapes[0])).astype(BFLOAT16)
    a, b = (0.05 * rng.standard_normal((2, *shape)).astype(np.float32) for shape in shapes[1:])
    scale = site.parameters.scale.value or 0
    ideal = np.stack([dense("attn_vec_einsum", w[k], a[k], b[k], scale) for k in range(2)])
    merged = ideal.astype(BFLOAT16)
    for layer, verdict in judged(site, w, a, b, merged).items():
        q = (merged[layer].astype(np.float64) - w[layer].astype(np.float64)).reshape(12, 6)
        delta = (ideal[layer] - w[layer].astype(np.float64)).reshape(12, 6)
        u = np.linalg.qr(a[layer].reshape(12, 2).astype(np.float64))[0]
        found = verdict.moments.survival("bfloat16")
        assert found.gain == pytest.approx((q * delta).sum() / (delta**2).sum())
        assert found.relative_error == pytest.approx(np.linalg.norm(q - delta) / np.linalg.norm(delta))
        assert found.unchanged == (q == 0).mean()
        along = (u.T @ q * (u.T @ delta)).sum() / ((u.T @ delta) ** 2).sum()
        assert found.gain_along_inputs == pytest.approx(along, rel=1e-5)


@pytest.mark.parametrize("zero", ["lora_a", "lora_b", "w"])
def test_zeros_are_no_error(zero: str) -> None:
    rng = np.random.default_rng(6)
    shapes = MODULES["q_einsum"](2, 3, 4, 2)
    site = site_of("q_einsum", shapes, 3.0)
    leaves = {
        name: rng.standard_normal((2, *shape)).astype(np.float32) * (name != zero)
        for name, shape in zip(("w", "lora_a", "lora_b"), shapes, strict=True)
    }
    w, a, b = leaves.values()
    found = judged(site, w, a, b, float32_merge(site, w, a, b, rng))
    for verdict in found.values():
        assert verdict.worst_share <= 1 and verdict.forward.share <= 1
        assert (verdict.forward.error is None) == (zero != "w")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_half_of_the_inputs_are_what_the_adapter_reacts_to(module: str) -> None:
    rng = np.random.default_rng(7)
    shapes = MODULES[module](2, 30, 40, 3)
    site = site_of(module, shapes, 3.0)
    a = rng.standard_normal(shapes[1])
    operands = site.forward.base.split("->")[0].split(",")
    sizes = dict(zip(operands[1], shapes[0], strict=True))
    inputs = layer_inputs(site.forward, operands[0], sizes, a, rng)[0].reshape(INPUTS, -1)
    columns = a.reshape(-1, 3) if module == "attn_vec_einsum" else np.moveaxis(a, -2, 0).reshape(40, -1)
    outside = inputs.T - columns @ np.linalg.lstsq(columns, inputs.T, rcond=None)[0]
    np.testing.assert_allclose(np.linalg.norm(inputs, axis=1), 1)
    assert (np.linalg.norm(outside, axis=0) < 1e-9).tolist() == [False] * (INPUTS // 2) + [True] * (INPUTS // 2)


def test_a_device_may_flush_subnormal_numbers_to_zero() -> None:
    rng = np.random.default_rng(8)
    shapes = MODULES["q_einsum"](2, 3, 4, 2)
    site = site_of("q_einsum", shapes, 3.0)
    w, a, b = (rng.standard_normal((2, *shape)).astype(np.float32) for shape in shapes)
    w, a = w * np.float32(1e-39), a * np.float32(1e-39)
    found = judged(site, w, a, b, np.zeros_like(w))
    assert max(verdict.worst_share for verdict in found.values()) <= 1
