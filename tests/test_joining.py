"""Joining fine-tunes of one base: against mergekit's own figures, and against float64 NumPy written from the papers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_merge_cli.errors import NonFiniteInput, Unrepresentable, UnsupportedCheckpoint, UsageError, WrongBase
from lora_merge_cli.formats.interface import FLAT, Stored
from lora_merge_cli.formats.safetensors_source import SafetensorsSource
from lora_merge_cli.joining import METHODS, Joining, arithmetic, karcher
from lora_merge_cli.joining.source import JoinedSource
from lora_merge_cli.records import Index, KeyPath, Region, TensorSpec, full_region

GOLDEN = Path(__file__).parent / "golden/mergekit/results.npz"
WEIGHTS = {"plus": (0.75, 0.5, 1.25), "mixed": (0.75, -0.5, 1.25), "ones": (1.0, 1.0, 1.0)}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LEAF = ("block", "kernel")

Leaves = Mapping[KeyPath, np.ndarray]


class Held:
    """A checkpoint in memory."""

    def __init__(self, name: str, leaves: Leaves, shared: Mapping[KeyPath, KeyPath] | None = None) -> None:
        self.path, self._leaves, self._shared = Path(name), leaves, shared or {}
        self.entries_read = 0

    def index(self) -> Index:
        specs = {path: TensorSpec(path, values.shape, values.dtype) for path, values in self._leaves.items()}
        return Index(specs, shared=self._shared)

    def scan(self, path: KeyPath, regions: Iterable[Region], pool: Any = None) -> Iterator[np.ndarray]:
        for region in regions:
            yield self.read(path, region)

    def read(self, path: KeyPath, region: Region) -> np.ndarray:
        found = self._leaves[path][region].copy()
        self.entries_read = max(self.entries_read, found.size)
        return found

    def stored(self, path: KeyPath) -> Stored:
        return Stored(FLAT, [("0", self._leaves[path].tobytes())])

    def fingerprint(self) -> str:
        return str(self.path)


def spelled(path: KeyPath) -> KeyPath:
    return path[1:] if path[0] == "model" else path


def joint(base: Leaves, tuned: Sequence[Leaves], joining: Joining, **others: Any) -> JoinedSource:
    held = [Held(f"t{number}", leaves) for number, leaves in enumerate(tuned, 1)]
    return JoinedSource(Held("base", base), held, joining, spelled, **others)


def whole(source: JoinedSource, path: KeyPath = LEAF) -> np.ndarray:
    return source.read(path, full_region(source.index().tensors[path].shape))


def join(base: np.ndarray, tuned: Sequence[np.ndarray], joining: Joining, **others: Any) -> np.ndarray:
    return whole(joint({LEAF: base}, [{LEAF: values} for values in tuned], joining, **others))


def given(
    count: int = 3, shape: tuple[int, ...] = (23, 17), dtype: Any = np.float32
) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(11)
    base = rng.standard_normal(shape)
    tuned = [base + size * rng.standard_normal(shape) for size in (0.5, 0.3, 0.8)[:count]]
    return base.astype(dtype), [values.astype(dtype) for values in tuned]


def some(joining_method: str, count: int = 2, **others: Any) -> Joining:
    density = 0.5 if joining_method in ("ties", "dare-ties") else None
    return Joining(joining_method, (1.0,) * count, **{"density": density, **others})  # type: ignore[arg-type]


def test_mergekits_figures() -> None:
    golden = np.load(GOLDEN)
    assert str(golden["mergekit"]) == "0.1.5"
    base, *tuned = (golden[f"in/{name}"] for name in ("base", "t1", "t2", "t3"))
    cases = {
        "linear": Joining("linear", (0.25, 0.25, 0.5), stated=True),
        "model-stock": Joining("model-stock", (1.0,) * 3),
        "karcher/equal": Joining("karcher", (1.0,) * 3),
        "karcher/weighted": Joining("karcher", (0.4, 0.6, 1.0), stated=True),
    }
    for name, weights in WEIGHTS.items():
        cases[f"task-arithmetic/{name}"] = Joining("task-arithmetic", weights, stated=True)
        for density in (0.3, 1.0):
            cases[f"ties-{density}/{name}"] = Joining("ties", weights, stated=True, density=density)
    for t in (0.0, 0.25, 1.0):
        cases[f"slerp/{t}"] = Joining("slerp", (1 - t, t), stated=True)
    expected = {name for name in golden.files if not name.startswith("in/")} - {"mergekit", "torch"}
    assert cases.keys() == expected
    for name, joining in cases.items():
        result = join(base, tuned[: len(joining.weights)], joining)
        # mergekit ends its search for a Karcher mean at a step of 1e-5.
        tolerance = 2e-5 if name.startswith("karcher") else 3e-6
        np.testing.assert_allclose(result, golden[name], rtol=0, atol=tolerance, err_msg=name)


def elected(base: np.ndarray, changes: Sequence[np.ndarray], weights: Sequence[float], *, mean: bool) -> np.ndarray:
    """TIES' election, entry by entry."""
    result = base.astype(np.float64).copy()
    for at in np.ndindex(*base.shape):
        weighed = [w * d[at] for w, d in zip(weights, changes, strict=True)]
        sign = 1 if sum(weighed) >= 0 else -1
        agreeing = [(w, x) for w, x in zip(weights, weighed, strict=True) if x * sign > 0]
        divisor = sum(w for w, _ in agreeing) if mean else 1
        result[at] += sum(x for _, x in agreeing) / (divisor or 1)
    return result


