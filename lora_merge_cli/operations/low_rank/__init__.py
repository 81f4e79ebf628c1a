"""Operations whose change of a kernel is a product of two thin factors, once these are made of what the trainer stores."""

from __future__ import annotations

from lora_merge_cli.operations.low_rank.adalora import AdaLora
from lora_merge_cli.operations.low_rank.delora import DeLora
from lora_merge_cli.operations.low_rank.miss import Miss
from lora_merge_cli.operations.low_rank.randlora import RandLora
from lora_merge_cli.operations.low_rank.vera import Vera

__all__ = ["AdaLora", "DeLora", "Miss", "RandLora", "Vera"]
