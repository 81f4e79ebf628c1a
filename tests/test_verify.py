"""The judge: every right merge passes, by whomever it was made, and each known wrong one is caught by the check that should."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_merge_cli.dialects import openpi
from lora_merge_cli.verification import CHECK_IDS
from tests.checkpoints import save_step
from tests.command import run
from tests.judged import ALPHAS, GATING, LAYERS, LINEAR, OUT, VISION, Case, Q, checks_of, failed, merged_leaves, message
from tests.test_golden import CASES as GOLDEN_CASES
from tests.trees import ACTION, BFLOAT16, PALIGEMMA, Flat, Tree, as_base, build, nest


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path, build(PALIGEMMA, ACTION))


# A corruption takes the right leaves and the tree, and returns wrong ones.


def per_head_product(leaves: Flat, tree: Tree) -> None:
    a, b = (tree.leaves[(*OUT[:-1], role)].astype(np.float64) for role in ("lora_a", "lora_b"))
    delta = PALIGEMMA.scale * np.einsum("lnhr,lnrd->lnhd", a, b)
    leaves[OUT] = (tree.leaves[OUT].astype(np.float64) + delta).astype(np.float32)


def rescaled(path: tuple[str, ...], factor: float) -> Callable[[Flat, Tree], None]:
    def corrupt(leaves: Flat, tree: Tree) -> None:
        kernel = tree.leaves[path].astype(np.float64)
        leaves[path] = (kernel + factor * (tree.expected[path] - kernel)).astype(np.float32)

    return corrupt


def one_layer_not_merged(leaves: Flat, tree: Tree) -> None:
    leaves[Q] = leaves[Q].copy()
    leaves[Q][1] = tree.leaves[Q][1].astype(np.float32)


def layers_swapped(leaves: Flat, tree: Tree) -> None:
    leaves[GATING] = leaves[GATING][[0, 2, 1]]


def nan_in_one_entry(leaves: Flat, tree: Tree) -> None:
    leaves[Q] = leaves[Q].copy()
    leaves[Q].reshape(-1)[5] = np.nan


def bit_flipped(leaves: Flat, tree: Tree) -> None:
    values = leaves[VISION].copy()
    values.view(np.uint32).reshape(-1)[17] ^= 1
    leaves[VISION] = values


def vision_tower_of_the_base(leaves: Flat, tree: Tree) -> None:
    base = as_base(tree)
    for path in leaves:
        if path[:2] == ("PaliGemma", "img"):
            leaves[path] = base[path]


def leftover_adapter(leaves: Flat, tree: Tree) -> None:
    path = (*Q[:-1], "lora_a")
    leaves[path] = tree.leaves[path]


def missing_leaf(leaves: Flat, tree: Tree) -> None:
    del leaves["state_proj", "bias"]


def unexpected_leaf(leaves: Flat, tree: Tree) -> None:
    leaves["value_head", "kernel"] = np.zeros((2, 2), np.float32)


def other_shape(leaves: Flat, tree: Tree) -> None:
    leaves[VISION] = leaves[VISION][:, :-1]


def untouched_narrowed(leaves: Flat, tree: Tree) -> None:
    leaves[VISION] = leaves[VISION].astype(BFLOAT16)


CORRUPTIONS: dict[str, tuple[Callable[[Flat, Tree], None], set[str], str]] = {
    "per-head product in attn_vec": (per_head_product, {"fused-exact", "forward"}, "another delta"),
    "scale off by 1 %": (rescaled(Q, 1.01), {"fused-exact", "forward"}, "1.01 times (another scale?)"),
    "rsLoRA instead of plain": (rescaled(Q, 2.0**0.5), {"fused-exact", "forward"}, "1.41 times"),
    "feed-forward scaled": (rescaled(LINEAR, 3.0), {"fused-exact", "forward"}, "3.00 times"),
    "one layer not merged": (one_layer_not_merged, {"fused-exact", "forward"}, "the adapter is missing"),
    "two layers swapped": (layers_swapped, {"fused-exact", "forward"}, "another delta"),
    "merged twice": (rescaled(LINEAR, 2.0), {"fused-exact", "forward"}, "(merged twice?)"),
    "NaN in one entry": (nan_in_one_entry, {"finite", "fused-exact", "forward"}, "not finite"),
    "one bit flipped": (bit_flipped, {"untouched-bits"}, "1 of "),
    "vision tower of the base": (vision_tower_of_the_base, {"untouched-bits"}, "img"),
    "leftover adapter key": (leftover_adapter, {"adapters-stripped"}, "adapter keys are left"),
    "missing leaf": (missing_leaf, {"structure"}, "1 missing"),
    "unexpected leaf": (unexpected_leaf, {"structure"}, "1 not in the checkpoint"),
    "another shape": (other_shape, {"structure"}, "(1, 8, 8), not (1, 9, 8)"),
    "untouched leaf narrowed": (untouched_narrowed, {"structure", "untouched-bits"}, "bfloat16, not float32"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_wrong_merge_is_caught(name: str, case: Case) -> None:
    corrupt, expected, words = CORRUPTIONS[name]
    leaves = merged_leaves(case.tree)
    corrupt(leaves, case.tree)
    outcome = case.verify(case.save(leaves))
    assert failed(outcome) == expected
    assert any(words in message(outcome, check) for check in expected)
    assert outcome.json["status"] == "failed"


def test_transposed_factors_of_a_square_kernel_are_caught(tmp_path: Path) -> None:
    square = dataclasses.replace(PALIGEMMA, width=24, hidden=24)
    case = Case(tmp_path, build(square, ACTION))
    leaves = merged_leaves(case.tree)
    kernel = case.tree.leaves[LINEAR].astype(np.float64)
    leaves[LINEAR] = (kernel + np.swapaxes(case.tree.expected[LINEAR] - kernel, 1, 2)).astype(np.float32)
    outcome = case.verify(case.save(leaves))
    assert failed(outcome) == {"fused-exact", "forward"}
    assert "orientation" in message(outcome, "fused-exact")


def test_a_delta_that_was_rounded_away_warns_and_fails_when_strict(tmp_path: Path) -> None:
    case = Case(tmp_path, build(PALIGEMMA, ACTION, delta=0.006))
    merged = case.merge("--dtype", "bfloat16")
    outcome = case.verify(merged)
    assert failed(outcome) == set()
    assert checks_of(outcome)["delta-survival"] == "warn"
    assert "--dtype float32" in message(outcome, "delta-survival")
    assert failed(case.verify(merged, "--strict")) == {"delta-survival"}
    assert checks_of(case.verify(merged, "--strict", "--min-gain", "-10"))["delta-survival"] == "pass"


def test_a_wrong_merge_formula_is_caught_by_the_models_own_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The equation of the merge is wrong, so recomputing it agrees; what the layer runs does not."""
    rule = openpi._ATTENTION["attn_vec_einsum"]
    wrong = dataclasses.replace(rule, equation="nhr,nrd->nhd")
    monkeypatch.setitem(openpi._ATTENTION, "attn_vec_einsum", wrong)  # type: ignore[arg-type]
    outcome = case.verify(case.merge())
    assert failed(outcome) == {"forward"}
    where = next(check["where"] for check in outcome.json["checks"] if check["id"] == "forward")
    assert all("attn_vec_einsum" in key for key in where)