def trimmed(change: np.ndarray, density: float) -> np.ndarray:
    keep = max(1, int(density * change.size))
    order = np.argsort(-np.abs(change.reshape(-1)).astype(np.float32), kind="stable")
    result = np.zeros(change.size)
    result[order[:keep]] = change.reshape(-1)[order[:keep]]
    return result.reshape(change.shape)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16, np.float64], ids=str)
@pytest.mark.parametrize("density", [0.001, 0.37, 1.0])
def test_ties_as_the_paper_has_it(dtype: Any, density: float) -> None:
    base, tuned = given(dtype=dtype)
    weights = (0.75, -0.5, 1.25)
    result = join(base, tuned, Joining("ties", weights, stated=True, density=density))
    changes = [trimmed(values.astype(np.float64) - base.astype(np.float64), density) for values in tuned]
    assert result.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(result, elected(base, changes, weights, mean=True), rtol=0, atol=2e-6)


def test_of_entries_of_one_size_ties_keeps_the_earlier_ones() -> None:
    base = np.zeros((4, 5), np.float32)
    tuned = np.ones((4, 5), np.float32)
    tuned[1, 3], tuned[3, 4] = -2, 0
    tuned[0, 1] = -1
    result = join(base, [tuned], Joining("ties", (1.0,), density=0.3))
    expected = trimmed(tuned.astype(np.float64), 0.3)
    assert np.count_nonzero(expected) == 6
    np.testing.assert_array_equal(result, expected)


def test_zeros_are_none_of_the_largest() -> None:
    base = np.ones(40, np.float32)
    tuned = base.copy()
    tuned[7] = 3
    other = base + np.arange(40, dtype=np.float32)
    result = join(base, [tuned, other], Joining("ties", (1.0, 1.0), density=0.5))
    expected = elected(base, [tuned - base, trimmed(other - base, 0.5)], (1, 1), mean=True)
    np.testing.assert_array_equal(result, expected)


def lottery(seed: int, name: str, start: int, stop: int, density: float) -> np.ndarray:
    number = int(name.rsplit("#", 1)[1])
    return np.random.default_rng([seed, number]).random(1000)[start:stop] < density


def test_dare_keeps_what_is_drawn() -> None:
    base, tuned = given()
    weights = (0.75, -0.5, 1.25)
    joining = Joining("dare-ties", weights, stated=True, density=0.4, seed=5)
    result = join(base, tuned, joining, draw=lottery)
    changes = [
        (values.astype(np.float64) - base) / 0.4 * lottery(5, f"x#{number}", 0, base.size, 0.4).reshape(base.shape)
        for number, values in enumerate(tuned)
    ]
    np.testing.assert_allclose(result, elected(base, changes, weights, mean=False), rtol=0, atol=3e-6)


