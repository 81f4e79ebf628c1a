"""Checkpoints with torch's names, of Hugging Face's layout and of others: what a merge needs to know about the model itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_merge_cli.dialects.depths import numbered
from lora_merge_cli.dialects.interface import Group, ScaleOptions, Subject, Tree, looks_like_adapter
from lora_merge_cli.dialects.torch_names import clean_name, dotted
from lora_merge_cli.dtypes import BFLOAT16
from lora_merge_cli.errors import UnknownScale, UnmatchedAdapter
from lora_merge_cli.records import (
    AdapterSite,
    Depth,
    Forward,
    Index,
    KeyPath,
    ModelSummary,
    Survey,
    display,
    first_names,
)

GROUP = "model"
"""The group of every site: torch-named models have one alpha for all of it, or one per module that their adapter states."""

LINEAR = "ri,or->oi"
"""The equation of a linear layer: its weight is (out, in), ``lora_a`` (rank, in), ``lora_b`` (out, rank)."""

LINEAR_FORWARD = Forward("bti,oi->bto", "bti,ri->btr", "btr,or->bto")
"""What a linear layer and its adapter compute."""

_PARTS: tuple[tuple[str, str], ...] = (
    (
        "vision tower",
        r"vision\w*|visual|image_(?:tower|encoder|newline)|vit|clip|audio_\w+|(?:multi_modal|mm)_projector|connector",
    ),
    ("experts", r"experts|shared_experts?|block_sparse_moe|router"),
    ("head", r"lm_head|embed_out|score|classifier|qa_outputs"),
    ("embeddings", r"\w*embed(?:ding)?s?(?:_\w+)?|wte|wpe|tok_embeddings"),
    ("normalisation", r"\w*norm\d*|\w*layer_?norm\w*|\w*_norm\w*|ln_\w+|norm\w*"),
    ("attention", r"\w*attn|\w*attention|[qkvo]_proj|out_proj|qkv|c_attn"),
    (
        "feed-forward",
        r"mlp|ffn?|feed_forward|(?:gate|up|down|gate_up)_proj|fc\d|w[123]|dense\w*|intermediate|output|c_fc|c_proj",
    ),
)
"""Parts of a model by the usual names of its modules: the first that some part of the name fits."""

_PART_PATTERNS = tuple((part, re.compile(pattern, re.IGNORECASE)) for part, pattern in _PARTS)

_TORCH_LEAF = re.compile(
    r"(?:.+\.)?(?:weight|bias|running_mean|running_var|num_batches_tracked|inv_freq|A_log|D|dt_bias|position_ids)"
    r"|.+\.(?:gate_up_proj|down_proj|up_proj|in_proj_weight|in_proj_bias|class_embedding)"
)

_INSIDE = re.compile(
    r"(?:^|\.)(?:lora(?:_\w+)?|base_layer|hada_\w+|lokr_\w+|ia3_l|modules_to_save|original_module)(?:\.|$)"
)


def short_name(name: str) -> str:
    """A tensor's name without what all names share, for tables: ``layers.0.self_attn.q_proj``."""
    return clean_name(name).removeprefix("model.").removesuffix(".weight")


class TorchModel:
    """The half of a dialect that is about the model: the same for every adapter that is merged into a torch-named checkpoint."""

    groups: tuple[str, ...] = ()
    serving_dtype = BFLOAT16
    tells_frozen = False

    def unknown_scale(self, sites: Sequence[AdapterSite], where: str) -> UnknownScale:
        """See `Dialect.unknown_scale`."""
        ranks = sorted({site.parameters.rank for site in sites})
        return UnknownScale(
            "the LoRA scale is not stored",
            where=f"{where} :: {sites[0].name}",
            found=f"rank {', '.join(map(str, ranks))} and no alpha",
            hint="pass --lora-alpha ALPHA, and --rslora if it was trained so",
        )

    def summary(self, tree: Tree) -> ModelSummary:
        """See `Dialect.summary`: what config.json calls it."""
        kind = (tree.config or {}).get("model_type")
        return ModelSummary(kind if isinstance(kind, str) and kind else "unknown")

    def grouping(self, index: Index, sites: tuple[AdapterSite, ...]) -> Mapping[KeyPath, Group]:
        """See `Dialect.grouping`: what no adapter is on was left as it was."""
        under = {target for site in sites for target in site.targets}
        groups: dict[KeyPath, Group] = {}
        for path in index.tensors:
            if path in under:
                groups[path] = "lora"
            else:
                groups[path] = "adapter" if _is_inside_adapter(path) else "frozen"
        return groups

    def part(self, path: KeyPath) -> str:
        """See `Dialect.part`."""
        names = dotted(path).split(".")
        fitting = (part for part, pattern in _PART_PATTERNS if any(map(pattern.fullmatch, names)))
        return next(fitting, "other")

    def depths(self, index: Index) -> Mapping[KeyPath, Depth]:
        """See `Dialect.depths`: by the numbers in the names; see `numbered`."""
        return numbered({path: dotted(path).split(".") for path in index.tensors})

    def canonical(self, path: KeyPath) -> KeyPath:
        """See `Dialect.canonical`: one dotted name, without what wrappers add."""
        return (dotted(path),)

    def unservable(self, index: Index) -> str | None:  # noqa: ARG002  (loaders look names up)
        """See `Dialect.unservable`."""
        return None

    def fused_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """See `Dialect.fused_dtype`: the base's own, which its loaders expect."""
        return stored


class Plain(TorchModel):
    """A torch-named checkpoint by itself: its adapters, if it had any, are elsewhere."""

    name = "torch"

    def matches(self, tree: Tree) -> bool:
        """See `Dialect.matches`: most paths are one dotted name that ends as torch's do."""
        paths = tree.index.tensors
        named = sum(len(path) == 1 and _TORCH_LEAF.fullmatch(str(path[0])) is not None for path in paths)
        return 2 * named > len(paths)

    def survey(self, subject: Subject, options: ScaleOptions) -> Survey:  # noqa: ARG002  (nothing here has a scale)
        """See `Dialect.survey`: there are no sites, and what looks like an adapter's is a problem."""
        inside = [path for path in subject.checkpoint.index.tensors if _is_inside_adapter(path)]
        if not inside:
            return Survey(())
        problem = UnmatchedAdapter(
            "adapters inside a torch checkpoint",
            where=f"{subject.checkpoint.where} :: {first_names(map(display, inside))}",
            expected="the adapter in a directory or file of its own",
            hint="save base and adapter apart (PEFT: model.save_pretrained), then merge BASE --adapter ADAPTER",
        )
        return Survey((), problems=(problem,))


def _is_inside_adapter(path: KeyPath) -> bool:
    return looks_like_adapter(path) or _INSIDE.search(dotted(path)) is not None
