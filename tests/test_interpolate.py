"""Interpolation between a base and a fine-tune, beside float64 oracles: every kind of fine-tune, every rule of an alpha."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import restore_flat, save_step
from tests.command import run
from tests.interpolation import ALPHAS, Pair, llama_tensors, openpi_pair, read_model, same_bits, write_model
from tests.trees import ACTION, BFLOAT16, PALIGEMMA, build, nest

IMAGE = ("PaliGemma", "img")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return openpi_pair(tmp_path_factory.mktemp("pair"))


def merged(pair: Pair, directory: Path, *flags: object) -> dict[tuple[object, ...], np.ndarray]:
    """What `merge TUNED --base BASE` makes."""
    done = run("merge", pair.tuned, "--base", pair.base, "-o", directory / "m", "--lora-alpha", ALPHAS, *flags)
    assert done.code == 0, done.stderr
    return restore_flat(directory / "m" / "params")


@pytest.mark.parametrize("suffix", [("value",), ()])
@pytest.mark.parametrize("alpha", [0.25, 0.7])
def test_openpi_beside_its_base(suffix: tuple[str, ...], alpha: float, tmp_path: Path) -> None:
    pair = openpi_pair(tmp_path, suffix=suffix, seed=3)
    done = pair.run(tmp_path / "out", "--alpha", alpha)
    assert done.code == 0, done.stderr
    found = restore_flat(tmp_path / "out" / "params")
    assert found.keys() == pair.end.keys()
    for path, ideal in pair.between(alpha).items():
        assert found[path].dtype == np.float32
        assert np.abs(found[path] - ideal).max() <= 2e-6 * np.abs(ideal).max(), path
        moved = np.abs(pair.end[path] - pair.start[path]).max()
        assert np.abs(found[path] - pair.end[path]).max() > 0.1 * moved, "the test would pass for any alpha"
    for path in pair.frozen:
        assert same_bits(found[path], pair.end[path])


@pytest.mark.parametrize("dtype", ["auto", "keep", "float32", "float16"])
def test_ends_are_selected(dtype: str, pair: Pair, tmp_path: Path) -> None:
    assert pair.run(tmp_path / "s", "--alpha", "0:1:0.5", "--dtype", dtype).code == 0
    end = merged(pair, tmp_path, "--dtype", dtype)
    at_0, at_1 = (restore_flat(tmp_path / "s" / f"alpha-{alpha}" / "params") for alpha in (0, 1))
    for path, values in end.items():
        assert same_bits(at_1[path], values), path
        if path in pair.frozen:
            assert same_bits(at_0[path], values), path
        else:
            assert same_bits(at_0[path], pair.start[path].astype(values.dtype)), path


def test_a_sweep_is_its_single_runs(pair: Pair, tmp_path: Path) -> None:
    rules = ("--alpha-for", "PaliGemma/img/**=0.9", "--alpha-schedule", "layer=0.2:0.8", "--dtype", "keep")
    swept = pair.run(tmp_path / "s", "--alpha", "0:1:0.25", "--json", *rules)
    assert [point["status"] for point in swept.json["points"]] == ["written"] * 5
    for name in ("0", "0.25", "0.5", "0.75", "1"):
        assert pair.run(tmp_path / name, "--alpha", name, "--jobs", 1, *rules).code == 0
        one, other = (restore_flat(path / "params") for path in (tmp_path / "s" / f"alpha-{name}", tmp_path / name))
        assert all(same_bits(one[path], other[path]) for path in one.keys() | other.keys())


def test_alpha_for_and_schedule(pair: Pair, tmp_path: Path) -> None:
    done = pair.run(
        tmp_path / "out",
        *("--alpha", 0.6, "--alpha-schedule", "layer=0.2:0.9"),
        *("--alpha-for", "PaliGemma/img/**=0", "--alpha-for", "action_*/**=1", "--alpha-for", "**/mlp/linear=0.5"),
    )
    assert done.code == 0, done.stderr
    found = restore_flat(tmp_path / "out" / "params")
    for path in pair.end.keys() - pair.frozen:
        start, end = pair.start[path].astype(np.float64), pair.end[path].astype(np.float64)
        if path[:2] == IMAGE:
            alpha = np.zeros(1)
        elif str(path[0]).startswith("action_"):
            alpha = np.ones(1)
        elif path[-2:] == ("mlp", "linear"):
            alpha = np.full(1, 0.5)
        elif path[:3] == ("PaliGemma", "llm", "layers"):
            alpha = np.array([0.2, 0.55, 0.9]).reshape(-1, *[1] * (end.ndim - 1))
        else:
            alpha = np.full(1, 0.6)
        ideal = start + alpha * (end - start)
        assert np.abs(found[path] - ideal).max() <= 2e-6 * np.abs(ideal).max(), path


def test_reports_say_what_became_of_what(pair: Pair, tmp_path: Path) -> None:
    report = pair.run(tmp_path / "out", "--alpha", 0.5, "--dtype", "keep", "--json").json
    assert report["command"] == "interpolate" and report["mixing"]["alpha"] == 0.5
    parts = {part["part"]: part for part in report["parts"]}
    assert {"vision tower", "language model", "action expert", "projections"} <= parts.keys()
    for part in parts.values():
        assert part["wanted"] > 0 and 0 < part["gain_stored"] < 1.1
    image = [path for path in pair.end if path[:2] == IMAGE]
    moved = sum(np.sum(np.square(0.5 * (pair.end[p].astype(np.float64) - pair.start[p]))) for p in image)
    assert parts["vision tower"]["wanted"] == pytest.approx(moved**0.5, rel=1e-5)
    assert parts["vision tower"]["distance"] == pytest.approx(moved**0.5, rel=1e-4)
    assert parts["vision tower"]["leaves"] == len(image)
    assert json.loads((tmp_path / "out" / "lora_merge.json").read_text())["mixing"] == report["mixing"]


def test_wrong_base_is_refused(pair: Pair, tmp_path: Path) -> None:
    other = openpi_pair(tmp_path / "other", seed=9)
    done = run("interpolate", other.base, pair.tuned, "-o", tmp_path / "out", "--alpha", 0.5, "--lora-alpha", ALPHAS)
    assert done.code == 4 and "the base is not what the fine-tune started from" in done.error
    assert not (tmp_path / "out").exists()


def test_inputs_the_wrong_way_round(pair: Pair, tmp_path: Path) -> None:
    done = run("interpolate", pair.tuned, pair.base, "-o", tmp_path / "out", "--alpha", 0.5, "--lora-alpha", ALPHAS)
    assert done.code == 4 and "the base has adapters of its own" in done.error


def test_a_fine_tune_alone(pair: Pair, tmp_path: Path) -> None:
    flags = ("-o", tmp_path / "out", "--alpha", 0.5, "--lora-alpha", ALPHAS)
    refused = run("interpolate", pair.tuned, *flags)
    assert refused.code == 4 and "--deltas-only" in refused.error
    report = run("interpolate", pair.tuned, *flags, "--deltas-only", "--json").json
    trained = [path for path in pair.end if path not in pair.frozen | pair.kernels]
    assert {name.removeprefix("params/").removesuffix("/value") for name in report["not_interpolated"]} == {
        "/".join(path) for path in trained
    }
    found = restore_flat(tmp_path / "out" / "params")
    tree = build(PALIGEMMA, ACTION)
    for path in tree.changed:
        kernel = tree.leaves[path].astype(np.float64)
        ideal = kernel + 0.5 * (tree.expected[path] - kernel)
        assert np.abs(found[path] - ideal).max() <= 2e-6 * np.abs(ideal).max()
    assert all(same_bits(found[path], pair.end[path]) for path in trained)


def test_a_dense_checkpoint_without_a_base(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", llama_tensors(np.random.default_rng(0)))
    done = run("interpolate", model, "-o", tmp_path / "out", "--alpha", 0.5)
    assert done.code == 4 and "nothing to interpolate with" in done.error


@pytest.fixture
def dense(tmp_path: Path) -> tuple[Path, Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A bfloat16 pair with a leaf that did not move, integers, and an Inf that both have."""
    rng = np.random.default_rng(5)
    start = llama_tensors(rng, dtype=BFLOAT16)
    end = {
        name: (values.astype(np.float32) + rng.normal(0, 0.1, values.shape)).astype(BFLOAT16)
        for name, values in start.items()
    }
    end["model.norm.weight"] = start["model.norm.weight"]
    for side in (start, end):
        side["model.layers.0.mlp.up_proj.weight"][0, 0] = np.inf
        side["model.rotary.position_ids"] = np.arange(5)
    start["model.layers.1.mlp.up_proj.weight"][0, 0] = -0.0
    end["model.layers.1.mlp.up_proj.weight"][0, 1] = -0.0
    return write_model(tmp_path / "base", start), write_model(tmp_path / "tuned", end), start, end


