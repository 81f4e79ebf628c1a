"""How figures are written, the same in every report."""

from __future__ import annotations

from lora_merge_cli.report import LayerRecord, SiteRecord, SurvivalRecord

STATUS_WORDS = {
    "adapter": "LoRA factors",
    "frozen": "frozen",
    "lora": "frozen + LoRA",
    "trained": "fully trained",
}
"""What a fine-tune did to a group of leaves, in words."""


def byte_size(count: int) -> str:
    """A size with its binary unit."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("the last unit takes every size")


def quantity(count: int) -> str:
    """A count with its decimal suffix, for example ``2.5 B``."""
    for limit, suffix in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= limit:
            return f"{count / limit:.1f}{suffix}"
    return str(count)


def figure(value: float | None) -> str:
    """Three significant digits, or a dash where there is no figure."""
    if value is None:
        return "-"
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def short_scale(site: SiteRecord) -> str:
    """The scale in a few characters; marked where it was assumed."""
    if site.scale is None:
        return "unknown"
    return f"{site.scale:.4g}{' (assumed)' if site.scale_assumed else ''}"


def survival_for(site: SiteRecord | LayerRecord, dtype: str) -> SurvivalRecord | None:
    """The figures for one dtype, if measured."""
    return next((survival for survival in site.survival if survival.dtype == dtype), None)
