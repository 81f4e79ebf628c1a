"""Resized adapters of trees: against NumPy's truncation of each layer's and head's delta, in float64, and what is copied."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_merge_cli.reports.schema import report_schema
from lora_merge_cli.resizing import ResizeRequest, prepare_resize, resize
from tests.checkpoints import restore_flat, save_step
from tests.command import run
from tests.interpolation import ALPHAS, Pair, openpi_pair, same_bits
from tests.trees import ACTION, PALIGEMMA, as_base, build, dense, nest

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLES = Path(__file__).parent.parent / "sample_checkpoints"

BATCH = {"q_einsum": 2, "kv_einsum": 3, "qkv_einsum": 3, "attn_vec_einsum": 1, "gating_einsum": 2, "linear": 1}
"""How many axes of a stacked kernel count matrices, by OpenPI's einsums: layers, heads or gates. The last axis is the outputs."""


def extracted(directory: Path, tuned: Path, base: Path, *flags: object) -> Path:
    done = run("extract", tuned, "--base", base, "-o", directory, *flags)
    assert done.code == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Path]:
    """A fine-tune beside its base, and its adapter. Nobody changes them."""
    directory = tmp_path_factory.mktemp("made")
    pair = openpi_pair(directory)
    return pair, extracted(directory / "a", pair.tuned, pair.base, "--lora-alpha", ALPHAS)


