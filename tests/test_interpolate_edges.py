"""Interpolation where the two sides are unlike, tied, wide or no floats at all, and outputs that are there already."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import restore_flat, save_step
from tests.command import run
from tests.interpolation import llama_tensors, read_model, same_bits, write_model


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(1)
    return write_model(tmp_path / "b", llama_tensors(rng)), write_model(tmp_path / "t", llama_tensors(rng))


def test_tied_leaves_part_where_their_alphas_do(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    paths, sides = [], []
    for name in "bt":
        shared = torch.from_numpy(rng.normal(0, 1, (6, 4)).astype(np.float32))
        sides.append(shared.numpy().astype(np.float64))
        paths.append(tmp_path / f"{name}.pth")
        torch.save({"model.embed_tokens.weight": shared, "lm_head.weight": shared}, paths[-1])
    rules = ("--alpha-for", "lm_head*=0", "--alpha", 0, "--alpha", 0.5)
    done = run("interpolate", *paths, "-o", tmp_path / "s", *rules)
    assert done.code == 0, done.stderr
    (file,) = (tmp_path / "s" / "alpha-0.5").glob("*.pth")
    found = torch.load(file, weights_only=True)
    assert np.allclose(found["lm_head.weight"], sides[0], rtol=1e-6)
    assert np.allclose(found["model.embed_tokens.weight"], (sides[0] + sides[1]) / 2, rtol=1e-6)


def test_resume_looks_at_what_is_there(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    flags = ("interpolate", base, tuned, "-o", tmp_path / "s", "--alpha", "0:1:0.5", "--resume")
    assert run(*flags).code == 0
    assert run(*flags, "--verify").code == 0
    file = tmp_path / "s" / "alpha-0.5" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    cut = run(*flags)
    assert cut.code == 5 and "fewer bytes" in cut.error
    file.write_bytes(whole[:-4] + b"\0\0\0\x40")
    assert run(*flags).code == 0
    judged = run(*flags, "--verify")
    assert judged.code == 7 and "fails" in judged.stderr


def test_resume_after_more_training(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    flags = ("interpolate", base, tuned, "-o", tmp_path / "s", "--alpha", "0:1:0.5", "--resume")
    assert run(*flags).code == 0
    file = tuned / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\0\x40")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    again = run(*flags)
    assert again.code == 5 and "other inputs" in again.error


def test_a_second_sweep_does_not_replace_the_summary(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    flags = ("interpolate", base, tuned, "-o", tmp_path / "s", "--alpha")
    assert run(*flags, "0:1:0.5").code == 0
    refused = run(*flags, "0.25:0.75:0.5")
    assert refused.code == 5 and "summary" in refused.error
    assert not (tmp_path / "s" / "alpha-0.25").exists()
    assert run(*flags, "0.25:0.75:0.5", "--resume").code == 0


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_several_outputs_are_no_file(suffix: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("interpolate", *pair, "-o", tmp_path / f"s{suffix}", "--alpha", "0:1:0.5")
    assert done.code == 2 and "one file" in done.error
    (tmp_path / "s").write_text("here")
    done = run("interpolate", *pair, "-o", tmp_path / "s", "--alpha", "0:1:0.5")
    assert done.code == 5 and "something else" in done.error


def test_the_base_decides_about_the_configuration_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    start, end = llama_tensors(rng), llama_tensors(rng)
    del start["lm_head.weight"]
    end["model.embed_tokens.weight"] = rng.normal(0, 1, (22, 8)).astype(np.float32)
    base = write_model(tmp_path / "b", start, vocab_size=20, tie_word_embeddings=True)
    tuned = write_model(tmp_path / "t", end, vocab_size=22, tie_word_embeddings=False)
    flags = ("--alpha", 0.5, "--only-common", "base")
    assert run("interpolate", base, tuned, "-o", tmp_path / "o", *flags).code == 0
    assert "lm_head.weight" not in read_model(tmp_path / "o")
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (20, True)
    judged = ("verify", tmp_path / "o", "--against", tuned, "--base", base, *flags)
    assert run(*judged).code == 0
    config["vocab_size"] = 22
    (tmp_path / "o" / "config.json").write_text(json.dumps(config))
    assert run(*judged).code == 1


@pytest.mark.parametrize("dtype", ["keep", "float32", "float16"])
def test_float64_rounds_once(dtype: str, tmp_path: Path) -> None:
    wide = {"keep": np.float64}.get(dtype, np.dtype(dtype if dtype != "keep" else "float64"))
    start = {"model.norm.weight": np.array([1 + 2.0**-11 + 2.0**-40, -0.0, 3.0])}
    end = {"model.norm.weight": np.array([1.0, 2.0, 1 + 2.0**-11 + 2.0**-40])}
    base, tuned = write_model(tmp_path / "b", start), write_model(tmp_path / "t", end)
    assert run("interpolate", base, tuned, "-o", tmp_path / "s", "--alpha", "0:1:0.5", "--dtype", dtype).code == 0
    for name, ideal in (("0", start), ("1", end)):
        found = read_model(tmp_path / "s" / f"alpha-{name}")["model.norm.weight"]
        assert same_bits(found, ideal["model.norm.weight"].astype(wide))
    between = (start["model.norm.weight"] + end["model.norm.weight"]) / 2
    found = read_model(tmp_path / "s" / "alpha-0.5")["model.norm.weight"]
    assert np.allclose(found, between.astype(wide), rtol=1e-12)
    for name in ("0", "0.5", "1"):
        sides = ("--against", tuned, "--base", base)
        assert run("verify", tmp_path / "s" / f"alpha-{name}", *sides, "--alpha", name).code == 0


@pytest.mark.parametrize("alpha", [0.5, 1])
def test_what_does_not_fit_is_refused(alpha: float, tmp_path: Path) -> None:
    start, end = {"model.norm.weight": np.ones(3)}, {"model.norm.weight": np.array([1.0, 1e300, 1.0])}
    base, tuned = write_model(tmp_path / "b", start), write_model(tmp_path / "t", end)
    done = run("interpolate", base, tuned, "-o", tmp_path / "o", "--alpha", alpha, "--dtype", "float32")
    assert done.code == 4 and "overflows float32" in done.error


def test_numbers_of_other_kinds_are_other_leaves(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    start, end = llama_tensors(rng), llama_tensors(rng)
    start["model.ids"], end["model.ids"] = np.array([2**40 + 6]), np.array([5], np.int32)
    base, tuned = write_model(tmp_path / "b", start), write_model(tmp_path / "t", end)
    done = run("interpolate", base, tuned, "-o", tmp_path / "o", "--alpha", 0)
    assert done.code == 4 and "model.ids" in done.error
    assert run("interpolate", base, tuned, "-o", tmp_path / "o", "--alpha", 0, "--only-common", "base").code == 0
    assert same_bits(read_model(tmp_path / "o")["model.ids"], start["model.ids"])


def test_a_wrapped_fine_tune_gets_the_bases_leaves_under_its_own_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    start, end = llama_tensors(rng), llama_tensors(rng)
    start["model.extra.weight"] = np.ones(3, np.float32)
    base = write_model(tmp_path / "b", start)
    tuned = write_model(tmp_path / "t", {f"module.{name}": values for name, values in end.items()})
    done = run("interpolate", base, tuned, "-o", tmp_path / "o", "--alpha", 0.5, "--only-common", "base")
    assert done.code == 0, done.stderr
    assert read_model(tmp_path / "o").keys() == {f"module.{name}" for name in start}


@pytest.mark.parametrize("flags", [("--include", "lm_head*"), ("--exclude", "nothing"), ("--scale", 2)])
def test_flags_of_adapters_need_some(flags: tuple[object, ...], pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("interpolate", *pair, "-o", tmp_path / "o", "--alpha", 0.5, *flags)
    assert done.code == 2 and str(flags[0]) in done.error


def test_nothing_in_common(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = write_model(tmp_path / "b", {"model.a.weight": rng.normal(0, 1, 3).astype(np.float32)})
    tuned = write_model(tmp_path / "t", {"model.c.weight": rng.normal(0, 1, 3).astype(np.float32)})
    done = run("interpolate", base, tuned, "-o", tmp_path / "o", "--alpha", 0.5, "--only-common", "tuned")
    assert done.code == 4 and "no leaf in common" in done.error


def test_more_alphas_than_one_reading_is_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = run("interpolate", *pair, "-o", tmp_path / "s", "--alpha", "0:1:0.05", "--json").json
    assert [point["status"] for point in report["points"]] == ["written"] * 21
    one, other = (read_model(tmp_path / "s" / f"alpha-{name}")["lm_head.weight"] for name in ("0.05", "0.95"))
    assert not same_bits(one, other)


def test_an_nnx_fine_tune_moves_what_it_trained(tmp_path: Path) -> None:
    """NNX stores what it froze and what it trained alike: only the kernels under adapters must be the base's."""
    rng = np.random.default_rng(2)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    kernel, a, b = normal(6, 5), normal(6, 2), normal(2, 5)
    head = {"kernel": {"value": normal(5, 3)}, "bias": {"value": normal(3)}}
    moved = {"kernel": {"value": normal(5, 3)}, "bias": head["bias"]}
    layer = {"kernel": {"value": kernel}}
    tuned = {"dense": {**layer, "lora": {"lora_a": {"value": a}, "lora_b": {"value": b}}}, "head": moved}
    paths = [
        save_step(tmp_path / name / "1", tree) for name, tree in (("b", {"dense": layer, "head": head}), ("t", tuned))
    ]
    done = run("interpolate", *paths, "-o", tmp_path / "o", "--alpha", 0.25)
    assert done.code == 0, done.stderr
    found = restore_flat(tmp_path / "o" / "params", root=())
    assert np.allclose(found["dense", "kernel"], kernel + 0.25 * a.astype(np.float64) @ b, atol=1e-6)
    ideal = 0.75 * head["kernel"]["value"] + 0.25 * moved["kernel"]["value"]
    assert np.allclose(found["head", "kernel"], ideal, atol=1e-6)
    assert same_bits(found["head", "bias"], head["bias"]["value"])


def test_float64_differences_beyond_float64(tmp_path: Path) -> None:
    largest = np.finfo(np.float64).max
    start, end = {"model.norm.weight": np.array([largest, 1.0])}, {"model.norm.weight": np.array([-largest, 2.0])}
    base, tuned = write_model(tmp_path / "b", start), write_model(tmp_path / "t", end)
    assert run("interpolate", base, tuned, "-o", tmp_path / "o", "--alpha", 0.25).code == 0
    assert np.allclose(read_model(tmp_path / "o")["model.norm.weight"], [0.5 * largest, 1.25], rtol=1e-15)
    refused = run("interpolate", base, tuned, "-o", tmp_path / "p", "--alpha", 2, "--extrapolate")
    assert refused.code == 4 and "overflows float64" in refused.error
