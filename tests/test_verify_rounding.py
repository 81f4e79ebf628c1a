"""The judge of other roundings than to nearest, against a plain walk along the inputs, entry by entry as the definition says."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge_cli.draws import rounding_bits
from lora_merge_cli.equation import Equation
from lora_merge_cli.records import AdapterSite, Forward, LowRank, Scale, full_region, grid
from lora_merge_cli.rounding import LeafRounding, Rounding
from lora_merge_cli.verification import site_judge
from lora_merge_cli.verification.adapted import Adapted
from lora_merge_cli.verification.choices import Chosen
from lora_merge_cli.verification.mixture import MixtureJudge
from lora_merge_cli.verification.row_judge import RowJudge
from lora_merge_cli.verification.site_judge import LayerVerdict, SiteJudge, Terms
from tests.judged import Case as Checkpoint
from tests.judged import checks_of, failed, message
from tests.test_judge_arithmetic import LAYOUTS, Layout
from tests.trees import ACTION, BFLOAT16, PALIGEMMA, build

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
RANK, SCALE, NAME = 4, 1.5, "the/kernel"

SHAPES = LAYOUTS | {
    "stacked": Layout(
        "ldr,lro->ldo", Forward("btd,do->bto", "btd,dr->btr", "btr,ro->bto"), (2, 90, 40), (2, 90, RANK), (2, RANK, 40)
    ),
    "embedding": Layout(
        "rv,dr->vd", Forward("btv,vd->btd", "btv,rv->btr", "btr,dr->btd"), (130, 40), (RANK, 130), (40, RANK)
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_judge, "_ENTRIES", 2**10)
        patch.setattr(site_judge, "_COLUMNS", 32)
        patch.setattr(site_judge, "_WALKED", 16)
        yield


@dataclasses.dataclass(frozen=True)
class Factors:
    """One adapter."""

    a: Any
    b: Any
    magnitude: Any = None
    """DoRA's, dims batch, outputs."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and its adapters."""

    layout: Layout
    w: Any
    adapters: tuple[Factors, ...]
    base: Any = None

    @property
    def equation(self) -> Equation:
        return Equation(self.layout.equation)

    @property
    def site(self) -> AdapterSite:
        parameters = LowRank(RANK, Scale(SCALE, "test"), self.equation)
        return AdapterSite((("w",),), "add_delta", {}, parameters, self.layout.forward, "", "", "w")

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """Matrices, inputs, outputs."""
        extents = dict(zip(self.equation.target, self.w.shape, strict=True))
        dims = (self.equation.batch, self.equation.inputs, self.equation.outputs)
        matrices, inputs, outputs = (math.prod(extents[dim] for dim in part) for part in dims)
        return matrices, inputs, outputs

    @property
    def order(self) -> list[int]:
        equation = self.equation
        return [equation.target.index(dim) for dim in equation.batch + equation.inputs + equation.outputs]

    def matrices(self, values: Any) -> Any:
        """A kernel's entries as matrices by inputs by outputs."""
        return np.transpose(values, self.order).reshape(self.matrix_shape)

    def kernel(self, matrices: Any) -> Any:
        """The reverse of `matrices`."""
        shape = [self.w.shape[axis] for axis in self.order]
        return np.transpose(matrices.reshape(shape), np.argsort(self.order))

    def left(self, adapter: Factors) -> Any:
        """lora_a as matrices by inputs by rank."""
        equation = self.equation
        dims = equation.batch + equation.inputs + equation.rank
        moved = np.transpose(adapter.a, [equation.a.index(dim) for dim in dims])
        return moved.reshape(self.matrix_shape[0], self.matrix_shape[1], -1)

    def delta(self, adapter: Factors) -> Any:
        """Of one adapter without DoRA, float32."""
        return self.matrices(np.einsum(self.layout.equation, adapter.a, np.float32(SCALE) * adapter.b))

    def gain(self, adapter: Factors) -> Any:
        """DoRA's magnitude over the norm, float32, matrices by outputs."""
        changed = self.matrices(self.w.astype(np.float32)) + self.delta(adapter)
        return adapter.magnitude.reshape(len(changed), -1) / np.sqrt(np.square(changed).sum(axis=1))

    def result(self, kernel: Any) -> Any:
        """What the adapters make of a kernel, float32, as matrices."""
        changed = start = self.matrices(kernel.astype(np.float32))
        for adapter in self.adapters:
            if adapter.magnitude is None:
                changed = changed + self.delta(adapter)
            else:
                gain = self.gain(adapter)[:, None, :]
                changed = changed + ((gain - 1) * start + gain * self.delta(adapter))
        return changed

    def judged(
        self, merged: Any, asked: Rounding, grid_: np.dtype, block: tuple[int, ...] | None = None
    ) -> dict[int, LayerVerdict]:
        parts = [self._adapted(adapter) for adapter in self.adapters]
        chosen = Chosen.of(LeafRounding(asked.method, grid_), asked, NAME, self.w.shape)
        layers = range(self.w.shape[0]) if self.equation.stacked else (0,)
        terms = Terms(grid_, 0.5, 1.0, rounding=asked)
        judge = SiteJudge("x", parts, self.w.shape, merged.dtype, terms, layers, chosen)
        with ThreadPoolExecutor(2) as pool:
            for region in grid(full_region(self.w.shape), block or self.w.shape):
                base = None if self.base is None else self.base[region]
                judge.take(region, self.w[region], merged[region], base, pool)
        return judge.finish()

    def _adapted(self, adapter: Factors) -> Adapted:
        a, b = adapter.a.astype(np.float64), adapter.b.astype(np.float64)
        if adapter.magnitude is None:
            return Adapted(self.site, a, b, 1.0)
        delta = self.matrices(np.einsum(self.layout.equation, a, SCALE * b))
        norms = np.linalg.norm(self.matrices(self.w.astype(np.float64)) + delta, axis=1)
        return Adapted(
            self.site, a, b, 1.0, adapter.magnitude.astype(np.float64) / norms.reshape(adapter.magnitude.shape)
        )


