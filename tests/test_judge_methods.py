"""The judge's formulas for PEFT's methods against PEFT's own layers, in float64: what they compute, and what they merge to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge_cli.equation import Equation
from lora_merge_cli.records import AdapterSite, Array, Factor, Forward, LowRank, Scale, Setting
from lora_merge_cli.verification.methods import changed, forward, is_by_row, reduced

RANK, ALPHA = 3, 4.5
ROWS = 7
WIDE, TALL, SQUARE = (8, 12), (12, 8), (12, 12)
CONVOLUTION = "convolution"
Roles = Callable[[Any], Mapping[str, Any]]


def attributes(**names: str) -> Roles:
    """Roles from a layer's parameters of the adapter ``default``."""

    def found(layer: Any) -> Mapping[str, Any]:
        return {
            role: getattr(layer, name)["default"] for role, name in names.items() if "default" in getattr(layer, name)
        }

    return found


LOHA = attributes(**{name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")})
LOKR = attributes(**{name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")})
HRA = attributes(u="hra_u")
BOFT = attributes(r="boft_R", s="boft_s")
MISS = attributes(block="miss_block")


def oft_roles(layer: Any) -> Mapping[str, Any]:
    return {"r": layer.oft_R["default"].weight}


def vera_roles(layer: Any) -> Mapping[str, Any]:
    return {
        "vera_a": layer.vera_A["default"][:, : layer.in_features],
        "vera_b": layer.vera_B["default"][: layer.out_features],
        "lambda_b": layer.vera_lambda_b["default"],
        "lambda_d": layer.vera_lambda_d["default"],
    }


def randlora_roles(layer: Any) -> Mapping[str, Any]:
    shape = (layer.out_features, layer.in_features)
    return {
        "randlora_a": layer.randlora_A["default"][:, :, : min(shape)],
        "randlora_b": layer.randlora_B["default"][: max(shape), : layer.num_bases],
        "lambda": layer.randlora_lambda["default"],
        "gamma": layer.randlora_gamma["default"],
    }


def shira_roles(layer: Any) -> Mapping[str, Any]:
    return {"weight": layer.shira_weight["default"], "indices": layer.shira_indices["default"]}


@dataclass(frozen=True)
class Case:
    """One method with one configuration."""

    operation: str
    config: str
    options: Mapping[str, Any]
    roles: Roles
    scale: Callable[[int], float] = lambda inputs: 1.0
    settings: Mapping[str, Setting] = field(default_factory=dict)
    shapes: tuple[Any, ...] = (WIDE, TALL, SQUARE)


def oft(**options: Any) -> Case:
    chosen = {
        "oft_block_size": 4,
        "coft": False,
        "eps": 6e-5,
        "block_share": False,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
    } | options
    return Case("oft", "OFTConfig", {"r": 0, **chosen}, oft_roles, settings=chosen)


def lycoris(operation: str, config: str, roles: Roles, *shapes: Any, **options: Any) -> Case:
    return Case(
        operation, config, {"r": RANK, "alpha": ALPHA, **options}, roles, lambda inputs: ALPHA / RANK, shapes=shapes
    )


LINEAR = (WIDE, TALL)
KERNELS = (((6, 4), (3, 2)), ((6, 4), (3,)), ((6, 4), (1, 1)))
LARGE_KERNELS = (((30, 28), (3, 2)), ((30, 28), (3,)))
"""Large enough for LoKr to have two factors instead of ``w2``."""
CASES = {
    "adalora": Case(
        "adalora",
        "AdaLoraConfig",
        {"init_r": RANK, "target_r": 2, "lora_alpha": ALPHA, "total_step": 10, "tinit": 1, "tfinal": 1},
        attributes(lora_a="lora_A", lora_b="lora_B", lora_e="lora_E"),
        lambda inputs: ALPHA / (RANK + 1e-5),
        shapes=(WIDE, TALL, ((6, 4), (3, 2))),
    ),
    "vera": Case("vera", "VeraConfig", {"r": RANK}, vera_roles),
    "delora": Case(
        "delora",
        "DeloraConfig",
        {"r": RANK},
        attributes(lora_a="delora_A", lora_b="delora_B", **{"lambda": "delora_lambda"}, w_norm="delora_w_norm"),
        lambda inputs: 1 / RANK,
    ),
    "randlora": Case(
        "randlora", "RandLoraConfig", {"r": RANK, "randlora_alpha": ALPHA}, randlora_roles, lambda inputs: ALPHA / RANK
    ),
    "miss": Case("miss", "MissConfig", {"r": 4}, MISS, settings={"mode": "default"}),
    "miss with a remainder": Case("miss", "MissConfig", {"r": 5}, MISS, settings={"mode": "default"}),
    "miss mini": Case(
        "miss", "MissConfig", {"r": 4, "mini_r": 2, "init_weights": "mini"}, MISS, settings={"mode": "mini"}
    ),
    "miss bat": Case("miss_bat", "MissConfig", {"r": 4, "init_weights": "bat"}, MISS),
    "loha": lycoris("loha", "LoHaConfig", LOHA, *LINEAR, *KERNELS),
    "loha effective": lycoris("loha", "LoHaConfig", LOHA, *KERNELS, use_effective_conv2d=True),
    "lokr": lycoris("lokr", "LoKrConfig", LOKR, *LINEAR, *KERNELS, *LARGE_KERNELS),
    "lokr of both": lycoris("lokr", "LoKrConfig", LOKR, (64, 80), decompose_both=True),
    "lokr effective": lycoris("lokr", "LoKrConfig", LOKR, *LARGE_KERNELS, use_effective_conv2d=True),
    "ia3": Case(
        "ia3", "IA3Config", {"feedforward_modules": []}, attributes(l="ia3_l"), settings={"feedforward": False}
    ),
    "ia3 feedforward": Case(
        "ia3",
        "IA3Config",
        {"feedforward_modules": ["layer"]},
        attributes(l="ia3_l"),
        settings={"feedforward": True},
    ),
    "oft": oft(),
    **{f"oft in {terms} terms": oft(num_cayley_neumann_terms=terms) for terms in (1, 2, 3, 4, 6, 7)},
    "oft exact": oft(use_cayley_neumann=False),
    "oft shared": oft(block_share=True),
    "oft constrained": oft(coft=True, eps=0.3),
    "oft hardly constrained": oft(coft=True, eps=1e3),
    "oft constrained, shared, exact": oft(coft=True, eps=0.2, block_share=True, use_cayley_neumann=False),
    "boft": Case("boft", "BOFTConfig", {"boft_block_size": 4}, BOFT, shapes=(WIDE, TALL, ((6, 4), (3, 3)))),
    "hra": Case(
        "hra", "HRAConfig", {"r": RANK}, HRA, settings={"apply_GS": False}, shapes=(WIDE, TALL, ((6, 4), (3, 3)))
    ),
    "hra orthonormal": Case("hra", "HRAConfig", {"r": RANK, "apply_GS": True}, HRA, settings={"apply_GS": True}),
    "hira": Case(
        "hira",
        "HiraConfig",
        {"r": RANK},
        attributes(lora_a="hira_A", lora_b="hira_B"),
        shapes=(WIDE, TALL, ((6, 4), (3, 2))),
    ),
    "c3a": Case("c3a", "C3AConfig", {"block_size": 4}, attributes(kernel="c3a_kernel"), lambda inputs: 1 / inputs),
    "shira": Case("shira", "ShiraConfig", {"r": 2}, shira_roles),
    "add_delta": Case(
        "add_delta",
        "LoraConfig",
        {"r": RANK, "lora_alpha": ALPHA},
        lambda layer: {"lora_a": layer.lora_A["default"].weight, "lora_b": layer.lora_B["default"].weight},
        lambda inputs: ALPHA / RANK,
    ),
    "dora": Case(
        "dora",
        "LoraConfig",
        {"r": RANK, "lora_alpha": ALPHA, "use_dora": True},
        lambda layer: {
            "lora_a": layer.lora_A["default"].weight,
            "lora_b": layer.lora_B["default"].weight,
            "magnitude": layer.lora_magnitude_vector["default"].weight,
        },
        lambda inputs: ALPHA / RANK,
    ),
}


def linear_site(case: Case, outputs: int, inputs: int) -> AdapterSite:
    return AdapterSite(
        targets=(("layer", "weight"),),
        operation=case.operation,
        factors={"lora_a": Factor(("a",))},
        parameters=LowRank(RANK, Scale(case.scale(inputs), "test"), Equation("ri,or->oi")),
        forward=Forward("bti,oi->bto", "bti,ri->btr", "btr,or->bto"),
        group="",
        module="layer",
        label="layer",
        settings={"in_features": inputs, "out_features": outputs, **case.settings},
    )


@dataclass(frozen=True)
class Adapted:
    """A layer under PEFT, and the same as the judge sees it."""

    model: Any
    site: AdapterSite
    factors: Mapping[str, Array]
    kernel: Array

    @property
    def layer(self) -> Any:
        return self.model.base_model.model.layer


def adapted(case: Case, shape: Any) -> Adapted:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(len(case.options) + 1)
    sizes, axes = shape if isinstance(shape[0], tuple) else (shape, ())
    outputs, inputs = sizes
    if axes:
        kind = torch.nn.Conv2d if len(axes) == 2 else torch.nn.Conv1d
        layer = kind(inputs, outputs, axes, bias=False)
    else:
        layer = torch.nn.Linear(inputs, outputs, bias=False)
    base = torch.nn.Sequential()
    base.add_module("layer", layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, case.config)(target_modules=["layer"], **case.options)
        model = peft.get_peft_model(base, config).double().eval()
    for name, values in model.named_parameters():
        if "base_layer" not in name and "ranknum" not in name:
            values.data = torch.randn(values.shape, dtype=torch.float64)
    found = model.base_model.model.layer
    if case.operation == "delora":
        found.delora_w_norm["default"] = found.delora_w_norm["default"].double() + 0.5
    kernel = found.get_base_layer().weight.detach().numpy().reshape(outputs, -1)
    factors = {role: values.detach().numpy().copy() for role, values in case.roles(found).items()}
    return Adapted(model, linear_site(case, outputs, kernel.shape[1]), factors, kernel.copy())


def patches(values: Array, axes: tuple[int, ...]) -> Array:
    """Inputs that are each one patch of a convolution: n by channels by kernel axes."""
    return values.reshape(len(values), -1, *axes)


@pytest.mark.parametrize(
    ("name", "shape", "roles"),
    [
        ("loha effective", KERNELS[0], {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}),
        ("lokr", TALL, {"w1", "w2"}),
        ("lokr", LARGE_KERNELS[1], {"w1", "w2_a", "w2_b"}),
        ("lokr of both", (64, 80), {"w1_a", "w1_b", "w2_a", "w2_b"}),
        ("lokr effective", LARGE_KERNELS[1], {"w1", "w2_a", "w2_b", "t2"}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_cases_have_every_form_of_a_method(name: str, shape: Any, roles: set[str]) -> None:
    assert set(adapted(CASES[name], shape).factors) == roles


def all_shapes() -> list[Any]:
    return [pytest.param(name, shape, id=f"{name} {shape}") for name, case in CASES.items() for shape in case.shapes]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "shape"), all_shapes())
def test_a_layer_computes_and_merges_to_what_peft_does(name: str, shape: Any) -> None:
    case = adapted(CASES[name], shape)
    axes = shape[1] if isinstance(shape[0], tuple) else ()
    x = np.random.default_rng(1).standard_normal((ROWS, case.kernel.shape[1]))
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        computed = case.model(torch.from_numpy(patches(x, axes) if axes else x)).numpy().reshape(ROWS, -1)
        case.layer.merge()
        merged = case.layer.get_base_layer().weight.numpy().reshape(case.kernel.shape)
    # C3A and the eps of COFT are float32 in PEFT.
    close = {"rtol": 1e-5, "atol": 1e-5} if case.site.operation in ("c3a", "oft") else {"rtol": 1e-9, "atol": 1e-10}
    np.testing.assert_allclose(forward(case.site, case.factors, case.kernel, x), computed, **close)
    assert np.abs(merged - case.kernel).max() > 1e-2 or name == "oft in 1 terms"
    if is_by_row(case.site.operation):
        ours = changed(case.site, case.factors, case.kernel)
    elif case.site.operation == "dora":
        return
    else:
        found = reduced(case.site, case.factors)
        a = found["lora_a"].reshape(len(found["lora_a"]), -1)
        ours = case.kernel + CASES[name].scale(case.kernel.shape[1]) * found["lora_b"] @ a
    np.testing.assert_allclose(ours, merged, **close)


def test_a_bias_is_scaled_with_the_outputs() -> None:
    site, bias, vector = linear_site(CASES["ia3"], 6, 1), np.arange(1.0, 7.0)[:, None], np.linspace(-1, 2, 6)
    np.testing.assert_allclose(changed(site, {"l": vector}, bias)[:, 0], bias[:, 0] * vector)
    np.testing.assert_allclose(forward(site, {"l": vector}, bias, np.ones((1, 1)))[0], bias[:, 0] * vector)


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_under_hira() -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = torch.nn.Sequential()
    base.add_module("layer", torch.nn.Embedding(9, 5))
    model = peft.get_peft_model(base, peft.HiraConfig(r=RANK, target_modules=["layer"])).double().eval()
    layer = model.base_model.model.layer
    a, b = layer.hira_embedding_A["default"], layer.hira_embedding_B["default"]
    a.data, b.data = torch.randn(a.shape, dtype=torch.float64), torch.randn(b.shape, dtype=torch.float64)
    kernel = layer.get_base_layer().weight.detach().numpy().T.copy()
    factors = {"lora_a": a.detach().numpy(), "lora_b": b.detach().numpy()}
    with torch.no_grad():
        rows = model(torch.arange(9)).numpy()
    site = linear_site(CASES["hira"], 5, 9)
    np.testing.assert_allclose(forward(site, factors, kernel, np.eye(9)), rows, rtol=1e-12)
    np.testing.assert_allclose(changed(site, factors, kernel).T, rows, rtol=1e-12)


def random_factors(case: Case, outputs: int, inputs: int, seed: int) -> dict[str, Array]:
    """Factors of the shapes that the sites of a method have."""
    rng = np.random.default_rng(seed)
    less, more = sorted((outputs, inputs))
    bases = 3
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "add_delta": {"lora_a": (RANK, inputs), "lora_b": (outputs, RANK)},
        "dora": {"lora_a": (RANK, inputs), "lora_b": (outputs, RANK), "magnitude": (outputs,)},
        "adalora": {"lora_a": (RANK, inputs), "lora_b": (outputs, RANK), "lora_e": (RANK, 1)},
        "vera": {"vera_a": (RANK, inputs), "vera_b": (outputs, RANK), "lambda_b": (outputs,), "lambda_d": (RANK,)},
        "delora": {"lora_a": (RANK, inputs), "lora_b": (outputs, RANK), "lambda": (1,), "w_norm": (inputs,)},
        "randlora": {
            "randlora_a": (RANK, 1, less),
            "randlora_b": (more, bases, RANK),
            "lambda": (RANK, bases),
            "gamma": (bases, less),
        },
        "miss": {"block": (RANK, 2 if case.settings.get("mode") == "mini" else outputs)},
        "miss_bat": {"block": (outputs // 4, 4, 4)},
        "loha": {"w1_a": (outputs, RANK), "w1_b": (RANK, inputs), "w2_a": (outputs, RANK), "w2_b": (RANK, inputs)},
        "lokr": {"w1_a": (2, RANK), "w1_b": (RANK, 4), "w2": (outputs // 2, inputs // 4)},
        "ia3": {"l": (inputs if case.settings.get("feedforward") else outputs,)},
        "oft": {"r": (1 if case.settings.get("block_share") else inputs // 4, 6)},
        "boft": {"r": (1, inputs // 4, 4, 4), "s": (outputs,)},
        "hra": {"u": (inputs, RANK)},
        "hira": {"lora_a": (RANK, inputs), "lora_b": (outputs, RANK)},
        "c3a": {"kernel": (outputs // 4, inputs // 4, 4)},
        "shira": {"weight": (9,)},
    }
    found = {role: rng.standard_normal(shape) for role, shape in shapes[case.operation].items()}
    if case.operation == "shira":
        # Some entries twice.
        found["indices"] = np.stack([rng.integers(0, extent, 9) for extent in (2, inputs)]).astype(np.int32)
    return found


@settings(deadline=None, max_examples=10)
@given(st.sampled_from((4, 8, 12)), st.sampled_from((4, 8, 16)), st.integers(0, 2**20))
@pytest.mark.parametrize("name", CASES)
def test_the_model_computes_with_the_kernel_that_the_adapter_makes(
    name: str, outputs: int, inputs: int, seed: int
) -> None:
    case = CASES[name]
    site = linear_site(case, outputs, inputs)
    factors = random_factors(case, outputs, inputs, seed)
    kernel = np.random.default_rng(seed + 1).standard_normal((outputs, inputs))
    before = kernel.copy()
    # The outputs for unit vectors are the kernel's columns.
    computed = forward(site, factors, kernel, np.eye(inputs)).T
    if is_by_row(case.operation):
        made = changed(site, factors, kernel)
    else:
        found = reduced(site, factors)
        made = kernel + (site.parameters.scale.value or 0.0) * found["lora_b"] @ found["lora_a"]
        if case.operation == "dora":
            made *= factors["magnitude"][:, None] / np.linalg.norm(made, axis=1, keepdims=True)
    np.testing.assert_allclose(computed, made, rtol=1e-8, atol=1e-8)
    np.testing.assert_array_equal(kernel, before)


@pytest.mark.parametrize("name", ["oft exact", "hra", "hra orthonormal"])
def test_rotations_and_reflections_keep_every_rows_norm(name: str) -> None:
    case = CASES[name]
    site, kernel = linear_site(case, 6, 8), np.random.default_rng(0).standard_normal((6, 8))
    made = changed(site, random_factors(case, 6, 8, 0), kernel)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), np.linalg.norm(kernel, axis=1), rtol=1e-12)
    assert np.abs(made - kernel).max() > 0.1


def test_factors_of_narrow_dtypes_are_widened_first() -> None:
    case = CASES["loha"]
    site, kernel = linear_site(case, 8, 12), np.zeros((8, 12))
    factors = {role: values.astype(np.float16) for role, values in random_factors(case, 8, 12, 0).items()}
    wide = {role: values.astype(np.float64) for role, values in factors.items()}
    np.testing.assert_array_equal(changed(site, factors, kernel), changed(site, wide, kernel))