def config_of(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return found


def tensors_of(adapter: Path) -> dict[str, Array]:
    return load_file(adapter / "adapter_model.safetensors")


def metadata_of(adapter: Path) -> dict[str, str]:
    with safe_open(adapter / "adapter_model.safetensors", "numpy") as file:
        return dict(file.metadata())


def name(path: list[str | int]) -> str:
    return "/".join(map(str, path))


def deltas(adapter: Path) -> dict[str, Array]:
    """Each site's scaled delta in float64, from the files alone."""
    tensors, found = tensors_of(adapter), {}
    for site in config_of(adapter)["sites"]:
        a, b = (tensors[name(site["factors"][role]["key"])].astype(np.float64) for role in ("lora_a", "lora_b"))
        rank = site["equation"].split(",")[0].index("r")
        assert a.shape[rank] == site["rank"]
        found[name(site["target"])] = site["scale"]["value"] * np.einsum(site["equation"], a, b)
    return found


def matrices(delta: Array, batch: int) -> Array:
    return delta.reshape(math.prod(delta.shape[:batch]), -1, delta.shape[-1])


def truncated(delta: Array, batch: int, rank: int) -> Array:
    """The best approximation of each matrix."""
    u, s, vt = np.linalg.svd(matrices(delta, batch), full_matrices=False)
    best = (u[..., :rank] * s[:, None, :rank]) @ vt[:, :rank]
    return np.asarray(best.reshape(delta.shape))


def least_rank(delta: Array, batch: int, energy: float) -> int:
    """The least rank that keeps a share of all matrices' energy together."""
    squares = np.square(np.linalg.svd(matrices(delta, batch), compute_uv=False)).sum(axis=0)
    kept = np.cumsum(squares) / squares.sum()
    return int(np.argmax(kept >= energy - 1e-13)) + 1


def resized(adapter: Path, output: Path, *flags: object) -> dict[str, Any]:
    """Resize with the tool, which must succeed and change no input; its report by module."""
    from jsonschema import Draft202012Validator

    before = {file: file.read_bytes() for file in adapter.rglob("*") if file.is_file()}
    done = run("resize", adapter, "-o", output, "--json", *flags)
    assert done.code == 0, done.stderr
    assert {file: file.read_bytes() for file in adapter.rglob("*") if file.is_file()} == before
    report: dict[str, Any] = json.loads(done.stdout)
    Draft202012Validator(report_schema()).validate(report)
    return report | {"by_module": {record["module"]: record for record in report["modules"]}}


def check(adapter: Path, output: Path, report: dict[str, Any], lead: int = 0, tolerance: float = 1e-6) -> None:
    """Every new delta is the best of its rank, the report says what it keeps, and all else is as it was.

    Args:
        adapter: The old one.
        output: The new one.
        report: By module.
        lead: How many axes fewer the kernels have in front.
        tolerance: Relative to the delta.
    """
    old, new, config = deltas(adapter), deltas(output), config_of(adapter)
    assert list(old) == list(new) == [record["module"] for record in report["modules"]]
    for site, made in zip(config["sites"], config_of(output)["sites"], strict=True):
        delta, target, batch = old[name(site["target"])], name(site["target"]), BATCH[site["module"]] - lead
        record, rank = report["by_module"][target], made["rank"]
        norm = np.linalg.norm(delta)
        assert (record["rank_before"], record["rank_after"]) == (site["rank"], rank)
        assert record["matrices"] == math.prod(delta.shape[:batch])
        assert record["shape"] == [delta.shape[-1], matrices(delta, batch).shape[1]]
        assert record["norm"] == pytest.approx(norm, rel=1e-6)
        best = truncated(delta, batch, rank)
        assert np.linalg.norm(new[target] - best) <= tolerance * norm, target
        assert record["relative_error"] == pytest.approx(np.linalg.norm(new[target] - delta) / norm, abs=1e-9)
        assert record["energy_kept"] == pytest.approx(1 - (np.linalg.norm(best - delta) / norm) ** 2, abs=1e-9)
        if rank < site["rank"]:
            assert made["scale"]["value"] == 1 and made["scale"]["assumed"] == site["scale"]["assumed"]
            assert site["scale"]["source"] in made["scale"]["source"] and "resized" in made["scale"]["source"]
        else:
            assert (made["scale"], rank) == (site["scale"], site["rank"])
        assert {key: value for key, value in made.items() if key not in ("rank", "scale")} == {
            key: value for key, value in site.items() if key not in ("rank", "scale")
        }
    rest = config | {"sites": None}
    assert config_of(output) | {"sites": None} == rest
    assert metadata_of(output) == metadata_of(adapter)
    factors = {name(factor["key"]) for site in config["sites"] for factor in site["factors"].values()}
    before, after = tensors_of(adapter), tensors_of(output)
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before.keys() - factors)
    assert all(before[key].dtype == after[key].dtype and before[key].ndim == after[key].ndim for key in factors)
    assert report["factor_bytes_before"] == sum(before[key].nbytes for key in factors)
    assert report["factor_bytes_after"] == sum(after[key].nbytes for key in factors)
    assert report["bytes_after"] == sum(values.nbytes for values in after.values())


def merged(output: Path, base: Path, adapter: Path, *flags: object) -> dict[tuple[Any, ...], Array]:
    done = run("merge", base, "--adapter", adapter, "-o", output, *flags)
    assert done.code == 0, done.stderr
    return restore_flat(output / "params")


@pytest.mark.parametrize("rank", [1, 3])
def test_the_base_plus_the_best_approximation(rank: int, made: tuple[Pair, Path], tmp_path: Path) -> None:
    pair, adapter = made
    report = resized(adapter, tmp_path / "r", "--rank", rank)
    check(adapter, tmp_path / "r", report)
    assert {record["rank_after"] for record in report["modules"]} == {min(rank, old) for old in (2, 3, 4, 5)}
    got = merged(tmp_path / "m", pair.base, tmp_path / "r", "--verify")
    assert got.keys() == pair.end.keys()
    sites = {tuple(site["label"].split("/")): site for site in config_of(adapter)["sites"]}
    assert len(sites) == len(pair.kernels)
    for path, values in got.items():
        if path not in pair.kernels:
            assert same_bits(values, pair.end[path]), path
            continue
        label = tuple(part for part in path if part not in ("PaliGemma", "llm", "layers", "w"))
        site = sites[label]
        start = pair.start[path].astype(np.float64)
        # The delta is the trees' own: OpenPI's layer with the identity pushed through it.
        delta = pair.end[path] - start
        best = truncated(delta, BATCH[site["module"]], rank)
        np.testing.assert_allclose(values, start + best, rtol=2e-7, atol=1e-6 * np.abs(delta).max())


