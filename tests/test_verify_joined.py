"""The judge of joined fine-tunes: right results pass, the tool's own and float64 NumPy's; each wrong one fails."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lora_merge_cli.errors import NonFiniteInput, UnsupportedCheckpoint, WrongBase
from lora_merge_cli.joining import Joining
from lora_merge_cli.records import full_region
from lora_merge_cli.verification import joint_largest
from lora_merge_cli.verification.doubts import Doubts
from lora_merge_cli.verification.joint import JointSource
from lora_merge_cli.verification.joint_entries import Kept, Making, Share, made
from lora_merge_cli.verification.joint_largest import k_largest, place_of
from tests.checkpoints import restore_flat, save_step
from tests.command import Outcome, run
from tests.interpolation import ALPHAS, Pair, llama_tensors, openpi_pair, read_model, write_model
from tests.test_joining import LEAF, Held, join, some, spelled
from tests.test_joining import given as leaves_of
from tests.trees import ACTION, BFLOAT16, PALIGEMMA, build, nest

Tensors = dict[str, np.ndarray]
UNMOVED = "model.norm.weight"
KERNEL = "model.layers.1.mlp.up_proj.weight"
METHODS = {
    "linear": ("--method", "linear"),
    "task-arithmetic": ("--method", "task-arithmetic", "--sequential"),
    "slerp": ("--method", "slerp"),
    "ties": ("--method", "ties", "--density", "0.3"),
    "dare-ties": ("--method", "dare-ties", "--density", "0.4", "--seed", "3"),
    "karcher": ("--method", "karcher"),
    "model-stock": ("--method", "model-stock"),
}
WEIGHTED = [(method, flags) for method, flags in METHODS.items() if method != "model-stock"]


def failed(outcome: Outcome) -> set[str]:
    checks = outcome.json["checks"]
    assert outcome.code == any(check["status"] == "fail" for check in checks), outcome.stderr
    return {check["id"] for check in checks if check["status"] == "fail"}


class World:
    """A base, fine-tunes of it, and results."""

    def __init__(self, folder: Path, base: Path, tuned: Sequence[Path], *flags: str) -> None:
        self.folder, self.base, self.tuned, self.flags = folder, base, list(tuned), flags
        self.numbers = itertools.count()

    def join(self, *flags: object, weights: Sequence[float] = (), dtype: str = "float32") -> Path:
        output = self.folder / f"out{next(self.numbers)}" / "7"
        outcome = run(
            "interpolate", self.base, *self._tuned(weights), "-o", output, "--dtype", dtype, *flags, *self.flags
        )
        assert outcome.code == 0, outcome.stderr
        return output

    def write(self, tensors: Tensors) -> Path:
        return write_model(self.folder / f"out{next(self.numbers)}", tensors)

    def verify(self, result: Path, *flags: object, weights: Sequence[float] = (), turned: bool = False) -> Outcome:
        against = self._tuned(weights)
        sides = [part for path in (reversed(against) if turned else against) for part in ("--against", path)]
        return run("verify", result, *sides, "--base", self.base, "--json", *flags, *self.flags)

    def _tuned(self, weights: Sequence[float]) -> list[str]:
        return (
            [f"{path}@{w}" for path, w in zip(self.tuned, weights, strict=True)]
            if weights
            else list(map(str, self.tuned))
        )


def tuned_tensors(base: Tensors, seed: int, dtype: Any = np.float32) -> Tensors:
    rng = np.random.default_rng(seed)
    tuned = {name: (values + rng.normal(0, 0.05, values.shape)).astype(dtype) for name, values in base.items()}
    # One leaf that nobody moved.
    return tuned | {UNMOVED: base[UNMOVED].astype(dtype)}


@pytest.fixture(scope="module", params=[np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Fine-tunes without adapters beside a float32 base; the first one in another dtype, perhaps."""
    folder = tmp_path_factory.mktemp("dense")
    base = llama_tensors(np.random.default_rng(0), layers=2)
    tuned = [
        write_model(folder / f"t{n}", tuned_tensors(base, n, dtype))
        for n, dtype in enumerate((request.param, np.float32), 1)
    ]
    return World(folder, write_model(folder / "base", base), tuned)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_tool_makes_passes(dense: World, method: str) -> None:
    flags = METHODS[method]
    result = dense.join(*flags, "--verify")
    outcome = dense.verify(result, *flags)
    assert failed(outcome) == set(), outcome.stdout
    assert {check["id"]: check["status"] for check in outcome.json["checks"]}["provenance"] == "pass"
    assert [source["role"] for source in outcome.json["sources"]] == ["merged", "tuned", "tuned", "base"]


