"""Operations on leaves."""

from __future__ import annotations

from lora_merge_cli.operations.add_delta import AddDelta
from lora_merge_cli.operations.cutting import Cut, cut
from lora_merge_cli.operations.dora import Dora
from lora_merge_cli.operations.interface import Contribution, Operation
from lora_merge_cli.operations.mix import MixedLeaf, moments_of_no_change
from lora_merge_cli.operations.update import KernelUpdate, OutputNorms

OPERATIONS: tuple[Operation, ...] = (AddDelta(), Dora())


def operation_named(name: str) -> Operation:
    """The registered operation of that name."""
    return next(operation for operation in OPERATIONS if operation.name == name)


__all__ = [
    "OPERATIONS",
    "Contribution",
    "Cut",
    "KernelUpdate",
    "MixedLeaf",
    "Operation",
    "OutputNorms",
    "cut",
    "moments_of_no_change",
    "operation_named",
]
