"""Write a Llama-shaped base in bfloat16 shards, and a PEFT adapter of rank 16 on every linear layer.

    python benchmarks/make_llama.py OUT [--layers 22] [--hidden 2048] [--inner 5632] [--vocabulary 32000] [--shard-bytes N]

OUT gets two folders, ``base`` and ``adapter``. The defaults are the shapes of TinyLlama 1.1B.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from values import Normals

from lora_merge_cli.dtypes import BFLOAT16, FLOAT32

RANK, ALPHA = 16, 32
HEAD, KEY_HEADS = 64, 4
BASE_STD, ADAPTER_STD = 0.02, 0.01
_NAMES = {BFLOAT16: "BF16", FLOAT32: "F32"}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Llama:
    """A model's sizes."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int

    @property
    def linears(self) -> Shapes:
        """The linear layers of one block: outputs, inputs."""
        keys = KEY_HEADS * HEAD
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    def base(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the base."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for name, shape in self.linears.items():
                yield f"model.layers.{layer}.{name}.weight", shape
            yield f"model.layers.{layer}.input_layernorm.weight", (self.hidden,)
            yield f"model.layers.{layer}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def adapter(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the adapter."""
        for layer in range(self.layers):
            for name, (out, inner) in self.linears.items():
                stem = f"base_model.model.model.layers.{layer}.{name}"
                yield f"{stem}.lora_A.weight", (RANK, inner)
                yield f"{stem}.lora_B.weight", (out, RANK)

    @property
    def config(self) -> dict[str, object]:
        """Its ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // HEAD,
            "num_key_value_heads": KEY_HEADS,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }

    @property
    def adapter_config(self) -> dict[str, object]:
        """The adapter's ``adapter_config.json``."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": [name.split(".")[1] for name in self.linears],
        }


def shards(shapes: Shapes, itemsize: int, most_bytes: int) -> list[Shapes]:
    """The tensors file by file, in their order."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * itemsize
        if files[-1] and held + size > most_bytes:
            files.append({})
            held = 0
        files[-1][name] = shape
        held += size
    return list(files)


def write_file(path: Path, shapes: Shapes, dtype: np.dtype[Any], std: float, normals: Normals) -> None:
    """Random tensors as a safetensors file; norms are ones. Format: github.com/huggingface/safetensors, README.md."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    document = json.dumps(header).encode()
    document += b" " * (-len(document) % 8)
    with path.open("wb") as file:
        file.write(len(document).to_bytes(8, "little") + document)
        for shape in shapes.values():
            values = np.ones(shape, dtype) if len(shape) == 1 else normals.values(shape, dtype, std)
            file.write(values.reshape(-1).view(np.uint8).data)


def write_base(directory: Path, shapes: Shapes, most_bytes: int, normals: Normals) -> None:
    """The base's shards and their index, as transformers names them."""
    files = shards(shapes, BFLOAT16.itemsize, most_bytes)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        write_file(directory / name, part, BFLOAT16, BASE_STD, normals)
        weight_map |= dict.fromkeys(part, name)
    if len(files) > 1:
        total = sum(int(np.prod(shape)) for shape in shapes.values()) * BFLOAT16.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="OUT")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--shard-bytes", type=int, default=800_000_000)
    options = parser.parse_args()
    model = Llama(options.layers, options.hidden, options.inner, options.vocabulary)
    base, adapter = options.directory / "base", options.directory / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    normals = Normals()
    write_base(base, dict(model.base()), options.shard_bytes, normals)
    (base / "config.json").write_text(json.dumps(model.config, indent=2))
    write_file(adapter / "adapter_model.safetensors", dict(model.adapter()), FLOAT32, ADAPTER_STD, normals)
    (adapter / "adapter_config.json").write_text(json.dumps(model.adapter_config, indent=2))


if __name__ == "__main__":
    main()
