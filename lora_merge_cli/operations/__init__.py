"""Operations on leaves."""

from __future__ import annotations

from lora_merge_cli.operations.add_delta import AddDelta
from lora_merge_cli.operations.by_row import Boft, C3a, Hira, Hra, Ia3, Loha, Lokr, MissBat, Oft, Shira
from lora_merge_cli.operations.cutting import Cut, cut
from lora_merge_cli.operations.dora import Dora
from lora_merge_cli.operations.interface import Contribution, LowRankOperation, RowOperands, RowOperation
from lora_merge_cli.operations.low_rank import AdaLora, DeLora, Miss, RandLora, Vera
from lora_merge_cli.operations.mix import MixedLeaf, moments_of_no_change
from lora_merge_cli.operations.update import KernelUpdate, OutputNorms

LOW_RANK: tuple[LowRankOperation, ...] = (AddDelta(), Dora(), AdaLora(), Vera(), DeLora(), RandLora(), Miss())
BY_ROW: tuple[RowOperation, ...] = (
    Loha(),
    Lokr(),
    Ia3(),
    Oft(),
    Boft(),
    Hra(),
    Hira(),
    C3a(),
    Shira(),
    MissBat(),
)


def operation_named(name: str) -> LowRankOperation:
    """The registered low-rank operation of that name."""
    return next(operation for operation in LOW_RANK if operation.name == name)


def row_operation_named(name: str) -> RowOperation:
    """The registered operation by row of that name."""
    return next(operation for operation in BY_ROW if operation.name == name)


def is_row_operation(name: str) -> bool:
    """Whether an operation is one by row; else it is a low-rank one."""
    return any(operation.name == name for operation in BY_ROW)


__all__ = [
    "BY_ROW",
    "LOW_RANK",
    "Contribution",
    "Cut",
    "KernelUpdate",
    "LowRankOperation",
    "MixedLeaf",
    "OutputNorms",
    "RowOperands",
    "RowOperation",
    "cut",
    "is_row_operation",
    "moments_of_no_change",
    "operation_named",
    "row_operation_named",
]