@pytest.mark.parametrize(("method", "flags"), WEIGHTED)
def test_part_of_the_way_and_other_weights(dense: World, method: str, flags: tuple[str, ...]) -> None:
    result = dense.join(*flags, "--alpha", "0.4", weights=(0.5, 1.25))
    (result / "lora_merge.json").unlink()
    assert failed(dense.verify(result, *flags, "--alpha", "0.4", weights=(0.5, 1.25))) == set()
    assert "interpolated" in failed(dense.verify(result, *flags, "--alpha", "0.4", weights=(0.5, 1.5)))
    assert "interpolated" in failed(dense.verify(result, *flags, "--alpha", "0.41", weights=(0.5, 1.25)))


@pytest.mark.parametrize("method", METHODS)
def test_one_entry_off_by_a_few_ulp_fails(dense: World, method: str) -> None:
    flags = METHODS[method]
    tensors = read_model(dense.join(*flags))
    kernel = tensors[KERNEL]
    at = np.unravel_index(np.argmax(np.abs(kernel)), kernel.shape)
    kernel[at] += 12 * np.spacing(kernel[at])
    assert failed(dense.verify(dense.write(tensors), *flags)) == {"interpolated"}


@pytest.mark.parametrize(
    ("method", "others"),
    [
        ("ties", ("--density", "0.4")),
        ("dare-ties", ("--density", "0.5", "--seed", "3")),
        ("dare-ties", ("--density", "0.4", "--seed", "4")),
        ("task-arithmetic", ()),
        ("linear", ("--sequential",)),
    ],
)
def test_other_options_fail(dense: World, method: str, others: tuple[str, ...]) -> None:
    result = dense.join(*METHODS[method])
    assert "interpolated" in failed(dense.verify(result, "--method", method, *others))


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(METHODS, 2)))
def test_another_method_fails(one: str, other: str, results: tuple[World, dict[str, Path]]) -> None:
    world, found = results
    assert "interpolated" in failed(world.verify(found[one], *METHODS[other]))


@pytest.fixture(scope="module")
def results(dense: World) -> tuple[World, dict[str, Path]]:
    found = {method: dense.join(*flags) for method, flags in METHODS.items()}
    for result in found.values():
        (result / "lora_merge.json").unlink()
    return dense, found


def test_the_order_counts_under_sequential(dense: World) -> None:
    flags = ("--method", "ties", "--density", "0.5", "--sequential")
    result = dense.join(*flags)
    assert failed(dense.verify(result, *flags)) == set()
    assert "interpolated" in failed(dense.verify(result, *flags, turned=True))


def ties(base: Tensors, tuned: Sequence[Tensors], density: float, *, more: int = 0, mean: bool = True) -> Tensors:
    """TIES with weights 1, by entry, in float64; `more` entries than the density says are kept of the first one."""
    result = {}
    for name, start in base.items():
        changes = []
        for number, each in enumerate(tuned):
            if name == UNMOVED:
                continue
            change = (each[name].astype(np.float32) - start).reshape(-1)
            keep = max(1, int(density * start.size)) + (more if number == 0 and name == KERNEL else 0)
            order = np.argsort(-np.abs(change), kind="stable")
            change[order[keep:]] = 0
            changes.append(change.astype(np.float64))
        total = sum(changes, np.zeros(start.size))
        sign = np.where(total >= 0, 1, -1)
        agreeing = [np.where(change * sign > 0, change, 0) for change in changes]
        count = np.sum([np.zeros(start.size), *(part != 0 for part in agreeing)], axis=0)
        moved = sum(agreeing, np.zeros(start.size)) / (np.maximum(count, 1) if mean else 1)
        result[name] = (start.reshape(-1) + moved).astype(np.float32).reshape(start.shape)
    return result


