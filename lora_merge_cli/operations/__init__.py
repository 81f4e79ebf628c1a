"""Operations on leaves."""

from __future__ import annotations

from lora_merge_cli.operations.add_delta import AddDelta
from lora_merge_cli.operations.interface import Operation

OPERATIONS: tuple[Operation, ...] = (AddDelta(),)


def operation_named(name: str) -> Operation:
    """The registered operation of that name."""
    return next(operation for operation in OPERATIONS if operation.name == name)
