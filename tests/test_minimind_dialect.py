"""MiniMind's adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from lora_merge_cli.dialects.interface import ScaleOptions, Subject, Tree
from lora_merge_cli.dialects.minimind import MiniMind
from lora_merge_cli.dialects.torch_model import Plain
from lora_merge_cli.errors import ShapeMismatch, UnmatchedAdapter, UsageError
from lora_merge_cli.records import Index, Survey, TensorSpec

Shapes = Mapping[str, tuple[int, ...]]

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj")
BASE: dict[str, tuple[int, ...]] = {
    **{f"{module}.weight": (8, 8) for module in MODULES},
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.embed_tokens.weight": (32, 8),
}
ADAPTER: dict[str, tuple[int, ...]] = {
    f"{module}.lora.{letter}.weight": (2, 8) if letter == "A" else (8, 2) for module in MODULES for letter in "AB"
}


def tree(shapes: Shapes, where: str = "adapter.pth") -> Tree:
    return Tree(Index({(n,): TensorSpec((n,), shape, np.dtype(np.float16)) for n, shape in shapes.items()}), where)


def survey(adapter: Shapes, base: Shapes = BASE, options: ScaleOptions | None = None) -> Survey:
    return MiniMind().survey(Subject(tree(base, "base.pth"), tree(adapter)), options or ScaleOptions())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("base_prefix", ["", "_orig_mod."])
def test_every_factor_is_claimed_once(prefix: str, base_prefix: str) -> None:
    adapter = {prefix + name: shape for name, shape in ADAPTER.items()}
    assert MiniMind().matches(tree(adapter))
    found = survey(adapter, {base_prefix + name: shape for name, shape in BASE.items()})
    assert not found.problems
    assert [site.targets for site in found.sites] == [((f"{base_prefix}{module}.weight",),) for module in MODULES]
    claimed = [factor.path for site in found.sites for factor in site.factors.values()]
    assert sorted(claimed) == sorted((name,) for name in adapter)
    assert [site.label for site in found.sites] == ["layers.0.self_attn.q_proj", "layers.1.self_attn.o_proj"]


def test_the_delta_is_what_the_patched_layer_adds() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8, bias=False, dtype=torch.float64)
    lora = torch.nn.Module()
    lora.A = torch.nn.Linear(8, 2, bias=False, dtype=torch.float64)
    lora.B = torch.nn.Linear(2, 8, bias=False, dtype=torch.float64)
    layer.lora = lora
    state: dict[str, Any] = {f"model.q.{name}": value.numpy() for name, value in layer.state_dict().items()}
    base = {"model.q.weight": state.pop("model.q.weight")}
    found = survey({n: v.shape for n, v in state.items()}, {n: v.shape for n, v in base.items()})
    (site,) = found.sites
    a, b = (site.factors[role].of(state[str(site.factors[role].path[0])]) for role in ("lora_a", "lora_b"))
    scale = site.parameters.scale.value
    assert scale is not None
    merged = base["model.q.weight"] + scale * np.einsum(str(site.parameters.equation), a, b)
    x = torch.randn(3, 8, dtype=torch.float64)
    wanted = (torch.nn.Linear.forward(layer, x) + lora.B(lora.A(x))).detach().numpy()
    np.testing.assert_allclose(x.numpy() @ merged.T, wanted)
    forward = site.forward
    xs = x.numpy()[None]
    y = np.einsum(forward.base, xs, base["model.q.weight"])
    y += np.einsum(forward.up, np.einsum(forward.down, xs, a), b)
    np.testing.assert_allclose(y[0], wanted)


def without(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in ADAPTER.items() if key != name}


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_lone_factor_is_refused(letter: str) -> None:
    lone = f"{MODULES[0]}.lora.{letter}.weight"
    found = survey(without(lone))
    assert [type(problem) for problem in found.problems] == [UnmatchedAdapter]
    assert f"without its {letter}" in str(found.problems[0])
    assert len(found.sites) == 1


@pytest.mark.parametrize(
    "key", ["model.norm.weight", f"{MODULES[0]}.lora.A.bias", f"{MODULES[0]}.lora.scale", "lora.A.weight"]
)
def test_a_key_that_is_no_factor_is_refused_by_name(key: str) -> None:
    found = survey({**ADAPTER, key: (2, 8)})
    assert [type(problem) for problem in found.problems] == [UnmatchedAdapter]
    assert key in str(found.problems[0])


def test_a_whole_checkpoint_as_adapter_is_called_one() -> None:
    found = survey({**BASE, **{f"more.{name}": shape for name, shape in BASE.items()}, **ADAPTER})
    assert "a whole checkpoint where an adapter is expected" in str(found.problems[0])


def test_a_factor_under_two_spellings_is_refused() -> None:
    name = f"{MODULES[0]}.lora.A.weight"
    found = survey({**ADAPTER, f"module.{name}": (2, 8)})
    assert "twice" in str(found.problems[0])


def test_a_module_that_the_base_lacks_is_refused_with_the_nearest_names() -> None:
    base = {name: shape for name, shape in BASE.items() if name != f"{MODULES[1]}.weight"}
    found = survey(ADAPTER, base)
    assert len(found.sites) == 1
    (problem,) = found.problems
    assert isinstance(problem, UnmatchedAdapter)
    assert MODULES[1] in str(problem)
    assert "nearest" in str(problem)


def test_a_layer_that_is_not_square_is_refused() -> None:
    module = "model.layers.0.self_attn.k_proj"
    found = survey({**ADAPTER, f"{module}.lora.A.weight": (2, 8), f"{module}.lora.B.weight": (4, 2)})
    (problem,) = found.problems
    assert isinstance(problem, ShapeMismatch)
    assert "not square" in str(problem)
    assert module in str(problem)
    assert len(found.sites) == 2


@pytest.mark.parametrize(
    "shapes", [((2, 7), (8, 2)), ((2, 8), (8, 3)), ((0, 8), (8, 0)), ((2, 8, 1), (8, 2)), ((8, 2), (2, 8))]
)
def test_other_shapes_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = shapes
    found = survey({**ADAPTER, f"{MODULES[0]}.lora.A.weight": a, f"{MODULES[0]}.lora.B.weight": b})
    assert [type(problem) for problem in found.problems] == [ShapeMismatch]


@pytest.mark.parametrize("options", [ScaleOptions({"": 16.0}), ScaleOptions(rslora=frozenset({""}))])
def test_a_scale_from_the_user_is_refused(options: ScaleOptions) -> None:
    assert [type(problem) for problem in survey(ADAPTER, options=options).problems] == [UsageError]
    assert [type(problem) for problem in MiniMind().describe(tree(ADAPTER), options).problems] == [UsageError]


def test_what_an_adapter_says_by_itself() -> None:
    summary = MiniMind().describe(tree(ADAPTER), ScaleOptions())
    assert [(row.module, row.rank, row.scale.value, row.shape) for row in summary.rows] == [
        (module, 2, 1.0, (8, 8)) for module in MODULES
    ]
    assert not summary.problems


@pytest.mark.parametrize("name", ["x.lora_A.weight", "x.lora.A", "lora.A.weight", "x.lora_magnitude_vector"])
def test_other_trainers_keys_are_not_its_own(name: str) -> None:
    assert not MiniMind().matches(tree({name: (2, 2)}))


def test_a_torch_checkpoint_by_itself_has_no_sites() -> None:
    assert Plain().matches(tree(BASE))
    found = Plain().survey(Subject(tree(BASE)), ScaleOptions())
    assert (found.sites, found.problems) == ((), ())


@pytest.mark.parametrize(
    "name",
    ["x.lora_A.default.weight", "x.lora.A.weight", "x.base_layer.weight", "x.lora_magnitude_vector", "x.hada_w1_a"],
)
def test_an_adapter_inside_a_torch_checkpoint_is_refused(name: str) -> None:
    found = Plain().survey(Subject(tree({**BASE, name: (2, 8)})), ScaleOptions())
    assert [type(problem) for problem in found.problems] == [UnmatchedAdapter]
    assert name in str(found.problems[0])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("transformer.wte.weight", "embeddings"),
        ("lm_head.weight", "head"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("transformer.h.0.attn.c_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "normalisation"),
        ("model.layers.0.input_layernorm.weight", "normalisation"),
        ("model.norm.weight", "normalisation"),
        ("model.layers.0.mlp.gate_proj.weight", "feed-forward"),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", "experts"),
        ("model.layers.0.block_sparse_moe.gate.weight", "experts"),
        ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", "vision tower"),
        ("visual.blocks.0.attn.qkv.weight", "vision tower"),
        ("temperature", "other"),
    ],
)
def test_parts_by_their_usual_names(name: str, part: str) -> None:
    assert MiniMind().part((name,)) == part


def test_canonical_is_one_cleaned_name() -> None:
    assert MiniMind().canonical(("model", "_orig_mod.layers.0.weight")) == ("model.layers.0.weight",)
    index = tree(BASE).index
    sites = survey(ADAPTER).sites
    groups = MiniMind().grouping(index, sites)
    assert [groups[(f"{module}.weight",)] for module in MODULES] == ["lora", "lora"]
    assert groups[("model.embed_tokens.weight",)] == "frozen"
