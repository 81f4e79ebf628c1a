"""Resized adapters: what the new factors make against NumPy's truncation in float64, and what is copied."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_merge_cli.errors import Unrepresentable
from lora_merge_cli.formats import open_adapter
from lora_merge_cli.records import full_region
from lora_merge_cli.reports import render
from lora_merge_cli.reports.schema import report_schema
from lora_merge_cli.resizing import ResizeRequest, prepare_resize, resize
from tests.command import Outcome, run

Array = np.ndarray[Any, np.dtype[Any]]

PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 6,
    "lora_alpha": 15,
    "target_modules": ["q", "v"],
    "task_type": None,
}
Q, V, DOWN = "model.layers.0.attn.q", "model.layers.1.attn.v", "model.layers.1.mlp.down"


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def linear(module: str, out: int, inputs: int, rank: int, seed: int = 0, size: float = 1.0) -> dict[str, Array]:
    """A pair of factors whose singular values fall."""
    fall = (0.6 ** np.arange(rank)).astype(np.float32)
    return {
        f"{PREFIX}{module}.lora_A.weight": size * random(rank, inputs, seed=seed) * fall[:, None],
        f"{PREFIX}{module}.lora_B.weight": random(out, rank, seed=seed + 1),
    }


PLAIN = linear(Q, 20, 24, 6) | linear(V, 24, 16, 6, seed=2) | linear(DOWN, 16, 30, 6, seed=4, size=0.01)


def write(directory: Path, tensors: dict[str, Array], **config: Any) -> Path:
    directory.mkdir(parents=True)
    save_file(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()}, directory / "adapter_model.safetensors"
    )
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return directory


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    return found


def tensors_of(directory: Path) -> dict[str, Array]:
    source = open_adapter(directory).source
    return {spec.name: source.read(path, full_region(spec.shape)) for path, spec in source.index().tensors.items()}


def setting(config: dict[str, Any], pattern: str, module: str, default: str) -> float:
    """As peft reads it."""
    fitting = (v for key, v in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return float(next(fitting, config[default]))


def deltas(directory: Path) -> dict[str, Array]:
    """Each module's scaled delta, (outputs, inputs) in float64, written from the files alone."""
    config, tensors = config_of(directory), tensors_of(directory)
    found = {}
    for key, a in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_embedding_A)", key)
        if match is None:
            continue
        b = tensors[key.replace("_A", "_B")]
        owner = match[1].partition(".base_layer.")[0]
        rank = setting(config, "rank_pattern", owner, "r")
        assert a.shape[0] == b.shape[1] == rank, key
        scale = setting(config, "alpha_pattern", owner, "lora_alpha") / (
            rank**0.5 if config.get("use_rslora") else rank
        )
        product = b.astype(np.float64).reshape(len(b), -1) @ a.astype(np.float64).reshape(len(a), -1)
        found[match[1]] = scale * product
    return found


