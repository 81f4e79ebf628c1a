"""Merging PEFT adapters at the edges: other architectures, odd tensors, names and configurations of other writers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    T5Config,
)

from tests import peft_cases as cases  # noqa: E402
from tests.command import run  # noqa: E402

R = {"r": 4, "lora_alpha": 10}
QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def llama() -> Any:
    return cases.small_model("llama")


@pytest.fixture(scope="module")
def base(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_base(llama, tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def plain(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_adapter(llama, LoraConfig(**R, target_modules=QV), tmp_path_factory.mktemp("adapter") / "plain")


def test_names_of_a_vision_language_model_before_transformers_5(tmp_path: Path) -> None:
    model, auto = cases.small_vision_language_model("llava")
    base = cases.save_base(model, tmp_path / "base")
    config = LoraConfig(**R, target_modules=r".*language_model.*\.q_proj")
    new = cases.save_adapter(model, config, tmp_path / "new")
    prefix = "base_model.model."
    old = cases.renamed(
        cases.copied(new, tmp_path / "old"),
        lambda key: key.replace(f"{prefix}model.language_model.", f"{prefix}language_model.model."),
    )
    assert set(cases.tensors(old)).isdisjoint(cases.tensors(new))
    merged = cases.merge(base, old, out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(base, new, auto), cases.tensors(base))


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": cases.VOCAB}
    torch.manual_seed(7)
    model = cases.shaken(AutoModelForSeq2SeqLM.from_config(T5Config(**sizes)))
    base = cases.save_base(model, tmp_path / "base")
    config = LoraConfig(**R, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    adapter = cases.save_adapter(model, config, tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(base, adapter, AutoModelForSeq2SeqLM), cases.tensors(base))


def test_a_classifier_with_a_bias_on_a_masked_language_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(7)
    model = cases.shaken(AutoModelForMaskedLM.from_config(BertConfig(**sizes, vocab_size=cases.VOCAB)))
    base = cases.save_base(model, tmp_path / "base")
    auto = AutoModelForSequenceClassification
    with cases.quiet():
        classifier = auto.from_pretrained(base, num_labels=3)
        # The pooler is new too, and random: an adapter on top of it alone would mean nothing elsewhere.
        config = LoraConfig(**R, target_modules=["query"], modules_to_save=["pooler"], task_type="SEQ_CLS")
    adapter = cases.save_adapter(classifier, config, tmp_path / "adapter")
    outcome = cases.attempt(base, adapter, out=tmp_path / "out")
    assert outcome.code == 0, outcome.stderr
    merged = cases.tensors(tmp_path / "out")
    brought = cases.tensors(adapter)
    for name in ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"):
        assert torch.equal(merged[name], brought[f"base_model.model.{name}"]), name
    with cases.quiet():
        found = auto.from_pretrained(tmp_path / "out", num_labels=3)
        adapted = cases.with_adapter(base, adapter, auto, num_labels=3)
    cases.assert_near(cases.logits(found), cases.logits(adapted), "logits", 2e-5)


class Odd(nn.Module):
    """A layer among tensors that no merge may touch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 20)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing_is_left", torch.tensor([float("nan"), -0.0, float("inf")]))
        self.register_buffer("short", torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
        self.register_buffer("small", torch.arange(5, dtype=torch.uint8))


def _bits(value: Any) -> Any:
    return value.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(
    "flags", [(), ("--verify",), ("--max-shard-size", "1KB")], ids=["plain", "verified", "sharded"]
)
def test_tensors_of_every_kind_are_copied(flags: tuple[str, ...], tmp_path: Path) -> None:
    net = Odd()
    base = cases.save_plain(net, tmp_path / "base")
    adapter = cases.save_adapter(net, LoraConfig(**R, target_modules=["fc"]), tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out", flags=flags)
    stored = cases.tensors(base)
    assert stored["norm.num_batches_tracked"].shape == ()
    assert set(merged) == set(stored)
    for name, value in stored.items():
        assert (merged[name].dtype, merged[name].shape) == (value.dtype, value.shape), name
        if name != "fc.weight":
            assert torch.equal(_bits(merged[name]), _bits(value)), name
    cases.assert_near(merged["fc.weight"], cases.merged_plain(net, adapter)["fc.weight"])


def test_nan_in_the_weight_under_an_adapter(base: Path, plain: Path, tmp_path: Path) -> None:
    spoilt = cases.copied(base, tmp_path / "base")
    stored = cases.tensors(base)
    stored["model.layers.1.self_attn.v_proj.weight"][3, 4] = float("nan")
    save_file(stored, spoilt / "model.safetensors", metadata={"format": "pt"})
    outcome = cases.attempt(spoilt, plain, out=tmp_path / "out")
    assert outcome.code == 3
    assert "layers.1.self_attn.v_proj" in outcome.error.replace("/", ".")
    assert not (tmp_path / "out").exists()


def test_a_sum_that_float16_cannot_hold(llama: Any, plain: Path, tmp_path: Path) -> None:
    base = cases.save_base(cases.small_model("llama"), tmp_path / "base", torch.float16)
    adapter = cases.edit_config(cases.copied(plain, tmp_path / "adapter"), alpha_pattern={"v_proj": 10**6})
    outcome = cases.attempt(base, adapter, out=tmp_path / "out")
    assert outcome.code == 4
    assert "v_proj" in outcome.error
    assert not (tmp_path / "out").exists()


def test_biases_that_an_older_peft_did_not_save(llama: Any, base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = cases.edit_config(cases.copied(plain, tmp_path / "adapter"), bias="lora_only")
    outcome = cases.attempt(base, adapter, out=tmp_path / "out", flags=("--json",))
    assert outcome.code == 0
    assert "lora_only" in " ".join(outcome.json["warnings"])
    cases.assert_same(cases.tensors(tmp_path / "out"), cases.merged_by_peft(base, plain), cases.tensors(base))


SPELLINGS = [".modules_to_save.weight", ".modules_to_save.default.weight"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_saved_modules_as_a_raw_state_dict_has_them(spelling: str, llama: Any, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(**R, target_modules=QV, modules_to_save=["lm_head"])
    adapter = cases.save_adapter(llama, config, tmp_path / "adapter")
    expected = cases.merged_by_peft(base, adapter)
    head = "base_model.model.lm_head"

    def respelt(found: cases.Tensors) -> cases.Tensors:
        untouched = {f"{head}.original_module.weight": cases.tensors(base)["lm_head.weight"]}
        return {key.replace(f"{head}.weight", f"{head}{spelling}"): value for key, value in found.items()} | untouched

    cases.edit_factors(adapter, respelt)
    cases.assert_same(cases.merge(base, adapter, out=tmp_path / "out"), expected, cases.tensors(base))


@pytest.mark.parametrize("flags", [("--include", "**.layers.1.**"), ("--exclude", "**.layers.0.**")])
def test_only_some_sites(flags: tuple[str, str], base: Path, plain: Path, tmp_path: Path) -> None:
    merged = cases.merge(base, plain, out=tmp_path / "out", flags=flags)
    stored, full = cases.tensors(base), cases.merged_by_peft(base, plain)
    expected = {name: full[name] if "layers.1." in name else value for name, value in stored.items()}
    cases.assert_same(merged, expected, stored)


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_a_base_that_is_the_residual(initialisation: str, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(**R, target_modules=QV, init_lora_weights=initialisation)
    with cases.quiet():
        adapted = cases.train(get_peft_model(cases.reloaded(base), config))
        adapted.save_pretrained(tmp_path / "adapter")
        want = cases.logits(adapted)
        residual = cases.save_base(adapted.unload(), tmp_path / "base")
    merged = cases.merge(residual, tmp_path / "adapter", out=tmp_path / "out", flags=("--residual-base",))
    assert set(merged) == set(cases.tensors(residual))
    cases.assert_near(cases.logits(cases.reloaded(tmp_path / "out")), want, "logits", 2e-5)


def test_an_adapter_without_a_configuration(base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = cases.copied(plain, tmp_path / "adapter")
    (adapter / "adapter_config.json").unlink()
    outcome = cases.attempt(base, adapter, out=tmp_path / "out")
    assert outcome.code == 4
    assert "--lora-alpha" in outcome.error
    assert not (tmp_path / "out").exists()
    merged = cases.merge(base, adapter, out=tmp_path / "out", flags=("--lora-alpha", "10"))
    cases.assert_same(merged, cases.merged_by_peft(base, plain), cases.tensors(base))
    one = adapter / "adapter_model.safetensors"
    assert run("merge", base, "--adapter", one, "-o", tmp_path / "file", "--lora-alpha", 10).code == 0
    cases.assert_same(cases.tensors(tmp_path / "file"), merged, cases.tensors(base))


def test_an_alpha_that_is_not_written_down_is_pefts_own(base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = cases.copied(plain, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["lora_alpha"]
    path.write_text(json.dumps(config))
    outcome = cases.attempt(base, adapter, out=tmp_path / "out", flags=("--json",))
    assert outcome.code == 0
    assert "default" in json.dumps(outcome.json), "the source of the scale is said"
    cases.assert_same(cases.tensors(tmp_path / "out"), cases.merged_by_peft(base, adapter), cases.tensors(base))


def test_verify_finds_what_rides_along_altered(llama: Any, tmp_path: Path) -> None:
    tied = cases.small_model("llama", tie_word_embeddings=True)
    base = cases.save_base(tied, tmp_path / "base")
    config = LoraConfig(**R, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"], bias="all")
    adapter = cases.save_adapter(tied, config, tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    judged = ("verify", tmp_path / "out", "--against", base, "--adapter", adapter)
    assert run(*judged).code == 0
    for name in (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.1.self_attn.q_proj.bias",
    ):
        altered = {other: value.clone() for other, value in merged.items()}
        altered[name].view(-1)[7] += 0.001
        save_file(altered, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
        assert run(*judged).code == 1, name
        del altered[name]
        save_file(altered, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
        assert run(*judged).code == 1, f"{name} is gone"
    save_file(merged, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert run(*judged).code == 0


@pytest.mark.parametrize("wrong", ["the adapter", "the base"])
def test_verify_against_other_inputs(wrong: str, llama: Any, base: Path, plain: Path, tmp_path: Path) -> None:
    merged = cases.merge(base, plain, out=tmp_path / "out")
    assert merged
    other = cases.save_adapter(llama, LoraConfig(**R, target_modules=QV), tmp_path / "other", seed=9)
    elsewhere = cases.save_base(cases.shaken(cases.small_model("llama"), 4), tmp_path / "base")
    inputs = (base, other) if wrong == "the adapter" else (elsewhere, plain)
    assert run("verify", tmp_path / "out", "--against", inputs[0], "--adapter", inputs[1]).code == 1
