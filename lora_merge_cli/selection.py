"""What ``--include`` and ``--exclude`` choose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_merge_cli.dialects import Dialect
from lora_merge_cli.errors import UsageError
from lora_merge_cli.records import AdapterSite, Dropped, KeyPath, display, glob_matches


def select_sites(
    dialect: Dialect, sites: Sequence[AdapterSite], include: Sequence[str], exclude: Sequence[str]
) -> tuple[tuple[AdapterSite, ...], tuple[AdapterSite, ...]]:
    """The sites that `--include` and `--exclude` choose, and the others.

    Raises:
        UsageError: A glob matches no site.
    """
    names = {site.name: _names(dialect, site) for site in sites}
    for flag, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if sites and not any(matches_any(found, (pattern,)) for found in names.values()):
                raise UsageError(
                    f"{flag} {pattern!r} matches no site",
                    expected=f"a glob for names such as {display(names[sites[0].name][-1])}",
                )

    def wanted(site: AdapterSite) -> bool:
        included = not include or matches_any(names[site.name], include)
        return included and not matches_any(names[site.name], exclude)

    return tuple(filter(wanted, sites)), tuple(site for site in sites if not wanted(site))


def excluded_factors(excluded: Sequence[AdapterSite]) -> list[Dropped]:
    """The factors of sites that are left out."""
    return [Dropped(path, "left out by --include or --exclude") for site in excluded for path in site.factors.values()]


def matches_any(names: Iterable[KeyPath], patterns: Sequence[str]) -> bool:
    """Whether a pattern matches a name, or the end of one from some separator on."""
    spellings = [spelled for pattern in patterns for spelled in (pattern, f"**/{pattern}")]
    return any(glob_matches(name, spelled) for name in names for spelled in spellings)


def _names(dialect: Dialect, site: AdapterSite) -> tuple[KeyPath, ...]:
    """What a site may be called: its kernel's full path, that without what all paths share, and its label."""
    return site.targets[0], dialect.canonical(site.targets[0]), (site.label,)