def truncated(delta: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def attempt(adapter: Path, out: Path, *flags: object) -> Outcome:
    """Resize with the tool; the adapter never changes."""
    before = {file: file.read_bytes() for file in sorted(adapter.rglob("*")) if file.is_file()}
    outcome = run("resize", adapter, "-o", out, *flags)
    assert {file: file.read_bytes() for file in sorted(adapter.rglob("*")) if file.is_file()} == before
    return outcome


def resized(adapter: Path, out: Path, *flags: object) -> dict[str, Any]:
    """Resize with the tool, which must succeed; its report by module."""
    outcome = attempt(adapter, out, *flags, "--json")
    assert outcome.code == 0, outcome.stderr
    report: dict[str, Any] = json.loads(outcome.stdout)
    validate(report)
    return report | {"by_module": {record["module"]: record for record in report["modules"]}}


def validate(report: dict[str, Any]) -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator(report_schema()).validate(report)


def check(adapter: Path, out: Path, report: dict[str, Any], tolerance: float = 1e-6) -> None:
    """Every new delta is the best of its rank, and the report says what it keeps."""
    old, new = deltas(adapter), deltas(out)
    assert list(new) == list(old) == [record["module"] for record in report["modules"]]
    for module, delta in old.items():
        record = report["by_module"][module]
        norm = np.linalg.norm(delta)
        rank = record["rank_after"]
        assert np.linalg.norm(new[module] - truncated(delta, rank)) <= tolerance * norm, module
        assert record["norm"] == pytest.approx(norm, rel=1e-6)
        assert record["relative_error"] == pytest.approx(np.linalg.norm(new[module] - delta) / norm, abs=1e-9)
        kept = 1 - (np.linalg.norm(truncated(delta, rank) - delta) / norm) ** 2
        assert record["energy_kept"] == pytest.approx(kept, abs=1e-9)
        assert tuple(record["shape"]) == delta.shape


METHODS: dict[str, tuple[dict[str, Array], dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "rsLoRA": (PLAIN, {"use_rslora": True}),
    "patterns": (
        linear(Q, 20, 24, 5) | linear(V, 24, 16, 9, seed=2) | linear(DOWN, 16, 30, 6, seed=4),
        {"rank_pattern": {"q": 5, r".*attn\.v": 9}, "alpha_pattern": {"down": 3, "layers.0.*": 7}},
    ),
    "patterns with rsLoRA": (
        linear(Q, 20, 24, 5) | linear(V, 24, 16, 9, seed=2),
        {"rank_pattern": {"q": 5, r".*attn\.v": 9}, "alpha_pattern": {"q": 3}, "use_rslora": True},
    ),
    "an embedding": (
        {f"{PREFIX}embed.lora_embedding_A": random(6, 40), f"{PREFIX}embed.lora_embedding_B": random(12, 6, seed=1)},
        {},
    ),
    "convolutions": (
        {
            f"{PREFIX}one.lora_A.weight": random(6, 5, 3, 2),
            f"{PREFIX}one.lora_B.weight": random(8, 6, 1, 1, seed=1),
            f"{PREFIX}two.lora_A.weight": random(6, 7, 4, seed=2),
            f"{PREFIX}two.lora_B.weight": random(9, 6, 1, seed=3),
        },
        {},
    ),
    "a negative alpha": (PLAIN, {"lora_alpha": -4.5}),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("rank", [1, 3])
def test_to_a_rank(method: tuple[dict[str, Array], dict[str, Any]], rank: int, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", method[0], **method[1])
    report = resized(adapter, tmp_path / "out", "--rank", rank)
    check(adapter, tmp_path / "out", report)
    config = config_of(tmp_path / "out")
    assert {record["rank_after"] for record in report["modules"]} == {rank}
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    for key, value in tensors_of(tmp_path / "out").items():
        old = method[0][key]
        assert value.ndim == old.ndim and value.dtype == old.dtype, key


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_to_an_energy(method: tuple[dict[str, Array], dict[str, Any]], energy: float, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", method[0], **method[1])
    report = resized(adapter, tmp_path / "out", "--energy", energy)
    check(adapter, tmp_path / "out", report)
    for module, delta in deltas(adapter).items():
        record = report["by_module"][module]
        shares = np.cumsum(np.linalg.svd(delta, compute_uv=False) ** 2) / np.linalg.norm(delta) ** 2
        rank = record["rank_after"]
        assert shares[rank - 1] >= energy - 1e-12
        assert rank == 1 or shares[rank - 2] < energy
    total = sum(record["norm"] ** 2 for record in report["modules"])
    kept = sum(record["energy_kept"] * record["norm"] ** 2 for record in report["modules"])
    assert report["energy_kept"] == pytest.approx(kept / total) and report["energy_kept"] >= energy


def test_ranks_that_differ_are_patterns_of_whole_paths(tmp_path: Path) -> None:
    # q is the end of x.q's path, and the dots are no wildcards.
    factors = linear("q", 20, 24, 6) | linear("x.q", 20, 24, 6, seed=2) | linear("a.b", 20, 24, 6, seed=4)
    factors |= linear("aXb", 20, 24, 6, seed=6)
    factors[f"{PREFIX}q.lora_B.weight"][:, 1:] = 0
    factors[f"{PREFIX}a.b.lora_B.weight"][:, 2:] = 0
    adapter = write(tmp_path / "adapter", factors)
    report = resized(adapter, tmp_path / "out", "--energy", 0.97)
    ranks = {module: record["rank_after"] for module, record in report["by_module"].items()}
    assert ranks["q"] == 1 and ranks["a.b"] == 2 and min(ranks["x.q"], ranks["aXb"]) >= 3
    check(adapter, tmp_path / "out", report)
    config = config_of(tmp_path / "out")
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert {"^q", r"a\.b"} <= set(config["rank_pattern"])
    for module, rank in ranks.items():
        assert (
            setting(config, "rank_pattern", module, "r")
            == setting(config, "alpha_pattern", module, "lora_alpha")
            == rank
        )


@pytest.mark.parametrize("rslora", [False, True])
def test_no_rank_is_raised(rslora: bool, tmp_path: Path) -> None:
    factors = linear(Q, 20, 24, 3) | linear(V, 24, 16, 9, seed=2)
    patterns: dict[str, Any] = {"rank_pattern": {"q": 3, "v": 9}, "alpha_pattern": {"q": 7}}
    adapter = write(tmp_path / "adapter", factors, use_rslora=rslora, **patterns)
    report = resized(adapter, tmp_path / "out", "--rank", 4)
    check(adapter, tmp_path / "out", report)
    assert [(record["rank_before"], record["rank_after"]) for record in report["modules"]] == [(3, 3), (9, 4)]
    found = tensors_of(tmp_path / "out")
    for key in (f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"):
        assert found[key].tobytes() == factors[key].tobytes(), "factors that stay, stay bit for bit"
    assert any("1 of 2 modules" in note and "unchanged" in note for note in report["notes"])
    np.testing.assert_allclose(deltas(tmp_path / "out")[Q], deltas(adapter)[Q], rtol=1e-14)


@pytest.mark.parametrize("flags", [("--rank", 6), ("--rank", 100), ("--energy", 1)])
def test_where_no_rank_changes_everything_stays(flags: tuple[object, ...], tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", PLAIN, use_rslora=True)
    report = resized(adapter, tmp_path / "out", *flags)
    assert config_of(tmp_path / "out") == config_of(adapter)
    assert {key: value.tobytes() for key, value in tensors_of(tmp_path / "out").items()} == {
        key: value.tobytes() for key, value in PLAIN.items()
    }
    assert report["relative_error"] == 0 and report["energy_kept"] == 1
    assert report["factor_bytes_before"] == report["factor_bytes_after"]


RIDING: dict[str, Array] = {
    f"{PREFIX}lm_head.weight": random(40, 24, seed=9).astype(ml_dtypes.bfloat16),
    f"{PREFIX}{Q}.base_layer.bias": random(20, seed=10),
    f"{PREFIX}model.embed.token_adapter.trainable_tokens_delta": random(3, 24, seed=11),
    f"{PREFIX}model.norm.weight": random(24, seed=12).astype(np.float16),
    f"{PREFIX}model.score.original_module.weight": random(2, 24, seed=13),
}


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_what_rides_along_is_copied(dtype: str, tmp_path: Path) -> None:
    extra = {"modules_to_save": ["lm_head", "norm"], "bias": "lora_only", "trainable_token_indices": [1, 5, 7]}
    factors = {key: value.astype(ml_dtypes.bfloat16) for key, value in PLAIN.items()}
    adapter = write(tmp_path / "adapter", factors | RIDING, **extra)
    (adapter / "README.md").write_bytes(b"# a card\r\n")
    (adapter / "tokenizer.json").write_bytes(b"{}")
    (adapter / "optimizer.pt").write_bytes(b"no")
    report = resized(adapter, tmp_path / "out", "--rank", 2, "--dtype", dtype)
    found = tensors_of(tmp_path / "out")
    assert set(found) == set(factors | RIDING)
    for key, value in RIDING.items():
        assert (found[key].dtype, found[key].tobytes()) == (value.dtype, value.tobytes()), key
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "keep" else np.float32)
    assert {found[key].dtype for key in factors} == {stored}
    config = config_of(tmp_path / "out")
    assert {key: config[key] for key in extra} == extra
    assert (tmp_path / "out" / "README.md").read_bytes() == b"# a card\r\n"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "lora_merge.json", "tokenizer.json",
    ]  # fmt: skip
    check(adapter, tmp_path / "out", report, 1e-2 if dtype == "keep" else 1e-6)
    assert any("lm_head" in note and "bit for bit" in note for note in report["notes"])
    assert any("--dtype float32" in note for note in report["notes"]) == (dtype == "keep")
    assert report["bytes_after"] == sum(value.nbytes for value in found.values())
    assert report["bytes_before"] == sum(value.nbytes for value in (factors | RIDING).values())
    assert report["factor_bytes_after"] == sum(found[key].nbytes for key in factors)


def test_factors_that_stay_are_widened_too(tmp_path: Path) -> None:
    factors = {key: value.astype(np.float16) for key, value in PLAIN.items()}
    report = resized(write(tmp_path / "adapter", factors), tmp_path / "out", "--rank", 8, "--dtype", "float32")
    for key, value in tensors_of(tmp_path / "out").items():
        assert value.dtype == np.float32 and (value == factors[key].astype(np.float32)).all()
    assert {record["dtype_after"] for record in report["modules"]} == {"float32"}


def test_the_bias_of_lora_b_takes_the_scale(tmp_path: Path) -> None:
    bias = {f"{PREFIX}{module}.lora_B.bias": random(out, seed=out) for module, out in ((Q, 20), (V, 24), (DOWN, 16))}
    adapter = write(tmp_path / "adapter", PLAIN | bias, lora_bias=True, use_rslora=True)
    resized(adapter, tmp_path / "out", "--rank", 2)
    found = tensors_of(tmp_path / "out")
    for key, value in bias.items():
        np.testing.assert_allclose(found[key], 15 / 6**0.5 * value, rtol=1e-6)


def test_the_norms_of_dora_are_copied_and_said(tmp_path: Path) -> None:
    magnitude = {
        f"{PREFIX}{module}.lora_magnitude_vector": random(out) for module, out in ((Q, 20), (V, 24), (DOWN, 16))
    }
    adapter = write(tmp_path / "adapter", PLAIN | magnitude, use_dora=True)
    report = resized(adapter, tmp_path / "out", "--rank", 2)
    check(adapter, tmp_path / "out", report)
    found = tensors_of(tmp_path / "out")
    assert all(found[key].tobytes() == value.tobytes() for key, value in magnitude.items())
    assert report["method"] == "DoRA" and any("DoRA" in note and "norm" in note for note in report["notes"])
    assert config_of(tmp_path / "out")["use_dora"] is True


def test_an_attention_block_has_one_rank(tmp_path: Path) -> None:
    """One pattern names both of its layers, so that the one that needs less is padded."""
    factors = linear("attn", 36, 12, 6) | linear("attn.base_layer.out_proj", 12, 12, 6, seed=2)
    factors[f"{PREFIX}attn.base_layer.out_proj.lora_B.weight"][:, 1:] = 0
    adapter = write(tmp_path / "adapter", factors)
    report = resized(adapter, tmp_path / "out", "--energy", 0.95)
    ranks = {record["rank_after"] for record in report["modules"]}
    assert len(ranks) == 1 and ranks < {2, 3, 4, 5}
    for module, delta in deltas(tmp_path / "out").items():
        # The layer inside is called by its path in the model.
        wanted = truncated(deltas(adapter)[module], *ranks)
        assert np.linalg.norm(delta - wanted) <= 1e-6 * np.linalg.norm(wanted)
    assert report["by_module"]["attn"]["energy_kept"] < 1
    assert report["by_module"]["attn.out_proj"]["energy_kept"] == pytest.approx(1, abs=1e-12)


def test_a_delta_of_zeros_has_rank_one(tmp_path: Path) -> None:
    factors = dict(PLAIN)
    factors[f"{PREFIX}{Q}.lora_B.weight"] = 0 * factors[f"{PREFIX}{Q}.lora_B.weight"]
    report = resized(write(tmp_path / "adapter", factors), tmp_path / "out", "--rank", 3)
    record = report["by_module"][Q]
    assert (record["rank_after"], record["energy_kept"], record["relative_error"]) == (1, 1, None)
    assert not deltas(tmp_path / "out")[Q].any()
    assert any("exactly zero" in note for note in report["notes"])


def test_initialisations_go(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", PLAIN, init_lora_weights="orthogonal")
    resized(adapter, tmp_path / "out", "--rank", 3)
    assert config_of(tmp_path / "out")["init_lora_weights"] is True


def test_resizing_again_changes_nothing(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", PLAIN)
    resized(adapter, tmp_path / "one", "--energy", 0.9)
    report = resized(tmp_path / "one", tmp_path / "two", "--energy", 0.5)
    for record in report["modules"]:
        delta = deltas(adapter)[record["module"]]
        wanted = truncated(delta, record["rank_after"])
        assert np.linalg.norm(deltas(tmp_path / "two")[record["module"]] - wanted) <= 1e-5 * np.linalg.norm(delta)
    again = resized(tmp_path / "two", tmp_path / "three", "--rank", 6)
    assert again["relative_error"] == 0


def test_a_dry_run_says_all_and_writes_nothing(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", PLAIN)
    outcome = run("resize", adapter, "--energy", 0.9, "--dry-run", "--json")
    assert outcome.code == 0 and sorted(file.name for file in tmp_path.iterdir()) == ["adapter"]
    planned = json.loads(outcome.stdout)
    validate(planned)
    done = resized(adapter, tmp_path / "out", "--energy", 0.9)
    assert planned["status"] == "planned" and planned["output"] is None and planned["modules"] == done["modules"]


def test_reports(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", PLAIN)
    flags = ("--report", tmp_path / "r.md", "--report", tmp_path / "out" / "r.json")
    outcome = attempt(adapter, tmp_path / "out", "--energy", 0.9, *flags)
    assert outcome.code == 0 and "resized" in outcome.stdout and Q in outcome.stdout
    report = json.loads((tmp_path / "out" / "r.json").read_text())
    validate(report)
    assert report == json.loads((tmp_path / "out" / "lora_merge.json").read_text())
    text = (tmp_path / "r.md").read_text()
    assert text.startswith("# LoRA adapter resized: rank 6 to ") and f"`{Q}`" in text and "90.00%" in text
    assert run("resize", adapter, "-o", tmp_path / "quiet", "--rank", 2, "--quiet").stdout == ""
    assert render(prepare_resize(ResizeRequest(adapter, rank=2)).report, ".md").startswith("# LoRA adapter planned")
    assert run("resize", adapter, "-o", tmp_path / "x", "--rank", 2, "--report", tmp_path / "r.html").code == 2


def test_as_a_library(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", PLAIN)
    report = resize(ResizeRequest(adapter, tmp_path / "out", rank=2))
    assert report.status == "resized" and report.output == str((tmp_path / "out").resolve())
    assert tensors_of(tmp_path / "out")[f"{PREFIX}{Q}.lora_A.weight"].shape == (2, 24)


def test_an_existing_output_is_replaced_if_it_may_be(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", PLAIN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert attempt(adapter, tmp_path / "out", "--rank", 2).code == 5
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
    resized(adapter, tmp_path / "out", "--rank", 2, "--overwrite")
    assert not (tmp_path / "out" / "mine").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "out"]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ((), 2, "either --rank or --energy"),
        (("--rank", 2, "--energy", 0.5), 2, "found both"),
        (("--rank", 0), 2, "at least 1"),
        (("--energy", 0), 2, "above 0"),
        (("--energy", 1.5), 2, "up to 1"),
        (("--energy", "nan"), 2, "up to 1"),
    ],
)
def test_a_cut_that_makes_no_sense(flags: tuple[object, ...], code: int, words: str, tmp_path: Path) -> None:
    outcome = attempt(write(tmp_path / "adapter", PLAIN), tmp_path / "out", *flags)
    assert outcome.code == code and words in outcome.error
    assert not (tmp_path / "out").exists()


def experts() -> dict[str, Array]:
    return {
        f"{PREFIX}mlp.experts.lora_A.weight": random(12, 8),
        f"{PREFIX}mlp.experts.lora_B.weight": random(10, 12),
    }


REFUSED: dict[str, tuple[dict[str, Array], dict[str, Any], int, str]] = {
    "IA3": ({f"{PREFIX}{Q}.ia3_l": random(20, 1)}, {"peft_type": "IA3"}, 4, "IA3"),
    "LoHa": ({f"{PREFIX}{Q}.hada_w1_a": random(20, 6)}, {"peft_type": "LOHA"}, 4, "LOHA"),
    "AdaLoRA": (PLAIN, {"peft_type": "ADALORA"}, 4, "ADALORA"),
    "token rows alone": (
        {f"{PREFIX}embed.trainable_tokens_delta": random(2, 8)},
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": [0, 1]},
        4,
        "TRAINABLE_TOKENS",
    ),
    "keys of another method": (PLAIN | {f"{PREFIX}{V}.lokr_w1": random(3, 3)}, {}, 4, "LoKr"),
    "no factors": (
        {f"{PREFIX}lm_head.weight": random(20, 4)},
        {"modules_to_save": ["lm_head"]},
        4,
        "nothing to resize",
    ),
    "experts": (experts(), {"target_parameters": ["mlp.experts.down_proj"]}, 4, "experts"),
    "experts of another name": (
        {key.replace("experts", "moe"): value for key, value in experts().items()},
        {"target_parameters": ["mlp.moe.down_proj"]},
        4,
        "target_parameters",
    ),
    "experts in wrappers": (
        experts() | {key.replace("experts", "experts.base_layer"): value for key, value in experts().items()},
        {},
        4,
        "experts",
    ),
    "another rank": (PLAIN, {"r": 5}, 4, "another rank"),
    "half a pair": ({f"{PREFIX}{Q}.lora_A.weight": random(6, 8)}, {}, 4, "pair of factors"),
    "an unknown field": (PLAIN, {"use_something": True}, 4, "use_something"),
    "a variant": (PLAIN, {"use_bdlora": {"x": 1}}, 4, "BD-LoRA"),
    "a residual": (PLAIN, {"init_lora_weights": "pissa"}, 4, "initialisation"),
    "half of DoRA": (PLAIN | {f"{PREFIX}{Q}.lora_magnitude_vector": random(20)}, {"use_dora": True}, 4, "magnitudes"),
    "a flat factor": (linear(Q, 20, 24, 6) | {f"{PREFIX}{Q}.lora_A.weight": random(6)}, {}, 4, "shape"),
    "NaN": (PLAIN | {f"{PREFIX}{V}.lora_A.weight": np.full((6, 16), np.nan, np.float32)}, {}, 3, f"{V}.lora_A.weight"),
    "an alpha of text": (PLAIN, {"lora_alpha": "much"}, 3, "lora_alpha"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals(case: tuple[dict[str, Array], dict[str, Any], int, str], tmp_path: Path) -> None:
    tensors, config, code, words = case
    outcome = attempt(write(tmp_path / "adapter", tensors, **config), tmp_path / "out", "--rank", 2)
    assert outcome.code == code, outcome.stderr
    assert words in outcome.error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter"]


def test_a_scale_that_nothing_states(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", PLAIN)
    (adapter / "adapter_config.json").unlink()
    outcome = attempt(adapter, tmp_path / "out", "--rank", 2)
    assert outcome.code == 4 and "scale is not stated" in outcome.error


def test_an_output_that_would_harm_the_adapter(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", PLAIN)
    for out in (adapter, adapter / "inside", adapter / ".." / "adapter" / "x"):
        assert attempt(adapter, out, "--rank", 2, "--overwrite").code == 4
    assert attempt(adapter, tmp_path, "--rank", 2, "--overwrite").code == 4
    assert attempt(adapter, tmp_path / "out.safetensors", "--rank", 2).code == 2
    assert run("resize", adapter, "--rank", 2).code == 2
    assert run("resize", tmp_path / "nothing", "-o", tmp_path / "out", "--rank", 2).code == 3


def test_what_a_narrow_dtype_cannot_hold(tmp_path: Path) -> None:
    big = {key: np.full_like(value, 60000).astype(np.float16) for key, value in PLAIN.items()}
    adapter = write(tmp_path / "adapter", big, lora_alpha=10**7)
    with pytest.raises(Unrepresentable, match="float32"):
        prepare_resize(ResizeRequest(adapter, rank=1))
    assert prepare_resize(ResizeRequest(adapter, rank=1, dtype="float32")).report.energy_kept == pytest.approx(1)


def test_neither_jax_nor_torch_is_needed(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", PLAIN)
    code = (
        "import sys; from lora_merge_cli._cli.app import app\n"
        f"try: app(['resize', {str(adapter)!r}, '--rank', '2', '-o', {str(tmp_path / 'out')!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'jax', 'torch', 'tensorstore'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_torch_file_becomes_safetensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    adapter = write(tmp_path / "adapter", PLAIN)
    torch.save({key: torch.from_numpy(value) for key, value in PLAIN.items()}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    report = resized(adapter, tmp_path / "out", "--rank", 2)
    assert any("adapter_model.safetensors" in note for note in report["notes"])
    check(adapter, tmp_path / "out", report)
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == set(PLAIN)


def test_a_copy_elsewhere_gives_the_same_bytes(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", PLAIN)
    shutil.copytree(adapter, tmp_path / "copy")
    for source in ("adapter", "copy"):
        resized(tmp_path / source, tmp_path / f"out-{source}", "--energy", 0.9)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out-adapter" / name).read_bytes() == (tmp_path / "out-copy" / name).read_bytes()


@pytest.fixture(scope="module")
def cases() -> Any:
    """Tiny models under peft itself."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from tests import peft_cases

    return peft_cases


@pytest.fixture(scope="module")
def models(cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    found = {}
    for kind in ("llama", "gpt2"):
        model = cases.small_model(kind)
        found[kind] = model, cases.save_base(model, tmp_path_factory.mktemp("base") / kind)
    return found


LIVE: dict[str, tuple[str, dict[str, Any], tuple[object, ...]]] = {
    "LoRA": ("llama", {"target_modules": ["q_proj", "down_proj", "lm_head"]}, ("--rank", 2)),
    "to an energy": ("llama", {"target_modules": "all-linear"}, ("--energy", 0.7)),
    "rsLoRA with patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, r"layers.1.mlp.up_proj": 9},
            "alpha_pattern": {"v_proj": 3},
        },
        ("--rank", 3),
    ),
    "a bias on B": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, ("--energy", 0.8)),
    "an odd rank of an orthogonal start": (
        "llama",
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        ("--rank", 3),
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, ("--energy", 0.8)),
    "an embedding": ("gpt2", {"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}, ("--rank", 2)),
    "biases of the base": ("llama", {"target_modules": ["q_proj"], "bias": "all"}, ("--rank", 2)),
}


@pytest.mark.parametrize("live", LIVE.values(), ids=LIVE)
def test_peft_computes_the_truncated_delta(
    live: tuple[str, dict[str, Any], tuple[object, ...]], cases: Any, models: Any, tmp_path: Path
) -> None:
    """Of peft, and of the merge: ``W' - W`` of the resized adapter is NumPy's truncation of that of the original."""
    from peft import LoraConfig

    kind, settings, flags = live
    model, base = models[kind]
    adapter = cases.save_adapter(model, LoraConfig(**({"r": 6, "lora_alpha": 11} | settings)), tmp_path / "adapter")
    report = resized(adapter, tmp_path / "out", *flags)
    assert any(record["rank_after"] < record["rank_before"] for record in report["modules"])
    stored = cases.tensors(base)
    full = cases.merged_by_peft(base, adapter)
    by_peft = cases.merged_by_peft(base, tmp_path / "out")
    merged = cases.merge(base, tmp_path / "out", out=tmp_path / "merged")
    cases.assert_same(merged, by_peft, stored)
    changed = 0
    for name, value in full.items():
        prefix = "transformer." if kind == "gpt2" and not name.startswith("transformer.") else ""
        record = report["by_module"].get(f"{prefix}{name}".removesuffix(".weight"))
        if record is None:
            # Biases too: that of lora_B with the scale in it.
            cases.assert_near(merged[name], value, name)
            continue
        kernel = stored[name].double().numpy()
        wanted = truncated(value.double().numpy() - kernel, record["rank_after"])
        for found in (merged, by_peft):
            difference = np.linalg.norm(found[name].double().numpy() - kernel - wanted)
            assert difference <= 1e-5 * np.linalg.norm(kernel), name
            assert difference <= 1e-4 * np.linalg.norm(wanted), name
        changed += 1
    assert changed == len(report["modules"])
    cases.assert_forward(cases.reloaded(tmp_path / "merged"), cases.with_adapter(base, tmp_path / "out"), model)


def test_peft_loads_a_resized_dora(cases: Any, models: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    from tests.peft_reference import exact

    model, base = models["llama"]
    config = LoraConfig(r=6, lora_alpha=11, target_modules=["q_proj", "up_proj"], use_dora=True, use_rslora=True)
    adapter = cases.save_adapter(model, config, tmp_path / "adapter")
    report = resized(adapter, tmp_path / "out", "--energy", 0.8)
    check(adapter, tmp_path / "out", report)
    stored = cases.tensors(base)
    by_peft = cases.merged_by_peft(base, tmp_path / "out")
    cases.assert_same(cases.merge(base, tmp_path / "out", out=tmp_path / "merged"), by_peft, stored)
    for name, ideal in exact(stored, (tmp_path / "out", 1.0)).items():
        # The new delta, under the old magnitudes.
        np.testing.assert_allclose(by_peft[name].double().numpy(), ideal, atol=1e-5)


def test_peft_on_convolutions_and_attention(cases: Any, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(5, 8, (3, 2))
            self.attn = torch.nn.MultiheadAttention(12, 3)

        def forward(self, x: Any, y: Any) -> Any:
            return self.conv(x), self.attn(y, y, y, need_weights=False)[0]

    torch.manual_seed(0)
    net = Net().eval()
    adapted = cases.train(get_peft_model(net, LoraConfig(r=6, lora_alpha=9, target_modules=["conv", "attn"])))
    adapted.save_pretrained(tmp_path / "adapter")
    plain = Net()
    plain.load_state_dict({k.replace(".base_layer", ""): v for k, v in adapted.get_base_model().state_dict().items() if "lora" not in k})  # fmt: skip
    full = cases.merged_plain(plain, tmp_path / "adapter")
    report = resized(tmp_path / "adapter", tmp_path / "out", "--energy", 0.8)
    found = cases.merged_plain(plain, tmp_path / "out")
    kernels = {k: v.double().numpy() for k, v in plain.state_dict().items()}
    names = {"conv.weight": "conv", "attn.in_proj_weight": "attn", "attn.out_proj.weight": "attn.out_proj"}
    assert set(names.values()) == set(report["by_module"])
    for name, module in names.items():
        kernel = kernels[name].reshape(len(kernels[name]), -1)
        delta = full[name].double().numpy().reshape(kernel.shape) - kernel
        wanted = truncated(delta, report["by_module"][module]["rank_after"])
        new = found[name].double().numpy().reshape(kernel.shape) - kernel
        assert np.linalg.norm(new - wanted) <= 1e-5 * np.linalg.norm(delta), name
        assert np.linalg.norm(new - delta) > 1e-2 * np.linalg.norm(delta), name