def test_ties_of_anothers_making(dense: World) -> None:
    base, tuned = read_model(dense.base), [read_model(path) for path in dense.tuned]
    flags = ("--method", "ties", "--density", "0.3")
    assert failed(dense.verify(dense.write(ties(base, tuned, 0.3)), *flags)) == set()
    for wrong in ({"more": 1}, {"more": -1}, {"mean": False}):
        outcome = dense.verify(dense.write(ties(base, tuned, 0.3, **wrong)), *flags)
        assert failed(outcome) == {"interpolated"}, wrong


@pytest.mark.parametrize("mistake", [None, "mean of all", "of the changes", "one angle for all", "unscaled"])
def test_slerp_of_anothers_making(dense: World, mistake: str | None) -> None:
    base, (first, second) = read_model(dense.base), [read_model(path) for path in dense.tuned]
    every = [np.concatenate([side[name].astype(np.float64).reshape(-1) for name in base]) for side in (first, second)]
    tensors = {}
    for name, start in base.items():
        a, b = (side[name].astype(np.float64) for side in (first, second))
        if mistake == "of the changes":
            a, b = a - start, b - start
        u, v = every if mistake == "one angle for all" else (a.reshape(-1), b.reshape(-1))
        theta = np.arccos(np.clip(u @ v / np.linalg.norm(u) / np.linalg.norm(v), -1, 1)) if a.any() and b.any() else 0
        share = np.sin(theta / 2) / np.sin(theta) if np.cos(theta) <= 0.9995 and mistake != "mean of all" else 0.5
        result = share * (a + b) + (start if mistake == "of the changes" else 0)
        tensors[name] = (start if name == UNMOVED else result).astype(np.float32)
        if mistake == "unscaled":
            tensors[name] = (tensors[name] * 1.001).astype(np.float32)
    assert failed(dense.verify(dense.write(tensors), "--method", "slerp")) == ({"interpolated"} if mistake else set())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_a_leaf_that_nobody_moved(dense: World, method: str) -> None:
    tensors = read_model(dense.join(*METHODS[method]))
    tensors[UNMOVED][0] = np.nextafter(tensors[UNMOVED][0], 9, dtype=np.float32)
    assert failed(dense.verify(dense.write(tensors), *METHODS[method])) == {"interpolated"}