@pytest.mark.parametrize("energy", [0.5, 0.6, 0.8, 0.95])
def test_one_rank_keeps_the_share_of_all_layers_together(
    energy: float, made: tuple[Pair, Path], tmp_path: Path
) -> None:
    adapter = made[1]
    report = resized(adapter, tmp_path / "r", "--energy", energy)
    check(adapter, tmp_path / "r", report)
    old = deltas(adapter)
    for site in config_of(adapter)["sites"]:
        target = name(site["target"])
        assert report["by_module"][target]["rank_after"] == least_rank(old[target], BATCH[site["module"]], energy)
    assert report["energy_kept"] >= energy
    assert len({record["rank_after"] for record in report["modules"]}) > 1


def test_the_model_itself_could_run_the_new_factors(made: tuple[Pair, Path], tmp_path: Path) -> None:
    """OpenPI's own layer, which sums over the heads of lora_b by itself."""
    adapter = made[1]
    resize(ResizeRequest(adapter, tmp_path / "r", rank=2))
    tensors, old = tensors_of(tmp_path / "r"), deltas(adapter)
    kinds = set()
    for site in config_of(tmp_path / "r")["sites"]:
        a, b = (tensors[name(site["factors"][role]["key"])] for role in ("lora_a", "lora_b"))
        target, module = name(site["target"]), site["module"]
        scale = site["scale"]["value"]
        if module not in ("gating_einsum", "linear"):
            kinds.add(module)
        layers = zip(a, b, old[target], strict=True)
        found = np.stack([dense(module, np.zeros(delta.shape), one, two, scale) for one, two, delta in layers])
        best = truncated(old[target], BATCH[module], 2)
        assert np.linalg.norm(found - best) <= 1e-6 * np.linalg.norm(best), target
        if module == "attn_vec_einsum" and site["rank"] < 3 and "_1" not in target:
            assert b.shape[1] == PALIGEMMA.heads and b[:, 0].any() and not b[:, 1:].any()
    assert kinds == {"q_einsum", "kv_einsum", "attn_vec_einsum"}


