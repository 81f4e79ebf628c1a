"""Expert parameters: what PEFT merges into tiny mixtures of experts, against the equations, in float64."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.peft.experts import ExpertTarget, Wrapped, expert_sites
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import Refused, ShapeMismatch, UnmatchedAdapter
from lora_merge_cli.records import Index, TensorSpec

NEW = {"peft_version": "0.21.2"}
OLD = {"peft_version": "0.18.1"}


def tree(shapes: Mapping[str, tuple[int, ...]], model_type: str | None = None) -> Tree:
    specs = {(name,): TensorSpec((name,), shape, np.dtype(np.float32)) for name, shape in shapes.items()}
    return Tree(Index(specs), "base", None if model_type is None else {"model_type": model_type})


def pair(depth: int, a: tuple[int, ...], b: tuple[int, ...]) -> Wrapped:
    specs = (
        TensorSpec((f"{'base_layer.' * depth}lora_{letter}.weight",), shape, np.dtype(np.float32))
        for letter, shape in (("A", a), ("B", b))
    )
    return Wrapped(depth, *specs)


def sites(found: list[ExpertTarget] | Refused) -> list[ExpertTarget]:
    assert not isinstance(found, Refused), found
    return found


def delta(site: ExpertTarget, a: Any, b: Any) -> Any:
    return np.einsum(site.equation, site.lora_a.of(a), site.lora_b.of(b))


def assert_forward(site: ExpertTarget, weight: Any, a: Any, b: Any) -> None:
    """The layer with its adapter beside it computes what the merged one does."""
    forward, rng = site.forward, np.random.default_rng(0)
    dims, kernel = forward.base.split("->")[0].split(",")
    sizes = {"b": 1, "t": 3, **dict(zip(kernel, weight.shape, strict=True))}
    x = rng.standard_normal([sizes[dim] for dim in dims])
    a, b = site.lora_a.of(a), site.lora_b.of(b)
    y = np.einsum(forward.base, x, weight) + np.einsum(forward.up, np.einsum(forward.down, x, a), b)
    np.testing.assert_allclose(np.einsum(forward.base, x, weight + np.einsum(site.equation, a, b)), y, atol=1e-9)


MIXTURES = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "layer_types": ["full_attention", "full_attention"]},
    "granitemoe": {"num_local_experts": 3, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("intermediate", [12, 16, 8], ids=["oblong", "square down", "square gate_up"])
def test_the_equations_make_what_peft_merges(
    model_type: str, parameters: tuple[str, ...], intermediate: int, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {**MIXTURES[model_type], "intermediate_size": intermediate}
    if model_type == "qwen3_moe":
        options["moe_intermediate_size"] = intermediate
    if model_type != "granitemoe":
        options["head_dim"] = 8
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    model.save_pretrained(tmp_path / "base")
    names = [name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] in parameters]
    modules = sorted({name.rsplit(".", 1)[0] for name in names})
    assert len(modules) == 2
    suffix = modules[0].split(".0.", 1)[1]
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=4, lora_alpha=10, target_modules=[], target_parameters=[f"{suffix}.{p}" for p in parameters]),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    adapted.to(torch.float64)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")

    safetensors = pytest.importorskip("safetensors.numpy")
    base, merged = (safetensors.load_file(tmp_path / kind / "model.safetensors") for kind in ("base", "merged"))
    factors = safetensors.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    base_tree = tree({name: value.shape for name, value in base.items()}, model_type)
    changed = dict(base)
    for module in modules:
        wrapped = []
        for key in factors:
            match = re.fullmatch(rf"base_model\.model\.{re.escape(module)}\.((?:base_layer\.)*)lora_A\.weight", key)
            if match:
                depth = match[1].count("base_layer")
                a, b = key, key.replace("lora_A", "lora_B")
                spec = [TensorSpec((k,), factors[k].shape, factors[k].dtype) for k in (a, b)]
                wrapped.append(Wrapped(depth, *spec))
        assert len(wrapped) == len(parameters)
        for site in sites(expert_sites(module, wrapped, base_tree, settings)):
            (name,) = site.target
            assert site.rank == 4
            assert site.parameter in parameters
            a, b = (factors[factor.path[0]] for factor in (site.lora_a, site.lora_b))
            extents = [factor.extents(leaf.shape) for factor, leaf in ((site.lora_a, a), (site.lora_b, b))]
            assert Equation(site.equation).sizes(*extents, base[name].shape) is not None
            assert changed[name] is base[name], "no tensor twice"
            changed[name] = base[name] + 10 / 4 * delta(site, a, b)
            assert_forward(site, base[name], a, b)
    differing = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert differing == {name for name in base if changed[name] is not base[name]}
    for name in base:
        np.testing.assert_allclose(changed[name], merged[name], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("shape", [(3, 8, 5), (3, 5, 8)])
def test_an_old_adapter_has_its_inputs_on_the_middle_axis(shape: tuple[int, int, int]) -> None:
    base = tree({"m.experts.down_proj": shape}, "mixtral")
    (site,) = sites(expert_sites("m.experts", [pair(0, (6, shape[1]), (shape[2], 6))], base, OLD))
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, shape[1])), rng.standard_normal((shape[2], 6))
    wanted = np.zeros(shape)
    for e in range(3):
        for k in range(2):
            wanted[e] += np.outer(a[e * 2 + k], b[:, k * 3 + e])
    np.testing.assert_allclose(delta(site, a, b), wanted)


def test_an_old_adapter_on_fused_parameters_reaches_separate_experts() -> None:
    shapes = {f"m.block_sparse_moe.experts.{e}.{w}.weight": (6, 4) for e in range(3) for w in ("w1", "w3")}
    base = tree(shapes, "mixtral")
    found = sites(expert_sites("m.mlp.experts", [pair(0, (6, 12), (4, 6))], base, OLD))
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 12)), rng.standard_normal((4, 6))
    deltas = {site.target[0]: delta(site, a, b) for site in found}
    assert deltas.keys() == shapes.keys()
    for e in range(3):
        whole = sum(np.outer(a[e * 2 + k], b[:, k * 3 + e]) for k in range(2))
        np.testing.assert_allclose(deltas[f"m.block_sparse_moe.experts.{e}.w1.weight"], whole[:6])
        np.testing.assert_allclose(deltas[f"m.block_sparse_moe.experts.{e}.w3.weight"], whole[6:])


@pytest.mark.parametrize(
    ("model_type", "config", "equation"),
    [
        ("mixtral", NEW, "eri,ore->eoi"),
        ("gpt_oss", NEW, "eri,ore->eio"),
        ("mixtral", OLD, "eri,ore->eio"),
        ("mixtral", {}, "eri,ore->eio"),
        ("mixtral", {"peft_version": "0.18.2.dev0@abc"}, None),
        ("mixtral", {"peft_version": "0.19.0.dev0"}, None),
        ("mixtral", {"peft_version": "0.19.0"}, "eri,ore->eoi"),
        ("mixtral", {"peft_version": "unknown"}, None),
        ("qwen3_vl_moe", NEW, None),
        ("something_new", NEW, None),
        (None, NEW, None),
    ],
)
def test_a_square_parameter_needs_version_and_model_type(
    model_type: str | None, config: dict[str, Any], equation: str | None
) -> None:
    base = tree({"m.experts.down_proj": (2, 8, 8)}, model_type)
    found = expert_sites("m.experts", [pair(0, (4, 8), (8, 4))], base, config)
    if equation is None:
        assert isinstance(found, UnmatchedAdapter)
        assert "cannot be told apart" in str(found)
    else:
        assert [site.equation for site in sites(found)] == [equation]


SAME = {"m.experts.up_proj": (2, 8, 8), "m.experts.down_proj": (2, 8, 8)}
SQUARE = (4, 8), (8, 4)


def test_two_wrappers_that_fit_both_go_by_order() -> None:
    found = expert_sites("m.experts", [pair(0, *SQUARE), pair(1, *SQUARE)], tree(SAME, "nemotron_h"), NEW)
    assert [(site.parameter, site.lora_a.path[0]) for site in sites(found)] == [
        ("up_proj", "base_layer.lora_A.weight"),
        ("down_proj", "lora_A.weight"),
    ]


def test_one_wrapper_that_fits_two_parameters_goes_by_the_configuration_or_is_refused() -> None:
    base = tree(SAME, "nemotron_h")
    assert isinstance(expert_sites("m.experts", [pair(0, *SQUARE)], base, NEW), UnmatchedAdapter)
    for parameter in ("up_proj", "down_proj"):
        config = {**NEW, "target_parameters": [f"experts.{parameter}"]}
        (site,) = sites(expert_sites("m.experts", [pair(0, *SQUARE)], base, config))
        assert site.parameter == parameter
    # It ends the name, and begins at no dot.
    config = {**NEW, "target_parameters": ["n_proj"]}
    assert isinstance(expert_sites("m.experts", [pair(0, *SQUARE)], base, config), UnmatchedAdapter)


@pytest.mark.parametrize("depths", [(1,), (0, 0), (0, 2), (1, 2)])
def test_a_missing_wrapper_is_refused(depths: tuple[int, ...]) -> None:
    wrapped = [pair(depth, *SQUARE) for depth in depths]
    assert isinstance(expert_sites("m.experts", wrapped, tree(SAME, "nemotron_h"), NEW), UnmatchedAdapter)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4, 7), (6, 4)),
        ((5, 5), (6, 5)),
        ((4, 5), (6, 8)),
        ((0, 5), (6, 0)),
        ((4, 5, 1), (6, 4)),
    ],
    ids=["input", "rank is no multiple of the experts", "ranks differ", "empty", "dims"],
)
def test_factors_of_other_shapes_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    base = tree({"m.experts.down_proj": (2, 6, 5)}, "mixtral")
    assert sites(expert_sites("m.experts", [pair(0, (4, 5), (6, 4))], base, NEW))
    assert isinstance(expert_sites("m.experts", [pair(0, a, b)], base, NEW), ShapeMismatch)


def per_expert(count: int = 3) -> dict[str, tuple[int, ...]]:
    return {
        f"m.mlp.experts.{e}.{name}.weight": (4, 6) if name == "down_proj" else (6, 4)
        for e in range(count)
        for name in ("gate_proj", "up_proj", "down_proj")
    }


GATE_UP = (6, 4), (12, 6)


def test_an_expert_that_lacks_a_tensor_shifts_no_other() -> None:
    assert len(sites(expert_sites("m.mlp.experts", [pair(0, *GATE_UP)], tree(per_expert()), NEW))) == 6
    for missing in ("m.mlp.experts.0.gate_proj.weight", "m.mlp.experts.2.up_proj.weight"):
        shapes = {name: shape for name, shape in per_expert(4).items() if name != missing}
        found = expert_sites("m.mlp.experts", [pair(0, *GATE_UP)], tree(shapes), NEW)
        assert isinstance(found, UnmatchedAdapter)
        assert "lacks a tensor" in str(found)


def test_experts_of_different_shapes_are_refused() -> None:
    shapes = per_expert() | {"m.mlp.experts.1.up_proj.weight": (7, 4)}
    assert isinstance(expert_sites("m.mlp.experts", [pair(0, *GATE_UP)], tree(shapes), NEW), ShapeMismatch)


def test_a_module_without_experts_in_the_base_is_refused() -> None:
    base = tree({"m.mlp.gate_proj.weight": (4, 4)})
    assert isinstance(expert_sites("m.mlp.experts", [pair(0, *GATE_UP)], base, NEW), UnmatchedAdapter)
