"""Tied bases that were saved without their head's class, under adapters that were trained with the head on: judged by logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import LoraConfig  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, GPT2DoubleHeadsModel  # noqa: E402

from tests import peft_cases as cases  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {"num_key_value_heads": None},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
EMBEDDINGS = ["embed_tokens", "wte", "embed_in"]
HEADS = ["lm_head", "embed_out"]


def _lora(*, task: str | None = "CAUSAL_LM", **changes: Any) -> Any:
    return LoraConfig(r=4, lora_alpha=10, task_type=task, **changes)


def _here(names: list[str], model: Any) -> list[str]:
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in names if name in modules]


def _headless(kind: str, to: Path) -> tuple[Any, Path]:
    """A tied model with its head, and the checkpoint of what is under the head."""
    model = cases.small_model(kind, tie_word_embeddings=True, **KINDS[kind])
    base = cases.save_base(model.base_model, to)
    config = json.loads((base / "config.json").read_text())
    assert config["architectures"] == [type(model.base_model).__name__]
    assert config["architectures"][0].endswith("Model")
    return model, base


def _config(what: str, model: Any, task: str | None) -> Any:
    attention = ["q_proj", "c_attn", "query_key_value"]
    embedding, head = _here(EMBEDDINGS, model), _here(HEADS, model)
    targets = {"the embedding": embedding, "the head": head, "both": embedding + head}
    if what in targets:
        return _lora(task=task, target_modules=targets[what])
    saved = embedding if what == "a saved embedding" else head
    return _lora(task=task, target_modules=_here(attention, model), modules_to_save=saved)


def _judge(base: Path, adapter: Path, out: Path, auto: Any = AutoModelForCausalLM) -> None:
    outcome = cases.attempt(base, adapter, out=out, flags=("--verify",))
    assert outcome.code == 0, outcome.stderr
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert any(name.rpartition(".")[0] in HEADS for name in cases.tensors(out))
    found, adapted = cases.reloaded(out, auto), cases.with_adapter(base, adapter, auto)
    cases.assert_forward(found, adapted, cases.reloaded(base, auto))


@pytest.mark.parametrize("what", ["the embedding", "the head", "both", "a saved embedding", "a saved head"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_of_the_model_with_a_head(kind: str, what: str, tmp_path: Path) -> None:
    model, base = _headless(kind, tmp_path / "base")
    adapter = cases.save_adapter(model, _config(what, model, "CAUSAL_LM"), tmp_path / "adapter")
    _judge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("kind", ["gpt_neox", "opt"])
def test_the_name_of_the_head(kind: str, tmp_path: Path) -> None:
    model, base = _headless(kind, tmp_path / "base")
    adapter = cases.save_adapter(model, _config("the embedding", model, "CAUSAL_LM"), tmp_path / "adapter")
    _judge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("what", ["the embedding", "the head", "a saved embedding"])
def test_without_a_task_the_names_tell(what: str, tmp_path: Path) -> None:
    model, base = _headless("llama", tmp_path / "base")
    adapter = cases.save_adapter(model, _config(what, model, None), tmp_path / "adapter")
    _judge(base, adapter, tmp_path / "out")


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    model, base = _headless("llama", tmp_path / "base")
    with cases.quiet():
        torch.manual_seed(5)
        model.resize_token_embeddings(104)
    config = _lora(target_modules=["q_proj"])
    adapter = cases.save_adapter(model, config, tmp_path / "adapter", save_embedding_layers=True)
    cases.merge(base, adapter, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 104
    found = cases.reloaded(tmp_path / "out")
    cases.assert_forward(found, cases.with_adapter(base, adapter, rows=104))


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_an_adapter_of_the_model_without_a_head_makes_none(task: str | None, tmp_path: Path) -> None:
    model, base = _headless("llama", tmp_path / "base")
    config = _lora(task=task, target_modules=["q_proj", "embed_tokens"])
    adapter = cases.save_adapter(model.base_model, config, tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(base, adapter, AutoModel), cases.tensors(base))
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_class_that_ends_in_model_and_has_a_head(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = cases.shaken(GPT2DoubleHeadsModel(cases.small_config("gpt2", num_labels=1)))
    base = cases.save_base(model, tmp_path / "base")
    config = _lora(task=None, target_modules=["c_attn", "wte"])
    adapter = cases.save_adapter(model, config, tmp_path / "adapter")
    _judge(base, adapter, tmp_path / "out", GPT2DoubleHeadsModel)