def test_missing_norm_stats_are_caught(case: Case) -> None:
    merged = case.merge()
    (merged / "assets" / "trossen" / "norm_stats.json").unlink()
    assert failed(case.verify(merged)) == {"assets"}
    shutil.rmtree(merged / "assets")
    assert failed(case.verify(merged)) == {"assets"}


@pytest.mark.parametrize("value", ["nan", "-1.0"])
def test_insane_norm_stats_are_caught_and_inherited_ones_warn(value: str, case: Case) -> None:
    merged = case.merge()
    for step, status in ((merged, "fail"), (case.step, "warn")):
        file = step / "assets" / "trossen" / "norm_stats.json"
        file.write_text(file.read_text().replace('"std": [1.0', f'"std": [{value.replace("nan", "NaN")}'))
        assert checks_of(case.verify(merged))["assets"] == status


def test_other_norm_stats_than_the_checkpoints_warn(case: Case) -> None:
    merged = case.merge()
    file = merged / "assets" / "trossen" / "norm_stats.json"
    file.write_text(file.read_text().replace('"std": [1.0', '"std": [1.5'))
    outcome = case.verify(merged)
    assert (outcome.code, checks_of(outcome)["assets"]) == (0, "warn")
    assert "not the checkpoint's" in message(outcome, "assets")


