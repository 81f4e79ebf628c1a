"""Which layer each leaf belongs to, for the names and shapes that real models have."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.dialects import DIALECTS, Dialect, adapter_dialects
from lora_merge_cli.dialects.detached import Detached
from lora_merge_cli.dialects.minimind import MiniMind
from lora_merge_cli.dialects.nnx import Nnx
from lora_merge_cli.dialects.openpi import OpenPI
from lora_merge_cli.dialects.torch_model import Plain
from lora_merge_cli.records import Depth, Index, KeyPath, TensorSpec
from tests.trees import ACTION, PALIGEMMA, build

LAYOUTS = Path(__file__).parent / "layouts"

SUFFIXES: list[KeyPath] = [(), ("value",)]


def index(shapes: Mapping[KeyPath, tuple[int, ...]]) -> Index:
    return Index({path: TensorSpec(path, shape, np.dtype(np.float32)) for path, shape in shapes.items()})


def torch_depths(names: Iterable[str], dialect: Dialect | None = None) -> dict[str, Depth]:
    found = (dialect or Plain()).depths(index({(name,): (2, 2) for name in names}))
    return {str(path[0]): depth for path, depth in found.items()}


def jax_depths(dialect: Dialect, shapes: Mapping[str, tuple[int, ...]], suffix: KeyPath = ()) -> dict[str, Depth]:
    """By names without root and suffix, whichever of the two spellings they are given in."""
    found = dialect.depths(index({("params", *name.split("/"), *suffix): shape for name, shape in shapes.items()}))
    end = -len(suffix) or None
    return {"/".join(map(str, path[1:end])): depth for path, depth in found.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("layout", ["pi0_lora", "pi05_lora", "pi0_fast_lora", "pi0_lora_paligemma_only"])
def test_openpi_stacks_18_and_27_layers(layout: str, suffix: KeyPath) -> None:
    leaves = json.loads((LAYOUTS / f"{layout}.json").read_text())
    shapes = {name: tuple(leaf["shape"]) for name, leaf in leaves.items()}
    expected = {name: Depth(None, 18) for name in shapes if name.startswith("PaliGemma/llm/layers/")}
    expected |= {name: Depth(None, 27) for name in shapes if name.startswith("PaliGemma/img/Transformer/encoderblock/")}
    assert len(expected) > 25
    assert jax_depths(OpenPI(), shapes, suffix) == expected


LLM, IMG = "PaliGemma/llm/layers", "PaliGemma/img/Transformer/encoderblock"


def pi0_shapes(layers: int | None, qkv: bool = False) -> dict[str, tuple[int, ...]]:
    leaves = build(PALIGEMMA, ACTION, layers=layers, qkv=qkv).leaves
    return {"/".join(path): values.shape for path, values in leaves.items() if "lora" not in "/".join(path)}


@pytest.mark.parametrize("qkv", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_every_leaf_below_a_scanned_module_is_stacked(layers: int, qkv: bool) -> None:
    shapes = pi0_shapes(layers, qkv)
    found = jax_depths(OpenPI(), shapes)
    assert {name for name in found if name.startswith(LLM)} == {name for name in shapes if name.startswith(LLM)}
    assert {depth for name, depth in found.items() if name.startswith(LLM)} == {Depth(None, layers)}
    # Its vision tower has 2 layers, whose heads come next.
    assert {depth for name, depth in found.items() if name.startswith(IMG)} == {Depth(None, 2)}


def test_heads_of_a_layer_that_is_not_scanned_are_no_layers() -> None:
    found = jax_depths(OpenPI(), pi0_shapes(None))
    assert found and all(name.startswith(IMG) for name in found)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_leaf_of_another_first_extent_is_not_stacked(suffix: KeyPath) -> None:
    shapes = pi0_shapes(3)
    other = f"{LLM}/pre_attention_norm/scale"
    for shape in [(4, 24), (24,), (3,), (), (0, 24)]:
        found = jax_depths(OpenPI(), shapes | {other: shape}, suffix)
        assert other not in found
        assert found[f"{LLM}/attn/q_einsum/w"] == Depth(None, 3)


def test_leaves_of_unknown_modules_are_stacked_as_those_beside_them() -> None:
    shapes = {
        **pi0_shapes(3),
        f"{LLM}/gate": (3,),
        f"{LLM}/new/kernel": (3, 5),
        f"{LLM}/step": (),
        f"{LLM}/odd": (5, 3),
    }
    found = jax_depths(OpenPI(), shapes)
    assert {name for name in found if name.removeprefix(f"{LLM}/") in ("gate", "new/kernel", "step", "odd")} == {
        f"{LLM}/gate",
        f"{LLM}/new/kernel",
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("spelling", ["{stack}_{n}", "{stack}/{n}"])
def test_layers_that_are_not_scanned_are_numbered(spelling: str, suffix: KeyPath) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "PaliGemma/img/Transformer/encoder_norm/scale": (9,),
        "action_in_proj/bias": (9,),
    }
    expected: dict[str, Depth] = {}
    for stack, count, leaves in (
        (LLM, 11, {"attn/q_einsum/w": (4, 24, 6), "mlp_1/linear": (28, 16), "pre_ffw_norm_1/scale": (16,)}),
        (IMG, 3, {"LayerNorm_0/bias": (3,), "MlpBlock_0/Dense_1/kernel": (3, 6), "MlpBlock_0/Dense_1/bias": (6,)}),
    ):
        for n in range(count):
            for leaf, shape in leaves.items():
                name = f"{spelling.format(stack=stack, n=n)}/{leaf}"
                shapes[name] = shape
                expected[name] = Depth(n, count)
    assert jax_depths(OpenPI(), shapes, suffix) == expected


def test_integers_number_layers_as_their_digits_do() -> None:
    path: KeyPath = ("params", "layers", 4, "mlp", "kernel")
    shapes: dict[KeyPath, tuple[int, ...]] = {path: (3, 4), ("params", "layers", "0", "mlp", "kernel"): (3, 4)}
    for dialect in (OpenPI(), Nnx()):
        assert list(dialect.depths(index(shapes)).values()) == [Depth(4, 5), Depth(0, 5)]


MODELS: dict[str, dict[str, tuple[int, int] | None]] = {
    "llama": {
        "model.embed_tokens.weight": None,
        "model.layers.0.self_attn.q_proj.weight": (0, 12),
        "model.layers.2.input_layernorm.weight": (2, 12),
        "model.layers.11.mlp.down_proj.weight": (11, 12),
        "model.norm.weight": None,
        "lm_head.weight": None,
    },
    "mixtral": {
        "model.layers.0.mlp.experts.11.w1.weight": (0, 4),
        "model.layers.3.mlp.experts.7.w1.weight": (3, 4),
        "model.layers.3.block_sparse_moe.experts.0.w2.weight": (3, 4),
        "model.layers.1.mlp.gate.weight": (1, 4),
    },
    "qwen2_vl": {
        "visual.patch_embed.proj.weight": None,
        "visual.blocks.0.attn.qkv.bias": (0, 32),
        "visual.blocks.31.mlp.fc1.weight": (31, 32),
        "visual.merger.mlp.0.weight": None,
        "visual.merger.mlp.2.weight": None,
        "model.layers.27.self_attn.q_proj.weight": (27, 28),
    },
    "qwen3_vl": {
        "model.visual.blocks.26.norm1.bias": (26, 27),
        "model.visual.deepstack_merger_list.2.linear_fc1.weight": None,
        "model.language_model.layers.35.self_attn.q_norm.weight": (35, 36),
        "mtp.layers.0.self_attn.q_proj.weight": (0, 1),
    },
    "llava": {
        "vision_tower.vision_model.encoder.layers.23.self_attn.q_proj.weight": (23, 24),
        "vision_tower.vision_model.embeddings.class_embedding": None,
        "multi_modal_projector.linear_1.weight": None,
        "language_model.model.layers.31.mlp.up_proj.weight": (31, 32),
    },
    "openpi in torch": {
        "paligemma_with_expert.paligemma.model.language_model.layers.17.mlp.up_proj.weight": (17, 18),
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.26.layer_norm1.bias": (26, 27),
        "paligemma_with_expert.gemma_expert.model.layers.9.self_attn.q_proj.weight": (9, 10),
        "action_in_proj.weight": None,
    },
    "gpt2": {
        "wte.weight": None,
        "h.0.attn.c_attn.weight": (0, 12),
        "h.11.ln_1.bias": (11, 12),
        "ln_f.weight": None,
    },
    "gpt2 with a head": {"transformer.h.0.attn.c_proj.weight": (0, 2), "transformer.h.1.mlp.c_fc.weight": (1, 2)},
    "bert": {
        "bert.embeddings.word_embeddings.weight": None,
        "bert.encoder.layer.0.attention.self.query.weight": (0, 12),
        "bert.encoder.layer.11.output.LayerNorm.bias": (11, 12),
        "bert.pooler.dense.weight": None,
        "classifier.0.weight": None,
        "classifier.3.weight": None,
    },
    "t5": {
        "encoder.block.5.layer.0.SelfAttention.q.weight": (5, 6),
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": (0, 6),
        "decoder.block.3.layer.2.DenseReluDense.wo.weight": (3, 4),
    },
    "bart": {
        "model.encoder.layers.5.fc1.weight": (5, 6),
        "model.decoder.layers.2.encoder_attn.k_proj.weight": (2, 3),
    },
    "clip": {
        "visual.transformer.resblocks.23.attn.in_proj_weight": (23, 24),
        "transformer.resblocks.11.mlp.c_fc.weight": (11, 12),
    },
    "swin": {
        "encoder.layers.0.blocks.1.attention.self.query.weight": (0, 4),
        "encoder.layers.3.blocks.0.layernorm_before.weight": (3, 4),
    },
    "beit": {"blocks.0.gamma_1": (0, 2), "blocks.1.gamma_1": (1, 2), "blocks.0.attn.qkv.weight": (0, 2)},
    "detr": {
        "model.decoder.layers.5.fc1.weight": (5, 6),
        "bbox_embed.layers.0.weight": None,
        "bbox_embed.layers.2.bias": None,
        "class_embed.4.layers.1.weight": None,
    },
    "flux": {
        "transformer_blocks.18.attn.to_q.weight": (18, 19),
        "single_transformer_blocks.37.attn.to_q.weight": (37, 38),
    },
    "a policy's heads": {"action_head.mlp.0.weight": None, "action_head.mlp.2.net.0.weight": None, "0.weight": None},
    "a training file": {
        "module.model.layers.0.mlp.up_proj.weight": (0, 2),
        "module._orig_mod.model.layers.1._checkpoint_wrapped_module.mlp.up_proj.weight": (1, 2),
    },
}


@pytest.mark.parametrize("names", MODELS.values(), ids=MODELS.keys())
def test_layers_by_number(names: dict[str, tuple[int, int] | None]) -> None:
    expected = {name: Depth(*layer) for name, layer in names.items() if layer is not None}
    assert torch_depths(names) == expected


MINIMIND = {
    "model.embed_tokens.weight": None,
    "model.layers.0.self_attn.q_proj.weight": Depth(0, 8),
    "model.layers.7.mlp.gate_proj.weight": Depth(7, 8),
    "model.layers.7.post_attention_layernorm.weight": Depth(7, 8),
    "model.norm.weight": None,
}


OF_TORCH_MODELS = [dialect for dialect in adapter_dialects() if not isinstance(dialect, Detached)]


@pytest.mark.parametrize("dialect", [Plain(), MiniMind(), *OF_TORCH_MODELS], ids=lambda dialect: dialect.name)
def test_what_is_merged_into_is_a_torch_model_for_every_dialect_beside_it(dialect: Dialect) -> None:
    assert torch_depths(MINIMIND, dialect) == {name: depth for name, depth in MINIMIND.items() if depth is not None}


def test_nested_names_count_as_dotted_ones() -> None:
    nested: list[KeyPath] = [
        ("model", "layers.0.mlp.weight"),
        ("model", "layers", 2, "mlp", "weight"),
        ("ema", "layers.5.mlp.weight"),
        ("optimizer", "state", 0, "exp_avg", "x"),
    ]
    found = Plain().depths(index(dict.fromkeys(nested, (2,))))
    assert found == {nested[0]: Depth(0, 3), nested[1]: Depth(2, 3), nested[2]: Depth(5, 6)}


@pytest.mark.parametrize("number", ["-1", "1_5", "²", "٣", "1" * 5000, "0x1", "1e3", ""])
def test_what_is_no_number_of_a_layer_is_none(number: str) -> None:
    assert torch_depths([f"model.layers.{number}.mlp.up_proj.weight"]) == {}
    path: KeyPath = ("params", "layers", number, "mlp", "kernel")
    assert Nnx().depths(index({path: (2,)})) == {}


LAYER: dict[str, tuple[int, ...]] = {
    "q/kernel": (3, 4),
    "q/bias": (4,),
    "q/lora/lora_a": (3, 2),
    "q/lora/lora_b": (2, 4),
    "o/base_module/kernel": (4, 3),
    "o/lora_a": (4, 2),
    "o/lora_b": (2, 3),
    "norm/scale": (3,),
}
OWN = ("q/kernel", "q/bias", "o/base_module/kernel", "norm/scale")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("spelling", ["layers/{n}", "layers_{n}", "decoder/blocks/{n}"])
def test_nnx_layers_by_number(spelling: str, suffix: KeyPath) -> None:
    prefixes = [spelling.format(n=n) for n in range(3)]
    shapes = {f"{prefix}/{name}": shape for prefix in prefixes for name, shape in LAYER.items()}
    found = jax_depths(Nnx(), {**shapes, "embed/embedding": (9, 3)}, suffix)
    owned = {name: depth for name, depth in found.items() if "lora_" not in name}
    assert owned == {f"{prefix}/{name}": Depth(n, 3) for n, prefix in enumerate(prefixes) for name in OWN}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("stack", ["layers", "decoder/blocks"])
def test_nnx_layers_along_the_first_axis(stack: str, suffix: KeyPath) -> None:
    shapes = {f"{stack}/{name}": (5, *shape) for name, shape in LAYER.items()}
    # Five classes are no layers.
    shapes |= {f"{stack}/count": (), "head/kernel": (5, 3), "head/bias": (5,)}
    found = jax_depths(Nnx(), shapes, suffix)
    owned = {name: depth for name, depth in found.items() if "lora_" not in name}
    assert owned == {f"{stack}/{name}": Depth(None, 5) for name in OWN}


def test_nnx_kernels_under_no_stack_are_stacks_of_their_own() -> None:
    shapes = {f"a/{name}": (5, *shape) for name, shape in LAYER.items()}
    shapes |= {f"b/{name}": (2, *shape) for name, shape in LAYER.items()}
    shapes |= {f"c/{name}": shape for name, shape in LAYER.items()}
    found = jax_depths(Nnx(), shapes)
    owned = {name: depth for name, depth in found.items() if "lora_" not in name}
    expected = {f"a/{name}": Depth(None, 5) for name in OWN} | {f"b/{name}": Depth(None, 2) for name in OWN}
    # Nothing says that the norm beside them is stacked.
    assert owned == {name: depth for name, depth in expected.items() if "norm" not in name}


def test_nnx_experts_that_are_stacked_in_a_numbered_layer_are_that_layers() -> None:
    shapes = {f"layers/{n}/experts/{name}": (5, *shape) for n in range(2) for name, shape in LAYER.items()}
    found = jax_depths(Nnx(), shapes)
    assert found["layers/1/experts/q/kernel"] == Depth(1, 2)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("module", ["q/", "o/"])
def test_a_sequential_module_is_no_stack_with_or_without_adapters(module: str, suffix: KeyPath) -> None:
    leaves = {name.removeprefix(module): shape for name, shape in LAYER.items() if name.startswith(module)}
    adapted = {f"layers/{n}/{name}": shape for n in range(2) for name, shape in leaves.items()}
    dense = {name: shape for name, shape in adapted.items() if "lora" not in name}
    assert jax_depths(Nnx(), adapted, suffix) == jax_depths(Nnx(), dense, suffix) == {}
    assert module == "o/" or jax_depths(OpenPI(), dense, suffix) == {}


def test_a_stack_without_layers_is_none() -> None:
    shapes: dict[str, tuple[int, ...]] = {f"{LLM}/attn/q_einsum/w": (0, 4, 24, 6), f"{LLM}/gate": (0,)}
    assert jax_depths(OpenPI(), shapes) == {}


def test_empty_checkpoints_have_no_layers() -> None:
    for dialect in (*DIALECTS, *adapter_dialects()):
        assert dialect.depths(index({})) == {}
        assert dialect.depths(index({(): (3,)})) == {}


STACK = st.sampled_from(["model.layers", "vision.encoder.layers", "h", "bert.encoder.layer", "visual.blocks"])
LEAF = st.sampled_from(["attn.q.weight", "mlp.experts.7.w1.weight", "mlp.0.bias", "norm.weight", "layer.0.x.weight"])


@given(st.dictionaries(STACK, st.dictionaries(st.integers(0, 99), st.sets(LEAF, min_size=1), min_size=1, max_size=4)))
def test_a_stack_has_as_many_layers_as_its_largest_number_says(stacks: dict[str, dict[int, set[str]]]) -> None:
    expected = {
        f"{stack}.{layer}.{leaf}": Depth(layer, max(layers) + 1)
        for stack, layers in stacks.items()
        for layer, leaves in layers.items()
        for leaf in leaves
    }
    assert torch_depths([*expected, "lm_head.weight", "score.2.weight"]) == expected


@given(st.lists(st.sampled_from(["layers", "h", "0", "7", "mlp", "weight", "x_3", "layers_2", ""]), max_size=6))
def test_a_layer_is_below_the_count_whatever_the_name(parts: list[str]) -> None:
    for dialect in (*DIALECTS, *adapter_dialects()):
        for depth in dialect.depths(index({tuple(parts): (2, 2)})).values():
            assert depth.layer is not None and 0 <= depth.layer < depth.count