def make(
    shape: str = "inputs first",
    seed: int = 0,
    *,
    grid_: np.dtype = BFLOAT16,
    adapters: int = 1,
    dora: bool = False,
    base: bool = False,
    size: float = 0.3,
) -> Kernel:
    """A kernel whose delta is about `size` steps of the grid."""
    rng, layout = np.random.default_rng(seed), SHAPES[shape]

    def normal(shape: tuple[int, ...]) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    step = 0.02 * 2.0 ** (-8 if grid_ == BFLOAT16 else -11)
    wide = 0.02 * normal(layout.shape)
    w = wide.astype(grid_)
    found = [
        Factors(normal(layout.a), size * step / (SCALE * RANK**0.5 * adapters**0.5) * normal(layout.b))
        for _ in range(adapters)
    ]
    kernel = Kernel(layout, w, tuple(found), wide if base else None)
    if dora:
        changed = kernel.matrices(w.astype(np.float32)) + kernel.delta(found[0])
        norms = np.sqrt(np.square(changed).sum(axis=1))
        extents = dict(zip(kernel.equation.target, w.shape, strict=True))
        dims = [extents[dim] for dim in kernel.equation.batch + kernel.equation.outputs]
        magnitude = (norms * (1 + 1e-3 * normal(norms.shape))).reshape(dims)
        kernel = dataclasses.replace(kernel, adapters=(dataclasses.replace(found[0], magnitude=magnitude), *found[1:]))
    return kernel


def both_neighbours(values: Any, to: np.dtype) -> tuple[Any, Any]:
    """The nearest value of a dtype, and the one on the other side; float32."""
    nearest = values.astype(to)
    wide = nearest.astype(np.float32)
    towards = np.where(values > wide, np.inf, -np.inf).astype(to)
    with np.errstate(all="ignore"):
        other = np.nextafter(nearest, towards).astype(np.float32)
    return wide, np.where(np.isfinite(other), other, wide)


