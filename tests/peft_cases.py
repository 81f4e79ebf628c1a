"""Tiny models, their PEFT adapters, and what peft itself makes of the two: the oracle of the end-to-end tests.

Needs torch, transformers and peft; import it after ``pytest.importorskip("peft")``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hub_logging

from tests.command import Outcome, run

Tensors = dict[str, torch.Tensor]

VOCAB = 96
COMPANIONS = {
    "tokenizer.json": b'{"version": "1.0", "added_tokens": []}\n',
    "chat_template.jinja": b"{{ messages }}\r\n",
    "merges.txt": b"#version: 0.2\na b\n",
}

hub_logging.set_verbosity_error()
hub_logging.disable_progress_bar()
logging.getLogger("peft").setLevel(logging.ERROR)
torch.set_num_threads(1)

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def small_config(kind: str, **changes: Any) -> Any:
    """The configuration of a tiny model of that transformers model type."""
    settings: dict[str, Any] = dict(_SMALL)
    if kind == "gpt2":
        settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
        settings |= {"bos_token_id": 1, "eos_token_id": 2}
    elif kind == "llama":
        settings |= {"attention_bias": True, "mlp_bias": True}
    elif kind in ("mixtral", "gpt_oss"):
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    elif kind == "qwen3_moe":
        settings |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
    if kind in ("gpt_oss", "qwen3_moe"):
        settings |= {"head_dim": 8}
    return transformers.AutoConfig.for_model(kind, **(settings | changes))


def shaken(model: Any, seed: int = 0, size: float = 0.15) -> Any:
    """The model, with noise on every parameter: no bias is zero, no norm is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def small_model(kind: str, auto: Any = transformers.AutoModelForCausalLM, **changes: Any) -> Any:
    """A tiny model of that transformers model type, with random weights."""
    torch.manual_seed(7)
    return shaken(auto.from_config(small_config(kind, **changes)))


def small_vision_language_model(kind: str) -> tuple[Any, Any]:
    """A tiny llava, paligemma or qwen2_vl, and the class that loads it; their checkpoints hold other names than the model."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    if kind == "llava":
        config = transformers.LlavaConfig(
            vision_config=vision | {"model_type": "clip_vision_model"},
            text_config=small_config("llama"),
            image_token_index=95,
        )
    elif kind == "paligemma":
        config = transformers.PaliGemmaConfig(
            vision_config=vision | {"model_type": "siglip_vision_model"},
            text_config=small_config("gemma", head_dim=8).to_dict(),
            image_token_index=95,
            projection_dim=32,
            hidden_size=32,
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        config = transformers.Qwen2VLConfig(
            vision_config={
                "depth": 1,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 8,
            },
            text_config=_SMALL | {"rope_parameters": rope},
        )
    torch.manual_seed(7)
    auto = transformers.AutoModelForImageTextToText
    return shaken(auto.from_config(config)), auto


def save_base(model: Any, directory: Path, dtype: torch.dtype | None = None, **options: Any) -> Path:
    """Save a model as a Hugging Face directory, with files beside the weights."""
    model = model if dtype is None else model.to(dtype)
    model.save_pretrained(directory, **options)
    for name, data in COMPANIONS.items():
        (directory / name).write_bytes(data)
    return directory


def save_plain(module: torch.nn.Module, directory: Path) -> Path:
    """Save a plain torch module as a directory with one safetensors file."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"architectures": ["Net"], "model_type": "net"}))
    return directory


def train(model: Any, seed: int = 1) -> Any:
    """Move every trainable parameter away from its initial value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise.abs())
            else:
                parameter.add_(0.2 * noise)
    return model.eval()


def save_adapter(
    model: Any, config: Any, directory: Path, *, seed: int = 1, edit: Callable[[Any], Any] | None = None, **options: Any
) -> Path:
    """Adapt a copy of the model, pretend to train it, and save the adapter as peft does."""
    with quiet(), mock.patch.object(peft.PeftModel, "create_or_update_model_card"):
        adapted = train(peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config)), seed)
        if edit is not None:
            edit(adapted)
        adapted.save_pretrained(directory, **options)
    return directory


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def with_adapter(base: Path, adapter: Path, auto: Any = transformers.AutoModelForCausalLM, **options: Any) -> Any:
    """The base with the adapter on it, unmerged, as peft loads the two."""
    with quiet():
        rows = options.pop("rows", None)
        model = auto.from_pretrained(base, **options)
        if rows is not None:
            model.resize_token_embeddings(rows)
        return peft.PeftModel.from_pretrained(model, adapter).eval()


def merged_by_peft(base: Path, adapter: Path, auto: Any = transformers.AutoModelForCausalLM, **options: Any) -> Tensors:
    """What ``merge_and_unload`` and ``save_pretrained`` make of the two, under the names of a checkpoint."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        with_adapter(base, adapter, auto, **options).merge_and_unload().save_pretrained(folder)
        return tensors(Path(folder))


