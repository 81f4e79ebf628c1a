"""Extraction: the way back from the adapter gives what the fine-tune itself gives, bit for bit or within the error that is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from safetensors.numpy import load_file, save_file

from tests.checkpoints import restore_flat, save_step
from tests.command import Outcome, run
from tests.interpolation import ALPHAS, llama_tensors, openpi_pair, read_model, same_bits, write_model
from tests.trees import ACTION, BFLOAT16, PALIGEMMA, Expert, as_base, build, nest

SAMPLES = Path(__file__).parent.parent / "sample_checkpoints"


def conforming(outcome: Outcome) -> Any:
    """The report on stdout, which its schema describes."""
    document = json.loads(outcome.stdout)
    Draft202012Validator(json.loads(run("schema").stdout)).validate(document)
    return document


def extracted(tuned: Path, base: Path | None, output: Path, *flags: object) -> Any:
    done = run("extract", tuned, *(() if base is None else ("--base", base)), "-o", output, "--json", *flags)
    assert done.code == 0, done.stderr
    return conforming(done)


def merged(output: Path, *arguments: object) -> dict[tuple[Any, ...], np.ndarray]:
    done = run("merge", *arguments, "-o", output)
    assert done.code == 0, done.stderr
    return restore_flat(output / "params")


def assert_same_trees(one: dict[Any, np.ndarray], other: dict[Any, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert not [path for path in one if not same_bits(one[path], other[path])]


@pytest.mark.parametrize("suffix", [(), ("value",)], ids=["plain", "value"])
@pytest.mark.parametrize(
    "flags", [("--lora-alpha", ALPHAS), ("--lora-alpha", ALPHAS, "--rslora")], ids=["lora", "rslora"]
)
def test_the_way_back_is_exact(flags: tuple[str, ...], suffix: tuple[str, ...], tmp_path: Path) -> None:
    pair = openpi_pair(tmp_path, suffix=suffix)
    report = extracted(pair.tuned, pair.base, tmp_path / "a", *flags)
    want = merged(tmp_path / "m", pair.tuned, "--base", pair.base, *flags)
    got = merged(tmp_path / "n", pair.base, "--adapter", tmp_path / "a")
    assert_same_trees(got, want)
    assert {str(values.dtype) for values in got.values()} == {"bfloat16", "float32"}
    assert (report["kind"], report["adapter_format"], report["frozen_checked"]) == ("exact", "lora-merge", True)
    assert report["frozen"] == len(pair.frozen) + len(pair.kernels)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    tuned = restore_flat(pair.tuned / "params", root=())
    for key, values in stored.items():
        path = tuple(key.split("/"))
        assert same_bits(values, tuned[path if path in tuned else path[:-1]]), key
    assert sum(values.nbytes for values in stored.values()) == report["factors_bytes"] + report["trained_bytes"]
    assert {leaf["path"] for leaf in report["trained"]} | {"lora"} == {k if "lora" not in k else "lora" for k in stored}


@pytest.mark.parametrize(
    ("experts", "options"),
    [
        ((PALIGEMMA,), {"model": "pi0-FAST"}),
        ((PALIGEMMA, ACTION), {"layers": None, "model": "pi0.5"}),
        (
            (
                PALIGEMMA,
                Expert(suffix="_1", width=16, hidden=28, attention_rank=None, feed_forward_rank=None, trained=True),
            ),
            {},
        ),
        ((Expert(feed_forward_rank=None), ACTION), {"qkv": True}),
    ],
    ids=["fast", "unstacked", "trained-expert", "attention-only"],
)
def test_the_way_back_is_exact_in_other_trees(experts: Any, options: dict[str, Any], tmp_path: Path) -> None:
    tree = build(*experts, **options)
    tuned = save_step(tmp_path / "run" / "7", nest(tree.leaves))
    base = save_step(tmp_path / "base" / "0", nest(as_base(tree), suffix=()))
    extracted(tuned, base, tmp_path / "a", "--lora-alpha", ALPHAS)
    want = merged(tmp_path / "m", tuned, "--base", base, "--lora-alpha", ALPHAS)
    assert_same_trees(merged(tmp_path / "n", base, "--adapter", tmp_path / "a"), want)


def test_the_sample_checkpoint_and_its_way_back_with_other_dtypes(tmp_path: Path) -> None:
    tuned, base = SAMPLES / "pi0_tiny", SAMPLES / "pi0_tiny_base"
    extracted(tuned, base, tmp_path / "a", "--lora-alpha", ALPHAS)
    for dtype in ("keep", "float32"):
        want = merged(tmp_path / f"m{dtype}", tuned, "--base", base, "--lora-alpha", ALPHAS, "--dtype-untouched", dtype)
        got = merged(tmp_path / f"n{dtype}", base, "--adapter", tmp_path / "a", "--dtype-untouched", dtype)
        if dtype == "float32":
            # What was frozen is the base's own here, and no longer rounded.
            assert {str(values.dtype) for values in got.values()} == {"float32"}
            continue
        assert_same_trees(got, want)


def test_a_weight_takes_a_part_of_everything(tmp_path: Path) -> None:
    pair = openpi_pair(tmp_path)
    extracted(pair.tuned, pair.base, tmp_path / "a", "--lora-alpha", ALPHAS)
    got = merged(tmp_path / "n", pair.base, "--adapter", f"{tmp_path / 'a'}@0.5")
    for path, ideal in pair.between(0.5).items():
        assert np.allclose(got[path], ideal, rtol=1e-5, atol=1e-6), path
    assert all(same_bits(got[path], pair.end[path]) for path in pair.frozen)


def test_without_what_was_trained_it_is_said_loudly(tmp_path: Path) -> None:
    pair = openpi_pair(tmp_path)
    report = extracted(pair.tuned, pair.base, tmp_path / "a", "--lora-alpha", ALPHAS, "--without-trained")
    assert any("do not act as the fine-tune" in warning for warning in report["warnings"])
    assert not [key for key in load_file(tmp_path / "a" / "adapter_model.safetensors") if "lora" not in key]
    done = run("merge", pair.base, "--adapter", tmp_path / "a", "-o", tmp_path / "n", "--json")
    assert any("does not act as the fine-tune" in warning for warning in done.json["warnings"])
    got = restore_flat(tmp_path / "n" / "params")
    trained = pair.end.keys() - pair.frozen - pair.kernels
    assert trained and all(same_bits(got[path], pair.start[path]) for path in trained)


def test_without_a_base_nothing_is_compared(tmp_path: Path) -> None:
    pair = openpi_pair(tmp_path)
    report = extracted(pair.tuned, None, tmp_path / "a", "--lora-alpha", ALPHAS)
    assert not report["frozen_checked"] and any("nobody compared" in note for note in report["notes"])
    want = merged(tmp_path / "m", pair.tuned, "--base", pair.base, "--lora-alpha", ALPHAS)
    assert_same_trees(merged(tmp_path / "n", pair.base, "--adapter", tmp_path / "a"), want)


@pytest.mark.parametrize("under_adapter", [True, False])
def test_the_wrong_base_is_refused(under_adapter: bool, tmp_path: Path) -> None:
    pair = openpi_pair(tmp_path)
    start = dict(pair.start)
    path = sorted(pair.kernels if under_adapter else pair.frozen)[0]
    start[path] = start[path].copy()
    start[path].flat[-1] *= 1.01
    other = save_step(tmp_path / "other" / "0", nest(start, suffix=()))
    done = run("extract", pair.tuned, "--base", other, "-o", tmp_path / "a", "--lora-alpha", ALPHAS)
    assert done.code == 4 and "not what the fine-tune started from" in done.error and "1 of" in done.error
    assert not (tmp_path / "a").exists()


def test_refusals_of_an_exact_extraction(tmp_path: Path) -> None:
    pair = openpi_pair(tmp_path)
    flags = ("extract", pair.tuned, "--base", pair.base, "-o", tmp_path / "a")
    assert "--lora-alpha" in run(*flags).error and run(*flags).code == 4
    known = (*flags, "--lora-alpha", ALPHAS)
    for more in (("--rank", 4), ("--energy", 0.9), ("--include", "nothing_like_it"), ("--report", tmp_path / "x.html")):
        done = run(*known, *more)
        assert done.code == 2 and str(more[0]) in done.error
    assert run(*known[:-4], tmp_path / "a.safetensors", "--lora-alpha", ALPHAS).code == 2
    swapped = run("extract", pair.base, "--base", pair.tuned, "-o", tmp_path / "a", "--rank", 2)
    assert swapped.code == 4 and "adapters of its own" in swapped.error
    (tmp_path / "a").mkdir()
    assert run(*known).code == 5
    assert run(*known, "--overwrite").code == 0
    assert run("extract", tmp_path / "gone", "-o", tmp_path / "b").code == 3
    assert run("extract", pair.tuned, "-o", pair.tuned / "b", "--lora-alpha", ALPHAS).code == 4


@pytest.mark.parametrize("part", ["lora_a", "bias"])
def test_what_is_not_finite_is_refused(part: str, tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    path = next(path for path in tree.leaves if path[-1] == part)
    tree.leaves[path] = tree.leaves[path].copy()
    tree.leaves[path].flat[3] = np.nan
    tuned = save_step(tmp_path / "run" / "7", nest(tree.leaves))
    done = run("extract", tuned, "-o", tmp_path / "a", "--lora-alpha", ALPHAS)
    assert done.code == 3 and part in done.error and not (tmp_path / "a").exists()


def test_an_adapter_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    leaves = {path: values * 0 if "lora_b" in str(path[-1]) else values for path, values in tree.leaves.items()}
    tuned = save_step(tmp_path / "run" / "7", nest(leaves))
    done = run("extract", tuned, "-o", tmp_path / "a", "--lora-alpha", ALPHAS)
    assert done.code == 4 and "every delta is zero" in done.error


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    pair = openpi_pair(tmp_path)
    report = conforming(run("extract", pair.tuned, "--base", pair.base, "--lora-alpha", ALPHAS, "--dry-run", "--json"))
    assert report["status"] == "planned" and len(report["sites"]) == len(pair.kernels)
    assert len(report["trained"]) == len(pair.end.keys() - pair.frozen - pair.kernels)


def nnx_pair(directory: Path) -> tuple[Path, Path]:
    """A LoRALinear of NNX, another layer whose bias was trained all the same, and the base of both."""
    rng = np.random.default_rng(3)
    base = {
        ("params", "one", "kernel"): rng.normal(0, 1, (6, 5)).astype(np.float32),
        ("params", "two", "bias"): rng.normal(0, 1, (5,)).astype(np.float32),
        ("params", "two", "kernel"): rng.normal(0, 1, (5, 4)).astype(np.float32),
    }
    tuned = {
        **base,
        ("params", "one", "kernel"): base["params", "one", "kernel"],
        ("params", "one", "lora", "lora_a"): rng.normal(0, 1, (6, 2)).astype(np.float32),
        ("params", "one", "lora", "lora_b"): rng.normal(0, 1, (2, 5)).astype(np.float32),
        ("params", "two", "bias"): base["params", "two", "bias"] + np.float32(1),
    }
    places = []
    for name, leaves in (("base", base), ("tuned", tuned)):
        places.append(save_step(directory / name / "1", nest(leaves, root=(), suffix=()), assets=False))
    return places[1], places[0]


def test_a_tree_that_does_not_tell_what_was_frozen(tmp_path: Path) -> None:
    tuned, base = nnx_pair(tmp_path)
    alone = run("extract", tuned, "-o", tmp_path / "a")
    assert alone.code == 2 and "--base" in alone.error
    report = extracted(tuned, base, tmp_path / "a")
    assert [leaf["path"] for leaf in report["trained"]] == ["params/two/bias"] and report["frozen"] == 2
    done = run("merge", base, "--adapter", tmp_path / "a", "-o", tmp_path / "n")
    assert done.code == 0, done.stderr
    got = restore_flat(tmp_path / "n" / "params")
    own = run("merge", tuned, "-o", tmp_path / "m")
    assert own.code == 0, own.stderr
    assert_same_trees(got, restore_flat(tmp_path / "m" / "params"))


# ---- two dense checkpoints


def low_rank(rng: np.random.Generator, rows: int, columns: int, rank: int, size: float = 0.3) -> np.ndarray:
    return (rng.normal(0, size, (rows, rank)) @ rng.normal(0, size, (rank, columns))).astype(np.float32)


def truncated(delta: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def llama_pair(
    directory: Path, rank: int = 4, **config: Any
) -> tuple[Path, Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    start = llama_tensors(rng)
    end = {
        name: values + low_rank(rng, *values.shape, rank) if "_proj" in name else values
        for name, values in start.items()
    }
    settings = {"architectures": ["LlamaForCausalLM"], **config}
    return (
        write_model(directory / "tuned", end, **settings),
        write_model(directory / "base", start, **settings),
        start,
        end,
    )


def test_the_best_approximation_of_a_rank(tmp_path: Path) -> None:
    tuned, base, start, end = llama_pair(tmp_path)
    report = extracted(tuned, base, tmp_path / "a", "--rank", 2)
    assert (report["kind"], report["adapter_format"], report["rank"]) == ("truncated", "peft", 2)
    done = run("merge", base, "--adapter", tmp_path / "a", "-o", tmp_path / "m")
    assert done.code == 0, done.stderr
    got, said = read_model(tmp_path / "m"), {site["target"]: site for site in report["sites"]}
    assert said.keys() == {name for name in start if "_proj" in name}
    for name, values in start.items():
        if name not in said:
            assert same_bits(got[name], values)
            continue
        delta = end[name].astype(np.float64) - values
        best = truncated(delta, 2)
        assert np.allclose(got[name] - values.astype(np.float64), best, atol=3e-6 * np.abs(delta).max())
        error = np.linalg.norm(delta - best) / np.linalg.norm(delta)
        assert said[name]["relative_error"] == pytest.approx(error, rel=1e-3)
        assert said[name]["energy_kept"] == pytest.approx(1 - error**2, abs=1e-5)
        assert said[name]["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)


def test_an_energy_chooses_the_rank_of_each_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    start = {f"model.layers.{n}.mlp.up_proj.weight": rng.normal(0, 1, (12, 9)).astype(np.float32) for n in (1, 11)}
    ranks = {"model.layers.1.mlp.up_proj.weight": 1, "model.layers.11.mlp.up_proj.weight": 5}
    end = {name: values + low_rank(rng, 12, 9, ranks[name]) for name, values in start.items()}
    tuned, base = write_model(tmp_path / "t", end), write_model(tmp_path / "b", start)
    report = extracted(tuned, base, tmp_path / "a", "--energy", 0.999999)
    assert {site["target"]: site["rank"] for site in report["sites"]} == ranks
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"model\.layers\.1\.mlp\.up_proj": 1}
    done = run("merge", base, "--adapter", tmp_path / "a", "-o", tmp_path / "m")
    assert done.code == 0, done.stderr
    for name, values in read_model(tmp_path / "m").items():
        assert np.allclose(values, end[name], atol=2e-5)


def test_what_is_no_weight_of_a_linear_layer_is_brought_whole(tmp_path: Path) -> None:
    tuned, base, start, end = llama_pair(tmp_path, rank=2)
    moved = {"model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"}
    end |= {name: end[name] + np.float32(0.5) for name in moved}
    both, alone, third = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    end[f"{alone}.weight"] = start[f"{alone}.weight"]
    for tensors, place in ((start, base), (end, tuned)):
        extra = [f"{module}.bias" for module in (both, alone, third)] + [f"{third}.scale"]
        tensors |= {name: np.full(8, 1.0 if place == base else 2.0, np.float32) for name in extra}
        save_file(tensors, place / "model.safetensors")
    report = extracted(tuned, base, tmp_path / "a", "--rank", 2)
    whole = moved | {f"{alone}.weight", f"{alone}.bias"} | {f"{third}.{leaf}" for leaf in ("weight", "bias", "scale")}
    assert {leaf["path"] for leaf in report["trained"]} == whole | {f"{both}.bias"}
    sites = {site["target"] for site in report["sites"]}
    assert f"{both}.weight" in sites and not sites & whole
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["bias"] == "lora_only"
    assert set(config["modules_to_save"]) == {name.rpartition(".")[0] for name in whole}
    done = run("merge", base, "--adapter", tmp_path / "a", "-o", tmp_path / "m")
    assert done.code == 0, done.stderr
    got = read_model(tmp_path / "m")
    assert got.keys() == end.keys()
    assert all(np.allclose(got[name], end[name], atol=3e-6) for name in end)
    assert all(same_bits(got[leaf["path"]], end[leaf["path"]]) for leaf in report["trained"])
    report = extracted(tuned, base, tmp_path / "b", "--rank", 2, "--without-trained")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert report["warnings"] and not config["modules_to_save"] and config["bias"] == "none"
    assert not [key for key in load_file(tmp_path / "b" / "adapter_model.safetensors") if "lora_" not in key]


def test_ranks_of_modules_that_are_called_as_others_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    ranks = {"a": 1, "b.a": 3, "c.b.a": 2, "d": 1, "c.d": 1}
    start = {f"{module}.weight": rng.normal(0, 1, (12, 9)).astype(np.float32) for module in ranks}
    end = {f"{module}.weight": start[f"{module}.weight"] + low_rank(rng, 12, 9, rank) for module, rank in ranks.items()}
    tuned, base = write_model(tmp_path / "t", end), write_model(tmp_path / "b", start)
    report = extracted(tuned, base, tmp_path / "a", "--energy", 0.999999)
    assert {site["target"].removesuffix(".weight"): site["rank"] for site in report["sites"]} == ranks
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for module, rank in ranks.items():
        # As peft looks a module's rank up, in peft/utils/other.py: get_pattern_key.
        fits = [value for key, value in config["rank_pattern"].items() if re.match(rf"(.*\.)?({key})$", module)]
        assert (fits or [config["r"]])[0] == rank, module
    done = run("merge", base, "--adapter", tmp_path / "a", "-o", tmp_path / "m")
    assert done.code == 0, done.stderr
    for name, values in read_model(tmp_path / "m").items():
        assert np.allclose(values, end[name], atol=2e-5)


@pytest.mark.parametrize("rank", [2, 8])
def test_a_fine_tune_that_is_wider_than_its_base(rank: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    start = llama_tensors(rng, dtype=BFLOAT16)
    end = {name: values.astype(np.float32) for name, values in start.items()}
    end |= {name: values + low_rank(rng, *values.shape, 8, 0.02) for name, values in end.items() if "_proj" in name}
    end["model.norm.weight"] = end["model.norm.weight"] * np.float32(1.0003)
    tuned, base = write_model(tmp_path / "t", end), write_model(tmp_path / "b", start)
    report = extracted(tuned, base, tmp_path / "a", "--rank", rank)
    kernels = [site["target"] for site in report["sites"]]
    (warning,) = report["warnings"]
    assert f"{len(kernels) + 1} leaves" in warning and "--dtype float32" in warning
    assert "float32 in the fine-tune and bfloat16 in the base" in warning

    def errors(output: Path, *flags: object) -> dict[str, float]:
        done = run("merge", base, "--adapter", tmp_path / "a", "-o", output, *flags)
        assert done.code == 0, done.stderr
        got = {name: values.astype(np.float64) for name, values in read_model(output).items()}
        assert np.array_equal(got["model.norm.weight"], end["model.norm.weight"]) == bool(flags)
        deltas = {name: end[name].astype(np.float64) - start[name].astype(np.float64) for name in kernels}
        return {name: float(np.linalg.norm(got[name] - end[name]) / np.linalg.norm(deltas[name])) for name in kernels}

    wide, narrow = errors(tmp_path / "m", "--dtype", "float32"), errors(tmp_path / "n")
    for site in report["sites"]:
        said = site["relative_error"]
        # What float32 itself rounds, of weights some hundred times the deltas, is not the factors' own.
        assert wide[site["target"]] == pytest.approx(said, rel=1e-3, abs=3e-5)
        assert narrow[site["target"]] > said + 1e-2 or rank == 2
    assert max(narrow.values()) > 0.03


def test_a_fine_tune_that_is_no_wider_needs_no_warning(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    start = llama_tensors(rng)
    end = {
        name: (values + low_rank(rng, *values.shape, 2) if "_proj" in name else values)
        for name, values in start.items()
    }
    tuned = write_model(tmp_path / "t", {name: values.astype(BFLOAT16) for name, values in end.items()})
    for base in (start, {name: values.astype(BFLOAT16) for name, values in start.items()}):
        place = write_model(tmp_path / str(base["model.norm.weight"].dtype), base)
        assert not extracted(tuned, place, tmp_path / f"a{place.name}", "--rank", 8)["warnings"]


def test_a_wider_tree_comes_back_in_its_own_dtypes(tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    path = ("PaliGemma", "img", "head", "kernel")
    start = {
        path: rng.normal(0, 1, (9, 6)).astype(BFLOAT16),
        (*path[:-1], "bias"): rng.normal(0, 1, 6).astype(BFLOAT16),
    }
    end = {name: values.astype(np.float32) for name, values in start.items()}
    end[path] = end[path] + low_rank(rng, 9, 6, 2, 0.02)
    tuned = save_step(tmp_path / "run" / "7", nest(end))
    base = save_step(tmp_path / "base" / "0", nest(start, suffix=()))
    report = extracted(tuned, base, tmp_path / "a", "--rank", 2)
    assert [site["rank"] for site in report["sites"]] == [2] and not report["warnings"]
    got = merged(tmp_path / "n", base, "--adapter", tmp_path / "a")
    assert {name: values.dtype for name, values in got.items()} == dict.fromkeys(end, np.float32)
    assert np.linalg.norm(got[path] - end[path]) < 1e-4 * np.linalg.norm(end[path] - start[path].astype(np.float32))
    judged = run("verify", tmp_path / "n", "--against", base, "--adapter", tmp_path / "a")
    assert judged.code == 0, judged.stdout


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_differences_beyond_float32_are_refused_by_name(dtype: Any, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    sides = [write_model(tmp_path / f"{n}", {name: np.full((8, 6), n * 3e38, dtype)}) for n in (1, -1)]
    done = run("extract", sides[0], "--base", sides[1], "--rank", 2, "-o", tmp_path / "a")
    assert done.code == 4 and f"{sides[0]} :: {name}" in done.error, done.error
    assert "48 entries" in done.error


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["tuned", "base"])
def test_values_that_are_not_finite_are_refused_by_name(side: str, value: float, tmp_path: Path) -> None:
    tuned, base, start, end = llama_pair(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors, place = (end, tuned) if side == "tuned" else (start, base)
    tensors[name] = tensors[name].copy()
    tensors[name][3, 2] = value
    save_file(tensors, place / "model.safetensors")
    done = run("extract", tuned, "--base", base, "--rank", 2, "-o", tmp_path / "a")
    assert done.code == 3 and f"{place} :: {name}" in done.error, done.error
    assert not (tmp_path / "a").exists()


def test_refusals_of_two_dense_checkpoints(tmp_path: Path) -> None:
    tuned, base, start, end = llama_pair(tmp_path)
    out = ("-o", tmp_path / "a")
    for flags, words in (
        (("--base", base), "--rank"),
        (("--base", base, "--rank", 2, "--energy", 0.5), "--energy"),
        (("--base", base, "--rank", 0), "--rank"),
        (("--base", base, "--energy", 1.5), "--energy"),
        (("--base", base, "--rank", 2, "--lora-alpha", 3), "--lora-alpha"),
        (("--base", base, "--rank", 2, "--exclude", "nothing_like_it"), "--exclude"),
        (("--rank", 2), "--base"),
    ):
        done = run("extract", tuned, *flags, *out)
        assert done.code == 2 and words in done.error, done.stderr
    still = run("extract", base, "--base", shutil.copytree(base, tmp_path / "copy"), "--rank", 2, *out)
    assert still.code == 4 and "every leaf is the base's" in still.error
    norm = start | {"model.norm.weight": end["model.norm.weight"] + np.float32(1)}
    only = run("extract", write_model(tmp_path / "n", norm), "--base", base, "--rank", 2, *out)
    assert only.code == 4 and "model.norm" in only.error
    less = write_model(tmp_path / "l", {name: values for name, values in end.items() if name != "lm_head.weight"})
    odd = run("extract", less, "--base", base, "--rank", 2, *out)
    assert odd.code == 4 and "lm_head.weight (only in the base)" in odd.error
    expert = {"model.layers.0.mlp.experts.3.up_proj.weight": start["lm_head.weight"]}
    sides = [write_model(tmp_path / f"e{n}", {name: v + np.float32(n) for name, v in expert.items()}) for n in (0, 1)]
    stacked = run("extract", sides[1], "--base", sides[0], "--rank", 2, *out)
    assert stacked.code == 4 and "expert" in stacked.error
    bad = end | {"model.layers.0.mlp.up_proj.weight": np.full((12, 8), np.inf, np.float32)}
    infinite = run("extract", write_model(tmp_path / "i", bad), "--base", base, "--rank", 2, *out)
    assert infinite.code == 3 and "up_proj" in infinite.error
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob(".a*"))


def test_dense_trees_of_stacked_layers_and_heads(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    rng = np.random.default_rng(5)
    start, end, rank_of = {}, {}, {}
    for path, values in tree.expected.items():
        start[path] = values.astype(np.float32)
        end[path] = start[path]
        name = "/".join(path)
        rows = {"q_einsum": 1, "kv_einsum": 1, "attn_vec_einsum": 2, "gating_einsum": 1, "linear": 1}
        kind = next((kind for kind in rows if f"{kind}/" in name or f"{kind}_1/" in name or path[-1] == kind), None)
        if kind is not None:
            lead = len(start[path].shape) - rows[kind] - 1
            inputs, outputs = int(np.prod(start[path].shape[lead:-1])), start[path].shape[-1]
            deltas = [low_rank(rng, inputs, outputs, 2) for _ in range(int(np.prod(start[path].shape[:lead])))]
            end[path] = start[path] + np.stack(deltas).reshape(start[path].shape)
            rank_of[name] = 2
        elif path[-1] == "kernel" and path[-2] == "value":
            layers = [low_rank(rng, 8, 8, 2).reshape(8, 2, 4) for _ in range(2)]
            end[path] = start[path] + np.stack(layers)
            rank_of[name] = 2
        elif path[-1] in ("scale", "bias"):
            end[path] = start[path] + np.float32(1)
        elif path[-1] == "kernel":
            end[path] = start[path] + low_rank(rng, *start[path].shape, 2)
            rank_of[name] = 2
    tuned = save_step(tmp_path / "run" / "7", nest(end))
    base = save_step(tmp_path / "base" / "0", nest(start, suffix=()))
    report = extracted(tuned, base, tmp_path / "a", "--rank", 2)
    found = {site["target"].removeprefix("params/").removesuffix("/value"): site for site in report["sites"]}
    assert found.keys() == rank_of.keys() and all(site["rank"] == 2 for site in found.values())
    assert all(site["relative_error"] < 3e-6 for site in found.values())
    got = merged(tmp_path / "n", base, "--adapter", tmp_path / "a")
    for path, values in end.items():
        if "/".join(path) in rank_of:
            assert np.allclose(got[path], values, atol=5e-6), path
        else:
            assert same_bits(got[path], values), path
    judged = run("verify", tmp_path / "n", "--against", base, "--adapter", tmp_path / "a")
    assert judged.code == 0, judged.stdout
    smaller = extracted(tuned, base, tmp_path / "b", "--energy", 0.9, "--include", "**/q_einsum/**")
    (site,) = smaller["sites"]
    assert site["rank"] <= 2 and site["energy_kept"] >= 0.9 and smaller["warnings"]


def test_layers_that_did_not_move_get_zeros(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    path = ("PaliGemma", "llm", "layers", "mlp", "linear")
    start = {path: rng.normal(0, 1, (3, 10, 6)).astype(np.float32)}
    end = {path: start[path].copy()}
    end[path][1] += low_rank(rng, 10, 6, 2)
    tuned = save_step(tmp_path / "run" / "7", nest(end))
    base = save_step(tmp_path / "base" / "0", nest({path: start[path].astype(ml_dtypes.bfloat16).astype(np.float32)}))
    save_step(tmp_path / "b32" / "0", nest(start))
    report = extracted(tuned, tmp_path / "b32" / "0", tmp_path / "a", "--energy", 0.9999)
    assert [site["rank"] for site in report["sites"]] == [2]
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for key, values in stored.items():
        assert not values[[0, 2]].any() and values[1].any(), key
    # Against a base of other values nothing is of low rank: that is said, and not hidden.
    worse = extracted(tuned, base, tmp_path / "c", "--rank", 1)
    assert worse["sites"][0]["relative_error"] > 0.01


# ---- peft itself


@pytest.mark.parametrize("kind", ["llama", "gpt2", "tied"])
def test_peft_computes_what_the_fine_tune_computes(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    import copy

    import torch

    from tests import peft_cases as cases

    model = cases.small_model(
        "llama" if kind == "tied" else kind, **({"tie_word_embeddings": True} if kind == "tied" else {})
    )
    base = cases.save_base(model, tmp_path / "base")
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            linear = p.dim() == 2 and not any(word in name for word in ("embed", "wte", "wpe", "lm_head"))
            if linear and "layers.1.mlp.down" not in name:
                rank = 2 if "0.mlp" in name else 3
                p.add_(
                    0.3
                    * torch.randn(p.shape[0], rank, generator=generator)
                    @ torch.randn(rank, p.shape[1], generator=generator)
                )
            elif any(word in name for word in ("norm.weight", "ln_1", "_proj.bias", "c_attn.bias", "c_fc.bias")) or (
                kind == "tied" and "embed" in name
            ):
                p.add_(0.1)
    tuned = cases.save_base(moved, tmp_path / "tuned")
    report = extracted(tuned, base, tmp_path / "a", "--energy", 0.9999999)
    assert {site["rank"] for site in report["sites"]} == {2, 3} and report["trained"]
    assert len(report["sites"]) == (8 if kind == "gpt2" else 13)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["bias"] == "lora_only" and not any("q_proj" in name for name in config["modules_to_save"])
    adapted = cases.with_adapter(base, tmp_path / "a")
    want = cases.logits(cases.reloaded(tuned))
    cases.assert_near(cases.logits(adapted), want, "logits", 2e-5)
    assert (cases.logits(model) - want).abs().max() > 0.1 * want.abs().max()
    result = cases.merge(base, tmp_path / "a", out=tmp_path / "m")
    for name, values in cases.tensors(tuned).items():
        cases.assert_near(result[name], values, name, 3e-6)


def test_peft_finds_modules_that_are_called_as_others_end(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import copy

    import torch

    def block(**modules: Any) -> Any:
        made = torch.nn.Module()
        for name, module in modules.items():
            setattr(made, name, module)
        return made

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(9, 12), block(a=torch.nn.Linear(9, 12))
            self.c = block(b=block(a=torch.nn.Linear(9, 12)))

        def forward(self, x: Any) -> Any:
            return self.a(x) - self.b.a(x).sin() + self.c.b.a(x).cos()

    torch.manual_seed(3)
    base, ranks = Net(), {"a": 1, "b.a": 3, "c.b.a": 2}
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, rank in ranks.items():
            module = tuned.get_submodule(name)
            module.weight.add_(torch.randn(12, rank) @ torch.randn(rank, 9))
            module.bias.add_(1 if name != "a" else 0)
    sides = [
        write_model(tmp_path / name, {key: values.numpy() for key, values in net.state_dict().items()})
        for name, net in (("t", tuned), ("b", base))
    ]
    report = extracted(sides[0], sides[1], tmp_path / "a", "--energy", 0.999999)
    assert {site["target"].removesuffix(".weight"): site["rank"] for site in report["sites"]} == ranks
    assert {leaf["path"] for leaf in report["trained"]} == {"b.a.bias", "c.b.a.bias"}
    x = torch.randn(5, 9)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    assert torch.allclose(adapted(x), tuned(x), atol=2e-5) and not torch.allclose(base(x), tuned(x), atol=0.1)


def test_bfloat16_of_both_sides(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    start = llama_tensors(rng, dtype=BFLOAT16)
    end = {
        name: (values.astype(np.float32) + low_rank(rng, *values.shape, 3)).astype(BFLOAT16)
        if "_proj" in name
        else values
        for name, values in start.items()
    }
    tuned, base = write_model(tmp_path / "t", end), write_model(tmp_path / "b", start)
    report = extracted(tuned, base, tmp_path / "a", "--rank", 8)
    assert all(site["relative_error"] < 1e-5 for site in report["sites"])
    done = run("merge", base, "--adapter", tmp_path / "a", "-o", tmp_path / "m")
    assert done.code == 0, done.stderr
    got = read_model(tmp_path / "m")
    assert np.mean([np.mean(got[name] == end[name]) for name in end]) > 0.999
