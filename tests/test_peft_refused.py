"""PEFT adapters that must not be merged: exit 4 (3 where a file is at fault), nothing at OUT, one line that names the culprit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import peft  # noqa: E402
from peft import LoraConfig  # noqa: E402
from peft.tuners.lora import BdLoraConfig, KasaConfig  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tests import peft_cases as cases  # noqa: E402

R = {"r": 4, "lora_alpha": 10}
QV = ["q_proj", "v_proj"]
A_FACTOR = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B_FACTOR = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def llama() -> Any:
    return cases.small_model("llama")


@pytest.fixture(scope="module")
def base(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_base(llama, tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def plain(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_adapter(llama, LoraConfig(**R, target_modules=QV), tmp_path_factory.mktemp("adapter") / "plain")


def _refused(base: Path, adapter: Path, out: Path, *words: str, code: int = 4) -> str:
    outcome = cases.attempt(base, adapter, out=out)
    assert outcome.code == code, outcome.stderr
    assert not out.exists()
    assert {path.name for path in out.parent.iterdir()} <= {"adapter", "base", "other"}, "something is left beside OUT"
    for word in words:
        assert word.lower() in outcome.error.lower(), outcome.error
    return outcome.error


INITIALISATIONS: dict[str, tuple[Any, str]] = {
    "PiSSA": (LoraConfig(**R, target_modules=QV, init_lora_weights="pissa"), "pissa"),
    "fast PiSSA": (LoraConfig(**R, target_modules=QV, init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "OLoRA": (LoraConfig(**R, target_modules=QV, init_lora_weights="olora"), "olora"),
    "layer_replication": (LoraConfig(**R, target_modules=QV, layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "aLoRA": (LoraConfig(**R, target_modules=QV, task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]), "alora"),
    "KaSA": (LoraConfig(**R, target_modules=QV, kasa_config=KasaConfig()), "kasa"),
    "BD-LoRA": (
        LoraConfig(
            **R,
            target_modules=QV,
            use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False),
        ),
        "bdlora",
    ),
}


@pytest.mark.parametrize(("config", "word"), INITIALISATIONS.values(), ids=INITIALISATIONS)
def test_variants_of_lora_that_are_no_addition(config: Any, word: str, base: Path, tmp_path: Path) -> None:
    cases.save_adapter(cases.reloaded(base), config, tmp_path / "adapter")
    _refused(base, tmp_path / "adapter", tmp_path / "out", word)


SETTINGS: dict[str, dict[str, Any]] = {
    "corda": {"init_lora_weights": "corda"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "loftq": {"init_lora_weights": "loftq"},
    "an_initialisation_of_tomorrow": {"init_lora_weights": "an_initialisation_of_tomorrow"},
    "use_qalora": {"use_qalora": True},
    "arrow_config": {"arrow_config": {"top_k": 3}},
    "megatron_config": {"megatron_config": {"a": 1}},
    "use_of_tomorrow": {"use_of_tomorrow": True},
    "config_of_tomorrow": {"config_of_tomorrow": {"a": 1}},
    "MULTI": {"peft_type": "MULTI"},
    "XLORA": {"peft_type": "XLORA"},
    "peft_type": {"peft_type": None},
}


@pytest.mark.parametrize("word", SETTINGS)
def test_settings_that_change_what_is_computed(word: str, base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = cases.edit_config(cases.copied(plain, tmp_path / "adapter"), **SETTINGS[word])
    _refused(base, adapter, tmp_path / "out", word)


def test_settings_of_tomorrow_that_are_off_do_not_matter(base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = cases.copied(plain, tmp_path / "adapter")
    cases.edit_config(adapter, use_a=False, b_config=None, c_pattern={}, d_list=[])
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(base, plain), cases.tensors(base))


METHODS: dict[str, Callable[[], Any]] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1),
    "VERA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj", "o_proj"], save_projection=False),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=QV),
    "ROAD": lambda: peft.RoadConfig(group_size=4, target_modules=QV),
    "VBLORA": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, topk=2, target_modules=QV),
    "GRALORA": lambda: peft.GraloraConfig(r=4, gralora_k=2, target_modules=QV),
    "POLY": lambda: peft.PolyConfig(r=2, target_modules=QV),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_named(method: str, base: Path, llama: Any, tmp_path: Path) -> None:
    cases.save_adapter(llama, METHODS[method](), tmp_path / "adapter")
    _refused(base, tmp_path / "adapter", tmp_path / "out", method)


def _without(*names: str) -> Callable[[cases.Tensors], cases.Tensors]:
    return lambda found: {key: value for key, value in found.items() if key not in names}


def _with(name: str, value: Any) -> Callable[[cases.Tensors], cases.Tensors]:
    return lambda found: found | {name: value(found) if callable(value) else value}


def _spoilt(value: float) -> Callable[[cases.Tensors], cases.Tensors]:
    def change(found: cases.Tensors) -> cases.Tensors:
        found[A_FACTOR][1, 3] = value
        return found

    return change


def _zeroed(found: cases.Tensors) -> cases.Tensors:
    return {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in found.items()}


EXTRA = "base_model.model.model.layers.0.self_attn.k_proj.lora_C.weight"
NOWHERE = "base_model.model.model.layers.9.self_attn.q_proj"
MAGNITUDE = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"
NORM = "base_model.model.model.norm.weight"
TENSORS: dict[str, tuple[Callable[[cases.Tensors], Any], tuple[str, ...], int]] = {
    "B is missing": (_without(B_FACTOR), ("layers.1.self_attn.q_proj",), 4),
    "A is missing": (_without(A_FACTOR), ("layers.1.self_attn.q_proj",), 4),
    "every B is missing": (lambda found: {k: v for k, v in found.items() if "lora_A" in k}, ("lora_A",), 4),
    "an unknown factor": (_with(EXTRA, torch.ones(4, 32)), ("lora_C",), 4),
    "a tensor of no base": (_with("base_model.model.model.extra.thing", torch.ones(4)), ("extra",), 4),
    "a layer that the base has not": (
        lambda found: (
            found
            | {f"{NOWHERE}.lora_A.weight": found[A_FACTOR].clone(), f"{NOWHERE}.lora_B.weight": found[B_FACTOR].clone()}
        ),
        ("layers.9.self_attn.q_proj",),
        4,
    ),
    "no name fits": (
        lambda found: {k.replace("self_attn", "attention"): v for k, v in found.items()},
        ("attention",),
        4,
    ),
    "a magnitude without DoRA": (_with(MAGNITUDE, torch.ones(32)), ("magnitude", "layers.1.self_attn.q_proj"), 4),
    "another rank in one layer": (
        lambda found: found | {A_FACTOR: torch.ones(3, 32), B_FACTOR: torch.ones(32, 3)},
        ("layers.1.self_attn.q_proj", "3", "4"),
        4,
    ),
    "ranks that differ": (_with(A_FACTOR, torch.ones(3, 32)), ("layers.1.self_attn.q_proj",), 4),
    "another width": (_with(A_FACTOR, torch.ones(4, 40)), ("layers.1.self_attn.q_proj", "40"), 4),
    "a replacement of another shape": (_with(NORM, torch.ones(40)), ("norm.weight", "40"), 4),
    "nothing but zeros": (_zeroed, ("zero",), 4),
    "nothing": (lambda found: {}, (), 4),
    "NaN": (_spoilt(float("nan")), ("layers.1.self_attn.q_proj",), 3),
    "infinity": (_spoilt(float("inf")), ("layers.1.self_attn.q_proj",), 3),
}


@pytest.mark.parametrize(("change", "words", "code"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit(
    change: Any, words: tuple[str, ...], code: int, base: Path, plain: Path, tmp_path: Path
) -> None:
    adapter = cases.edit_factors(cases.copied(plain, tmp_path / "adapter"), change)
    found = _refused(base, adapter, tmp_path / "out", code=code).replace("/", ".")
    assert all(word in found for word in words), found


def test_a_rank_that_no_tensor_has(base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = cases.edit_config(cases.copied(plain, tmp_path / "adapter"), r=8)
    _refused(base, adapter, tmp_path / "out", "q_proj", "8", "4")


def test_a_rank_pattern_that_the_tensors_deny(base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = cases.edit_config(cases.copied(plain, tmp_path / "adapter"), rank_pattern={"v_proj": 2})
    _refused(base, adapter, tmp_path / "out", "v_proj")


def test_a_configuration_without_a_rank_stands_for_pefts_default(base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = cases.copied(plain, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["r"]
    path.write_text(json.dumps(config))
    _refused(base, adapter, tmp_path / "out", "q_proj", "8", "4")


def test_dora_without_a_magnitude(llama: Any, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(**R, target_modules=QV, use_dora=True)
    adapter = cases.save_adapter(llama, config, tmp_path / "adapter")
    cases.edit_factors(adapter, _without(MAGNITUDE))
    error = _refused(base, adapter, tmp_path / "out", "magnitude").replace("/", ".")
    assert "layers.1.self_attn.q_proj" in error


def test_a_bias_on_b_where_the_base_has_no_bias(llama: Any, tmp_path: Path) -> None:
    adapter = cases.save_adapter(llama, LoraConfig(**R, target_modules=QV, lora_bias=True), tmp_path / "adapter")
    bare = cases.save_base(cases.small_model("llama", attention_bias=False), tmp_path / "base")
    _refused(bare, adapter, tmp_path / "out", "q_proj", "bias")


def test_token_rows_past_the_end(llama: Any, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(**R, target_modules=QV, trainable_token_indices=[3, 17])
    adapter = cases.save_adapter(llama, config, tmp_path / "adapter")
    cases.edit_config(adapter, trainable_token_indices=[3, 96])
    _refused(base, adapter, tmp_path / "out", "96", "embed_tokens")


def test_fewer_token_rows_than_their_numbers(llama: Any, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(**R, target_modules=QV, trainable_token_indices=[3, 17])
    adapter = cases.save_adapter(llama, config, tmp_path / "adapter")
    cases.edit_config(adapter, trainable_token_indices=[3, 17, 18])
    _refused(base, adapter, tmp_path / "out", "embed_tokens")


def test_an_adapter_of_a_larger_model(base: Path, tmp_path: Path) -> None:
    larger = cases.small_model("llama", hidden_size=64)
    adapter = cases.save_adapter(larger, LoraConfig(**R, target_modules=QV), tmp_path / "adapter")
    _refused(base, adapter, tmp_path / "out", "q_proj", "64", "32")


QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_base(method: str, base: Path, plain: Path, tmp_path: Path) -> None:
    quantised = cases.copied(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": QUANTISED[method]}
    (quantised / "config.json").write_text(json.dumps(config))
    _refused(quantised, plain, tmp_path / "out", "quanti", method)


def test_kernels_of_integers(base: Path, plain: Path, tmp_path: Path) -> None:
    quantised = cases.copied(base, tmp_path / "base")
    stored = cases.tensors(base)
    key = "model.layers.0.self_attn.q_proj.weight"
    stored[key] = (stored[key] * 100).to(torch.int8)
    save_file(stored, quantised / "model.safetensors", metadata={"format": "pt"})
    error = _refused(quantised, plain, tmp_path / "out", "int8").replace("/", ".")
    assert "layers.0.self_attn.q_proj" in error


def test_a_tied_base_whose_two_tensors_differ(tmp_path: Path) -> None:
    model = cases.small_model("llama", tie_word_embeddings=True)
    base = cases.save_base(model, tmp_path / "base")
    stored = cases.tensors(base)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(**R, target_modules=["embed_tokens"])
    adapter = cases.save_adapter(model, config, tmp_path / "adapter")
    _refused(base, adapter, tmp_path / "out", "lm_head", "embed_tokens")


BROKEN: dict[str, Callable[[Path], object]] = {
    "a configuration that is no JSON": lambda path: (path / "adapter_config.json").write_text('{"r": 4,'),
    "a configuration that is a list": lambda path: (path / "adapter_config.json").write_text("[]"),
    "no tensors": lambda path: (path / "adapter_model.safetensors").unlink(),
    "half a file": lambda path: (path / "adapter_model.safetensors").write_bytes(
        (path / "adapter_model.safetensors").read_bytes()[:-100]
    ),
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_files_that_cannot_be_read(spoil: Any, base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = cases.copied(plain, tmp_path / "adapter")
    spoil(adapter)
    _refused(base, adapter, tmp_path / "out", "adapter", code=3)


def test_no_adapter_there(base: Path, tmp_path: Path) -> None:
    outcome = cases.run("merge", base, "--adapter", tmp_path / "adapter", "-o", tmp_path / "out")
    assert outcome.code == 3
    assert str(tmp_path / "adapter") in outcome.error
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_a_base(plain: Path, base: Path, tmp_path: Path) -> None:
    outcome = cases.attempt(plain, base, out=tmp_path / "out")
    assert outcome.code in (3, 4)
    assert outcome.error
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists(base: Path, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert cases.attempt(base, plain, out=tmp_path / "out").code == 5
    assert cases.files(tmp_path / "out") == {"precious": b"x"}


@pytest.mark.parametrize("inside", ["base", "adapter"])
def test_an_output_inside_an_input(inside: str, base: Path, plain: Path, tmp_path: Path) -> None:
    inputs = {"base": cases.copied(base, tmp_path / "base"), "adapter": cases.copied(plain, tmp_path / "adapter")}
    outcome = cases.attempt(inputs["base"], inputs["adapter"], out=inputs[inside] / "merged")
    assert outcome.code == 4
    assert outcome.error


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_saved_module_that_is_not_in_the_file(name: str, tied: bool, tmp_path: Path) -> None:
    model = cases.small_model("llama", tie_word_embeddings=tied)
    own = cases.save_base(model, tmp_path / "base")
    config = LoraConfig(**R, target_modules=QV, modules_to_save=[name])
    adapter = cases.save_adapter(model, config, tmp_path / "adapter")
    cases.edit_factors(adapter, lambda found: {key: value for key, value in found.items() if name not in key})
    _refused(own, adapter, tmp_path / "out", "trained whole", name)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale_2", "scale"])
def test_a_scaled_float8_base_that_keeps_its_dtype(name: str, base: Path, plain: Path, tmp_path: Path) -> None:
    scaled = cases.copied(base, tmp_path / "base")
    found = cases.tensors(base)
    module = "model.layers.1.self_attn.q_proj"
    found[f"{module}.weight"] = found[f"{module}.weight"].to(torch.float8_e4m3fn)
    found[f"{module}.{name}"] = torch.full((1,), 0.01)
    save_file(found, scaled / "model.safetensors", metadata={"format": "pt"})
    outcome = cases.attempt(scaled, plain, out=tmp_path / "out", flags=("--dtype", "keep"))
    assert (outcome.code, (tmp_path / "out").exists()) == (4, False), outcome.stderr
    assert "quantised" in outcome.error
    assert name in outcome.error


def test_dora_on_layers_that_are_trained_as_one(tmp_path: Path) -> None:
    tied = cases.small_model("llama", tie_word_embeddings=True)
    own = cases.save_base(tied, tmp_path / "base")
    config = LoraConfig(**R, target_modules=["embed_tokens"], use_dora=True, ensure_weight_tying=True)
    adapter = cases.save_adapter(tied, config, tmp_path / "adapter")
    _refused(own, adapter, tmp_path / "out", "lm_head", "not the same")
