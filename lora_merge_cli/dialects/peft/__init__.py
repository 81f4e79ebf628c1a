"""PEFT, the LoRA family: see `dialect`."""

from __future__ import annotations

from lora_merge_cli.dialects.peft.dialect import Peft

__all__ = ["Peft"]
