"""What the PEFT dialect makes of names, shapes and configurations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.dialects.interface import ScaleOptions, Subject
from lora_merge_cli.dialects.peft import Peft
from lora_merge_cli.dialects.peft.config import AdapterConfig
from lora_merge_cli.dialects.peft.patterns import first_fitting, scale_of
from lora_merge_cli.records import Survey
from tests.peft_trees import (
    CONFIG,
    EMBED,
    HEAD,
    LLAMA,
    PREFIX,
    QUERY,
    UNTIED_CONFIG,
    Q,
    Shapes,
    embedding,
    linear,
    merged,
    survey,
    tree,
)

GPT2 = {"model_type": "gpt2"}


def only_site(keys: Shapes, base: Shapes, **others):
    found = survey(keys, base, **others)
    assert not found.problems, found.problems
    (site,) = found.sites
    return site


def test_a_linear_layer():
    site = only_site(QUERY, LLAMA)
    assert site.targets == ((f"{Q}.weight",),)
    assert (site.operation, str(site.parameters.equation), site.parameters.rank) == ("add_delta", "ri,or->oi", 2)
    assert site.parameters.scale.value == 3
    assert site.parameters.scale.source == "alpha 6 / rank 2 (adapter_config.json)"
    assert (site.module, site.label) == ("q_proj", "layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("keys", "weight", "model", "equation"),
    [
        (linear("x.c_attn", 12, 4), (4, 12), GPT2, "ri,or->io"),
        (linear("x.fc", 12, 4), (12, 4), {}, "ri,or->oi"),
        (embedding("x.wte", 9, 4), (9, 4), {"architectures": ["GPT2Model"]}, "rv,dr->vd"),
        (embedding("x.wte", 4, 4), (4, 4), {"architectures": ["GPT2Model"]}, "rv,dr->vd"),
        ({f"{PREFIX}c.lora_A.weight": (2, 3, 5), f"{PREFIX}c.lora_B.weight": (4, 2, 1)}, (4, 3, 5), {}, "rix,or->oix"),
        (
            {f"{PREFIX}c.lora_A.weight": (2, 3, 5, 6), f"{PREFIX}c.lora_B.weight": (4, 2, 1, 1)},
            (4, 3, 5, 6),
            {},
            "rixy,or->oixy",
        ),
        (
            {f"{PREFIX}c.lora_A.weight": (2, 3, 5, 6, 7), f"{PREFIX}c.lora_B.weight": (4, 2, 1, 1, 1)},
            (4, 3, 5, 6, 7),
            {},
            "rixyz,or->oixyz",
        ),
    ],
)
@pytest.mark.parametrize("dora", [False, True])
def test_the_equation_agrees_with_the_forward_pass(keys, weight, model, equation, dora):
    module = next(iter(keys)).removeprefix(PREFIX).split(".lora_")[0]
    outputs = weight[1] if equation == "ri,or->io" or equation.startswith("rv") else weight[0]
    if dora:
        keys = keys | {f"{PREFIX}{module}.lora_magnitude_vector": (1, outputs) + (1,) * (len(weight) - 2)}
    site = only_site(keys, {f"{module}.weight": weight}, model=model, use_dora=dora)
    assert str(site.parameters.equation) == equation
    assert site.operation == ("dora" if dora else "add_delta")
    if dora:
        assert site.factors["magnitude"].extents(next(s for n, s in keys.items() if "magnitude" in n)) == (outputs,)
    random = np.random.default_rng(0)
    leaves = {name: random.normal(size=shape) for name, shape in keys.items()}
    w = random.normal(size=weight)
    forward = site.forward
    x = random.normal(size=[3 if dim in "bt" else dict(zip(forward.base.split("->")[0].split(",")[1], weight, strict=True))[dim]
                            for dim in forward.base.split(",")[0]])  # fmt: skip
    a, b = (site.factors[role].of(leaves[site.factors[role].path[0]]) for role in ("lora_a", "lora_b"))
    two_steps = np.einsum(forward.up, np.einsum(forward.down, x, a), b) * site.parameters.scale.value
    expected = np.einsum(forward.base, x, w) + two_steps
    np.testing.assert_allclose(np.einsum(forward.base, x, merged(site, w, leaves)), expected, atol=1e-9)


def test_a_bias_of_lora_b_is_a_site_of_its_own():
    module = "model.layers.0.mlp.up_proj"
    found = survey(linear(module, 8, 4) | {f"{PREFIX}{module}.lora_B.bias": (8,)}, lora_bias=True)
    assert not found.problems
    weight, bias = found.sites
    assert bias.targets == ((f"{module}.bias",),)
    assert bias.parameters.scale == weight.parameters.scale
    added = np.arange(8.0)
    np.testing.assert_array_equal(merged(bias, np.ones(8), {f"{PREFIX}{module}.lora_B.bias": added}), 1 + 3 * added)


@pytest.mark.parametrize(
    ("flag", "model", "others", "equation"),
    [
        (False, {"model_type": "llama"}, {}, "ri,or->oi"),
        (True, GPT2, {}, "ri,or->io"),
        # One kind of layer alone, or GPT-2's names alone: the flag is theirs.
        (True, {}, {}, "ri,or->io"),
        (True, {}, linear("h.c_attn", 4, 4), "ri,or->io"),
        (False, {}, {}, "ri,or->oi"),
        (True, {}, linear("h.c_fc", 8, 4), "ri,or->io"),
        (False, {"model_type": "homemade"}, {}, "ri,or->oi"),
        # The flag is that of the layer visited last: in a model with both kinds the model's type decides.
        (False, GPT2, linear("fc", 5, 4), "ri,or->io"),
        # Layers that are not square show what a model of unknown type is made of.
        (True, {"model_type": "homemade"}, linear("h.c_fc", 8, 4), "ri,or->io"),
    ],
)
def test_which_way_round_a_square_weight_is(flag, model, others, equation):
    base = {"h.c_proj.weight": (4, 4), "h.c_attn.weight": (4, 4), "h.c_fc.weight": (4, 8), "fc.weight": (5, 4)}
    found = survey(linear("h.c_proj", 4, 4) | others, base, model=model, fan_in_fan_out=flag)
    assert not found.problems, found.problems
    assert {str(s.parameters.equation) for s in found.sites if s.module == "c_proj"} == {equation}


def test_a_square_parameter_is_never_turned():
    site = only_site(
        linear("h.c_proj", 4, 4), {"h.c_proj.weight": (4, 4)}, model=GPT2, target_parameters=["c_proj.weight"]
    )
    assert str(site.parameters.equation) == "ri,or->oi"


def test_multihead_attention_counts_its_output_twice():
    keys = linear("attn", 12, 4) | linear("attn.base_layer.out_proj", 4, 4)
    found = survey(keys, {"attn.in_proj_weight": (12, 4), "attn.out_proj.weight": (4, 4)}, alpha_pattern={"attn": 2})
    assert not found.problems
    scales = {site.name: site.parameters.scale for site in found.sites}
    assert scales["attn.in_proj_weight"].value == 1
    assert scales["attn.out_proj.weight"].value == 2
    assert "two times" in scales["attn.out_proj.weight"].source


@pytest.mark.parametrize(
    "spelled",
    [
        lambda key: key,
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix(PREFIX),
        lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
        lambda key: key.replace(PREFIX, f"{PREFIX}module."),
        lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    ],
)
def test_spellings_of_one_key(spelled):
    site = only_site({spelled(key): shape for key, shape in QUERY.items()}, LLAMA)
    assert site.targets == ((f"{Q}.weight",),)


def test_paths_of_several_parts():
    adapter, base = tree(QUERY, CONFIG), tree(LLAMA, UNTIED_CONFIG)
    nested = {tuple(path[0].split(".")): spec for path, spec in base.index.tensors.items()}
    base = type(base)(type(base.index)(nested), "base", base.config)
    found = Peft().survey(Subject(base, adapter), ScaleOptions())
    assert found.sites[0].targets == (("model", "layers", "0", "self_attn", "q_proj", "weight"),)


@pytest.mark.parametrize(
    ("fields", "value", "words"),
    [
        ({}, 3, "alpha 6 / rank 2 (adapter_config.json)"),
        ({"use_rslora": True}, 6 / math.sqrt(2), "alpha 6 / sqrt(rank 2) (adapter_config.json, use_rslora)"),
        ({"alpha_pattern": {"q_proj": 5}}, 2.5, "alpha 5 / rank 2 (alpha_pattern 'q_proj')"),
        ({"alpha_pattern": {"proj": 5, "self_attn": 7, ".*q_proj": 9, "q_proj": 5}}, 4.5, "'.*q_proj'"),
        ({"r": 8, "rank_pattern": {"^model.layers.0.+q_proj": 2}}, 3, "rank_pattern"),
        ({"lora_alpha": None}, 4, "peft's default"),
        ({"lora_alpha": 0.5}, 0.25, "alpha 0.5"),
    ],
)
def test_scales(fields, value, words):
    scale = only_site(QUERY, LLAMA, **fields).parameters.scale
    assert scale.value == pytest.approx(value)
    assert words in scale.source


def no_config(keys: Shapes, options: ScaleOptions) -> Survey:
    return Peft().survey(Subject(tree(LLAMA, UNTIED_CONFIG), tree(keys)), options)


def test_without_a_configuration_the_flags_state_the_scale():
    (site,) = no_config(QUERY, ScaleOptions({"": 8.0})).sites
    assert site.parameters.scale.source == "alpha 8 / rank 2 (--lora-alpha)"
    (site,) = no_config(QUERY, ScaleOptions({"": 8.0}, frozenset({""}))).sites
    assert site.parameters.scale.value == pytest.approx(8 / math.sqrt(2))
    (site,) = no_config(QUERY, ScaleOptions()).sites
    assert site.parameters.scale.value is None
    assert "--lora-alpha" in str(Peft().unknown_scale([site], "adapter"))


def test_without_a_configuration_magnitudes_say_dora():
    (site,) = no_config(QUERY | {f"{PREFIX}{Q}.lora_magnitude_vector": (6,)}, ScaleOptions({"": 8.0})).sites
    assert site.operation == "dora"


_PATTERN_KEYS = st.lists(
    st.sampled_from(
        ["q", "q_proj", ".*q_proj", "proj", "^model.q_proj", "model.q.proj", "a|q_proj", r"\d.q_proj", "0"]
    ),
    unique=True,
)


@given(_PATTERN_KEYS, st.sampled_from(["model.q_proj", "q_proj", "model.0.q_proj", "x.a", "model.0", "model.qq_proj"]))
def test_patterns_fit_as_in_peft(keys, module):
    pytest.importorskip("torch")
    other_tools = pytest.importorskip("peft.utils.other")
    expected = other_tools.get_pattern_key(keys, module)
    assert (first_fitting(keys, module) or module) == expected


@given(st.integers(1, 512), st.floats(-1e6, 1e6), st.booleans())
def test_the_scale_is_that_of_the_paper(rank, alpha, rslora):
    scale = scale_of(AdapterConfig(alpha=alpha, alpha_source="x", rslora=rslora), "q_proj", rank)
    assert scale.value == pytest.approx(alpha / (math.sqrt(rank) if rslora else rank))


def test_two_experts_named_one_by_one_are_linear_layers():
    base = {f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight": (6, 4) for n in range(2)}
    keys = linear("model.layers.0.block_sparse_moe.experts.1.w1", 6, 4)
    assert only_site(keys, base).name.endswith("experts.1.w1.weight")


def test_stacked_experts():
    module = "model.layers.0.mlp.experts"
    base = {f"{module}.gate_up_proj": (3, 4, 10), f"{module}.down_proj": (3, 5, 4)}
    keys = {
        f"{PREFIX}{module}.base_layer.lora_A.weight": (6, 4),
        f"{PREFIX}{module}.base_layer.lora_B.weight": (10, 6),
        f"{PREFIX}{module}.lora_A.weight": (6, 5),
        f"{PREFIX}{module}.lora_B.weight": (4, 6),
    }
    found = survey(
        keys,
        base,
        model={"model_type": "gpt_oss"},
        peft_version="0.21.2",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        alpha_pattern={"experts.down_proj": 2},
    )
    assert not found.problems, found.problems
    assert {site.module: site.parameters.scale.value for site in found.sites} == {"gate_up_proj": 3, "down_proj": 1}
    assert {site.parameters.rank for site in found.sites} == {2}


def test_what_an_adapter_is_by_itself():
    keys = QUERY | EMBED | {f"{PREFIX}score.weight": (3, 4)}
    summary = Peft().describe(
        tree(keys, CONFIG | {"modules_to_save": ["score"], "base_model_name_or_path": "who/what"}), ScaleOptions()
    )
    assert (summary.method, summary.base, summary.problems) == ("LoRA", "who/what", ())
    assert [(row.module, row.rank, row.shape) for row in summary.rows] == [
        (Q, 2, (6, 4)),
        ("model.embed_tokens", 2, (4, 12)),
    ]
    assert summary.riding == ("score.weight: modules_to_save",)


def test_a_summary_names_the_method():
    assert Peft().describe(tree(QUERY, CONFIG | {"use_rslora": True}), ScaleOptions()).method == "rsLoRA"
    dora = QUERY | {f"{PREFIX}{Q}.lora_magnitude_vector": (6,)}
    assert Peft().describe(tree(dora, CONFIG | {"use_dora": True}), ScaleOptions()).method == "DoRA"
    other = Peft().describe(tree({}, {"peft_type": "GRALORA"}), ScaleOptions())
    assert (other.method, len(other.problems)) == ("GRALORA", 1)


@pytest.mark.parametrize(
    ("shapes", "config", "expected"),
    [
        (QUERY, None, True),
        (EMBED, None, True),
        ({}, {"peft_type": "IA3"}, True),
        ({"x.lora_A.default.weight": (2, 4)}, None, True),
        (LLAMA, UNTIED_CONFIG, False),
        ({"model.q_proj.lora.A.weight": (2, 4)}, None, False),
        ({"lora_unet_down.lora_down.weight": (2, 4)}, None, False),
    ],
)
def test_which_files_are_peft_s(shapes, config, expected):
    assert Peft().matches(tree(shapes, config)) is expected


@given(st.sets(st.sampled_from(["q", "embed", "head", "norm", "bias", "copy", "untrained", "sampler"]), min_size=1))
def test_every_key_is_claimed_once(parts):
    keys: Shapes = {}
    if "q" in parts:
        keys |= QUERY
    if "embed" in parts:
        keys |= EMBED
    if "head" in parts:
        keys |= HEAD
    if "norm" in parts:
        keys[f"{PREFIX}model.norm.weight"] = (4,)
    if "bias" in parts:
        keys[f"{PREFIX}model.layers.0.mlp.up_proj.bias"] = (8,)
    if "copy" in parts:
        keys[f"{PREFIX}model.embed_tokens.base_layer.weight"] = (12, 4)
    if "untrained" in parts:
        keys[f"{PREFIX}model.norm.original_module.weight"] = (4,)
    if "sampler" in parts:
        keys[f"{PREFIX}{Q}.lora_monteclora_sampler.std_prior"] = (2,)
    found = survey(keys)
    assert not found.problems
    claims = [factor.path[0] for site in found.sites for factor in site.factors.values()]
    claims += [one.path[0] for one in (*found.replacements, *found.dropped)]
    assert sorted(claims) == sorted(keys)