@pytest.mark.parametrize(
    ("options", "lead"),
    [({"layers": None, "model": "pi0.5"}, 1), ({"qkv": True}, 0)],
    ids=["unstacked", "fused-projections"],
)
def test_other_trees(options: dict[str, Any], lead: int, tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION, **options)
    tuned = save_step(tmp_path / "run" / "7", nest(tree.leaves))
    base = save_step(tmp_path / "base" / "0", nest(as_base(tree), suffix=()))
    adapter = extracted(tmp_path / "a", tuned, base, "--lora-alpha", ALPHAS, "--rslora")
    report = resized(adapter, tmp_path / "r", "--rank", 2)
    check(adapter, tmp_path / "r", report, lead)
    got = merged(tmp_path / "m", base, tmp_path / "r", "--verify")
    start = restore_flat(base / "params")
    for target, delta in deltas(tmp_path / "r").items():
        path = tuple(part for part in target.split("/") if part not in ("params", "value"))
        np.testing.assert_allclose(got[path], start[path].astype(np.float64) + delta, rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("flags", [("--rank", 5), ("--rank", 99), ("--energy", 1)])
def test_where_no_rank_changes_everything_stays(
    flags: tuple[object, ...], made: tuple[Pair, Path], tmp_path: Path
) -> None:
    adapter = made[1]
    report = resized(adapter, tmp_path / "r", *flags)
    assert config_of(tmp_path / "r") == config_of(adapter)
    before, after = tensors_of(adapter), tensors_of(tmp_path / "r")
    assert before.keys() == after.keys() and all(same_bits(before[key], after[key]) for key in before)
    assert (report["relative_error"], report["energy_kept"]) == (0, 1)


def test_the_sample_checkpoint(tmp_path: Path) -> None:
    base = SAMPLES / "pi0_tiny_base"
    adapter = extracted(tmp_path / "a", SAMPLES / "pi0_tiny", base, "--lora-alpha", ALPHAS)
    report = resized(adapter, tmp_path / "r", "--rank", 1)
    check(adapter, tmp_path / "r", report)
    got = merged(tmp_path / "m", base, tmp_path / "r", "--verify")
    start = restore_flat(base / "params")
    for target, delta in deltas(tmp_path / "r").items():
        path = tuple(part for part in target.split("/") if part not in ("params", "value"))
        np.testing.assert_allclose(got[path], start[path].astype(np.float64) + delta, rtol=2e-7, atol=1e-6)
    assert any("bit for bit" in note for note in report["notes"])
    assert sorted(file.name for file in (tmp_path / "r").iterdir()) == sorted(file.name for file in adapter.iterdir())
    assets = [file.relative_to(adapter) for file in (adapter / "assets").rglob("*") if file.is_file()]
    assert assets and all((adapter / file).read_bytes() == (tmp_path / "r" / file).read_bytes() for file in assets)


def test_resized_again(made: tuple[Pair, Path], tmp_path: Path) -> None:
    """Truncating twice is truncating once."""
    adapter = made[1]
    resized(adapter, tmp_path / "one", "--rank", 3)
    resized(tmp_path / "one", tmp_path / "two", "--rank", 1)
    resized(adapter, tmp_path / "straight", "--rank", 1)
    found = deltas(tmp_path / "two")
    for target, wanted in deltas(tmp_path / "straight").items():
        assert np.linalg.norm(found[target] - wanted) <= 2e-6 * np.linalg.norm(wanted)


# ---- adapters written by hand

FORWARDS = {
    "ir,ro->io": ("bti,io->bto", "bti,ir->btr", "btr,ro->bto"),
    "lnhr,lmrd->lnhd": ("btnh,nhd->btd", "btnh,nhr->btr", "btr,nrd->btd"),
    "lckdr,lckrh->lckdh": ("bsd,ckdh->cbskh", "bsd,ckdr->cbskr", "cbskr,ckrh->cbskh"),
    "lri,lor->loi": ("bti,oi->bto", "bti,ri->btr", "btr,or->bto"),
}
BATCH_DIMS = {"ir,ro->io": "", "lnhr,lmrd->lnhd": "l", "lckdr,lckrh->lckdh": "lck", "lri,lor->loi": "l"}
EXTENTS = {"i": 7, "o": 6, "l": 2, "n": 2, "m": 3, "h": 3, "d": 5, "c": 2, "k": 1}


def site_of(equation: str, rank: int, scale: float = -1.5, key: str = "x") -> dict[str, Any]:
    base, down, up = FORWARDS[equation]
    return {
        "target": ["params", 0, key, "kernel"],
        "factors": {role: {"key": ["params", 0, key, role]} for role in ("lora_a", "lora_b")},
        "operation": "add_delta",
        "equation": equation,
        "rank": rank,
        "scale": {"value": scale, "source": "alpha 3 / rank", "assumed": True},
        "forward": {"base": base, "down": down, "up": up},
        "group": "model",
        "module": "one",
        "label": key,
    }


def written(
    directory: Path,
    sites: list[dict[str, Any]],
    change: Callable[[dict[str, Any], dict[str, Array]], Any] = lambda config, tensors: None,
    seed: int = 0,
) -> Path:
    """An adapter of random factors whose singular values fall, with one leaf whole, and a number in its key paths."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {"params/0/whole": rng.standard_normal(4).astype(np.float16)}
    for site in sites:
        for role, dims in zip(("lora_a", "lora_b"), site["equation"].split("->")[0].split(","), strict=True):
            values = rng.standard_normal([{**EXTENTS, "r": site["rank"]}[dim] for dim in dims])
            fall = 0.5 ** np.arange(site["rank"]).reshape([-1 if dim == "r" else 1 for dim in dims])
            tensors[name(site["factors"][role]["key"])] = (values * fall).astype(np.float32)
    config = {
        "format": "lora-merge adapter",
        "version": 1,
        "dialect": "nnx",
        "base": {"path": "somewhere", "fingerprint": "1"},
        "left_out": 2,
        "made_by": {"tool": "someone", "more": [1, None]},
        "sites": sites,
        "replacements": [
            {"target": ["params", 0, "whole"], "key": ["params", 0, "whole"], "reason": "trained in full"}
        ],
        "dtypes": [{"leaf": ["params", 0, "other"], "dtype": "bfloat16"}],
    }
    change(config, tensors)
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    paths = {key: {"path": [0 if part == "0" else part for part in key.split("/")]} for key in tensors}
    save_file(
        tensors,
        directory / "adapter_model.safetensors",
        metadata={"lora_merge.key_paths": json.dumps(paths), "note": "kept"},
    )
    return directory


def ordered(delta: Array, equation: str) -> Array:
    """The delta of a kernel as matrices of (one side, other side), by its batch dims."""
    return matrices(delta, len(BATCH_DIMS[equation])) if delta.ndim > 2 else delta[None]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FORWARDS)),
    st.integers(1, 6),
    st.one_of(st.integers(1, 7), st.floats(0.01, 1)),
    st.one_of(st.floats(0.01, 100), st.floats(-100, -0.01)),
    st.integers(0, 99),
)
def test_every_equation_at_every_cut(equation: str, rank: int, cut: float, scale: float, seed: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        adapter = written(Path(place) / "a", [site_of(equation, rank, scale)], seed=seed)
        wanted: dict[str, Any] = {"rank": cut} if isinstance(cut, int) else {"energy": cut}
        resize(ResizeRequest(adapter, Path(place) / "r", **wanted))
        (old,), (new,) = deltas(adapter).values(), deltas(Path(place) / "r").values()
        stack = ordered(old, equation)
        made = config_of(Path(place) / "r")["sites"][0]["rank"]
        batch = len(BATCH_DIMS[equation])
        if isinstance(cut, int):
            assert made == (rank if cut >= rank else min(cut, *stack.shape[1:]))
        elif cut < 1 - 1e-9:
            assert made == min(rank, least_rank(old, batch, cut))
        best = truncated(old, batch, made)
        assert np.linalg.norm(new - best) <= 1e-6 * np.linalg.norm(old)
        # Eckart and Young: what is lost is the singular values left out.
        lost = np.linalg.svd(stack, compute_uv=False)[:, made:]
        assert np.linalg.norm(new - old) <= np.linalg.norm(lost) + 1e-6 * np.linalg.norm(old)


def test_what_is_said_and_what_stays(tmp_path: Path) -> None:
    sites = [site_of("lnhr,lmrd->lnhd", 4), site_of("ir,ro->io", 2, 0.5, "y")]
    adapter = written(tmp_path / "a", sites)
    report = resized(adapter, tmp_path / "r", "--rank", 3)
    assert [(record["rank_before"], record["rank_after"]) for record in report["modules"]] == [(4, 3), (2, 2)]
    notes = " | ".join(report["notes"])
    assert "1 of 2 modules need no smaller rank" in notes and "1 scales that were assumed" in notes
    assert "first head" in notes and "params/0/whole" not in notes.partition("bit for bit")[0]
    assert (report["base"], report["method"]) == ("somewhere", "LoRA")
    document, made = config_of(adapter), config_of(tmp_path / "r")
    made["sites"][0] |= {key: document["sites"][0][key] for key in ("rank", "scale")}
    assert made == document
    before, after = tensors_of(adapter), tensors_of(tmp_path / "r")
    assert same_bits(before["params/0/whole"], after["params/0/whole"])
    assert all(same_bits(before[f"params/0/y/{role}"], after[f"params/0/y/{role}"]) for role in ("lora_a", "lora_b"))
    texts, kept = metadata_of(adapter), metadata_of(tmp_path / "r")
    assert kept["note"] == "kept" and json.loads(kept["lora_merge.key_paths"]) == json.loads(
        texts["lora_merge.key_paths"]
    )
    assert not after["params/0/x/lora_b"][:, 1:].any() and after["params/0/x/lora_b"].shape == (2, 3, 3, 5)


@pytest.mark.parametrize("dtype", ["keep", "float32"])
@pytest.mark.parametrize("rank", [2, 4])
def test_dtypes(dtype: str, rank: int, tmp_path: Path) -> None:
    def narrow(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        tensors["params/0/x/lora_a"] = tensors["params/0/x/lora_a"].astype(ml_dtypes.bfloat16)
        tensors["params/0/x/lora_b"] = tensors["params/0/x/lora_b"].astype(np.float16)

    adapter = written(tmp_path / "a", [site_of("lri,lor->loi", 4)], narrow)
    report = resized(adapter, tmp_path / "r", "--rank", rank, "--dtype", dtype)
    found = tensors_of(tmp_path / "r")
    dtypes = [found[f"params/0/x/{role}"].dtype for role in ("lora_a", "lora_b")]
    assert dtypes == ([ml_dtypes.bfloat16, np.float16] if dtype == "keep" else [np.float32] * 2)
    assert found["params/0/whole"].dtype == np.float16
    (old,), (new,) = deltas(adapter).values(), deltas(tmp_path / "r").values()
    exact = rank == 4
    tolerance = 0 if exact else 1e-2 if dtype == "keep" else 1e-6
    assert np.linalg.norm(new - (old if exact else truncated(old, 1, rank))) <= tolerance * np.linalg.norm(old)
    assert report["modules"][0]["dtype_after"] == ("float16" if dtype == "keep" else "float32")


def test_deltas_of_zeros(tmp_path: Path) -> None:
    def one(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        tensors["params/0/x/lora_b"][0] = 0

    def all_of_them(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        tensors["params/0/x/lora_b"][:] = 0

    site = site_of("lri,lor->loi", 4)
    report = resized(written(tmp_path / "a", [site], one), tmp_path / "r", "--rank", 3)
    (old,), (new,) = deltas(tmp_path / "a").values(), deltas(tmp_path / "r").values()
    assert report["modules"][0]["rank_after"] == 3 and not new[0].any()
    assert np.linalg.norm(new - truncated(old, 1, 3)) <= 1e-6 * np.linalg.norm(old)
    for flags in (("--rank", 3), ("--energy", 0.5)):
        report = resized(written(tmp_path / str(flags[1]), [site], all_of_them), tmp_path / f"r{flags[1]}", *flags)
        record = report["modules"][0]
        assert (record["rank_after"], record["energy_kept"], record["relative_error"]) == (1, 1, None)


def test_factors_of_two_dense_trees(tmp_path: Path) -> None:
    """Their equations have no head to sum over, and their scale is 1 before and after."""
    pair = openpi_pair(tmp_path)
    dense_tree = {path: values.astype(np.float32) for path, values in pair.end.items()}
    tuned = save_step(tmp_path / "dense" / "1", nest(dense_tree))
    adapter = extracted(tmp_path / "a", tuned, pair.base, "--rank", 3, "--include", "**/attn/*einsum/**")
    assert all("m" not in site["equation"] for site in config_of(adapter)["sites"])
    report = resized(adapter, tmp_path / "r", "--rank", 1)
    check(adapter, tmp_path / "r", report)
    merged(tmp_path / "n", pair.base, tmp_path / "r", "--verify")


def test_a_dry_run_and_reports(made: tuple[Pair, Path], tmp_path: Path) -> None:
    planned = prepare_resize(ResizeRequest(made[1], energy=0.8)).report
    done = resize(ResizeRequest(made[1], tmp_path / "r", energy=0.8))
    assert (planned.status, done.status) == ("planned", "resized") and planned.modules == done.modules
    shown = run("resize", made[1], "--energy", 0.8, "--dry-run", "--report", tmp_path / "x.md")
    assert shown.code == 0 and "attn_vec_einsum" in shown.stdout
    assert (tmp_path / "x.md").read_text().startswith("# LoRA adapter planned")


Change = Callable[[dict[str, Any], dict[str, Array]], Any]


def site_set(*keys: Any, value: Any) -> Change:
    def change(config: Any, tensors: dict[str, Array]) -> None:
        found = config["sites"][0]
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value

    return change


def tensor_set(role: str, make: Callable[[Array], Array]) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        tensors[f"params/0/x/{role}"] = make(tensors[f"params/0/x/{role}"])

    return change


def whole_only(config: dict[str, Any], tensors: dict[str, Array]) -> None:
    config["sites"] = []
    for role in ("lora_a", "lora_b"):
        del tensors[f"params/0/x/{role}"]


def shared(config: dict[str, Any], tensors: dict[str, Array]) -> None:
    config["replacements"].append({"target": ["z"], "key": ["params", 0, "x", "lora_a"], "reason": "?"})


REFUSED: dict[str, tuple[Change, int, str]] = {
    "a later version": (lambda config, tensors: config.update(version=2), 4, "another version"),
    "another operation": (site_set("operation", value="twist"), 4, "does not know"),
    "no sites": (whole_only, 4, "nothing to resize"),
    "another rank": (site_set("rank", value=3), 4, "do not fit"),
    "another extent": (tensor_set("lora_b", lambda b: b[:1]), 4, "do not fit"),
    "an axis less": (tensor_set("lora_b", lambda b: b[0]), 4, "do not fit"),
    "no entries": (tensor_set("lora_b", lambda b: b[..., :0]), 4, "do not fit"),
    "a dim that only lora_a has": (site_set("equation", value="lxr,lmrd->lmd"), 3, "no equation"),
    "integers": (tensor_set("lora_a", lambda a: a.astype(np.int8)), 4, "not floating-point"),
    "a part of a tensor": (site_set("factors", "lora_a", "at", value=[[0, 2]]), 4, "parts of tensors"),
    "another shape of it": (site_set("factors", "lora_a", "shape", value=[2, 2, 3, 4]), 4, "parts of tensors"),
    "a shared tensor": (shared, 4, "share"),
    "NaN": (tensor_set("lora_b", lambda b: b * np.nan), 3, "params/0/x/lora_b"),
    "a tensor that is not there": (site_set("factors", "lora_a", "key", value=["gone"]), 3, "not there"),
    "a scale of text": (site_set("scale", "value", value="much"), 3, "did not write"),
    "a scale beyond all range": (site_set("scale", "value", value=1e300), 4, "range"),
    "a scale beyond float32": (site_set("scale", "value", value=1e90), 4, "does not fit float32"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals(case: tuple[Change, int, str], tmp_path: Path) -> None:
    change, code, words = case
    adapter = written(tmp_path / "a", [site_of("lnhr,lmrd->lnhd", 4)], change)
    done = run("resize", adapter, "-o", tmp_path / "r", "--rank", 2)
    assert done.code == code, done.stderr
    assert words in done.error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a"]


def test_an_output_that_would_harm_the_adapter(tmp_path: Path) -> None:
    adapter = written(tmp_path / "a", [site_of("ir,ro->io", 4)])
    for output in (adapter, adapter / "inside"):
        assert run("resize", adapter, "-o", output, "--rank", 2, "--overwrite").code == 4
    assert run("resize", adapter, "-o", tmp_path / "r", "--rank", 2, "--energy", 0.5).code == 2