def test_dense_pairs(dense: tuple[Path, Path, dict[str, np.ndarray], dict[str, np.ndarray]], tmp_path: Path) -> None:
    base, tuned, start, end = dense
    assert run("interpolate", base, tuned, "-o", tmp_path / "s", "--alpha", "0:1:0.3", "--alpha", 1).code == 0
    assert sorted(path.name for path in (tmp_path / "s").iterdir() if path.is_dir()) == [
        f"alpha-{name}" for name in ("0", "0.3", "0.6", "0.9", "1")
    ]
    for name in ("0", "0.3", "0.6", "0.9", "1"):
        found, alpha = read_model(tmp_path / "s" / f"alpha-{name}"), float(name)
        assert found.keys() == end.keys()
        for key, values in found.items():
            one, other = start[key], end[key]
            if alpha in (0, 1):
                assert same_bits(values, other if alpha else one), key
                continue
            still = one.astype(np.float64) == other.astype(np.float64)
            assert values.dtype == other.dtype
            assert np.array_equal(values[still], other[still])
            ideal = (1 - alpha) * one.astype(np.float64)[~still] + alpha * other.astype(np.float64)[~still]
            assert np.array_equal(values[~still], ideal.astype(np.float32).astype(BFLOAT16)) or np.all(
                np.abs(values[~still].astype(np.float64) - ideal) <= 2.0**-8 * np.abs(ideal)
            )