def test_the_lottery_goes_by_seed_name_and_fine_tune() -> None:
    seen = []

    def draw(seed: int, name: str, start: int, stop: int, density: float) -> np.ndarray:
        seen.append((seed, name, density))
        return np.ones(stop - start, bool)

    base, tuned = given(2)
    joined = joint(
        {LEAF: base}, [{("model", *LEAF): t} for t in tuned], some("dare-ties", density=0.25, seed=9), draw=draw
    )
    whole(joined, ("model", *LEAF))
    assert seen == [(9, "block/kernel#0", 0.25), (9, "block/kernel#1", 0.25)]


def test_dare_draws_about_as_many_as_it_says() -> None:
    base, tuned = np.zeros(20_000, np.float32), np.ones(20_000, np.float32)
    result = join(base, [tuned], Joining("dare-ties", (1.0,), density=0.25, seed=3))
    assert set(np.unique(result)) == {0, 4}
    assert abs(np.mean(result) - 1) < 0.05
    assert not np.array_equal(result, join(base, [tuned], Joining("dare-ties", (1.0,), density=0.25, seed=4)))


def test_model_stock_as_the_paper_has_it() -> None:
    base, tuned = given()
    changes = [(values.astype(np.float64) - base).reshape(-1) for values in tuned]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(changes, 2)]
    cos = np.mean(cosines)
    t = 3 * cos / (1 + 2 * cos)
    joined = joint({LEAF: base}, [{LEAF: values} for values in tuned], some("model-stock", 3))
    np.testing.assert_allclose(whole(joined), base + t * np.mean(changes, 0).reshape(base.shape), rtol=0, atol=1e-6)
    assert joined.figures[LEAF].coefficients == pytest.approx((t / 3,) * 3)


def test_model_stock_where_its_formula_has_no_value() -> None:
    base, (first, _) = given(2)
    opposite = 2 * base.astype(np.float64) - first
    result = join(base.astype(np.float64), [first, opposite], some("model-stock"))
    np.testing.assert_array_equal(result, base)


def test_a_task_vector_of_zero_is_at_right_angles_to_all() -> None:
    base, (first, second) = given(2)
    np.testing.assert_array_equal(join(base, [first, base], some("model-stock")), base)
    changes = [(values.astype(np.float64) - base).reshape(-1) for values in (first, second)]
    cos = changes[0] @ changes[1] / np.linalg.norm(changes[0]) / np.linalg.norm(changes[1]) / 3
    expected = base + cos / (1 + 2 * cos) * sum(changes).reshape(base.shape)
    np.testing.assert_allclose(join(base, [first, base, second], some("model-stock", 3)), expected, rtol=0, atol=1e-6)


def test_slerp_is_of_the_weights_themselves() -> None:
    base, (first, second) = given(2)
    a, b = first.astype(np.float64), second.astype(np.float64)
    theta = np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
    expected = (np.sin(0.75 * theta) * a + np.sin(0.25 * theta) * b) / np.sin(theta)
    result = join(base, [first, second], Joining("slerp", (3.0, 1.0), stated=True))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_slerp_with_a_tensor_of_zeros_goes_straight() -> None:
    base, (first, _) = given(2)
    result = join(base, [first, np.zeros_like(first)], Joining("slerp", (3.0, 1.0), stated=True))
    np.testing.assert_allclose(result, 0.75 * first, rtol=1e-6)


def test_slerp_of_opposites_goes_straight() -> None:
    base, (first, _) = given(2)
    result = join(base, [first, -first], Joining("slerp", (3.0, 1.0), stated=True))
    np.testing.assert_allclose(result, 0.5 * first, rtol=1e-6)


