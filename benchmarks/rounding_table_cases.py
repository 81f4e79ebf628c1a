"""Made-up checkpoints with adapters, whose kernels a rounding table is taken of: written, merged from, and read back.

Kernels come as inputs by outputs, whichever way round they are stored.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from lora_merge_cli import AdapterChoice, MergeOptions, MergeReport, MergeRequest, ScaleOptions
from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.formats.orbax_metadata import write_step, write_tree
from lora_merge_cli.formats.zarr_array import ZarrArray
from lora_merge_cli.formats.zarr_encoding import metadata_of
from lora_merge_cli.records import TensorSpec
from lora_merge_cli.report import SurvivalRecord

Matrix = NDArray[Any]

ALPHA = 24.0
"""Of every adapter; no rank is equal to it."""
KERNEL_STD = 0.02
HEADS = 8

SHAPES = {
    "outlier inputs": "lora_a's rows scaled by exp(2 z), z normal",
    "few active inputs": "lora_a is zero for 95% of the inputs",
    "one sign": "lora_a is positive: the delta has a mean",
    "falling spectrum": "each column of lora_a is 0.6 times the one before",
    "heavy-tailed kernel": "Student's t with 3 degrees of freedom",
    "kernel about 1": "1 + 0.02 z: all entries have one step, far larger than the delta",
    "64 inputs": "no more inputs than four times the rank",
}
"""Unfavourable shapes, and what they are."""


@dataclass(frozen=True)
class Case:
    """A kernel and an adapter on it."""

    inputs: int
    outputs: int
    rank: int
    size: float
    """The size of the delta: ``|delta| / |kernel|``, Frobenius."""
    shape: str = ""
    """One of `SHAPES`; empty for normally distributed values."""

    @property
    def name(self) -> str:
        """As a module's name, unique in a checkpoint."""
        words = [*self.shape.split(), f"in{self.inputs}", f"out{self.outputs}", f"rank{self.rank}"]
        return "_".join([*words, f"size{round(1e9 * self.size)}e9"])


@dataclass(frozen=True)
class Values:
    """What a case is made of."""

    kernel: Matrix
    """Inputs by outputs, as stored."""
    a: Matrix
    """Inputs by rank, float32."""
    b: Matrix
    """Rank by outputs, float32."""

    @property
    def delta(self) -> Matrix:
        """What the adapter adds, float64."""
        product: Matrix = (ALPHA / self.a.shape[1]) * (self.a.astype(np.float64) @ self.b.astype(np.float64))
        return product


def values_of(case: Case, seed: int, dtype: str) -> Values:
    """Random values of a case, with a delta of the size that it asks for."""
    rng = np.random.default_rng([seed, zlib.crc32(case.name.encode())])
    kernel = KERNEL_STD * rng.standard_normal((case.inputs, case.outputs))
    a = rng.standard_normal((case.inputs, case.rank)) / math.sqrt(case.rank)
    b = rng.standard_normal((case.rank, case.outputs))
    match case.shape:
        case "outlier inputs":
            a *= np.exp(2 * rng.standard_normal((case.inputs, 1)))
        case "few active inputs":
            a *= rng.random((case.inputs, 1)) < 0.05
        case "one sign":
            a = np.abs(a)
        case "falling spectrum":
            a *= 0.6 ** np.arange(case.rank)
        case "heavy-tailed kernel":
            kernel = KERNEL_STD * rng.standard_t(3, kernel.shape)
        case "kernel about 1":
            kernel += 1
    stored = kernel.astype(dtype_named(dtype))
    made = Values(stored, a.astype(np.float32), b.astype(np.float32))
    factor = case.size * np.linalg.norm(stored.astype(np.float64)) / np.linalg.norm(made.delta)
    return Values(stored, made.a, (b * factor).astype(np.float32))


@dataclass(frozen=True)
class Checkpoint(ABC):
    """Cases in one checkpoint."""

    cases: Sequence[Case]
    seed: int
    dtype: str
    """The name of the kernels' dtype."""

    def values(self) -> Iterator[tuple[Case, Values]]:
        """Every case, made anew: the same each time."""
        return ((case, values_of(case, self.seed, self.dtype)) for case in self.cases)

    @abstractmethod
    def write(self, directory: Path) -> None:
        """Write the inputs of a merge into an empty directory."""

    @abstractmethod
    def request(self, directory: Path, output: Path, options: MergeOptions) -> MergeRequest:
        """The merge of what was written there."""

    @abstractmethod
    def merged(self, output: Path) -> Mapping[str, Matrix]:
        """The merged kernels by the name of their case, inputs by outputs, as stored."""

    @abstractmethod
    def survival(self, report: MergeReport) -> Mapping[str, Sequence[SurvivalRecord]]:
        """What the report says of them."""


