"""MiniMind and Flax NNX, from file to file, and which dialect an adapter is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_merge_cli._cli.parsing import parse_adapters, parse_size
from lora_merge_cli.errors import UsageError
from lora_merge_cli.inputs import AdapterChoice
from tests.checkpoints import restore_flat, save_step
from tests.command import run


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_minimind_adapter(prefix: str, tmp_path: Path) -> None:
    """Base and adapter as its trainer saves them, against the sum in float64, rounded once."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, size: float = 0.3) -> Any:
        return torch.randn(shape, generator=generator) * size

    shapes = {"q_proj": (8, 8), "k_proj": (4, 8), "o_proj": (8, 8)}
    base = {"model.embed_tokens.weight": draw(10, 8).bfloat16()}
    adapter = {}
    for name, (out, inner) in shapes.items():
        key = f"model.layers.0.self_attn.{name}"
        base[f"{key}.weight"] = draw(out, inner).bfloat16()
        if out == inner:
            adapter[f"{prefix}{key}.lora.A.weight"] = draw(3, inner).half()
            adapter[f"{prefix}{key}.lora.B.weight"] = draw(out, 3).half()
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    torch.save(base, tmp_path / "full_sft_512.pth")
    torch.save(adapter, tmp_path / "lora_identity_512.pth")
    out = tmp_path / "merged_512.pth"
    arguments = ["merge", tmp_path / "full_sft_512.pth", "--adapter", tmp_path / "lora_identity_512.pth", "-o", out]
    assert run(*arguments, "--verify").code == 0
    merged = torch.load(out, weights_only=True)
    assert list(merged) == list(base)
    for name, values in base.items():
        stem = prefix + name.removesuffix(".weight")
        ideal = values.double()
        if f"{stem}.lora.A.weight" in adapter:
            ideal = ideal + adapter[f"{stem}.lora.B.weight"].double() @ adapter[f"{stem}.lora.A.weight"].double()
        assert torch.equal(merged[name], ideal.float().bfloat16()), name
    assert merged["lm_head.weight"].data_ptr() == merged["model.embed_tokens.weight"].data_ptr()
    assert out.is_file()


