"""The plan's invariants, a dry run against its run, and the reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.dialects.interface import ScaleOptions
from lora_merge_cli.formats.zarr_array import ZarrArray
from lora_merge_cli.formats.zarr_encoding import chunks_of
from lora_merge_cli.inputs import open_inputs
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.plan import _chunk, plan_merge
from lora_merge_cli.records import TensorSpec, full_region, glob_matches, grid, region_shape
from tests.checkpoints import restore_flat, save_step
from tests.command import run
from tests.test_openpi_merge import ALPHAS
from tests.trees import ACTION, PALIGEMMA, build, nest


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return save_step(tmp_path / "in" / "5", nest(build(PALIGEMMA, ACTION).leaves))


@pytest.mark.parametrize("exclude", [(), ("**/mlp/**",), ("**/attn/**", "**/mlp_1/linear/**")])
def test_every_input_leaf_goes_exactly_one_way(exclude: tuple[str, ...], step: Path) -> None:
    inputs = open_inputs(step)
    index = inputs.checkpoint.source.index()
    plan = plan_merge(inputs, MergeOptions(ScaleOptions({"": 3.0}), exclude=exclude))
    kept = [s.source.path for s in plan.steps]
    ways = [*kept, *(path for _, path in plan.factors), *(leaf.path for leaf in plan.dropped)]
    assert sorted(ways) == sorted(index.tensors)
    assert len({s.output.path for s in plan.steps}) == len(plan.steps)
    for s in plan.steps:
        assert (s.origin == "changed") == bool(s.sites)


def test_blocks_and_chunks_are_runs_of_entries(tmp_path: Path) -> None:
    step = save_step(tmp_path / "5", nest(build(PALIGEMMA, ACTION).leaves), chunk_bytes=300)
    plan = plan_merge(open_inputs(step), MergeOptions(ScaleOptions({"": 3.0})))
    for s in plan.steps:
        for extents in (s.block, s.chunk):
            flat = np.arange(s.output.size).reshape(s.output.shape)
            order = [flat[region].ravel() for region in grid(full_region(s.output.shape), extents)]
            assert np.concatenate(order).tolist() == list(range(s.output.size))


@pytest.mark.parametrize("shape", [(2, 33554467), (7, 5), (33554467,), (3, 33554467, 2), ()])
def test_no_chunk_is_cut_inside_a_row(shape: tuple[int, ...]) -> None:
    chunk = _chunk(TensorSpec(("w",), shape, np.dtype(np.float32)))
    assert chunk[1:] == shape[1:] and all(1 <= part <= n for part, n in zip(chunk, shape, strict=True))


@pytest.mark.parametrize(("shape", "chunks"), [((2, 17), (1, 9)), ((9, 2, 5), (2, 1, 5)), ((3, 5, 1), (1, 2, 1))])
def test_chunks_that_are_no_runs_are_not_written(shape: tuple[int, ...], chunks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no runs"):
        list(chunks_of(ZarrArray(shape, chunks, np.dtype(np.float32), "raw"), iter(())))


def test_the_number_of_jobs_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that there are many of them under way."""
    monkeypatch.setattr("lora_merge_cli.operations.cutting.BLOCK_ENTRIES", 64)
    monkeypatch.setattr("lora_merge_cli.operations.cutting.TILE_ENTRIES", 16)
    step = save_step(tmp_path / "in" / "5", nest(build(PALIGEMMA, ACTION).leaves))
    results = []
    for jobs in (1, 2, 7):
        out = tmp_path / f"out{jobs}"
        outcome = run("merge", step, "-o", out, "--lora-alpha", ALPHAS, "--jobs", jobs, "--json")
        assert outcome.code == 0
        results.append((restore_flat(out / "params"), outcome.json["sites"]))
    (first, sites), *others = results
    for values, measured in others:
        assert measured == sites
        assert all(values[path].tobytes() == array.tobytes() for path, array in first.items())


def test_chunking_of_the_input_changes_no_bit(tmp_path: Path) -> None:
    outputs = []
    for number, chunk in enumerate((None, 100, 1000)):
        step = save_step(tmp_path / f"in{number}" / "5", nest(build(PALIGEMMA, ACTION).leaves), chunk_bytes=chunk)
        assert run("merge", step, "-o", tmp_path / f"out{number}", "--lora-alpha", ALPHAS).code == 0
        outputs.append(restore_flat(tmp_path / f"out{number}" / "params"))
    for path, values in outputs[0].items():
        assert all(values.tobytes() == other[path].tobytes() for other in outputs[1:]), path


