"""What rides along in a PEFT adapter: heads, biases, embeddings, token rows; judged by what the reloaded model answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import LoraConfig, TrainableTokensConfig  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tests import peft_cases as cases  # noqa: E402

R = {"r": 4, "lora_alpha": 10}
QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def llama() -> Any:
    return cases.small_model("llama")


@pytest.fixture(scope="module")
def base(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_base(llama, tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def tied() -> Any:
    return cases.small_model("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tied_base(tied: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = cases.save_base(tied, tmp_path_factory.mktemp("base") / "tied")
    assert "lm_head.weight" not in cases.tensors(path)
    return path


RIDING: dict[str, Any] = {
    "a head of its own": LoraConfig(**R, target_modules=QV, modules_to_save=["lm_head"]),
    "norms by the end of their names": LoraConfig(**R, target_modules=QV, modules_to_save=["norm"]),
    "an embedding and a layer": LoraConfig(**R, target_modules=QV, modules_to_save=["embed_tokens", "1.mlp.down_proj"]),
    "every bias": LoraConfig(**R, target_modules=QV, bias="all"),
    "the biases of the targets": LoraConfig(**R, target_modules=QV, bias="lora_only"),
    "biases, and one on B": LoraConfig(**R, target_modules=QV, bias="all", lora_bias=True),
    "DoRA and biases": LoraConfig(**R, target_modules=QV, bias="all", use_dora=True),
    "an adapted embedding and head": LoraConfig(**R, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "token rows": LoraConfig(**R, target_modules=QV, trainable_token_indices=[40, 3, 17]),
    "token rows by name": LoraConfig(**R, target_modules=QV, trainable_token_indices={"embed_tokens": [5, 2]}),
    "token rows of both": LoraConfig(
        **R, target_modules=QV, trainable_token_indices={"embed_tokens": [5, 2], "lm_head": [9, 1, 4]}
    ),
    "nothing but token rows": TrainableTokensConfig(token_indices=[50, 3, 17]),
}


@pytest.mark.parametrize("config", RIDING.values(), ids=RIDING)
def test_what_rides_along_is_applied(config: Any, llama: Any, base: Path, tmp_path: Path) -> None:
    adapter = cases.save_adapter(llama, config, tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out", flags=("--verify",))
    adapted = cases.with_adapter(base, adapter)
    cases.assert_forward(cases.reloaded(tmp_path / "out"), adapted, cases.reloaded(base))
    cases.assert_same(merged, cases.merged_by_peft(base, adapter), cases.tensors(base))
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("task", "auto"), [("SEQ_CLS", AutoModelForSequenceClassification), ("TOKEN_CLS", AutoModelForTokenClassification)]
)
def test_a_new_head(task: str, auto: Any, base: Path, tmp_path: Path) -> None:
    model = auto.from_pretrained(base, num_labels=3)
    adapter = cases.save_adapter(model, LoraConfig(**R, target_modules=QV, task_type=task), tmp_path / "adapter")
    outcome = cases.attempt(base, adapter, out=tmp_path / "out")
    assert outcome.code == 0, outcome.stderr
    merged, brought = cases.tensors(tmp_path / "out"), cases.tensors(adapter)
    assert torch.equal(merged["score.weight"], brought["base_model.model.score.weight"])
    adapted = cases.with_adapter(base, adapter, auto, num_labels=3)
    with cases.quiet():
        found = auto.from_pretrained(tmp_path / "out", num_labels=3)
    cases.assert_near(cases.logits(found), cases.logits(adapted), "logits", 2e-5)


def test_a_new_head_is_in_the_configuration_or_in_a_warning(base: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    adapter = cases.save_adapter(model, LoraConfig(**R, target_modules=QV, task_type="SEQ_CLS"), tmp_path / "adapter")
    outcome = cases.attempt(base, adapter, out=tmp_path / "out", flags=("--json",))
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, tmp_path / "out"))
    if after == before:
        assert "score" in " ".join(outcome.json["warnings"])
    else:
        found = cases.reloaded(tmp_path / "out", AutoModelForSequenceClassification)
        assert found.config.num_labels == 3


def test_a_new_head_on_a_checkpoint_without_one(llama: Any, tmp_path: Path) -> None:
    headless = cases.save_base(llama.model, tmp_path / "base")
    auto = AutoModelForSequenceClassification
    with cases.quiet():
        model = auto.from_pretrained(headless, num_labels=3)
    adapter = cases.save_adapter(model, LoraConfig(**R, target_modules=QV, task_type="SEQ_CLS"), tmp_path / "adapter")
    assert cases.attempt(headless, adapter, out=tmp_path / "out").code == 0
    found = cases.reloaded(tmp_path / "out", auto, num_labels=3)
    cases.assert_forward(found, cases.with_adapter(headless, adapter, auto, num_labels=3))


def _resized(base: Path, rows: int) -> Any:
    with cases.quiet():
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(5)
        model.resize_token_embeddings(rows)
    return model


@pytest.mark.parametrize("rows", [104, 80])
@pytest.mark.parametrize("names", [QV, ["embed_tokens", "lm_head", "q_proj"]], ids=["saved whole", "adapted"])
def test_a_resized_vocabulary(names: list[str], rows: int, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(**R, target_modules=names)
    adapter = cases.save_adapter(_resized(base, rows), config, tmp_path / "adapter", save_embedding_layers=True)
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    adapted = cases.with_adapter(base, adapter, rows=rows)
    assert merged["model.embed_tokens.weight"].shape[0] == rows
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, tmp_path / "out"))
    assert after == before | {"vocab_size": rows}
    found = cases.reloaded(tmp_path / "out")
    ids = torch.arange(80).reshape(2, 40)
    with torch.no_grad():
        cases.assert_near(found(ids).logits, adapted(input_ids=ids).logits, "logits", 2e-5)


def test_a_resized_vocabulary_of_a_tied_model(tied_base: Path, tmp_path: Path) -> None:
    config = LoraConfig(**R, target_modules=QV)
    adapter = cases.save_adapter(_resized(tied_base, 104), config, tmp_path / "adapter", save_embedding_layers=True)
    merged = cases.merge(tied_base, adapter, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 104
    found = cases.reloaded(tmp_path / "out")
    assert found.lm_head.weight.shape[0] == merged["model.embed_tokens.weight"].shape[0] == 104
    cases.assert_forward(found, cases.with_adapter(tied_base, adapter, rows=104))


EMBEDDING, HEAD = "embed_tokens", "lm_head"
# Whether one tensor still serves both; None: either is right.
TIED: dict[str, tuple[Any, bool | None]] = {
    "neither": (LoraConfig(**R, target_modules=QV), True),
    "the embedding": (LoraConfig(**R, target_modules=["q_proj", EMBEDDING]), False),
    "the embedding, DoRA": (LoraConfig(**R, target_modules=["q_proj", EMBEDDING], use_dora=True), False),
    "the head": (LoraConfig(**R, target_modules=["q_proj", HEAD]), False),
    "the head, DoRA": (LoraConfig(**R, target_modules=["q_proj", HEAD], use_dora=True), False),
    "both": (LoraConfig(**R, target_modules=["q_proj", EMBEDDING, HEAD]), False),
    "both, kept tied": (LoraConfig(**R, target_modules=[EMBEDDING, HEAD], ensure_weight_tying=True), True),
    "the embedding, kept tied": (LoraConfig(**R, target_modules=[EMBEDDING], ensure_weight_tying=True), True),
    "a head of its own": (LoraConfig(**R, target_modules=QV, modules_to_save=[HEAD]), False),
    "an embedding of its own": (LoraConfig(**R, target_modules=QV, modules_to_save=[EMBEDDING]), False),
    "both of their own": (LoraConfig(**R, target_modules=QV, modules_to_save=[HEAD, EMBEDDING]), False),
    "saved and kept tied": (
        LoraConfig(**R, target_modules=QV, modules_to_save=[EMBEDDING], ensure_weight_tying=True),
        None,
    ),
    "token rows": (LoraConfig(**R, target_modules=QV, trainable_token_indices=[40, 3, 17]), True),
    "nothing but token rows": (TrainableTokensConfig(token_indices=[50, 3, 17]), True),
}


@pytest.mark.parametrize(("config", "stays"), TIED.values(), ids=TIED)
def test_a_tied_model(config: Any, stays: bool | None, tied: Any, tied_base: Path, tmp_path: Path) -> None:
    adapter = cases.save_adapter(tied, config, tmp_path / "adapter")
    merged = cases.merge(tied_base, adapter, out=tmp_path / "out", flags=("--verify",))
    found = cases.reloaded(tmp_path / "out")
    cases.assert_forward(found, cases.with_adapter(tied_base, adapter), cases.reloaded(tied_base))
    before, after = (json.loads((path / "config.json").read_text()) for path in (tied_base, tmp_path / "out"))
    assert after["tie_word_embeddings"] is ("lm_head.weight" not in merged)
    assert stays is None or after["tie_word_embeddings"] is stays
    assert after == before | {"tie_word_embeddings": after["tie_word_embeddings"]}


STORED_TWICE = ["neither", "the embedding", "the head", "both, kept tied", "a head of its own", "token rows"]


@pytest.mark.parametrize("name", STORED_TWICE)
def test_a_tied_checkpoint_that_holds_both(name: str, tied: Any, tied_base: Path, tmp_path: Path) -> None:
    both = cases.copied(tied_base, tmp_path / "base")
    stored = cases.tensors(tied_base)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, both / "model.safetensors", metadata={"format": "pt"})
    config, stays = TIED[name]
    adapter = cases.save_adapter(tied, config, tmp_path / "adapter")
    merged = cases.merge(both, adapter, out=tmp_path / "out", flags=("--verify",))
    if stays and "lm_head.weight" in merged:
        assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    with cases.quiet():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    cases.assert_forward(found, cases.with_adapter(tied_base, adapter))


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
@pytest.mark.parametrize("side", ["head", "embedding"])
def test_tied_because_the_model_type_is(side: str, kind: str, tmp_path: Path) -> None:
    # As published: the configuration does not say that the two are tied, and GPT-2's tensors have no prefix.
    changes = {"head_dim": 8} if kind == "gemma" else {}
    model = cases.small_model(kind, **changes)
    base = cases.save_base(model.transformer if kind == "gpt2" else model, tmp_path / "base")
    before = json.loads((base / "config.json").read_text()) | {"architectures": [type(model).__name__]}
    assert before.pop("tie_word_embeddings", True) is True
    (base / "config.json").write_text(json.dumps(before))
    names = ["lm_head"] if side == "head" else ["wte", "embed_tokens"]
    adapter = cases.save_adapter(model, LoraConfig(**R, target_modules=names), tmp_path / "adapter")
    cases.merge(base, adapter, out=tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after == before | {"tie_word_embeddings": False}
    cases.assert_forward(cases.reloaded(tmp_path / "out"), cases.with_adapter(base, adapter), cases.reloaded(base))


def test_untying_is_said_in_the_configuration_of_the_text_too(tmp_path: Path) -> None:
    model, auto = cases.small_vision_language_model("paligemma")
    base = cases.save_base(model, tmp_path / "base")
    before = json.loads((base / "config.json").read_text())
    assert "lm_head" not in " ".join(cases.tensors(base)), "the head is tied"
    adapter = cases.save_adapter(model, LoraConfig(**R, target_modules=["lm_head"]), tmp_path / "adapter")
    cases.merge(base, adapter, out=tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["tie_word_embeddings"] is False
    assert after["text_config"].get("tie_word_embeddings", False) is False
    others = [name for name in before if name not in ("tie_word_embeddings", "text_config")]
    assert {name: after[name] for name in others} == {name: before[name] for name in others}
    cases.assert_forward(cases.reloaded(tmp_path / "out", auto), cases.with_adapter(base, adapter, auto))
