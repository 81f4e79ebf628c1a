"""Merged against unmerged: the layers run as OpenPI writes them, in float64, over the shapes that its configs can take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lora_merge_cli.dialects import interface
from lora_merge_cli.dialects.interface import ScaleOptions, Subject
from lora_merge_cli.dialects.openpi import OpenPI
from lora_merge_cli.formats import open_checkpoint
from tests import trees
from tests.checkpoints import restore_flat, save_step
from tests.command import run
from tests.trees import ACTION, PALIGEMMA, Expert, Tree, build, nest

TOLERANCE = 2e-6
ALPHAS = "paligemma=12,action_expert=3"


def replace(expert: Expert, **changes: object) -> Expert:
    return dataclasses.replace(expert, **changes)  # type: ignore[arg-type]


NONE = {"attention_rank": None, "feed_forward_rank": None}
CASES: dict[str, tuple[Tree, tuple[str, ...], list[str]]] = {
    "both experts": (build(PALIGEMMA, ACTION), ("value",), ["--lora-alpha", ALPHAS]),
    "no value suffix": (build(PALIGEMMA, ACTION), (), ["--lora-alpha", ALPHAS]),
    "pi0.5": (build(PALIGEMMA, ACTION, model="pi0.5"), ("value",), ["--lora-alpha", ALPHAS]),
    "fast": (build(PALIGEMMA, model="pi0-FAST"), ("value",), ["--lora-alpha", "12"]),
    "rslora": (
        build(replace(PALIGEMMA, rslora=True), replace(ACTION, rslora=True)),
        ("value",),
        ["--rslora", "--lora-alpha", ALPHAS],
    ),
    "rslora of one expert": (
        build(PALIGEMMA, replace(ACTION, rslora=True)),
        ("value",),
        ["--lora-alpha", ALPHAS, "--rslora", "action_expert"],
    ),
    "full multi-head attention": (
        build(PALIGEMMA, ACTION, qkv=True),
        ("value",),
        ["--lora-alpha", ALPHAS],
    ),
    "grouped-query attention": (
        build(replace(PALIGEMMA, kv_heads=2), replace(ACTION, kv_heads=2)),
        ("value",),
        ["--lora-alpha", ALPHAS],
    ),
    "language model only": (
        build(PALIGEMMA, replace(ACTION, trained=True, **NONE)),
        ("value",),
        ["--lora-alpha", "12"],
    ),
    "action expert only": (
        build(replace(PALIGEMMA, trained=True, **NONE), ACTION),
        ("value",),
        ["--lora-alpha", "action_expert=3"],
    ),
    "attention only": (
        build(replace(PALIGEMMA, feed_forward_rank=None), replace(ACTION, feed_forward_rank=None)),
        ("value",),
        ["--lora-alpha", ALPHAS],
    ),
    "feed-forward only": (
        build(replace(PALIGEMMA, attention_rank=None), replace(ACTION, attention_rank=None)),
        ("value",),
        [],
    ),
    "unstacked": (build(PALIGEMMA, ACTION, layers=None), ("value",), ["--lora-alpha", ALPHAS]),
    "stock ranks": (
        build(
            replace(PALIGEMMA, attention_rank=16, alpha=16.0),
            replace(ACTION, attention_rank=32, alpha=32.0),
        ),
        ("value",),
        [],
    ),
    "rank above the width": (
        build(replace(PALIGEMMA, attention_rank=30, feed_forward_rank=50), ACTION),
        ("value",),
        ["--lora-alpha", ALPHAS],
    ),
}


def check(tree: Tree, item: Path, tolerance: float = TOLERANCE) -> None:
    """Compare a merged item with what the tree must become."""
    merged = restore_flat(item)
    assert merged.keys() == tree.expected.keys()
    for path, reference in tree.expected.items():
        if path in tree.changed:
            error = np.abs(merged[path].astype(np.float64) - reference).max()
            assert error <= tolerance * np.abs(reference).max(), path
            assert merged[path].dtype == np.float32
        else:
            assert merged[path].dtype == reference.dtype, path
            assert merged[path].tobytes() == reference.tobytes(), path


@pytest.mark.parametrize("case", CASES)
def test_merged_acts_as_unmerged(case: str, tmp_path: Path) -> None:
    tree, suffix, flags = CASES[case]
    step = save_step(tmp_path / "29999", nest(tree.leaves, suffix=suffix))
    outcome = run("merge", step, "-o", tmp_path / "out", *flags)
    assert outcome.code == 0, outcome.stderr
    check(tree, tmp_path / "out/params")


@pytest.mark.parametrize("case", ["both experts", "grouped-query attention"])
def test_random_inputs_see_the_same_model(case: str, tmp_path: Path) -> None:
    """Both einsums of each attention layer on random inputs, not only on the identity."""
    tree, suffix, flags = CASES[case]
    step = save_step(tmp_path / "29999", nest(tree.leaves, suffix=suffix))
    assert run("merge", step, "-o", tmp_path / "out", *flags).code == 0
    merged = restore_flat(tmp_path / "out/params")
    rng = np.random.default_rng(5)
    for kernel in tree.changed:
        module = str(kernel[-2]).removesuffix("_1")
        if module not in ("q_einsum", "kv_einsum", "attn_vec_einsum"):
            continue
        expert = ACTION if str(kernel[-2]).endswith("_1") else PALIGEMMA
        factors = [tree.leaves[(*kernel[:-1], name)] for name in ("lora_a", "lora_b")]
        for layer in range(3):
            w, a, b = (v[layer].astype(np.float64) for v in (tree.leaves[kernel], *factors))
            shape = (2, 5, w.shape[0], w.shape[1]) if module == "attn_vec_einsum" else (2, 5, w.shape[-2])
            x = rng.standard_normal(shape)
            unmerged = trees.attention_forward(module, x, w, a, b, expert.scale)
            fused = merged[kernel][layer].astype(np.float64)
            acted = trees.attention_forward(module, x, fused, a, b, 0.0)
            plain = trees.attention_forward(module, x, w, a, b, 0.0)
            contribution = np.abs(unmerged - plain).max()
            assert np.abs(acted - unmerged).max() <= 1e-5 * contribution


def test_the_oracle_tells_the_two_classic_mistakes() -> None:
    """The tolerance would be worthless if the head sum or the scale could be wrong within it."""
    rng = np.random.default_rng(0)
    w, a, b = rng.standard_normal((4, 6, 8)), rng.standard_normal((4, 6, 2)), rng.standard_normal((4, 2, 8))
    right = trees.dense("attn_vec_einsum", w, a, b, 1.5)
    per_head = w + 1.5 * a @ b
    summed = w + 1.5 * np.einsum("nhr,mrd->nhd", a, b)
    assert np.abs(right - summed).max() < 1e-12
    assert np.abs(right - per_head).max() > 0.1
    assert np.abs(trees.dense("linear", w[0], a[0], b[0], 99.0) - (w[0] + a[0] @ b[0])).max() < 1e-12


def test_a_checkpoint_that_is_merged_keeps_its_spelling(tmp_path: Path) -> None:
    from tests.checkpoints import restore

    for suffix in (("value",), ()):
        name = f"with{len(suffix)}"
        step = save_step(tmp_path / name / "1", nest(build(PALIGEMMA).leaves, suffix=suffix))
        assert run("merge", step, "-o", tmp_path / name / "out", "--lora-alpha", 12).code == 0
        attention = restore(tmp_path / name / "out/params")["params"]["PaliGemma"]["llm"]["layers"]["attn"]
        leaf = attention["q_einsum"]["w"]
        assert isinstance(leaf, dict) == bool(suffix)
        assert set(attention["q_einsum"]) == {"w"}


def test_heads_are_not_taken_for_layers(tmp_path: Path) -> None:
    """A tree without stacked layers has one layer per site, whatever its first dim."""
    tree, suffix, flags = CASES["unstacked"]
    step = save_step(tmp_path / "1", nest(tree.leaves, suffix=suffix))
    sites = run("merge", step, "-o", tmp_path / "out", *flags, "--json").json["sites"]
    assert {len(site["layers"]) for site in sites} == {1}
    assert "attn/q_einsum_1" in {site["label"] for site in sites}
    assert {site["layers"] for site in run("inspect", step, "--json").json["sites"]} == {None}


def test_scale_multiplies_the_whole_delta(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    step = save_step(tmp_path / "1", nest(tree.leaves))
    flags = ["--lora-alpha", ALPHAS, "--scale", "-0.5"]
    assert run("merge", step, "-o", tmp_path / "out", *flags).code == 0
    for path in tree.changed:
        kernel = tree.leaves[path].astype(np.float64)
        tree.expected[path] = kernel - 0.5 * (tree.expected[path] - kernel)
    check(tree, tmp_path / "out/params")


def test_include_and_exclude_choose_sites(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    step = save_step(tmp_path / "1", nest(tree.leaves))
    flags = ["--lora-alpha", ALPHAS, "--include", "**/attn/**", "--exclude", "**.q_einsum*.**"]
    outcome = run("merge", step, "-o", tmp_path / "out", *flags, "--json")
    assert outcome.code == 0, outcome.stderr
    merged = restore_flat(tmp_path / "out/params")
    for path in tree.changed:
        wanted = "attn" in path and "q_einsum" not in str(path[-2]).removesuffix("_1").removeprefix("k")
        reference = tree.expected[path] if wanted else tree.leaves[path].astype(np.float64)
        assert np.abs(merged[path] - reference).max() <= TOLERANCE * np.abs(reference).max(), path
        assert (merged[path].dtype == np.float32) == wanted
    assert any("does not act as the fine-tune did" in note for note in outcome.json["notes"])
    reasons = {leaf["reason"] for leaf in outcome.json["dropped"]}
    assert any("--include or --exclude" in reason for reason in reasons)


@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float16", "float32"])
def test_dtype_rounds_once(dtype: str, tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    step = save_step(tmp_path / "1", nest(tree.leaves))
    assert run("merge", step, "-o", tmp_path / "out", "--lora-alpha", ALPHAS, "--dtype", dtype).code == 0
    merged = restore_flat(tmp_path / "out/params")
    target = {"keep": trees.BFLOAT16, "bfloat16": trees.BFLOAT16}.get(dtype) or np.dtype(dtype)
    for path, reference in tree.expected.items():
        if path not in tree.changed:
            assert merged[path].tobytes() == reference.tobytes()
            continue
        assert merged[path].dtype == target
        # float32 arithmetic may land on the other side of a tie, so almost all entries are the nearest one.
        nearest = reference.astype(target)
        assert np.mean(merged[path] == nearest) > (0.5 if dtype == "float32" else 0.995)
        spacing = np.spacing(np.abs(nearest).max().astype(target)).astype(np.float64)
        assert np.abs(merged[path].astype(np.float64) - reference).max() <= 0.51 * spacing + 1e-6


def test_dtype_untouched_casts_the_rest(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    step = save_step(tmp_path / "1", nest(tree.leaves))
    flags = ["--lora-alpha", ALPHAS, "--dtype-untouched", "bfloat16", "--json"]
    outcome = run("merge", step, "-o", tmp_path / "out", *flags)
    assert outcome.code == 0
    merged = restore_flat(tmp_path / "out/params")
    for path, reference in tree.expected.items():
        if path not in tree.changed:
            assert merged[path].dtype == trees.BFLOAT16
            assert merged[path].tobytes() == reference.astype(trees.BFLOAT16).tobytes()
    assert {leaf["origin"] for leaf in outcome.json["copied"]} == {"copied", "cast"}


def test_base_is_checked_bit_for_bit(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    step = save_step(tmp_path / "1", nest(tree.leaves))
    base = trees.as_base(tree)
    good = save_step(tmp_path / "base", nest(base, suffix=()))
    flags = ["--lora-alpha", ALPHAS]
    outcome = run("merge", step, "-o", tmp_path / "out", *flags, "--base", good, "--json")
    assert outcome.code == 0, outcome.stderr
    for path in tree.changed:
        delta = tree.expected[path] - tree.leaves[path].astype(np.float64)
        tree.expected[path] = base[path].astype(np.float64) + delta
    check(tree, tmp_path / "out/params")

    norm = ("PaliGemma", "llm", "layers", "pre_ffw_norm_1", "scale")
    base[norm] = base[norm].copy()
    base[norm].reshape(-1)[3] *= 1.02
    bad = save_step(tmp_path / "other_base", nest(base, suffix=()))
    refused = run("merge", step, "-o", tmp_path / "out2", *flags, "--base", bad)
    assert refused.code == 4
    assert "1 of 17 that differ: params/PaliGemma/llm/layers/pre_ffw_norm_1/scale" in refused.error
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("case", ["both experts", "full multi-head attention", "unstacked"])
def test_the_forward_that_a_site_states_is_the_layers(case: str, tmp_path: Path) -> None:
    """What a site says the model computes, against the layer as OpenPI writes it."""
    tree, suffix, _ = CASES[case]
    item = save_step(tmp_path / "1", nest(tree.leaves, suffix=suffix)) / "params"
    index = open_checkpoint(item).source.index()
    sites = OpenPI().survey(Subject(interface.Tree(index, "x")), ScaleOptions({"": 6.0})).sites
    assert len(sites) == len(tree.changed)
    rng = np.random.default_rng(2)
    for site in sites:
        paths = [site.targets[0], site.factors["lora_a"].path, site.factors["lora_b"].path]
        w, a, b = (tree.leaves[path[1 : len(path) - len(suffix)]].astype(np.float64) for path in paths)
        if "l" in site.parameters.equation.target:
            w, a, b = w[1], a[1], b[1]
        scale = site.parameters.scale.value
        assert scale is not None
        x_dims = site.forward.base.split(",")[0]
        w_dims = site.forward.base.split(",")[1].split("->")[0]
        sizes = dict(zip(w_dims, w.shape, strict=True))
        x = rng.standard_normal([sizes.get(dim, 3) for dim in x_dims])
        stated = np.einsum(site.forward.base, x, w)
        stated = stated + scale * np.einsum(site.forward.up, np.einsum(site.forward.down, x, a), b)
        if site.module == "gating_einsum":
            real = np.stack(trees.gating_forward(x, w, a, b))
        elif site.module == "linear":
            real = trees.linear_forward(x, w, a, b)
        else:
            real = trees.attention_forward(site.module, x, w, a, b, scale)
        assert stated.shape == real.shape
        assert np.abs(stated - real).max() <= 1e-12 * np.abs(real).max()