def merged_plain(module: torch.nn.Module, adapter: Path) -> Tensors:
    """What ``merge_and_unload`` makes of a plain torch module and an adapter."""
    with quiet():
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(module), adapter).merge_and_unload()
    return {key: value.detach().clone() for key, value in merged.state_dict().items()}


def tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, or of a directory of them."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found: Tensors = {}
    for file in files:
        part = load_file(file)
        assert not set(part) & set(found), f"{file} repeats a tensor"
        found |= part
    return found


def logits(model: Any) -> torch.Tensor:
    """What a model answers to a fixed text that holds every token of the smallest vocabulary."""
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3)).reshape(2, VOCAB // 2)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def reloaded(directory: Path, auto: Any = transformers.AutoModelForCausalLM, **options: Any) -> Any:
    """A model from a directory; every weight must be found there, and nothing else."""
    with quiet():
        model, info = auto.from_pretrained(directory, output_loading_info=True, **options)
    problems = {name: found for name, found in info.items() if found}
    assert not problems, problems
    return model


def merge(base: Path, *adapters: object, out: Path, flags: tuple[object, ...] = ()) -> Tensors:
    """Merge with the tool, which must succeed, and read what it wrote."""
    outcome = attempt(base, *adapters, out=out, flags=flags)
    assert outcome.code == 0, outcome.stderr
    return tensors(out)


def attempt(base: Path, *adapters: object, out: Path, flags: tuple[object, ...] = ()) -> Outcome:
    """Merge with the tool; neither the base nor an adapter may change."""
    inputs = [base, *(Path(str(adapter).partition("@")[0]) for adapter in adapters)]
    before = [files(path) for path in inputs]
    outcome = run("merge", base, *(part for adapter in adapters for part in ("--adapter", adapter)), "-o", out, *flags)
    assert [files(path) for path in inputs] == before
    return outcome


def files(path: Path) -> dict[str, bytes]:
    """Every file under a directory, by relative name; or the one file."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], base: Tensors) -> None:
    """Each tensor is as expected within float32 rounding, and bit for bit where it is as in the base."""
    assert set(found) == set(expected)
    changed = 0
    for name, want in expected.items():
        got = found[name]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        if name in base and base[name].shape == want.shape and torch.equal(want, base[name]):
            assert torch.equal(got, want), f"{name} was not changed by peft"
        else:
            changed += 1
            assert_near(got, want, name)
    assert changed, "the adapter changes nothing"


def assert_near(found: torch.Tensor, expected: torch.Tensor, name: str = "", tolerance: float = 2e-6) -> None:
    """The largest difference is small beside the largest expected value."""
    difference = (found.double() - expected.double()).abs().max().item()
    assert difference <= tolerance * expected.double().abs().max().item(), f"{name}: off by {difference}"


def assert_forward(merged: Any, adapted: Any, base: Any = None) -> None:
    """A merged model answers as the adapted one does, which answers otherwise than the base does."""
    want = logits(adapted)
    assert_near(logits(merged), want, "logits", 2e-5)
    if base is not None:
        plain = logits(base)
        if plain.shape == want.shape:
            assert (plain - want).abs().max() > 1e-2 * want.abs().max(), "the adapter changes nothing"


def edit_config(directory: Path, **changes: Any) -> Path:
    """Change an adapter's configuration."""
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
    return directory


def edit_factors(directory: Path, change: Callable[[Tensors], Mapping[str, torch.Tensor]]) -> Path:
    """Change an adapter's tensors."""
    path = directory / "adapter_model.safetensors"
    found = change(load_file(path))
    save_file({key: value.contiguous() for key, value in found.items()}, path, metadata={"format": "pt"})
    return directory


def renamed(directory: Path, rule: Callable[[str], str]) -> Path:
    """Rename an adapter's tensors."""
    return edit_factors(directory, lambda found: {rule(key): value for key, value in found.items()})


def copied(directory: Path, to: Path) -> Path:
    """A copy of a directory, to be edited."""
    return Path(shutil.copytree(directory, to))
