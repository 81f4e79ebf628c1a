"""The renamings between memory and disk that Transformers knows, as plain tables.

Source: huggingface/transformers 5.23, ``conversion_mapping.py``, and what tiny models of each family save; only what has modules
that adapters target. Experts that are separate on disk and fused in memory are the business of `peft.experts`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Step:
    """One renaming."""

    title: str
    """How errors name it; empty for the one that changes nothing."""
    prefixes: Pairs = ()
    """Starts of names, each with what replaces it; the longest that fits counts."""
    parts: Pairs = ()
    """Runs of whole dotted parts, anywhere, each with what replaces it."""

    def __call__(self, name: str) -> str:
        """The new name."""
        for old, new in self._longest_first:
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        return self._part.sub(lambda match: self._new_part[match[0]], name) if self.parts else name

    @functools.cached_property
    def _longest_first(self) -> Sequence[tuple[str, str]]:
        return sorted(self.prefixes, key=lambda pair: -len(pair[0]))

    @functools.cached_property
    def _new_part(self) -> dict[str, str]:
        return dict(self.parts)

    @functools.cached_property
    def _part(self) -> re.Pattern[str]:
        longest_first = sorted(self._new_part, key=lambda part: -len(part))
        return re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, longest_first))})(?![^.])")


identity = Step("")


@dataclass(frozen=True)
class Family:
    """How models of some types are named in memory and on disk."""

    title: str
    """A name for errors."""
    model_types: frozenset[str]
    """``model_type`` of the configurations that it applies to."""
    prefixes: Pairs = ()
    """Starts of names, in memory and on disk."""
    parts: Pairs = ()
    """Runs of whole dotted parts, in memory and on disk."""

    @property
    def to_disk(self) -> Step:
        """From memory to disk."""
        return Step(f"{self.title}: memory to disk", self.prefixes, self.parts)

    @property
    def to_memory(self) -> Step:
        """From disk to memory, for an adapter that is older than the base's spelling."""
        return Step(f"{self.title}: disk to memory", _swapped(self.prefixes), _swapped(self.parts))


def _swapped(pairs: Pairs) -> Pairs:
    return tuple((new, old) for old, new in pairs)


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _moved_into_model(*parts: str) -> Pairs:
    """Parts that are below ``model.`` in memory and at the top on disk."""
    return tuple((f"model.{part}", part) for part in parts)


_LANGUAGE_MODEL: Pairs = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)

FAMILIES: tuple[Family, ...] = (
    Family(
        "llava",
        _words(
            "llava llava_next llava_next_video llava_onevision vipllava video_llava paligemma shieldgemma2 gemma3 mistral3"
            " internvl aya_vision got_ocr2 pp_chart2table aria fuyu mllama qwen2_audio voxtral voxtral_realtime audioflamingo3"
            " musicflamingo glmasr granite_speech granite_speech_plus"
        ),
        prefixes=(
            *_LANGUAGE_MODEL,
            *_moved_into_model(
                "vision_tower.",
                "vision_model.",
                "image_tower.",
                "video_tower.",
                "audio_tower.",
                "multi_modal_projector.",
                "image_newline",
                "vision_embed_tokens.",
                "encoder.",
                "projector.",
            ),
        ),
        parts=(
            ("experts.gate_up_proj", "experts.fc1.weight"),
            ("experts.down_proj", "experts.fc2.weight"),
        ),
    ),
    Family(
        "qwen2_vl",
        _words("qwen2_vl qwen2_5_vl"),
        prefixes=(("model.language_model.", "model."), ("model.visual.", "visual.")),
    ),
    Family(
        "text half of a vision-language model",
        _words("qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text gemma3n gemma3n_text"),
        prefixes=(("model.", "model.language_model."),),
    ),
    Family(
        "emu3",
        _words("emu3"),
        prefixes=(
            ("model.text_model.", "text_model.model."),
            ("lm_head.", "text_model.lm_head."),
            ("model.vqmodel.", "vqmodel."),
        ),
    ),
    Family("gpt_neox", _words("gpt_neox"), prefixes=(("lm_head.", "embed_out."),)),
    Family("nemotron_h", _words("nemotron_h"), prefixes=(("model.", "backbone."),)),
    Family("mixtral", _words("mixtral minimax minimax_m2"), parts=(("mlp", "block_sparse_moe"),)),
    Family(
        "phimoe",
        _words("phimoe"),
        parts=(("mlp.router", "block_sparse_moe.gate"), ("mlp", "block_sparse_moe")),
    ),
    Family(
        "granitemoe",
        _words("granitemoe granitemoeshared granitemoehybrid"),
        parts=(
            ("experts.gate_up_proj", "input_linear.weight"),
            ("experts.down_proj", "output_linear.weight"),
            ("block_sparse_moe.router", "block_sparse_moe.router.layer"),
        ),
    ),
    Family(
        "vit",
        _words("vit deit ijepa vit_mae vit_msn vivit audio-spectrogram-transformer"),
        parts=(
            ("layers", "encoder.layer"),
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ),
    ),
    Family(
        "dinov2",
        _words("dinov2 dinov2_with_registers"),
        parts=(
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.down_proj", "mlp.weights_out"),
        ),
    ),
)
"""One entry per naming; both directions of each are tried."""

VISION_TOWERS: tuple[Step, ...] = (
    Step(
        "a vision tower with vision_model on disk",
        parts=(("vision_tower", "vision_tower.vision_model"), ("image_tower", "image_tower.vision_model")),
    ),
    Step(
        "a vision tower without vision_model on disk",
        parts=(("vision_tower.vision_model", "vision_tower"), ("image_tower.vision_model", "image_tower")),
    ),
)
"""CLIP and SigLIP towers lost a level in memory; checkpoints have it or not, by age."""

HEAD_PREFIXES: tuple[str, ...] = (
    "model.",
    "transformer.",
    "language_model.",
    "gpt_neox.",
    "bert.",
    "roberta.",
    "distilbert.",
    "electra.",
    "deberta.",
    "vit.",
    "vision_model.",
    "text_model.",
    "dinov2.",
    "state_dict.",
)
"""What a model with a head, or a file with more than weights, puts before the names of the bare model."""

CONTAINERS = _words(
    "state_dict model_state_dict model_state model net network module params weights"
    " ema ema_model model_ema ema_state_dict state_dict_ema params_ema ema_params teacher student"
)
"""Keys under which training files keep a model's state dict, beside what else they hold."""


def prefixing(prefix: str) -> Iterator[Step]:
    """Adding a prefix, and taking it away."""
    yield Step(f"with {prefix}", prefixes=(("", prefix),))
    yield Step(f"without {prefix}", prefixes=((prefix, ""),))
