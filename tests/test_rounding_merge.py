"""``--rounding`` from the command line to the files, for every way in: adapters inside, beside, several, and none at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_merge_cli.draws import rounding_bits
from lora_merge_cli.dtypes import dtype_named
from tests.checkpoints import restore_flat, save_step
from tests.command import run
from tests.interpolation import llama_tensors, openpi_pair, read_model, same_bits, write_model
from tests.rounding import around, walked
from tests.trees import ACTION, BFLOAT16, PALIGEMMA, build, nest

Array = np.ndarray[Any, np.dtype[Any]]

ALPHAS = ("--lora-alpha", "paligemma=12,action_expert=3")
PRESERVE = ("--rounding", "preserve")
LINEAR = "model.layers.1.mlp.up_proj"
EMBEDDING = "model.embed_tokens"


def write_adapter(directory: Path, factors: dict[str, Array], **config: Any) -> Path:
    config = config or {"r": 2, "lora_alpha": 6}
    directory.mkdir(parents=True)
    save_file(
        {f"base_model.model.{name}": values for name, values in factors.items()},
        directory / "adapter_model.safetensors",
    )
    said = {"peft_type": "LORA", "target_modules": ["up_proj", "embed_tokens"], **config}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory


def factors_of(rng: np.random.Generator, *, size: float = 5e-4) -> dict[str, Array]:
    def normal(*shape: int, std: float = 1.0) -> Array:
        return (std * rng.standard_normal(shape)).astype(np.float32)

    return {
        f"{LINEAR}.lora_A.weight": normal(2, 8),
        f"{LINEAR}.lora_B.weight": normal(12, 2, std=size),
        f"{EMBEDDING}.lora_embedding_A": normal(2, 20),
        f"{EMBEDDING}.lora_embedding_B": normal(8, 2, std=size),
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", llama_tensors(np.random.default_rng(0), dtype=BFLOAT16))


def adapted(base: Path, *adapters: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Of each kernel: the exact result, and all lora_a side by side; both inputs by outputs, float64."""
    start = {name: values.astype(np.float64) for name, values in read_model(base).items()}
    linear, embedding = start[f"{LINEAR}.weight"].T, start[f"{EMBEDDING}.weight"]
    inputs: dict[str, list[Array]] = {LINEAR: [], EMBEDDING: []}
    for factors in adapters:
        wide = {name: values.astype(np.float64) for name, values in factors.items()}
        a, b = wide[f"{LINEAR}.lora_A.weight"], wide[f"{LINEAR}.lora_B.weight"]
        linear = linear + 3 * (b @ a).T
        inputs[LINEAR].append(a.T)
        a, b = wide[f"{EMBEDDING}.lora_embedding_A"], wide[f"{EMBEDDING}.lora_embedding_B"]
        embedding = embedding + 3 * (b @ a).T
        inputs[EMBEDDING].append(a.T)
    return {
        LINEAR: (linear, np.concatenate(inputs[LINEAR], axis=1)),
        EMBEDDING: (embedding, np.concatenate(inputs[EMBEDDING], axis=1)),
    }


def found_in(output: Path) -> dict[str, Array]:
    """The kernels of a result, inputs by outputs."""
    leaves = read_model(output)
    return {LINEAR: leaves[f"{LINEAR}.weight"].T, EMBEDDING: leaves[f"{EMBEDDING}.weight"]}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_beside_a_base_are_preserved_together(base: Path, tmp_path: Path, dtype: str, count: int) -> None:
    rng = np.random.default_rng(1)
    adapters = [factors_of(rng) for _ in range(count)]
    paths = [write_adapter(tmp_path / f"adapter{number}", factors) for number, factors in enumerate(adapters)]
    named = [part for path in paths for part in ("--adapter", path)]
    done = run("merge", base, *named, "-o", tmp_path / "out", "--dtype", dtype, *PRESERVE, "--mu", 0.5, "--json")
    assert done.code == 0, done.stderr
    for name, (exact, inputs) in adapted(base, *adapters).items():
        result, ideal = found_in(tmp_path / "out")[name], walked(exact, inputs, 0.5, dtype)
        assert result.dtype == dtype_named(dtype)
        # A near tie in float32 changes what follows in its column.
        assert (result.astype(np.float64) != ideal).any(axis=0).sum() <= 1
    assert done.json["rounding"] == {
        "method": "preserve",
        "mu": 0.5,
        "seed": None,
        "serving_values": None,
        "leaves": [{"rounding": "preserve", "leaves": 2, "reason": None}],
    }
    for site in done.json["sites"]:
        assert site["rounding"] == "preserve"
        assert site["nearest"]["dtype"] == dtype
        assert site["moved"] is None