def test_the_karcher_mean_is_where_nothing_pulls() -> None:
    base, tuned = given()
    weights = np.array([0.2, 0.3, 0.5])
    result = join(base.astype(np.float64), tuned, Joining("karcher", (2.0, 3.0, 5.0), stated=True)).reshape(-1)
    flat = [values.astype(np.float64).reshape(-1) for values in tuned]
    norms = np.array([np.linalg.norm(values) for values in flat])
    assert np.linalg.norm(result) == pytest.approx(weights @ norms, rel=1e-12)
    mean = result / np.linalg.norm(result)
    pull = np.zeros_like(mean)
    for weight, values, norm in zip(weights, flat, norms, strict=True):
        cos = mean @ values / norm
        pull += weight * np.arccos(cos) / np.sqrt(1 - cos * cos) * (values / norm - cos * mean)
    assert np.linalg.norm(pull) < 1e-7


@pytest.mark.parametrize(
    ("gram", "weights", "expected"),
    [
        (np.zeros((2, 2)), (1.0, 3.0), (0.25, 0.75)),
        (np.diag([4.0, 0.0]), (1.0, 1.0), (0.5, 0.0)),
        (np.array([[4.0, -8.0], [-8.0, 16.0]]), (2.0, 2.0), (0.5, 0.5)),
    ],
    ids=["zeros", "one zero", "opposites"],
)
def test_karcher_where_there_is_no_one_mean(gram: np.ndarray, weights: tuple[float, ...], expected: Any) -> None:
    assert karcher.coefficients(gram, weights) == pytest.approx(expected)


def test_the_karcher_mean_of_opposites_has_the_heavier_ones_direction() -> None:
    gram = np.array([[4.0, -8.0], [-8.0, 16.0]])
    found = np.array(karcher.coefficients(gram, (3.0, 1.0)))
    assert np.sqrt(found @ gram @ found) == pytest.approx(0.75 * 2 + 0.25 * 4)
    assert found @ gram[0] > 0


def test_linear_without_weights_is_the_mean() -> None:
    base, tuned = given()
    np.testing.assert_allclose(join(base, tuned, some("linear", 3)), np.mean(tuned, 0), atol=1e-6)
    stated = join(base, tuned, Joining("linear", (1.0, 1.0, 1.0), stated=True))
    np.testing.assert_array_equal(stated, join(base, tuned, some("task-arithmetic", 3)))


@pytest.mark.parametrize("method", METHODS)
def test_frozen_leaves_beside_a_finer_base(method: Any) -> None:
    base, (first, second) = given(2)
    base[0, 0], base[2, 3] = -0.0, -np.inf
    first, frozen = first.astype(BFLOAT16), base.astype(BFLOAT16)
    still = joint({LEAF: base}, [{LEAF: frozen}, {LEAF: base}], some(method))
    assert whole(still).tobytes() == base.tobytes()
    assert not still.figures[LEAF].moved
    base[2, 3] = 1
    frozen = base.astype(BFLOAT16)
    alone = join(base, [base, second], some(method))
    np.testing.assert_array_equal(join(base, [frozen, second], some(method)), alone)


@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "ties", "dare-ties"])
def test_an_entry_that_nobody_moved_keeps_its_bits(method: Any) -> None:
    base, (first, second) = given(2)
    base[3] = -0.0
    first[3] = second[3] = -0.0
    first[4], second[4] = base[4], base[4]
    result = join(base, [first, second], some(method))
    assert result[3:5].tobytes() == base[3:5].tobytes()


def test_a_run_that_went_on_in_another_dtype_adds_nothing_of_its_own() -> None:
    base, (first, _) = given(2)
    for method in ("linear", "task-arithmetic", "ties"):
        joining = some(method, stated=True, sequential=True)
        result = join(base, [first, first.astype(BFLOAT16)], joining)
        np.testing.assert_array_equal(result, join(base, [first, first], joining))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_refused_by_name(method: Any) -> None:
    base, (first, second) = given(2)
    second[5, 6] = np.nan
    with pytest.raises(NonFiniteInput, match=r"t2 :: block/kernel .*found 1 of 391"):
        join(base, [first, second], some(method))