@pytest.fixture(scope="module")
def openpi(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two fine-tunes with adapters inside, of one base; and a third one without any."""
    folder = tmp_path_factory.mktemp("openpi")
    pair: Pair = openpi_pair(folder)
    tree, rng = build(PALIGEMMA, ACTION), np.random.default_rng(5)
    other = {
        path: (values + rng.normal(0, 0.05, values.shape)).astype(values.dtype)
        if values.dtype == np.float32
        else values
        for path, values in tree.leaves.items()
    }
    second = save_step(folder / "run2" / "9", nest(other))
    plain = {path: (v + rng.normal(0, 0.1, v.shape)).astype(v.dtype) for path, v in pair.start.items()}
    third = save_step(folder / "full" / "3", nest(plain))
    return World(folder, pair.base, [pair.tuned, second, third], "--lora-alpha", ALPHAS)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "slerp"])
def test_adapters_inside(openpi: World, method: str) -> None:
    flags = (*METHODS[method], *(("--alpha", "0.5") if method in ("ties", "karcher") else ()))
    result = openpi.join(*flags, "--verify")
    assert failed(openpi.verify(result, *flags)) == set()
    if "--density" in flags:
        more = [*flags, "--density", "0.35"]
        assert "interpolated" in failed(openpi.verify(result, *more))


def test_one_entry_of_a_kernel_under_adapters(openpi: World) -> None:
    flags = METHODS["ties"]
    result = openpi.join(*flags)
    leaves = restore_flat(result / "params")
    assert failed(openpi.verify(save_step(openpi.folder / "same" / "7", nest(leaves, suffix=())), *flags)) == set()
    path = next(path for path in leaves if "q_einsum" in path)
    kernel = leaves[path] = leaves[path].copy()
    at = np.unravel_index(np.argmax(np.abs(kernel)), kernel.shape)
    kernel[at] *= 1 + 2.0**-14
    outcome = openpi.verify(save_step(openpi.folder / "off" / "7", nest(leaves, suffix=())), *flags)
    assert failed(outcome) == {"interpolated"}


@pytest.fixture(scope="module", params=["lora", "dora", "ia3"])
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two adapters beside a base in bfloat16."""
    folder = tmp_path_factory.mktemp("beside")
    base = llama_tensors(np.random.default_rng(0), layers=2, dtype=BFLOAT16)
    adapters = []
    for number, rank in enumerate((3, 2)):
        rng, found = np.random.default_rng(number), {}
        for name, kernel in base.items():
            module = "base_model.model." + name.removesuffix(".weight")
            if not name.endswith("up_proj.weight") and not name.endswith("q_proj.weight"):
                continue
            if request.param == "ia3":
                found[f"{module}.ia3_l"] = rng.normal(1, 0.1, (kernel.shape[0], 1)).astype(np.float32)
                continue
            found[f"{module}.lora_A.weight"] = rng.normal(0, 0.2, (rank, kernel.shape[1])).astype(np.float32)
            found[f"{module}.lora_B.weight"] = rng.normal(0, 0.2, (kernel.shape[0], rank)).astype(np.float32)
            if request.param == "dora":
                found[f"{module}.lora_magnitude_vector"] = rng.uniform(0.5, 1.5, kernel.shape[0]).astype(np.float32)
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 5.0,
            "use_dora": request.param == "dora",
        }
        if request.param == "ia3":
            config = {"peft_type": "IA3", "feedforward_modules": []}
        config["target_modules"] = ["q_proj", "up_proj"]
        adapter = folder / f"adapter{number}"
        adapter.mkdir()
        save_file(found, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        adapters.append(adapter)
    return World(folder, write_model(folder / "base", base), adapters)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("method", ["ties", "slerp", "dare-ties"])
def test_adapters_beside_the_base(beside: World, method: str, dtype: str) -> None:
    flags = METHODS[method]
    result = beside.join(*flags, "--verify", dtype=dtype, weights=(0.75, 0.5))
    assert failed(beside.verify(result, *flags, weights=(0.75, 0.5))) == set()
    (result / "lora_merge.json").unlink()
    assert "interpolated" in failed(beside.verify(result, *flags, weights=(0.75, 0.75)))


def test_combined_adapters_are_verified_with_their_flags(tmp_path: Path, beside: World) -> None:
    flags = ("--combine", "ties_svd", "--density", "0.5")
    adapters = [part for adapter in beside.tuned for part in ("--adapter", f"{adapter}@0.7")]
    if "ia3" in (beside.tuned[0] / "adapter_config.json").read_text().lower() or (
        json.loads((beside.tuned[0] / "adapter_config.json").read_text()).get("use_dora")
    ):
        return
    assert run("merge", beside.base, *adapters, "-o", tmp_path / "out", "--dtype", "float32", *flags).code == 0
    asked = ("verify", tmp_path / "out", "--against", beside.base, *adapters, "--json")
    assert failed(run(*asked, *flags)) == set()
    assert "fused-exact" in failed(run(*asked, *flags[:3], "0.6"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--against", "a", "--against", "b"), "nothing says how to join"),
        (("--against", "a", "--sequential"), "--sequential is for --method"),
        (("--against", "a", "--against", "b", "--method", "ties", "--base", "c"), "needs --density"),
        (("--against", "a", "--against", "b", "--method", "linear"), "pass --base"),
        (("--against", "a", "--against", "b", "--method", "linear", "--base", "c", "--adapter", "d"), "--adapter"),
        (("--against", "a", "--method", "linear", "--base", "c", "--combine", "svd"), "--combine"),
        (("--against", "a", "--combine", "ties", "--density", "0.5"), "--adapter"),
    ],
)
def test_flags_that_make_no_sense(flags: tuple[str, ...], words: str) -> None:
    outcome = run("verify", "merged", *flags)
    assert outcome.code == 2
    assert words in outcome.error


def test_weights_that_the_record_denies(dense: World) -> None:
    result = dense.join("--method", "linear", weights=(0.5, 0.5))
    outcome = dense.verify(result, "--method", "linear", weights=(0.25, 0.75))
    assert failed(outcome) == {"interpolated", "provenance"}


# --- the parts


def judged_join(base: np.ndarray, tuned: Sequence[np.ndarray], joining: Joining) -> np.ndarray:
    held = [Held(f"t{number}", {LEAF: values}) for number, values in enumerate(tuned, 1)]
    source = JointSource(Held("base", {LEAF: base}), held, joining, spelled)
    whole = source.read(LEAF, full_region(base.shape))
    blocks = np.concatenate([values.reshape(-1) for values, _ in source.possible(LEAF)]).reshape(base.shape)
    np.testing.assert_array_equal(whole, blocks)
    return whole


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["linear", "task-arithmetic", "ties", "dare-ties", "slerp", "karcher", "model-stock"]),
    st.integers(0, 2**20),
    st.integers(2, 4),
    st.sampled_from([0.05, 0.3, 0.9, 1.0]),
    st.booleans(),
)
def test_both_formulas_agree(method: Any, seed: int, count: int, density: float, sequential: bool) -> None:
    count = 2 if method == "slerp" else count
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((7, 5)).astype(np.float32)
    tuned = [
        (base + rng.choice([0, 0.3], (7, 5)) * rng.standard_normal((7, 5))).astype(np.float32) for _ in range(count)
    ]
    if seed % 5 == 0:
        tuned[seed % count] = base.astype(BFLOAT16)
    weights = (1.0,) * count if method == "model-stock" else tuple(rng.uniform(0.1, 1, count))
    joining = Joining(
        method,
        weights,
        method != "model-stock",
        density if method in ("ties", "dare-ties") else None,
        seed,
        sequential and method in ("linear", "task-arithmetic", "ties", "dare-ties"),
    )
    np.testing.assert_allclose(judged_join(base, tuned, joining), join(base, tuned, joining), rtol=0, atol=3e-5)


