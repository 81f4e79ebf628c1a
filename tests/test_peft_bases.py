"""What the base under a PEFT adapter is: called by another name, quantised, saved without its head, or vague about what is tied."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_merge_cli.dialects.interface import ScaleOptions, Subject, Tree
from lora_merge_cli.dialects.peft import Peft
from lora_merge_cli.errors import CorruptCheckpoint, UnmatchedAdapter, UnsupportedCheckpoint
from lora_merge_cli.records import Index, TensorSpec
from tests.peft_trees import (
    CONFIG,
    EMBED,
    HEAD,
    LLAMA,
    PREFIX,
    QUERY,
    TIED,
    TIED_CONFIG,
    UNTIED_CONFIG,
    Q,
    survey,
    tree,
)

BARE = {name.removeprefix("model."): shape for name, shape in TIED.items()}
HASH = "0123456789abcdef0123456789abcdef01234567"


def _warns(named: str | None, called: str | None, where: str) -> bool:
    model = UNTIED_CONFIG | ({"_name_or_path": called} if called else {})
    subject = Subject(tree(LLAMA, model, where), tree(QUERY, CONFIG | {"base_model_name_or_path": named}))
    found = Peft().survey(subject, ScaleOptions())
    assert not found.problems
    return any("another base" in warning for warning in found.warnings)


OTHERS = [
    ("meta-llama/Llama-2-7b", "Llama-3-7b"),
    ("Qwen/Qwen2.5-7B", "Qwen2-7B"),
    ("gpt2", "gpt2-medium"),
    ("bert-base-uncased", "roberta-base"),
    ("EleutherAI/pythia-1.4b", "pythia-14b"),
    ("Qwen/Qwen2.5-7B", "Qwen2.5-7B-Instruct"),
    ("/home/me/models/llama-of-mine", "Qwen2.5-7B"),
    ("../models/llama-of-mine", "Qwen2.5-7B"),
    (f"/cache/models--Qwen--Qwen2-7B/snapshots/{HASH}", "Qwen2.5-7B"),
]


@pytest.mark.parametrize(("named", "other"), OTHERS)
def test_a_base_of_another_name(named, other):
    assert _warns(named, other, "base")
    assert _warns(named, f"owner/{other}", "/data/checkpoint-500")
    assert _warns(named, None, f"/data/{other}")
    assert not _warns(named, None, "/data/" + named.replace("/snapshots/" + HASH, "").rpartition("/")[2])


ALIKE = [
    ("Qwen/Qwen2.5-7B", "qwen2.5_7b"),
    ("meta-llama/Llama-3.1-8B", "Llama_3-1 8B"),
    ("unsloth/llama-3-8b-bnb-4bit", "Meta-Llama-3-8B"),
    ("Qwen/Qwen2.5-7B", f"models--Qwen--Qwen2.5-7B/snapshots/{HASH}"),
    (f"/cache/models--Qwen--Qwen2.5-7B/snapshots/{HASH}/", "Qwen2.5-7B"),
    (f"/data/Qwen2.5-7B/{HASH}", "Qwen2.5-7B"),
    ("C:\\models\\Qwen2.5-7B", "qwen2.5-7b"),
    ("gpt2", "openai-community/gpt2"),
]


@pytest.mark.parametrize(("named", "same"), ALIKE)
def test_a_base_of_the_same_name(named, same):
    assert not _warns(named, None, f"/data/{same}")
    # One of its names is enough.
    assert not _warns(named, "somebody/another-model", f"/data/{same}")


@pytest.mark.parametrize(
    "nothing", ["base", "model", "checkpoint-500", "/out/run_3/checkpoint", "merged.v2", HASH, "step1000", "x", "", "/"]
)
def test_names_that_any_model_could_have(nothing):
    assert not _warns("Qwen/Qwen2.5-7B", None, f"/data/{nothing}" if nothing != "/" else nothing)
    assert not _warns(nothing, "Qwen/Qwen2.5-7B", "base")


def _with(extra: dict[str, tuple[tuple[int, ...], Any]]) -> Tree:
    base = tree(LLAMA, UNTIED_CONFIG, "base")
    specs = {(name,): TensorSpec((name,), shape, np.dtype(dtype)) for name, (shape, dtype) in extra.items()}
    return Tree(Index({**base.index.tensors, **specs}), base.where, base.config)


def _says_quantised(base: Tree) -> bool:
    found = Peft().survey(Subject(base, tree(QUERY, CONFIG)), ScaleOptions())
    return any(isinstance(one, UnsupportedCheckpoint) and "quantised" in str(one) for one in found.problems)


SCALES = [
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "scale_weight", "scale", "scales", "input_scale"),
    *("scale_input", "weightScale", "weight.scale"),
]


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8, np.uint8])
def test_a_scale_beside_a_weight_of_one_byte(name, dtype):
    weight = {f"{Q}.weight": ((6, 4), dtype)}
    assert _says_quantised(_with({**weight, f"{Q}.{name}": ((1,), np.float32)}))
    elsewhere = f"{Q.rpartition('.')[0]}.k_proj.{name}"
    assert not _says_quantised(_with({elsewhere: ((1,), np.float32)}))


def test_a_scale_of_a_tensor_that_is_not_called_weight():
    experts = "model.layers.0.mlp.experts"
    scale = {f"{experts}.gate_up_proj_scale_inv": ((2, 1, 1), np.float32)}
    assert _says_quantised(_with({**scale, f"{experts}.gate_up_proj": ((2, 4, 8), ml_dtypes.float8_e4m3fn)}))
    assert not _says_quantised(_with({**scale, f"{experts}.gate_up_proj": ((2, 4, 8), ml_dtypes.bfloat16)}))


@pytest.mark.parametrize(
    "extra",
    [
        {f"{Q}.scale": ((6,), np.float32)},
        {"model.vision.logit_scale": ((), np.float32), "model.vision.bias": ((1, 1, 4, 4), np.uint8)},
        {"model.vision.scale": ((4,), np.float32), "model.vision.weight": ((4, 4), bool)},
        {f"{Q}.weight": ((6, 4), ml_dtypes.float8_e4m3fn)},
    ],
)
def test_scales_that_are_the_model_s_own(extra):
    assert not _says_quantised(_with(extra))


def _bare(*names: str, **others: Any) -> dict[str, Any]:
    return TIED_CONFIG | {"architectures": list(names)} | others


@pytest.mark.parametrize(
    ("model", "adapter", "unties"),
    [
        (_bare("LlamaModel"), {"task_type": "CAUSAL_LM"}, True),
        (_bare("LlamaModel"), {}, True),
        (_bare("LlamaModel"), {"task_type": "FEATURE_EXTRACTION"}, False),
        (_bare("LlamaModel"), {"task_type": "SEQ_CLS"}, False),
        (_bare("LlamaForSequenceClassification"), {"task_type": "SEQ_CLS"}, False),
        (_bare("GPT2DoubleHeadsModel"), {"task_type": "FEATURE_EXTRACTION"}, True),
        (_bare("OpenAIGPTDoubleHeadsModel"), {"task_type": "FEATURE_EXTRACTION"}, True),
        (_bare("GPT2LMHeadModel"), {"task_type": "FEATURE_EXTRACTION"}, True),
        (_bare("InternVLChatModel"), {"task_type": "FEATURE_EXTRACTION"}, True),
        (_bare("ChatGLMModel"), {"task_type": "FEATURE_EXTRACTION"}, True),
    ],
)
def test_whether_there_is_a_head(model, adapter, unties):
    found = survey(EMBED, BARE, model=model, **adapter)
    assert not found.problems, found.problems
    assert [one.path for one in found.created] == ([("lm_head.weight",)] if unties else [])
    assert found.config == ({"tie_word_embeddings": False} if unties else {})


def test_the_adapter_s_own_head_is_one():
    found = survey(EMBED | HEAD, BARE, model=_bare("LlamaModel"), task_type="FEATURE_EXTRACTION")
    assert not found.problems
    assert [one.path for one in found.created] == [("lm_head.weight",)]


def test_an_encoder_and_decoder_has_a_head_of_the_same_names():
    base = {"shared.weight": (12, 4), "encoder.q.weight": (6, 4)}
    keys = {f"{PREFIX}shared.lora_embedding_A": (2, 12), f"{PREFIX}shared.lora_embedding_B": (4, 2)}
    both = {"is_encoder_decoder": True}
    for task in (None, "SEQ_2_SEQ_LM"):
        found = survey(keys, base, model=_bare("T5Model", **both), task_type=task)
        assert "encoder and decoder" in str(found.problems[0])
    assert not survey(keys, base, model=_bare("T5Model", **both), task_type="FEATURE_EXTRACTION").problems
    assert not survey(keys, base, model=_bare("T5EncoderModel", **both)).problems


def test_a_head_whose_place_is_not_certain():
    base = {f"language_model.{name}": shape for name, shape in BARE.items()}
    keys = {key.replace("model.embed", "model.language_model.embed"): shape for key, shape in EMBED.items()}
    found = survey(keys, base, model=_bare("LlavaModel"), task_type="CAUSAL_LM")
    assert isinstance(found.problems[0], UnmatchedAdapter)
    assert "no certain name" in str(found.problems[0])


@pytest.mark.parametrize("value", [1, 0, "true", "false", [], {}])
def test_a_vague_word_on_what_is_tied(value):
    text = TIED_CONFIG | {"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": value}}
    for model in (TIED_CONFIG | {"tie_word_embeddings": value}, text):
        for keys, base in ((EMBED, TIED), (HEAD, TIED), (HEAD, LLAMA)):
            found = survey(keys, base, model=model)
            assert isinstance(found.problems[0], CorruptCheckpoint)
            assert "config.json" in str(found.problems[0])
            assert "tie_word_embeddings" in str(found.problems[0])
        assert not survey(QUERY, TIED, model=model).problems, "nothing that could be tied is touched"
