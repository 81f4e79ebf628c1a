"""Additive PEFT adapters applied in float64, straight from the files, without peft and without the package.

It states the ideal that a stored dtype is rounded from. Linear, Conv1D, embedding and convolution layers, and DoRA on them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.peft_cases import tensors

Array = np.ndarray[Any, np.dtype[Any]]

_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?")


def exact(base: dict[str, torch.Tensor], *adapters: tuple[Path, float]) -> dict[str, Array]:
    """Each tensor that the adapters change, in float64: W + sum of weight * (W' - W)."""
    result: dict[str, Array] = {}
    for directory, weight in adapters:
        for name, change in _changes(base, directory).items():
            kernel = result.get(name, base[name].double().numpy())
            result[name] = kernel + weight * change
    return result


def _changes(base: dict[str, torch.Tensor], directory: Path) -> dict[str, Array]:
    config = json.loads((directory / "adapter_config.json").read_text())
    factors: dict[str, dict[str, Array]] = {}
    for key, value in tensors(directory).items():
        match = _FACTOR.fullmatch(key.removeprefix("base_model.model."))
        assert match, key
        factors.setdefault(match[1], {})[match[2].replace("embedding_", "")] = value.double().numpy()
    return {
        f"{module}.weight": _change(base[f"{module}.weight"], module, found, config)
        for module, found in factors.items()
    }


def _change(stored: torch.Tensor, module: str, factors: dict[str, Array], config: dict[str, Any]) -> Array:
    kernel = stored.double().numpy()
    a, b = factors["lora_A"], factors["lora_B"]
    rank = _setting(config, "rank_pattern", module, config["r"])
    alpha = _setting(config, "alpha_pattern", module, config["lora_alpha"])
    scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
    delta = scale * (b.reshape(-1, rank) @ a.reshape(rank, -1))
    embedding = "embed" in module or module.endswith("wte")
    transposed = delta.shape != kernel.shape or (config["fan_in_fan_out"] and not embedding)
    delta = (delta.T if kernel.ndim == 2 and transposed else delta).reshape(kernel.shape)
    if "lora_magnitude_vector" not in factors:
        return delta
    columns = kernel.ndim == 2 and transposed
    axes = (0,) if columns else tuple(range(1, kernel.ndim))
    tuned = kernel + delta
    norm = np.sqrt((tuned**2).sum(axes, keepdims=True))
    return factors["lora_magnitude_vector"].reshape(norm.shape) / norm * tuned - kernel


def _setting(config: dict[str, Any], pattern: str, module: str, default: float) -> Any:
    for key, value in config[pattern].items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def assert_rounded(found: torch.Tensor, ideal: Array, name: str = "") -> None:
    """The ideal, rounded to the dtype once: within an ulp everywhere, and nearly everywhere the nearest value."""
    nearest = torch.from_numpy(np.ascontiguousarray(ideal)).to(found.dtype)
    assert found.shape == nearest.shape, name
    differing = found != nearest
    assert differing.double().mean().item() < 0.01, f"{name}: {int(differing.sum())} of {found.numel()} not nearest"
    steps = (_steps(found) - _steps(nearest)).abs()
    assert steps.max().item() <= 1, f"{name}: {steps.max().item()} ulp away"


def _steps(values: torch.Tensor) -> torch.Tensor:
    """The number of a 16-bit float among those of its dtype, in order."""
    bits = values.contiguous().view(torch.int16).long()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
