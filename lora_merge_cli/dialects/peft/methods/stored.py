"""Random matrices that some methods share among all layers: without them in the file nobody but torch could tell what they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_merge_cli.dialects.peft.config import Fields
from lora_merge_cli.errors import UnsupportedCheckpoint


def projections(fields: Fields, title: str) -> Mapping[str, Any]:
    """The settings of a method whose shared matrices must be stored: none, and a problem where they are not."""
    if not fields.flag("save_projection", True):
        fields.problems.append(
            UnsupportedCheckpoint(
                f"{title} without its random matrices: they would have to be drawn again as torch draws them",
                where=fields.where,
                expected="save_projection true, and the matrices in the adapter",
                hint="load it with peft and save it with save_projection=True",
            )
        )
    return {}
