"""Names of live modules against names on disk: Transformers' own saves, and what must be refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.torch_names import clean_name, dotted, match_names, nearest_names
from lora_merge_cli.dialects.torch_renames import FAMILIES
from lora_merge_cli.errors import UnmatchedAdapter
from lora_merge_cli.records import Index, KeyPath, TensorSpec


def tree(names: Iterable[str | KeyPath], config: dict[str, Any] | None = None) -> Tree:
    paths = [(name,) if isinstance(name, str) else name for name in names]
    return Tree(Index({path: TensorSpec(path, (1,), np.dtype(np.float32)) for path in paths}), "base", config)


def matched(wanted: Iterable[str], base: Iterable[str], model_type: str | None = None) -> dict[str, str]:
    config = None if model_type is None else {"model_type": model_type}
    return {name: str(path[0]) for name, path in match_names(list(wanted), tree(base, config)).items()}


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("module.model.x.weight", "model.x.weight"),
        ("module.module.x.weight", "x.weight"),
        ("_orig_mod.module.x.weight", "x.weight"),
        ("module._orig_mod.x.weight", "x.weight"),
        ("model._orig_mod.layers.0._checkpoint_wrapped_module.x.weight", "model.layers.0.x.weight"),
        ("_fsdp_wrapped_module.model._fsdp_wrapped_module.x", "model.x"),
        ("model.module.x.weight", "model.module.x.weight"),
        ("my_module.x", "my_module.x"),
        ("x_orig_mod.y", "x_orig_mod.y"),
        ("model._orig_module.x", "model._orig_module.x"),
        ("module", "module"),
        ("", ""),
    ],
)
def test_wrappers_are_stripped_at_dot_boundaries(name: str, cleaned: str) -> None:
    assert clean_name(name) == cleaned


WORDS = st.sampled_from(
    ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model", "0", "q", "w"]
)


@given(st.lists(WORDS, min_size=1, max_size=8).map(".".join))
def test_cleaning_twice_changes_nothing_more(name: str) -> None:
    assert clean_name(clean_name(name)) == clean_name(name)


def tiny(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    }
    mrope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    qwen = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    mllama = {**vision, "attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0]}
    options: dict[str, Any] = {
        "llava": {
            "text_config": {**text, "model_type": "llama"},
            "vision_config": {**vision, "model_type": "clip_vision_model"},
        },
        "llava_next": {
            "text_config": {**text, "model_type": "llama"},
            "vision_config": {**vision, "model_type": "clip_vision_model"},
        },
        "paligemma": {
            "text_config": {**text, "model_type": "gemma", "head_dim": 8},
            "vision_config": {**vision, "model_type": "siglip_vision_model"},
            "projection_dim": 16,
        },
        "gemma3": {
            "text_config": {**text, "head_dim": 8},
            "vision_config": {**vision, "model_type": "siglip_vision_model"},
        },
        "mistral3": {
            "text_config": {**text, "model_type": "mistral"},
            "vision_config": {**vision, "model_type": "pixtral"},
        },
        "mllama": {
            "text_config": {**text, "cross_attention_layers": []},
            "vision_config": {**mllama, "vision_output_dim": 32},
        },
        "qwen2_vl": {"text_config": {**text, "rope_parameters": mrope}, "vision_config": {**qwen, "embed_dim": 16}},
        "qwen2_5_vl": {
            "text_config": {**text, "rope_parameters": mrope},
            "vision_config": {**qwen, "intermediate_size": 24, "out_hidden_size": 16},
        },
        "gpt_neox": {k: v for k, v in text.items() if k != "num_key_value_heads"},
        "vit": vision,
        "phimoe": {**text, "num_local_experts": 2},
        "mixtral": {**text, "num_local_experts": 2},
        "granitemoe": {**text, "num_local_experts": 2},
    }
    config = transformers.AutoConfig.for_model(name, **options[name])
    kinds = {"gpt_neox": "CausalLM", "phimoe": "CausalLM", "mixtral": "CausalLM", "granitemoe": "CausalLM"}
    kind = "ImageClassification" if name == "vit" else kinds.get(name, "ImageTextToText")
    return getattr(transformers, f"AutoModelFor{kind}").from_config(config)


@pytest.mark.parametrize("config", [True, False], ids=["model_type", "no configuration"])
@pytest.mark.parametrize(
    "model_type",
    [
        *("llava", "llava_next", "paligemma", "gemma3", "mistral3", "mllama", "qwen2_vl", "qwen2_5_vl"),
        *("gpt_neox", "vit", "phimoe", "mixtral", "granitemoe"),
    ],
)
def test_every_linear_layer_is_found_in_what_transformers_saves(model_type: str, config: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    model = tiny(model_type)
    # The value tells which tensor on disk is which parameter.
    weights = {
        f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.fill_(number + 1)
    model.save_pretrained(tmp_path)
    disk = safetensors.load_file(tmp_path / "model.safetensors")
    base = tree(disk, {"model_type": model_type} if config else None)
    # A tied head is stored under the name of the embedding alone.
    stored = {float(tensor.flatten()[0]) for tensor in disk.values()}
    embedding = model.get_input_embeddings()
    tied = [
        name
        for name, weight in weights.items()
        if embedding is not None and weight is getattr(embedding, "weight", None)
    ]
    assert all(float(weight.flatten()[0]) in stored for weight in weights.values())
    wanted = [name for name in weights if name not in tied]
    assert len(wanted) > 4
    found = match_names(wanted, base)
    assert sorted(found) == sorted(wanted)
    for name, (path,) in found.items():
        assert float(disk[path].flatten()[0]) == float(weights[name].flatten()[0]), (name, path)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_both_directions_of_a_family_undo_each_other(family: Any) -> None:
    names = [f"{memory}x.0.y" for memory, _ in family.prefixes] + [f"a.{memory}.b" for memory, _ in family.parts]
    for name in names:
        assert family.to_disk(name) != name
        assert family.to_memory(family.to_disk(name)) == name


Q = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")


def layers(prefix: str, count: int = 2) -> list[str]:
    return [f"{prefix}layers.{n}.{q}" for n in range(count) for q in Q]


@pytest.mark.parametrize(
    ("wanted", "base", "model_type"),
    [
        ("model.", "", "llama"),
        ("", "model.", "llama"),
        ("transformer.", "", "gpt2"),
        ("", "transformer.", "gpt2"),
        ("model.language_model.", "language_model.model.", "llava"),
        ("language_model.model.", "model.language_model.", "llava"),
        ("model.vision_tower.encoder.", "vision_tower.vision_model.encoder.", "llava"),
        ("vision_tower.vision_model.encoder.", "model.vision_tower.encoder.", "llava"),
        ("model.language_model.", "model.", "qwen2_vl"),
        ("model.", "model.language_model.", "qwen2_vl"),
        ("model.", "model.language_model.", "qwen3_5"),
        ("encoder.", "vision_model.encoder.", "clip"),
        # The bare model of a vision-language one.
        ("language_model.", "language_model.model.", "llava"),
    ],
)
def test_known_spellings_of_both_sides(wanted: str, base: str, model_type: str) -> None:
    for config in (model_type, None):
        assert matched(layers(wanted), layers(base), config) == dict(zip(layers(wanted), layers(base), strict=True))


def test_wrappers_on_either_side_do_not_matter() -> None:
    assert match_names(["module.model.a.weight"], tree(["_orig_mod.model.a.weight"])) == {
        "module.model.a.weight": ("_orig_mod.model.a.weight",)
    }


def test_a_nested_base_is_compared_by_its_dotted_name() -> None:
    paths: list[KeyPath] = [("model", "layers.0.weight"), ("model", "layers", 1, "weight")]
    wanted = ["model.layers.0.weight", "model.layers.1.weight"]
    assert match_names(wanted, tree(paths)) == dict(zip(wanted, paths, strict=True))
    assert dotted(paths[1]) == wanted[1]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("state_dict", "module.model.x.weight"), "state_dict.model.x.weight"),
        (("model", "_orig_mod.module.model.x.weight"), "model.model.x.weight"),
        (("model", "a._orig_mod.x.weight"), "model.a.x.weight"),
        (("model", "_orig_mod", "x", 0, "module.w"), "model.x.0.w"),
        (("module", "x.weight"), "x.weight"),
        (("module.x.weight",), "x.weight"),
        # Within a tree of modules it may be the model's own.
        (("model", "module", "x"), "model.module.x"),
    ],
)
def test_wrappers_are_stripped_from_every_part(path: KeyPath, name: str) -> None:
    assert dotted(path) == name


@given(st.lists(WORDS, min_size=1, max_size=8).map(".".join))
def test_a_path_of_one_part_is_its_name(name: str) -> None:
    assert dotted((name,)) == clean_name(name)


def test_containers_stay_in_names() -> None:
    paths: list[KeyPath] = [(key, "module.x") for key in ("model", "ema", "state_dict", "optimizer")]
    assert len(set(map(dotted, paths))) == len(paths)


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "net", "network", "module", "params", "ema"]
)
@pytest.mark.parametrize(
    ("wanted", "names", "model_type"),
    [
        ("model.", "model.", "llama"),
        ("model.", "", "llama"),
        ("", "model.", "llama"),
        ("model.language_model.", "language_model.model.", "llava"),
        ("model.language_model.", "model.", "qwen2_vl"),
    ],
)
def test_training_files(key: str, wrapper: str, wanted: str, names: str, model_type: str) -> None:
    paths: list[KeyPath] = [(key, f"{wrapper}{name}") for name in layers(names)]
    beside: list[KeyPath] = [("optimizer", "state", 0, "exp_avg"), ("epoch",)]
    for config in ({"model_type": model_type}, None):
        assert match_names(layers(wanted), tree([*paths, *beside], config)) == dict(
            zip(layers(wanted), paths, strict=True)
        )


def test_a_key_that_no_training_file_uses_is_not_looked_through() -> None:
    assert match_names(layers(""), tree([("draft", name) for name in layers("")])) == {}


@pytest.mark.parametrize("wanted", ["model.", ""])
@pytest.mark.parametrize("keys", [("model", "ema"), ("ema", "model"), ("state_dict", "shadow"), ("module", "ema")])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_two_models_in_one_file_are_ambiguous(keys: tuple[str, str], wanted: str, wrapper: str) -> None:
    for names in (layers("model."), layers("")):
        paths = [(keys[0], f"{wrapper}{name}") for name in names] + [(keys[1], name) for name in names]
        if names != layers(wanted) and "shadow" in keys:
            continue
        with pytest.raises(UnmatchedAdapter, match="several models") as raised:
            match_names(layers(wanted), tree(paths))
        assert all(f"{key}/" in str(raised.value) for key in keys)


def test_the_model_that_has_more_of_the_names_is_taken() -> None:
    paths: list[KeyPath] = [("model", name) for name in layers("model.")]
    average: list[KeyPath] = [("ema", name) for name in layers("model.")[:2]]
    assert list(match_names(layers("model."), tree([*average, *paths])).values()) == paths
    with pytest.raises(UnmatchedAdapter, match="several models"):
        match_names(layers("model.")[:2], tree([*average, *paths]))


def test_halves_of_a_nested_model_are_no_two_models() -> None:
    paths: list[KeyPath] = [
        (half, "layers", n, "q", "weight") for half in ("model", "mtp", "encoder") for n in range(2)
    ]
    wanted = [dotted(path) for path in paths]
    for some in (wanted, wanted[:2], wanted[2:4], wanted[4:]):
        assert list(match_names(some, tree(paths)).values()) == [path for path in paths if dotted(path) in some]


def test_a_family_of_another_model_type_is_not_tried() -> None:
    assert matched(layers("model.language_model."), layers("language_model.model."), "llama") == {}
    assert matched(["m.mlp.gate.weight"], ["m.block_sparse_moe.gate.weight"], "qwen3_moe") == {}
    assert matched(["m.mlp.gate.weight"], ["m.block_sparse_moe.gate.weight"], "mixtral") != {}


def test_model_types_of_parts_count() -> None:
    base = tree(["m.block_sparse_moe.gate.weight"], {"model_type": "x", "text_config": {"model_type": "mixtral"}})
    assert match_names(["m.mlp.gate.weight"], base)


def test_a_name_that_the_base_has_is_taken_as_it_is() -> None:
    base = ["lm_head.weight", *layers("language_model.model."), "language_model.lm_head.weight"]
    wanted = ["lm_head.weight", *layers("model.language_model.")]
    found = matched(wanted, base, "llava")
    assert found["lm_head.weight"] == "lm_head.weight"
    assert len(found) == 5


def test_names_that_fit_nowhere_are_absent() -> None:
    assert matched([*layers(""), "layers.9.other.weight"], layers("model.")).keys() == set(layers(""))
    assert matched(["a.b.weight"], ["c.d.weight"]) == {}
    assert matched([], ["c.d.weight"]) == {}


def test_two_names_never_share_a_key() -> None:
    assert matched(["model.x.weight", "x.weight"], ["x.weight"]) == {"x.weight": "x.weight"}
    # Stripping "model." would put both on one key.
    found = matched(["model.x.weight", "model.model.x.weight"], ["x.weight"])
    assert len(set(found.values())) == len(found)
    # One chain of renamings places both, on the same key; shorter ones place either.
    with pytest.raises(UnmatchedAdapter, match="more than one way"):
        matched(
            ["vision_tower.vision_model.x.weight", "model.vision_tower.x.weight"], ["vision_tower.x.weight"], "llava"
        )


def test_one_renaming_serves_all_names() -> None:
    wanted = [*layers("", 2), "model.head.weight"]
    # Adding a prefix places four names, taking one away places one; no mixture is made of them.
    found = matched(wanted, [*layers("model.", 2), "head.weight"])
    assert found.keys() == set(layers("", 2))


def test_two_places_for_the_same_names_are_ambiguous() -> None:
    base = [*layers("model."), *layers("transformer.")]
    with pytest.raises(UnmatchedAdapter, match="more than one way") as raised:
        match_names(layers(""), tree(base))
    assert "model.layers.0" in str(raised.value)
    assert "transformer.layers.0" in str(raised.value)


def test_a_name_of_two_keys_is_refused_when_it_is_wanted() -> None:
    base = tree(["x.weight", "module.x.weight", "y.weight"])
    assert match_names(["y.weight"], base) == {"y.weight": ("y.weight",)}
    with pytest.raises(UnmatchedAdapter, match="several keys"):
        match_names(["x.weight"], base)


def test_nearest_names_are_of_the_same_layer() -> None:
    base = tree([*layers("model.", 40), "lm_head.weight"])
    assert (
        nearest_names("model.layers.7.self_attention.q_proj.weight", base)[0]
        == "model.layers.7.self_attn.q_proj.weight"
    )
    assert nearest_names("model.layers.7.self_attn.z_proj.weight", base, 1) != ()
    assert nearest_names("q", tree([])) == ()


@pytest.mark.parametrize(
    "call", [lambda names, base: match_names(names, base), lambda names, base: nearest_names("m.x", base)]
)
def test_thousands_of_names_take_seconds_at_most(call: Callable[[list[str], Tree], object]) -> None:
    names = [f"layers.{n}.mlp.experts.{e}.{w}.weight" for n in range(20) for e in range(64) for w in ("w1", "w2", "w3")]
    start = time.perf_counter()
    call(names, tree(f"model.{name}" for name in names))
    assert time.perf_counter() - start < 10