def test_dtype_is_for_all_that_is_interpolated_where_there_are_no_adapters(
    dense: tuple[Path, Path, dict[str, np.ndarray], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    base, tuned, start, end = dense
    assert run("interpolate", base, tuned, "-o", tmp_path / "o", "--alpha", 0.5, "--dtype", "float32").code == 0
    found = read_model(tmp_path / "o")
    key = "model.layers.2.mlp.up_proj.weight"
    ideal = (start[key].astype(np.float64) + end[key].astype(np.float64)) / 2
    assert found[key].dtype == np.float32 and np.allclose(found[key], ideal, rtol=1e-6)
    assert found["model.rotary.position_ids"].dtype == np.int64


def test_what_only_one_side_has(
    dense: tuple[Path, Path, dict[str, np.ndarray], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    _, _, start, end = dense
    own, common = dict(end), dict(start)
    own["value_head.weight"] = np.ones((2, 2), np.float32)
    common["old_head.weight"] = np.full((2, 2), 2, np.float32)
    common["lm_head.weight"] = np.zeros((21, 8), BFLOAT16)
    base, tuned = write_model(tmp_path / "b", common), write_model(tmp_path / "t", own)
    flags = ("interpolate", base, tuned, "--alpha", 0.5, "-o")
    refused = run(*flags, tmp_path / "o")
    assert refused.code == 4
    assert all(name in refused.error for name in ("value_head.weight", "old_head.weight", "lm_head.weight"))
    assert run(*flags, tmp_path / "of_tuned", "--only-common", "tuned").code == 0
    assert run(*flags, tmp_path / "of_base", "--only-common", "base").code == 0
    of_tuned, of_base = read_model(tmp_path / "of_tuned"), read_model(tmp_path / "of_base")
    assert of_tuned.keys() == own.keys() and of_base.keys() == common.keys()
    assert same_bits(of_tuned["value_head.weight"], own["value_head.weight"])
    assert same_bits(of_tuned["lm_head.weight"], own["lm_head.weight"])
    assert same_bits(of_base["old_head.weight"], common["old_head.weight"])
    assert same_bits(of_base["lm_head.weight"], common["lm_head.weight"])
    key = "model.layers.2.mlp.up_proj.weight"
    assert same_bits(of_tuned[key], of_base[key])


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_one_side_decides_about_a_kernel_with_an_adapter(side: str, pair: Pair, tmp_path: Path) -> None:
    start = dict(pair.start)
    gone, odd = ("PaliGemma", "llm", "layers", "mlp", "linear"), ("PaliGemma", "llm", "layers", "mlp_1", "linear")
    del start[gone]
    start[odd] = np.ones((3, 2, 2), np.float32)
    base = save_step(tmp_path / "base" / "0", nest(start, suffix=()))
    flags = ("--alpha", 0.5, "--lora-alpha", ALPHAS, "-o", tmp_path / "out")
    assert run("interpolate", base, pair.tuned, *flags).code == 4
    done = run("interpolate", base, pair.tuned, *flags, "--only-common", side)
    assert done.code == 0, done.stderr
    found = restore_flat(tmp_path / "out" / "params")
    tree = build(PALIGEMMA, ACTION)
    if side == "base":
        assert gone not in found and same_bits(found[odd], start[odd])
    else:
        for path in (gone, odd):
            assert np.allclose(found[path], tree.expected[path], rtol=1e-5, atol=1e-6)
    assert not any("lora" in part for path in found for part in path)


def test_an_unmoved_leaf_stays_in_a_wider_dtype(tmp_path: Path) -> None:
    """Where the fine-tune is the base rounded to bfloat16, it did not move, and stays itself at every alpha."""
    rng = np.random.default_rng(1)
    start = llama_tensors(rng)
    end = {name: values.astype(BFLOAT16) for name, values in start.items()}
    end["lm_head.weight"] = (start["lm_head.weight"] + 1).astype(BFLOAT16)
    base, tuned = write_model(tmp_path / "b", start), write_model(tmp_path / "t", end)
    assert run("interpolate", base, tuned, "-o", tmp_path / "s", "--alpha", "0:1:0.5", "--dtype", "float32").code == 0
    for name in ("0", "0.5", "1"):
        found = read_model(tmp_path / "s" / f"alpha-{name}")
        for key in end.keys() - {"lm_head.weight"}:
            assert same_bits(found[key], end[key].astype(np.float32)), (name, key)
    assert same_bits(read_model(tmp_path / "s" / "alpha-0")["lm_head.weight"], start["lm_head.weight"])


def test_one_that_fails_leaves_the_others(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    start = llama_tensors(rng, dtype=np.float16)
    end = {name: values.copy() for name, values in start.items()}
    start["lm_head.weight"][0, 0], end["lm_head.weight"][0, 0] = 0, 40000
    base, tuned = write_model(tmp_path / "b", start), write_model(tmp_path / "t", end)
    flags = ("interpolate", base, tuned, "-o", tmp_path / "s", "--alpha", "0:2:0.5", "--extrapolate")
    done = run(*flags, "--json")
    assert done.code == 7
    points = {point["alpha"]: point for point in done.json["points"]}
    assert [points[alpha]["status"] for alpha in (0, 0.5, 1, 1.5, 2)] == ["written"] * 3 + ["written", "failed"]
    assert "overflows float16" in points[2]["error"]
    assert not (tmp_path / "s" / "alpha-2").exists()
    before = (tmp_path / "s" / "alpha-0.5" / "model.safetensors").stat().st_mtime_ns
    assert run(*flags).code == 5, "what is there is not replaced"
    resumed = run(*flags, "--resume", "--json")
    assert resumed.code == 7
    assert [point["status"] for point in resumed.json["points"]] == ["kept"] * 4 + ["failed"]
    assert (tmp_path / "s" / "alpha-0.5" / "model.safetensors").stat().st_mtime_ns == before


def test_resume_keeps_nothing_of_another_request(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = write_model(tmp_path / "b", llama_tensors(rng))
    tuned = write_model(tmp_path / "t", llama_tensors(rng))
    flags = ("interpolate", base, tuned, "-o", tmp_path / "s", "--alpha", "0:1:0.5", "--resume")
    assert run(*flags).code == 0
    assert run(*flags).code == 0
    refused = run(*flags, "--alpha-for", "lm_head*=1")
    assert refused.code == 5 and "not what this run would make" in refused.error


def test_infinity_on_one_side(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    start, end = llama_tensors(rng), llama_tensors(rng)
    end["lm_head.weight"][0, 0] = np.inf
    base, tuned = write_model(tmp_path / "b", start), write_model(tmp_path / "t", end)
    done = run("interpolate", base, tuned, "-o", tmp_path / "o", "--alpha", 0.5)
    assert done.code == 3 and "lm_head.weight" in done.error and str(tuned) in done.error
    assert run("interpolate", base, tuned, "-o", tmp_path / "o", "--alpha", 0.5, "--alpha-for", "lm_head*=1").code == 0
    assert read_model(tmp_path / "o")["lm_head.weight"][0, 0] == np.inf


def test_integers_that_differ_are_one_sides(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    start, end = llama_tensors(rng), llama_tensors(rng)
    start["model.ids"], end["model.ids"] = np.arange(3), np.arange(3) + 1
    base, tuned = write_model(tmp_path / "b", start), write_model(tmp_path / "t", end)
    done = run("interpolate", base, tuned, "-o", tmp_path / "o", "--alpha", 0.5)
    assert done.code == 4 and "model.ids" in done.error
    assert run("interpolate", base, tuned, "-o", tmp_path / "o", "--alpha", 0.5, "--alpha-for", "model.ids=0").code == 0
    assert np.array_equal(read_model(tmp_path / "o")["model.ids"], np.arange(3))


def test_a_glob_that_matches_nothing(pair: Pair, tmp_path: Path) -> None:
    done = pair.run(tmp_path / "out", "--alpha", 0.5, "--alpha-for", "vision/**=0")
    assert done.code == 2 and "vision/**" in done.error


def test_a_schedule_by_the_numbers_in_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    start, end = llama_tensors(rng), llama_tensors(rng)
    base, tuned = write_model(tmp_path / "b", start), write_model(tmp_path / "t", end)
    flags = ("--alpha", 0.1, "--alpha-schedule", "layer=0.2:0.9")
    assert run("interpolate", base, tuned, "-o", tmp_path / "o", *flags).code == 0
    found = read_model(tmp_path / "o")
    for key, values in found.items():
        alpha = 0.1
        for layer, own in enumerate((0.2, 0.55, 0.9)):
            alpha = own if f"layers.{layer}." in key else alpha
        ideal = start[key].astype(np.float64) * (1 - alpha) + end[key].astype(np.float64) * alpha
        assert np.allclose(values, ideal, rtol=1e-5, atol=1e-7), key


def test_dry_run_writes_nothing(pair: Pair, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = run(
        "interpolate", pair.base, pair.tuned, "--alpha", "0:1:0.5", "--lora-alpha", ALPHAS, "--dry-run", "--json"
    )
    assert [point["status"] for point in report.json["points"]] == ["planned"] * 3
    assert sorted(tmp_path.rglob("*")) == before


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    alphas=st.lists(st.floats(0.01, 0.99), min_size=2, max_size=4, unique=True),
    schedule=st.booleans(),
    data=st.integers(0, 1000),
)
def test_linear_in_alpha(
    alphas: list[float], schedule: bool, data: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every result lies on the line through both ends, at its alpha."""
    directory = tmp_path_factory.mktemp("law")
    rng = np.random.default_rng(data)
    start, end = llama_tensors(rng, layers=2), llama_tensors(rng, layers=2)
    base, tuned = write_model(directory / "b", start), write_model(directory / "t", end)
    flags = [flag for alpha in alphas for flag in ("--alpha", repr(alpha))]
    rules = ("--alpha-schedule", "layer=0.3:0.3") if schedule else ()
    assert run("interpolate", base, tuned, "-o", directory / "s", *flags, *rules).code == 0
    for alpha in alphas:
        name = repr(alpha)
        found = read_model(directory / "s" / f"alpha-{name}")
        for key, values in found.items():
            own = 0.3 if schedule and "layers" in key else alpha
            wide = start[key].astype(np.float64), end[key].astype(np.float64)
            ideal = (1 - own) * wide[0] + own * wide[1]
            assert np.all(np.abs(values - ideal) <= 2.0**-22 * (np.abs(wide[0]) + np.abs(wide[1])))


def test_a_merge_measures_against_the_checkpoints_kernel_and_an_interpolation_against_the_base(
    pair: Pair, tmp_path: Path
) -> None:
    merge = run("merge", pair.tuned, "--base", pair.base, "-o", tmp_path / "m", "--lora-alpha", ALPHAS, "--json").json
    mixed = pair.run(tmp_path / "i", "--alpha", 1, "--json").json
    path = ("PaliGemma", "llm", "layers", "mlp", "linear")
    one, other = (
        next(site for site in report["sites"] if site["target"].removeprefix("params/").startswith("/".join(path)))
        for report in (merge, mixed)
    )
    rounding = np.linalg.norm(pair.start[path] - pair.start[path].astype(BFLOAT16).astype(np.float64))
    delta = np.linalg.norm(pair.end[path] - pair.start[path])
    assert one["survival"][0]["relative_error"] == pytest.approx(rounding / delta, rel=1e-3)
    assert other["survival"][0]["relative_error"] < 1e-5


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtypes=st.tuples(*[st.sampled_from([np.float32, np.float16, BFLOAT16])] * 2),
    alpha=st.floats(0.01, 0.99),
    special=st.sampled_from([-0.0, np.inf, -np.inf, np.nan, 1e-40]),
    data=st.integers(0, 1000),
)
def test_ends_are_bitwise_and_a_sweep_is_its_single_runs(
    dtypes: tuple[object, object], alpha: float, special: float, data: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("law")
    rng = np.random.default_rng(data)
    start, end = (llama_tensors(rng, layers=1, dtype=dtype) for dtype in dtypes)
    for side in (start, end):
        side["lm_head.weight"][0, data % 8] = special
    base, tuned = write_model(directory / "b", start), write_model(directory / "t", end)
    name = repr(alpha)
    flags = ("interpolate", base, tuned, "-o")
    assert run(*flags, directory / "s", "--alpha", 0, "--alpha", name, "--alpha", 1).code == 0
    assert run(*flags, directory / "o", "--alpha", name, "--jobs", 1).code == 0
    swept = {point: read_model(directory / "s" / f"alpha-{point}") for point in ("0", name, "1")}
    single = read_model(directory / "o")
    for key, values in end.items():
        assert same_bits(swept["0"][key], start[key].astype(values.dtype)), key
        assert same_bits(swept["1"][key], values), key
        assert same_bits(swept[name][key], single[key]), key
