"""What people see of a model with many sites and of adapters beside it: on the terminal, in Markdown, in HTML, in JUnit."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_merge_cli.reports.kinds import kinds, layer_of, ranges
from tests.command import Outcome, run

LAYERS = 20
WIDTH = 8
VOCAB = 12
MODULES = ("mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj")
INNER = "base_model.model.model.layers"


def make_base(path: Path, layers: int = LAYERS) -> Path:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{n}.{module}.weight": (WIDTH, WIDTH) for n in range(layers) for module in MODULES
    }
    shapes |= {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    shapes |= {"lm_head.weight": (VOCAB, WIDTH)}
    path.mkdir()
    save_file(
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}, path / "model.safetensors"
    )
    config = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": VOCAB}
    (path / "config.json").write_text(json.dumps(config))
    return path


def make_adapter(path: Path, *targets: str, head: bool = False, **config: Any) -> Path:
    rng = np.random.default_rng(1)
    tensors = {}
    ranks = config.get("rank_pattern", {})
    for target in targets:
        rank = ranks.get(target, 2)
        tensors[f"{INNER}.{target}.lora_A.weight"] = rng.normal(size=(rank, WIDTH)).astype(np.float32)
        tensors[f"{INNER}.{target}.lora_B.weight"] = rng.normal(size=(WIDTH, rank)).astype(np.float32)
    if head:
        tensors["base_model.model.lm_head.weight"] = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
        config["modules_to_save"] = ["lm_head"]
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"} | config
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


EVERYWHERE = tuple(f"{n}.{module}" for n in range(LAYERS) for module in MODULES)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("case")
    make_base(folder / "base")
    make_adapter(folder / "style", *EVERYWHERE, head=True, base_model_name_or_path="someone/some-llama")
    make_adapter(folder / "noise", *(f"{n}.self_attn.q_proj" for n in range(3, 9)))
    make_adapter(folder / "ranks", *EVERYWHERE, rank_pattern={"0.mlp.down_proj": 3, "7.mlp.down_proj": 3})
    return folder


@pytest.fixture(scope="module")
def merged(case: Path) -> tuple[Outcome, Path]:
    """A merge of two adapters, with every report."""
    out = case / "out"
    flags = [part for suffix in ("md", "html", "xml", "json") for part in ("--report", case / f"report.{suffix}")]
    adapters = ("--adapter", case / "style", "--adapter", f"{case / 'noise'}@0.5")
    outcome = run("merge", case / "base", *adapters, "-o", out, *flags)
    assert outcome.code == 0, outcome.stderr
    return outcome, case


def lines(outcome: Outcome) -> list[str]:
    """What was printed, with spaces as one; nothing may be wider than a page."""
    assert outcome.code == 0, outcome.stderr
    return [" ".join(line.split()) for line in outcome.stdout.splitlines()]


def test_an_adapter_alone(case: Path) -> None:
    found = lines(run("inspect", case / "style"))
    assert found[0] == "LoRA adapter (safetensors, peft)"
    assert "made for someone/some-llama" in found
    assert [line for line in found if " x20 " in line] == [f"{module} x20 0-19 2 2 8 x 8" for module in MODULES]
    assert any(line.startswith("rides along: ") and "lm_head" in line for line in found)
    assert any(line.startswith("scale: alpha 4 / rank 2") for line in found)
    assert not any(line.startswith(("part ", "assets")) for line in found)
    command = next(line for line in run("inspect", case / "style").stdout.splitlines() if "lora-merge merge" in line)
    assert command.split()[:5] == ["lora-merge", "merge", "someone/some-llama", "--adapter", str(case / "style")]


def test_a_rank_of_its_own_is_a_row_of_its_own(case: Path) -> None:
    found = lines(run("inspect", case / "ranks"))
    rows = [line for line in found if line.startswith("mlp.down_proj")]
    assert rows == ["mlp.down_proj x2 0,7 3 1.333 8 x 8", "mlp.down_proj x18 18 of 1-19 2 2 8 x 8"]
    assert "scale: alpha 4 / rank 3 (adapter_config.json, rank_pattern '*.mlp.down_proj')" in found


def test_a_base_and_two_adapters(case: Path) -> None:
    adapters = ("--adapter", case / "style", "--adapter", f"{case / 'noise'}@0.5")
    found = lines(run("inspect", case / "base", *adapters))
    joined = " ".join(found)
    assert "121 of 121 keys matched" in found and "12 of 12 keys matched" in found
    assert f"adapter 2: {case / 'noise'} at weight 0.5" in joined and "names no base" in found
    assert "self_attn.q_proj x6 3-8 2 2 ri,or->oi" in found
    assert "of them are adapters" not in joined
    assert any("--json" in line and "has each of them" in line for line in found)
    measured = lines(run("inspect", case / "base", *adapters, "--stats"))
    document = run("inspect", case / "base", *adapters, "--stats", "--json").json
    norms = [site["stats"]["relative_norm"] for site in document["sites"] if site["adapter"] == 1]
    (row,) = [line for line in measured if line.startswith("self_attn.q_proj x6 ") and "8 x 8" not in line]
    assert row.split()[5:7] == [f"{np.median(norms):.3f}", f"{max(norms):.3f}"]


def test_few_sites_have_a_row_each(case: Path) -> None:
    found = lines(run("merge", case / "base", "--adapter", case / "noise", "--dry-run"))
    assert found[0].endswith("6 sites of 1 adapter to merge (dry run, nothing written)")
    assert "layers.3.self_attn.q_proj 2 ri,or->oi 2 float32" in found
    assert not any("share a row" in line for line in found)


def test_a_merge_on_the_terminal(merged: tuple[Outcome, Path]) -> None:
    outcome, case = merged
    found = lines(outcome)
    assert found[0].startswith("merged 66 sites and 1 leaf of 2 adapters")
    assert "unknown" not in outcome.stdout
    report = json.loads((case / "report.json").read_text())
    for number, (module, count) in enumerate([("self_attn.v_proj", 20), ("self_attn.q_proj", 6)]):
        sites = [site for site in report["sites"] if site["adapter"] == number and site["module"] == module[10:]]
        norms = [site["relative_norm"] for site in sites]
        gain = min(site["survival"][0]["gain_along_inputs"] for site in sites)
        (row,) = [line for line in found if line.startswith(f"{module} x{count} ")]
        assert row.split()[-4:-1] == [f"{np.median(norms):.3f}", f"{max(norms):.3f}", f"{gain:.3f}"]
    assert "1 leaf replaced: modules_to_save (lm_head.weight)" in found
    assert f"{LAYERS * 3 + 3 - 60 - 1} leaves copied" in found
    # A block for each of the layers, sizes and gains.
    (blocks,) = re.findall(r"^self_attn\.q_proj +(\S.{19})  (\S{20})  [\d.]+$", outcome.stdout, re.MULTILINE)
    assert all(len(part) == LAYERS for part in blocks)
    assert max(map(len, outcome.stdout.splitlines())) <= 100


def test_a_merge_in_markdown(merged: tuple[Outcome, Path]) -> None:
    text = (merged[1] / "report.md").read_text()
    assert "66 sites and 1 leaf of 2 adapters merged" in text.splitlines()[0]
    assert f"adapter 2 `{merged[1] / 'noise'}` at weight 0.5" in text
    row = next(line for line in text.splitlines() if line.startswith("| `self_attn.q_proj` | 2, weight 0.5 |"))
    assert row.split(" | ")[2:4] == ["6", "3-8"]
    assert "| `lm_head.weight` | replaced | `modules_to_save` | float32 | 384 B |" in text
    assert "2 untouched by adapters, 1 replaced, " in text
    assert "untouched by adapters: 2 copied" in text
    assert "| adapter 2, weight 0.5 |" in text


def test_a_merge_in_html(merged: tuple[Outcome, Path]) -> None:
    html = (merged[1] / "report.html").read_text()
    charts = {
        chart["name"]: chart for chart in json.loads(re.findall(r'id="charts">(.*?)</script>', html, re.DOTALL)[0])
    }
    size = charts["size-0"]
    assert size["layout"]["yaxis"]["ticktext"] == list(MODULES)
    report = json.loads((merged[1] / "report.json").read_text())
    norms = {site["label"]: site["relative_norm"] for site in report["sites"]}
    expected = [[norms[f"layers.{n}.{module}"] for n in range(LAYERS)] for module in MODULES]
    np.testing.assert_allclose(size["data"][0]["z"], expected, rtol=1e-3)
    assert size["data"][0]["x"] == list(range(LAYERS))
    assert np.shape(charts["gain-0"]["data"][0]["z"]) == (3, LAYERS)
    text = " ".join(unescape(re.sub(r"<[^>]+>", " ", html[: html.index('<script id="plotly"')])).split())
    assert "lm_head.weight replaced modules_to_save float32" in text
    assert "2 untouched by adapters" in text and "weight 0.5" in text and "adapter 2" in text
    assert "self_attn.q_proj 2, weight 0.5 6 3-8 2 2 float32" in text
    assert "sites 66 of 2 adapters" in text and "unknown" not in text


def test_a_merge_in_junit(merged: tuple[Outcome, Path]) -> None:
    text = (merged[1] / "report.xml").read_text()
    assert "merged: 66 sites and 1 leaf of 2 adapters" in text
    assert "replaced: lm_head.weight, modules_to_save" in text


def test_a_verification(merged: tuple[Outcome, Path]) -> None:
    _, case = merged
    adapters = ("--adapter", case / "style", "--adapter", f"{case / 'noise'}@0.5")
    report = case / "verified.md"
    outcome = run("verify", case / "out", "--against", case / "base", *adapters, "--report", report)
    assert outcome.code == 0, outcome.stdout
    assert re.search(r"verified .*66 sites of 2 adapters: ", outcome.stdout)
    row = next(line for line in report.read_text().splitlines() if line.startswith("| `mlp.down_proj` | 1 |"))
    # Name, adapter, count, layers, rank, scale, three sizes, share, error and two gains.
    assert row.count(" | ") == 12


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["layers.0.q", "layers.1.q", "layers.2.q"], [("q x3", "0-2")]),
        (["layers.0.q", "layers.2.q"], [("q x2", "0,2")]),
        (["a.0.q", "b.0.q", "b.1.q"], [("a.*.q", "0"), ("b.*.q x2", "0-1")]),
        (["layers.0.experts.1.up", "layers.0.experts.2.up"], [("experts.*.up x2", "0")]),
        (["lm_head", "layers/4/q"], [("lm_head", "-"), ("q", "4")]),
        (["net.0", "net.2"], [("net.* x2", "0,2")]),
        (["attn/q_einsum_1", "attn/q_einsum_2"], [("attn/q_einsum_1", "-"), ("attn/q_einsum_2", "-")]),
    ],
)
def test_kinds(names: list[str], expected: list[tuple[str, str]]) -> None:
    found = kinds(names, str, lambda _: None)
    assert [(kind.counted, kind.layers) for kind in found] == expected
    assert [name for kind in found for name in kind.members] == names


def test_too_many_kinds_share_rows_of_ranges(tmp_path: Path) -> None:
    ranks = {name: 1 + number for number, name in enumerate(EVERYWHERE)}
    found = lines(run("inspect", make_adapter(tmp_path / "adapter", *EVERYWHERE, rank_pattern=ranks)))
    last = 4 / (3 * LAYERS)
    assert f"self_attn.v_proj x20 0-19 3-{3 * LAYERS} {last:.4g}-1.333 8 x 8" in found
    assert len([line for line in found if " x20 " in line]) == 3


def test_whole_tensors_alone(case: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "head", head=True)
    outcome = run("merge", case / "base", "--adapter", adapter, "-o", tmp_path / "out", "--report", tmp_path / "r.md")
    assert lines(outcome)[0].startswith("merged 1 leaf of 1 adapter")
    text = (tmp_path / "r.md").read_text()
    assert "## Sites" not in text and "| `lm_head.weight` | replaced |" in text


def test_layers() -> None:
    assert ranges([[1, 9], [0, 9], [0, 3]]) == "0-1"
    assert ranges([[n] for n in (0, 1, 2, 5)]) == "4 of 0-5"
    assert layer_of("model.layers.12.experts.3.up") == 12 and layer_of("lm_head") is None