@pytest.mark.parametrize("suffix", [(), ("value",)], ids=["pure", "state"])
def test_flax_layers_in_an_orbax_checkpoint(suffix: tuple[str, ...], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def leaf(*shape: int, dtype: Any = np.float32) -> Any:
        values = rng.normal(size=shape).astype(dtype)
        for name in reversed(suffix):
            values = {name: values}
        return values

    tree = {
        "up": {"kernel": leaf(4, 6), "bias": leaf(6), "lora": {"lora_a": leaf(4, 2), "lora_b": leaf(2, 6)}},
        "down": {
            "base_module": {"kernel": leaf(6, 4, dtype=ml_dtypes.bfloat16)},
            "lora_a": leaf(6, 3),
            "lora_b": leaf(3, 4),
        },
    }
    step = save_step(tmp_path / "in" / "7", tree, assets=False)
    assert run("merge", step, "-o", tmp_path / "out", "--verify").code == 0
    before, after = (restore_flat(path / "params", root=()) for path in (step, tmp_path / "out"))
    assert set(after) == {
        ("up", "kernel"),
        ("up", "bias"),
        ("down", "base_module", "kernel"),
    }
    for kernel, a, b in (
        (("up", "kernel"), ("up", "lora", "lora_a"), ("up", "lora", "lora_b")),
        (("down", "base_module", "kernel"), ("down", "lora_a"), ("down", "lora_b")),
    ):
        w, x, y = (before[path].astype(np.float64) for path in (kernel, a, b))
        found = after[kernel]
        assert found.dtype == before[kernel].dtype
        step_size = 2.0**-8 if found.dtype.itemsize == 2 else 2.0**-22
        np.testing.assert_allclose(found.astype(np.float64), w + x @ y, rtol=step_size, atol=1e-6)


@pytest.fixture
def either(tmp_path: Path) -> tuple[Path, Path]:
    """An adapter with the keys of two trainers, and a base that has all of their modules."""
    rng = np.random.default_rng(0)
    names = ("model.a", "model.b")
    save_file(
        {f"{name}.weight": rng.normal(size=(4, 4)).astype(np.float32) for name in names}, tmp_path / "base.safetensors"
    )
    factors = {"lora.A": (2, 4), "lora.B": (4, 2)}
    keys = {f"model.a.{part}.weight": shape for part, shape in factors.items()}
    keys |= {f"base_model.model.model.b.{part.replace('.', '_')}.weight": shape for part, shape in factors.items()}
    values = {key: rng.normal(size=shape).astype(np.float32) for key, shape in keys.items()}
    save_file(values, tmp_path / "adapter.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"


def test_two_dialects_that_fit_are_listed(either: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = either
    outcome = run("merge", base, "--adapter", adapter, "-o", tmp_path / "out")
    assert outcome.code == 2
    assert "peft" in outcome.error and "minimind" in outcome.error and "--dialect" in outcome.error
    # Named, each finds keys that are not its own: still nothing is dropped in silence.
    for name in ("peft", "minimind"):
        named = run("merge", base, "--adapter", adapter, "-o", tmp_path / "out", "--dialect", name, "--lora-alpha", 4)
        assert named.code in (2, 4) and "--dialect" not in named.error
    assert run("merge", base, "--adapter", adapter, "-o", tmp_path / "out", "--dialect", "openpi").code == 2
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_dialects_on_one_base(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(4, 4)).astype(np.float32)
    save_file({"model.a.weight": kernel}, tmp_path / "base.safetensors")
    a1, b1, a2, b2 = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 4), (4, 2), (3, 4), (4, 3)))
    (tmp_path / "peft").mkdir()
    stem = "base_model.model.model.a"
    save_file(
        {f"{stem}.lora_A.weight": a1, f"{stem}.lora_B.weight": b1}, tmp_path / "peft" / "adapter_model.safetensors"
    )
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    save_file({"model.a.lora.A.weight": a2, "model.a.lora.B.weight": b2}, tmp_path / "mini.safetensors")
    out = tmp_path / "out.safetensors"
    adapters = ["--adapter", f"{tmp_path / 'peft'}@0.7", "--adapter", f"{tmp_path / 'mini.safetensors'}@-0.4"]
    outcome = run("merge", tmp_path / "base.safetensors", *adapters, "-o", out, "--verify", "--json")
    assert outcome.code == 0
    wide = [values.astype(np.float64) for values in (kernel, a1, b1, a2, b2)]
    ideal = wide[0] + 0.7 * 3.0 * wide[2] @ wide[1] - 0.4 * wide[4] @ wide[3]
    from safetensors.numpy import load_file

    np.testing.assert_allclose(load_file(out)["model.a.weight"], ideal, rtol=2e-6, atol=2e-6)
    sites = outcome.json["sites"]
    assert [(site["adapter"], site["weight"], site["rank"], site["scale"]) for site in sites] == [
        (0, 0.7, 2, 3.0),
        (1, -0.4, 3, 1.0),
    ]


def test_an_adapter_where_a_checkpoint_is_wanted_is_named(either: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    either[1].rename(folder / "adapter_model.safetensors")
    outcome = run("merge", folder, "-o", tmp_path / "out")
    assert outcome.code == 3
    assert "--adapter" in outcome.error


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("runs/a", "runs/a", 1.0),
        ("runs/a@0.7", "runs/a", 0.7),
        ("runs/a@-4e-1", "runs/a", -0.4),
        ("runs/a@home", "runs/a@home", 1.0),
        ("me@work/a", "me@work/a", 1.0),
        ("me@work/a@2", "me@work/a", 2.0),
        ("@2", "@2", 1.0),
    ],
)
def test_an_at_sign_is_a_weight_only_if_a_number_follows(text: str, path: str, weight: float) -> None:
    assert parse_adapters([text]) == (AdapterChoice(Path(path), weight),)


