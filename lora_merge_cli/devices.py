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

    try:
        default = jax.devices()
    except RuntimeError as error:
        raise UsageError("JAX finds no device", found=error, hint="see JAX_PLATFORMS") from error
    if name is None:
        return default[0]
    platform, _, index = name.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, ValueError, IndexError) as error:
        available = ", ".join(f"{device.platform}:{device.id}" for device in default)
        raise UsageError("--device names no device here", expected=available, found=name) from error
