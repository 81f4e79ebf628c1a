"""The judge's arithmetic in pieces, against plain formulas on whole kernels, and what it has to catch anywhere in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.dtypes import ulp
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.records import AdapterSite, Forward, LowRank, Scale, full_region
from lora_merge_cli.verification import site_judge
from lora_merge_cli.verification.adapted import Adapted
from lora_merge_cli.verification.model_layer import INPUTS, layer_inputs
from lora_merge_cli.verification.site_judge import LayerVerdict, SiteJudge, Terms
from tests.trees import BFLOAT16

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
SCALE, RANK = 1.5, 4


@dataclass(frozen=True)
class Layout:
    """A kernel of more than one piece, with a remainder on each axis."""

    equation: str
    forward: Forward
    shape: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]


LAYOUTS = {
    "inputs first": Layout(
        "ir,ro->io", Forward("bti,io->bto", "bti,ir->btr", "btr,ro->bto"), (70, 100), (70, RANK), (RANK, 100)
    ),
    "outputs first": Layout(
        "ri,or->oi", Forward("bti,oi->bto", "bti,ri->btr", "btr,or->bto"), (100, 70), (RANK, 70), (100, RANK)
    ),
    "heads summed": Layout(
        "nhr,mrd->nhd",
        Forward("btnh,nhd->btd", "btnh,nhr->btr", "btr,nrd->btd"),
        (3, 30, 100),
        (3, 30, RANK),
        (3, RANK, 100),
    ),
    "per head": Layout(
        "ndr,nrh->ndh",
        Forward("btd,ndh->btnh", "btd,ndr->btnr", "btnr,nrh->btnh"),
        (2, 70, 50),
        (2, 70, RANK),
        (2, RANK, 50),
    ),
    "experts": Layout(
        "eri,ore->eoi",
        Forward("btei,eoi->bteo", "btei,eri->bter", "bter,ore->bteo"),
        (2, 50, 70),
        (2, RANK, 70),
        (50, RANK, 2),
    ),
    "convolution": Layout(
        "rixy,or->oixy",
        Forward("btixy,oixy->bto", "btixy,rixy->btr", "btr,or->bto"),
        (100, 8, 3, 3),
        (RANK, 8, 3, 3),
        (100, RANK),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_judge, "_ENTRIES", 2**10)
        patch.setattr(site_judge, "_COLUMNS", 32)
        yield


def site_of(layout: Layout) -> AdapterSite:
    equation = Equation(layout.equation)
    parameters = LowRank(layout.a[equation.a.index(equation.rank)], Scale(SCALE, "test"), equation)
    return AdapterSite((("w",),), "add_delta", {}, parameters, layout.forward, "", "", "w")


@dataclass(frozen=True)
class Case:
    """A kernel, its adapter, and the float64 ideal of both."""

    site: AdapterSite
    w: Any
    a: Any
    b: Any

    @property
    def delta(self) -> Any:
        a, b = self.a.astype(np.float64), self.b.astype(np.float64)
        return SCALE * np.einsum(self.site.parameters.equation.text, a, b, optimize=True)

    @property
    def ideal(self) -> Any:
        return self.w.astype(np.float64) + self.delta

    def judged(self, merged: Any, serving: np.dtype = BFLOAT16) -> LayerVerdict:
        adapted = Adapted(self.site, self.a.astype(np.float64), self.b.astype(np.float64), 1.0)
        judge = SiteJudge("x", [adapted], self.w.shape, merged.dtype, Terms(serving, 0.5, 1.0), (0,))
        with ThreadPoolExecutor(2) as pool:
            judge.take(full_region(self.w.shape), self.w, merged, None, pool)
        return judge.finish()[0]


def case_of(name: str, dtype: np.dtype, size: float = 0.2) -> Case:
    rng = np.random.default_rng(sorted(LAYOUTS).index(name))
    layout = LAYOUTS[name]
    w, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in (layout.shape, layout.a, layout.b))
    return Case(site_of(layout), w.astype(dtype), a, np.float32(size) * b)


def steps_up(values: Any, where: tuple[int, ...], steps: int) -> None:
    """So many representable values further from 0."""
    bits = values.view(np.dtype(f"u{values.dtype.itemsize}"))
    bits[where] += steps


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_figures_are_those_of_the_whole_kernel(name: str, dtype: np.dtype) -> None:
    case = case_of(name, BFLOAT16, 0.02)
    merged = case.ideal.astype(dtype)
    found = case.judged(merged)
    moments, w, m = found.moments, case.w.astype(np.float64), merged.astype(np.float64)
    assert moments.entries == w.size
    assert moments.delta_sq == pytest.approx(np.square(case.delta).sum(), rel=1e-12)
    assert moments.kernel_sq == pytest.approx(np.square(w).sum(), rel=1e-12)
    assert moments.max_abs == pytest.approx(np.abs(case.delta).max(), rel=1e-12)
    for stored in {dtype, BFLOAT16}:
        q = merged.astype(stored).astype(np.float64) - case.w.astype(stored).astype(np.float64)
        sums = moments.realised[stored.name]
        assert sums.unchanged == np.count_nonzero(q == 0)
        assert sums.q_dot_d == pytest.approx((q * case.delta).sum(), rel=1e-12)
        assert sums.error_sq == pytest.approx(np.square(q - case.delta).sum(), rel=1e-9)
    error = np.abs(m - case.ideal)
    assert found.worst_share <= 1 and found.forward.share <= 1 and found.beyond == 0
    # The rounding alone is below the bound, and the bound little above it where a kernel's entries are as coarse.
    rounding = (error / (0.5 * ulp(case.ideal, dtype))).max()
    assert found.worst_share <= rounding
    if dtype == BFLOAT16:
        assert found.worst_share >= 0.99 * rounding


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_forward_is_that_of_the_trainer(name: str) -> None:
    case = case_of(name, FLOAT32)
    exact = case.judged(case.ideal).forward
    assert exact.error is not None and exact.error < 1e-12
    # Three quarters of the delta leave a quarter of it as error, for whatever input.
    short = case.judged(case.w.astype(np.float64) + 0.75 * case.delta).forward
    assert short.error == pytest.approx(0.25, rel=1e-9)


@pytest.mark.parametrize("serving", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_served_forward_is_that_of_the_served_delta(name: str, serving: np.dtype) -> None:
    case = case_of(name, FLOAT32, 0.02)
    merged = case.ideal.astype(np.float32)
    forward = case.site.forward
    dims, kernel_dims = forward.base.split("->")[0].split(",")
    a, b = case.a.astype(np.float64), case.b.astype(np.float64)
    sizes = dict(zip(kernel_dims, case.w.shape, strict=True))
    x = layer_inputs(forward, dims, sizes, a, np.random.default_rng(0))
    change = SCALE * np.einsum(forward.up, np.einsum(forward.down, x, a), b)
    q = merged.astype(serving).astype(np.float64) - case.w.astype(serving).astype(np.float64)
    error = np.einsum(forward.base, x, q) - change
    position = forward.base.split("->")[1].index("t")
    squares = [np.square(np.moveaxis(part, position, 0)).reshape(INPUTS, -1).sum(axis=1) for part in (error, change)]
    found = case.judged(merged, serving).forward.served
    # The difference of two float64 products where nothing is cast: as exact as the larger ones are.
    assert found == pytest.approx(np.sqrt(np.mean(squares[0] / squares[1])), rel=1e-6)


@pytest.mark.parametrize("serving", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_served_is_the_cast_of_both(name: str, serving: np.dtype) -> None:
    case = case_of(name, FLOAT32, 1e-3)
    merged = case.ideal.astype(np.float32)
    # Ties between two values of the serving dtype go to the even one.
    merged.reshape(-1).view(np.uint32)[::3] = merged.reshape(-1).view(np.uint32)[::3] & 0xFFFF0000 | 0x8000
    q = merged.astype(serving).astype(np.float64) - case.w.astype(serving).astype(np.float64)
    sums = case.judged(merged, serving).moments.realised[serving.name]
    assert sums.unchanged == np.count_nonzero(q == 0)
    assert sums.error_sq == pytest.approx(np.square(q - case.delta).sum(), rel=1e-9)


PLACES = ("first", "middle", "last")


def place_of(shape: tuple[int, ...], place: str) -> tuple[int, ...]:
    return tuple({"first": 0, "middle": n // 2, "last": n - 1}[place] for n in shape)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_wrong_entry_is_found_wherever_it_is(name: str, dtype: np.dtype, place: str) -> None:
    case = case_of(name, BFLOAT16)
    right = case.ideal.astype(dtype)
    where = place_of(right.shape, place)
    # A float32 sum may be off by some ulps of its terms, whatever it comes to.
    steps = 2 if dtype == BFLOAT16 else 2**12
    for break_it in (lambda values: steps_up(values, where, steps), lambda values: values.__setitem__(where, np.nan)):
        wrong = right.copy()
        break_it(wrong)
        found = case.judged(wrong)
        assert found.beyond == 1 and found.worst_share > 1
        assert found.non_finite == np.count_nonzero(~np.isfinite(wrong.astype(np.float64)))
        assert np.isfinite(found.moments.realised[dtype.name].error_sq)


def swap_rows(values: Any, ideal: Any) -> Any:
    wrong = values.copy()
    wrong[..., -2:, :] = values[..., -2:, :][..., ::-1, :]
    return wrong


def scale_off(values: Any, ideal: Any) -> Any:
    return ideal.astype(values.dtype)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("break_it", [swap_rows, scale_off])
def test_a_swapped_row_and_a_scale_off_by_one_percent_are_found(
    break_it: Callable[[Any, Any], Any], name: str, dtype: np.dtype
) -> None:
    case = case_of(name, BFLOAT16, 1.0)
    right = case.ideal.astype(dtype)
    assert case.judged(right).beyond == 0
    found = case.judged(break_it(right, case.ideal + 0.01 * case.delta))
    assert found.beyond > 0 and found.worst_share > 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_kernel_that_is_not_finite_is_refused(value: float, place: str) -> None:
    case = case_of("outputs first", BFLOAT16)
    merged = case.ideal.astype(BFLOAT16)
    case.w[place_of(case.w.shape, place)] = value
    with pytest.raises(NonFiniteInput):
        case.judged(merged)


@given(st.integers(1, 40), st.integers(-40, 40), st.integers(0, 2**32 - 1))
def test_an_error_of_the_sharper_bound_stays_below_the_bound(rank: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((5, rank)) * rng.choice([1e-6, 1.0], (5, rank)) * 2.0**size
    b = rng.standard_normal((rank, 6)) * rng.choice([1e-6, 1.0], (rank, 6))
    layout = Layout("ir,ro->io", LAYOUTS["inputs first"].forward, (5, 6), a.shape, b.shape)
    w = rng.standard_normal((5, 6)).astype(np.float32)
    case = Case(site_of(layout), w, a, b)
    steps = rank + 1
    allowed = steps * 2.0**-24 * (np.abs(w) + SCALE * np.abs(a) @ np.abs(b))
    # float64 holds the whole error: no rounding comes to it.
    found = case.judged(case.ideal + allowed * rng.choice([-1.0, 1.0], w.shape))
    assert found.beyond == 0 and found.worst_share <= 1


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_ulp_is_the_gap_to_the_next_value_for_every_value(dtype: np.dtype) -> None:
    infinity = np.array(np.inf, dtype).view(np.uint16)
    bits = np.arange(infinity, dtype=np.uint16)
    values = np.append(bits, infinity).astype(np.uint16).view(dtype).astype(np.float64)
    # The largest one's gap is that below it.
    gaps = np.diff(values)
    gaps[-1] = gaps[-2]
    out = np.empty(gaps.size)
    ulp(values[:-1], dtype, out=out)
    np.testing.assert_array_equal(out, gaps)
    np.testing.assert_array_equal(ulp(-values[:-1], dtype), gaps)
