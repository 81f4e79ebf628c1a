"""Whole tensors, token rows and tied embeddings in PEFT adapters."""

from __future__ import annotations

import pytest

from lora_merge_cli.records import Survey
from tests.peft_trees import (
    EMBED,
    HEAD,
    LLAMA,
    PREFIX,
    QUERY,
    TIED,
    TIED_CONFIG,
    UNTIED_CONFIG,
    Shapes,
    embedding,
    linear,
    survey,
)

EMBEDDING, LM_HEAD = ("model.embed_tokens.weight",), ("lm_head.weight",)
ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
UNTIES = {"tie_word_embeddings": False}


def fine(keys: Shapes, base: Shapes = LLAMA, **others) -> Survey:
    found = survey(keys, base, **others)
    assert not found.problems, found.problems
    return found


def replaced(found: Survey):
    return [(one.target, str(one.path[0]).removeprefix(PREFIX), one.rows) for one in found.replacements]


@pytest.mark.parametrize(
    ("key", "target", "fields", "reason"),
    [
        ("model.norm.weight", "model.norm.weight", {"modules_to_save": ["norm"]}, "modules_to_save"),
        ("model.norm.modules_to_save.weight", "model.norm.weight", {"modules_to_save": ["norm"]}, "modules_to_save"),
        ("model.norm.modules_to_save.default.weight", "model.norm.weight", {}, "saved whole"),
        ("model.layers.0.mlp.up_proj.bias", "model.layers.0.mlp.up_proj.bias", {"bias": "all"}, "bias all"),
        (
            "model.layers.0.mlp.up_proj.base_layer.bias",
            "model.layers.0.mlp.up_proj.bias",
            {"bias": "lora_only"},
            "bias lora",
        ),
        ("model.embed_tokens.base_layer.weight", "model.embed_tokens.weight", {}, "own copy"),
        ("lm_head.weight", "lm_head.weight", {}, "saved embedding"),
    ],
)
def test_what_is_brought_whole(key, target, fields, reason):
    found = fine(QUERY | {f"{PREFIX}{key}": LLAMA[target]}, **fields)
    (one,) = found.replacements
    assert one.target == (target,)
    assert reason in one.reason
    assert not found.warnings


def test_a_bias_inside_multihead_attention():
    keys = linear("attn", 12, 4) | {
        f"{PREFIX}attn.base_layer.in_proj_bias": (12,),
        f"{PREFIX}attn.base_layer.out_proj.base_layer.bias": (4,),
    }
    base = {"attn.in_proj_weight": (12, 4), "attn.in_proj_bias": (12,), "attn.out_proj.bias": (4,)}
    assert {one.target for one in fine(keys, base, bias="all").replacements} == {
        ("attn.in_proj_bias",),
        ("attn.out_proj.bias",),
    }


def test_the_second_copy_of_a_saved_bias_is_dropped():
    keys = {
        f"{PREFIX}model.layers.0.mlp.up_proj.{part}": (8,)
        for part in ("bias", "modules_to_save.bias", "original_module.bias")
    }
    keys[f"{PREFIX}model.layers.0.mlp.up_proj.weight"] = (8, 4)
    found = fine(QUERY | keys, bias="all", modules_to_save=["up_proj"])
    assert [one for one in replaced(found) if one[1].endswith(".bias")] == [
        (("model.layers.0.mlp.up_proj.bias",), "model.layers.0.mlp.up_proj.bias", None),
    ]
    assert len(found.dropped) == 2


def test_a_new_head_is_created_with_a_warning():
    keys = QUERY | {f"{PREFIX}score.weight": (3, 4)}
    found = fine(keys, task_type="SEQ_CLS")
    assert replaced(found) == [(("score.weight",), "score.weight", None)]
    assert "num_labels" in found.warnings[0]
    found = fine(keys | {f"{PREFIX}head_of_mine.weight": (3, 4)}, modules_to_save=["head_of_mine", "score"])
    assert len(found.replacements) == 2


