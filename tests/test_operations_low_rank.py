"""Operations that reduce what a trainer stores to two thin factors, against float64 NumPy written from PEFT's forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.equation import Equation
from lora_merge_cli.operations import LOW_RANK, operation_named
from lora_merge_cli.records import AdapterSite, Forward, LowRank, Scale
from tests.test_operations_by_row import TARGET, adapted, parameters, tensor

Arrays = dict[str, np.ndarray]

LAYOUTS = {"linear": "ri,or->oi", "Conv1D": "ri,or->io", "convolution": "rixy,or->oixy"}
SCALE = 5 / 3


def site_of(operation: str, equation: str, **options: Any) -> AdapterSite:
    """A site whose scale is no whole number."""
    return AdapterSite(
        targets=(("w",),),
        operation=operation,
        factors={},
        parameters=LowRank(3, Scale(SCALE, "test"), Equation(equation)),
        forward=Forward("", "", ""),
        group="",
        module="",
        label="w",
        settings=options,
    )


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def delta(site: AdapterSite, factors: Arrays, weight: float = 1.0) -> np.ndarray:
    """What the code under test adds, outputs by inputs."""
    operation = operation_named(site.operation)
    assert not operation.needs_norms
    found = operation.contribute(site, operation.reduce(site, factors), weight, None)
    assert found.gain is None
    assert found.a.dtype == found.b.dtype == np.float32
    rank = found.a.shape[-1]
    return (found.a.reshape(-1, rank).astype(np.float64) @ found.b.reshape(rank, -1)).T


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def wide(factors: Arrays) -> Arrays:
    return {role: values.astype(np.float64) for role, values in factors.items()}


# What each adapter adds to its layer's output, x being n by inputs.


def adalora_branch(x: np.ndarray, f: Arrays) -> np.ndarray:
    return x @ (f["lora_a"].reshape(len(f["lora_e"]), -1) * f["lora_e"]).T @ f["lora_b"].T


def vera_branch(x: np.ndarray, f: Arrays) -> np.ndarray:
    return f["lambda_b"] * ((f["lambda_d"] * (x @ f["vera_a"].reshape(3, -1).T)) @ f["vera_b"].T)


def delora_branch(x: np.ndarray, f: Arrays) -> np.ndarray:
    hidden = (x * f["w_norm"]) @ f["lora_a"].T
    norms = [
        np.maximum(np.linalg.norm(f["lora_a"], axis=1), 1e-4),
        np.maximum(np.linalg.norm(f["lora_b"], axis=0), 1e-4),
    ]
    return (hidden * (f["lambda"] / (norms[0] * norms[1]))) @ f["lora_b"].T


BRANCHES: dict[str, Callable[[np.ndarray, Arrays], np.ndarray]] = {
    "adalora": adalora_branch,
    "vera": vera_branch,
    "delora": delora_branch,
}


def made(operation: str, inputs: tuple[int, ...], outputs: int) -> Arrays:
    rng = np.random.default_rng(len(operation) + outputs)
    a, b = normal(rng, 3, *inputs), normal(rng, outputs, 3)
    if operation == "adalora":
        return {"lora_a": a, "lora_b": b, "lora_e": normal(rng, 3, 1)}
    if operation == "vera":
        return {"vera_a": a, "vera_b": b, "lambda_b": normal(rng, outputs), "lambda_d": normal(rng, 3)}
    # PEFT divides by no norm below 1e-4.
    a[1] *= 1e-6
    norms = np.abs(normal(rng, *inputs)) + 1
    return {"lora_a": a, "lora_b": b, "lambda": np.full(1, 7, np.float32), "w_norm": norms}


@pytest.mark.parametrize("operation", BRANCHES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [5, 11])
def test_the_product_is_that_of_the_forward_pass(operation: str, layout: str, outputs: int) -> None:
    inputs = (2, 2, 2) if layout == "convolution" else (8,)
    if operation == "delora" and layout == "convolution":
        pytest.skip("PEFT has DeLoRA on linear layers alone")
    factors = made(operation, inputs, outputs)
    expected = SCALE * BRANCHES[operation](np.eye(8), wide(factors)).T
    site = site_of(operation, LAYOUTS[layout])
    close(delta(site, factors), expected)
    close(delta(site, factors, -0.5), -0.5 * expected)


def test_a_factor_of_zeros_adds_nothing() -> None:
    factors = made("delora", (8,), 5) | {"lora_b": np.zeros((5, 3), np.float32)}
    assert not delta(site_of("delora", LAYOUTS["linear"]), factors).any()


@pytest.mark.parametrize("layout", ["linear", "Conv1D"])
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 11), (11, 7), (7, 7)])
def test_randlora_pairs_bases_and_ranks_by_position(layout: str, inputs: int, outputs: int) -> None:
    rng = np.random.default_rng(inputs)
    least, most, rank, bases = min(inputs, outputs), max(inputs, outputs), 3, 3
    factors = {
        "randlora_a": normal(rng, rank, 1, least),
        "randlora_b": normal(rng, most, bases, rank),
        "lambda": normal(rng, rank, bases),
        "gamma": normal(rng, bases, least),
    }
    f = wide(factors)
    thin, long = np.zeros((rank * bases, least)), np.zeros((most, rank * bases))
    for i in range(rank):
        for k in range(bases):
            thin[i * bases + k] = f["lambda"][i, k] * f["randlora_a"][i, 0] * f["gamma"][k]
            long[:, k * rank + i] = f["randlora_b"][:, k, i]
    x = np.eye(inputs)
    branch = (x @ thin.T) @ long.T if inputs <= outputs else (x @ long) @ thin
    site = site_of("randlora", LAYOUTS[layout], in_features=inputs)
    close(delta(site, factors), SCALE * branch.T)


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_miss_adds_its_block_to_every_run_of_inputs(rank: int, inputs: int, width: int, times: int, mini: bool) -> None:
    outputs = width * times
    block = 1 + np.abs(normal(np.random.default_rng(rank), rank, width if mini else outputs))
    options: Mapping[str, Any] = {
        "mode": "mini" if mini else "default",
        "in_features": inputs,
        "out_features": outputs,
    }
    full = np.tile(block, (1, times)) if mini else block
    padded = np.pad(np.eye(inputs), ((0, 0), (0, -inputs % rank)))
    branch = padded.reshape(inputs, -1, rank).sum(axis=1) @ full.astype(np.float64)
    close(delta(site_of("miss", LAYOUTS["linear"], **options), {"block": block}), SCALE * branch.T)


def test_reduced_factors_have_the_dims_of_the_equation() -> None:
    equation = Equation(LAYOUTS["convolution"])
    site = site_of("adalora", equation.text)
    found = operation_named("adalora").reduce(site, made("adalora", (2, 3, 4), 5))
    assert set(found) == {"lora_a", "lora_b"}
    assert equation.sizes(found["lora_a"].shape, found["lora_b"].shape, (5, 2, 3, 4)) is not None


@pytest.mark.parametrize("name", ["add_delta", "dora"])
def test_what_is_reduced_already_stays(name: str) -> None:
    factors = {"lora_a": np.ones((3, 4)), "lora_b": np.ones((5, 3)), "magnitude": np.ones(5)}
    assert operation_named(name).reduce(site_of(name, LAYOUTS["linear"]), factors) is factors


def test_names_are_distinct() -> None:
    names = [operation.name for operation in LOW_RANK]
    assert len(names) == len(set(names))
    assert {"add_delta", "dora", "miss", "randlora", *BRANCHES} == set(names)


# The same against PEFT's own layers.


def check_layer(
    layer: Any, operation: str, factors: Arrays, scale: float, turned: bool = False, **options: Any
) -> None:
    """Compare with what the layer adds unmerged, where it is a linear one, and with its merged weight."""
    import torch

    before = tensor(layer.get_base_layer().weight).copy()
    text = {(2, False): "linear", (2, True): "Conv1D", (4, False): "convolution"}[before.ndim, turned]
    site = site_of(operation, LAYOUTS[text], **options)
    found = delta(site, factors) * (scale / SCALE)
    if before.ndim == 2:
        with torch.no_grad():
            one = torch.eye(found.shape[1], dtype=torch.float64)
            whole = tensor(layer(one) - layer(torch.zeros_like(one)))
        close(found, whole.T - (before.T if turned else before))
    layer.merge()
    added = tensor(layer.get_base_layer().weight) - before
    close(found, (added.T if turned else added).reshape(found.shape))


def layer_of(kind: str, inputs: int = 20, outputs: int = 12) -> Any:
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    layer = {
        "linear": lambda: torch.nn.Linear(inputs, outputs),
        "Conv1D": lambda: Conv1D(outputs, inputs),
        "convolution": lambda: torch.nn.Conv2d(2, outputs, (3, 2)),
    }[kind]()
    with torch.no_grad():
        layer.bias.add_(torch.randn(outputs))
    return layer


@pytest.mark.parametrize("kind", LAYOUTS)
def test_peft_adalora(kind: str) -> None:
    base = layer_of(kind)
    from peft import AdaLoraConfig

    config = AdaLoraConfig(init_r=3, lora_alpha=5, total_step=9, fan_in_fan_out=kind == "Conv1D", **TARGET)
    layer = adapted(base, config)
    factors = parameters(layer, lora_a="lora_A", lora_b="lora_B", lora_e="lora_E")
    if kind == "convolution":
        factors["lora_a"] = factors["lora_a"].reshape(3, 2, 3, 2)
    check_layer(layer, "adalora", factors, 5 / (3 + 1e-5), kind == "Conv1D")


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_peft_vera(kind: str) -> None:
    base = layer_of(kind)
    from peft import VeraConfig

    layer = adapted(base, VeraConfig(r=3, fan_in_fan_out=kind == "Conv1D", **TARGET))
    roles = {"vera_a": "vera_A", "vera_b": "vera_B", "lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"}
    check_layer(layer, "vera", parameters(layer, **roles), 1.0, kind == "Conv1D")


def test_peft_delora() -> None:
    base = layer_of("linear")
    from peft import DeloraConfig

    layer = adapted(base, DeloraConfig(r=3, delora_lambda=7, init_weights=False, **TARGET))
    roles = {"lora_a": "delora_A", "lora_b": "delora_B", "lambda": "delora_lambda", "w_norm": "delora_w_norm"}
    check_layer(layer, "delora", parameters(layer, **roles), 1 / 3)


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
@pytest.mark.parametrize(("inputs", "outputs"), [(20, 12), (12, 20), (12, 12)])
@pytest.mark.parametrize("rank", [4, 5])
def test_peft_randlora(kind: str, inputs: int, outputs: int, rank: int) -> None:
    base = layer_of(kind, inputs, outputs)
    from peft import RandLoraConfig

    config = RandLoraConfig(r=rank, randlora_alpha=7, fan_in_fan_out=kind == "Conv1D", **TARGET)
    layer = adapted(base, config)
    names = ("randlora_A", "randlora_B", "randlora_lambda", "randlora_gamma")
    roles = ("randlora_a", "randlora_b", "lambda", "gamma")
    factors = parameters(layer, **dict(zip(roles, names, strict=True)))
    assert factors["lambda"].shape == (rank, -(-12 // rank))
    check_layer(layer, "randlora", factors, 7 / rank, kind == "Conv1D", in_features=inputs)


@pytest.mark.parametrize("mode", ["default", "mini"])
@pytest.mark.parametrize("rank", [4, 3])
def test_peft_miss(mode: str, rank: int) -> None:
    base = layer_of("linear")
    from peft import MissConfig

    layer = adapted(base, MissConfig(r=rank, mini_r=6, init_weights="mini" if mode == "mini" else True, **TARGET))
    factors = parameters(layer, block="miss_block")
    check_layer(layer, "miss", factors, 1.0, mode=mode, in_features=20, out_features=12)
