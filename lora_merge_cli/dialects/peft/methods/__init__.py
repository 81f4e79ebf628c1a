"""PEFT's methods besides the LoRA family, one file each; `interface.Method` says what a file holds.

`config` reads a method's configuration, `keys` its keys, `survey` fits what is found to the base. What is brought whole, embeddings
that are tied, and names are dealt with as for LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_merge_cli.dialects.peft.methods.adalora import AdaLora
from lora_merge_cli.dialects.peft.methods.boft import Boft
from lora_merge_cli.dialects.peft.methods.c3a import C3a
from lora_merge_cli.dialects.peft.methods.delora import DeLora
from lora_merge_cli.dialects.peft.methods.hira import Hira
from lora_merge_cli.dialects.peft.methods.hra import Hra
from lora_merge_cli.dialects.peft.methods.ia3 import Ia3
from lora_merge_cli.dialects.peft.methods.interface import Method
from lora_merge_cli.dialects.peft.methods.ln_tuning import LnTuning
from lora_merge_cli.dialects.peft.methods.loha import LoHa
from lora_merge_cli.dialects.peft.methods.lokr import LoKr
from lora_merge_cli.dialects.peft.methods.miss import Miss
from lora_merge_cli.dialects.peft.methods.oft import Oft
from lora_merge_cli.dialects.peft.methods.randlora import RandLora
from lora_merge_cli.dialects.peft.methods.shira import Shira
from lora_merge_cli.dialects.peft.methods.vera import Vera

METHODS: tuple[Method, ...] = (
    AdaLora(),
    LoHa(),
    LoKr(),
    Ia3(),
    Vera(),
    Oft(),
    Boft(),
    Hra(),
    LnTuning(),
    Miss(),
    Hira(),
    Shira(),
    C3a(),
    DeLora(),
    RandLora(),
)
"""Every supported method."""


def method_of(config: Mapping[str, Any] | None) -> Method | None:
    """The method that a configuration names; None if that is none of these."""
    named = (config or {}).get("peft_type")
    return next((method for method in METHODS if named in method.peft_types), None)
