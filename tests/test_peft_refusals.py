"""PEFT adapters that must not be merged, and why."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.dialects.interface import ScaleOptions, Subject
from lora_merge_cli.dialects.peft import Peft
from lora_merge_cli.dialects.peft.config import KNOWN_FIELDS, read_config
from lora_merge_cli.errors import (
    CorruptCheckpoint,
    LoraMergeError,
    ShapeMismatch,
    UnmatchedAdapter,
    UnsupportedCheckpoint,
    UsageError,
)
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
    embedding,
    linear,
    survey,
    tree,
)

MAGNITUDE = {f"{PREFIX}{Q}.lora_magnitude_vector": (6,)}
ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
UP = "model.layers.0.mlp.up_proj"


def refused(error, words, *args, **others):
    """The first problem is of that class and says those words in one line."""
    found = survey(*args, **others)
    assert found.problems, "merged"
    problem = found.problems[0]
    assert type(problem) is error, problem
    assert words in str(problem)
    assert "\n" not in str(problem)
    return found


@pytest.mark.parametrize(
    ("error", "words", "keys", "fields"),
    [
        (UnsupportedCheckpoint, "peft_type GRALORA", QUERY, {"peft_type": "GRALORA"}),
        (UnsupportedCheckpoint, "peft_type PREFIX_TUNING", {}, {"peft_type": "PREFIX_TUNING"}),
        (UnsupportedCheckpoint, "no peft_type", QUERY, {"peft_type": None}),
        (UnsupportedCheckpoint, "another method, LoHa", {f"{PREFIX}{Q}.hada_w1_a": (6, 2)}, {}),
        (UnsupportedCheckpoint, "another method, KaSA", QUERY | {f"{PREFIX}{Q}.lora_diag": (2,)}, {}),
        (UnsupportedCheckpoint, "several adapters", {k.replace(".weight", f".{n}.weight"): s for k, s in QUERY.items() for n in "ab"}, {}),
        (UnmatchedAdapter, "two keys", QUERY | {k.removeprefix(PREFIX): s for k, s in QUERY.items()}, {}),
        (UnmatchedAdapter, "fit no rule", QUERY | {f"{PREFIX}{Q}.lora_C.weight": (2, 2)}, {}),
        (UnmatchedAdapter, "without a pair", linear(Q, 6, 4) | {f"{PREFIX}{UP}.lora_A.weight": (2, 4)}, {}),
        (UnmatchedAdapter, "without a pair", {f"{PREFIX}{Q}.lora_B.weight": (6, 2)}, {}),
        (UnmatchedAdapter, "without a pair", EMBED | {k.replace("_embedding", ""): s for k, s in linear("model.embed_tokens", 12, 4).items()}, {}),
        (UnmatchedAdapter, "k_proj.weight in base", QUERY | linear(Q.replace("q_", "k_"), 6, 4), {}),
        (UnmatchedAdapter, "does not have", QUERY | {f"{PREFIX}model.nrom.weight": (4,)}, {}),
        (ShapeMismatch, "do not fit the weight", linear(Q, 7, 4), {}),
        (ShapeMismatch, "do not fit the weight", {k: (2, 5) if "lora_A" in k else s for k, s in QUERY.items()}, {}),
        (ShapeMismatch, "do not fit the weight", {k: (3, 4) if "lora_A" in k else s for k, s in QUERY.items()}, {}),
        (ShapeMismatch, "do not fit the weight", linear(Q, 6, 4, rank=0), {}),
        (ShapeMismatch, "do not fit the weight", dict.fromkeys(QUERY, ()), {}),
        (ShapeMismatch, "do not fit the weight", embedding("model.embed_tokens", 13, 4), {}),
        (ShapeMismatch, "another rank", linear(Q, 6, 4, rank=3), {}),
        (ShapeMismatch, "another rank", QUERY, {"rank_pattern": {"q_proj": 4}}),
        (ShapeMismatch, "another rank", QUERY, {"r": None}),
        (ShapeMismatch, "does not fit the base's", QUERY | {f"{PREFIX}model.norm.weight": (5,)}, {}),
        (ShapeMismatch, "does not fit the base's", QUERY | {f"{PREFIX}lm_head.weight": (12, 5)}, {}),
        (ShapeMismatch, "different numbers of rows", QUERY | {f"{PREFIX}lm_head.weight": (15, 4)}, {}),
        (UnmatchedAdapter, "use_dora false", QUERY | MAGNITUDE, {}),
        (UnmatchedAdapter, "no magnitudes", QUERY, {"use_dora": True}),
        (UnmatchedAdapter, "no magnitudes", QUERY | linear(UP, 8, 4) | MAGNITUDE, {"use_dora": True}),
        (ShapeMismatch, "magnitudes do not fit", QUERY | dict.fromkeys(MAGNITUDE, (5,)), {"use_dora": True}),
        (UnmatchedAdapter, "lora_bias false", QUERY | {f"{PREFIX}{Q}.lora_B.bias": (6,)}, {}),
        (UnmatchedAdapter, "lora_bias announces", QUERY, {"lora_bias": True}),
        (UnmatchedAdapter, "layer without one", QUERY | {f"{PREFIX}{Q}.lora_B.bias": (6,)}, {"lora_bias": True}),
        (ShapeMismatch, "bias of lora_B", linear(UP, 8, 4) | {f"{PREFIX}{UP}.lora_B.bias": (7,)}, {"lora_bias": True}),
        (UnmatchedAdapter, "no list", QUERY | {ROWS: (1, 4)}, {}),
        (UnmatchedAdapter, "no list", {ROWS: (1, 4)}, {"trainable_token_indices": {"lm_head": [1]}}),
        (UnmatchedAdapter, "does not hold", QUERY, {"trainable_token_indices": [1]}),
        (ShapeMismatch, "rows that do not fit", {ROWS: (2, 4)}, {"trainable_token_indices": [1]}),
        (ShapeMismatch, "indices below 12", {ROWS: (1, 4)}, {"trainable_token_indices": [12]}),
        (ShapeMismatch, "indices below 12", {ROWS: (1, 4)}, {"trainable_token_indices": [-1]}),
        (CorruptCheckpoint, "trained twice", {ROWS: (2, 4)}, {"trainable_token_indices": [1, 1]}),
        (UnsupportedCheckpoint, "TRAINABLE_TOKENS", QUERY, {"peft_type": "TRAINABLE_TOKENS"}),
    ],
)  # fmt: skip
def test_adapters(error, words, keys, fields):
    refused(error, words, keys, **fields)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("layer_replication", [[0, 1], [0, 1]], "replication"),
        ("alora_invocation_tokens", [1], "aLoRA"),
        ("arrow_config", {"top_k": 1}, "Arrow"),
        ("use_qalora", True, "QALoRA"),
        ("kasa_config", {"beta": 0.1}, "KaSA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("megatron_config", {"a": 1}, "Megatron"),
        ("enable_lora", [True, False], "merged"),
        ("lora_of_the_future", {"on": True}, "lora_of_the_future"),
        ("a_new_number", 0, "a_new_number"),
        ("init_lora_weights", "surprise", "not known"),
        ("init_lora_weights", 3, "not known"),
    ],
)
def test_fields_that_change_the_maths(field, value, words):
    refused(UnsupportedCheckpoint, words, QUERY, **{field: value})


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_fields_that_say_nothing(value):
    assert not survey(QUERY, lora_of_the_future=value, use_qalora=value, layer_replication=value).problems


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica", None])
def test_initialisations_that_leave_the_base_alone(init):
    assert not survey(QUERY, init_lora_weights=init, eva_config={"rho": 2.0}, loftq_config={"loftq_bits": 4}).problems


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq", "PiSSA"])
def test_initialisations_that_change_the_base(init):
    found = refused(UnsupportedCheckpoint, "--residual-base", QUERY, init_lora_weights=init)
    assert "path_initial_model_for_weight_conversion" in str(found.problems[0])
    subject = Subject(tree(LLAMA, UNTIED_CONFIG), tree(QUERY, CONFIG | {"init_lora_weights": init}), residual_base=True)
    found = Peft().survey(subject, ScaleOptions())
    assert not found.problems
    assert init in found.notes[0]


def test_every_field_of_the_installed_peft_is_known():
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    for kind in (peft.LoraConfig, peft.TrainableTokensConfig):
        raw = kind(**({"target_modules": ["x"]} if kind is peft.LoraConfig else {})).to_dict()
        raw = {name: sorted(value) if isinstance(value, set) else value for name, value in raw.items()}
        assert {field.name for field in dataclasses.fields(kind)} <= KNOWN_FIELDS
        assert read_config(tree({}, raw), ScaleOptions()).problems == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", "8"),
        ("r", True),
        ("r", 2.5),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("lora_alpha", "16"),
        ("lora_alpha", 10**400),
        ("use_rslora", "yes"),
        ("use_dora", 1),
        ("bias", "some"),
        ("rank_pattern", {"q": 0}),
        ("rank_pattern", {"q": [True]}),
        ("alpha_pattern", {"(": 1}),
        ("alpha_pattern", {"a" * 2000: 1}),
        ("alpha_pattern", [1]),
        ("alpha_pattern", {"(x+)+y": 1}),
        ("alpha_pattern", {"(a|b)*c": 1}),
        ("alpha_pattern", {".*a.*b.*c.*d.*e": 1}),
        ("trainable_token_indices", ["1"]),
        ("trainable_token_indices", 5),
        ("modules_to_save", {"a": 1}),
        ("modules_to_save", [1]),
    ],
)
def test_fields_that_make_no_sense(field, value):
    refused(CorruptCheckpoint, field, QUERY, **{field: value})


@given(
    st.dictionaries(
        st.sampled_from(
            sorted(CONFIG.keys() | {"bias", "use_dora", "rank_pattern", "init_lora_weights", "token_indices"})
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=4,
        ),
    )
)
def test_no_configuration_breaks_the_reader(fields):
    reading = read_config(tree({}, CONFIG | fields), ScaleOptions())
    assert all(isinstance(problem, LoraMergeError) for problem in reading.problems)


def test_flags_beside_a_configuration():
    found = refused(UsageError, "--lora-alpha", QUERY, options=ScaleOptions({"": 16.0}))
    assert "lora_alpha" in str(found.problems[0])
    refused(UsageError, "--rslora", QUERY, use_rslora=False, options=ScaleOptions({}, frozenset({""})))
    assert not survey(QUERY, lora_alpha=None, options=ScaleOptions({"": 16.0})).problems


@pytest.mark.parametrize(
    ("flag", "model", "others", "words"),
    [
        (True, {"model_type": "llama"}, {}, "model_type llama"),
        (False, {"model_type": "gpt2"}, {}, "model_type gpt2"),
        (True, {"model_type": "homemade"}, {}, "model_type homemade"),
        (True, {}, linear("h.square", 4, 4), "fan_in_fan_out true"),
        (True, {}, linear("h.fc", 8, 4), "the other layers (out, in)"),
        (True, {}, linear("h.fc", 8, 4) | linear("h.c_fc", 8, 4), "both kinds"),
    ],
)
def test_square_weights_of_unclear_orientation(flag, model, others, words):
    base = {"h.c_proj.weight": (4, 4), "h.square.weight": (4, 4), "h.fc.weight": (8, 4), "h.c_fc.weight": (4, 8)}
    refused(ShapeMismatch, words, linear("h.c_proj", 4, 4) | others, base, model=model, fan_in_fan_out=flag)


def test_grouped_convolutions():
    keys = {f"{PREFIX}c.lora_A.weight": (2, 8, 3, 3), f"{PREFIX}c.lora_B.weight": (6, 2, 1, 1)}
    refused(UnsupportedCheckpoint, "groups", keys, {"c.weight": (6, 4, 3, 3)})


def test_multihead_attention_has_no_dora():
    keys = linear("attn", 12, 4) | {f"{PREFIX}attn.lora_magnitude_vector": (12,)}
    refused(UnsupportedCheckpoint, "MultiheadAttention", keys, {"attn.in_proj_weight": (12, 4)}, use_dora=True)


@pytest.mark.parametrize(
    ("keys", "fields", "error", "words"),
    [
        (HEAD | {ROWS: (1, 4)}, {"trainable_token_indices": [1]}, UnsupportedCheckpoint, "trained rows"),
        (EMBED | linear("lm_head", 12, 4, 3), {"ensure_weight_tying": True}, ShapeMismatch, "not the same"),
        (EMBED | HEAD, {"ensure_weight_tying": True, "alpha_pattern": {"lm_head": 1}}, ShapeMismatch, "not the same"),
        ({f"{PREFIX}lm_head.weight": (15, 4)}, {}, ShapeMismatch, "another vocabulary"),
        (
            {f"{PREFIX}lm_head.weight": (15, 4), f"{PREFIX}model.embed_tokens.weight": (12, 4)},
            {"ensure_weight_tying": True},
            ShapeMismatch,
            "two shapes",
        ),
    ],
)
def test_tied_embeddings(keys, fields, error, words):
    refused(error, words, keys, TIED, model=TIED_CONFIG, **fields)


def test_tied_embeddings_of_an_encoder_and_decoder():
    model = TIED_CONFIG | {"is_encoder_decoder": True}
    refused(UnsupportedCheckpoint, "encoder", embedding("shared", 12, 4), {"shared.weight": (12, 4)}, model=model)


def test_tied_embeddings_whose_head_has_no_certain_name():
    name = "bert.embeddings.word_embeddings"
    refused(UnmatchedAdapter, "certain name", embedding(name, 12, 4), {f"{name}.weight": (12, 4)}, model=TIED_CONFIG)


@pytest.mark.parametrize(
    ("base", "model"),
    [
        (LLAMA, UNTIED_CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}}),
        (LLAMA, UNTIED_CONFIG | {"text_config": {"quantization_config": {"quant_method": "fp8"}}}),
        (LLAMA | {f"{Q}.qweight": (6, 4)}, None),
        (LLAMA | {f"{Q}.weight.absmax": (6,)}, None),
        (LLAMA | {"e.down_proj_blocks": (6,), "e.down_proj_scales": (6,)}, None),
        (LLAMA | {f"{Q}.weight.quant_state.bitsandbytes__nf4": (6,)}, None),
    ],
)
def test_quantised_bases(base, model):
    refused(UnsupportedCheckpoint, "quantised", QUERY, base, model=model)


@pytest.mark.parametrize(("dtype", "refuses"), [("uint8", True), ("int8", True), ("float16", False)])
def test_scales_beside_weights(dtype, refuses):
    base = tree(LLAMA | {f"{Q}.weight_scale": (6,)}, UNTIED_CONFIG, dtype=np.dtype(dtype))
    found = Peft().survey(Subject(base, tree(QUERY, CONFIG)), ScaleOptions())
    assert any("quantised" in str(problem) for problem in found.problems) is refuses


def test_integer_tensors():
    found = Peft().survey(Subject(tree(LLAMA), tree(QUERY, CONFIG, dtype=np.int8)), ScaleOptions())
    assert "not floating-point" in str(found.problems[0])
    found = Peft().survey(Subject(tree(LLAMA, dtype=np.int16), tree(QUERY, CONFIG)), ScaleOptions())
    assert "not floating-point" in str(found.problems[0])


def test_a_base_with_adapters_inside():
    refused(UnmatchedAdapter, "itself", QUERY, LLAMA | {f"{Q}.lora_A.default.weight": (2, 4)})


def test_no_adapter():
    assert isinstance(Peft().survey(Subject(tree(LLAMA)), ScaleOptions()).problems[0], UsageError)


@pytest.mark.parametrize(
    ("named", "called", "where", "warns"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", "x", False),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf", "x", True),
        ("meta-llama/Llama-2-7b-hf", "Qwen/Qwen2.5-7B", "x", True),
        ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B", "x", False),
        ("Qwen/Qwen2.5-0.5B", None, "/data/Qwen2.5-1.5B", True),
        ("Qwen/Qwen2.5-0.5B", None, "/cache/models--Qwen--Qwen2.5-0.5B/snapshots/0123456789abcdef0123", False),
        ("Qwen/Qwen2.5-0.5B", None, "/data/base", False),
        ("Qwen/Qwen2.5-0.5B", None, "/data/Qwen2.5-0.5B-Instruct", True),
        ("/home/me/out/checkpoint", "Qwen/Qwen2.5-0.5B", "x", False),
        (None, "Qwen/Qwen2.5-0.5B", "x", False),
    ],
)
def test_a_base_by_another_name(named, called, where, warns):
    model = UNTIED_CONFIG | ({"_name_or_path": called} if called else {})
    subject = Subject(tree(LLAMA, model, where), tree(QUERY, CONFIG | {"base_model_name_or_path": named}))
    found = Peft().survey(subject, ScaleOptions())
    assert not found.problems
    assert bool(found.warnings) is warns
