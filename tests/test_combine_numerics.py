"""What several adapters make of one kernel: against PEFT itself, and against the formulas in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_merge_cli.combining import METHODS, Combining
from lora_merge_cli.draws import keep_mask
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.operations.combine import Part, combine, departure

Array = np.ndarray[Any, np.dtype[Any]]

NAME = "model.layers.0.q_proj.weight"
OUT, IN = 7, 10
DETERMINISTIC = [
    Combining("linear"),
    Combining("cat"),
    Combining("svd", svd_rank=2),
    Combining("svd", svd_rank=5),
    *(
        Combining(method, density, majority_sign=sign)
        for method in ("ties", "ties_svd")
        for density in (0.35, 0.8, 1.0)
        for sign in ("total", "frequency")
    ),
    *(Combining(method, density) for method in ("magnitude_prune", "magnitude_prune_svd") for density in (0.35, 1.0)),
    *(Combining(method, 1.0) for method in ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")),
    Combining("dare_ties_svd", 1.0, svd_rank=2, majority_sign="frequency"),
]


def _parts(
    weights: Sequence[float], scales: Sequence[float], ranks: Sequence[int] = (3, 3, 3), seed: int = 0
) -> list[Part]:
    """Random factors that float32 holds exactly."""
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> Array:
        return rng.normal(size=shape).astype(np.float32).astype(np.float64)

    return [Part(drawn(IN, r), drawn(r, OUT), w, s) for w, s, r in zip(weights, scales, ranks, strict=False)]


def _product(contribution: Any) -> Array:
    """The delta, outputs by inputs."""
    return np.asarray((contribution.a.astype(np.float64) @ contribution.b.astype(np.float64)).T)


def _combined(parts: Sequence[Part], combining: Combining) -> Array:
    return _product(combine(parts, combining, NAME))


def _sum(parts: Sequence[Part]) -> Array:
    return np.asarray(sum((each.weight * each.scale * (each.a @ each.b).T for each in parts), np.zeros((OUT, IN))))


def _assert_near(found: Array, expected: Array, tolerance: float = 1e-5) -> None:
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


WEIGHTS = [(1.0, 1.0), (0.7, -0.4), (-1.5, 0.6), (0.7, 0.0), (0.6, -0.3, 1.4)]


# PEFT itself


def _by_peft(parts: Sequence[Part | None], combining: Combining, layer: str = "linear") -> Array:
    """What `add_weighted_adapter` makes of a layer, outputs by inputs; an adapter that is None is on another layer."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D

    class Net(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.one = {
                "linear": lambda: torch.nn.Linear(IN, OUT),
                "conv1d": lambda: conv1d(OUT, IN),
                "embedding": lambda: torch.nn.Embedding(IN, OUT),
                "conv": lambda: torch.nn.Conv2d(IN // 2, OUT, (2, 1)),
            }[layer]()
            self.two = torch.nn.Linear(IN, OUT)

    transposed = layer == "conv1d"
    model = None
    weights = []
    for number, part in enumerate(parts):
        rank = 3 if part is None else part.b.shape[0]
        alpha = 5 if part is None else part.scale * rank
        weights.append(1.0 if part is None else part.weight)
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=["two" if part is None else "one"], fan_in_fan_out=transposed
        )
        if model is None:
            model = peft.get_peft_model(Net(), config, adapter_name="0")
        else:
            model.add_adapter(str(number), config)
        if part is None:
            continue
        one = model.base_model.model.one
        a, b = (torch.from_numpy(np.ascontiguousarray(values.T.astype(np.float32))) for values in (part.a, part.b))
        with torch.no_grad():
            if layer == "embedding":
                one.lora_embedding_A[str(number)].copy_(a)
                one.lora_embedding_B[str(number)].copy_(b)
            else:
                for factors, values in ((one.lora_A, a), (one.lora_B, b)):
                    factors[str(number)].weight.copy_(values.reshape(factors[str(number)].weight.shape))
    assert model is not None
    model.base_model.add_weighted_adapter(
        [str(number) for number in range(len(parts))],
        weights,
        "joint",
        combining.method,
        density=combining.density,
        svd_rank=combining.svd_rank,
        majority_sign_method=combining.majority_sign,
    )
    delta = model.base_model.model.one.get_delta_weight("joint").detach().double().numpy()
    return np.asarray(delta.T if layer in ("conv1d", "embedding") else delta.reshape(OUT, IN))


@pytest.fixture
def quiet(recwarn: pytest.WarningsRecorder) -> None:
    """PEFT warns of densities of 1 and of transposed layers."""


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("combining", DETERMINISTIC, ids=str)
def test_as_peft_combines(combining: Combining, weights: tuple[float, ...]) -> None:
    parts = _parts(weights, (5 / 3, 0.5, 2.25))
    _assert_near(_combined(parts, combining), _by_peft(parts, combining))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("layer", ["conv1d", "embedding", "conv"])
@pytest.mark.parametrize("combining", DETERMINISTIC, ids=str)
def test_as_peft_combines_other_layers(combining: Combining, layer: str) -> None:
    parts = _parts((0.7, -0.4), (5 / 3, 0.5), seed=1)
    _assert_near(_combined(parts, combining), _by_peft(parts, combining, layer))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("combining", [each for each in DETERMINISTIC if not each.crosses], ids=str)
def test_as_peft_combines_ranks(combining: Combining) -> None:
    parts = _parts((0.7, -0.4), (5 / 3, 0.5), ranks=(2, 4))
    _assert_near(_combined(parts, combining), _by_peft(parts, combining))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("combining", DETERMINISTIC, ids=str)
def test_as_peft_combines_what_one_adapter_misses(combining: Combining) -> None:
    parts = _parts((0.7, -0.4), (5 / 3, 0.5))
    _assert_near(_combined(parts, combining), _by_peft([parts[0], None, parts[1]], combining))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("combining", DETERMINISTIC, ids=str)
def test_as_peft_combines_what_one_adapter_has_alone(combining: Combining) -> None:
    parts = _parts((-0.7,), (5 / 3,))
    _assert_near(_combined(parts, combining), _by_peft([None, parts[0]], combining))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("method", [method for method in METHODS if method != "sum"])
def test_one_adapter_is_its_own_delta(method: str) -> None:
    combining = Combining(method) if method in ("linear", "cat", "svd") else Combining(method, 0.3)
    parts = _parts((-0.7,), (5 / 3,))
    found = _combined(parts, combining.of(1, ()))
    _assert_near(found, _sum(parts), 1e-6)
    _assert_near(found, _by_peft(parts, combining))


# The formulas in float64


def _pruned(tensor: Array, density: float) -> Array:
    order = sorted(range(tensor.size), key=lambda entry: (-abs(tensor.reshape(-1)[entry]), entry))
    result = np.zeros(tensor.size)
    for entry in order[: int(density * tensor.size)]:
        result[entry] = tensor.reshape(-1)[entry]
    return result.reshape(tensor.shape)


def _operated(tensors: Sequence[Array], weights: Sequence[float], combining: Combining) -> Array:
    result = np.zeros(tensors[0].shape)
    for at in np.ndindex(result.shape):
        values = [float(tensor[at]) for tensor in tensors]
        terms = list(zip(values, weights, strict=True))
        if not combining.elects:
            result[at] = sum(value * weight for value, weight in terms)
            continue
        votes = sum(values) if combining.majority_sign == "total" else float(np.sign(values).sum())
        sign = 1 if votes >= 0 else -1
        kept = [value * weight for value, weight in terms if np.sign(value) == sign]
        result[at] = sum(kept) / max(len(kept), 1)
    return result


def _reference(parts: Sequence[Part], combining: Combining, drop: Callable[[Array, int], Array]) -> Array:
    """The pruned methods, outputs by inputs; `drop` prunes a tensor in PEFT's orientation, by its number."""
    n = len(parts)
    if not combining.is_svd:
        c = [each.weight * each.scale for each in parts]
        roots = [abs(each) ** 0.5 for each in c]
        signed = [root if each >= 0 else -root for root, each in zip(roots, c, strict=True)]
        a = _operated([drop(each.a.swapaxes(-1, -2), k) for k, each in enumerate(parts)], signed, combining)
        b = _operated([drop(each.b.swapaxes(-1, -2), n + k) for k, each in enumerate(parts)], roots, combining)
        return np.asarray(b @ a)
    deltas = [drop(each.scale * (each.a @ each.b).swapaxes(-1, -2), k) for k, each in enumerate(parts)]
    u, s, vh = np.linalg.svd(_operated(deltas, [each.weight for each in parts], combining), full_matrices=False)
    rank = combining.svd_rank or max(each.b.shape[-2] for each in parts)
    return np.asarray((u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :])


PRUNING = [method for method in METHODS if method not in ("sum", "linear", "cat", "svd")]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("method", [method for method in PRUNING if method.startswith("dare")])
def test_dare_by_its_draws(method: str, weights: tuple[float, ...]) -> None:
    combining = Combining(method, 0.6, seed=3)
    parts = _parts(weights, (5 / 3, 0.5, 2.25))

    def drop(tensor: Array, number: int) -> Array:
        return np.where(keep_mask(3, f"{NAME}#{number}", tensor.shape, 0.6), tensor / 0.6, 0)

    _assert_near(_combined(parts, combining), _reference(parts, combining, drop))


@pytest.mark.parametrize("method", PRUNING)
def test_a_stack_of_matrices_is_pruned_as_one(method: str) -> None:
    combining = Combining(method, 0.4, svd_rank=2) if method.endswith("svd") else Combining(method, 0.4)
    rng = np.random.default_rng(2)
    parts = [
        Part(rng.normal(size=(4, IN, 3)) * np.arange(1, 5)[:, None, None], rng.normal(size=(4, 3, OUT)), w, s)
        for w, s in ((0.7, 1.5), (-0.4, 0.5))
    ]

    def drop(tensor: Array, number: int) -> Array:
        if combining.draws:
            return np.where(keep_mask(0, f"{NAME}#{number}", tensor.shape, 0.4), tensor / 0.4, 0)
        return _pruned(tensor, 0.4)

    found = combine(parts, combining, NAME)
    assert (found.a.dtype, found.b.dtype) == (np.float32, np.float32)
    product = (found.a.astype(np.float64) @ found.b.astype(np.float64)).swapaxes(-1, -2)
    _assert_near(product, _reference(parts, combining, drop))


@pytest.mark.parametrize("method", ["magnitude_prune", "ties", "magnitude_prune_svd", "ties_svd"])
def test_of_equal_magnitudes_the_first_is_kept(method: str) -> None:
    """Factors of small integers: many ties, in PEFT's orientation."""
    rng = np.random.default_rng(4)
    parts = [
        Part(rng.integers(-2, 3, (IN, 3)).astype(float), rng.integers(-2, 3, (3, OUT)).astype(float), w, s)
        for w, s in ((1.0, 4.0), (-0.5, 0.25))
    ]
    for density in (0.2, 0.5, 0.77):
        combining = Combining(method, density)
        expected = _reference(parts, combining, lambda tensor, _, share=density: _pruned(tensor, share))
        _assert_near(_combined(parts, combining), expected)


@pytest.mark.parametrize("method", ["magnitude_prune", "magnitude_prune_svd"])
def test_a_density_that_keeps_no_entry(method: str) -> None:
    assert not _combined(_parts((1.0, 1.0), (2.0, 0.5)), Combining(method, 0.001)).any()


def test_dare_keeps_the_mean() -> None:
    """Over many seeds, since the two factors are drawn by themselves."""
    parts = _parts((0.7, -0.4), (5 / 3, 0.5))
    draws = np.stack([_combined(parts, Combining("dare_linear", 0.7, seed=seed)) for seed in range(800)])
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - _combined(parts, Combining("linear"))) < 5 * error).all()