def test_a_bias_that_was_not_saved():
    assert "lost" in fine(QUERY, bias="lora_only").warnings[0]


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (UNTIED_CONFIG, {"vocab_size": 15}),
        (UNTIED_CONFIG | {"text_config": {"vocab_size": 12}}, {"vocab_size": 15, "text_config.vocab_size": 15}),
        ({"tie_word_embeddings": False, "text_config": {"vocab_size": 12}}, {"text_config.vocab_size": 15}),
    ],
)
def test_a_resized_vocabulary(model, config):
    keys = QUERY | {f"{PREFIX}model.embed_tokens.weight": (15, 4), f"{PREFIX}lm_head.weight": (15, 4)}
    assert fine(keys, model=model).config == config
    adapted = embedding("model.embed_tokens", 15, 4) | linear("lm_head", 15, 4)
    copies = {f"{PREFIX}{module}.base_layer.weight": (15, 4) for module in ("model.embed_tokens", "lm_head")}
    found = fine(adapted | copies, model=model)
    assert (found.config, len(found.sites), len(found.replacements)) == (config, 2, 2)


TIED_CASES = {
    "embedding": (EMBED, {}, [EMBEDDING], [], True, UNTIES),
    "head": (HEAD, {}, [LM_HEAD], [], True, UNTIES),
    "both": (EMBED | HEAD, {}, [EMBEDDING, LM_HEAD], [], True, UNTIES),
    "tied adapters": (EMBED | HEAD, {"ensure_weight_tying": True}, [EMBEDDING], [], False, {}),
    "tied adapter of the head": (HEAD, {"ensure_weight_tying": True}, [EMBEDDING], [], False, {}),
    "neither": (QUERY, {}, [("model.layers.0.self_attn.q_proj.weight",)], [], False, {}),
    "saved head": ({f"{PREFIX}lm_head.weight": (12, 4)}, {}, [], [LM_HEAD], True, UNTIES),
    "saved embedding": ({f"{PREFIX}model.embed_tokens.weight": (12, 4)}, {}, [], [EMBEDDING], True, UNTIES),
    "saved both": (
        {f"{PREFIX}lm_head.weight": (12, 4), f"{PREFIX}model.embed_tokens.weight": (12, 4)},
        {},
        [],
        [LM_HEAD, EMBEDDING],
        True,
        UNTIES,
    ),
    "tied and saved both": (
        {f"{PREFIX}lm_head.weight": (12, 4), f"{PREFIX}model.embed_tokens.weight": (12, 4)},
        {"ensure_weight_tying": True},
        [],
        [EMBEDDING],
        False,
        {},
    ),
    "rows": ({ROWS: (2, 4)}, {"trainable_token_indices": [5, 3]}, [], [EMBEDDING], False, {}),
    "resized base under the embedding": (
        embedding("model.embed_tokens", 15, 4) | {f"{PREFIX}model.embed_tokens.base_layer.weight": (15, 4)},
        {},
        [EMBEDDING],
        [EMBEDDING, LM_HEAD],
        True,
        UNTIES | {"vocab_size": 15},
    ),
    "resized base under the head": (
        linear("lm_head", 15, 4) | {f"{PREFIX}lm_head.base_layer.weight": (15, 4)},
        {},
        [LM_HEAD],
        [LM_HEAD, EMBEDDING],
        True,
        UNTIES | {"vocab_size": 15},
    ),
    "resized and saved alone": (
        {f"{PREFIX}model.embed_tokens.weight": (15, 4)},
        {},
        [],
        [EMBEDDING],
        False,
        {"vocab_size": 15},
    ),
}


@pytest.mark.parametrize("case", TIED_CASES.values(), ids=TIED_CASES.keys())
@pytest.mark.parametrize("model", [TIED_CONFIG, {"vocab_size": 12}, {"text_config": {"tie_word_embeddings": True}}])
def test_tied_embeddings(case, model):
    keys, fields, sites, targets, created, config = case
    found = fine(keys, TIED, model=model, **fields)
    assert [site.targets[0] for site in found.sites] == sites
    assert [one.target for one in found.replacements] == targets
    assert [(one.path, one.source) for one in found.created] == ([(LM_HEAD, EMBEDDING)] if created else [])
    expected = dict(config)
    if "text_config" in model and config.get("tie_word_embeddings") is False:
        expected["text_config.tie_word_embeddings"] = False
    assert found.config == expected
    claimed = {factor.path for site in found.sites for factor in site.factors.values()}
    claimed |= {one.path for one in (*found.replacements, *found.dropped)}
    assert claimed == {(key,) for key in keys}


