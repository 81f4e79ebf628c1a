"""Two checkpoints side by side: figures against float64 by hand, over layouts, dtypes and spellings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import save_item, save_step
from tests.command import run
from tests.test_golden import GOLDEN
from tests.trees import ACTION, BFLOAT16, PALIGEMMA, Flat, as_base, build, nest

VISION = ("PaliGemma", "img", "pos_embedding")
NAME = "params/PaliGemma/img/pos_embedding/value"


def leaf_of(document: Any, path: str) -> Any:
    return next(leaf for leaf in document["leaves"] if leaf["path"] == path)


def compared(tmp_path: Path, a: Flat, b: Flat, *flags: object, **layout: Any) -> tuple[int, Any]:
    step_a = save_step(tmp_path / "a" / "1", nest(a))
    step_b = save_step(tmp_path / "b" / "1", nest(b), **layout)
    outcome = run("diff", step_a, step_b, "--json", *flags)
    return outcome.code, outcome.json


def test_figures_of_a_changed_leaf(tmp_path: Path) -> None:
    a = build(PALIGEMMA, ACTION).leaves
    values = a[VISION].copy()
    values[0, 1, :3] *= np.float32(1.5)
    values[0, 2, 0] = np.nextafter(values[0, 2, 0], np.float32(np.inf))
    code, found = compared(tmp_path, a, {**a, VISION: values}, chunk_bytes=100)
    assert (code, found["status"], found["counts"]) == (1, "different", {"changed": 1, "equal": len(a) - 1})
    leaf = found["leaves"][0]
    wide_a, wide_b = a[VISION].astype(np.float64), values.astype(np.float64)
    steps = values.view(np.int32).astype(np.int64) - a[VISION].view(np.int32).astype(np.int64)
    assert leaf["path"] == NAME
    assert leaf["max_abs"] == np.abs(wide_b - wide_a).max()
    assert leaf["relative_l2"] == pytest.approx(np.linalg.norm(wide_b - wide_a) / np.linalg.norm(wide_a), rel=1e-12)
    cosine = (wide_a * wide_b).sum() / np.linalg.norm(wide_a) / np.linalg.norm(wide_b)
    assert leaf["cosine"] == pytest.approx(cosine, rel=1e-12)
    assert leaf["max_ulp"] == np.abs(steps).max()
    assert leaf["changed"] == 4 / values.size
    prefix = next(row for row in found["prefixes"] if row["prefix"] == "PaliGemma/img")
    assert (prefix["leaves"], prefix["changed"], prefix["max_abs"]) == (1, 1, leaf["max_abs"])


def test_equal_checkpoints_of_other_layouts_and_spellings_are_equal(tmp_path: Path) -> None:
    leaves = build(PALIGEMMA, ACTION).leaves
    a = save_step(tmp_path / "a" / "1", nest(leaves))
    b = save_item(tmp_path / "b", nest(leaves, suffix=()), ocdbt=False, zarr3=True)
    outcome = run("diff", a, b, "--json")
    assert (outcome.code, outcome.json["status"]) == (0, "equal")
    assert run("diff", a, a).code == 0


def test_leaves_on_one_side_and_other_shapes(tmp_path: Path) -> None:
    a = build(PALIGEMMA, ACTION).leaves
    b = {path: values for path, values in a.items() if path != ("state_proj", "bias")}
    b["head", "kernel"] = np.zeros((2, 3), np.float32)
    b[VISION] = b[VISION][:, :4]
    code, found = compared(tmp_path, a, b)
    assert code == 1
    assert leaf_of(found, "params/state_proj/bias/value")["status"] == "only-a"
    assert leaf_of(found, "params/head/kernel/value")["status"] == "only-b"
    reshaped = leaf_of(found, NAME)
    assert (reshaped["status"], reshaped["shape_a"], reshaped["shape_b"]) == ("reshaped", [1, 9, 8], [1, 4, 8])


@pytest.mark.parametrize(
    ("flags", "code", "status"),
    [
        ((), 1, "changed"),
        (("--atol", "0.011"), 0, "within"),
        (("--atol", "0.009"), 1, "changed"),
        (("--rtol", "10"), 0, "within"),
        (("--rtol", "0", "--atol", "0"), 1, "changed"),
    ],
)
def test_tolerances(flags: tuple[str, ...], code: int, status: str, tmp_path: Path) -> None:
    a = build(PALIGEMMA, ACTION).leaves
    values = a[VISION].copy()
    values[0, 3, 3] += np.float32(0.01)
    found_code, found = compared(tmp_path, a, {**a, VISION: values}, *flags)
    assert (found_code, leaf_of(found, NAME)["status"]) == (code, status)


def test_dtypes(tmp_path: Path) -> None:
    a = build(PALIGEMMA, ACTION).leaves
    rounded = {path: values.astype(BFLOAT16) for path, values in a.items()}
    code, found = compared(tmp_path, a, rounded)
    leaf = leaf_of(found, NAME)
    assert (code, leaf["status"], leaf["dtype_a"], leaf["dtype_b"]) == (1, "rounded", "float32", "bfloat16")
    assert leaf["max_ulp"] == 0 and leaf["changed"] > 0.9
    assert run("diff", tmp_path / "a", tmp_path / "b", "--rtol", "0.01", "-q").code == 0


def test_not_finite_entries_and_zeros_of_other_signs(tmp_path: Path) -> None:
    a = build(PALIGEMMA, ACTION).leaves
    a[VISION] = a[VISION].copy()
    a[VISION][0, 0, :4] = [np.nan, np.inf, 0.0, 1.0]
    values = a[VISION].copy()
    values[0, 0, :4] = [np.nan, np.inf, -0.0, np.nan]
    code, found = compared(tmp_path, a, {**a, VISION: values}, "--atol", "1")
    leaf = leaf_of(found, NAME)
    assert (code, leaf["status"], leaf["non_finite"], leaf["changed"]) == (1, "changed", 1, 2 / values.size)
    assert (leaf["max_abs"], leaf["max_ulp"]) == (0.0, 0)
    same = run("diff", tmp_path / "a", tmp_path / "a", "--json").json
    assert leaf_of(same, NAME)["status"] == "equal"


def test_the_freeze_audit_finds_what_a_fine_tune_moved(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    _, found = compared(tmp_path, as_base(tree), tree.leaves)
    for leaf in found["leaves"]:
        if "lora" in leaf["path"]:
            assert leaf["status"] == "only-b"
        else:
            assert leaf["status"] == ("rounded" if leaf["dtype_b"] == "bfloat16" else "changed"), leaf["path"]


def test_the_golden_base_beside_its_fine_tune() -> None:
    golden = GOLDEN / "pi0_alpha"
    found = run("diff", golden / "base", golden / "lora", "--exclude", "**/*lora_?/**", "--json").json
    frozen = {leaf["path"] for leaf in found["leaves"] if leaf["status"] == "rounded"}
    assert frozen == {leaf["path"] for leaf in found["leaves"] if leaf["dtype_b"] == "bfloat16"}


def test_include_exclude_top_and_depth(tmp_path: Path) -> None:
    a = build(PALIGEMMA, ACTION).leaves
    b = {path: values * 2 for path, values in a.items()}
    _, found = compared(tmp_path, a, b, "--include", "**/mlp/**", "--exclude", "*lora*/**", "--depth", "2")
    assert {leaf["path"].split("/")[-2] for leaf in found["leaves"]} == {"gating_einsum", "linear"}
    assert [row["prefix"] for row in found["prefixes"]] == ["PaliGemma/llm"]
    assert [leaf["status"] for leaf in found["leaves"]] == ["changed", "changed"]
    shown = run("diff", tmp_path / "a", tmp_path / "b", "--top", "2").stdout
    assert f"and {len(a) - 2} more" in shown


def test_what_differs_most_comes_first(tmp_path: Path) -> None:
    a = build(PALIGEMMA, ACTION).leaves
    b = {path: values * np.float32(1 + 0.01 * number) for number, (path, values) in enumerate(a.items())}
    _, found = compared(tmp_path, a, b)
    changes = [leaf["relative_l2"] for leaf in found["leaves"] if leaf["status"] == "changed"]
    assert len(changes) == len(a) - 1
    assert changes == sorted(changes, reverse=True) and changes[0] > changes[-1]


def test_leaves_that_are_no_longer_finite_come_first(tmp_path: Path) -> None:
    a = build(PALIGEMMA, ACTION).leaves
    b = {path: values * 2 for path, values in a.items()}
    b[VISION] = np.full_like(a[VISION], np.nan)
    _, found = compared(tmp_path, a, b)
    assert found["leaves"][0]["path"] == NAME


def test_bad_usage_and_bad_inputs(tmp_path: Path) -> None:
    step = save_step(tmp_path / "a" / "1", nest(build(PALIGEMMA).leaves))
    assert run("diff", step, step, "--rtol", "-1").code == 2
    assert run("diff", step, step, "--include", "nothing").code == 2
    assert run("diff", step, step, "--top", "0").code == 2
    assert run("diff", step, step, "--exclude", "**").code == 2
    assert run("diff", step, tmp_path / "nowhere").code == 3
    largest = max((step / "params").rglob("*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    outcome = run("diff", step, step)
    assert outcome.code == 3 and " :: " in outcome.error
