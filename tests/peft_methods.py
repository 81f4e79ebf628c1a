"""Adapters of PEFT's other methods, as the real peft writes them for tiny models; `peft_cases` trains and saves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file

from lora_merge_cli.dialects.interface import ScaleOptions, Subject, Tree
from lora_merge_cli.dialects.peft import Peft
from lora_merge_cli.records import AdapterSite, Array, Index, Survey, TensorSpec
from tests import peft_cases as cases


class Net(torch.nn.Module):
    """Layers of every kind that some method takes, wide and tall, square, and with a bias or without."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = torch.nn.Linear(16, 24)
        self.wide = torch.nn.Linear(24, 16, bias=False)
        self.square = torch.nn.Linear(16, 16)
        self.conv = torch.nn.Conv2d(4, 8, 3)
        self.pointwise = torch.nn.Conv2d(8, 12, 1, bias=False)
        self.line = torch.nn.Conv1d(6, 8, 3)
        self.cube = torch.nn.Conv3d(4, 6, 2)
        self.norm = torch.nn.LayerNorm(16)
        self.table = torch.nn.Embedding(12, 16)


class Grouped(torch.nn.Module):
    """A convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 8, 3, groups=2)


LINEAR = ["tall", "wide", "square"]
FLAT = [*LINEAR, "conv", "pointwise"]


@dataclass(frozen=True)
class Case:
    """One adapter of the net."""

    config: Callable[[], Any]
    """Makes its configuration."""
    operation: str
    """The operation of its sites."""
    scale: float | None = 1.0
    """Their scale; None if it is not the same for all."""
    edit: Callable[[Any], Any] | None = None
    """Changes the trained model before it is saved."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the sites' settings must say."""


def _ada(**changes: Any) -> Any:
    steps = {"total_step": 10, "tinit": 1, "tfinal": 1}
    settings = {"target_modules": FLAT, "init_r": 6, "target_r": 3, "lora_alpha": 5, **steps}
    return peft.AdaLoraConfig(**(settings | changes))


def prune(adapted: Any) -> None:
    """Keep every rank of one layer, some of another and none of a third, as AdaLoRA's allocator may."""
    kept = {"tall": [True] * 6, "wide": [True, False, True, False, False, True], "square": [False] * 6}
    adapted.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": mask for name, mask in kept.items()}


OFT_SETTINGS = {"block_share": False, "coft": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5}