@dataclass(frozen=True)
class Peft(Checkpoint):
    """A PEFT adapter beside its base."""

    inputs_first: bool = False
    """Whether kernels are stored (inputs, outputs), as GPT-2's are, and not (outputs, inputs)."""

    def write(self, directory: Path) -> None:
        """As the base class says."""
        base, adapter = directory / "base", directory / "adapter"
        base.mkdir()
        adapter.mkdir()
        kernels, factors = {}, {}
        for case, values in self.values():
            stem = self._module(case)
            kernel = values.kernel if self.inputs_first else values.kernel.T
            kernels[f"{stem}.weight"] = np.ascontiguousarray(kernel)
            factors[f"base_model.model.{stem}.lora_A.weight"] = np.ascontiguousarray(values.a.T)
            factors[f"base_model.model.{stem}.lora_B.weight"] = np.ascontiguousarray(values.b.T)
        save_file(kernels, base / "model.safetensors", metadata={"format": "pt"})
        save_file(factors, adapter / "adapter_model.safetensors")
        ranks = {self._module(case): case.rank for case in self.cases}
        config = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": ALPHA,
            "rank_pattern": ranks,
            "target_modules": [*ranks],
            "fan_in_fan_out": self.inputs_first,
        }
        model = {"model_type": "gpt2" if self.inputs_first else "llama", "torch_dtype": self.dtype}
        (base / "config.json").write_text(json.dumps(model))
        (adapter / "adapter_config.json").write_text(json.dumps(config))

    def request(self, directory: Path, output: Path, options: MergeOptions) -> MergeRequest:
        """As the base class says."""
        adapters = (AdapterChoice(directory / "adapter"),)
        return MergeRequest(directory / "base", output, adapters, options=options)

    def merged(self, output: Path) -> Mapping[str, Matrix]:
        """As the base class says."""
        kernels = load_file(output / "model.safetensors")
        found = {case.name: kernels[f"{self._module(case)}.weight"] for case in self.cases}
        return found if self.inputs_first else {name: kernel.T for name, kernel in found.items()}

    def survival(self, report: MergeReport) -> Mapping[str, Sequence[SurvivalRecord]]:
        """As the base class says."""
        sites = {site.target: site for site in report.sites}
        return {case.name: sites[f"{self._module(case)}.weight"].survival for case in self.cases}

    def _module(self, case: Case) -> str:
        return f"layers.{self.cases.index(case)}.{'c_fc' if self.inputs_first else 'up_proj'}"


_MODULE = ("PaliGemma", "llm", "layers", "attn", "attn_vec_einsum")


class HeadSummed(Checkpoint):
    """The attention output of a pi0 fine-tune, one stacked layer for each case: its inputs are all heads' values together.

    lora_b is summed over the heads. Source: Physical-Intelligence/openpi, ``src/openpi/models/lora.py``.
    """

    def write(self, directory: Path) -> None:
        """As the base class says."""
        made = [values for _, values in self.values()]
        layers, (inputs, outputs), rank = len(made), made[0].kernel.shape, made[0].a.shape[1]
        shares = np.random.default_rng(self.seed).standard_normal((layers, HEADS, 1, 1))
        # The heads' shares add up to 1, and are not alike.
        shares = shares - shares.mean(axis=1, keepdims=True) + 1 / HEADS
        b = np.stack([values.b for values in made])[:, None] * shares
        leaves = {
            "w": np.stack([values.kernel for values in made]).reshape(layers, HEADS, inputs // HEADS, outputs),
            "lora_a": np.stack([values.a for values in made]).reshape(layers, HEADS, inputs // HEADS, rank),
            "lora_b": b.astype(np.float32),
        }
        step = directory / "1"
        item = step / "params"
        item.mkdir(parents=True)
        started_ns = time.time_ns()
        specs = {
            name: TensorSpec(("params", *_MODULE, name, "value"), leaf.shape, leaf.dtype)
            for name, leaf in leaves.items()
        }
        for name, spec in specs.items():
            _, document = metadata_of(ZarrArray(spec.shape, spec.shape, spec.dtype, "zstd"), 2)
            place = {
                "driver": "ocdbt",
                "base": f"file://{item.absolute()}/",
                "path": f"{'.'.join(map(str, spec.path))}/",
            }
            store = ts.open(
                {"driver": "zarr", "kvstore": place, "metadata": json.loads(document), "create": True}
            ).result()
            store.write(leaves[name]).result()
        write_tree(item, list(specs.values()), (), 2)
        write_step(step, "params", started_ns)

    def request(self, directory: Path, output: Path, options: MergeOptions) -> MergeRequest:
        """As the base class says."""
        options = dataclasses.replace(options, scales=ScaleOptions(alpha={"paligemma": ALPHA}))
        return MergeRequest(directory / "1", output, to="safetensors", options=options)

    def merged(self, output: Path) -> Mapping[str, Matrix]:
        """As the base class says."""
        (kernels,) = load_file(output / "params.safetensors").values()
        layers = kernels.reshape(len(kernels), -1, kernels.shape[-1])
        return {case.name: layer for case, layer in zip(self.cases, layers, strict=True)}

    def survival(self, report: MergeReport) -> Mapping[str, Sequence[SurvivalRecord]]:
        """As the base class says."""
        (site,) = report.sites
        return {case.name: layer.survival for case, layer in zip(self.cases, site.layers, strict=True)}