@pytest.mark.parametrize("text", ["a@nan", "a@inf"])
def test_weights_that_are_no_numbers(text: str) -> None:
    with pytest.raises(UsageError):
        parse_adapters([text])


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2GiB", 2**31), ("7", 7), ("3m", 3 * 10**6)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_base_is_for_adapters_inside(either: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = either
    outcome = run("merge", base, "--adapter", adapter, "--base", base, "-o", tmp_path / "out")
    assert (outcome.code, "--base" in outcome.error) == (2, True)


def peft_adapter(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}))
    return folder


def test_token_rows_of_an_embedding_that_the_adapter_resized(tmp_path: Path) -> None:
    """The adapter's own embedding, longer than the base's, and trained rows in it, old and new ones."""
    rng = np.random.default_rng(2)
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    embedding, resized, rows = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 4), (9, 4), (3, 4)))
    save_file({"model.embed_tokens.weight": embedding, "lm_head.weight": embedding * 2}, base)
    stem = "base_model.model.model.embed_tokens.token_adapter"
    tensors = {f"{stem}.base_layer.weight": resized, f"{stem}.trainable_tokens_delta": rows}
    tensors["base_model.model.lm_head.weight"] = resized * 3
    adapter = peft_adapter(tmp_path / "adapter", tensors, trainable_token_indices=[8, 0, 5])
    assert run("merge", base, "--adapter", adapter, "-o", out, "--verify").code == 0
    from safetensors.numpy import load_file

    expected = resized.copy()
    expected[[8, 0, 5]] = rows
    merged = load_file(out / "model.safetensors")
    assert merged["model.embed_tokens.weight"].tobytes() == expected.tobytes()
    assert merged["lm_head.weight"].tobytes() == (resized * 3).tobytes()