def test_results_beyond_float32_are_refused() -> None:
    base, (first, second) = given(2)
    with pytest.raises(Unrepresentable, match="t1 :: block/kernel"):
        join(base, [first, second * 1e30], Joining("linear", (1.0, 1e30), stated=True))


def test_what_is_no_float_must_agree() -> None:
    base, (first, second) = given(2)
    steps = [{LEAF: first, ("n",): np.arange(6)}, {LEAF: second, ("n",): np.arange(6)}]
    joined = joint({LEAF: base, ("n",): np.zeros(6, int)}, steps, some("linear"))
    np.testing.assert_array_equal(whole(joined, ("n",)), np.arange(6))
    assert joined.index().tensors["n",].dtype == np.arange(6).dtype
    assert b"".join(bytes(piece) for _, piece in joined.stored(("n",)).values) == np.arange(6).tobytes()  # type: ignore[union-attr]
    assert joined.stored(LEAF) is None
    steps[1]["n",] = np.arange(6)[::-1].copy()
    other = joint({LEAF: base, ("n",): np.zeros(6, int)}, steps, some("linear"))
    with pytest.raises(UnsupportedCheckpoint, match="t2 :: n"):
        other.stored(("n",))


def test_what_the_base_lacks_must_agree() -> None:
    base, (first, second) = given(2)
    head = np.ones((2, 3), BFLOAT16)
    joined = joint({LEAF: base}, [{LEAF: first, ("h",): head}, {LEAF: second, ("h",): head}], some("ties"))
    assert whole(joined, ("h",)).tobytes() == head.tobytes()
    assert joined.index().tensors["h",].dtype == BFLOAT16
    assert ("h",) not in joined.figures
    other = joint({LEAF: base}, [{LEAF: first, ("h",): head}, {LEAF: second, ("h",): head * 2}], some("ties"))
    with pytest.raises(UnsupportedCheckpoint, match="t2 :: h"):
        whole(other, ("h",))


def test_other_leaves_are_refused() -> None:
    base, (first, second) = given(2)
    with pytest.raises(WrongBase, match="t2 :: block/kernel"):
        joint({LEAF: base}, [{LEAF: first}, {("other",): second}], some("linear"))
    with pytest.raises(WrongBase, match="t1 :: other"):
        joint({LEAF: base}, [{LEAF: first}, {LEAF: second, ("other",): second}], some("linear"))
    with pytest.raises(WrongBase, match=r"t2 :: block/kernel .*\(17, 23\)"):
        joint({LEAF: base}, [{LEAF: first}, {LEAF: second.T.copy()}], some("linear"))
    with pytest.raises(WrongBase, match="int32"):
        joint({LEAF: base}, [{LEAF: first}, {LEAF: second.astype(np.int32)}], some("linear"))


def test_spellings_are_matched() -> None:
    base, (first, second) = given(2)
    joined = joint({("model", *LEAF): base}, [{LEAF: first}, {("model", *LEAF): second}], some("linear"))
    np.testing.assert_allclose(whole(joined), (first + second) / 2, atol=1e-6)


def test_shared_leaves_stay_shared_where_all_say_so() -> None:
    base, tuned = given(2)
    tied = {("b",): ("a",)}

    def held(name: str, values: np.ndarray, shared: Any) -> Held:
        return Held(name, {("a",): values, ("b",): values}, shared)

    sources = [held("t1", tuned[0], tied), held("t2", tuned[1], tied)]
    joining = some("dare-ties")
    joined = JoinedSource(held("base", base, tied), sources, joining, spelled)
    assert joined.index().shared == tied
    np.testing.assert_array_equal(whole(joined, ("a",)), whole(joined, ("b",)))
    assert JoinedSource(Held("base", {("a",): base}), sources, joining, spelled).index().shared == tied
    loose = JoinedSource(held("base", base, tied), [sources[0], held("t2", tuned[1], {})], joining, spelled)
    assert not loose.index().shared


