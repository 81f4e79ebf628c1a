"""Several fine-tunes of one base as one: what a joining method makes of them, offered as a checkpoint like any other.

`source.JoinedSource` computes, and needs JAX; what is exported here does not.
"""

from __future__ import annotations

from lora_merge_cli.joining.method import METHODS, Joining, Method

__all__ = ["METHODS", "Joining", "Method"]