@pytest.mark.parametrize(
    ("layout", "said"), [({}, "too short"), ({"ocdbt": False}, "truncated"), ({"zarr3": True}, "too short")]
)
def test_a_truncated_chunk_is_caught(layout: dict[str, bool], said: str, case: Case) -> None:
    merged = case.save(merged_leaves(case.tree), **layout)
    files = [file for file in (merged / "params").rglob("*") if file.is_file() and not file.name.startswith(".")]
    largest = max((file for file in files if "manifest" not in file.name), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    outcome = case.verify(merged)
    assert "readable" in failed(outcome)
    assert said in message(outcome, "readable")


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_a_result_that_cannot_be_opened_is_a_failed_check(name: str, case: Case) -> None:
    merged = case.merge()
    (merged / "params" / name).write_bytes(b"{")
    outcome = case.verify(merged)
    assert failed(outcome) == {"readable"}
    assert set(checks_of(outcome).values()) == {"fail", "skip"}


def test_a_folder_without_a_checkpoint_is_a_failed_check(case: Case, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert failed(case.verify(tmp_path / "empty")) == {"readable"}


DEEP = "[" * 100_000
HOSTILE_FILES = {
    "provenance": (
        "lora_merge.json",
        [DEEP, "[1]", "\xff", '{"multiplier": 1' + "0" * 400 + ', "sources": [], "sites": []}'],
    ),
    "assets": ("assets/trossen/norm_stats.json", [DEEP, "[]", "\xff", '{"norm_stats": {"state": 3}}']),
    "readable": ("params/_METADATA", [DEEP, "[]", "\xff"]),
}


@pytest.mark.parametrize("check", HOSTILE_FILES)
def test_hostile_files_in_a_result_are_failed_checks(check: str, case: Case) -> None:
    name, texts = HOSTILE_FILES[check]
    merged = case.merge()
    for text in texts:
        (merged / name).write_bytes(text.encode("latin-1"))
        assert failed(case.verify(merged)) == {check}, text[:20]


@pytest.mark.parametrize("text", ["[]", '{"array_metadatas": [3]}', DEEP])
def test_metadata_that_no_reader_thought_of_is_a_failed_check(text: str, case: Case) -> None:
    merged = case.merge()
    file = merged / "params" / "array_metadatas" / "process_0"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    assert failed(case.verify(merged)) == {"readable"}


def test_odd_leaves_are_compared_like_any_other(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    tree.plain(("odd", "step"), np.array(7, np.int32))
    tree.plain(("odd", "mask"), np.array([True, False]))
    tree.plain(("odd", "small"), np.arange(-3, 3, dtype=np.int8))
    case = Case(tmp_path, tree)
    assert failed(case.verify(case.merge())) == set()
    leaves = merged_leaves(tree)
    assert failed(case.verify(case.save(leaves))) == set()
    leaves["odd", "mask"] = np.array([True, True])
    assert failed(case.verify(case.save(leaves))) == {"untouched-bits"}
    leaves["odd", "mask"] = tree.leaves["odd", "mask"]
    leaves["odd", "small"] = leaves["odd", "small"].astype(np.int32)
    widened = case.verify(case.save(leaves))
    assert failed(widened) == set() and checks_of(widened)["structure"] == "warn"


def test_a_scale_beyond_any_range_is_no_excuse(case: Case) -> None:
    leaves = merged_leaves(case.tree)
    rng = np.random.default_rng(3)
    for path in case.tree.changed:
        leaves[path] = rng.standard_normal(leaves[path].shape).astype(np.float32)
    merged = case.save(leaves)
    for scale in ("1e60", "1e308"):
        assert {"fused-exact", "forward"} <= failed(case.verify(merged, "--scale", scale))


def test_inf_that_a_cast_made_is_not_inherited(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    values = tree.leaves[VISION].copy()
    values[0, 0, 0] = 70000
    tree.plain(VISION, values)
    case = Case(tmp_path, tree)
    leaves = merged_leaves(tree)
    with np.errstate(over="ignore"):
        leaves = {p: v if p in tree.changed else v.astype(np.float16) for p, v in leaves.items()}
    assert failed(case.verify(case.save(leaves), "--dtype-untouched", "float16")) == {"finite"}


def test_norm_stats_that_were_lost_fail(case: Case) -> None:
    other = case.step / "assets" / "droid" / "norm_stats.json"
    other.parent.mkdir()
    shutil.copy(case.step / "assets" / "trossen" / "norm_stats.json", other)
    merged = case.merge()
    assert failed(case.verify(merged)) == set()
    shutil.rmtree(merged / "assets" / "droid")
    outcome = case.verify(merged)
    assert failed(outcome) == {"assets"} and "droid" in message(outcome, "assets")


def test_a_widened_leaf_keeps_its_signs(case: Case) -> None:
    frozen = (*LAYERS, "pre_ffw_norm", "scale")
    case.tree.leaves[frozen].reshape(-1)[0] = -0.0
    case = Case(case.folder / "signs", case.tree)
    leaves = merged_leaves(case.tree)
    leaves[frozen] = leaves[frozen].astype(np.float32)
    assert failed(case.verify(case.save(leaves))) == set()
    leaves[frozen] = leaves[frozen] + np.float32(0)
    assert failed(case.verify(case.save(leaves))) == {"untouched-bits"}


def test_float8_is_too_coarse_for_a_fused_kernel(case: Case) -> None:
    leaves = merged_leaves(case.tree)
    leaves[Q] = leaves[Q].astype(ml_dtypes.float8_e4m3fn)
    outcome = case.verify(case.save(leaves))
    assert failed(outcome) == {"structure"} and "too coarse" in message(outcome, "structure")


def test_what_the_checkpoint_was_already_only_warns(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    step = save_step(tmp_path / "in" / "7", nest(tree.leaves, root=()))
    merged = save_step(tmp_path / "out" / "7", nest(merged_leaves(tree), root=()))
    outcome = run("verify", merged, "--against", step, *ALPHAS, "--json")
    assert failed(outcome) == set()
    assert checks_of(outcome)["structure"] == "warn" and "root key" in message(outcome, "structure")


def test_folders_of_assets_that_link_to_themselves_end(case: Case) -> None:
    merged = case.merge()
    for name in ("one", "two"):
        (merged / "assets" / name).symlink_to(".")
    assert failed(case.verify(merged)) == set()


def test_a_sample_says_so_wherever_it_matters(tmp_path: Path) -> None:
    case = Case(tmp_path, build(PALIGEMMA, ACTION, layers=5))
    outcome = case.verify(case.merge(), "--sample", "2")
    for check in ("finite", "fused-exact", "forward", "delta-survival"):
        assert "at most 2 layers" in message(outcome, check)


# Right merges.


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16])
def test_a_right_merge_in_plain_numpy_passes(dtype: Any, case: Case) -> None:
    merged = case.save(merged_leaves(case.tree, dtype))
    outcome = case.verify(merged)
    assert failed(outcome) == set()
    assert list(checks_of(outcome)) == list(CHECK_IDS)
    assert checks_of(outcome)["provenance"] == "skip"
    assert all(0 < site["proof"]["worst_share"] <= 1 for site in outcome.json["sites"])


def test_a_right_merge_in_float32_numpy_passes(case: Case) -> None:
    """Product by product, and the heads one after the other: the least exact of the right ways."""
    leaves = merged_leaves(case.tree)
    for expert in (PALIGEMMA, ACTION):
        path = (*LAYERS, "attn", f"attn_vec_einsum{expert.suffix}", "w")
        a, b = (case.tree.leaves[(*path[:-1], role)] for role in ("lora_a", "lora_b"))
        delta = np.zeros(leaves[path].shape, np.float32)
        for head in range(b.shape[1]):
            for r in range(b.shape[2]):
                delta += a[..., r, None] * b[:, None, None, head, r]
        leaves[path] = case.tree.leaves[path].astype(np.float32) + np.float32(expert.scale) * delta
    assert failed(case.verify(case.save(leaves))) == set()


RIGHT: dict[str, tuple[Tree, tuple[str, ...], tuple[str, ...]]] = {
    "as trained": (build(PALIGEMMA, ACTION), (), ()),
    "bfloat16": (build(PALIGEMMA, ACTION), ("--dtype", "bfloat16"), ("--dtype", "bfloat16")),
    "untouched as float32": (
        build(PALIGEMMA, ACTION),
        ("--dtype-untouched", "float32"),
        ("--dtype-untouched", "float32"),
    ),
    "half the delta": (build(PALIGEMMA, ACTION), ("--scale", "0.5"), ("--scale", "0.5")),
    "some sites": (build(PALIGEMMA, ACTION), ("--exclude", "**/mlp_1/**"), ("--exclude", "**/mlp_1/**")),
    "full multi-head attention": (build(PALIGEMMA, ACTION, qkv=True), (), ()),
    "unstacked": (build(PALIGEMMA, ACTION, layers=None), (), ()),
    "sampled": (build(PALIGEMMA, ACTION, layers=5), (), ("--sample", "2")),
    "rank above the width": (
        build(dataclasses.replace(PALIGEMMA, attention_rank=30, feed_forward_rank=50), ACTION),
        (),
        (),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_our_own_merges_pass(name: str, tmp_path: Path) -> None:
    tree, merge_flags, verify_flags = RIGHT[name]
    case = Case(tmp_path, tree)
    outcome = case.verify(case.merge(*merge_flags), *verify_flags)
    assert failed(outcome) == set()
    assert {"warn"} & set(checks_of(outcome).values()) == set(), outcome.json["checks"]


def test_rslora_is_judged_by_its_flag(tmp_path: Path) -> None:
    experts = [dataclasses.replace(expert, rslora=True) for expert in (PALIGEMMA, ACTION)]
    case = Case(tmp_path, build(*experts))
    merged = case.save(merged_leaves(case.tree))
    assert failed(case.verify(merged, "--rslora")) == set()
    assert failed(case.verify(merged)) == {"fused-exact", "forward"}


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_merges_pass(name: str, tmp_path: Path) -> None:
    checkpoint, flags = GOLDEN_CASES[name]
    assert run("merge", checkpoint, "-o", tmp_path / "out", *flags).code == 0
    outcome = run("verify", tmp_path / "out", "--against", checkpoint, *flags, "--json")
    assert failed(outcome) == set()
    assert outcome.json["sites"]


def test_other_key_spellings_pass_and_mixed_ones_do_not(case: Case) -> None:
    leaves = merged_leaves(case.tree)
    bare = save_step(case.folder / "bare" / "7", nest(leaves, suffix=()))
    assert failed(case.verify(bare)) == set()
    rootless = save_step(case.folder / "rootless" / "7", nest(leaves, root=()))
    assert failed(case.verify(rootless)) == {"structure"}
    mixed = nest(leaves)
    mixed["params"]["state_proj"]["bias"] = mixed["params"]["state_proj"]["bias"]["value"]
    assert failed(case.verify(save_step(case.folder / "mixed" / "7", mixed))) == {"structure"}


def test_an_untouched_leaf_that_was_widened_warns(case: Case) -> None:
    leaves = merged_leaves(case.tree)
    frozen = (*LAYERS, "pre_ffw_norm", "scale")
    leaves[frozen] = leaves[frozen].astype(np.float32)
    outcome = case.verify(case.save(leaves))
    assert failed(outcome) == set()
    assert checks_of(outcome)["structure"] == "warn"
    assert checks_of(outcome)["untouched-bits"] == "pass"


def test_nan_that_was_there_before_warns(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    values = tree.leaves[VISION].copy()
    values[0, 0, 0] = np.nan
    tree.plain(VISION, values)
    case = Case(tmp_path, tree)
    outcome = case.verify(case.save(merged_leaves(tree)))
    assert failed(outcome) == set()
    assert checks_of(outcome)["finite"] == "warn"


def test_the_dtype_is_judged_when_it_is_asked_for(case: Case) -> None:
    merged = case.merge("--dtype", "bfloat16")
    outcome = case.verify(merged, "--dtype", "auto")
    assert failed(outcome) == {"structure"}
    assert "bfloat16, not float32" in message(outcome, "structure")


def test_rounding_to_either_neighbour_passes_only_when_said(case: Case) -> None:
    leaves = merged_leaves(case.tree)
    ideal = case.tree.expected[LINEAR]
    bits = ideal.astype(np.float32).view(np.uint32)
    leaves[LINEAR] = (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(BFLOAT16)
    merged = case.save(leaves)
    outcome = case.verify(merged)
    assert "fused-exact" in failed(outcome)
    assert "--rounding any" in message(outcome, "fused-exact")
    assert failed(case.verify(merged, "--rounding", "any")) == set()


def test_a_sample_looks_at_some_layers_and_says_so(tmp_path: Path) -> None:
    case = Case(tmp_path, build(PALIGEMMA, ACTION, layers=5))
    leaves = merged_leaves(case.tree)
    leaves[Q] = leaves[Q].copy()
    leaves[Q][1] = 0
    merged = case.save(leaves, chunk_bytes=1000)
    sampled = case.verify(merged, "--sample", "2")
    assert failed(sampled) == set()
    assert any("only layers 0, 4" in note for note in sampled.json["notes"])
    assert {layer["layer"] for site in sampled.json["sites"] for layer in site["layers"]} == {0, 4}
    assert "at most 2 layers" in message(sampled, "fused-exact")
    assert failed(case.verify(merged, "--sample", "5")) == {"fused-exact", "forward"}
