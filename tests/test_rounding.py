"""Roundings other than to nearest, of one kernel: against a plain walk in float64, and the laws that they must obey."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge_cli.draws import rounding_bits
from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import UsageError
from lora_merge_cli.operations import KernelUpdate, cut, cutting
from lora_merge_cli.operations.interface import Contribution
from lora_merge_cli.records import full_region, grid
from lora_merge_cli.rounding import DENSE, Choice, Rounding, leaf_rounding, penalty
from lora_merge_cli.rounding_numerics import neighbours
from lora_merge_cli.survival import Moments
from tests.rounding import around, walked

Array = np.ndarray[Any, np.dtype[Any]]

SHAPES = {
    "inputs first": ("ir,ro->io", {"i": 48, "o": 20}),
    "outputs first": ("ir,ro->oi", {"i": 48, "o": 20}),
    "per head": ("hir,hro->hio", {"h": 3, "i": 40, "o": 8}),
    "summed over heads": ("nhr,mro->nho", {"n": 4, "h": 12, "m": 4, "o": 16}),
    "gating pair": ("gir,gro->gio", {"g": 2, "i": 32, "o": 24}),
    "convolution": ("ihwr,ro->oihw", {"i": 8, "h": 3, "w": 3, "o": 12}),
    "experts, outputs first": ("eir,ero->eoi", {"e": 3, "i": 32, "o": 8}),
}


@dataclass
class Case:
    """A kernel, what is added to it, and the same as matrices of inputs by outputs."""

    equation: Equation
    kernel: Array
    contribution: Contribution
    exact: Array
    """Float32, as matrices: stack, inputs, outputs."""
    inputs: Array
    """lora_a as matrices, float64."""

    def matrices(self, values: Array) -> Array:
        """A kernel as matrices of inputs by outputs."""
        parts = (self.equation.batch, self.equation.inputs, self.equation.outputs)
        moved = np.transpose(values, [self.equation.target.index(dim) for dim in "".join(parts)])
        stack = len(self.inputs)
        return moved.reshape(stack, self.inputs.shape[1], -1)


def case(shape: str, *, rank: int = 4, delta: float = 2e-4, dtype: str = "bfloat16", seed: int = 0) -> Case:
    text, sizes = SHAPES[shape]
    equation, rng = Equation(text), np.random.default_rng(seed)
    sizes = sizes | {"r": rank}
    a = rng.standard_normal([sizes[dim] for dim in equation.batch + equation.inputs + "r"]).astype(np.float32)
    b = rng.standard_normal([sizes[dim] for dim in equation.batch + "r" + equation.outputs])
    b = (b * delta / np.sqrt(rank)).astype(np.float32)
    kernel = (0.02 * rng.standard_normal([sizes[dim] for dim in equation.target])).astype(dtype_named(dtype))
    found = Case(equation, kernel, Contribution(a, b), np.empty(0), np.empty(0))
    stack = int(np.prod([sizes[dim] for dim in equation.batch], dtype=int))
    found.inputs = a.reshape(stack, -1, rank).astype(np.float64)
    product = found.inputs @ b.reshape(stack, rank, -1).astype(np.float64)
    found.exact = found.matrices(kernel).astype(np.float64) + product
    return found


def updated(
    given: Case,
    choice: Choice | None,
    dtype: str = "bfloat16",
    *,
    base: Array | None = None,
    jobs: int = 1,
    seed: int = 0,
    mu: float = 1.0,
) -> tuple[Array, Moments]:
    """What the update makes of the whole kernel, block by block."""
    shape = given.kernel.shape
    device = jax.devices()[0]
    names = dtype_named(dtype), dtype_named("bfloat16")
    update = KernelUpdate("w", given.equation, shape, given.contribution, *names, device, choice, mu)
    regions = list(grid(full_region(shape), cut(given.equation, shape).block))
    bits = rounding_bits(seed, "w", 0, given.kernel.size).reshape(shape)
    result = np.empty(shape, dtype_named(dtype))
    with ThreadPoolExecutor(jobs) as pool:
        started = [
            pool.submit(
                update.compute,
                region,
                given.kernel[region],
                None if base is None else base[region],
                bits[region] if choice is not None and choice.method == "stochastic" else None,
            )
            for region in regions
        ]
        for region, future in zip(regions, started, strict=True):
            result[region] = update.take(region, given.kernel[region], future.result())
    return result, update.finish()


def preserve(grid_dtype: str = "bfloat16", *, widened: bool = False) -> Choice:
    return Choice("preserve", grid_dtype, widened)


def stochastic(grid_dtype: str = "bfloat16", *, widened: bool = False) -> Choice:
    return Choice("stochastic", grid_dtype, widened)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many blocks":
        monkeypatch.setattr(cutting, "BLOCK_ENTRIES", 96)
        monkeypatch.setattr(cutting, "TILE_ENTRIES", 48)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("mu", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_preserve_is_the_walk_along_the_inputs(shape: str, dtype: str, mu: float) -> None:
    given = case(shape, dtype=dtype)
    result, _ = updated(given, preserve(dtype), dtype, jobs=3, mu=mu)
    ideal = np.stack([walked(x, a, mu, dtype) for x, a in zip(given.exact, given.inputs, strict=True)])
    # One near tie in float32 changes what follows in its column.
    columns = (given.matrices(result).astype(np.float64) != ideal).any(axis=1)
    assert columns.sum() <= max(2, columns.size // 20)


def test_a_walk_goes_on_through_blocks_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case("inputs first")
    whole, _ = updated(given, preserve())
    monkeypatch.setattr(cutting, "BLOCK_ENTRIES", 60)
    monkeypatch.setattr(cutting, "TILE_ENTRIES", 20)
    for jobs in (1, 4):
        parts, _ = updated(given, preserve(), jobs=jobs)
        assert np.array_equal(parts, whole)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("choice", [preserve(), stochastic()], ids=lambda choice: choice.method)
def test_every_entry_is_a_neighbour_of_its_result(shape: str, choice: Choice) -> None:
    given = case(shape)
    result, _ = updated(given, choice)
    below, above = around(given.exact.astype(np.float32).astype(np.float64), "bfloat16")
    found = given.matrices(result).astype(np.float64)
    off = (found != below) & (found != above)
    # float32 may see an entry within its error of a grid value on the other side of it.
    assert np.abs(found - given.exact)[off].max(initial=0) < 2.0**-7 * 0.1
    assert off.mean() < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_preserve_keeps_what_the_adapter_does_to_its_inputs(shape: str) -> None:
    given = case(shape, rank=2, delta=2e-5)
    _, near = updated(given, None)
    _, kept = updated(given, preserve())
    before, after = near.survival("bfloat16"), kept.survival("bfloat16")
    assert before.error_along_inputs is not None and after.error_along_inputs is not None
    assert after.error_along_inputs < 0.4 * before.error_along_inputs
    assert kept.survival_to_nearest("bfloat16") == before


def test_rank_as_large_as_the_inputs_leaves_nothing_but_the_nearest() -> None:
    given = case("outputs first", rank=48)
    near, _ = updated(given, None)
    kept, _ = updated(given, preserve())
    assert np.array_equal(near, kept)


def test_inputs_that_the_adapter_does_not_look_at_are_to_nearest() -> None:
    given = case("inputs first")
    given.contribution.a[5:15] = 0
    near, _ = updated(given, None)
    kept, _ = updated(given, preserve(), mu=0.0)
    assert np.array_equal(near[5:15], kept[5:15])
    assert not np.array_equal(near, kept)


def test_an_adapter_of_lower_rank_than_stated_has_a_smaller_space() -> None:
    given = case("inputs first", rank=4)
    doubled = np.concatenate([given.contribution.a, given.contribution.a], axis=-1)
    halves = np.concatenate([given.contribution.b, given.contribution.b], axis=-2) / np.float32(2)
    once, _ = updated(given, preserve())
    given.contribution = Contribution(doubled, halves)
    twice, _ = updated(given, preserve())
    assert (once == twice).mean() > 0.97


@pytest.mark.parametrize("choice", [preserve(), stochastic()], ids=lambda choice: choice.method)
def test_values_on_the_grid_stay(choice: Choice) -> None:
    given = case("inputs first")
    given.contribution = Contribution(given.contribution.a, np.zeros_like(given.contribution.b))
    result, _ = updated(given, choice)
    assert np.array_equal(result, given.kernel)


@pytest.mark.parametrize(
    ("dtype", "value", "has_choice"),
    [
        ("bfloat16", 1.001, True),
        ("bfloat16", -1.001, True),
        ("bfloat16", 1.0, False),
        ("bfloat16", 3.39e38, False),
        ("bfloat16", 3.3895e38, True),
        ("bfloat16", -(2.0**-119) * 1.001, True),
        ("bfloat16", 2.0**-119 * 0.999, False),
        ("bfloat16", 0.0, False),
        ("float16", 65510.0, False),
        ("float16", -65519.0, False),
        ("float16", 70000.0, False),
        ("float16", 65500.0, True),
        ("float16", 2.0**-26, True),
        ("float16", -(2.0**-14) * 1.0001, True),
    ],
)
def test_which_entries_have_a_choice(dtype: str, value: float, has_choice: bool) -> None:
    exact = np.array([value], np.float32)
    found = jax.device_get(neighbours(jax.device_put(exact), dtype))
    assert (found.step != 0) == has_choice
    if has_choice:
        below, above = around(exact.astype(np.float64), dtype)
        assert sorted([*found.nearest, *(found.nearest + found.step)]) == [*below, *above]


def test_what_the_grid_does_not_reach_leaves_the_walk_alone() -> None:
    given = case("inputs first", dtype="float16")
    wide = given.kernel.astype(np.float32)
    wide[3] = 70000
    given.kernel = wide
    found, _ = updated(given, preserve("float16"), "float32")
    exact, _ = updated(given, None, "float32")
    assert np.array_equal(found[3], exact[3])
    assert np.abs(found - exact).max() <= 2.0**-11 * np.abs(wide[np.abs(wide) < 1]).max()
    assert (found[4:] != exact[4:]).any()


@pytest.mark.parametrize("breaks", ["kernel", "bits"])
def test_a_block_that_fails_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch, breaks: str) -> None:
    monkeypatch.setattr(cutting, "BLOCK_ENTRIES", 100)
    given = case("inputs first")
    device, bfloat16 = jax.devices()[0], dtype_named("bfloat16")
    shape = given.kernel.shape
    update = KernelUpdate("w", given.equation, shape, given.contribution, bfloat16, bfloat16, device, preserve())
    regions = list(grid(full_region(shape), cut(given.equation, shape).block))
    wrong: tuple[Any, Any] = (None, None) if breaks == "kernel" else (given.kernel[regions[1]], np.zeros(3, np.uint16))
    with ThreadPoolExecutor(2) as pool:
        started = [pool.submit(update.compute, regions[0], given.kernel[regions[0]], None)]
        started += [pool.submit(update.compute, regions[1], wrong[0], None, wrong[1])]
        started += [pool.submit(update.compute, region, given.kernel[region], None) for region in regions[2:]]
        assert started[0].exception(60) is None
        assert all(isinstance(future.exception(60), Exception) for future in started[1:])


def test_stochastic_takes_the_outer_neighbour_by_the_bits() -> None:
    given = case("inputs first")
    result, _ = updated(given, stochastic(), seed=7)
    exact = (given.kernel.astype(np.float32) + given.contribution.a @ given.contribution.b).astype(np.float64)
    below, above = around(exact, "bfloat16")
    inner, outer = np.where(np.abs(below) < np.abs(above), [below, above], [above, below])
    share = np.where(inner == outer, 0, (exact - inner) / np.where(inner == outer, 1, outer - inner))
    draws = rounding_bits(7, "w", 0, exact.size).reshape(exact.shape)
    sure = np.abs(draws - share * 2**16) > 8
    expected = np.where(draws < share * 2**16, outer, inner)
    assert np.array_equal(result.astype(np.float64)[sure], expected[sure])
    assert sure.mean() > 0.99


def test_stochastic_keeps_the_mean() -> None:
    given = case("inputs first", delta=1e-5)
    results = [updated(given, stochastic(), seed=seed)[0].astype(np.float64) for seed in range(100)]
    delta = given.exact[0] - given.kernel.astype(np.float64)
    kept = np.mean(results, axis=0) - given.kernel.astype(np.float64)
    assert np.sum(kept * delta) / np.sum(delta * delta) == pytest.approx(1, abs=0.15)


def test_blocks_do_not_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case("outputs first")
    whole, _ = updated(given, stochastic())
    monkeypatch.setattr(cutting, "BLOCK_ENTRIES", 100)
    monkeypatch.setattr(cutting, "TILE_ENTRIES", 50)
    parts, _ = updated(given, stochastic(), jobs=3)
    assert np.array_equal(parts, whole)


@pytest.mark.parametrize("shape", ["inputs first", "outputs first"])
@pytest.mark.parametrize("grid_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["preserve", "stochastic"])
def test_a_wide_file_is_served_as_the_narrow_one(method: Any, grid_dtype: str, shape: str) -> None:
    given = case(shape, dtype=grid_dtype)
    narrow, _ = updated(given, Choice(method, grid_dtype, widened=False), grid_dtype)
    cell, moments = updated(given, Choice(method, grid_dtype, widened=False), "float32")
    widened, _ = updated(given, Choice(method, grid_dtype, widened=True), "float32")
    exact, _ = updated(given, None, "float32")
    assert np.array_equal(cell.astype(dtype_named(grid_dtype)), narrow)
    assert np.array_equal(widened, narrow.astype(np.float32))
    stays = exact.astype(dtype_named(grid_dtype)) == narrow
    assert np.array_equal(cell[stays], exact[stays])
    assert not (cell == exact)[~stays].any()
    # One step of float32 nearer to the result, and servers see the nearest value again.
    back = np.nextafter(np.nextafter(cell, exact), exact)
    assert np.array_equal(back[~stays].astype(dtype_named(grid_dtype)), exact[~stays].astype(dtype_named(grid_dtype)))
    assert moments.moved == np.count_nonzero(~stays)


def test_with_a_base_the_trained_function_is_preserved() -> None:
    given = case("inputs first")
    rng = np.random.default_rng(1)
    base = given.kernel.astype(np.float32) * (1 + 2.0**-9 * rng.uniform(-0.9, 0.9, given.kernel.shape)).astype(
        np.float32
    )
    assert np.array_equal(base.astype(given.kernel.dtype), given.kernel)
    without, _ = updated(given, preserve())
    narrow, moments = updated(given, preserve(), base=base)
    assert np.array_equal(narrow, without)
    nearest, _ = updated(given, None, base=base)
    wide, _ = updated(given, preserve(), "float32", base=base)
    assert np.array_equal(wide.astype(given.kernel.dtype), without)
    exact, _ = updated(given, None, "float32", base=base)
    stays = exact.astype(given.kernel.dtype) == without
    assert np.array_equal(wide[stays], exact[stays])
    q = nearest.astype(np.float64) - given.kernel.astype(np.float64)
    assert moments.nearest is not None
    assert moments.nearest.unchanged == np.count_nonzero(q == 0)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32), st.floats(1e-6, 1e-2), st.sampled_from([1, 4, 8]), st.sampled_from(["bfloat16", "float16"])
)
def test_what_is_left_along_the_inputs_does_not_grow_with_them(seed: int, delta: float, rank: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    inputs, outputs = 256, 4
    a = rng.standard_normal((inputs, rank)).astype(np.float32)
    b = (delta * rng.standard_normal((rank, outputs)) / np.sqrt(rank)).astype(np.float32)
    kernel = (0.02 * rng.standard_normal((inputs, outputs))).astype(dtype_named(dtype))
    given = Case(Equation("ir,ro->io"), kernel, Contribution(a, b), np.empty(0), a[None].astype(np.float64))
    kept, _ = updated(given, preserve(dtype), dtype, mu=0.0)
    exact = kernel.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)
    u, _, _ = np.linalg.svd(a.astype(np.float64), full_matrices=False)
    left = np.abs(u.T @ (kept.astype(np.float64) - exact)).max()
    step = np.abs(np.subtract(*around(exact, dtype))).max()
    # A walk at random would end at about step * sqrt(12)^-1, with a tail; feedback ends within a share of one step.
    assert left < 3 * step * rank * np.sqrt(rank / inputs)


def test_which_leaves_have_a_choice() -> None:
    asked = Rounding("preserve")
    bfloat16, float32 = dtype_named("bfloat16"), dtype_named("float32")
    assert leaf_rounding(asked, bfloat16, bfloat16).grid == bfloat16
    assert leaf_rounding(asked, dtype_named("float16"), bfloat16).grid == dtype_named("float16")
    assert leaf_rounding(asked, float32, bfloat16).grid == bfloat16
    assert leaf_rounding(Rounding(), float32, bfloat16).grid is None
    for stored, served in ((float32, float32), (dtype_named("float8_e4m3fn"), bfloat16)):
        found = leaf_rounding(asked, stored, served)
        assert found.method == "nearest" and found.reason is not None and stored.name in found.reason
    assert leaf_rounding(asked, bfloat16, bfloat16, spaceless=DENSE).reason == DENSE
    assert leaf_rounding(Rounding("stochastic"), bfloat16, bfloat16, spaceless=DENSE).method == "stochastic"
    assert leaf_rounding(Rounding("stochastic"), bfloat16, bfloat16, on_host=True).method == "nearest"
    assert penalty(2.0, 16, 2048) == 2.0 * 16 / 2048


@pytest.mark.parametrize("wrong", [{"mu": -1.0}, {"mu": float("nan")}, {"method": "up"}, {"serving_values": "all"}])
def test_senseless_roundings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Rounding(**wrong)


def test_how_a_delta_is_split_between_its_factors_does_not_matter() -> None:
    given, rng = case("inputs first", rank=2), np.random.default_rng(5)
    more = rng.standard_normal((48, 2)).astype(np.float32)
    rows = (2e-4 * rng.standard_normal((2, 20))).astype(np.float32)
    results = []
    for size in (1.0, 2.0**-20):
        a = np.concatenate([given.contribution.a, more * np.float32(size)], axis=-1)
        b = np.concatenate([given.contribution.b, rows / np.float32(size)], axis=-2)
        results.append(
            updated(Case(given.equation, given.kernel, Contribution(a, b), given.exact, given.inputs), preserve())
        )
    (one, measured), (other, again) = results
    assert (one == other).mean() > 0.97
    assert measured.rank == again.rank == 4


def test_an_adapter_that_adds_nothing_has_no_say() -> None:
    given, rng = case("outputs first"), np.random.default_rng(5)
    alone, measured = updated(given, preserve())
    a = np.concatenate([given.contribution.a, rng.standard_normal((48, 3)).astype(np.float32)], axis=-1)
    b = np.concatenate([given.contribution.b, np.zeros((3, 20), np.float32)], axis=-2)
    both, again = updated(Case(given.equation, given.kernel, Contribution(a, b), given.exact, given.inputs), preserve())
    assert np.array_equal(alone, both)
    assert measured.rank == again.rank == 4


def test_a_midpoint_is_not_left_to_how_ties_are_broken() -> None:
    # Dyadic factors put results exactly between two bfloat16 values.
    rng = np.random.default_rng(3)
    kernel = rng.choice([1.0, 1.0 + 2.0**-7, -1.0, -1.0 - 2.0**-6], (64, 16)).astype(dtype_named("bfloat16"))
    a = rng.choice([-1.0, 1.0, 2.0], (64, 1)).astype(np.float32)
    b = np.full((1, 16), 2.0**-8, np.float32)
    given = Case(Equation("ir,ro->io"), kernel, Contribution(a, b), np.empty(0), a[None].astype(np.float64))
    narrow, _ = updated(given, preserve())
    wide, moments = updated(given, preserve(), "float32")
    bits = wide.view(np.uint32)
    assert not (bits & np.uint32(0xFFFF) == 0x8000).any()
    away = ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
    assert np.array_equal(away, narrow.astype(np.float32))
    assert moments.moved


@pytest.mark.parametrize("choice", [preserve("float16"), stochastic("float16")], ids=lambda choice: choice.method)
def test_a_negative_zero_stays_one(choice: Choice) -> None:
    kernel = np.full((8, 4), -0.0, np.float16)
    given = Case(
        Equation("ir,ro->io"),
        kernel,
        Contribution(np.ones((8, 1), np.float32), np.zeros((1, 4), np.float32)),
        np.empty(0),
        np.ones((1, 8, 1)),
    )
    near, _ = updated(given, None, "float16")
    found, _ = updated(given, choice, "float16")
    assert np.array_equal(np.signbit(found), np.signbit(near))
