"""Operations by row: against float64 NumPy written from what PEFT's layers do to their inputs, and against PEFT's layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import NonFiniteInput, ShapeMismatch
from lora_merge_cli.operations import BY_ROW, Contribution, is_row_operation, row_operation_named
from lora_merge_cli.operations.interface import RowOperands
from lora_merge_cli.operations.row_numerics import apply_contribution, row_change, tile_height
from lora_merge_cli.records import AdapterSite, Forward, LowRank, Scale

DEVICE = jax.devices()[0]
Arrays = dict[str, np.ndarray]
Forwards = Callable[[np.ndarray, np.ndarray, Arrays, Mapping[str, Any], float], np.ndarray]


def site_of(operation: str, scale: float = 1.0, rank: int = 2, **options: Any) -> AdapterSite:
    """A site of a linear layer."""
    return AdapterSite(
        targets=(("w",),),
        operation=operation,
        factors={},
        parameters=LowRank(rank, Scale(scale, "test"), Equation("ri,or->oi")),
        forward=Forward("", "", ""),
        group="",
        module="",
        label="w",
        settings=options,
    )


def changed(site: AdapterSite, factors: Arrays, kernel: np.ndarray, weight: float = 1.0) -> np.ndarray:
    """``weight * change`` of a whole kernel, from the code under test."""
    operation = row_operation_named(site.operation)
    operands = operation.operands(site, factors, kernel.shape)
    return row_change(operation, site.settings, kernel, operands, 0, weight, DEVICE)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


# What each layer computes with its adapter, x being n by inputs, from PEFT's forward passes.


def loha_forward(x: np.ndarray, w: np.ndarray, f: Arrays, options: Mapping[str, Any], scale: float) -> np.ndarray:
    if "t1" in f:
        one, two = (np.einsum("ijkl,jr,ip->prkl", f[f"t{k}"], f[f"w{k}_b"], f[f"w{k}_a"]) for k in (1, 2))
        return x @ w.T + x @ (scale * one * two).reshape(w.shape).T
    return x @ w.T + x @ (scale * (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])).T


def lokr_forward(x: np.ndarray, w: np.ndarray, f: Arrays, options: Mapping[str, Any], scale: float) -> np.ndarray:
    w1 = f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
    if "w2" in f:
        w2 = f["w2"]
    elif "t2" in f:
        w2 = np.einsum("ijkl,ip,jr->prkl", f["t2"], f["w2_a"], f["w2_b"])
    else:
        w2 = f["w2_a"] @ f["w2_b"]
    whole = np.kron(w1[:, :, None, None] if w2.ndim == 4 else w1, w2)
    return x @ w.T + x @ (scale * whole).reshape(w.shape).T


def ia3_forward(x: np.ndarray, w: np.ndarray, f: Arrays, options: Mapping[str, Any], scale: float) -> np.ndarray:
    if not options["feedforward"]:
        return (x @ w.T) * f["l"]
    places = x.shape[1] // len(f["l"])
    return (x.reshape(len(x), -1, places) * f["l"][:, None]).reshape(x.shape) @ w.T


def oft_forward(x: np.ndarray, w: np.ndarray, f: Arrays, options: Mapping[str, Any], scale: float) -> np.ndarray:
    size = next(b for b in range(2, 99) if b * (b - 1) // 2 == f["r"].shape[1])
    rotations = []
    for upper in f["r"]:
        q = np.zeros((size, size))
        place = 0
        for i in range(size):
            for j in range(i + 1, size):
                q[i, j], q[j, i] = upper[place], -upper[place]
                place += 1
        if options["coft"]:
            limit = options["eps"] / math.sqrt(len(f["r"]))
            q = q * min(1.0, limit / np.linalg.norm(q))
        one = np.eye(size)
        terms = options["num_cayley_neumann_terms"]
        if not options["use_cayley_neumann"]:
            rotations.append((one - q) @ np.linalg.inv(one + q))
        elif terms <= 2:
            rotations.append(one + 2 * q * (terms == 2))
        else:
            middle = sum(2 * np.linalg.matrix_power(q, k) for k in range(1, max(3, terms - 1)))
            rotations.append(one + middle + np.linalg.matrix_power(q, max(3, terms - 1)))
    count = x.shape[1] // size
    each = rotations * count if len(rotations) == 1 else rotations
    turned = np.einsum("nrk,rkc->nrc", x.reshape(len(x), count, size), np.stack(each))
    return turned.reshape(x.shape) @ w.T


def boft_forward(x: np.ndarray, w: np.ndarray, f: Arrays, options: Mapping[str, Any], scale: float) -> np.ndarray:
    size, whole = f["r"].shape[-1], np.eye(x.shape[1])
    for number, block in enumerate(f["r"][0]):
        s = (block - block.T) / 2
        here = slice(number * size, (number + 1) * size)
        whole[here, here] = (np.eye(size) - s) @ np.linalg.inv(np.eye(size) + s)
    return (x @ whole) @ w.T * f["s"].reshape(-1)


def hra_forward(x: np.ndarray, w: np.ndarray, f: Arrays, options: Mapping[str, Any], scale: float) -> np.ndarray:
    seen: list[np.ndarray] = []
    product = np.eye(len(f["u"]))
    for column in f["u"].T:
        u = column
        if options["apply_GS"]:
            for other in seen:
                u = u - (other @ u) * other
        u = u / np.linalg.norm(u)
        seen.append(u)
        product = product @ (np.eye(len(u)) - 2 * np.outer(u, u))
    return x @ (w @ product).T


def hira_forward(x: np.ndarray, w: np.ndarray, f: Arrays, options: Mapping[str, Any], scale: float) -> np.ndarray:
    return x @ w.T + x @ (w * (f["lora_b"] @ f["lora_a"])).T * scale


def c3a_forward(x: np.ndarray, w: np.ndarray, f: Arrays, options: Mapping[str, Any], scale: float) -> np.ndarray:
    blocks = x.reshape(len(x), -1, f["kernel"].shape[2])
    mixed = np.einsum("xnb,mnb->xmb", np.fft.ifft(blocks), np.fft.fft(f["kernel"]))
    return x @ w.T + np.fft.fft(mixed).real.reshape(len(x), -1) * scale


def shira_forward(x: np.ndarray, w: np.ndarray, f: Arrays, options: Mapping[str, Any], scale: float) -> np.ndarray:
    added = w.copy()
    np.add.at(added, tuple(f["indices"].astype(int)), f["weight"] * scale)
    return x @ added.T


def miss_bat_forward(x: np.ndarray, w: np.ndarray, f: Arrays, options: Mapping[str, Any], scale: float) -> np.ndarray:
    size, result = f["block"].shape[1], w.copy()
    for row, block in enumerate(f["block"]):
        for column in range(w.shape[1] // size):
            here = (slice(row * size, row * size + size), slice(column * size, column * size + size))
            result[here] += w[here] @ block + block
    return x @ result.T


FORWARDS: dict[str, Forwards] = {
    "loha": loha_forward,
    "lokr": lokr_forward,
    "ia3": ia3_forward,
    "oft": oft_forward,
    "boft": boft_forward,
    "hra": hra_forward,
    "hira": hira_forward,
    "c3a": c3a_forward,
    "shira": shira_forward,
    "miss_bat": miss_bat_forward,
}


@dataclass(frozen=True)
class Case:
    """One adapter: the shapes of its factors and its settings."""

    operation: str
    shape: tuple[int, int]
    factors: dict[str, tuple[int, ...]]
    options: dict[str, Any]
    scale: float = 1.0
    size: float = 0.5

    def made(self, outputs: int | None = None, seed: int = 0) -> tuple[AdapterSite, Arrays, np.ndarray]:
        """The site, its factors, float32, and a kernel."""
        rng = np.random.default_rng(seed)
        shape = (outputs or self.shape[0], self.shape[1])
        factors = {
            role: (self.size * rng.standard_normal(self._grown(extents, shape[0]))).astype(np.float32)
            for role, extents in self.factors.items()
        }
        if "indices" in factors:
            count = factors["weight"].size
            places = [rng.integers(0, extent, count) for extent in shape]
            factors["indices"] = np.stack(places).astype(np.int32)
        kernel = rng.standard_normal(shape).astype(np.float32)
        return site_of(self.operation, self.scale, **self.options), factors, kernel

    def _grown(self, extents: tuple[int, ...], outputs: int) -> tuple[int, ...]:
        """The factor's extents for a kernel of so many outputs."""
        return tuple(extent if extent >= 0 else outputs // -extent for extent in extents)


def oft(**options: Any) -> dict[str, Any]:
    return {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "coft": False, "eps": 6e-5} | options


CASES = {
    # Negative extents are divisors of the outputs.
    "loha": Case("loha", (10, 14), {"w1_a": (-1, 3), "w1_b": (3, 14), "w2_a": (-1, 3), "w2_b": (3, 14)}, {}, 5 / 3),
    "loha tucker": Case(
        "loha",
        (10, 24),
        {"t1": (3, 3, 2, 3), "w1_a": (3, -1), "w1_b": (3, 4), "t2": (3, 3, 2, 3), "w2_a": (3, -1), "w2_b": (3, 4)},
        {},
        7 / 3,
    ),
    "lokr": Case("lokr", (12, 15), {"w1": (-4, 3), "w2": (4, 5)}, {}, 5 / 2),
    "lokr low-rank": Case(
        "lokr", (12, 15), {"w1_a": (-4, 2), "w1_b": (2, 3), "w2_a": (4, 2), "w2_b": (2, 5)}, {}, 5 / 2
    ),
    "lokr convolution": Case("lokr", (12, 60), {"w1": (-4, 3), "w2": (4, 5, 2, 2)}, {}, 3 / 4),
    "lokr tucker": Case("lokr", (12, 60), {"w1": (-4, 3), "t2": (2, 2, 2, 2), "w2_a": (2, 4), "w2_b": (2, 5)}, {}, 3.0),
    "lokr 1-d convolution": Case("lokr", (12, 30), {"w1": (-4, 3), "w2": (4, 5, 2)}, {}, 1.5),
    "ia3": Case("ia3", (10, 14), {"l": (-1,)}, {"feedforward": False}),
    "ia3 bias": Case("ia3", (10, 1), {"l": (-1,)}, {"feedforward": False}),
    "ia3 feedforward": Case("ia3", (10, 14), {"l": (14,)}, {"feedforward": True}),
    "ia3 feedforward convolution": Case("ia3", (10, 36), {"l": (4,)}, {"feedforward": True}),
    "oft": Case("oft", (10, 15), {"r": (3, 10)}, oft(), size=0.1),
    "oft one block": Case("oft", (10, 6), {"r": (1, 15)}, oft(), size=0.1),
    "oft shared": Case("oft", (10, 15), {"r": (1, 10)}, oft(block_share=True), size=0.1),
    "oft exact": Case("oft", (10, 15), {"r": (3, 10)}, oft(use_cayley_neumann=False), size=2.0),
    **{
        f"oft {terms} terms": Case("oft", (10, 15), {"r": (3, 10)}, oft(num_cayley_neumann_terms=terms))
        for terms in (2, 3, 4, 6, 9)
    },
    "coft": Case("oft", (10, 15), {"r": (3, 10)}, oft(coft=True, eps=0.3)),
    "coft within": Case("oft", (10, 15), {"r": (3, 10)}, oft(coft=True, eps=30.0), size=0.1),
    "coft shared exact": Case(
        "oft", (10, 15), {"r": (1, 10)}, oft(coft=True, eps=0.3, block_share=True, use_cayley_neumann=False)
    ),
    "boft": Case("boft", (10, 12), {"r": (1, 3, 4, 4), "s": (-1, 1)}, {}, size=1.0),
    "hra": Case("hra", (10, 14), {"u": (14, 5)}, {"apply_GS": False}),
    "hra more than inputs": Case("hra", (10, 4), {"u": (4, 6)}, {"apply_GS": False}),
    "hra orthonormal": Case("hra", (10, 14), {"u": (14, 5)}, {"apply_GS": True}),
    "hira": Case("hira", (10, 14), {"lora_a": (3, 14), "lora_b": (-1, 3)}, {}, 0.75),
    "c3a": Case("c3a", (12, 20), {"kernel": (-4, 5, 4)}, {}, 1 / 20),
    "shira": Case("shira", (10, 14), {"weight": (61,), "indices": (2, 61)}, {}, 0.5),
    "shira many": Case("shira", (12, 14), {"weight": (2500,), "indices": (2, 2500)}, {}, 0.5),
    "miss bat": Case("miss_bat", (12, 20), {"block": (-4, 4, 4)}, {"mode": "bat"}, 1.0),
}

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def expected_change(case: Case, site: AdapterSite, factors: Arrays, kernel: np.ndarray) -> np.ndarray:
    wide = {role: values.astype(np.float64) for role, values in factors.items()}
    w = kernel.astype(np.float64)
    return FORWARDS[case.operation](np.eye(w.shape[1]), w, wide, site.settings, case.scale).T - w


def test_every_operation_has_a_case() -> None:
    assert {operation.name for operation in BY_ROW} == {case.operation for case in CASES.values()} == set(FORWARDS)
    assert all(is_row_operation(operation.name) for operation in BY_ROW)
    assert not is_row_operation("add_delta")


@cases
def test_the_change_is_that_of_the_forward_pass(case: Case) -> None:
    site, factors, kernel = case.made()
    close(changed(site, factors, kernel), expected_change(case, site, factors, kernel))


@cases
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float64"])
def test_kernels_and_factors_of_other_dtypes(case: Case, dtype: str) -> None:
    stored = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    site, factors, kernel = case.made()
    kernel = kernel.astype(stored)
    factors = {role: values if role == "indices" else values.astype(stored) for role, values in factors.items()}
    close(changed(site, factors, kernel, -0.75), -0.75 * expected_change(case, site, factors, kernel))


@functools.cache
def whole(name: str) -> tuple[Case, AdapterSite, RowOperands, np.ndarray, np.ndarray]:
    """A case of several tiles: 600 outputs, in bfloat16."""
    case = CASES[name]
    site, factors, kernel = case.made(600)
    kernel = kernel.astype(ml_dtypes.bfloat16)
    operation = row_operation_named(case.operation)
    operands = operation.operands(site, factors, kernel.shape)
    assert tile_height(kernel.shape[1]) < 300
    return case, site, operands, kernel, row_change(operation, site.settings, kernel, operands, 0, 0.5, DEVICE)


@pytest.mark.parametrize("name", CASES)
def test_the_change_over_several_tiles(name: str) -> None:
    case, site, _, kernel, found = whole(name)
    _, factors, _ = case.made(600)
    close(found, 0.5 * expected_change(case, site, factors, kernel))


class Places:
    """An operation whose change is where its tile starts, plus a little per row of it."""

    name = "places"

    def operands(self, site: AdapterSite, factors: Arrays, shape: tuple[int, int]) -> RowOperands:
        return RowOperands()

    def change(self, settings: Any, kernel: Any, per_row: Any, shared: Any, first: Any) -> Any:
        return jax.numpy.full(kernel.shape, first + len(kernel) / 4096)


@pytest.mark.parametrize(("first", "count"), [(0, 600), (7, 593), (256, 200), (250, 7), (511, 1), (512, 60)])
def test_a_row_has_its_place_in_tiles_of_one_height(first: int, count: int) -> None:
    kernel = np.zeros((count, 3), np.float32)
    found = row_change(Places(), {}, kernel, RowOperands(), first, 1.0, DEVICE)
    rows = np.arange(first, first + count)
    assert np.array_equal(found, np.repeat((rows // 256 * 256 + 256 / 4096)[:, None], 3, axis=1))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8)
@given(data=st.data())
def test_a_row_is_the_same_bits_in_whatever_block(name: str, data: st.DataObject) -> None:
    case, site, operands, kernel, expected = whole(name)
    cuts = data.draw(st.lists(st.integers(1, len(kernel) - 1), max_size=3, unique=True).map(sorted))
    operation = row_operation_named(case.operation)
    parts = [
        row_change(operation, site.settings, kernel[first:last], operands, first, 0.5, DEVICE)
        for first, last in zip([0, *cuts], [*cuts, len(kernel)], strict=True)
    ]
    assert np.array_equal(np.concatenate(parts).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", CASES)
def test_a_row_depends_on_no_other(name: str) -> None:
    case, site, operands, kernel, expected = whole(name)
    rows = np.arange(0, len(kernel), 7)
    other = np.full_like(kernel, 9)
    other[rows] = kernel[rows]
    found = row_change(row_operation_named(case.operation), site.settings, other, operands, 0, 0.5, DEVICE)
    assert np.array_equal(found[rows].view(np.uint32), expected[rows].view(np.uint32))


@pytest.mark.parametrize(
    "case",
    [
        Case("oft", (16, 512), {"r": (64, 28)}, oft()),
        Case("oft", (16, 512), {"r": (1, 28)}, oft()),
        Case("boft", (16, 512), {"r": (3, 64, 8, 8), "s": (-1, 1)}, {}),
        Case("hra", (16, 512), {"u": (512, 4)}, {"apply_GS": False}),
        Case("hra", (16, 512), {"u": (512, 4)}, {"apply_GS": True}),
    ],
    ids=["oft", "oft shared", "boft", "hra", "hra orthonormal"],
)
def test_no_matrix_of_inputs_by_inputs_is_formed(case: Case) -> None:
    site, factors, kernel = case.made()
    operation = row_operation_named(case.operation)
    operands = operation.operands(site, factors, kernel.shape)
    assert max(values.size for values in operands.shared.values()) < 512 * 512 / 4
    traced = jax.make_jaxpr(lambda w: operation.change(site.settings, w, operands.per_row, operands.shared, 0))(kernel)
    largest = max(math.prod(var.aval.shape) for line in traced.jaxpr.eqns for var in line.outvars)
    assert largest < 512 * 512 / 4


def test_a_butterfly_of_no_rotation_scales_alone() -> None:
    kernel = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    factors = {"r": np.zeros((3, 4, 4, 4), np.float32), "s": np.arange(6, dtype=np.float32)}
    close(changed(site_of("boft"), factors, kernel), kernel * (np.arange(6)[:, None] - 1.0))


def test_orthogonal_changes_keep_lengths() -> None:
    kernel = np.random.default_rng(1).standard_normal((9, 16)).astype(np.float32)
    rng = np.random.default_rng(2)
    adapters = [
        (site_of("boft"), {"r": rng.standard_normal((3, 4, 4, 4)).astype(np.float32), "s": np.ones(9, np.float32)}),
        (site_of("hra", apply_GS=False), {"u": rng.standard_normal((16, 5)).astype(np.float32)}),
        (site_of("oft", **oft(use_cayley_neumann=False)), {"r": rng.standard_normal((4, 6)).astype(np.float32)}),
    ]
    for site, factors in adapters:
        change = changed(site, factors, kernel)
        assert np.abs(change).max() > 0.5
        np.testing.assert_allclose(np.linalg.norm(kernel + change, axis=1), np.linalg.norm(kernel, axis=1), rtol=2e-6)


def test_two_reflections_at_one_vector_are_none() -> None:
    u = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
    kernel = np.random.default_rng(1).standard_normal((5, 12)).astype(np.float32)
    found = changed(site_of("hra", apply_GS=False), {"u": np.repeat(u, 2, axis=1)}, kernel)
    np.testing.assert_allclose(found, 0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("site", "factors", "shape"),
    [
        (site_of("hra", apply_GS=False), {"u": np.array([[1.0, 0.0], [2.0, 0.0]])}, (3, 2)),
        (site_of("hra", apply_GS=True), {"u": np.array([[1.0, 2.0], [2.0, 4.0]])}, (3, 2)),
        (site_of("hra", apply_GS=True), {"u": np.random.default_rng(0).standard_normal((2, 3))}, (3, 2)),
        (site_of("hra", apply_GS=False), {"u": np.full((2, 1), 1e200)}, (3, 2)),
        (site_of("oft", **oft(num_cayley_neumann_terms=20)), {"r": np.full((1, 3), 1e38)}, (3, 3)),
        (site_of("oft", **oft(use_cayley_neumann=False)), {"r": np.full((1, 3), 1e38)}, (3, 3)),
        (site_of("ia3", feedforward=False), {"l": np.array([1.0, 1e39, 1.0])}, (3, 3)),
        (site_of("shira"), {"weight": np.array([3e38, 3e38]), "indices": np.zeros((2, 2), np.int32)}, (3, 3)),
        (site_of("loha", 1e39), dict.fromkeys(("w1_a", "w1_b", "w2_a", "w2_b"), np.ones((3, 3))), (3, 3)),
    ],
    ids=lambda value: value.operation if isinstance(value, AdapterSite) else "",
)
def test_what_has_no_finite_result_is_refused(site: AdapterSite, factors: Arrays, shape: tuple[int, int]) -> None:
    with pytest.raises(NonFiniteInput) as raised:
        row_operation_named(site.operation).operands(site, factors, shape)
    assert "\n" not in str(raised.value)
    assert "w" in str(raised.value)


@pytest.mark.parametrize("place", [(-1, 0), (3, 0), (0, -1), (0, 4)])
def test_places_outside_the_kernel_are_refused(place: tuple[int, int]) -> None:
    factors = {"weight": np.ones(2, np.float32), "indices": np.array([[1, place[0]], [1, place[1]]], np.int32)}
    with pytest.raises(ShapeMismatch, match="1 of 2 outside"):
        row_operation_named("shira").operands(site_of("shira"), factors, (3, 4))


@pytest.mark.parametrize("gained", [False, True])
@settings(max_examples=20)
@given(st.integers(0, 570), st.integers(1, 600))
def test_contributions_are_applied_to_any_rows(gained: bool, first: int, count: int) -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 2, 2, 3), (3, 600)))
    x = rng.standard_normal((600, 16)).astype(np.float32)
    contribution = Contribution(a, b, rng.standard_normal(600) if gained else None)
    gain = 0.0 if contribution.gain is None else contribution.gain[:, None]
    expected = (1 + gain) * x.astype(np.float64) + (a.reshape(16, 3).astype(np.float64) @ b).T
    found = apply_contribution(x, contribution, 0, DEVICE)
    close(found, expected)
    part = apply_contribution(x[first : first + count], contribution, first, DEVICE)
    assert np.array_equal(part.view(np.uint32), found[first : first + count].view(np.uint32))


def test_heights_of_tiles() -> None:
    assert [tile_height(inputs) for inputs in (1, 2048, 2049, 14336, 2**20)] == [256, 256, 128, 32, 16]


# The same against PEFT's own layers.


def tensor(values: Any) -> np.ndarray:
    """A torch tensor's values."""
    return np.asarray(values.detach().numpy())


def adapted(layer: Any, config: Any, size: float = 0.3) -> Any:
    """PEFT's layer around another one, in float64, with noise on all that is trained."""
    import peft
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any) -> Any:
            return self.layer(x)

    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model.base_model.model.layer


def parameters(layer: Any, **roles: str) -> Arrays:
    """An adapter's tensors by role, of the attributes that hold them; those that are not there are left out."""
    held = {role: getattr(layer, attribute) for role, attribute in roles.items()}
    return {role: tensor(values["default"]) for role, values in held.items() if "default" in values}


def check_layer(layer: Any, operation: str, factors: Arrays, scale: float = 1.0, **options: Any) -> None:
    """Compare with what the layer computes unmerged, where it is a linear one, and with its merged weight."""
    import torch

    before = tensor(layer.get_base_layer().weight).copy()
    kernel = before.reshape(len(before), -1)
    found = changed(site_of(operation, scale, **options), factors, kernel)
    assert np.abs(found).max() > 1e-3
    if before.ndim == 2:
        with torch.no_grad():
            one = torch.eye(kernel.shape[1], dtype=torch.float64)
            forward = tensor(layer(one) - layer(torch.zeros_like(one)))
        np.testing.assert_allclose(kernel + found, forward.T, rtol=0, atol=4e-6)
    layer.merge()
    after = tensor(layer.get_base_layer().weight).reshape(kernel.shape)
    np.testing.assert_allclose(kernel + found, after, rtol=0, atol=4e-6)


def layer_of(kind: str) -> Any:
    """A layer of 12 outputs."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    return {
        "linear": lambda: torch.nn.Linear(20, 12),
        "conv2d": lambda: torch.nn.Conv2d(8, 12, (3, 2)),
        "square conv2d": lambda: torch.nn.Conv2d(8, 12, 3),
        "1x1 conv2d": lambda: torch.nn.Conv2d(8, 12, 1),
        "conv1d": lambda: torch.nn.Conv1d(8, 12, 3),
    }[kind]()


TARGET = {"target_modules": ["layer"]}
LYCORIS = ("linear", "conv2d", "1x1 conv2d", "conv1d")


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("kind", LYCORIS)
def test_peft_loha(kind: str, effective: bool) -> None:
    base = layer_of(kind)
    from peft import LoHaConfig

    layer = adapted(base, LoHaConfig(r=3, alpha=5, use_effective_conv2d=effective, init_weights=False, **TARGET))
    names = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    check_layer(layer, "loha", parameters(layer, **{name: f"hada_{name}" for name in names}), 5 / 3)


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize(("rank", "both", "factor"), [(1, True, 4), (1, False, -1), (9, False, 4), (9, True, 2)])
@pytest.mark.parametrize("kind", LYCORIS)
def test_peft_lokr(kind: str, rank: int, both: bool, factor: int, effective: bool) -> None:
    base = layer_of(kind)
    from peft import LoKrConfig

    config = LoKrConfig(
        r=rank,
        alpha=5,
        decompose_both=both,
        decompose_factor=factor,
        use_effective_conv2d=effective,
        init_weights=False,
        **TARGET,
    )
    layer = adapted(base, config)
    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    factors = parameters(layer, **{name: f"lokr_{name}" for name in names})
    if kind == "conv1d" and "t2" in factors:
        # torch.kron takes no such view, so that PEFT neither runs nor merges this one.
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            layer.merge()
        kernel = tensor(base.weight).reshape(12, -1)
        expected = lokr_forward(np.eye(kernel.shape[1]), kernel, factors, {}, 5 / rank).T - kernel
        close(changed(site_of("lokr", 5 / rank), factors, kernel), expected)
        return
    check_layer(layer, "lokr", factors, 5 / rank)


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_peft_ia3(kind: str, feedforward: bool) -> None:
    base = layer_of(kind)
    from peft import IA3Config

    layer = adapted(base, IA3Config(feedforward_modules=["layer"] if feedforward else [], **TARGET))
    factors = {"l": parameters(layer, l="ia3_l")["l"].reshape(-1)}
    bias = tensor(base.bias).copy()
    check_layer(layer, "ia3", factors, feedforward=feedforward)
    scaled = bias[:, None] + (0 if feedforward else changed(site_of("ia3", feedforward=False), factors, bias[:, None]))
    np.testing.assert_allclose(scaled[:, 0], tensor(layer.get_base_layer().bias), atol=1e-6)


@pytest.mark.parametrize("coft", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("terms", [None, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("kind", ["linear", "square conv2d"])
def test_peft_oft(kind: str, terms: int | None, shared: bool, coft: bool) -> None:
    base = layer_of(kind)
    from peft import OFTConfig

    chosen = oft(coft=coft, eps=0.4, use_cayley_neumann=terms is not None, num_cayley_neumann_terms=terms or 5)
    layer = adapted(base, OFTConfig(r=0, oft_block_size=4, block_share=shared, **chosen, **TARGET))
    # PEFT writes the shortened Q into the layer as it computes.
    factors = {"r": tensor(layer.oft_R["default"].weight).copy()}
    check_layer(layer, "oft", factors, **chosen, block_share=shared)


def block_diagonal(blocks: Any) -> list[Any]:
    """What PEFT's CUDA kernel computes, on the processor."""
    import torch

    return [torch.stack([torch.block_diag(*stage) for stage in blocks])]


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize(("kind", "size"), [("linear", 4), ("linear", 2), ("square conv2d", 6)])
def test_peft_boft(kind: str, size: int, factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = layer_of(kind)
    import torch
    from peft import BOFTConfig
    from peft.tuners.boft import layer as boft_layer

    if kind == "linear":
        base = torch.nn.Linear(48, 12)
    stand_in = type("Extension", (), {"forward": staticmethod(block_diagonal)})()
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: stand_in if factor > 1 else None)
    layer = adapted(base, BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factor, **TARGET), 1.0)
    assert len(layer.boft_R["default"]) == factor
    check_layer(layer, "boft", parameters(layer, r="boft_R", s="boft_s"))