def test_untouched_leaves_keep_their_bits(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors_of(np.random.default_rng(1)))
    assert run("merge", base, "--adapter", adapter, "-o", tmp_path / "out", *PRESERVE).code == 0
    before, after = read_model(base), read_model(tmp_path / "out")
    changed = {f"{LINEAR}.weight", f"{EMBEDDING}.weight"}
    assert {name for name in before if not same_bits(before[name], after[name])} == changed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["preserve", "stochastic"])
def test_no_number_of_threads_changes_a_bit(tmp_path: Path, method: str, dtype: str) -> None:
    run_step = save_step(tmp_path / "run" / "7", nest(build(PALIGEMMA, ACTION, delta=0.01).leaves))
    results = []
    for jobs in (1, 3):
        output = tmp_path / f"out{jobs}" / "7"
        flags = ("--dtype", dtype, "--rounding", method, "--seed", 5, "--jobs", jobs, *ALPHAS)
        assert run("merge", run_step, "-o", output, *flags).code == 0
        results.append(restore_flat(output / "params"))
    assert results[0].keys() == results[1].keys()
    assert all(same_bits(one, results[1][path]) for path, one in results[0].items())


def test_every_kernel_of_openpi_gets_one_of_its_two_neighbours_and_keeps_more(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION, delta=0.02)
    run_step = save_step(tmp_path / "run" / "7", nest(tree.leaves))
    done = run("merge", run_step, "-o", tmp_path / "out" / "7", "--dtype", "bfloat16", *PRESERVE, *ALPHAS, "--json")
    assert done.code == 0, done.stderr
    leaves = restore_flat(tmp_path / "out" / "7" / "params")
    for path in tree.changed:
        exact = tree.expected[path]
        found = leaves[path].astype(np.float64)
        below, above = around(exact, "bfloat16")
        near = np.minimum(np.abs(found - below), np.abs(found - above))
        assert (near <= 2e-6 * np.abs(exact).max()).all(), path
    gains = [(site["survival"][0], site["nearest"]) for site in done.json["sites"]]
    kept = [chosen["error_along_inputs"] < 0.8 * nearest["error_along_inputs"] for chosen, nearest in gains]
    assert sum(kept) >= 0.7 * len(kept)


def test_stochastic_follows_seed_name_and_position(base: Path, tmp_path: Path) -> None:
    factors = factors_of(np.random.default_rng(1))
    adapter = write_adapter(tmp_path / "adapter", factors)
    for seed, output in ((3, "one"), (3, "again"), (4, "other")):
        flags = ("--rounding", "stochastic", "--seed", seed)
        assert run("merge", base, "--adapter", adapter, "-o", tmp_path / output, *flags).code == 0
    one, again, other = (read_model(tmp_path / name) for name in ("one", "again", "other"))
    assert all(same_bits(values, again[name]) for name, values in one.items())
    assert not all(same_bits(values, other[name]) for name, values in one.items())
    exact = adapted(base, factors)[LINEAR][0].T
    below, above = around(exact, "bfloat16")
    inner, outer = np.where(np.abs(below) < np.abs(above), [below, above], [above, below])
    share = np.abs(exact - inner) / np.where(outer == inner, 1, np.abs(outer - inner))
    draws = rounding_bits(3, f"{LINEAR}.weight", 0, exact.size).reshape(exact.shape)
    found = one[f"{LINEAR}.weight"].astype(np.float64)
    assert (found == np.where(draws < share * 2**16, outer, inner)).mean() > 0.98


def test_a_float32_file_is_served_as_the_bfloat16_one(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors_of(np.random.default_rng(1)))
    beside = ("--adapter", adapter)
    wide = ("--dtype", "float32", "--serving-dtype", "bfloat16")
    exact = run("merge", base, *beside, "-o", tmp_path / "exact", "--dtype", "float32")
    narrow = run("merge", base, *beside, "-o", tmp_path / "narrow", "--dtype", "bfloat16", *PRESERVE)
    cell = run("merge", base, *beside, "-o", tmp_path / "cell", *wide, *PRESERVE, "--json")
    widened = run(
        "merge", base, *beside, "-o", tmp_path / "widened", *wide, *PRESERVE, "--serving-values", "widened", "--json"
    )
    assert [done.code for done in (exact, narrow, cell, widened)] == [0] * 4
    results = {name: read_model(tmp_path / name) for name in ("exact", "narrow", "cell", "widened")}
    for leaf in (f"{LINEAR}.weight", f"{EMBEDDING}.weight"):
        chosen = results["narrow"][leaf]
        assert same_bits(results["cell"][leaf].astype(BFLOAT16), chosen)
        assert same_bits(results["widened"][leaf], chosen.astype(np.float32))
        moved = results["cell"][leaf] != results["exact"][leaf]
        site = next(site for site in cell.json["sites"] if site["target"].replace("/", ".") == leaf)
        assert site["moved"] == moved.mean()
    assert cell.json["rounding"]["serving_values"] == "cell"
    assert any("entries that were moved" in note for note in cell.json["notes"])
    assert any("what bfloat16 holds, and no more" in note for note in widened.json["notes"])