def test_stored_bytes_are_those_of_the_values() -> None:
    base, (first, second) = given(2)
    wide = base.astype(np.float64) * (1 + 2.0**-40)
    narrow = wide.astype(np.float32)
    weighted = dataclasses.replace(some("task-arithmetic"), weights=(0.0, 0.0), stated=True)
    for source, expected in (
        (joint({LEAF: base}, [{LEAF: base}] * 2, some("linear")), base),
        # Fine-tunes that did not move, in coarser dtypes; and one whose weight is 0.
        (joint({LEAF: base}, [{LEAF: base.astype(BFLOAT16)}, {LEAF: base}], some("linear")), base),
        (joint({LEAF: wide}, [{LEAF: narrow}] * 2, some("linear")), wide),
        (joint({LEAF: base}, [{LEAF: first}, {LEAF: second}], weighted), base),
        (joint({LEAF: base}, [{LEAF: first}] * 2, some("slerp")), first),
    ):
        stored = source.stored(LEAF)
        assert stored is not None
        assert b"".join(bytes(value) for _, value in stored.values) == expected.tobytes() == whole(source).tobytes()
    assert joint({LEAF: base}, [{LEAF: first}, {LEAF: second}], some("linear")).stored(LEAF) is None


def test_ends_are_exact() -> None:
    """Where one fine-tune alone counts, the arithmetic has no say: not even far from the base, where differences lose digits."""
    base, (first, second) = given(2)
    far = first + np.float32(1000)
    one = joint({LEAF: base}, [{LEAF: far}], Joining("task-arithmetic", (1.0,)))
    ties = joint({LEAF: base}, [{LEAF: far}], Joining("ties", (0.3,), stated=True, density=1.0))
    chain = dataclasses.replace(some("task-arithmetic"), sequential=True)
    last = joint({LEAF: base}, [{LEAF: far}, {LEAF: second}], chain)
    turned = joint({LEAF: base}, [{LEAF: far}, {LEAF: second}], Joining("slerp", (0.0, 1.0), stated=True))
    for source, expected in ((one, far), (ties, far), (last, second), (turned, second)):
        assert whole(source).tobytes() == expected.tobytes()


def test_the_fingerprint_is_of_all() -> None:
    base, (first, second) = given(2)
    one = joint({LEAF: base}, [{LEAF: first}, {LEAF: second}], some("ties"))
    other = joint({LEAF: base}, [{LEAF: first}, {LEAF: second}], some("ties", density=0.25))
    assert one.fingerprint() != other.fingerprint()
    assert one.path == Path("t1")


def test_figures_say_what_was_found() -> None:
    base, (first, second) = given(2)
    leaves = {LEAF: base, ("b",): np.ones(10, np.float32)}
    joined = joint(
        leaves, [{LEAF: first, ("b",): leaves["b",]}, {LEAF: second, ("b",): leaves["b",] * 2}], some("ties")
    )
    assert not joined.figures
    whole(joined), whole(joined, ("b",))
    assert joined.figures[LEAF].kept == pytest.approx((195 / 391, 195 / 391))
    assert joined.figures["b",].kept == (0, 0.5)


def test_from_files_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = given(2, (64, 33))
    sources = []
    for number, values in enumerate((base, *tuned)):
        save_file({"w": values}, tmp_path / f"{number}.safetensors")
        sources.append(SafetensorsSource(tmp_path / f"{number}.safetensors", [tmp_path / f"{number}.safetensors"]))
    joining = some("ties")
    joined = JoinedSource(sources[0], sources[1:], joining, spelled)
    scanned = joined.scan(("w",), [(slice(row, row + 16), slice(0, 33)) for row in range(0, 64, 16)])
    np.testing.assert_array_equal(np.concatenate(list(scanned)), join(base, tuned, joining))

    monkeypatch.setattr("lora_merge_cli.side_by_side.BLOCK_ENTRIES", 99)
    held = [Held(str(number), {LEAF: values}) for number, values in enumerate((base, *tuned))]
    again = JoinedSource(held[0], held[1:], joining, spelled)
    blocks = list(again.scan(LEAF, [(slice(row, row + 3), slice(0, 33)) for row in range(0, 63, 3)]))
    assert max(source.entries_read for source in held) == 99
    np.testing.assert_array_equal(np.concatenate(blocks), join(base, tuned, joining)[:63])