@pytest.mark.parametrize(
    ("keys", "fields", "sites", "targets", "tied"),
    [
        (EMBED, {}, [EMBEDDING], [], False),
        (EMBED | HEAD, {"ensure_weight_tying": True}, [EMBEDDING, LM_HEAD], [], True),
        ({ROWS: (1, 4)}, {"trainable_token_indices": [5]}, [], [EMBEDDING, LM_HEAD], True),
        (QUERY, {}, [("model.layers.0.self_attn.q_proj.weight",)], [], None),
    ],
)
def test_tied_embeddings_that_are_both_stored(keys, fields, sites, targets, tied):
    found = fine(keys, LLAMA, model=TIED_CONFIG, **fields)
    assert [site.targets[0] for site in found.sites] == sites
    assert [one.target for one in found.replacements] == targets
    assert found.created == ()
    assert found.equal == (() if tied is None else ((EMBEDDING, LM_HEAD),))
    assert found.config == (UNTIES if tied is False else {})
    assert len({str(site.parameters.equation) for site in found.sites}) <= 1


@pytest.mark.parametrize(
    ("on_disk", "head"),
    [
        ("model.embed_tokens", "lm_head"),
        ("language_model.model.embed_tokens", "language_model.lm_head"),
        ("model.language_model.embed_tokens", "lm_head"),
        ("transformer.wte", "lm_head"),
        ("gpt_neox.embed_in", "embed_out"),
        ("model.decoder.embed_tokens", "lm_head"),
        ("wte", "lm_head"),
    ],
)
def test_what_an_untied_head_is_called(on_disk, head):
    found = fine(embedding(on_disk, 12, 4), {f"{on_disk}.weight": (12, 4), "x.weight": (3, 3)}, model={})
    assert [one.path for one in found.created] == [(f"{head}.weight",)]
    assert bool(found.warnings) is (on_disk == "wte")


@pytest.mark.parametrize("architecture", ["Qwen3Model", "LlamaForSequenceClassification", "BertForTokenClassification"])
def test_a_model_without_a_head_has_nothing_to_untie(architecture):
    found = fine(EMBED, TIED, model=TIED_CONFIG | {"architectures": [architecture]})
    assert (found.created, found.config) == ((), {})


def test_untied_embeddings_stay_apart():
    found = fine(EMBED | HEAD, LLAMA, ensure_weight_tying=True)
    assert (len(found.sites), found.created, found.config, found.equal) == (2, (), {}, ())


@pytest.mark.parametrize(
    ("keys", "fields", "rows"),
    [
        ({ROWS: (2, 4)}, {"trainable_token_indices": [7, 0]}, {EMBEDDING: (7, 0)}),
        ({f"{ROWS}.default": (1, 4)}, {"trainable_token_indices": {"embed_tokens": [11]}}, {EMBEDDING: (11,)}),
        (
            {ROWS: (1, 4), f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta": (2, 4)},
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [3, 2]}},
            {EMBEDDING: (1,), LM_HEAD: (3, 2)},
        ),
        (
            {f"{PREFIX}{m}.trainable_tokens_delta": (1, 4) for m in ("model.embed_tokens", "lm_head")},
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": [4]},
            {EMBEDDING: (4,), LM_HEAD: (4,)},
        ),
    ],
)
def test_token_rows(keys, fields, rows):
    found = fine(keys, **fields)
    assert {one.target: one.rows for one in found.replacements} == rows


def test_token_rows_of_a_resized_embedding_come_after_it():
    keys = {
        ROWS: (1, 4),
        f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight": (15, 4),
        f"{PREFIX}lm_head.weight": (15, 4),
    }
    found = fine(keys, trainable_token_indices=[14])
    assert [one.rows for one in found.replacements] == [None, None, (14,)]
    assert found.config == {"vocab_size": 15}


def test_a_tied_head_with_the_same_rows():
    keys = {f"{PREFIX}{m}.trainable_tokens_delta": (1, 4) for m in ("model.embed_tokens", "lm_head")}
    found = fine(keys, TIED, model=TIED_CONFIG, peft_type="TRAINABLE_TOKENS", token_indices=[4])
    assert [one.target for one in found.replacements] == [EMBEDDING]
    assert "tied" in found.dropped[0].reason