def test_what_is_served_as_float32_is_not_rounded(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors_of(np.random.default_rng(1)))
    flags = ("--dtype", "float32", "--serving-dtype", "float32", *PRESERVE, "--json")
    done = run("merge", base, "--adapter", adapter, "-o", tmp_path / "out", *flags)
    (leaves,) = done.json["rounding"]["leaves"]
    assert leaves["rounding"] == "nearest"
    assert "served as float32" in leaves["reason"]
    assert done.json["serving_dtype"] == "float32"
    assert run("merge", base, "--adapter", adapter, "-o", tmp_path / "exact", "--dtype", "float32").code == 0
    exact, found = read_model(tmp_path / "exact"), read_model(tmp_path / "out")
    assert all(same_bits(values, found[name]) for name, values in exact.items())


def test_what_has_no_input_space_says_so(base: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    names = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 8), "hada_w2_a": (12, 2), "hada_w2_b": (2, 8)}
    factors = {f"{LINEAR}.{name}": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in names.items()}
    adapter = write_adapter(tmp_path / "loha", factors, peft_type="LOHA", r=2, alpha=6, target_modules=["up_proj"])
    done = run("merge", base, "--adapter", adapter, "-o", tmp_path / "out", *PRESERVE, "--json")
    assert done.code == 0, done.stderr
    reason = "loha has no low-rank input space"
    assert done.json["rounding"]["leaves"] == [{"rounding": "nearest", "leaves": 1, "reason": reason}]
    assert done.json["sites"][0]["rounding"] == "nearest"
    drawn = run("merge", base, "--adapter", adapter, "-o", tmp_path / "drawn", "--rounding", "stochastic", "--json")
    assert drawn.json["sites"][0]["rounding"] == "stochastic"
    assert drawn.json["sites"][0]["nearest"] is not None
    one, other = (read_model(tmp_path / name)[f"{LINEAR}.weight"].astype(np.float64) for name in ("out", "drawn"))
    assert 0 < (one != other).mean() < 1
    assert np.abs(one - other).max() <= 2.0**-7 * np.abs(one).max()


def test_dense_leaves_of_an_interpolation(tmp_path: Path) -> None:
    pair = openpi_pair(tmp_path)
    flags = ("--alpha", 0.5, "--dtype", "bfloat16", "--json")
    near = pair.run(tmp_path / "near", *flags)
    kept = pair.run(tmp_path / "kept", *flags, *PRESERVE)
    drawn = pair.run(tmp_path / "drawn", *flags, "--rounding", "stochastic")
    assert [done.code for done in (near, kept, drawn)] == [0, 0, 0]
    given = {each["rounding"]: each for each in kept.json["rounding"]["leaves"]}
    assert given["preserve"]["leaves"] == len(pair.kernels)
    assert "no low-rank input space" in given["nearest"]["reason"]
    results = {name: restore_flat(tmp_path / name / "params") for name in ("near", "kept", "drawn")}
    wanted = pair.between(0.5)
    for path, exact in wanted.items():
        one, two, three = (results[name][path] for name in ("near", "kept", "drawn"))
        assert same_bits(one, two) != (path in pair.kernels), path
        # The vision tower and the projections stay float32, and are cast by the server.
        served = three.astype(BFLOAT16).astype(np.float64)
        below, above = around(exact, "bfloat16")
        off = np.minimum(np.abs(served - below), np.abs(served - above))
        assert (off <= 4e-6 * np.abs(exact).max()).all()
        assert (served != one.astype(BFLOAT16).astype(np.float64)).any()
    mixed = {leaf["path"]: leaf for leaf in drawn.json["mixed"]}
    assert all(leaf["rounding"] == "stochastic" for leaf in mixed.values())
    assert any(leaf["nearest"] is not None for leaf in mixed.values())


