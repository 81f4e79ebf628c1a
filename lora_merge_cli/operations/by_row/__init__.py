"""Operations that say what becomes of some outputs' rows of a kernel: those whose change is no product of two thin factors.

Each is two steps: operands, on the host in float64, and the change, on the device in float32. JAX is imported by the second alone.
"""

from __future__ import annotations

from lora_merge_cli.operations.by_row.boft import Boft
from lora_merge_cli.operations.by_row.c3a import C3a
from lora_merge_cli.operations.by_row.hira import Hira
from lora_merge_cli.operations.by_row.hra import Hra
from lora_merge_cli.operations.by_row.ia3 import Ia3
from lora_merge_cli.operations.by_row.loha import Loha
from lora_merge_cli.operations.by_row.lokr import Lokr
from lora_merge_cli.operations.by_row.miss_bat import MissBat
from lora_merge_cli.operations.by_row.oft import Oft
from lora_merge_cli.operations.by_row.shira import Shira

__all__ = ["Boft", "C3a", "Hira", "Hra", "Ia3", "Loha", "Lokr", "MissBat", "Oft", "Shira"]
