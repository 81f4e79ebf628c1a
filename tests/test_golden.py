"""Checkpoints that OpenPI's own trainer stack wrote, with the dense weights that its own modules act as."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.checkpoints import restore_flat
from tests.command import run
from tests.trees import BFLOAT16

GOLDEN = Path(__file__).parent / "golden"
SAMPLES = Path(__file__).parent.parent / "sample_checkpoints"
TOLERANCE = 2e-6

CASES = {
    "pi0_alpha": (GOLDEN / "pi0_alpha/lora/19999", ["--lora-alpha", "paligemma=12,action_expert=2"]),
    "pi0_fast": (GOLDEN / "pi0_fast/lora", ["--lora-alpha", "4"]),
    "pi0_tiny": (SAMPLES / "pi0_tiny/2999", ["--lora-alpha", "paligemma=8,action_expert=2"]),
    "pi0_fast_tiny": (SAMPLES / "pi0_fast_tiny", []),
}


def expected_of(case: str) -> dict[str, np.ndarray]:
    folder = GOLDEN if (GOLDEN / case).exists() else SAMPLES
    return load_file(folder / case / "expected.safetensors")


def test_a_model_with_its_adapter_beside_it(tmp_path: Path) -> None:
    folder = SAMPLES / "llama_tiny"
    flags = ["--adapter", folder / "adapter", "--dtype", "float32", "-o", tmp_path / "out"]
    outcome = run("merge", folder / "base", *flags, "--verify")
    assert outcome.code == 0, outcome.stderr
    merged, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "expected.safetensors")
    assert merged.keys() == expected.keys()
    for name, reference in expected.items():
        error = np.abs(merged[name].astype(np.float64) - reference).max()
        assert error <= TOLERANCE * np.abs(reference).max(), name


@pytest.mark.parametrize("case", CASES)
def test_every_leaf_is_what_the_trainer_computes(case: str, tmp_path: Path) -> None:
    checkpoint, flags = CASES[case]
    outcome = run("merge", checkpoint, "-o", tmp_path / "out", *flags)
    assert outcome.code == 0, outcome.stderr
    merged = {"/".join(path): values for path, values in restore_flat(tmp_path / "out/params").items()}
    expected = expected_of(case)
    assert merged.keys() == expected.keys()
    for name, reference in expected.items():
        error = np.abs(merged[name].astype(np.float64) - reference).max()
        assert error <= TOLERANCE * np.abs(reference).max(), name


@pytest.mark.parametrize("case", CASES)
def test_untouched_leaves_keep_dtype_and_bits(case: str, tmp_path: Path) -> None:
    checkpoint, flags = CASES[case]
    run("merge", checkpoint, "-o", tmp_path / "out", *flags)
    step = next(path.parent for path in checkpoint.rglob("params"))
    before, after = restore_flat(step / "params"), restore_flat(tmp_path / "out/params")
    touched = {p for p in after if p[-1] in ("w", "gating_einsum", "linear")}
    assert len(after) > len(touched) > 0
    for path in after.keys() - touched:
        assert after[path].dtype == before[path].dtype
        assert after[path].tobytes() == before[path].tobytes(), path


def test_golden_base_gives_back_the_float32_originals(tmp_path: Path) -> None:
    checkpoint, flags = CASES["pi0_alpha"]
    base = GOLDEN / "pi0_alpha/base"
    outcome = run("merge", checkpoint, "-o", tmp_path / "out", *flags, "--base", base, "--json")
    assert outcome.code == 0, outcome.stderr
    merged, plain = restore_flat(tmp_path / "out/params"), restore_flat(checkpoint / "params")
    originals = restore_flat(base / "params")
    expected = expected_of("pi0_alpha")
    changed = 0
    for path, original in originals.items():
        if path in plain and path[-1] in ("w", "gating_einsum", "linear"):
            delta = expected["/".join(path)].astype(np.float64) - plain[path].astype(np.float64)
            ideal = original.astype(np.float64) + delta
            assert np.abs(merged[path] - ideal).max() <= TOLERANCE * np.abs(ideal).max()
            changed += 1
        elif path in plain:
            assert merged[path].tobytes() == plain[path].tobytes()
    assert changed == 10
    assert any("base's own values" in note for note in outcome.json["notes"])


def test_the_wrong_base_is_refused_with_count_and_names(tmp_path: Path) -> None:
    checkpoint, flags = CASES["pi0_alpha"]
    outcome = run("merge", checkpoint, "-o", tmp_path / "out", *flags, "--base", GOLDEN / "pi0_fast/base")
    assert outcome.code == 4
    assert "missing or of another shape" in outcome.error
    assert not (tmp_path / "out").exists()


def test_golden_scale_is_what_its_config_says() -> None:
    info = json.loads((GOLDEN / "pi0_alpha/info.json").read_text())
    outcome = run("inspect", CASES["pi0_alpha"][0], *CASES["pi0_alpha"][1], "--json")
    for site in outcome.json["sites"]:
        variant = "gemma_2b" if site["group"] == "paligemma" else "gemma_300m"
        config = info["loras"][variant]["attn"]
        attention = "einsum" in site["module"] and site["module"] != "gating_einsum"
        assert site["scale"] == (config["alpha"] / config["rank"] if attention else 1)


def test_frozen_leaves_are_those_stored_as_bfloat16() -> None:
    checkpoint = CASES["pi0_alpha"][0]
    outcome = run("inspect", checkpoint, "--base", GOLDEN / "pi0_alpha/base", "--json")
    rows = {row["path"]: row["status"] for row in outcome.json["base"]}
    for path, values in restore_flat(checkpoint / "params").items():
        name = "/".join(("params", *path, "value"))
        if "lora" in name:
            assert rows[name] == "adapter"
        elif values.dtype == BFLOAT16:
            assert rows[name] == "frozen"
        else:
            assert rows[name] in ("moved", "frozen")