def test_a_scan_that_is_left_early_ends_its_threads() -> None:
    import threading

    base, tuned = given(2)
    before = threading.active_count()
    scan = joint({LEAF: base}, [{LEAF: t} for t in tuned], some("ties")).scan(
        LEAF, [(slice(row, row + 1), slice(0, 17)) for row in range(23)]
    )
    next(scan)
    scan.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("method", "others", "words"),
    [
        ("median", {}, "unknown method"),
        ("slerp", {"weights": (1.0,)}, "exactly two"),
        ("slerp", {"weights": (1.0, 1.0, 1.0)}, "exactly two"),
        ("slerp", {"weights": (1.5, -0.5)}, "0 or more"),
        ("slerp", {"weights": (0.0, 0.0)}, "positive sum"),
        ("karcher", {"weights": (1.0,)}, "at least 2 fine-tunes"),
        ("karcher", {"weights": (1.0, -1.0)}, "0 or more"),
        ("model-stock", {"weights": (1.0,)}, "at least 2 fine-tunes"),
        ("model-stock", {"stated": True}, "no weights"),
        ("ties", {}, "needs --density"),
        ("dare-ties", {}, "needs --density"),
        ("ties", {"density": 0.0}, "outside"),
        ("ties", {"density": 1.5}, "outside"),
        ("ties", {"density": float("nan")}, "outside"),
        ("linear", {"density": 0.5}, "--density is for"),
        ("linear", {"weights": (1.0, float("inf"))}, "finite"),
        ("linear", {"weights": ()}, "at least 1 fine-tune"),
        ("linear", {"weights": (1.0,), "sequential": True}, "--sequential is for at least 2"),
        ("slerp", {"sequential": True}, "--sequential is for linear"),
        ("model-stock", {"sequential": True}, "--sequential is for linear"),
    ],
)
def test_what_makes_no_sense_is_refused(method: Any, others: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Joining(method, **{"weights": (1.0, 1.0), **others})


def test_more_entries_than_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sizes of few bits: several are the smallest that is kept.
    base, tuned = given(2, (40, 33), BFLOAT16)
    joining = some("ties")
    expected = join(base, tuned, joining)
    monkeypatch.setattr(arithmetic, "_CAPACITY", 64)
    np.testing.assert_array_equal(join(base, tuned, joining), expected)


@pytest.mark.parametrize("method", ["ties", "dare-ties"])
def test_a_tied_election_is_for_plus(method: Any) -> None:
    one = np.ones(3, np.float32)
    result = join(0 * one, [-one, one], Joining(method, (1.0, 1.0), density=1.0))
    np.testing.assert_array_equal(result, one)


def test_weights_that_cancel_divide_by_one() -> None:
    one = np.ones(3, np.float32)
    result = join(0 * one, [one, -one], Joining("ties", (1.0, -1.0), stated=True, density=1.0))
    np.testing.assert_array_equal(result, 2 * one)


def test_what_is_not_finite_is_found_where_no_statistic_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_merge_cli.side_by_side.BLOCK_ENTRIES", 17)
    base, (first, second) = given(2)
    second[22, 6] = np.inf
    with pytest.raises(NonFiniteInput, match="t2 :: block/kernel"):
        join(base, [first, second], some("linear"))


@pytest.mark.parametrize("seed", range(8))
def test_opposites_up_to_rounding_are_opposites(seed: int) -> None:
    vector = np.random.default_rng(seed).standard_normal(50)
    vectors = np.stack([vector, -2.7 * vector, 0.3 * vector])
    found = np.array(karcher.coefficients(vectors @ vectors.T, (3.0, 1.0, 1.0)))
    norms = np.linalg.norm(vectors, axis=1)
    expected = np.array([0.6, 0.2, 0.2]) @ norms * vector / norms[0]
    np.testing.assert_allclose(found @ vectors, expected, rtol=1e-6)