def walk(values: Any, basis: Any, mu: float, to: np.dtype, *, feedback: bool = True) -> Any:
    """One matrix, inputs by outputs, float32: of the two neighbours the one with the smaller |s + u e|^2 + penalty e^2."""
    penalty = mu * np.count_nonzero(np.abs(basis).max(axis=0)) / len(basis)
    sums = np.zeros((basis.shape[1], values.shape[1]), np.float32)
    chosen = np.empty_like(values)
    for i, (row, u) in enumerate(zip(values, basis.astype(np.float32), strict=True)):
        nearest, other = both_neighbours(row, to)
        here = sums if feedback else np.zeros_like(sums)
        costs = [
            np.square(here.astype(np.float64) + np.outer(u, c - row)).sum(axis=0)
            + penalty * np.square((c - row).astype(np.float64))
            for c in (nearest, other)
        ]
        chosen[i] = np.where((costs[1] < costs[0]) & (row != nearest), other, nearest)
        sums += np.outer(u, chosen[i] - row).astype(np.float32)
    return chosen


def span(a: Any) -> Any:
    """An orthonormal basis of the columns of a matrix; columns of zeros for directions that carry nothing."""
    left, singular, _ = np.linalg.svd(a.astype(np.float64), full_matrices=False)
    return left * (singular > 1e-6 * singular[0]) * a.any(axis=1, keepdims=True)


def preserved(kernel: Kernel, mu: float, to: np.dtype, **how: Any) -> Any:
    """What `preserve` chooses, as matrices."""
    basis = np.concatenate([kernel.left(adapter) for adapter in kernel.adapters], axis=-1)
    aim = kernel.result(kernel.w)
    return np.stack([walk(values, span(a), mu, to, **how) for values, a in zip(aim, basis, strict=True)])


def drawn(kernel: Kernel, seed: int, to: np.dtype, name: str = NAME) -> Any:
    """What `stochastic` chooses, as matrices."""
    values = kernel.kernel(kernel.result(kernel.w if kernel.base is None else kernel.base))
    bits = rounding_bits(seed, name, 0, values.size).reshape(values.shape)
    nearest, other = both_neighbours(values, to)
    inner = np.where(np.abs(nearest) < np.abs(other), nearest, other)
    outer = np.where(np.abs(nearest) < np.abs(other), other, nearest)
    with np.errstate(all="ignore"):
        share = (np.abs(values) - np.abs(inner)) / (np.abs(outer) - np.abs(inner))
    return kernel.matrices(np.where(nearest == values, nearest, np.where(bits < share * 2.0**16, outer, inner)))


def cells(kernel: Kernel, chosen: Any, to: np.dtype) -> Any:
    """The float32 values that a server casts to the chosen ones: the exact ones, or just past the middle."""
    exact = kernel.result(kernel.w if kernel.base is None else kernel.base)
    towards = np.where(exact > chosen, np.inf, -np.inf).astype(to)
    beside = np.nextafter(chosen.astype(to), towards).astype(np.float32)
    past = np.nextafter((chosen + beside) / 2, chosen)
    return np.where(exact.astype(to).astype(np.float32) == chosen, exact, past)


def verdict(
    kernel: Kernel, matrices: Any, asked: Rounding, to: np.dtype = BFLOAT16, stored: np.dtype | None = None, **how: Any
) -> LayerVerdict:
    """The worst layer's."""
    found = kernel.judged(kernel.kernel(matrices).astype(stored or to), asked, to, **how)
    return max(found.values(), key=lambda each: each.worst_share)


PRESERVE, DRAW = Rounding("preserve"), Rounding("stochastic", seed=3)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two adapters": {"adapters": 2},
    "DoRA": {"dora": True},
    "with a base": {"base": True},
    "large delta": {"size": 20.0},
    "tiny delta": {"size": 1e-3},
}