def test_a_dry_run_says_what_the_run_does_and_writes_nothing(step: Path, tmp_path: Path) -> None:
    flags = ["--lora-alpha", ALPHAS, "--json"]
    planned = run("merge", step, "--dry-run", *flags).json
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    done = run("merge", step, "-o", tmp_path / "out", *flags).json
    assert (planned["status"], done["status"]) == ("planned", "merged")
    for key in ("sources", "copied", "dropped", "notes", "warnings", "output_bytes", "model", "dialect"):
        assert planned[key] == done[key], key
    measured = {"relative_norm", "max_abs", "survival", "layers", "adapter_digest", "spectrum"}
    for before, after in zip(planned["sites"], done["sites"], strict=True):
        assert {k: v for k, v in before.items() if k not in measured} == {
            k: v for k, v in after.items() if k not in measured
        }
    assert done["output_bytes"] == sum(v.nbytes for v in restore_flat(tmp_path / "out/params").values())


def test_dry_run_text_shows_scales_their_sources_and_costs(step: Path) -> None:
    text = run("merge", step, "--dry-run", "--lora-alpha", ALPHAS).stdout
    for words in ("nothing written", "alpha 12 / rank", "lnhr,lmrd->lnhd", "peak memory", "to write", "20 dropped"):
        assert words in text, words