CASES: dict[str, Case] = {
    "AdaLoRA": Case(_ada, "adalora", 5 / (6 + 1e-5)),
    "AdaLoRA without alpha": Case(lambda: _ada(lora_alpha=0), "adalora", 6 / (6 + 1e-5)),
    "AdaLoRA pruned": Case(lambda: _ada(target_modules=LINEAR), "adalora", 5 / (6 + 1e-5), prune),
    "LoHa": Case(lambda: peft.LoHaConfig(target_modules=[*FLAT, "line"], r=3, alpha=5), "loha", 5 / 3),
    "LoHa of kernels": Case(
        lambda: peft.LoHaConfig(target_modules=[*FLAT, "line"], r=3, alpha=5, use_effective_conv2d=True), "loha", 5 / 3
    ),
    "LoHa patterns": Case(
        lambda: peft.LoHaConfig(
            target_modules=LINEAR, r=3, alpha=5, rank_pattern={"tall": 2}, alpha_pattern={"square|wide": 7}
        ),
        "loha",
        None,
    ),
    "LoKr": Case(lambda: peft.LoKrConfig(target_modules=[*FLAT, "line"], r=2, alpha=5), "lokr", 5 / 2),
    "LoKr of kernels": Case(
        lambda: peft.LoKrConfig(
            target_modules=[*FLAT, "line"],
            r=1,
            alpha=5,
            use_effective_conv2d=True,
            decompose_both=True,
            decompose_factor=2,
        ),
        "lokr",
        5.0,
    ),
    "LoKr of products": Case(
        lambda: peft.LoKrConfig(target_modules=[*FLAT, "line"], r=1, alpha=3, decompose_both=True, decompose_factor=2),
        "lokr",
        3.0,
    ),
    "LoKr of nothing low-rank": Case(lambda: peft.LoKrConfig(target_modules=FLAT, r=12, alpha=5), "lokr", 5 / 12),
    "IA3": Case(
        lambda: peft.IA3Config(target_modules=[*FLAT, "cube"], feedforward_modules=["wide", "pointwise"]), "ia3"
    ),
    "IA3 by expression": Case(
        lambda: peft.IA3Config(target_modules=[*FLAT, "cube"], feedforward_modules=r"(tall|square|conv|cube)"), "ia3"
    ),
    "VeRA": Case(lambda: peft.VeraConfig(target_modules=LINEAR, r=5), "vera"),
    "VeRA with biases": Case(lambda: peft.VeraConfig(target_modules=LINEAR, r=5, bias="vera_only"), "vera"),
    "OFT": Case(
        lambda: peft.OFTConfig(target_modules=FLAT, oft_block_size=4), "oft", settings=OFT_SETTINGS | {"eps": 6e-5}
    ),
    "OFT of uneven blocks": Case(lambda: peft.OFTConfig(target_modules=FLAT, oft_block_size=5), "oft"),
    "OFT by number": Case(
        lambda: peft.OFTConfig(target_modules=FLAT, r=5, oft_block_size=0, num_cayley_neumann_terms=2), "oft"
    ),
    "OFT solved": Case(lambda: peft.OFTConfig(target_modules=FLAT, oft_block_size=4, use_cayley_neumann=False), "oft"),
    "OFT shared": Case(
        lambda: peft.OFTConfig(target_modules=FLAT, oft_block_size=4, block_share=True, num_cayley_neumann_terms=7),
        "oft",
        settings=OFT_SETTINGS | {"block_share": True, "num_cayley_neumann_terms": 7},
    ),
    "OFT constrained": Case(
        lambda: peft.OFTConfig(target_modules=FLAT, oft_block_size=4, coft=True, eps=0.3, bias="oft_only"),
        "oft",
        settings=OFT_SETTINGS | {"coft": True, "eps": 0.3},
    ),
    "BOFT": Case(lambda: peft.BOFTConfig(target_modules=FLAT, boft_block_size=4), "boft"),
    "BOFT by number": Case(
        lambda: peft.BOFTConfig(target_modules=FLAT, boft_block_num=4, boft_block_size=0, bias="all"), "boft"
    ),
    "HRA": Case(lambda: peft.HRAConfig(target_modules=FLAT, r=3), "hra", settings={"apply_GS": False}),
    "HRA orthogonal": Case(
        lambda: peft.HRAConfig(target_modules=FLAT, r=3, apply_GS=True), "hra", settings={"apply_GS": True}
    ),
    "MiSS": Case(lambda: peft.MissConfig(target_modules=LINEAR, r=4), "miss", settings={"mode": "default"}),
    "MiSS that does not divide": Case(lambda: peft.MissConfig(target_modules=LINEAR, r=7), "miss"),
    "MiSS mini": Case(
        lambda: peft.MissConfig(target_modules=LINEAR, r=3, mini_r=8, init_weights="mini"),
        "miss",
        settings={"mode": "mini"},
    ),
    "MiSS bat": Case(lambda: peft.MissConfig(target_modules=LINEAR, r=4, init_weights="bat"), "miss_bat"),
    "HiRA": Case(
        lambda: peft.HiraConfig(target_modules=[*FLAT, "line", "cube", "table"], r=4, rank_pattern={"wide": 2}), "hira"
    ),
    "SHiRA": Case(lambda: peft.ShiraConfig(target_modules=LINEAR, r=2, random_seed=1), "shira"),
    "C3A": Case(lambda: peft.C3AConfig(target_modules=LINEAR, block_size=4), "c3a", None),
    "C3A patterns": Case(
        lambda: peft.C3AConfig(target_modules=LINEAR, block_size=8, block_size_pattern={"tall": 4, "square": 16}),
        "c3a",
        None,
    ),
    "DeLoRA": Case(
        lambda: peft.DeloraConfig(target_modules=LINEAR, r=4, bias="delora_only", modules_to_save=["table"]),
        "delora",
        1 / 4,
    ),
    "DeLoRA patterns": Case(
        lambda: peft.DeloraConfig(target_modules=LINEAR, r=4, rank_pattern={"tall": 2}, lambda_pattern={"wide": 3}),
        "delora",
        None,
    ),
    "RandLora": Case(lambda: peft.RandLoraConfig(target_modules=LINEAR, r=5, randlora_alpha=10), "randlora", 2.0),
}
"""Every method but LN tuning, which has no sites."""


def net() -> Net:
    """The net, with values of its own."""
    torch.manual_seed(5)
    return cases.shaken(Net())


def save(case: Case, directory: Path, module: Any | None = None) -> Path:
    """Train and save an adapter of the net."""
    return cases.save_adapter(net() if module is None else module, case.config(), directory, edit=case.edit)


def tree(path: Path) -> Tree:
    """What a dialect sees of a directory."""
    specs: dict[tuple[str | int, ...], TensorSpec] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, value in load_file(file).items():
            specs[(name,)] = TensorSpec((name,), tuple(value.shape), value.numpy().dtype)
    config = next(file for file in path.iterdir() if file.name in ("adapter_config.json", "config.json"))
    return Tree(Index(specs), str(path), json.loads(config.read_text()))


def survey(base: Path, adapter: Path) -> Survey:
    """The survey of an adapter beside its base."""
    return Peft().survey(Subject(tree(base), tree(adapter)), ScaleOptions())


def taken(site: AdapterSite, leaves: cases.Tensors) -> dict[str, Array]:
    """What a site takes of the adapter's leaves, by role."""
    return {role: factor.of(leaves[str(factor.path[0])].numpy()) for role, factor in site.factors.items()}


def used(found: Survey) -> Iterator[str]:
    """The names of every adapter tensor that a survey has a use for, or a reason to leave out."""
    for site in found.sites:
        yield from (str(factor.path[0]) for factor in site.factors.values())
    yield from (str(one.path[0]) for one in found.replacements)
    yield from (str(one.path[0]) for one in found.dropped)