def test_blocks_follow_the_rows_that_are_asked_for() -> None:
    base, tuned = leaves_of()
    joining = some("ties", 3)
    held = [Held(f"t{number}", {LEAF: values}) for number, values in enumerate(tuned, 1)]
    source = JointSource(Held("base", {LEAF: base}), held, joining, spelled)
    rows = [values for values, _ in source.possible(LEAF, [3, 8])]
    np.testing.assert_array_equal(np.concatenate(rows), source.read(LEAF, full_region(base.shape))[[3, 8]])
    with mock.patch("lora_merge_cli.side_by_side.BLOCK_ENTRIES", 40):
        again = JointSource(Held("base", {LEAF: base}), held, joining, spelled)
        pieces = [values.reshape(-1) for values, _ in again.possible(LEAF)]
    assert max(piece.size for piece in pieces) <= 40
    np.testing.assert_array_equal(np.concatenate(pieces), source.read(LEAF, full_region(base.shape)).reshape(-1))


def test_inputs_at_fault_are_errors() -> None:
    base, (first, second) = leaves_of(2)
    one, shorter = Held("base", {LEAF: base}), Held("t2", {LEAF: second[:3]})
    with pytest.raises(WrongBase, match="t2 :: block/kernel"):
        JointSource(one, [Held("t1", {LEAF: first}), shorter], some("linear"), spelled)
    head = {("h",): np.ones(3)}
    others = [Held("t1", {LEAF: first, **head}), Held("t2", {LEAF: second, ("h",): np.zeros(3)})]
    with pytest.raises(UnsupportedCheckpoint, match="t2 :: h"):
        next(JointSource(one, others, some("linear"), spelled).possible(("h",)))
    second[2, 2] = np.inf
    for method in ("linear", "ties", "slerp", "model-stock"):
        with pytest.raises(NonFiniteInput, match="t2 :: block/kernel"):
            judged_join(base, [first, second], some(method))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]) | st.floats(0, 3), min_size=1, max_size=300),
    st.data(),
    st.sampled_from([4, 16, 2**19]),
)
def test_the_largest_are_found_in_whatever_runs(values: list[float], data: Any, held: int) -> None:
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(1, len(values)))
    array = np.array(values)

    def runs() -> Iterator[list[np.ndarray]]:
        for start in range(0, array.size, cut):
            yield [array[start : start + cut], -array[start : start + cut]]

    with mock.patch.object(joint_largest, "_HELD", held):
        found = k_largest(k, 2, runs)
    for sequence, result in zip((array, -array), found, strict=True):
        value = np.sort(sequence)[::-1][k - 1]
        assert result.value == value
        assert result.equal == np.count_nonzero(sequence == value)
        assert result.rest == k - np.count_nonzero(sequence > value)
        order = np.argsort(-sequence, kind="stable")
        assert place_of(result.rest, value, [sequence]) == order[k - 1]


