"""Flax NNX's LoRA layers in a tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from lora_merge_cli.dialects.interface import ScaleOptions, Subject, Tree, looks_like_adapter
from lora_merge_cli.dialects.nnx import Nnx
from lora_merge_cli.dialects.openpi import OpenPI
from lora_merge_cli.dialects.torch_model import Plain
from lora_merge_cli.errors import ShapeMismatch, UnmatchedAdapter, UsageError
from lora_merge_cli.records import Index, KeyPath, Survey, TensorSpec
from tests.checkpoints import save_step
from tests.command import run

LINEAR: dict[str, tuple[int, ...]] = {
    "a/kernel": (3, 4),
    "a/bias": (4,),
    "a/lora/lora_a": (3, 2),
    "a/lora/lora_b": (2, 4),
}
WRAPPED: dict[str, tuple[int, ...]] = {
    "b/base_module/kernel": (3, 4),
    "b/base_module/bias": (4,),
    "b/lora_a": (3, 2),
    "b/lora_b": (2, 4),
}


def tree(shapes: Mapping[str, tuple[int, ...]], root: KeyPath = (), suffix: KeyPath = ()) -> Tree:
    paths = {(*root, *name.split("/"), *suffix): shape for name, shape in shapes.items()}
    return Tree(Index({p: TensorSpec(p, shape, np.dtype(np.float32)) for p, shape in paths.items()}), "model")


def survey(shapes: Mapping[str, tuple[int, ...]], options: ScaleOptions | None = None) -> Survey:
    return Nnx().survey(Subject(tree(shapes)), options or ScaleOptions())


@pytest.mark.parametrize("suffix", [(), ("value",)])
@pytest.mark.parametrize("root", [(), ("params",), ("params", "layers", 0)])
def test_both_layers_are_sites_and_every_factor_is_claimed(root: KeyPath, suffix: KeyPath) -> None:
    subject = tree({**LINEAR, **WRAPPED}, root, suffix)
    assert Nnx().matches(subject)
    found = Nnx().survey(Subject(subject), ScaleOptions())
    assert not found.problems
    assert [site.targets for site in found.sites] == [
        ((*root, "a", "kernel", *suffix),),
        ((*root, "b", "base_module", "kernel", *suffix),),
    ]
    assert [site.module for site in found.sites] == ["a", "b"]
    claimed = {factor.path for site in found.sites for factor in site.factors.values()}
    assert claimed == {path for path in subject.index.tensors if "lora_a" in path or "lora_b" in path}
    assert all(site.parameters.scale.value == 1.0 and site.parameters.rank == 2 for site in found.sites)
    assert "1 kernels keep base_module" in found.notes[0]
    groups = Nnx().grouping(subject.index, found.sites)
    assert [list(groups.values()).count(kind) for kind in ("adapter", "lora", "frozen")] == [4, 2, 2]


@pytest.mark.parametrize("layers", [(), (5,)], ids=["one layer", "stacked"])
def test_the_equation_is_what_the_layer_computes(layers: tuple[int, ...]) -> None:
    shapes = {name: (*layers, *shape) for name, shape in LINEAR.items()}
    (site,) = survey(shapes).sites
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 3))
    w, a, b = (rng.standard_normal(shapes[f"a/{name}"]) for name in ("kernel", "lora/lora_a", "lora/lora_b"))
    merged = w + np.einsum(str(site.parameters.equation), a, b)
    assert site.parameters.equation.stacked == bool(layers)
    # One layer after the other, as nnx.scan runs them.
    for kernel, lora_a, lora_b, fused in zip(*(v.reshape(-1, *v.shape[-2:]) for v in (w, a, b, merged)), strict=True):
        np.testing.assert_allclose(x @ fused, x @ kernel + x @ lora_a @ lora_b)
        forward = site.forward
        y = np.einsum(forward.base, x, kernel)
        y += np.einsum(forward.up, np.einsum(forward.down, x, lora_a), lora_b)
        np.testing.assert_allclose(x @ fused, y)


@pytest.mark.parametrize(
    "shapes",
    [
        {"c/lora_a": (3, 2), "c/lora_b": (2, 4)},
        {"c/lora/lora_a": (3, 2), "c/lora/lora_b": (2, 4)},
        {"c/base_module/embedding": (3, 4), "c/lora_a": (3, 2), "c/lora_b": (2, 4)},
        # A kernel beside a module of another name than NNX gives it.
        {"c/kernel": (3, 4), "c/adapter/lora_a": (3, 2), "c/adapter/lora_b": (2, 4)},
        {"a/kernel": (3, 4), "a/lora/lora_a": (3, 2)},
        {"a/kernel": (3, 4), "a/lora/lora_b": (2, 4)},
        {**LINEAR, "a/lora/lora_scale": (1,)},
        {**LINEAR, "a/lora/gate": (1,)},
        {**LINEAR, "d/kernel_lora_a": (3, 2)},
    ],
    ids=["bare", "bare lora", "no kernel", "other name", "no b", "no a", "extra", "beside", "stranger"],
)
def test_what_fits_no_rule_is_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    found = survey(shapes)
    assert [type(problem) for problem in found.problems] == [UnmatchedAdapter]
    assert "model :: " in str(found.problems[0])


@pytest.mark.parametrize(
    "shapes",
    [
        {"a/kernel": (4, 3)},
        {"a/lora/lora_b": (3, 4)},
        {"a/lora/lora_a": (3, 0), "a/lora/lora_b": (0, 4)},
        {"a/kernel": (5, 3, 4)},
        {"a/kernel": (1, 3, 4), "a/lora/lora_a": (3, 2)},
    ],
)
def test_other_shapes_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    found = survey(LINEAR | shapes)
    assert not found.sites
    assert [type(problem) for problem in found.problems] == [ShapeMismatch]


def test_an_adapter_on_an_adapter_is_refused() -> None:
    inner = {f"b/base_module/{name[2:]}": shape for name, shape in LINEAR.items()}
    found = survey({**inner, "b/lora_a": (3, 2), "b/lora_b": (2, 4)})
    assert "two adapters" in str(found.problems[0])


@pytest.mark.parametrize("suffix", [(), ("value",)])
@pytest.mark.parametrize("leaf", ["kernel", "embedding"])
def test_a_lora_linear_around_a_layer_of_its_own_is_refused(leaf: str, suffix: KeyPath) -> None:
    subject = tree({**LINEAR, f"a/lora/base_module/{leaf}": (3, 4)}, suffix=suffix)
    found = Nnx().survey(Subject(subject), ScaleOptions())
    assert [type(problem) for problem in found.problems] == [UnmatchedAdapter]
    assert "two kernels" in str(found.problems[0]) and "model :: a/lora/base_module/" in str(found.problems[0])


@pytest.mark.parametrize("module", ["lora", "b/lora", "lora_mlp"])
def test_a_wrapped_layer_that_would_be_taken_for_an_adapter_is_refused(module: str) -> None:
    found = survey({name.replace("b/", f"{module}/", 1): shape for name, shape in WRAPPED.items()})
    assert [type(problem) for problem in found.problems] == [UnmatchedAdapter]
    assert f"model :: {module}/base_module/kernel" in str(found.problems[0])
    assert "two kernels" not in str(found.problems[0])


def test_what_is_merged_leaves_no_name_of_an_adapter() -> None:
    subject = tree({**LINEAR, **WRAPPED})
    found = Nnx().survey(Subject(subject), ScaleOptions())
    gone = {factor.path for site in found.sites for factor in site.factors.values()}
    assert not [path for path in subject.index.tensors if path not in gone and looks_like_adapter(path)]


def test_no_file_is_made_of_a_lora_linear_around_a_layer_of_its_own(tmp_path: Path) -> None:
    lora = {"base_module": {"kernel": np.ones((4, 6))}, "lora_a": np.ones((4, 2)), "lora_b": np.ones((2, 6))}
    step = save_step(tmp_path / "in" / "7", {"a": {"kernel": np.ones((4, 6)), "lora": lora}}, assets=False)
    outcome = run("merge", step, "-o", tmp_path / "out")
    assert outcome.code == 4
    assert "a/lora/base_module/kernel" in outcome.error
    assert not (tmp_path / "out").exists()


def test_optimiser_state_is_dropped_and_no_site() -> None:
    found = survey({**LINEAR, **{f"opt_state/0/mu/{name}": shape for name, shape in LINEAR.items()}})
    assert len(found.sites) == 1
    assert not found.problems
    assert {drop.path[-1] for drop in found.dropped} == {"lora_a", "lora_b"}


@pytest.mark.parametrize("options", [ScaleOptions({"": 16.0}), ScaleOptions(rslora=frozenset({""}))])
def test_a_scale_from_the_user_is_refused(options: ScaleOptions) -> None:
    found = survey(LINEAR, options)
    assert [type(problem) for problem in found.problems] == [UsageError]


def test_trees_are_told_apart() -> None:
    openpi: dict[str, tuple[int, ...]] = {
        "PaliGemma/llm/layers/attn/q_einsum/w": (1, 2, 3, 4),
        "PaliGemma/llm/layers/attn/q_einsum/lora_a": (1, 2, 3, 1),
        "PaliGemma/llm/layers/attn/q_einsum/lora_b": (1, 2, 1, 4),
    }
    rootless = {name.removeprefix("PaliGemma/"): shape for name, shape in openpi.items()}
    for shapes in (openpi, rootless):
        assert (OpenPI().matches(tree(shapes)), Nnx().matches(tree(shapes))) == (True, False)
    for shapes in (LINEAR, WRAPPED):
        assert (OpenPI().matches(tree(shapes)), Nnx().matches(tree(shapes))) == (False, True)
        assert not Plain().matches(tree(shapes))
    mixed = tree({"PaliGemma/img/kernel": (3, 4), **LINEAR})
    assert (OpenPI().matches(mixed), Nnx().matches(mixed)) == (True, False)
    plain = Tree(
        Index({(n,): TensorSpec((n,), (1,), np.dtype(np.float32)) for n in ("x.lora_A.weight", "x.weight")}), "t"
    )
    assert not Nnx().matches(plain)
    assert not Nnx().matches(tree({"a/kernel": (3, 4)}))


def test_canonical_drops_what_a_state_adds() -> None:
    assert Nnx().canonical(("params", "a", 0, "kernel", "value")) == ("a", 0, "kernel")
    assert Nnx().canonical(("value",)) == ("value",)
    assert Nnx().unservable(tree(LINEAR).index) is None
    mixed = {**tree(LINEAR).index.tensors, **tree(WRAPPED, suffix=("value",)).index.tensors}
    assert Nnx().unservable(Index(mixed)) is not None