def test_the_json_report(step: Path, tmp_path: Path) -> None:
    report = tmp_path / "deep" / "report.json"
    outcome = run("merge", step, "-o", tmp_path / "out", "--lora-alpha", ALPHAS, "--report", report, "--json")
    document = json.loads(report.read_text())
    assert document == outcome.json == json.loads((tmp_path / "out" / "lora_merge.json").read_text())
    assert document["schema_version"] == 1
    assert document["sources"][0]["fingerprint"].startswith("sha256:")
    assert len({site["adapter_digest"] for site in document["sites"]}) == 10
    assert {"lora-merge", "jax", "numpy", "tensorstore"} <= document["versions"].keys()
    assert document["device"] and document["seconds"] > 0 and document["peak_rss_bytes"] > 0
    assert len(document["sites"]) == 10 and len(document["dropped"]) == 20
    tree = build(PALIGEMMA, ACTION)
    for site in document["sites"]:
        path = tuple(site["target"].split("/")[1:-1])
        kernel = tree.leaves[path].astype(np.float64)
        delta = tree.expected[path] - kernel
        assert site["relative_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(kernel), rel=1e-5)
        assert site["max_abs"] == pytest.approx(np.abs(delta).max(), rel=1e-5)
        assert [s["dtype"] for s in site["survival"]] == ["float32", "bfloat16"]
        assert site["survival"][0]["gain"] == pytest.approx(1.0, abs=1e-5)
        assert len(site["layers"]) == 3 and site["non_finite"] == 0
    assert any("gemma_2b" in note for note in document["notes"])


def test_the_markdown_report(step: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    run("merge", step, "-o", tmp_path / "out", "--lora-alpha", ALPHAS, "--report", report)
    text = report.read_text()
    assert text.startswith("# pi0: 10 adapters merged")
    rows = [line for line in text.splitlines() if line.startswith("| `params/")]
    assert len(rows) == 10
    header = next(line for line in text.splitlines() if line.startswith("| target"))
    unescaped = [line.replace("\\|", "") for line in (header, *rows)]
    assert len({line.count("|") for line in unescaped}) == 1
    assert "serve the merged checkpoint with" in text and "sha256:" in text


def test_lost_deltas_warn_and_say_what_to_do(tmp_path: Path) -> None:
    step = save_step(tmp_path / "in" / "5", nest(build(PALIGEMMA, ACTION, delta=0.004).leaves))
    kept = run("merge", step, "-o", tmp_path / "a", "--lora-alpha", ALPHAS, "--dtype", "keep", "--json").json
    assert any("stored as bfloat16" in w and "--dtype float32" in w for w in kept["warnings"])
    wide = run("merge", step, "-o", tmp_path / "b", "--lora-alpha", ALPHAS, "--json").json
    assert any("served as bfloat16" in w for w in wide["warnings"])
    assert not any("stored as" in w for w in wide["warnings"])


def test_provenance_chains_when_a_merged_checkpoint_is_merged_again(step: Path, tmp_path: Path) -> None:
    assert run("merge", step, "-o", tmp_path / "first", "--lora-alpha", ALPHAS).code == 0
    leaves: dict[Any, Any] = restore_flat(tmp_path / "first" / "params")
    second = build(PALIGEMMA, ACTION, seed=8)
    for path, values in second.leaves.items():
        if any("lora" in str(part) for part in path):
            leaves[path] = values
    again = save_step(tmp_path / "again" / "6", nest(leaves))
    (again / "lora_merge.json").write_text((tmp_path / "first" / "lora_merge.json").read_text())
    document = run("merge", again, "-o", tmp_path / "second", "--lora-alpha", ALPHAS, "--json").json
    assert len(document["parents"]) == 1
    assert document["parents"][0]["sources"][0]["path"] == str(step / "params")


def test_the_same_adapter_a_second_time_is_refused(step: Path, tmp_path: Path) -> None:
    assert run("merge", step, "-o", tmp_path / "first", "--lora-alpha", ALPHAS, "--include", "mlp/linear").code == 0
    leaves: dict[Any, Any] = restore_flat(tmp_path / "first" / "params")
    leaves |= {p: v for p, v in restore_flat(step / "params").items() if any("lora" in str(part) for part in p)}
    again = save_step(tmp_path / "again" / "6", nest(leaves))
    (again / "lora_merge.json").write_text((tmp_path / "first" / "lora_merge.json").read_text())
    refused = run("merge", again, "-o", tmp_path / "second", "--lora-alpha", ALPHAS)
    assert refused.code == 4
    assert "already merged" in refused.error and "mlp/linear" in refused.error
    assert not (tmp_path / "second").exists()
    rest = run("merge", again, "-o", tmp_path / "rest", "--lora-alpha", ALPHAS, "--exclude", "mlp/linear")
    assert rest.code == 0


def test_quiet_prints_nothing(step: Path, tmp_path: Path) -> None:
    outcome = run("merge", step, "-o", tmp_path / "out", "--lora-alpha", ALPHAS, "-q")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "", "")


def test_rslora_stands_alone_or_names_experts(step: Path) -> None:
    def scales(*flags: str) -> dict[str, float]:
        sites = run("merge", *flags[:1], step, *flags[1:], "--dry-run", "--json", "--lora-alpha", ALPHAS).json["sites"]
        return {site["group"]: site["scale"] for site in sites if site["module"] == "q_einsum"}

    plain = {"paligemma": 12 / 4, "action_expert": 3 / 2}
    root = {"paligemma": 12 / 2, "action_expert": pytest.approx(3 / 2**0.5)}
    assert scales("--rslora") == root
    assert scales("-q", "--rslora") == root
    assert scales("-q", "--rslora", "paligemma") == plain | {"paligemma": 6.0}
    assert scales("-q", "--rslora=action_expert,paligemma") == root
    assert scales("-q", "--rslora", "paligemma=true,action_expert=false") == plain | {"paligemma": 6.0}
    assert scales("-q") == plain


@given(
    shape=st.lists(st.integers(1, 9), max_size=4),
    block=st.lists(st.integers(1, 5), min_size=4, max_size=4),
)
def test_a_grid_covers_each_entry_once(shape: list[int], block: list[int]) -> None:
    seen = np.zeros(shape, int)
    for region in grid(full_region(shape), block[: len(shape)]):
        seen[region] += 1
        assert all(n <= b for n, b in zip(region_shape(region), block, strict=False))
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("**/attn/**", True),
        ("params.PaliGemma.llm.layers.attn.q_einsum.w", True),
        ("params/*/llm/**/w", True),
        ("**", True),
        ("attn", False),
        ("params/*", False),
        ("**/Attn/**", False),
        ("**/{mlp,attn}/**", True),
    ],
)
def test_globs(pattern: str, matches: bool) -> None:
    path = ("params", "PaliGemma", "llm", "layers", "attn", "q_einsum", "w")
    assert glob_matches(path, pattern) is matches