def test_factors_for_another_size_than_a_second_adapter_brings(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    base = tmp_path / "base.safetensors"
    save_file({"model.embed_tokens.weight": rng.normal(size=(6, 4)).astype(np.float32)}, base)
    stem = "base_model.model.model.embed_tokens"
    longer = peft_adapter(tmp_path / "one", {f"{stem}.weight": rng.normal(size=(9, 4)).astype(np.float32)})
    factors = {f"{stem}.lora_embedding_A": (2, 6), f"{stem}.lora_embedding_B": (4, 2)}
    values = {key: rng.normal(size=shape).astype(np.float32) for key, shape in factors.items()}
    lora = peft_adapter(tmp_path / "two", values)
    for order in ((longer, lora), (lora, longer)):
        flags = [part for adapter in order for part in ("--adapter", adapter)]
        outcome = run("merge", base, *flags, "-o", tmp_path / "out")
        assert outcome.code == 4 and outcome.error
        assert not (tmp_path / "out").exists()


def test_what_is_merged_can_be_taken_out_and_not_put_in_twice(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    base = tmp_path / "base.safetensors"
    kernel = rng.normal(size=(4, 4)).astype(np.float32)
    save_file({"model.a.weight": kernel}, base)
    stem = "base_model.model.model.a"
    factors = {f"{stem}.lora_A.weight": (2, 4), f"{stem}.lora_B.weight": (4, 2)}
    values = {key: rng.normal(size=shape).astype(np.float32) for key, shape in factors.items()}
    adapter = peft_adapter(tmp_path / "adapter", values)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert run("merge", base, "--adapter", f"{adapter}@0.5", "-o", first).code == 0
    assert run("merge", first, "--adapter", f"{adapter}@0.5", "-o", second).code == 4
    assert run("merge", first, "--adapter", f"{adapter}@-0.5", "-o", second).code == 0
    from safetensors.numpy import load_file

    np.testing.assert_allclose(load_file(second)["model.a.weight"], kernel, rtol=1e-6, atol=1e-6)
    # Taken out, it may be merged again.
    assert run("merge", second, "--adapter", adapter, "-o", tmp_path / "third.safetensors").code == 0


def test_nothing_at_weight_zero(tmp_path: Path) -> None:
    save_file({"score.weight": np.ones((2, 4), np.float32)}, tmp_path / "base.safetensors")
    adapter = peft_adapter(tmp_path / "adapter", {"base_model.model.score.weight": np.zeros((2, 4), np.float32)})
    outcome = run("merge", tmp_path / "base.safetensors", "--adapter", f"{adapter}@0", "-o", tmp_path / "out")
    assert (outcome.code, "weight is 0" in outcome.error) == (4, True)


@pytest.mark.parametrize("flags", [[], ["--dtype", "keep"]])
def test_an_unscaled_float8_kernel_keeps_its_dtype(flags: list[str], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    kernel = (torch.arange(16.0).reshape(4, 4) / 4).to(torch.float8_e4m3fn)
    save({"model.a.weight": kernel}, tmp_path / "base.safetensors")
    a, b = torch.ones(2, 4), torch.full((4, 2), 0.125)
    stem = "base_model.model.model.a"
    tensors = {f"{stem}.lora_A.weight": a.numpy(), f"{stem}.lora_B.weight": b.numpy()}
    adapter = peft_adapter(tmp_path / "adapter", tensors)
    out = tmp_path / "out.safetensors"
    assert run("merge", tmp_path / "base.safetensors", "--adapter", adapter, "-o", out, *flags).code == 0
    ideal = (kernel.double() + 3 * b.double() @ a.double()).float().to(torch.float8_e4m3fn)
    assert torch.equal(load(out)["model.a.weight"].view(torch.uint8), ideal.view(torch.uint8))


def test_a_resized_vocabulary_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    names = ("model.embed_tokens.weight", "lm_head.weight")
    old = {name: rng.normal(size=(6, 4)).astype(np.float32) for name in names}
    save_file({**old, "model.a.weight": rng.normal(size=(4, 4)).astype(np.float32)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": False, "vocab_size": 6}))
    tensors = {f"base_model.model.{name}": rng.normal(size=(9, 4)).astype(np.float32) for name in names}
    stem = "base_model.model.model.a"
    tensors |= {
        f"{stem}.lora_A.weight": np.ones((2, 4), np.float32),
        f"{stem}.lora_B.weight": np.ones((4, 2), np.float32),
    }
    adapter = peft_adapter(tmp_path / "adapter", tensors)
    flags = ["merge", base, "--adapter", adapter, "-o", out, "--overwrite", "--verify"]
    for more, size in (([], 9), (["--include", "model.a.*"], 6), (["--exclude", "a"], 9)):
        assert run(*flags, *more).code == 0
        assert json.loads((out / "config.json").read_text())["vocab_size"] == size
        from safetensors.numpy import load_file

        assert {values.shape for name, values in load_file(out / "model.safetensors").items() if name in names} == {
            (size, 4)
        }
    assert run(*flags, "--exclude", "lm_head*").code == 2


def test_options_of_inspect_that_an_adapter_has_no_use_for(either: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = either
    factors = {"lora_A": (2, 4), "lora_B": (4, 2)}
    stem = "base_model.model.model.a"
    adapter = peft_adapter(
        tmp_path / "a", {f"{stem}.{part}.weight": np.ones(shape, np.float32) for part, shape in factors.items()}
    )
    assert run("inspect", adapter).code == 0
    for flags in (["--stats"], ["--base", base]):
        assert (run("inspect", adapter, *flags).code, run("inspect", adapter, *flags).stdout) == (2, "")
    assert run("inspect", base, "--adapter", adapter, "--base", base).code == 2
    shown = run("inspect", base, "--adapter", adapter, "--stats", "--json").json
    assert shown["adapters"][0]["matched"] == shown["adapters"][0]["leaves"] == 2
    assert shown["sites"][0]["stats"]["non_finite"] == 0