@pytest.mark.parametrize("method", ["preserve", "stochastic"])
def test_a_sweep_makes_what_single_runs_make(tmp_path: Path, method: str) -> None:
    pair = openpi_pair(tmp_path)
    seed = ("--seed", 9) if method == "stochastic" else ()
    flags = ("--dtype", "bfloat16", "--rounding", method, *seed, "--jobs", 3)
    assert pair.run(tmp_path / "sweep", "--alpha", 0.3, "--alpha", 0.6, "--alpha", 1, *flags).code == 0
    assert pair.run(tmp_path / "one", "--alpha", 0.6, *flags).code == 0
    one = restore_flat(tmp_path / "one" / "params")
    other = restore_flat(tmp_path / "sweep" / "alpha-0.6" / "params")
    assert all(same_bits(values, other[path]) for path, values in one.items())


def test_resume_knows_the_rounding(tmp_path: Path) -> None:
    pair = openpi_pair(tmp_path)
    flags = ("--alpha", 0.5, "--dtype", "bfloat16")
    assert pair.run(tmp_path / "out", *flags, *PRESERVE, "--mu", 2).code == 0
    again = pair.run(tmp_path / "out", *flags, *PRESERVE, "--mu", 2, "--resume", "--json")
    assert again.code == 0
    assert any("an earlier run" in note for note in again.json["notes"])
    assert again.json["sites"][0]["nearest"] is not None
    for other in ((), (*PRESERVE, "--mu", 1), ("--rounding", "stochastic")):
        refused = pair.run(tmp_path / "out", *flags, *other, "--resume")
        assert refused.code == 5
        assert "other inputs, alphas or flags" in refused.error


def test_a_dry_run_says_what_each_leaf_would_get(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors_of(np.random.default_rng(1)))
    done = run("merge", base, "--adapter", adapter, *PRESERVE, "--dry-run", "--json")
    assert done.json["rounding"]["leaves"] == [{"rounding": "preserve", "leaves": 2, "reason": None}]
    assert [site["rounding"] for site in done.json["sites"]] == ["preserve", "preserve"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--mu", 2), "--mu is of --rounding preserve"),
        (("--rounding", "stochastic", "--mu", 2), "--mu is of --rounding preserve"),
        (("--serving-values", "cell"), "--serving-values is of"),
        ((*PRESERVE, "--mu", -1), "--mu must be a finite number, 0 or more"),
        ((*PRESERVE, "--mu", "nan"), "--mu must be a finite number, 0 or more"),
    ],
)
def test_senseless_flags_are_usage_errors(base: Path, tmp_path: Path, flags: tuple[object, ...], words: str) -> None:
    for command in (
        ("merge", base, "-o", tmp_path / "out"),
        ("interpolate", base, base, "--alpha", 0.5, "-o", tmp_path / "out"),
    ):
        refused = run(*command, *flags)
        assert refused.code == 2
        assert words in refused.error


def test_joined_fine_tunes_are_verified_as_they_were_rounded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    start = llama_tensors(rng, dtype=BFLOAT16)
    base = write_model(tmp_path / "base", start)
    tuned = [
        write_model(
            tmp_path / f"tuned{number}",
            {name: (v.astype(np.float32) + rng.normal(0, 1e-3, v.shape)).astype(BFLOAT16) for name, v in start.items()},
        )
        for number in range(2)
    ]
    flags = ("--method", "linear", "--rounding", "stochastic", "--seed", 3)
    done = run("interpolate", base, *tuned, "-o", tmp_path / "out", *flags, "--verify", "--json")
    assert done.code == 0, done.stderr
    assert {leaf["rounding"] for leaf in done.json["mixed"]} == {"stochastic"}
    other = run(
        "verify", tmp_path / "out", "--base", base, "--against", tuned[0], "--against", tuned[1], *flags[:-1], 4
    )
    assert other.code == 1


def test_a_result_that_servers_cannot_hold_is_reported(tmp_path: Path) -> None:
    tensors = llama_tensors(np.random.default_rng(0))
    tensors[f"{LINEAR}.weight"][2, 3] = 70000
    base = write_model(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "adapter", factors_of(np.random.default_rng(1)))
    flags = ("--dtype", "float32", "--serving-dtype", "float16", "--json")
    for method in ("preserve", "stochastic"):
        done = run("merge", base, "--adapter", adapter, "-o", tmp_path / method, *flags, "--rounding", method)
        assert done.code == 0, done.stderr
        assert read_model(tmp_path / method)[f"{LINEAR}.weight"][2, 3] == np.float32(70000)