def test_a_report_inside_the_output_goes_with_it(step: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--lora-alpha", ALPHAS, "--report", out / "reports" / "merge.md", "--report", out / "merge.json"]
    assert run("merge", step, "-o", out, *flags).code == 0
    assert (out / "reports" / "merge.md").exists() and (out / "merge.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("report", "flags", "code"),
    [
        ("in/5/assets/trossen/norm_stats.json", [], 4),
        ("in/5/params/report.json", [], 4),
        ("out.json", ["-o", "out.json"], 2),
        ("a.json", ["-o", "a.json/out"], 2),
        ("out/plan.json", ["-o", "out", "--dry-run"], 2),
        ("folder.md", [], 2),
    ],
)
def test_reports_that_must_not_be_written(
    report: str, flags: list[str], code: int, step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.md").mkdir()
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    flags = flags or ["-o", "out"]
    outcome = run("merge", step, *flags, "--lora-alpha", ALPHAS, "--report", report)
    assert outcome.code == code and "--report" in outcome.error
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


def test_a_report_that_cannot_be_written_stops_the_merge_before_it_appears(step: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    outcome = run(
        "merge", step, "-o", tmp_path / "out", "--lora-alpha", ALPHAS, "--report", tmp_path / "file" / "r.json"
    )
    assert outcome.code == 6, outcome.stderr
    assert outcome.error
    assert not (tmp_path / "out").exists()


def test_relative_outputs_with_parent_parts(step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for output in ("../a", "./x/../b", "../work/../c", "d/"):
        outcome = run("merge", "../in/5/", "-o", output, "--lora-alpha", ALPHAS)
        assert outcome.code == 0, outcome.stderr
    assert all((tmp_path / name / "params").is_dir() for name in ("a", "work/b", "c", "work/d"))
    monkeypatch.chdir(step)
    assert run("merge", ".", "-o", "../../e", "--lora-alpha", ALPHAS).code == 0
    assert (tmp_path / "e" / "assets").is_dir()


@pytest.mark.parametrize(
    "pattern",
    [
        "mlp/linear",
        "PaliGemma/llm/layers/mlp/linear",
        "**/mlp/linear/**",
        "params.PaliGemma.llm.layers.mlp.linear.value",
    ],
)
def test_globs_match_the_names_that_are_shown(pattern: str, step: Path) -> None:
    outcome = run("merge", step, "--dry-run", "--json", "--include", pattern)
    assert outcome.code == 0, outcome.stderr
    assert [site["target"] for site in outcome.json["sites"]] == ["params/PaliGemma/llm/layers/mlp/linear/value"]


def test_values_that_json_cannot_hold_are_null(tmp_path: Path) -> None:
    leaves = build(PALIGEMMA, ACTION).leaves
    leaves[("PaliGemma", "img", "pos_embedding")] = np.full((1, 9, 8), np.nan, np.float32)
    step = save_step(tmp_path / "in" / "5", nest(leaves))
    rows = run("inspect", step, "--base", step, "--json").json["base"]
    assert {row["status"] for row in rows} == {"frozen"}
    other = save_step(tmp_path / "other" / "5", nest(build(PALIGEMMA, ACTION).leaves))
    rows = run("inspect", step, "--base", other, "--json").json["base"]
    assert [row["relative_change"] for row in rows if row["status"] == "moved"] == [None]


@pytest.mark.parametrize("size", [1e-28, 1e15])
def test_figures_of_tiny_and_huge_deltas_are_finite(size: float, tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    for path, values in tree.leaves.items():
        if str(path[-1]).endswith("lora_b"):
            tree.leaves[path] = (values * np.float32(size)).astype(np.float32)
    step = save_step(tmp_path / "in" / "5", nest(tree.leaves))
    document = run("merge", step, "-o", tmp_path / "out", "--lora-alpha", ALPHAS, "--json").json
    for site in document["sites"]:
        path = tuple(site["target"].split("/")[1:-1])
        kernel = tree.leaves[path].astype(np.float64)
        delta = (tree.expected[path] - kernel) * float(np.float32(size))
        assert site["relative_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(kernel), rel=1e-3)
        if size > 1:
            assert site["survival"][0]["gain_along_inputs"] == pytest.approx(1.0, abs=1e-5)
