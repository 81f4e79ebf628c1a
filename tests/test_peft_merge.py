"""Merging PEFT adapters of linear layers: what peft's own merge gives, from the files alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402

from tests import peft_cases as cases  # noqa: E402
from tests.command import run  # noqa: E402
from tests.peft_reference import assert_rounded, exact  # noqa: E402

ATTENTION = ["q_proj", "v_proj"]
ALL = "all-linear"


@pytest.fixture(scope="module")
def llama() -> Any:
    return cases.small_model("llama")


@pytest.fixture(scope="module")
def base(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_base(llama, tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def plain(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(r=4, lora_alpha=10, target_modules=ALL)
    return cases.save_adapter(llama, config, tmp_path_factory.mktemp("adapter") / "plain")


METHODS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ATTENTION},
    "every linear layer": {"target_modules": ALL},
    "a regular expression": {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "rank one": {"target_modules": ["q_proj"], "r": 1},
    "alpha below rank": {"target_modules": ATTENTION, "lora_alpha": 1},
    "rsLoRA": {"target_modules": ALL, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, "mlp.down_proj": 8},
        "alpha_pattern": {"v_proj": 3, "mlp.down_proj": 5},
    },
    "patterns that end within a name": {
        "target_modules": ["q_proj", "up_proj"],
        "alpha_pattern": {"proj": 77, "self_attn": 88, "p_proj": 99},
    },
    "patterns that overlap": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"],
        # Training takes the first match as the keys were given, a reader the first one in the file, where they are sorted.
        "rank_pattern": {r"layers\.0\.mlp\.up_proj": 6, "up_proj": 2},
        "alpha_pattern": {"q_proj": 3, r".*o_proj": 5, r"^model.layers.0.self_attn.q_proj": 7, "k_proj|v_proj": 9},
    },
    "patterns with rsLoRA": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "use_rslora": True,
        "rank_pattern": {r"layers.\d.self_attn.[qk]_proj": 2},
        "alpha_pattern": {r"layers.1.*": 3},
    },
    "DoRA": {"target_modules": ALL, "use_dora": True},
    "DoRA with rsLoRA and patterns": {
        "target_modules": ["q_proj", "o_proj"],
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"o_proj": 1},
    },
    "a bias on B": {"target_modules": ALL, "exclude_modules": ["lm_head"], "lora_bias": True},
    "a bias on B with rsLoRA": {"target_modules": ATTENTION, "lora_bias": True, "use_rslora": True},
    "a harmless initialisation": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "dropout": {"target_modules": ATTENTION, "lora_dropout": 0.5},
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_merge_gives_what_pefts_own_gives(method: dict[str, Any], llama: Any, base: Path, tmp_path: Path) -> None:
    adapter = cases.save_adapter(llama, LoraConfig(**({"r": 4, "lora_alpha": 10} | method)), tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(base, adapter), cases.tensors(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision(dtype: Any, llama: Any, base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = cases.copied(plain, tmp_path / "adapter")
    cases.edit_factors(adapter, lambda found: {key: value.to(dtype) for key, value in found.items()})
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(base, adapter), cases.tensors(base))


@pytest.mark.parametrize(("dtype", "dora"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)])
def test_a_base_in_half_precision_is_rounded_once(dtype: Any, dora: bool, tmp_path: Path) -> None:
    model = cases.small_model("llama")
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], use_dora=dora)
    adapter = cases.save_adapter(model, config, tmp_path / "adapter")
    base = cases.save_base(model, tmp_path / "base", dtype)
    stored = cases.tensors(base)
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    ideal = exact(stored, (adapter, 1.0))
    by_peft = cases.merged_by_peft(base, adapter, dtype=dtype)
    for name, value in merged.items():
        assert value.dtype == dtype
        if name in ideal:
            assert_rounded(value, ideal[name], name)
            assert (value == by_peft[name]).double().mean() > 0.99, name
        else:
            assert torch.equal(value, stored[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_is_for_what_changes(dtype: str, base: Path, llama: Any, tmp_path: Path) -> None:
    adapter = cases.save_adapter(llama, LoraConfig(r=4, lora_alpha=10, target_modules=ATTENTION), tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out", flags=("--dtype", dtype))
    ideal = exact(cases.tensors(base), (adapter, 1.0))
    wanted = getattr(torch, dtype)
    assert {name for name, value in merged.items() if value.dtype == wanted} >= set(ideal)
    for name, value in cases.tensors(base).items():
        if name not in ideal:
            assert merged[name].dtype == value.dtype and torch.equal(merged[name], value), name
        elif dtype == "bfloat16":
            assert_rounded(merged[name], ideal[name], name)


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0, 2.0])
def test_a_scale_multiplies_the_delta(scale: float, base: Path, plain: Path, tmp_path: Path) -> None:
    outcome = cases.attempt(base, plain, out=tmp_path / "out", flags=("--scale", scale))
    if scale == 0.0:
        assert outcome.code in (2, 4), "nothing would be merged"
        assert not (tmp_path / "out").exists()
        return
    assert outcome.code == 0, outcome.stderr
    merged = cases.tensors(tmp_path / "out")
    for name, ideal in exact(cases.tensors(base), (plain, scale)).items():
        cases.assert_near(merged[name], torch.from_numpy(ideal), name)


def test_files_beside_the_weights_are_copied(base: Path, plain: Path, tmp_path: Path) -> None:
    cases.merge(base, plain, out=tmp_path / "out")
    before, after = cases.files(base), cases.files(tmp_path / "out")
    assert set(before) <= set(after)
    for name, data in before.items():
        if name != "model.safetensors":
            assert after[name] == data, name
    assert {name for name in set(after) - set(before) if not name.startswith("lora_merge")} == set()
    assert not any("lora_" in key for key in cases.tensors(tmp_path / "out"))


def test_the_result_answers_as_the_adapter_does(base: Path, plain: Path, tmp_path: Path) -> None:
    cases.merge(base, plain, out=tmp_path / "out")
    merged = cases.reloaded(tmp_path / "out")
    cases.assert_forward(merged, cases.with_adapter(base, plain), cases.reloaded(base))


def test_sharded_in_and_sharded_out(llama: Any, base: Path, plain: Path, tmp_path: Path) -> None:
    sharded = cases.save_base(llama, tmp_path / "base", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = cases.merged_by_peft(base, plain)
    one = cases.merge(sharded, plain, out=tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    cases.assert_same(one, expected, cases.tensors(base))
    many = cases.merge(base, plain, out=tmp_path / "many", flags=("--max-shard-size", "20KB"))
    assert {key: value.tolist() for key, value in many.items()} == {key: value.tolist() for key, value in one.items()}
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "many" / "model.safetensors").exists()
    assert index["weight_map"] == {key: shard.name for shard in shards for key in cases.tensors(shard)}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in many.values())
    biggest = max(value.nbytes for value in many.values())
    assert all(sum(v.nbytes for v in cases.tensors(shard).values()) <= max(20_000, biggest) for shard in shards)
    cases.assert_forward(cases.reloaded(tmp_path / "many"), cases.with_adapter(base, plain))


def test_a_pickled_base_and_a_pickled_adapter(llama: Any, base: Path, plain: Path, tmp_path: Path) -> None:
    pickled = cases.save_base(llama, tmp_path / "base")
    torch.save(cases.tensors(pickled), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    adapter = cases.copied(plain, tmp_path / "adapter")
    torch.save(cases.tensors(adapter), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert cases.attempt(pickled, adapter, out=tmp_path / "out", flags=("--to", "safetensors")).code == 0
    cases.assert_same(cases.tensors(tmp_path / "out"), cases.merged_by_peft(base, plain), cases.tensors(base))
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_result_as_pth(base: Path, plain: Path, tmp_path: Path) -> None:
    assert cases.attempt(base, plain, out=tmp_path / "out.pth", flags=("--to", "pth")).code == 0
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    cases.assert_same(found, cases.merged_by_peft(base, plain), cases.tensors(base))


LEGACY = {
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "torch.compile": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "torch.compile outside": lambda key: "_orig_mod." + key,
    "FSDP": lambda key: key.replace("self_attn.", "self_attn._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("rule", LEGACY.values(), ids=LEGACY)
def test_names_of_other_writers(rule: Any, base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = cases.renamed(cases.copied(plain, tmp_path / "adapter"), rule)
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(base, plain), cases.tensors(base))


def test_a_converted_pissa_is_plain(llama: Any, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=10, target_modules=ATTENTION, init_lora_weights="pissa")
    with cases.quiet():
        adapted = get_peft_model(cases.reloaded(base), config)
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(tmp_path / "initial")
        adapted.peft_config["default"].init_lora_weights = "pissa"
        cases.train(adapted)
        adapted.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8
    merged = cases.merge(base, tmp_path / "adapter", out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(base, tmp_path / "adapter"), cases.tensors(base))
    cases.assert_near(cases.logits(cases.reloaded(tmp_path / "out")), cases.logits(adapted), tolerance=1e-4)


def test_a_headless_base_of_an_adapter_with_a_head(llama: Any, plain: Path, base: Path, tmp_path: Path) -> None:
    headless = cases.save_base(llama.model, tmp_path / "base")
    adapter = cases.edit_factors(
        cases.copied(plain, tmp_path / "adapter"),
        lambda found: {key: value for key, value in found.items() if "lm_head" not in key},
    )
    merged = cases.merge(headless, adapter, out=tmp_path / "out")
    expected = {
        key.removeprefix("model."): value
        for key, value in cases.merged_by_peft(base, adapter).items()
        if "lm_head" not in key
    }
    cases.assert_same(merged, expected, cases.tensors(headless))


def test_a_base_with_a_head_of_a_headless_adapter(llama: Any, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=10, target_modules=ATTENTION, task_type="FEATURE_EXTRACTION")
    adapter = cases.save_adapter(llama.model, config, tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    expected = {f"model.{key}": value for key, value in cases.merged_by_peft(base, adapter, AutoModel).items()}
    cases.assert_same(merged, expected | {"lm_head.weight": merged["lm_head.weight"]}, cases.tensors(base))


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "paligemma"])
def test_a_vision_language_model_with_other_names_on_disk(kind: str, tmp_path: Path) -> None:
    model, auto = cases.small_vision_language_model(kind)
    base = cases.save_base(model, tmp_path / "base")
    adapter = cases.save_adapter(model, LoraConfig(r=4, lora_alpha=10, target_modules=ALL), tmp_path / "adapter")
    assert any("vision" in key or "visual" in key for key in cases.tensors(adapter))
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(base, adapter, auto), cases.tensors(base))


def test_a_merge_verified_before_it_appears(base: Path, plain: Path, tmp_path: Path) -> None:
    cases.merge(base, plain, out=tmp_path / "out", flags=("--verify",))


METHODS_TO_VERIFY = ["plain", "patterns that overlap", "DoRA", "a bias on B"]


@pytest.mark.parametrize("name", METHODS_TO_VERIFY)
def test_verify_finds_an_altered_tensor(name: str, llama: Any, base: Path, tmp_path: Path) -> None:
    adapter = cases.save_adapter(
        llama, LoraConfig(**({"r": 4, "lora_alpha": 10} | METHODS[name])), tmp_path / "adapter"
    )
    merged = cases.merge(base, adapter, out=tmp_path / "out", flags=("--verify",))
    judged = ("verify", tmp_path / "out", "--against", base, "--adapter", adapter)
    assert run(*judged).code == 0
    for key in ("model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        altered = {other: value.clone() for other, value in merged.items()}
        altered[key].view(-1)[5] *= 1.01
        save_file(altered, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
        outcome = run(*judged)
        assert outcome.code == 1, key
        assert key.replace(".", "/") in (outcome.stdout + outcome.stderr).replace(".", "/"), key


def test_a_dry_run_writes_nothing(base: Path, plain: Path, tmp_path: Path) -> None:
    outcome = run("merge", base, "--adapter", plain, "--dry-run")
    assert outcome.code == 0, outcome.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_same_merge_gives_the_same_bytes(base: Path, plain: Path, tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        cases.merge(base, plain, out=tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_base_that_is_one_file(base: Path, plain: Path, tmp_path: Path) -> None:
    merged = cases.merge(base / "model.safetensors", plain, out=tmp_path / "out.safetensors")
    cases.assert_same(merged, cases.merged_by_peft(base, plain), cases.tensors(base))


def test_a_causal_model_is_what_auto_loads(base: Path, plain: Path, tmp_path: Path) -> None:
    cases.merge(base, plain, out=tmp_path / "out")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"
