"""What inspect says, checked against the tree that was saved."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.text import Text

from lora_merge_cli.assets import check_assets
from lora_merge_cli.dialects import DIALECTS, ScaleOptions, Subject, Tree
from lora_merge_cli.dialects.openpi import OpenPI
from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.records import Index, TensorSpec
from tests.checkpoints import NORM_STATS, save_step
from tests.command import run
from tests.test_openpi_merge import ALPHAS
from tests.trees import ACTION, BFLOAT16, PALIGEMMA, Flat, as_base, build, nest

LAYOUTS = Path(__file__).parent / "layouts"


def layout_index(name: str) -> Index:
    layout = json.loads((LAYOUTS / f"{name}.json").read_text())
    specs = (
        TensorSpec(("params", *key.split("/"), "value"), tuple(leaf["shape"]), dtype_named(leaf["dtype"]))
        for key, leaf in layout.items()
    )
    return Index({spec.path: spec for spec in specs})


@pytest.mark.parametrize(
    ("layout", "model", "sites", "stated"),
    [
        ("pi0_lora", "pi0", 10, {"assumed"}),
        ("pi05_lora", "pi0.5", 10, {"assumed"}),
        ("pi0_fast_lora", "pi0-FAST", 5, {"assumed"}),
        ("pi0_lora_paligemma_only", "pi0", 5, {"assumed"}),
    ],
)
def test_real_layouts(layout: str, model: str, sites: int, stated: set[str]) -> None:
    index = layout_index(layout)
    dialect = OpenPI()
    survey = dialect.survey(Subject(Tree(index, "x")), ScaleOptions())
    assert dialect.summary(Tree(index, "x")).name == model
    assert len(survey.sites) == sites and not survey.problems and not survey.dropped
    assert all(site.parameters.scale.value == 1.0 for site in survey.sites)
    attention = [s.parameters.scale for s in survey.sites if s.module not in ("gating_einsum", "linear")]
    assert all(scale.assumed and "assumed" in scale.source for scale in attention)
    claimed = [factor.path for site in survey.sites for factor in site.factors.values()]
    assert len(claimed) == len(set(claimed)) == 2 * sites
    assert {p for p in index.tensors if any("lora" in str(part) for part in p)} == set(claimed)
    groups = dialect.grouping(index, survey.sites)
    assert {g for p, g in groups.items() if "img" in p} == {"trained"}
    expert = {g for p, g in groups.items() if dialect.part(p) == "action expert"}
    assert expert == ({"trained"} if "only" in layout else {"frozen", "lora", "adapter"} if sites == 10 else set())


def saved(tmp_path: Path, tree: Flat | None = None, **options: Any) -> Path:
    return save_step(tmp_path / "7", nest(tree or build(PALIGEMMA, ACTION).leaves), **options)


def test_counts_bytes_and_groups(tmp_path: Path) -> None:
    leaves = build(PALIGEMMA, ACTION).leaves
    found = run("inspect", saved(tmp_path, leaves), "--json").json
    assert found["schema_version"] == 1
    assert found["leaves"] == len(leaves)
    assert found["parameters"] == sum(v.size for v in leaves.values())
    assert found["nbytes"] == sum(v.nbytes for v in leaves.values())
    assert found["dtypes"]["bfloat16"] == sum(v.nbytes for v in leaves.values() if v.dtype == BFLOAT16)
    adapters = sum(v.size for p, v in leaves.items() if any("lora" in str(x) for x in p))
    assert found["adapter_parameters"] == adapters
    assert sum(row["parameters"] for row in found["groups"]) == found["parameters"]
    rows = {(row["part"], row["status"]): row["leaves"] for row in found["groups"]}
    assert rows[("action expert", "lora")] == 5
    assert rows[("vision tower", "trained")] == 3
    assert rows[("projections", "trained")] == 8


def test_stats_are_those_of_the_delta(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    found = run("inspect", saved(tmp_path, tree.leaves), "--stats", "--lora-alpha", ALPHAS, "--json").json
    assert len(found["sites"]) == 10
    for site in found["sites"]:
        path = tuple(site["target"].split("/")[1:-1])
        kernel = tree.leaves[path].astype(np.float64)
        delta = tree.expected[path] - kernel
        stats = site["stats"]
        assert stats["relative_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(kernel), rel=1e-5)
        layers = [np.linalg.norm(d) / np.linalg.norm(k) for d, k in zip(delta, kernel, strict=True)]
        assert stats["relative_norm_worst"] == pytest.approx(max(layers), rel=1e-5)
        assert stats["non_finite"] == 0
        flat = delta.reshape(-1, *delta.shape[-2:])
        if site["module"] == "attn_vec_einsum":
            flat = delta.reshape(delta.shape[0], -1, delta.shape[-1])
        ranks = []
        for matrix in flat:
            singular = np.linalg.svd(matrix, compute_uv=False)
            share = singular / singular.sum()
            share = share[share > 1e-9]
            ranks.append(np.exp(-(share * np.log(share)).sum()))
        assert stats["effective_rank"] == pytest.approx(np.mean(ranks), rel=1e-4)


def test_stats_count_non_finite_entries(tmp_path: Path) -> None:
    leaves = build(PALIGEMMA, ACTION).leaves
    path = ("PaliGemma", "llm", "layers", "mlp", "linear")
    leaves[path] = leaves[path].copy()
    leaves[path][0, :2, :3] = np.nan
    found = run("inspect", saved(tmp_path, leaves), "--stats", "--lora-alpha", ALPHAS, "--json").json
    counts = {site["target"]: site["stats"]["non_finite"] for site in found["sites"]}
    assert counts.pop("params/PaliGemma/llm/layers/mlp/linear/value") == 6
    assert set(counts.values()) == {0}


def test_base_tells_frozen_from_moved(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    base = as_base(tree)
    del base[("PaliGemma", "img", "pos_embedding")]
    base[("extra", "kernel")] = np.ones((2, 2), np.float32)
    base[("state_proj", "bias")] = np.ones(3, np.float32)
    other = save_step(tmp_path / "base", nest(base, suffix=()))
    found = run("inspect", saved(tmp_path, tree.leaves), "--base", other, "--json").json
    rows = {row["path"]: row for row in found["base"]}
    for path, values in tree.leaves.items():
        row = rows["/".join(("params", *path, "value"))]
        if any("lora" in str(part) for part in path):
            assert row["status"] == "adapter"
        elif path[-1] == "pos_embedding":
            assert row["status"] == "new"
        elif path == ("state_proj", "bias"):
            assert row["status"] == "reshaped"
        elif values.dtype == BFLOAT16:
            assert row["status"] == "frozen"
        else:
            change = np.linalg.norm(values - base[path]) / np.linalg.norm(base[path])
            assert row["status"] == "moved"
            assert row["relative_change"] == pytest.approx(change, rel=1e-5)
    assert rows["extra/kernel"]["status"] == "missing"


def test_it_ends_with_what_to_do_next(tmp_path: Path) -> None:
    step = saved(tmp_path)
    unknown = run("inspect", step)
    assert "--lora-alpha paligemma=ALPHA,action_expert=ALPHA" in unknown.stdout
    assert "would be refused" in unknown.stdout
    known = run("inspect", step, "--lora-alpha", ALPHAS, "--rslora", "paligemma")
    flat = " ".join(known.stdout.split())
    assert f"lora-merge merge {step} -o merged/7 --lora-alpha {ALPHAS} --rslora paligemma" in flat
    assert 'paligemma_variant="gemma_2b", action_expert_variant="gemma_300m"' in flat
    assert "would be refused" not in flat


def test_the_command_that_it_names_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    advice = run("inspect", saved(tmp_path), "--lora-alpha", ALPHAS, "--json").json["advice"]
    words = advice[0].split()
    assert words[:2] == ["lora-merge", "merge"]
    assert run(*words[1:]).code == 0
    assert (tmp_path / "merged" / "7" / "params").is_dir()


def test_problems_are_shown_and_nothing_is_refused(tmp_path: Path) -> None:
    leaves = build(PALIGEMMA, ACTION).leaves
    leaves[("odd", "lora_a")] = np.ones((2, 2), np.float32)
    outcome = run("inspect", saved(tmp_path, leaves), "--json")
    assert outcome.code == 0
    assert any("odd/lora_a" in problem for problem in outcome.json["problems"])


ENTRY: dict[str, Any] = {"mean": [0.0, 0.0], "std": [1.0, 1.0], "q01": [-1.0, -1.0], "q99": [1.0, 1.0]}
BAD_STATS: dict[str, tuple[Any, str]] = {
    "no json": ("{", "not normalisation statistics"),
    "another document": ({"stats": {}}, "not normalisation statistics"),
    "empty": ({"norm_stats": {}}, "empty"),
    "no object": ({"norm_stats": {"state": 3}}, "state is no object"),
    "missing mean": (
        {"norm_stats": {"state": {k: v for k, v in ENTRY.items() if k != "mean"}}},
        "state.mean is missing",
    ),
    "nan": ({"norm_stats": {"state": ENTRY | {"std": [1.0, float("nan")]}}}, "state.std is not finite"),
    "infinite": ({"norm_stats": {"state": ENTRY | {"q99": [1.0, float("inf")]}}}, "state.q99 is not finite"),
    "text": ({"norm_stats": {"state": ENTRY | {"mean": "zero"}}}, "state.mean is not finite"),
    "negative": ({"norm_stats": {"state": ENTRY | {"std": [1.0, -1.0]}}}, "state.std is negative"),
    "crossed": ({"norm_stats": {"state": ENTRY | {"q01": [-1.0, 1.0]}}}, "q01 is not below state.q99 in 1 of 2"),
    "ragged": ({"norm_stats": {"state": ENTRY | {"q01": [-1.0]}}}, "differ in length"),
    "ragged std": ({"norm_stats": {"state": ENTRY | {"std": [1.0]}}}, "differ in length"),
    "nothing in it": ({"norm_stats": {"state": {"mean": [], "std": []}}}, "state.mean is empty"),
    "a huge integer": ({"norm_stats": {"state": ENTRY | {"mean": [10**400, 0]}}}, "state.mean is not finite"),
}


@pytest.mark.parametrize("case", BAD_STATS)
def test_norm_stats_are_checked(case: str, tmp_path: Path) -> None:
    document, problem = BAD_STATS[case]
    file = tmp_path / "trossen" / "norm_stats.json"
    file.parent.mkdir()
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    assert any(problem in found for found in check_assets(tmp_path).problems)


def test_quantiles_are_needed_where_servers_use_them(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    entry = {key: ENTRY[key] for key in ("mean", "std")}
    (tmp_path / "a" / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": entry}}))
    assert check_assets(tmp_path).problems == ()
    assert any("state.q01 is missing" in p for p in check_assets(tmp_path, quantiles=True).problems)


def test_norm_stats_behind_a_link_are_found(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "norm_stats.json").write_text(json.dumps(NORM_STATS))
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "trossen").symlink_to(tmp_path / "real")
    assert check_assets(tmp_path / "assets").asset_ids == ("trossen",)


def test_sane_norm_stats_pass(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "norm_stats.json").write_text(json.dumps(NORM_STATS))
    assert check_assets(tmp_path).problems == ()
    assert check_assets(tmp_path).asset_ids == ("a",)


def test_missing_assets_are_a_warning_of_a_merge(tmp_path: Path) -> None:
    step = saved(tmp_path, assets=False)
    outcome = run("merge", step, "-o", tmp_path / "out", "--lora-alpha", ALPHAS, "--json")
    assert outcome.code == 0
    assert any("normalisation statistics" in warning for warning in outcome.json["warnings"])
    assert not (tmp_path / "out" / "assets").exists()


def test_text_fits_eighty_columns_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    step, out = saved(tmp_path), tmp_path / "out"
    outcomes = [
        run("inspect", step, "--lora-alpha", ALPHAS, "--stats"),
        run("merge", step, "-o", out, "--lora-alpha", ALPHAS, "--verify"),
        run("verify", out, "--against", step, "--lora-alpha", "30"),
        run("diff", step, out),
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0, 1, 1]
    for outcome in outcomes:
        assert "\x1b[" in outcome.stdout
        lines = Text.from_ansi(outcome.stdout).plain.splitlines()
        assert len(lines) > 20
        assert not [line for line in lines if len(line.rstrip()) > 80 and "lora-merge merge" not in line]
    assert "█" in outcomes[1].stdout and "█" in outcomes[2].stdout


def test_dialects_have_distinct_names() -> None:
    names = [dialect.name for dialect in DIALECTS]
    assert len(names) == len(set(names))


def test_sizes_of_a_trained_expert_are_its_own(tmp_path: Path) -> None:
    none = {"attention_rank": None, "feed_forward_rank": None, "trained": True}
    tree = build(PALIGEMMA, dataclasses.replace(ACTION, **none))  # type: ignore[arg-type]
    found = run("inspect", saved(tmp_path, tree.leaves), "--json").json
    rows = {(row["part"], row["status"]): row["leaves"] for row in found["groups"]}
    assert ("action expert", "trained") in rows and ("action expert", "lora") not in rows