@pytest.mark.parametrize("orthonormal", [False, True])
@pytest.mark.parametrize("kind", ["linear", "square conv2d"])
def test_peft_hra(kind: str, orthonormal: bool) -> None:
    base = layer_of(kind)
    from peft import HRAConfig

    layer = adapted(base, HRAConfig(r=5, apply_GS=orthonormal, init_weights=False, **TARGET))
    check_layer(layer, "hra", parameters(layer, u="hra_u"), apply_GS=orthonormal)


@pytest.mark.parametrize("kind", LYCORIS)
def test_peft_hira(kind: str) -> None:
    base = layer_of(kind)
    from peft import HiraConfig

    layer = adapted(base, HiraConfig(r=3, init_weights=False, **TARGET))
    check_layer(layer, "hira", parameters(layer, lora_a="hira_A", lora_b="hira_B"))


def test_peft_c3a() -> None:
    base = layer_of("linear")
    from peft import C3AConfig

    layer = adapted(base, C3AConfig(block_size=4, init_weights="gaussian", **TARGET))
    check_layer(layer, "c3a", parameters(layer, kernel="c3a_kernel"), 1 / 20)


def test_peft_shira() -> None:
    base = layer_of("linear")
    from peft import ShiraConfig

    layer = adapted(base, ShiraConfig(r=3, init_weights=False, **TARGET))
    factors = parameters(layer, weight="shira_weight", indices="shira_indices")
    check_layer(layer, "shira", factors)


def test_peft_miss_bat() -> None:
    base = layer_of("linear")
    from peft import MissConfig

    layer = adapted(base, MissConfig(r=4, init_weights="bat", **TARGET))
    check_layer(layer, "miss_bat", parameters(layer, block="miss_block"), mode="bat")
