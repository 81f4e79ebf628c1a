"""Which JAX device computes."""

from __future__ import annotations

from typing import Any

from lora_merge_cli.errors import UsageError


def find_device(name: str | None) -> Any:
    """The JAX device of that name, ``platform`` or ``platform:index``; JAX's default if None.

    Raises:
        UsageError: There is no such device here.
    """
    import jax

    if name is None:
        return jax.devices()[0]
    platform, _, index = name.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, ValueError, IndexError) as error:
        available = ", ".join(f"{d.platform}:{d.id}" for d in jax.devices())
        raise UsageError("--device names no device here", expected=available, found=name) from error