def outcomes(doubts: Doubts, values: np.ndarray, at: int) -> set[float]:
    """All that an entry may be, to three digits."""
    return {round(float(value), 3) for value in (values[at], *doubts.values[doubts.places == at])}


def test_an_entry_at_the_edge_of_a_trim_may_fall_either_way() -> None:
    values = {0: np.zeros(4), 1: np.array([5.0, 2.0, 2.0 + 1e-7, 1.0])}
    making = Making(0, (Share(1.0, 1, 0, 0, Kept(2.0, 2.0 + 1e-7, None)),), election="mean")
    found, doubts = made(making, values, {1: np.full(4, 3e-7)}, np.arange(4))
    assert [outcomes(doubts, found, at) for at in range(4)] == [{5.0}, {0.0, 2.0}, {0.0, 2.0}, {0.0}]
    exact = Making(0, (Share(1.0, 1, 0, 0, Kept(2.0, 2.0, None)),), election="mean")
    found, doubts = made(exact, values, {}, np.arange(4))
    assert [outcomes(doubts, found, at) for at in range(4)] == [{5.0}, {2.0}, {2.0}, {0.0}]


def test_a_sign_at_the_edge_may_fall_either_way() -> None:
    values = {0: np.zeros(3), 1: np.array([1.0, 1.0, 1.0]), 2: np.array([-1.0 - 1e-7, -1.0, -0.5])}
    shares = Share(1.0, 1, 0, 0), Share(1.0, 2, 0, 1)
    found, doubts = made(Making(0, shares, election="sum"), values, {1: np.full(3, 3e-7)}, np.arange(3))
    assert [outcomes(doubts, found, at) for at in range(3)] == [{1.0, -1.0}, {1.0, -1.0}, {1.0}]
    found, doubts = made(Making(0, shares, election="sum"), values, {}, np.arange(3))
    assert [outcomes(doubts, found, at) for at in range(3)] == [{-1.0}, {1.0}, {1.0}]


def test_a_change_within_its_error_may_count_or_not() -> None:
    values = {0: np.zeros(2), 1: np.array([1.0, 1.0]), 2: np.array([1e-8, 0.5])}
    shares = Share(1.0, 1, 0, 0), Share(1.0, 2, 0, 1)
    found, doubts = made(Making(0, shares, election="mean"), values, {2: np.full(2, 3e-8)}, np.arange(2))
    assert outcomes(doubts, found, 0) == {1.0, 0.5}
    assert outcomes(doubts, found, 1) == {0.75}