def test_draws_depend_on_seed_and_name() -> None:
    parts = _parts((0.7, -0.4), (5 / 3, 0.5))
    one = _combined(parts, Combining("dare_ties", 0.5, seed=1))
    assert (one == _combined(parts, Combining("dare_ties", 0.5, seed=1))).all()
    assert (one != _combined(parts, Combining("dare_ties", 0.5, seed=2))).any()
    other = _product(combine(parts, Combining("dare_ties", 0.5, seed=1), "another"))
    assert (one != other).any()


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties", "ties_svd"])
def test_several_dims_of_inputs_are_given_back(method: str) -> None:
    parts = _parts((0.7, -0.4), (5 / 3, 0.5))
    wide = [dataclasses.replace(each, a=each.a.reshape(2, 5, 3)) for each in parts]
    combining = Combining(method, 0.5) if method.startswith("ties") else Combining(method)
    flat, found = (combine(each, combining, NAME) for each in (parts, wide))
    assert found.a.shape[:2] == (2, 5) and found.gain is None
    np.testing.assert_array_equal(found.a.reshape(flat.a.shape), flat.a)
    np.testing.assert_array_equal(found.b, flat.b)


@pytest.mark.parametrize("method", ["svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("rank", [1, 4, 7, 40])
def test_the_truncation_is_the_closest(method: str, rank: int) -> None:
    parts = _parts((0.7, -0.4, 1.0), (5 / 3, 0.5, 1.0))
    density = 1.0 if method != "svd" else None
    found = combine(parts, Combining(method, density, svd_rank=rank), NAME)
    assert found.a.shape[-1] == min(rank, OUT)
    left = np.linalg.norm(_sum(parts) - _product(found))
    beyond = np.linalg.svd(_sum(parts), compute_uv=False)[rank:]
    assert left == pytest.approx(np.linalg.norm(beyond), abs=1e-5)


@pytest.mark.parametrize("method", ["svd", "magnitude_prune_svd"])
def test_a_deficient_rank_leaves_no_noise(method: str) -> None:
    one, *_ = _parts((0.7,), (5 / 3,), ranks=(2,))
    combining = Combining(method, None if method == "svd" else 1.0, svd_rank=6)
    found = combine([one, one], combining, NAME)
    assert not found.a[:, 2:].any() and not found.b[2:].any()
    _assert_near(_product(found), 2 * _sum([one]))


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_change_stays_zero(method: str) -> None:
    parts = [dataclasses.replace(each, b=0 * each.b) for each in _parts((0.7, -0.4), (5 / 3, 0.5))]
    assert not _combined(parts, Combining(method, 0.5 if method in PRUNING else None)).any()


@pytest.mark.parametrize("method", METHODS)
def test_what_float32_cannot_hold_is_refused(method: str) -> None:
    parts = _parts((1e300, 1.0), (1e30, 1.0))
    with pytest.raises(NonFiniteInput, match="beyond float32"):
        combine(parts, Combining(method, 1.0 if method in PRUNING else None), NAME)


# Laws

_ORDERLESS = [
    Combining("linear"),
    Combining("cat"),
    Combining("svd", svd_rank=3),
    Combining("ties", 0.6),
    Combining("ties", 0.6, majority_sign="frequency"),
    Combining("magnitude_prune", 0.6),
    Combining("ties_svd", 0.6),
    Combining("magnitude_prune_svd", 0.6),
]
_weights = st.lists(st.floats(-2, 2).map(lambda weight: round(weight, 2)), min_size=2, max_size=3)


@pytest.mark.parametrize("combining", _ORDERLESS, ids=str)
@given(_weights, st.integers(0, 50))
def test_order_does_not_matter(combining: Combining, weights: list[float], seed: int) -> None:
    parts = _parts(weights, (5 / 3, 0.5, 2.25), seed=seed)
    if combining.is_svd:
        s = np.linalg.svd(_combined(parts, dataclasses.replace(combining, svd_rank=OUT)), compute_uv=False)
        assume(s[2] - s[3] > 1e-2)
    _assert_near(_combined(parts, combining), _combined(parts[::-1], combining), 2e-5)


@given(_weights, st.integers(0, 50))
def test_cat_is_the_sum(weights: list[float], seed: int) -> None:
    parts = _parts(weights, (5 / 3, 0.5, 2.25), seed=seed)
    _assert_near(_combined(parts, Combining("cat")), _sum(parts), 1e-6)
    assert departure(parts, combine(parts, Combining("cat"), NAME)) < 1e-6


@given(_weights, st.integers(0, 50))
def test_pruning_nothing_is_linear(weights: list[float], seed: int) -> None:
    parts = _parts(weights, (5 / 3, 0.5, 2.25), seed=seed)
    linear = _combined(parts, Combining("linear"))
    for method in ("magnitude_prune", "dare_linear"):
        np.testing.assert_array_equal(_combined(parts, Combining(method, 1.0)), linear)


@given(st.floats(-2, 2), st.integers(0, 50))
def test_one_part_is_its_delta(weight: float, seed: int) -> None:
    parts = _parts((weight,), (5 / 3,), seed=seed)
    for combining in (Combining("linear"), Combining("cat"), Combining("svd"), Combining("ties", 1.0)):
        _assert_near(_combined(parts, combining), _sum(parts), 1e-6)


@given(_weights, st.sampled_from(_ORDERLESS), st.integers(0, 50))
def test_the_departure_is_that_of_the_deltas(weights: list[float], combining: Combining, seed: int) -> None:
    parts = _parts(weights, (5 / 3, 0.5, 2.25), seed=seed)
    whole = np.linalg.norm(_sum(parts))
    assume(whole > 0.1)
    found = combine(parts, combining, NAME)
    assert departure(parts, found) == pytest.approx(np.linalg.norm(_product(found) - _sum(parts)) / whole, abs=1e-9)


def test_the_departure_from_nothing() -> None:
    one, other = _parts((1.0, 1.0), (2.0, 2.0))
    opposite = dataclasses.replace(one, weight=-1.0)
    assert (
        departure(
            [dataclasses.replace(one, b=0 * one.b)] * 2,
            combine([dataclasses.replace(one, b=0 * one.b)] * 2, Combining("linear"), NAME),
        )
        == 0
    )
    zero = [dataclasses.replace(one, weight=0.0), dataclasses.replace(other, weight=0.0)]
    assert departure(zero, combine([one, opposite, other], Combining("cat"), NAME)) == np.inf