@pytest.mark.parametrize("to", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("mu", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_preserve_chooses_is_right(shape: str, mu: float, to: np.dtype) -> None:
    kernel = make(shape, grid_=to)
    found = verdict(kernel, preserved(kernel, mu, to), Rounding("preserve", mu=mu), to)
    assert (found.beyond, found.forward.share <= 1) == (0, True), found
    assert found.worst_share <= 1


@pytest.mark.parametrize("shape", ["outputs first", "convolution"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_so_it_is_with_other_adapters(variant: str, shape: str) -> None:
    kernel = make(shape, **VARIANTS[variant])
    for asked, matrices in ((PRESERVE, preserved(kernel, 1.0, BFLOAT16)), (DRAW, drawn(kernel, 3, BFLOAT16))):
        found = verdict(kernel, matrices, asked)
        assert (found.beyond, found.forward.share <= 1) == (0, True), (asked.method, found)


@pytest.mark.parametrize("to", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_stochastic_draws_is_right(shape: str, to: np.dtype) -> None:
    kernel = make(shape, grid_=to)
    found = verdict(kernel, drawn(kernel, 3, to), DRAW, to)
    assert (found.beyond, found.forward.share <= 1) == (0, True), found


@pytest.mark.parametrize("values", ["cell", "widened"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ["preserve", "stochastic"])
def test_a_float32_file_that_servers_cast_is_right(method: str, variant: str, values: Any) -> None:
    kernel = make("heads summed", **VARIANTS[variant])
    chosen = preserved(kernel, 1.0, BFLOAT16) if method == "preserve" else drawn(kernel, 3, BFLOAT16)
    exact = kernel.result(kernel.w if kernel.base is None else kernel.base)
    stored = cells(kernel, chosen, BFLOAT16) if values == "cell" else chosen
    asked = Rounding(method, seed=3, serving_values=values)  # type: ignore[arg-type]
    found = verdict(kernel, stored, asked, BFLOAT16, FLOAT32)
    assert (found.beyond, found.forward.share <= 1) == (0, True), found
    moved = np.count_nonzero(stored != exact)
    assert found.moments.moved == pytest.approx(moved, abs=0.02 * stored.size)
    # Neither kind is the other one, nor the exact result.
    for other in ({"cell": chosen, "widened": cells(kernel, chosen, BFLOAT16)}[values], exact):
        assert np.array_equal(other, stored) or verdict(kernel, other, asked, BFLOAT16, FLOAT32).beyond


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(SHAPES)), st.floats(-3, 2), st.floats(0, 10))
def test_any_right_walk_is_right_in_any_blocks(seed: int, shape: str, size: float, mu: float) -> None:
    kernel = make(shape, seed, size=10**size)
    block = (*(1 for _ in kernel.w.shape[:-2]), max(1, kernel.w.shape[-2] // 3), kernel.w.shape[-1])
    found = verdict(kernel, preserved(kernel, mu, BFLOAT16), Rounding("preserve", mu=mu), block=block)
    assert found.beyond == 0


def with_zeros(kernel: Kernel, rows: slice) -> Kernel:
    """The kernel with a lora_a that does not look at some inputs."""
    a = kernel.adapters[0].a.copy()
    a[rows] = 0
    return dataclasses.replace(kernel, adapters=(dataclasses.replace(kernel.adapters[0], a=a),))


def test_inputs_that_the_adapter_does_not_look_at_are_to_nearest() -> None:
    kernel = with_zeros(make("inputs first", grid_=FLOAT16), slice(10, 30))
    kernel = dataclasses.replace(kernel, w=kernel.w.astype(np.float32) * np.float32(1.0007))
    right = preserved(kernel, 1.0, BFLOAT16)
    nearest, other = both_neighbours(kernel.result(kernel.w), BFLOAT16)
    np.testing.assert_array_equal(right[:, 10:30], nearest[:, 10:30])
    for mu in (0.0, 1.0):
        matrices = preserved(kernel, mu, BFLOAT16)
        assert verdict(kernel, matrices, Rounding("preserve", mu=mu)).beyond == 0
        matrices[0, 12, 5] = other[0, 12, 5]
        assert verdict(kernel, matrices, Rounding("preserve", mu=mu)).beyond == 1


def test_an_adapter_of_lower_rank_than_it_has_and_one_of_zeros() -> None:
    kernel = make("inputs first")
    a = kernel.adapters[0].a.copy()
    a[:, 3] = 2 * a[:, 0]
    for factor in (a, np.zeros_like(a)):
        found = dataclasses.replace(kernel, adapters=(dataclasses.replace(kernel.adapters[0], a=factor),))
        assert verdict(found, preserved(found, 1.0, BFLOAT16), PRESERVE).beyond == 0


def test_an_ill_conditioned_adapter() -> None:
    kernel = make("inputs first")
    a = kernel.adapters[0].a * np.float32([1, 1e-1, 1e-2, 1e-3])
    kernel = dataclasses.replace(kernel, adapters=(dataclasses.replace(kernel.adapters[0], a=a),))
    right = preserved(kernel, 1.0, BFLOAT16)
    assert verdict(kernel, right, PRESERVE).beyond == 0
    assert verdict(kernel, preserved(kernel, 3.0, BFLOAT16), PRESERVE).beyond


def test_values_beyond_the_range_have_no_choice() -> None:
    kernel = make("inputs first", grid_=FLOAT16)
    w = kernel.w.copy()
    w[3:20] = np.finfo(np.float16).max
    delta = dataclasses.replace(kernel.adapters[0], b=np.abs(kernel.adapters[0].b) * np.float32(5e5))
    kernel = dataclasses.replace(kernel, w=w, adapters=(delta,))
    right = preserved(kernel, 1.0, FLOAT16)
    assert np.isfinite(right).all()
    assert verdict(kernel, right, PRESERVE, FLOAT16).beyond == 0
    assert verdict(kernel, drawn(kernel, 3, FLOAT16), DRAW, FLOAT16).beyond == 0


# What makes a wrong result of a kernel: the asked rounding is right.


def shuffled(kernel: Kernel) -> Any:
    """A walk along the inputs in another order."""
    order = np.random.default_rng(1).permutation(kernel.matrix_shape[1])
    aim, a = kernel.result(kernel.w), kernel.left(kernel.adapters[0])
    found = np.empty_like(aim)
    for number, values in enumerate(aim):
        found[number][order] = walk(values[order], span(a[number])[order], 1.0, BFLOAT16)
    return found


def in_halves(kernel: Kernel) -> Any:
    """Walks that forget in the middle, as heads that are taken one by one do."""
    aim, a = kernel.result(kernel.w), kernel.left(kernel.adapters[0])
    half = aim.shape[1] // 2
    found = []
    for number, values in enumerate(aim):
        basis = span(a[number])
        # The penalty is that of the whole.
        mu = half / len(basis)
        found.append(
            np.concatenate(
                [
                    walk(values[:half], basis[:half], mu, BFLOAT16),
                    walk(values[half:], basis[half:], (len(values) - half) / len(basis), BFLOAT16),
                ]
            )
        )
    return np.stack(found)


def of_one_adapter(kernel: Kernel) -> Any:
    """The inputs of the first adapter alone."""
    aim, a = kernel.result(kernel.w), kernel.left(kernel.adapters[0])
    return np.stack([walk(values, span(basis), 1.0, BFLOAT16) for values, basis in zip(aim, a, strict=True)])


def with_unnormalised_inputs(kernel: Kernel) -> Any:
    """lora_a's columns as they are."""
    aim, a = kernel.result(kernel.w), kernel.left(kernel.adapters[0])
    skew = np.triu(np.ones((RANK, RANK)))
    columns = [basis @ skew / np.linalg.norm(basis @ skew) * RANK**0.5 for basis in a]
    return np.stack([walk(values, each, 1.0, BFLOAT16) for values, each in zip(aim, columns, strict=True)])


def aimed_at_the_base(kernel: Kernel) -> Any:
    """The base's own values instead of what was trained on."""
    assert kernel.base is not None
    return preserved(dataclasses.replace(kernel, w=kernel.base), 1.0, BFLOAT16)


def one_entry_off(kernel: Kernel) -> Any:
    """The other neighbour of one of the last entries, which no other one depends on."""
    found = preserved(kernel, 1.0, BFLOAT16)
    nearest, other = both_neighbours(kernel.result(kernel.w), BFLOAT16)
    at = (0, -1, 7)
    found[at] = other[at] if found[at] == nearest[at] else nearest[at]
    return found


def bits_by_output(kernel: Kernel) -> Any:
    """Random bits in the order of the transposed kernel."""
    turned = dataclasses.replace(kernel, w=kernel.w)
    values = kernel.result(kernel.w)
    bits = rounding_bits(3, NAME, 0, values.size).reshape(values.shape[0], values.shape[2], values.shape[1])
    nearest, other = both_neighbours(values, BFLOAT16)
    share = np.abs(values - nearest) / np.abs(other - nearest)
    assert turned.matrix_shape == values.shape
    return np.where(np.swapaxes(bits, 1, 2) < share * 2.0**16, other, nearest)


def to_nearest(kernel: Kernel) -> Any:
    """The nearer neighbours."""
    return both_neighbours(kernel.result(kernel.w), BFLOAT16)[0]


WRONG: dict[str, tuple[Callable[[Kernel], Any], Rounding, dict[str, Any]]] = {
    "to nearest, not preserve": (to_nearest, PRESERVE, {}),
    "to nearest, not stochastic": (to_nearest, DRAW, {}),
    "another mu": (lambda kernel: preserved(kernel, 3.0, BFLOAT16), PRESERVE, {}),
    "a mu a little off": (lambda kernel: preserved(kernel, 1.2, BFLOAT16), PRESERVE, {}),
    "another order": (shuffled, PRESERVE, {}),
    "half by half": (in_halves, PRESERVE, {"shape": "heads summed"}),
    "no feedback": (lambda kernel: preserved(kernel, 1.0, BFLOAT16, feedback=False), PRESERVE, {}),
    "the first adapter's inputs": (of_one_adapter, PRESERVE, {"adapters": 2}),
    "inputs that are no basis": (with_unnormalised_inputs, PRESERVE, {}),
    "one entry off": (one_entry_off, PRESERVE, {}),
    "aimed at the base": (aimed_at_the_base, PRESERVE, {"base": True}),
    "stochastic, not preserve": (lambda kernel: drawn(kernel, 3, BFLOAT16), PRESERVE, {}),
    "preserve, not stochastic": (lambda kernel: preserved(kernel, 1.0, BFLOAT16), DRAW, {}),
    "another seed": (lambda kernel: drawn(kernel, 4, BFLOAT16), DRAW, {}),
    "another leaf's bits": (lambda kernel: drawn(kernel, 3, BFLOAT16, "another"), DRAW, {}),
    "bits of a transposed leaf": (bits_by_output, DRAW, {}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_choice_is_found(name: str) -> None:
    wrong, asked, options = WRONG[name]
    kernel = make(options.get("shape", "inputs first"), **{k: v for k, v in options.items() if k != "shape"})
    found = verdict(kernel, wrong(kernel), asked)
    assert found.beyond and found.worst_share > 1
    if name == "one entry off":
        assert found.beyond == 1
    if "base" not in options:
        assert found.no_neighbours == 0
    # Without feedback every choice is the nearer one.
    assert found.not_nearest != name.startswith(("to nearest", "no feedback"))


@pytest.mark.parametrize("shape", ["inputs first", "outputs first", "per head"])
def test_what_to_nearest_would_keep_is_that_of_the_definition(shape: str) -> None:
    kernel = make(shape)
    found = verdict(kernel, preserved(kernel, 1.0, BFLOAT16), PRESERVE).moments
    w, ideal = kernel.matrices(kernel.w.astype(np.float64)), kernel.result(kernel.w).astype(np.float64)
    q, delta = to_nearest(kernel) - w, ideal - w
    survival = found.survival_to_nearest("bfloat16")
    assert survival is not None
    assert survival.gain == pytest.approx((q * delta).sum() / (delta**2).sum(), rel=1e-4)
    basis = np.stack([span(a) for a in kernel.left(kernel.adapters[0])])
    along, wanted = (np.einsum("bir,bio->bro", basis, values) for values in (q, delta))
    assert survival.gain_along_inputs == pytest.approx((along * wanted).sum() / (wanted**2).sum(), rel=1e-4)
    kept = found.survival("bfloat16").gain_along_inputs
    assert kept is not None and abs(kept - 1) < abs(survival.gain_along_inputs - 1)


def test_a_walk_that_is_not_judged_in_its_order_is_refused() -> None:
    kernel = make("inputs first")
    merged = kernel.kernel(preserved(kernel, 1.0, BFLOAT16)).astype(BFLOAT16)
    chosen = Chosen.of(LeafRounding("preserve", BFLOAT16), PRESERVE, NAME, kernel.w.shape)
    judge = SiteJudge(
        "x", [kernel._adapted(kernel.adapters[0])], kernel.w.shape, BFLOAT16, Terms(BFLOAT16, 0.5, 1.0), (0,), chosen
    )
    region = (slice(20, 70), slice(0, 100))
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="in its order"):
        judge.take(region, kernel.w[region], merged[region], None, pool)


@pytest.mark.parametrize("to", [BFLOAT16, FLOAT16], ids=str)
def test_the_judge_sees_no_less_at_a_realistic_size(to: np.dtype) -> None:
    """2048 inputs: what float32 adds up in between hides no wrong choice."""
    layout = Layout("ir,ro->io", SHAPES["inputs first"].forward, (2048, 24), (2048, 16), (16, 24))
    rng = np.random.default_rng(0)
    w = (0.02 * rng.standard_normal(layout.shape)).astype(to)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in (layout.a, layout.b))
    kernel = Kernel(layout, w, (Factors(a, np.float32(1e-5 / 6 * (1 if to == BFLOAT16 else 0.125)) * b),))
    right = preserved(kernel, 1.0, to)
    assert verdict(kernel, right, PRESERVE, to).beyond == 0
    other = preserved(kernel, 1.1 if to == BFLOAT16 else 1.5, to)
    differing = np.count_nonzero(other != right)
    assert verdict(kernel, other, PRESERVE, to).beyond > 0.01 * differing > 0


# What an interpolation does to leaves without an adapter, and operations that are no low-rank product.


def mixture(values: Any, tuned: Any, anchor: Any, asked: Rounding, to: np.dtype, alpha: float = 0.3) -> int:
    chosen = Chosen.of(LeafRounding("stochastic", to), asked, NAME, values.shape)
    judge = MixtureJudge((alpha,), values.dtype, 0.5, chosen=chosen)
    with ThreadPoolExecutor(1) as pool:
        for start in range(0, len(values), 30):
            region = (slice(start, min(start + 30, len(values))), slice(0, values.shape[1]))
            judge.take(0, tuned[region], anchor[region], values[region], pool, None, region)
    return judge.finish().wrong


@pytest.mark.parametrize("values", ["narrow", "cell", "widened"])
def test_a_mixture_is_drawn(values: str) -> None:
    rng = np.random.default_rng(2)
    anchor = rng.standard_normal((100, 40)).astype(np.float32)
    tuned = (anchor + 0.01 * rng.standard_normal(anchor.shape)).astype(np.float32)
    tuned[:10] = anchor[:10]
    exact = anchor + np.float32(0.3) * (tuned - anchor)
    layout = Layout("ir,ro->io", SHAPES["inputs first"].forward, anchor.shape, (100, 1), (1, 40))
    kernel = Kernel(layout, exact, (Factors(np.zeros((100, 1), np.float32), np.zeros((1, 40), np.float32)),))
    chosen = np.where(tuned == anchor, to_nearest(kernel)[0], drawn(kernel, 3, BFLOAT16)[0])
    stored = {"narrow": chosen.astype(BFLOAT16), "cell": cells(kernel, chosen, BFLOAT16)[0], "widened": chosen}[values]
    asked = Rounding("stochastic", seed=3, serving_values="widened" if values == "widened" else "cell")
    assert mixture(stored, tuned, anchor, asked, BFLOAT16) == 0
    assert mixture(stored, tuned, anchor, dataclasses.replace(asked, seed=4), BFLOAT16) > 100
    assert mixture(exact.astype(stored.dtype), tuned, anchor, asked, BFLOAT16) > 100


def test_a_kernel_of_other_operations_is_drawn() -> None:
    kernel = make("outputs first", size=3.0)
    chosen = Chosen.of(LeafRounding("stochastic", BFLOAT16), DRAW, NAME, kernel.w.shape)
    parts = [kernel._adapted(kernel.adapters[0])]
    for seed, right in ((3, True), (4, False)):
        merged = kernel.kernel(drawn(kernel, seed, BFLOAT16)).astype(BFLOAT16)
        judge = RowJudge("x", parts, BFLOAT16, Terms(BFLOAT16, 0.5, 1.0), 1.0, chosen)
        found = judge.judge(kernel.w, merged, None)
        assert (found.beyond == 0) == right
        assert found.no_neighbours == 0


# The command.


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path, build(PALIGEMMA, ACTION, delta=0.02))


@pytest.mark.parametrize(
    "flags",
    [
        ("--dtype", "bfloat16", "--rounding", "preserve", "--mu", "2.5"),
        ("--dtype", "bfloat16", "--rounding", "stochastic", "--seed", "7"),
        ("--dtype", "float32", "--rounding", "preserve"),
        ("--dtype", "float32", "--rounding", "preserve", "--serving-dtype", "float16", "--serving-values", "widened"),
    ],
    ids=" ".join,
)
def test_a_merge_passes_with_its_own_flags(checkpoint: Checkpoint, flags: tuple[str, ...]) -> None:
    merged = checkpoint.merge(*flags)
    outcome = checkpoint.verify(merged, *flags)
    assert failed(outcome) == set()
    rounding = outcome.json["rounding"]
    assert (rounding["method"], rounding["serving_values"] is not None) == (flags[3], flags[1] == "float32")
    assert all(site["rounding"] == flags[3] and site["nearest"] is not None for site in outcome.json["sites"])
    survival = next(check for check in outcome.json["checks"] if check["id"] == "delta-survival")
    role = "served" if flags[1] == "float32" else "stored"
    assert survival["figures"][f"nearest_gain_{role}"] < 1
    provenance = json.loads((merged / "lora_merge.json").read_text())
    for site, other in zip(outcome.json["sites"], provenance["sites"], strict=True):
        assert site["nearest"]["gain"] == pytest.approx(other["nearest"]["gain"], rel=1e-3)
        assert site["nearest"]["gain_along_inputs"] == pytest.approx(other["nearest"]["gain_along_inputs"], rel=1e-3)


def test_other_flags_than_those_of_the_merge_fail_and_are_named(checkpoint: Checkpoint) -> None:
    merged = checkpoint.merge("--dtype", "bfloat16", "--rounding", "preserve")
    outcome = checkpoint.verify(merged)
    assert {"fused-exact", "provenance"} <= failed(outcome)
    assert "pass the --rounding that it was made with" in message(outcome, "fused-exact")
    assert "pass --rounding preserve" in message(outcome, "provenance")
    outcome = checkpoint.verify(merged, "--rounding", "preserve", "--mu", "3")
    assert {"fused-exact", "provenance"} <= failed(outcome)
    assert "another --mu, or" in message(outcome, "fused-exact")
    assert failed(checkpoint.verify(merged, "--rounding", "any")) == set()
    nearest = checkpoint.merge("--dtype", "bfloat16")
    outcome = checkpoint.verify(nearest, "--rounding", "preserve")
    assert {"fused-exact", "provenance"} <= failed(outcome)
    assert "as if rounded to nearest" in message(outcome, "fused-exact")
    assert checks_of(checkpoint.verify(nearest))["provenance"] == "pass"


def test_a_seed_of_another_merge_is_named(checkpoint: Checkpoint) -> None:
    merged = checkpoint.merge("--dtype", "bfloat16", "--rounding", "stochastic", "--seed", "7")
    outcome = checkpoint.verify(merged, "--rounding", "stochastic")
    assert "pass --rounding stochastic --seed 7" in message(outcome, "provenance")
    (merged / "lora_merge.json").unlink()
    outcome = checkpoint.verify(merged, "--rounding", "stochastic")
    assert failed(outcome) == {"fused-exact"} or failed(outcome) == {"fused-exact", "forward"}
    assert "another --seed, or" in message(outcome, "fused-exact")


def test_sampled_layers_are_judged_alike(checkpoint: Checkpoint) -> None:
    for method in ("preserve", "stochastic"):
        flags = ("--dtype", "bfloat16", "--rounding", method)
        assert failed(checkpoint.verify(checkpoint.merge(*flags), *flags, "--sample", "2")) == set()
