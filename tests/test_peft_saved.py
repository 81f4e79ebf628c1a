"""``modules_to_save``: every module that was trained whole must be in the adapter, or what it learned is lost without a word."""

from __future__ import annotations

import pytest

from lora_merge_cli.errors import UnmatchedAdapter
from tests.peft_trees import LLAMA, PREFIX, QUERY, TIED, TIED_CONFIG, UNTIED_CONFIG, Shapes, survey

BARE = {name.removeprefix("model."): shape for name, shape in TIED.items()}
NORMS = {f"model.layers.{n}.input_layernorm.weight": (4,) for n in range(2)}
HEAD = {f"{PREFIX}lm_head.weight": (12, 4)}
EMBEDDING = {f"{PREFIX}model.embed_tokens.weight": (12, 4)}
UP = "model.layers.0.mlp.up_proj"


def _brought(names: Shapes) -> Shapes:
    return {f"{PREFIX}{name}": shape for name, shape in names.items()}


def _lost(*names: str, keys: Shapes = QUERY, base: Shapes = LLAMA, **others) -> str:
    found = survey(keys, base, modules_to_save=list(names), **others)
    lost = [str(one) for one in found.problems if isinstance(one, UnmatchedAdapter) and "trained whole" in str(one)]
    assert len(lost) == len(found.problems) <= 1, found.problems
    return lost[0] if lost else ""


HEADLESS = TIED_CONFIG | {"architectures": ["LlamaModel"]}


@pytest.mark.parametrize(
    ("names", "culprit", "base", "model"),
    [
        (["lm_head"], "lm_head", LLAMA, UNTIED_CONFIG),
        (["lm_head"], "lm_head", TIED, TIED_CONFIG),
        (["lm_head"], "lm_head", BARE, HEADLESS),
        (["embed_tokens"], "model.embed_tokens", LLAMA, UNTIED_CONFIG),
        (["embed_tokens"], "model.embed_tokens", TIED, TIED_CONFIG),
        (["model.norm"], "model.norm", BARE, HEADLESS),
        (["mlp"], f"{UP}.weight", LLAMA, UNTIED_CONFIG),
        (["0.mlp"], f"{UP}.weight", LLAMA, UNTIED_CONFIG),
        (["score"], "score.weight", LLAMA | {"score.weight": (3, 4)}, UNTIED_CONFIG),
        (["experts"], "mlp.experts.gate_up_proj", LLAMA | {"m.mlp.experts.gate_up_proj": (2, 4, 8)}, UNTIED_CONFIG),
    ],
)
def test_a_module_that_is_not_there(names, culprit, base, model):
    assert culprit in _lost(*names, base=base, model=model)


def test_each_module_that_the_name_ends_is_wanted():
    base = LLAMA | NORMS
    some = _brought({"model.norm.weight": (4,), "model.layers.0.input_layernorm.weight": (4,)})
    message = _lost("norm", keys=QUERY | some, base=base)
    assert "model.layers.1.input_layernorm.weight" in message
    assert "model.layers.0" not in message
    assert not _lost("norm", keys=QUERY | some | _brought(NORMS), base=base)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_each_tensor_of_a_module_is_wanted(part):
    both = {f"{PREFIX}{UP}.{name}": LLAMA[f"{UP}.{name}"] for name in ("weight", "bias")}
    one = {key: shape for key, shape in both.items() if not key.endswith(part)}
    assert f"{UP}.{part}" in _lost("up_proj", keys=QUERY | one)
    assert not _lost("up_proj", keys=QUERY | both)


def test_buffers_are_not_wanted():
    base = LLAMA | {f"{UP}.inv_freq": (4,), "model.layers.0.mlp.bias": (1, 1, 4, 4)}
    keys = {f"{PREFIX}{UP}.{name}": LLAMA[f"{UP}.{name}"] for name in ("weight", "bias")}
    assert not _lost("mlp", keys=QUERY | keys, base=base)


@pytest.mark.parametrize("names", [["classifier", "score"], ["head_of_mine"], [""], []])
def test_modules_that_the_base_does_not_have(names):
    assert not _lost(*names, task_type="SEQ_CLS")


def test_the_base_s_copy_is_not_the_trained_one():
    keys = {f"{PREFIX}lm_head.base_layer.weight": (12, 4)}
    keys |= {f"{PREFIX}lm_head.lora_A.weight": (2, 4), f"{PREFIX}lm_head.lora_B.weight": (12, 2)}
    assert "lm_head" in _lost("lm_head", keys=keys)


@pytest.mark.parametrize("prefix", ["model.", "transformer."])
def test_names_of_a_base_without_its_prefix(prefix):
    keys = {
        f"{PREFIX}{prefix}{key.removeprefix(PREFIX).removeprefix('model.')}": shape
        for key, shape in (QUERY | EMBEDDING).items()
    }
    assert not _lost(f"{prefix}embed_tokens", keys=keys, base=BARE, model=HEADLESS)


@pytest.mark.parametrize("keys", [HEAD, EMBEDDING, HEAD | EMBEDDING])
@pytest.mark.parametrize("names", [["lm_head"], ["model.embed_tokens"], ["embed_tokens", "lm_head"]])
def test_one_copy_of_tied_modules_that_were_trained_as_one(names, keys):
    for base in (TIED, LLAMA):
        assert not _lost(*names, keys=QUERY | keys, base=base, model=TIED_CONFIG, ensure_weight_tying=True)
        assert _lost(*names, keys=QUERY, base=base, model=TIED_CONFIG, ensure_weight_tying=True)


def test_tied_modules_that_were_trained_apart():
    assert not _lost("lm_head", keys=QUERY | HEAD, base=TIED, model=TIED_CONFIG)
    assert not _lost("embed_tokens", keys=QUERY | EMBEDDING, base=TIED, model=TIED_CONFIG)
    for one, other in ((HEAD, "embed_tokens"), (EMBEDDING, "lm_head")):
        assert other in _lost("embed_tokens", "lm_head", keys=QUERY | one, base=TIED, model=TIED_CONFIG)


def test_no_word_on_biases():
    found = survey(QUERY, bias=None)
    assert not found.problems
    assert len(found.sites) == 1
